"""CDAM on a pre-norm block whose prediction is read from the first token, by hand and one sample at a time."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from mhex_core.attention import cdam

EXACT = {"rtol": 0, "atol": 1e-12}
BATCH, TOKENS, CHANNELS, HEADS, CLASSES = 3, 6, 8, 2, 4
WAYS = [
    {"mode": "vanilla"},
    {"mode": "smooth", "steps": 5},
    {"mode": "smooth", "steps": 5, "noise": 0.3, "perturb_at": "attention_input"},
    {"mode": "integrated", "steps": 6},
    {"mode": "integrated", "steps": 6, "noise": 0.1, "seed": 3},
    {"mode": "integrated", "steps": 6, "perturb_at": "attention_input"},
    {"mode": "integrated", "steps": 6, "noise": 0.1, "perturb_at": "attention_input"},
    {"mode": "integrated_complete", "steps": 6},
]


class Block:
    """The last block and a linear classifier of the first token; `mask` (B, T) keeps keys from being attended to."""

    def __init__(self, *, mask=None, dtype=torch.float64, eps=1e-6):
        generator = torch.Generator().manual_seed(7)

        def draw(*shape, scale=0.5):
            return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

        self.wq, self.wk, self.wv, self.wo, self.w1, self.w2 = (draw(CHANNELS, CHANNELS) for _ in range(6))
        self.bq, self.bk, self.bv, self.b1 = (draw(CHANNELS) for _ in range(4))
        self.gain, self.shift, self.head = 1 + draw(CHANNELS), draw(CHANNELS), draw(CLASSES, CHANNELS)
        self.mask, self.eps, self.calls = mask, eps, []

    def normalize(self, hidden):
        return F.layer_norm(hidden, (CHANNELS,), self.gain, self.shift, self.eps)

    def parts(self, normed):
        """q, k, v (N, H, T, d)."""
        return [
            (normed @ weight.T + bias).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for weight, bias in ((self.wq, self.bq), (self.wk, self.bk), (self.wv, self.bv))
        ]

    def attend(self, normed, rows):
        """The attention (N, H, T, T) and what heads give out (N, H, T, d)."""
        q, k, v = self.parts(normed)
        logits = q @ k.transpose(2, 3) / math.sqrt(CHANNELS // HEADS)
        if self.mask is not None:
            logits = logits.masked_fill(~self.mask[rows][:, None, None], -torch.inf)
        attention = logits.softmax(dim=3)
        return attention, attention @ v

    def finish(self, hidden, out):
        hidden = hidden + out.transpose(1, 2).flatten(2) @ self.wo.T
        hidden = hidden + F.gelu(F.layer_norm(hidden, (CHANNELS,)) @ self.w1.T + self.b1) @ self.w2.T
        return F.layer_norm(hidden, (CHANNELS,))[:, 0] @ self.head.T

    def classify(self, hidden, normed, rows):
        assert rows.dtype == torch.int64
        assert not hidden.requires_grad
        self.calls.append(len(rows))
        return self.finish(hidden, self.attend(normed, rows)[1])


@pytest.fixture
def block():
    return Block()


@pytest.fixture
def hidden():
    return torch.randn(BATCH, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


TARGETS = torch.tensor([[1, 3], [0, 0], [2, 1]])


def slow_cdam(
    block, hidden, sample, target, *, mode, steps=50, noise=None, perturb_at="block_input", seed=0
):  # one sample, one target, one step at a time; as the methods are written down
    x = hidden[sample : sample + 1]
    row = torch.tensor([sample])
    noise = {"smooth": 0.05}.get(mode, 0.0) if noise is None else noise
    if mode == "vanilla":
        points = [1.0]
    elif mode == "smooth":
        points = [1.0] * steps
    elif mode == "integrated" and perturb_at == "block_input":
        points = [k / steps for k in range(1, steps)]
    elif mode == "integrated":
        points = [k / steps for k in range(steps + 1)]
    else:
        points = [(k + 0.5) / steps for k in range(steps)]
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    for step, point in enumerate(points):
        given, normed = x, block.normalize(x)
        drawn = torch.from_numpy(np.random.default_rng([seed, step]).standard_normal(x.shape[1:]))
        if mode in ("smooth", "integrated") and perturb_at == "block_input":
            given = point * x + noise * (x.max() - x.min()) * drawn
            normed = block.normalize(given)
        elif mode != "vanilla":
            normed = point * normed + noise * (normed.max() - normed.min()) * drawn
        normed = normed.detach().requires_grad_()
        (slope,) = torch.autograd.grad(block.classify(given, normed, row)[0, target], normed)
        times = block.normalize(x) if mode == "integrated_complete" else normed.detach()
        total += (times * slope)[0].sum(dim=1) / len(points)
    return total


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_it_equals_autograd_one_sample_and_step_at_a_time(block, hidden, way):
    maps = cdam(hidden, block.normalize, block.classify, TARGETS, **way)
    assert maps.shape == (BATCH, 2, TOKENS)
    assert not maps.requires_grad
    for sample in range(BATCH):
        for place in range(2):
            expected = slow_cdam(block, hidden, sample, int(TARGETS[sample, place]), **way)
            assert_close(maps[sample, place], expected, **EXACT)
    assert (maps < 0).any()
    assert (maps > 0).any()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_neither_the_batch_nor_its_division_is_felt(block, hidden, way):
    maps = cdam(hidden, block.normalize, block.classify, TARGETS, **way)
    assert len(block.calls) == 1
    for rows in (1, 2, 4, 7, 1000):
        block.calls.clear()
        divided = cdam(hidden, block.normalize, block.classify, TARGETS, rows_at_a_time=rows, **way)
        assert_close(divided, maps, **EXACT)
        assert max(block.calls) <= rows
    for sample in range(BATCH):
        one = cdam(hidden[sample : sample + 1], block.normalize, block.classify, TARGETS[sample : sample + 1], **way)
        assert_close(one[0], maps[sample], **EXACT)
    for place in range(2):
        one = cdam(hidden, block.normalize, block.classify, TARGETS[:, place : place + 1], **way)
        assert_close(one[:, 0], maps[:, place], **EXACT)


def test_it_equals_the_closed_form_that_scales_attention(block, hidden):
    target = 2
    maps = cdam(hidden, block.normalize, block.classify, torch.full((BATCH, 1), target))
    normed = block.normalize(hidden)
    rows = torch.arange(BATCH)
    attention, out = block.attend(normed, rows)
    out = out.detach().requires_grad_()
    (slope,) = torch.autograd.grad(block.finish(hidden, out)[:, target].sum(), out)
    q, _, v = block.parts(normed)
    width = CHANNELS // HEADS
    for sample in range(BATCH):
        for token in range(1, TOKENS):
            score = 0.0
            for head in range(HEADS):
                own = slice(head * width, (head + 1) * width)
                g, o = slope[sample, head, 0], out[sample, head, 0].detach()
                through_value = g @ (block.wv[own] @ normed[sample, token])
                through_key = q[sample, head, 0] @ (block.wk[own] @ normed[sample, token]) / math.sqrt(width)
                change = g @ (v[sample, head, token] - o)
                score += attention[sample, head, 0, token] * (through_value + change * through_key)
            assert_close(maps[sample, 0, token], score, **EXACT)


def test_input_times_gradient_at_the_input_of_the_block_is_nothing_for_patches(hidden):
    block = Block(eps=1e-14)
    free = hidden.clone().requires_grad_()
    scores = block.classify(hidden, block.normalize(free), torch.arange(BATCH))
    (slope,) = torch.autograd.grad(scores[:, 1].sum(), free)
    assert (hidden * slope).sum(dim=2)[:, 1:].abs().max() < 1e-12
    # The class token's own way around attention is the only other one there is.
    scores = Block.finish(block, free, block.attend(block.normalize(free), torch.arange(BATCH))[1])
    (slope,) = torch.autograd.grad(scores[:, 1].sum(), free)
    assert (hidden * slope).sum(dim=2)[:, 1:].abs().max() < 1e-12
    maps = cdam(hidden, block.normalize, block.classify, torch.ones(BATCH, 1).long())
    assert maps[:, :, 1:].abs().min() > 1e-4


def test_the_complete_variant_adds_up_and_the_released_one_does_not(block, hidden):
    rows = torch.arange(BATCH)

    def score(given, normed):
        return block.classify(given, normed, rows).gather(1, TARGETS)

    there = score(hidden, block.normalize(hidden))
    without_tokens = score(hidden, torch.zeros_like(hidden))
    complete = cdam(hidden, block.normalize, block.classify, TARGETS, mode="integrated_complete", steps=400)
    assert_close(complete.sum(dim=2), there - without_tokens, rtol=0, atol=1e-5)
    released = cdam(hidden, block.normalize, block.classify, TARGETS, mode="integrated", steps=400)
    without_input = score(torch.zeros_like(hidden), block.normalize(torch.zeros_like(hidden)))
    for change in (there - without_input, there - without_tokens):
        assert (released.sum(dim=2) - change).abs().max() > 0.05


def test_scaling_what_enters_the_block_hardly_moves_what_attention_reads(block, hidden):
    assert_close(block.normalize(0.1 * hidden), block.normalize(hidden), rtol=0, atol=1e-3)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_felt(hidden, way, side):
    bare = Block()
    maps = cdam(hidden, bare.normalize, bare.classify, TARGETS, **way)
    junk = torch.full((BATCH, 2, CHANNELS), 40.0, dtype=torch.float64)
    # To the left, the first token stays what it is: the prediction is read there.
    parts = [hidden, junk] if side == "right" else [hidden[:, :1], junk, hidden[:, 1:]]
    padded = torch.cat(parts, dim=1)
    mask = (padded != 40.0).any(dim=2)
    block = Block(mask=mask)
    for given in (mask, mask.long()):
        found = cdam(padded, block.normalize, block.classify, TARGETS, mask=given, **way)
        assert_close(found.transpose(1, 2)[mask].view(BATCH, TOKENS, 2), maps.transpose(1, 2), **EXACT)
        assert (found.transpose(1, 2)[~mask] == 0).all()


def test_a_sample_of_padding_alone_has_nothing(block, hidden):
    mask = torch.ones(BATCH, TOKENS)
    mask[1] = 0
    maps = cdam(hidden, block.normalize, block.classify, TARGETS, mask=mask, mode="smooth", steps=2)
    assert (maps[1] == 0).all()
    assert (maps[0] != 0).all()


@pytest.mark.parametrize("way", [WAYS[0], WAYS[1], WAYS[-1]], ids=str)
def test_it_works_where_gradients_are_off_and_leaves_nothing_behind(block, hidden, way):
    maps = cdam(hidden, block.normalize, block.classify, TARGETS, **way)
    block.head.requires_grad_()
    state = torch.get_rng_state()
    with torch.no_grad():
        assert_close(cdam(hidden, block.normalize, block.classify, TARGETS, **way), maps, **EXACT)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        given, targets = hidden.clone(), TARGETS.clone()
        assert given.is_inference()
        found = cdam(given, block.normalize, block.classify, targets, mask=torch.ones(BATCH, TOKENS), **way)
        assert torch.is_inference_mode_enabled()
    assert_close(found.clone(), maps, **EXACT)
    graphed = hidden.clone().requires_grad_()
    assert_close(cdam(graphed, block.normalize, block.classify, TARGETS, **way), maps, **EXACT)
    assert graphed.grad is None
    assert block.head.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_gradient_modes_are_put_back_when_something_raises(block, hidden):
    def broken(*_):
        assert torch.is_grad_enabled()
        raise RuntimeError("broken")

    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="broken"):
            cdam(hidden, block.normalize, broken, TARGETS)
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_a_post_norm_encoder_has_the_identity_for_a_norm(block, hidden):
    maps = cdam(hidden, lambda given: given, block.classify, TARGETS)
    free = hidden.clone().requires_grad_()
    scores = block.classify(hidden, free, torch.arange(BATCH))
    for place in range(2):
        (slope,) = torch.autograd.grad(scores.gather(1, TARGETS)[:, place].sum(), free, retain_graph=True)
        assert_close(maps[:, place], (hidden * slope).sum(dim=2), **EXACT)


def test_other_precisions(hidden):
    exact = Block()
    maps = cdam(hidden, exact.normalize, exact.classify, TARGETS, mode="smooth", steps=3)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.3)):
        block = Block(dtype=dtype)
        found = cdam(hidden.to(dtype), block.normalize, block.classify, TARGETS, mode="smooth", steps=3)
        assert found.dtype == torch.float32
        assert_close(found.double(), maps, rtol=0, atol=tolerance)


def test_a_target_that_does_not_depend_on_tokens_has_nothing_to_say(block, hidden):
    def partly(given, normed, rows):
        scores = block.classify(given, normed, rows)
        return torch.stack([scores[:, 0], torch.ones_like(scores[:, 0])], dim=1)

    maps = cdam(hidden, block.normalize, partly, torch.tensor([[1, 0]] * BATCH))
    assert (maps[:, 0] == 0).all()
    assert (maps[:, 1] != 0).any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(2, 3)}, ValueError, "hidden must have 3 dimensions"),
        ({"normalize": None}, TypeError, "normalize must be callable, got NoneType"),
        ({"normalize": lambda given: given[:1]}, ValueError, "normalize must return the shape"),
        ({"classify": lambda *_: 1}, ValueError, r"classify must return scores of shape \(3, K\), got int"),
        ({"classify": lambda given, *_: given[:, 0]}, ValueError, "classify must return scores that depend on the"),
        ({"targets": torch.tensor([1, 2, 3])}, ValueError, "targets must have 2 dimensions"),
        ({"targets": torch.ones(BATCH, 1)}, TypeError, "targets must be of an integer dtype"),
        ({"targets": torch.full((BATCH, 1), CLASSES)}, ValueError, r"targets must lie in \[0, 3\]"),
        ({"targets": torch.zeros(BATCH + 1, 1).long()}, ValueError, "targets must have shape"),
        ({"targets": torch.zeros(BATCH, 0).long()}, ValueError, "targets must have shape"),
        ({"mode": "sharp"}, ValueError, "mode must be one of 'vanilla'"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"mode": "integrated", "steps": 1}, ValueError, "steps must be at least 2 for mode 'integrated', got 1"),
        ({"noise": 0.1}, ValueError, "noise must be None for mode 'vanilla', got 0.1"),
        (
            {"mode": "integrated_complete", "noise": 0.0},
            ValueError,
            "noise must be None for mode 'integrated_complete'",
        ),
        ({"mode": "smooth", "noise": -1}, ValueError, "noise must be at least 0"),
        ({"perturb_at": "input"}, ValueError, "perturb_at must be one of 'block_input', 'attention_input'"),
        (
            {"mode": "integrated_complete", "perturb_at": "attention_input"},
            ValueError,
            "perturb_at must be 'block_input' for mode 'integrated_complete'",
        ),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"rows_at_a_time": 0}, ValueError, "rows_at_a_time must be at least 1"),
        ({"mask": torch.ones(BATCH, TOKENS + 1)}, ValueError, "mask must have shape"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(block, hidden, change, error, message):
    given = {"hidden": hidden, "normalize": block.normalize, "classify": block.classify, "targets": TARGETS} | change
    with pytest.raises(error, match=message):
        cdam(**given)

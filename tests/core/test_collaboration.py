"""Collaboration against its literal definition, one sample and one matrix at a time."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from mhex_core import MHEXBlock, collaboration

CLASSES = 4


class Chain(nn.Module):
    """A few residual connections, each with a block; convolutions for maps, a linear branch for tokens."""

    def __init__(self, *, gate=True, depth=4, channels=5, tokens=False):
        super().__init__()

        def branch():
            return nn.Linear(channels, channels) if tokens else nn.Conv2d(channels, channels, 3, padding=1)

        self.branches = nn.ModuleList(branch() for _ in range(depth))
        self.blocks = nn.ModuleList(MHEXBlock(channels, CLASSES, gate=gate) for _ in range(depth))

    def forward(self, x):
        outputs = []
        for branch, block in zip(self.branches, self.blocks, strict=True):
            r = branch(x)
            gated, output = block(x, r, channels_last=x.ndim == 3)
            outputs.append(output)
            x = torch.relu(r + gated)
        return [output.hidden for output in outputs], [output.logits for output in outputs]


def make_chain(*, dtype=torch.float64, tokens=False, **settings):
    torch.manual_seed(0)
    chain = Chain(tokens=tokens, **settings).to(dtype).eval()
    shape = (6, 7, 5) if tokens else (6, 5, 4, 3)
    # The gates start close to 1/2 everywhere; larger matrices make the cosines differ.
    with torch.no_grad():
        for block in chain.blocks:
            block.gate.weight.mul_(3)
    return chain, torch.randn(shape, dtype=torch.float64).to(dtype)


def one_loss(logits, target, multi_label):
    if multi_label:
        return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="sum")
    return F.cross_entropy(logits, target)


def literally(chain, inputs, target, *, multi_label=False, shift=0.0):
    """<D, G> / (|D| |G|) with D and G the whole matrices of gradients, for each sample in its own forward pass."""
    rows = []
    for index in range(inputs.shape[0]):
        one = slice(index, index + 1)
        heads = [head + (shift[one] if isinstance(shift, torch.Tensor) else shift) for head in chain(inputs[one])[1]]
        losses = [one_loss(head, target[one], multi_label) for head in heads]
        row = []
        for block, own_loss, next_loss in zip(chain.blocks, losses, losses[1:], strict=False):
            w1 = block.gate.weight
            own = torch.autograd.grad(own_loss, w1, retain_graph=True)[0]
            passed = torch.autograd.grad(next_loss, w1, retain_graph=True, allow_unused=True)[0]
            passed = torch.zeros_like(w1) if passed is None else passed
            row.append((own * passed).sum() / (own.norm() * passed.norm()).clamp(min=1e-300))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def targets(multi_label, batch=6):
    generator = torch.Generator().manual_seed(3)
    if multi_label:
        return (torch.rand(batch, CLASSES, generator=generator) > 0.5).long()
    return torch.randint(CLASSES, (batch,), generator=generator)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("tokens", [False, True], ids=["maps", "tokens"])
def test_it_equals_the_definition(multi_label, tokens):
    chain, inputs = make_chain(tokens=tokens)
    target = targets(multi_label)
    expected = literally(chain, inputs, target, multi_label=multi_label)
    result = collaboration(*chain(inputs), target, multi_label=multi_label)
    assert result.shape == (6, 3)
    assert expected.abs().min() < 0.5 < expected.abs().max()  # the example is not degenerate
    assert (result - expected).abs().max() < 1e-9


def test_soft_labels_equal_the_definition():
    chain, inputs = make_chain()
    target = torch.rand(6, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target[0, 0], target[1, 1] = 0, 1
    expected = literally(chain, inputs, target, multi_label=True)
    assert (collaboration(*chain(inputs), target, multi_label=True) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("multi_label", [False, True])
def test_float32_is_close_to_the_definition_in_float64(multi_label):
    target = targets(multi_label)
    chain, inputs = make_chain()
    expected = literally(chain, inputs, target, multi_label=multi_label)
    result = collaboration(*chain.float()(inputs.float()), target, multi_label=multi_label)
    assert result.dtype == torch.float32
    assert_close(result.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("multi_label", [False, True])
def test_without_a_gate_there_is_nothing_to_collaborate_with(multi_label):
    chain, inputs = make_chain(gate=False)
    result = collaboration(*chain(inputs), targets(multi_label), multi_label=multi_label)
    assert_close(result, torch.zeros(6, 3, dtype=torch.float64), rtol=0, atol=0)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("margin", [10, 18, 25])
def test_a_confident_float32_head_gives_the_cosine_of_float64(multi_label, margin):
    """1 - p is lost in float32 from a margin of 17 on (in float64 from 37 on); the gradient's direction is not."""
    chain, inputs = make_chain()
    target = targets(multi_label)
    shift = margin * (2 * target - 1 if multi_label else F.one_hot(target, CLASSES)).double()
    expected = literally(chain, inputs, target, multi_label=multi_label, shift=shift)
    hidden, heads = chain.float()(inputs.float())
    result = collaboration(hidden, [head + shift.float() for head in heads], target, multi_label=multi_label)
    assert_close(result.double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_overwhelming_confidence_stays_finite_and_keeps_the_sign(multi_label, dtype):
    """At 1000 times the logits even float64 sees p = 1; the limit is the cosine of the loudest wrong class."""
    signs = []
    for scale in (1.0, 1e3):
        # One input to W1, two classes: the gradient's direction is the difference of the two rows of W2, however
        # confident the head is.
        hidden = torch.tensor([[2.0, 1.0], [1.0, -1.0]], dtype=dtype, requires_grad=True)
        w2 = torch.tensor([[1.0, 0.5], [-1.0, 0.2]], dtype=dtype)
        own = scale * hidden @ w2.T
        later = torch.relu(torch.sigmoid(hidden) + 1)
        next_head = scale * later @ torch.tensor([[2.0, 1.0], [0.5, -1.0]], dtype=dtype).T
        target = torch.tensor([[1, 0], [0, 1]]) if multi_label else torch.tensor([0, 1])
        result = collaboration([hidden, later], [own, next_head], target, multi_label=multi_label)
        assert result.isfinite().all()
        assert (result.abs() <= 1).all()
        signs.append(result.sign())
    assert_close(signs[0], signs[1], rtol=0, atol=0)
    assert (signs[1] != 0).all()


def test_logits_a_thousand_times_larger_stay_finite_in_a_chain():
    chain, inputs = make_chain(dtype=torch.float32)
    hidden, heads = chain(inputs)
    for target in (heads[-1].argmax(dim=1), heads[-1].argmin(dim=1)):
        result = collaboration(hidden, [1e3 * head for head in heads], target)
        assert result.isfinite().all()
        assert (result != 0).all()


def test_one_class_has_no_gradient_and_gives_zeros():
    hidden = [torch.randn(3, 2, requires_grad=True) for _ in range(2)]
    heads = [(hidden[0] + h).sum(dim=1, keepdim=True) for h in hidden]
    result = collaboration(hidden, heads, torch.zeros(3, dtype=torch.int64))
    assert_close(result, torch.zeros(3, 1), rtol=0, atol=0)


@pytest.mark.parametrize("batch", [0, 6])
def test_one_block_has_no_next_one(batch):
    chain, inputs = make_chain(depth=1)
    assert collaboration(*chain(inputs[:batch]), targets(False)[:batch]).shape == (batch, 0)


def test_an_empty_batch_gives_an_empty_result():
    chain, inputs = make_chain()
    assert collaboration(*chain(inputs[:0]), targets(False)[:0]).shape == (0, 3)


def test_the_graph_survives_and_no_gradient_is_left_behind():
    chain, inputs = make_chain()
    hidden, heads = chain(inputs)
    first = collaboration(hidden, heads, targets(False))
    second = collaboration(hidden, heads, targets(False))
    assert_close(first, second, rtol=0, atol=0)
    assert not first.requires_grad
    assert all(parameter.grad is None for parameter in chain.parameters())
    sum(head.sum() for head in heads).backward()


@pytest.mark.parametrize(
    ("changes", "error", "name"),
    [
        ({"hidden": torch.zeros(2, 3)}, TypeError, "hidden"),
        ({"hidden": []}, ValueError, "hidden"),
        ({"hidden": [torch.zeros(2, 3, 1)] * 2}, ValueError, r"hidden\[0\]"),
        ({"hidden": [torch.zeros(2, 3)] * 2}, ValueError, "hidden"),  # no graph
        ({"hidden": [torch.zeros(3, 3, requires_grad=True)] * 2}, ValueError, r"hidden\[0\]"),
        ({"head_logits": [torch.zeros(2, 4, requires_grad=True)]}, ValueError, "head_logits"),
        ({"head_logits": [torch.zeros(2, n, requires_grad=True) for n in (4, 5)]}, ValueError, r"head_logits\[1\]"),
        ({"head_logits": [torch.zeros(2, 4)] * 2}, ValueError, "head_logits"),  # no graph
        ({"target": [0, "1"]}, TypeError, "target"),
        ({"target": torch.tensor([0, 4])}, ValueError, "target"),
        ({"target": torch.tensor([0.0, 1.0])}, TypeError, "target"),
        ({"target": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, "target"),
        ({"target": True}, TypeError, "target"),
        ({"target": torch.tensor([0, 1]), "multi_label": True}, ValueError, "target"),
        ({"target": torch.zeros(2, 3), "multi_label": True}, ValueError, "target"),
        ({"target": [[0, 1, 0, 0]] * 2, "multi_label": True}, TypeError, "target"),
        ({"multi_label": 1}, TypeError, "multi_label"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_arguments_are_named(changes, error, name):
    hidden = [torch.zeros(2, 3, requires_grad=True) for _ in range(2)]
    heads = [torch.zeros(2, 4, requires_grad=True) for _ in range(2)]
    arguments = {"hidden": hidden, "head_logits": heads, "target": torch.tensor([0, 1])} | changes
    with pytest.raises(error, match=name):
        collaboration(**arguments)

"""Token scores: against the oracle, and padding that must not be felt."""

import pytest
import torch
from torch.testing import assert_close

from mhex_core import MHEXBlock, token_saliency

SIZES = [(6,)] * 4
SETTINGS = [
    {},
    {"beta": 1.0, "decay": 0.7},
    {"beta": 0.3, "tau_pos": 0.2, "tau_neg": 0.3, "layer_weights": [1.0, -0.5, 2.0]},
    {"beta": 0.5, "sharpness": "soft", "exponent": 0.5},
]
TARGETS = {"int": 2, "(B,)": torch.tensor([3, 0]), "(B, n)": torch.tensor([[1, 1], [0, 2]]), "all": "all"}
MASK = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0]])


def rule_of(settings):
    return {{"sharpness": "sharpness_rule"}.get(name, name): value for name, value in settings.items()}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("mask", [None, MASK, MASK.bool(), MASK.float()], ids=["none", "int", "bool", "float"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_scores_equal_the_oracle(oracle, make_layers, target, settings, mask, dtype, tolerance):
    layers = make_layers(SIZES, dtype=dtype)
    result = token_saliency(*layers, target, mask=mask, **settings)
    plain = target.numpy() if isinstance(target, torch.Tensor) else target
    expected = torch.from_numpy(oracle.token_scores(*layers, plain, mask=mask, **rule_of(settings)))
    several = isinstance(target, str) or (isinstance(target, torch.Tensor) and target.ndim == 2)
    assert result.dtype == dtype
    assert_close(result.double(), expected if several else expected[:, 0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("layers", "indices"),
    [
        (1, [0]),
        (3, [0, 1, 2]),
        (9, [0, 1, 2, 3]),
        ("all", [0, 1, 2, 3]),
        ([2], [2]),
        ((3, 0), [3, 0]),
        ([-1, -4], [3, 0]),
        (range(2), [0, 1]),
    ],
    ids=str,
)
def test_layers_are_chosen_by_count_by_index_or_all(oracle, make_layers, layers, indices):
    values = make_layers(SIZES)
    result = token_saliency(*values, 1, layers=layers, decay=0.5)
    expected = oracle.token_scores(*values, 1, layers=indices, decay=0.5)[:, 0]
    assert_close(result, torch.from_numpy(expected), rtol=1e-10, atol=1e-10)


def test_the_first_three_layers_count_alike_by_default(make_layers):
    activations, matrices = make_layers(SIZES)
    parts = [token_saliency(activations[i : i + 1], matrices[i : i + 1], 1) for i in range(3)]
    assert_close(token_saliency(activations, matrices, 1), sum(parts), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("filling", [0.0, float("nan"), float("inf")])
def test_padding_is_not_felt_whatever_it_holds(make_layers, target, side, filling):
    activations, matrices = make_layers(SIZES)
    plain = token_saliency(activations, matrices, target, beta=0.5)
    order = 1 if side == "right" else -1
    padded = [torch.cat([a, torch.full_like(a[:, :2], filling)][::order], dim=1) for a in activations]
    mask = torch.cat([torch.ones(2, 6), torch.zeros(2, 2)][::order], dim=1)
    result = token_saliency(padded, matrices, target, beta=0.5, mask=mask)
    real = slice(0, 6) if side == "right" else slice(2, 8)
    assert_close(result[..., real], plain, rtol=1e-12, atol=1e-12)
    assert result.sum() == pytest.approx(float(plain.sum()))
    assert (result[..., 6:] == 0).all() if side == "right" else (result[..., :2] == 0).all()


def test_a_padded_batch_scores_each_text_as_it_would_be_scored_alone():
    """Blocks and scores together: texts of different lengths, the padding NaN."""
    torch.manual_seed(0)
    blocks = [MHEXBlock(5, 3).double() for _ in range(3)]
    lengths = [4, 7, 1]

    def run(x, mask):
        activations, head = [], None
        for block in blocks:
            gated, head = block(x, torch.tanh(x), mask, channels_last=True)
            activations.append(head.activation)
            x = gated + torch.tanh(x)
        scores = token_saliency(activations, [block.equivalent_matrix() for block in blocks], 1, beta=0.5, mask=mask)
        return scores, head.logits

    texts = [torch.randn(1, length, 5, dtype=torch.float64) for length in lengths]
    batch = torch.full((3, 7, 5), float("nan"), dtype=torch.float64)
    mask = torch.zeros(3, 7)
    for index, text in enumerate(texts):
        batch[index, : text.shape[1]] = text[0]
        mask[index, : text.shape[1]] = 1
    scores, logits = run(batch, mask)
    for index, text in enumerate(texts):
        alone_scores, alone_logits = run(text, None)
        assert_close(scores[index, : lengths[index]], alone_scores[0], rtol=1e-12, atol=1e-12)
        assert (scores[index, lengths[index] :] == 0).all()
        assert_close(logits[index], alone_logits[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("target", [0, "all", torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64)])
def test_an_empty_batch_gives_an_empty_result(make_layers, target):
    layers = make_layers(SIZES, batch=0)
    result = token_saliency(*layers, target, mask=torch.ones(0, 6))
    axis = {"all": (4,)}.get(target, ()) if isinstance(target, str | int) else target.shape[1:]
    assert result.shape == (0, *axis, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_autocast_changes_nothing(make_layers, dtype):
    layers = make_layers(SIZES, channels=40, dtype=dtype)
    result = token_saliency(*layers, "all", beta=0.5)
    wide = [[value.double() for value in values] for values in layers]
    assert result.dtype == torch.float32
    assert_close(result.double(), token_saliency(*wide, "all", beta=0.5), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(token_saliency(*layers, "all", beta=0.5), result, rtol=0, atol=0)


def test_gradients_are_right_and_masked_tokens_have_none(make_layers):
    activations, matrices = make_layers([(3,)] * 2, batch=1, classes=3, channels=2)
    mask = torch.tensor([[True, True, False]])
    inputs = [value.requires_grad_() for value in (*activations, *matrices)]

    def run(*values):
        return token_saliency(values[:2], values[2:], "all", beta=0.5, mask=mask)

    assert torch.autograd.gradcheck(run, inputs)
    run(*inputs).sum().backward()
    assert (inputs[0].grad[:, 2] == 0).all()


A, M = torch.zeros(2, 4, 3), torch.zeros(5, 3)


@pytest.mark.parametrize(
    ("changes", "error", "name"),
    [
        ({"activations": A}, TypeError, "activations"),
        ({"activations": [A[0]]}, ValueError, r"activations\[0\]"),
        ({"activations": [A, A[:, :3]], "matrices": [M, M]}, ValueError, "activations"),
        ({"matrices": [M.T]}, ValueError, r"matrices\[0\]"),
        ({"target": True}, TypeError, "target"),
        ({"target": "some"}, ValueError, "target"),
        ({"target": 5}, ValueError, "target"),
        ({"mask": [[1, 1, 1, 1]] * 2}, TypeError, "mask"),
        ({"mask": torch.ones(2, 3)}, ValueError, "mask"),
        ({"mask": torch.ones(8)}, ValueError, "mask"),
        ({"layers": 0}, ValueError, "layers"),
        ({"layers": -1}, ValueError, "layers"),
        ({"layers": True}, TypeError, "layers"),
        ({"layers": 1.5}, TypeError, "layers"),
        ({"layers": None}, TypeError, "layers"),
        ({"layers": []}, ValueError, "layers"),
        ({"layers": [True]}, TypeError, "layers"),
        ({"layers": [0.0]}, TypeError, "layers"),
        ({"layers": [1]}, ValueError, "layers"),
        ({"layers": [-2]}, ValueError, "layers"),
        ({"layers": "first"}, ValueError, "layers"),
        ({"beta": 2}, ValueError, "beta"),
        ({"tau_pos": "0"}, TypeError, "tau_pos"),
        ({"tau_neg": -1}, ValueError, "tau_neg"),
        ({"sharpness": "x"}, ValueError, "sharpness"),
        ({"exponent": -1}, ValueError, "exponent"),
        ({"layer_weights": [1.0, 2.0]}, ValueError, "layer_weights"),
        ({"decay": True}, TypeError, "decay"),
        ({"backend": "fast"}, ValueError, "backend"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_arguments_are_named(changes, error, name):
    arguments = {"activations": [A], "matrices": [M], "target": 0} | changes
    with pytest.raises(error, match=name):
        token_saliency(**arguments)

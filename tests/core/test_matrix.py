"""Equivalent matrix, sharpness and adjusted weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mhex_core import (
    MHEXBlock,
    SaliencyOptions,
    adjusted_weights,
    equivalent_matrix,
    salience_sharpness,
    saliency_maps,
)

RULES = [
    {},
    {"beta": 1.0},
    {"beta": 0.3, "tau_pos": 0.2, "tau_neg": 0.4},
    {"sharpness": "soft"},
    {"beta": 0.7, "sharpness": "soft", "exponent": 0.5},
    {"beta": 0.7, "sharpness": "soft", "exponent": 0.0},
    {"beta": 1.0, "sharpness": "soft", "exponent": 2.5},
]


def rule_of(settings):
    """The oracle calls the rule by another name, so that it can have a function called sharpness."""
    return {{"sharpness": "sharpness_rule"}.get(name, name): value for name, value in settings.items()}


def random_matrix(classes=4, channels=9, dtype=torch.float64, seed=0):
    matrix = torch.randn(classes, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix[:, 0] = 0  # a channel that says nothing
    matrix[:, -1] = matrix[:, -1].abs()  # and one that never speaks against
    return matrix.to(dtype)


@pytest.mark.parametrize("classes", [1, 2, 4, 1000])
@pytest.mark.parametrize("settings", RULES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_adjusted_weights_equal_the_oracle(oracle, classes, settings, dtype, tolerance):
    matrix = random_matrix(classes, dtype=dtype)
    result = adjusted_weights(matrix, **settings)
    assert result.dtype == dtype
    expected = torch.from_numpy(oracle.weights(matrix, **rule_of(settings)))
    assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("classes", [1, 4, 1000])
def test_sharpness_equals_the_oracle_and_sums_to_one_over_classes(oracle, classes):
    matrix = random_matrix(classes)
    for ours, theirs in zip(salience_sharpness(matrix), oracle.sharpness(matrix), strict=True):
        assert_close(ours, torch.from_numpy(theirs), rtol=1e-12, atol=1e-14)
        assert ours.min() >= 0
        assert ours.max() <= 1
        present = ours.sum(dim=0) > 0
        assert_close(ours.sum(dim=0)[present], torch.ones(int(present.sum()), dtype=ours.dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("settings", RULES, ids=str)
def test_a_channel_of_zeros_gives_zeros_in_every_dtype(dtype, settings):
    """1e-8 is nothing in float16, and 0 / 0 is not."""
    matrix = random_matrix(dtype=dtype)
    for part in (*salience_sharpness(matrix), adjusted_weights(matrix, **settings)):
        assert part.dtype == dtype
        assert part.isfinite().all()
        assert (part[:, 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_those_of_the_same_matrix_in_float32(dtype):
    matrix = random_matrix(7, 50, dtype)
    for settings in RULES:
        assert_close(
            adjusted_weights(matrix, **settings), adjusted_weights(matrix.float(), **settings).to(dtype), rtol=0, atol=0
        )


@pytest.mark.parametrize("sharpness", ["hard", "soft"])
def test_beta_one_without_thresholds_gives_the_matrix_back(sharpness):
    matrix = random_matrix()
    result = adjusted_weights(matrix, beta=1.0, tau_pos=0.0, tau_neg=0.0, sharpness=sharpness, exponent=0.0)
    assert_close(result, matrix, rtol=0, atol=0)


def test_beta_zero_keeps_positive_evidence_only():
    result = adjusted_weights(random_matrix(), beta=0.0, tau_pos=0.0)
    assert (result >= 0).all()
    assert_close(result, random_matrix().clamp(min=0), rtol=0, atol=0)


def test_weights_are_linear_in_beta():
    matrix = random_matrix()
    zero, half, one = (adjusted_weights(matrix, beta=beta) for beta in (0.0, 0.5, 1.0))
    assert_close(half, (zero + one) / 2, rtol=1e-14, atol=1e-14)


def test_a_sharpness_equal_to_its_threshold_is_kept():
    matrix = torch.tensor([[1.0, -1.0], [0.0, 0.0]])  # sharpness 1 - 1e-8, which is 1 in float32
    assert_close(adjusted_weights(matrix, beta=1.0, tau_pos=1.0, tau_neg=1.0), matrix, rtol=0, atol=0)


def test_the_default_threshold_is_a_tenth_above_chance_and_nothing_for_one_class():
    options = SaliencyOptions()
    assert options.positive_threshold(num_classes=4) == 1 / 4 + 0.1
    assert options.positive_threshold(num_classes=1000) == 1 / 1000 + 0.1
    assert options.positive_threshold(num_classes=1) == 0
    assert SaliencyOptions(tau_pos=0.5).positive_threshold(num_classes=1) == 0.5
    matrix = torch.tensor([[2.0, -3.0]])
    assert_close(adjusted_weights(matrix), torch.tensor([[2.0, 0.0]]), rtol=0, atol=0)


@pytest.mark.parametrize("settings", RULES, ids=str)
def test_gradients_of_the_weights_are_right(settings):
    matrix = torch.randn(3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: adjusted_weights(m, **settings), matrix)


@pytest.mark.parametrize("settings", RULES, ids=str)
def test_gradients_are_finite_where_the_matrix_is_zero(settings):
    matrix = random_matrix().requires_grad_()
    adjusted_weights(matrix, **settings).sum().backward()
    assert matrix.grad.isfinite().all()


@given(
    seed=st.integers(0, 10_000),
    classes=st.integers(1, 6),
    scale=st.floats(1e-2, 1e4),
    sharpness=st.sampled_from(["hard", "soft"]),
)
def test_scaling_the_matrix_scales_the_weights(seed, classes, scale, sharpness):
    """Up to the 1e-8 of the denominator, which a column of tiny entries would feel."""
    matrix = torch.randn(classes, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = matrix.sign() * (matrix.abs() + 0.1)
    settings = {"beta": 0.5, "sharpness": sharpness, "tau_pos": 0.3141, "tau_neg": 0.2718}
    scaled = adjusted_weights(scale * matrix, **settings)
    assert_close(scaled, scale * adjusted_weights(matrix, **settings), rtol=1e-4, atol=0)


def test_equivalent_matrix_is_the_product_also_under_autocast():
    generator = torch.Generator().manual_seed(0)
    w1, w2 = torch.randn(6, 6, generator=generator), torch.randn(3, 6, generator=generator)
    expected = torch.einsum("ck,kj->cj", w2, w1)
    assert_close(equivalent_matrix(w1, w2), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = equivalent_matrix(w1, w2)
    assert result.dtype == torch.float32
    assert_close(result, expected)


M = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: equivalent_matrix([[1.0]], M), TypeError, "gate_weight"),
        (lambda: equivalent_matrix(torch.zeros(3, 3), None), TypeError, "head_weight"),
        (lambda: equivalent_matrix(torch.zeros(3, 3, 1), M), ValueError, "gate_weight"),
        (lambda: equivalent_matrix(torch.zeros(3, 3, dtype=torch.int64), M), TypeError, "gate_weight"),
        (lambda: equivalent_matrix(torch.zeros(2, 3), M), ValueError, "gate_weight"),
        (lambda: equivalent_matrix(torch.zeros(2, 2), M), ValueError, "head_weight"),
        (lambda: salience_sharpness(M[0]), ValueError, "matrix"),
        (lambda: salience_sharpness(M.long()), TypeError, "matrix"),
        (lambda: salience_sharpness(3), TypeError, "matrix"),
        (lambda: adjusted_weights([[1.0]]), TypeError, "matrix"),
        (lambda: adjusted_weights(M[None]), ValueError, "matrix"),
        (lambda: adjusted_weights(M, beta=True), TypeError, "beta"),
        (lambda: adjusted_weights(M, beta="1"), TypeError, "beta"),
        (lambda: adjusted_weights(M, beta=1.5), ValueError, "beta"),
        (lambda: adjusted_weights(M, beta=float("nan")), ValueError, "beta"),
        (lambda: adjusted_weights(M, tau_pos=True), TypeError, "tau_pos"),
        (lambda: adjusted_weights(M, tau_pos=-0.1), ValueError, "tau_pos"),
        (lambda: adjusted_weights(M, tau_neg=None), TypeError, "tau_neg"),
        (lambda: adjusted_weights(M, tau_neg=float("inf")), ValueError, "tau_neg"),
        (lambda: adjusted_weights(M, sharpness="blunt"), ValueError, "sharpness"),
        (lambda: adjusted_weights(M, sharpness=1), TypeError, "sharpness"),
        (lambda: adjusted_weights(M, exponent=-1), ValueError, "exponent"),
        (lambda: adjusted_weights(M, exponent=False), TypeError, "exponent"),
        (lambda: SaliencyOptions(decay=1.1), ValueError, "decay"),
        (lambda: SaliencyOptions(decay=True), TypeError, "decay"),
        (lambda: SaliencyOptions(normalize=1), TypeError, "normalize"),
        (lambda: SaliencyOptions(layer_weights=1.0), TypeError, "layer_weights"),
        (lambda: SaliencyOptions(layer_weights="12"), TypeError, "layer_weights"),
        (lambda: SaliencyOptions(layer_weights=[1.0, True]), TypeError, r"layer_weights\[1\]"),
        (lambda: SaliencyOptions(layer_weights=[float("nan")]), ValueError, r"layer_weights\[0\]"),
        (lambda: SaliencyOptions(layer_weights=torch.ones(2, 2)), ValueError, "layer_weights"),
        (lambda: SaliencyOptions(layer_weights=[1.0]).weights_of(2), ValueError, "layer_weights"),
    ],
)
def test_bad_arguments_are_named(call, error, name):
    with pytest.raises(error, match=name):
        call()


def test_a_matrix_of_shapes_alone_has_its_shape():
    """The device "meta", on which nothing is calculated, knows no autocast."""
    gate, head = torch.randn(4, 4, device="meta"), torch.randn(3, 4, device="meta")
    assert equivalent_matrix(gate, head).shape == (3, 4)
    with torch.device("meta"):
        block = MHEXBlock(4, 3)
    assert block.equivalent_matrix().is_meta
    layers = [torch.randn(2, 4, 5, 5, device="meta")]
    maps = saliency_maps(layers, [block.equivalent_matrix()], 0, size=9, backend="reference")
    assert (maps.shape, maps.device.type) == ((2, 9, 9), "meta")
    with pytest.raises(ValueError, match="head_weight must be on the device of gate_weight, meta, got cpu"):
        equivalent_matrix(gate, torch.randn(3, 4))

"""Inputs at the edge: nothing there, too much there, and numbers that are none."""

import importlib.util
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from mhex_core import (
    SaliencyOptions,
    SaliencyPlan,
    SignedMaps,
    combine_maps,
    saliency_maps,
    signed_maps,
    token_saliency,
)

KEEP = {"tau_pos": 0.0, "tau_neg": 0.0, "beta": 1.0}
fails = partial(pytest.mark.xfail, strict=True)
both_backends = pytest.mark.parametrize("backend", ["native", "reference"])


@pytest.fixture
def apart(python):
    """Run where a crash of the process is a result and not the end of the tests."""

    def run(code):
        code = f"import torch\nfrom mhex_core import *\n{code}"
        done = python.run("-c", code, environment={**os.environ, "MHEX_NATIVE": "1"})
        assert done.returncode == 0, done.stderr[-2000:]

    return run


def test_a_layer_without_channels_has_no_evidence(apart):
    apart(
        "torch.set_num_threads(2)\n"
        "layers, matrices = [torch.zeros(1, 0, 4, 4)], [torch.zeros(3, 0)]\n"
        "assert not saliency_maps(layers, matrices, 'all', size=5).any()\n"
        "assert not signed_maps(layers, matrices, 'all').positive[0].any()"
    )


def test_tokens_without_channels_score_nothing():
    assert not token_saliency([torch.zeros(2, 4, 0)], [torch.zeros(3, 0)], "all", backend="native").any()


@pytest.mark.parametrize(
    "backend",
    ["reference", "native"],
)
def test_maps_without_positions_are_refused(backend):
    maps = SignedMaps((torch.zeros(2, 0, 4),), (torch.zeros(2, 0, 4),))
    with pytest.raises((ValueError, RuntimeError)):
        combine_maps(maps, size=8, backend=backend)


@both_backends
def test_no_tokens_no_scores(backend):
    assert token_saliency([torch.zeros(2, 0, 3)], [torch.zeros(4, 3)], "all", backend=backend).shape == (2, 4, 0)


@both_backends
@pytest.mark.parametrize("channels_last", [False, True])
def test_an_empty_batch_of_every_operator(make, backend, channels_last):
    activations, matrices = make(batch=0, channels_last=channels_last)
    maps = signed_maps(activations, matrices, "all", backend=backend)
    assert [part.shape for part in maps.positive] == [(0, 5, *layer.shape[2:]) for layer in activations]
    assert combine_maps(maps, size=(3, 4), backend=backend).shape == (0, 5, 3, 4)


def test_a_mask_that_leaves_nothing():
    tokens = [torch.full((2, 70, 5), float("nan"))] * 2
    mask = torch.zeros(2, 70, dtype=torch.bool)
    scores = token_saliency(tokens, [torch.randn(3, 5)] * 2, "all", mask=mask, **KEEP, backend="native")
    assert torch.equal(scores, torch.zeros(2, 3, 70))


def test_tokens_that_are_masked_are_not_felt():
    tokens, matrix = torch.randn(2, 200, 5), torch.randn(3, 5)
    mask = torch.rand(2, 200) > 0.5
    clean = token_saliency([tokens], [matrix], "all", mask=mask, **KEEP, backend="native")
    tokens[~mask] = float("nan")
    assert torch.equal(token_saliency([tokens], [matrix], "all", mask=mask, **KEEP, backend="native"), clean)


@both_backends
@pytest.mark.parametrize("target", [-1, 5, 2**40, torch.tensor([[0, 5]] * 3), torch.tensor([-1, 0, 0])], ids=str)
def test_a_target_out_of_range_is_named(make, backend, target):
    activations, matrices = make()
    tokens = [layer.flatten(2).transpose(1, 2)[:, :1] for layer in activations]
    for call in (partial(saliency_maps, activations, size=4), partial(signed_maps, activations)):
        with pytest.raises(ValueError, match="target"):
            call(matrices=matrices, target=target, backend=backend)
    with pytest.raises(ValueError, match="target"):
        token_saliency(tokens, matrices, target, backend=backend)


def test_the_raw_operator_refuses_a_target_out_of_range():
    with pytest.raises(RuntimeError, match="targets"):
        torch.ops.mhex.signed_maps(
            [torch.zeros(1, 2, 3, 3)],
            [torch.zeros(4, 2)],
            [torch.zeros(2, 2)],
            torch.tensor([[4]]),
            0,
            0,
            False,
            1,
            False,
        )


# ----------------------------------------------------------------------------------------------------------- magnitudes


@pytest.mark.parametrize("magnitude", [1e-45, 1e-42, 1e-38, 1e-30, 1e-8, 1e8, 1e30, 1e37])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_map_of_any_magnitude_reaches_from_0_to_1(magnitude, channels_last):
    pattern = torch.arange(20.0).reshape(1, 1, 4, 5).round() * torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
    layer = pattern * magnitude
    layer = layer.contiguous(memory_format=torch.channels_last) if channels_last else layer
    ours = saliency_maps([layer], [torch.ones(1, 3)], 0, size=(4, 5), **KEEP, backend="native")
    assert (ours.min(), ours.max()) == (0, 1)
    if magnitude > 1e-42:
        assert_close(ours[0], torch.arange(20.0).reshape(4, 5) / 19, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_number_of_half_precision_is_widened_rightly(dtype, channels_last):
    """All 65536 bit patterns through each loop: with one channel of weight one, a map is its layer."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    values = bits[bits.isfinite()]
    for channels, width in ((1, 1), (1, 3), (1, 61), (4, 1), (17, 3), (40, 61)):
        count = values.numel() // (channels * width)
        whole = values[: count * channels * width]
        shape = (count, 1, width, channels)
        layer = whole.view(shape).permute(0, 3, 1, 2) if channels_last else whole.view(count, channels, 1, width)
        matrix = torch.eye(channels)
        for rectify in (False, True):
            options = SaliencyOptions(**KEEP, rectify=rectify)
            ours = signed_maps([layer], [matrix], "all", options=options, backend="native").positive[0]
            assert torch.equal(ours, layer.float().relu() if rectify else layer.float())


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (7, 15), (16, 16), (33, 50), (224, 224)], ids=str)
def test_no_value_leaves_zero_to_one_and_both_ends_are_met(make, size, beta):
    for seed in range(5):
        activations, matrices = make(((3, 9, 7), (17, 5, 5), (64, 14, 14)), batch=6, classes=5, seed=seed)
        offset = [layer + 1000 for layer in activations]
        for layers in (activations, offset):
            maps = saliency_maps(layers, matrices, "all", size=size, beta=beta, backend="native").flatten(0, 1)
            assert maps.min() >= 0
            assert maps.max() <= 1
            for one in maps:
                assert not one.any() or (one.min() == 0 and one.max() == 1)


def test_layers_that_cancel_leave_zeros(make):
    ((layer,), (matrix,)) = make([(17, 5, 6)])
    for weights in ([1.0, -1.0], [0.3, -0.3], [1e6, -1e6]):
        ours = saliency_maps([layer, layer], [matrix] * 2, "all", size=31, layer_weights=weights, backend="native")
        assert not ours.any()


# --------------------------------------------------------------------------------------------- operators called as such

RULE = (0.0, 0.0, False, 1.0)


def raw(name, layer=None, *, size=(4, 4)):
    """`torch.ops.mhex` itself, which anybody may call past the checks of Python."""
    layer = torch.rand(2, 3, 4, 4) if layer is None else layer
    operators = torch.ops.mhex
    if name == "combine_maps":
        return operators.combine_maps([layer], [layer], 0.0, [1.0], *size, False)
    problem = ([layer], [torch.ones(5, 3)], [torch.ones(2, 3)], None, *RULE, True)
    return (
        operators.signed_maps(*problem)
        if name == "signed_maps"
        else operators.saliency_maps(*problem, 0.0, [1.0], *size, False)
    )


@pytest.mark.parametrize("name", ["saliency_maps", "signed_maps", "combine_maps"])
@pytest.mark.parametrize("shape", [(2, 3, 0, 4), (2, 3, 4, 0), (2, 3, 0, 0)], ids=str)
def test_an_operator_refuses_layers_without_positions(name, shape):
    with pytest.raises(RuntimeError, match="at least one position"):
        raw(name, torch.zeros(shape))


@pytest.mark.parametrize("name", ["saliency_maps", "combine_maps"])
@pytest.mark.parametrize("size", [(1, 2**32 + 8), (2**31, 1), (-1, 4), (0, 4), (4, 0)], ids=str)
def test_an_operator_refuses_sizes_that_it_cannot_count(name, size):
    with pytest.raises(RuntimeError, match=r"must lie in \[0, 2\^31 - 1\]|must have at least one pixel"):
        raw(name, size=size)


def test_an_operators_errors_name_no_folder_of_who_built_it():
    with pytest.raises(RuntimeError) as caught:
        raw("saliency_maps", torch.zeros(2, 3, 0, 4))
    assert not re.search(r"(^|[\s(])/\S+\.(h|cpp|cuh?):", str(caught.value))
    library = Path(importlib.util.find_spec("mhex_core._C").origin).read_bytes()
    sources = re.findall(rb"[\x20-\x7e]+\.(?:h|cpp|inl)\x00", library)
    assert sources
    assert not [path for path in sources if path.startswith(b"/")]


# ----------------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (7, 9), (30, 40)], ids=str)
def test_one_bad_number_anywhere_makes_its_map_nan(make, value, channels_last, beta, shape):
    activations, _ = make([(8, *shape), (8, 2, 2)], batch=3, channels_last=channels_last)
    # Rectified, minus infinity would be a zero.
    settings = {**KEEP, "beta": beta, "size": 12, "rectify": value != -float("inf"), "backend": "native"}
    matrices = [torch.ones(2, 8)] * 2
    clean = saliency_maps(activations, matrices, 0, **settings)
    positions = shape[0] * shape[1]
    for position in {0, positions // 2, positions - 1}:
        bad = [activations[0].clone(memory_format=torch.preserve_format), activations[1]]
        bad[0][1, 5, position // shape[1], position % shape[1]] = value
        ours = saliency_maps(bad, matrices, 0, **settings)
        assert ours[1].isnan().all()
        assert torch.equal(ours[::2], clean[::2])


def test_a_bad_number_in_a_layer_of_weight_zero_is_felt_as_in_the_reference(make):
    activations, matrices = make()
    activations[1][0, 0, 0, 0] = float("nan")
    settings = {**KEEP, "size": 6, "layer_weights": [1.0, 0.0, 1.0, 1.0]}
    for backend in ("native", "reference"):
        assert saliency_maps(activations, matrices, 0, backend=backend, **settings)[0].isnan().all()


@pytest.mark.parametrize(
    "backend",
    ["reference", pytest.param("native", marks=fails(reason="finite * 0 is tested, but (high - low) overflows"))],
)
def test_a_range_too_wide_for_float32_is_no_map_of_ones(backend):
    layer = torch.tensor([[3e38, -3e38], [0.0, 1.0]]).reshape(1, 1, 2, 2)
    ours = saliency_maps([layer], [torch.ones(1, 1)], 0, size=2, rectify=False, backend=backend)
    assert not (ours[0, 1] == 1).any()


INFINITE = torch.tensor([[float("inf"), 1.0, 0.5], [1.0, 1.0, -float("inf")], [-2.0, float("nan"), 1.0]])


@pytest.mark.parametrize(
    "rule",
    [{}, {"tau_pos": 0.0, "tau_neg": 0.0}, *({"sharpness": "soft", "exponent": a} for a in (0.0, 0.5, 2.0))],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [True, False])
def test_infinite_weights_mean_the_same_to_all(rule, dtype, channels_last):
    """The sharpness of infinity is inf / inf, no number; that of what stands beside it in a channel is 0."""
    options = SaliencyOptions(beta=1.0, **rule)
    layer = 1 + torch.rand(1, 3, 5, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    layer = layer.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    for entries in (INFINITE, INFINITE.nan_to_num(nan=1.0, neginf=-2.0, posinf=torch.inf), -INFINITE):
        ours, theirs = (
            signed_maps([layer], [entries.to(dtype)], "all", options=options, backend=backend)
            for backend in ("native", "reference")
        )
        for name in ("positive", "negative"):
            assert_close(getattr(ours, name)[0], getattr(theirs, name)[0], equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_an_infinite_weight_is_not_dropped(backend):
    matrix = torch.tensor([[float("inf"), 1.0], [1.0, 1.0]])
    ours = saliency_maps([torch.ones(1, 2, 2, 2)], [matrix], 0, size=2, normalize=False, **KEEP, backend=backend)
    assert not ours.isfinite().any()


# --------------------------------------------------------------------------------------- what the caller may have meant


def test_maps_kept_in_half_precision_can_be_combined(make):
    maps = signed_maps(*make(), "all", backend="native")
    half = SignedMaps(*(tuple(part.half() for part in side) for side in maps))
    ours = combine_maps(half, size=7)
    assert_close(ours.float(), combine_maps(half, size=7, backend="reference").float(), rtol=0, atol=2e-3)


def test_a_plan_is_a_snapshot(make):
    activations, matrices = make()
    plan = SaliencyPlan(matrices)
    before = saliency_maps(activations, plan, "all", size=6, normalize=False)
    for matrix in matrices:
        matrix.mul_(3)
    assert torch.equal(saliency_maps(activations, plan, "all", size=6, normalize=False), before)


@fails(reason="float64 matrices are thresholded in float32 by kernels, in float64 by gradients and the reference")
def test_asking_for_a_gradient_does_not_change_a_map():
    layer, matrix = torch.randn(1, 2, 3, 3), torch.ones(2, 2, dtype=torch.float64)
    settings = {"size": 4, "tau_pos": 0.5, "normalize": False, "backend": "native"}
    plain = saliency_maps([layer], [matrix], 0, **settings)
    assert_close(saliency_maps([layer.requires_grad_()], [matrix], 0, **settings).detach(), plain)


def test_flushed_denormals_do_not_spoil_large_maps(apart):
    apart(
        "torch.set_flush_denormal(True)\n"
        "layer = (torch.arange(16.0) * 2e37).reshape(1, 1, 4, 4)\n"
        "ours = saliency_maps([layer], [torch.ones(1, 1)], 0, size=4)\n"
        "torch.testing.assert_close(ours.flatten(), torch.arange(16.0) / 15, rtol=0, atol=1e-5)"
    )


@pytest.mark.parametrize("channels", [3, 64, 509])
@pytest.mark.parametrize("sharpness", ["hard", "soft"])
def test_a_matrix_of_nothing_but_nan_stays_within_its_memory(apart, channels, sharpness):
    apart(
        f"layers = [torch.rand(2, {channels}, 4, 4) for _ in range(4)]\n"
        f"matrices = [torch.full((3, {channels}), float('nan')) for _ in range(4)]\n"
        f"options = SaliencyOptions(sharpness={sharpness!r})\n"
        "for _ in range(20):\n"
        "    maps = signed_maps(layers, matrices, 'all', options=options, backend='native')\n"
        "    assert all(layer.isnan().all() for part in maps for layer in part)\n"
        f"    saliency_maps(layers, matrices, 'all', size=9, beta=1.0, sharpness={sharpness!r}, backend='native')\n"
    )

"""Maps: against the oracle, in every layout and dtype, and what must hold for any input."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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

SETTINGS = [
    {},
    {"beta": 1.0},
    {"beta": 0.4, "tau_pos": 0.2, "tau_neg": 0.3, "decay": 0.8},
    {"beta": 0.4, "sharpness": "soft", "exponent": 2.0},
    {"layer_weights": [0.5, 0.0, -2.0], "beta": 0.1},
    {"beta": 0.4, "rectify": False},
]
TARGETS = {
    "int": 2,
    "(B,)": torch.tensor([3, 0]),
    "(B, n)": torch.tensor([[1, 1, 3], [0, 2, 2]]),
    "all": "all",
}


def rule_of(settings):
    return {{"sharpness": "sharpness_rule"}.get(name, name): value for name, value in settings.items()}


def expect(oracle, activations, matrices, target, size, **settings):
    target = target.numpy() if isinstance(target, torch.Tensor) else target
    return torch.from_numpy(oracle.saliency(activations, matrices, target, size, **rule_of(settings)))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_maps_equal_the_oracle(oracle, make_layers, target, settings, normalize, dtype, tolerance):
    activations, matrices = make_layers(dtype=dtype)
    result = saliency_maps(activations, matrices, target, size=(11, 6), normalize=normalize, **settings)
    expected = expect(oracle, activations, matrices, target, (11, 6), normalize=normalize, **settings)
    assert result.dtype == dtype
    assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (5, 3), (3, 2), (16, 1), (31, 17)], ids=str)
@pytest.mark.parametrize(
    "sizes", [[(1, 1)], [(5, 3)], [(1, 7), (6, 1)], [(8, 8), (4, 4), (2, 2), (1, 1)], [(3, 13)] * 2], ids=str
)
def test_any_layer_size_reaches_any_output_size_as_the_resize_matrices_do(oracle, make_layers, sizes, size):
    activations, matrices = make_layers(sizes)
    result = saliency_maps(activations, matrices, "all", size=size, beta=0.5, normalize=False)
    expected = expect(oracle, activations, matrices, "all", size, beta=0.5, normalize=False)
    assert_close(result, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("classes", [1, 2, 1000])
def test_one_class_and_a_thousand_equal_the_oracle(oracle, make_layers, classes):
    activations, matrices = make_layers(classes=classes, channels=8)
    for target in (0, classes - 1, torch.tensor([0, classes - 1])):
        result = saliency_maps(activations, matrices, target, size=6, beta=0.5)
        assert_close(result, expect(oracle, activations, matrices, target, (6, 6), beta=0.5), rtol=1e-10, atol=1e-10)
    everything = saliency_maps(activations, matrices, "all", size=6, beta=0.5)
    assert everything.shape == (2, classes, 6, 6)
    assert everything.isfinite().all()


def test_one_class_keeps_its_positive_evidence(make_layers):
    activations, matrices = make_layers(classes=1)
    assert saliency_maps(activations, matrices, 0, size=6).amax() == 1


def test_a_target_means_the_same_in_every_spelling(make_layers):
    activations, matrices = make_layers()
    everything = saliency_maps(activations, matrices, "all", size=7)
    for classes in ([1, 1], [0, 3]):
        one = saliency_maps(activations, matrices, torch.tensor(classes), size=7)
        assert_close(one, everything[torch.arange(2), classes], rtol=1e-12, atol=1e-12)
        column = saliency_maps(activations, matrices, torch.tensor(classes)[:, None], size=7)
        assert column.shape == (2, 1, 7, 7)
        assert_close(column[:, 0], one, rtol=1e-12, atol=1e-12)
    assert_close(
        saliency_maps(activations, matrices, 1, size=7),
        saliency_maps(activations, matrices, torch.tensor([1, 1], dtype=torch.uint8), size=7),
        rtol=0,
        atol=0,
    )
    order = torch.tensor([[0, 1, 2, 3]] * 2, dtype=torch.int32)
    assert_close(saliency_maps(activations, matrices, order, size=7), everything, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "target", [np.int64(2), np.array(2), torch.tensor(2), torch.tensor(2, dtype=torch.uint8), [2, 2], (2, np.int32(2))]
)
@pytest.mark.parametrize("size", [np.int64(7), torch.tensor(7), (np.int32(7), torch.tensor(7))], ids=str)
def test_whole_numbers_may_be_of_any_library(make_layers, target, size):
    layers = make_layers()
    assert_close(saliency_maps(*layers, target, size=size), saliency_maps(*layers, 2, size=7), rtol=0, atol=0)


def test_size_may_be_one_int(make_layers):
    layers = make_layers()
    assert_close(saliency_maps(*layers, 0, size=7), saliency_maps(*layers, 0, size=(7, 7)), rtol=0, atol=0)


@pytest.mark.parametrize("target", [0, "all", torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64)])
@pytest.mark.parametrize("normalize", [True, False])
def test_an_empty_batch_gives_an_empty_result(make_layers, target, normalize):
    activations, matrices = make_layers(batch=0)
    result = saliency_maps(activations, matrices, target, size=(5, 4), normalize=normalize)
    axis = {"all": (4,)}.get(target, ()) if isinstance(target, str | int) else target.shape[1:]
    assert result.shape == (0, *axis, 5, 4)


# ------------------------------------------------------------------------------------------------------ constant maps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["zero", "constant", "one pixel", "no weight"])
@pytest.mark.parametrize("layer_weights", [None, [1.0, -1.0, -0.5]], ids=str)
def test_a_constant_map_gives_exact_zeros(kind, layer_weights, beta, dtype):
    """Also where layers or signs cancel, and what is left is mostly the rounding of the resizing."""
    for seed in range(15):
        generator = torch.Generator().manual_seed(seed)
        channels = int(torch.randint(1, 200, (1,), generator=generator))
        sizes = [(1, 1)] * 3 if kind == "one pixel" else torch.randint(1, 15, (3, 2), generator=generator).tolist()
        values = [torch.randn(4, channels, 1, 1, generator=generator).to(dtype) for _ in sizes]
        scale = 0 if kind == "zero" else 1
        activations = [scale * value.expand(-1, -1, *size) for value, size in zip(values, sizes, strict=True)]
        matrices = [torch.randn(5, channels, generator=generator).to(dtype) for _ in sizes]
        if kind == "no weight":
            activations = [torch.randn(activation.shape, generator=generator).to(dtype) for activation in activations]
            matrices = [torch.zeros_like(matrix) for matrix in matrices]
        settings = {"beta": beta, "tau_pos": 0.0, "tau_neg": 0.0, "layer_weights": layer_weights}
        assert (saliency_maps(activations, matrices, "all", size=(29, 23), **settings) == 0).all()


def test_layers_that_cancel_exactly_give_zeros(make_layers):
    activations, matrices = make_layers([(3, 3)], dtype=torch.float32)
    result = saliency_maps(activations * 2, matrices * 2, "all", size=9, layer_weights=[1.0, -1.0])
    assert (result == 0).all()


def test_a_constant_map_beside_a_varying_one_changes_neither(make_layers):
    activations, matrices = make_layers()
    alone = saliency_maps([layer[1:] for layer in activations], matrices, 1, size=8)
    for layer in activations:
        layer[0] = 3.0
    both = saliency_maps(activations, matrices, 1, size=8)
    assert (both[0] == 0).all()
    assert_close(both[1:], alone, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_a_constant_map_is_not_nan():
    activation = torch.ones(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    saliency_maps([activation], [matrix], "all", size=6, beta=1.0).sum().backward()
    assert activation.grad.isfinite().all()
    assert matrix.grad.isfinite().all()


def test_faint_structure_on_a_large_offset_is_seen():
    activation = 1000 + torch.linspace(0, 1, 16).reshape(1, 1, 4, 4)
    result = saliency_maps([activation], [torch.ones(1, 1)], 0, size=4)
    assert_close(result[0], torch.linspace(0, 1, 16).reshape(4, 4), rtol=0, atol=1e-3)


# -------------------------------------------------------------------------------------------------- always true things


@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    classes=st.integers(1, 5),
    beta=st.floats(0, 1),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    sharpness=st.sampled_from(["hard", "soft"]),
)
def test_every_map_spans_zero_to_one_or_is_all_zeros(make_layers, seed, sizes, size, classes, beta, dtype, sharpness):
    activations, matrices = make_layers(sizes, classes=classes, dtype=dtype, seed=seed)
    maps = saliency_maps(activations, matrices, "all", size=size, beta=beta, sharpness=sharpness).flatten(0, 1)
    for one in maps:
        assert (one == 0).all() or (one.min(), one.max()) == (0, 1)


@given(seed=st.integers(0, 10_000), scale=st.floats(1e-2, 1e6), beta=st.floats(0, 1))
def test_scaling_all_matrices_leaves_the_normalised_maps(make_layers, seed, scale, beta):
    activations, matrices = make_layers(seed=seed)
    matrices = [matrix.sign() * (matrix.abs() + 0.1) for matrix in matrices]  # far above the 1e-8 of the sharpness
    settings = {"size": 8, "beta": beta, "tau_pos": 0.3141, "tau_neg": 0.2718}
    expected = saliency_maps(activations, matrices, "all", **settings)
    scaled = saliency_maps(activations, [scale * matrix for matrix in matrices], "all", **settings)
    assert_close(scaled, expected, rtol=1e-7, atol=1e-7)


@given(seed=st.integers(0, 10_000), beta=st.floats(0, 1), weights=st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_maps_are_linear_in_beta_and_in_every_layer_weight(make_layers, seed, beta, weights):
    layers = make_layers(seed=seed)

    def cam(beta, layer_weights):
        return saliency_maps(*layers, "all", size=7, beta=beta, layer_weights=layer_weights, normalize=False)

    by_layer = torch.zeros(2, 4, 7, 7, dtype=torch.float64)
    for index, weight in enumerate(weights):
        only = [float(other == index) for other in range(3)]
        none, full = cam(0.0, only), cam(1.0, only)
        by_layer += weight * (none + beta * (full - none))
    assert_close(cam(beta, weights), by_layer, rtol=1e-10, atol=1e-10)


def test_decay_is_a_list_of_powers(make_layers):
    layers = make_layers()
    expected = saliency_maps(*layers, 0, size=7, decay=0.8, normalize=False)
    for weights in ([0.8**2, 0.8, 1.0], torch.tensor([0.8**2, 0.8, 1.0], dtype=torch.float64)):
        given_weights = saliency_maps(*layers, 0, size=7, layer_weights=weights, decay=0.1, normalize=False)
        assert_close(given_weights, expected, rtol=1e-12, atol=1e-12)
    deepest = saliency_maps(*layers, 0, size=7, decay=0.0, normalize=False)
    alone = saliency_maps(layers[0][-1:], layers[1][-1:], 0, size=7, normalize=False)
    assert_close(deepest, alone, rtol=1e-12, atol=1e-12)


def test_samples_do_not_see_each_other(make_layers):
    activations, matrices = make_layers(batch=3)
    together = saliency_maps(activations, matrices, torch.tensor([0, 3, 2]), size=7)
    for index, target in enumerate((0, 3, 2)):
        alone = saliency_maps([layer[index : index + 1] for layer in activations], matrices, target, size=7)
        assert_close(together[index], alone[0], rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------- dtype, layout, gradients


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("matrix_dtype", [None, torch.float32])
def test_half_precision_is_computed_in_float32(make_layers, dtype, matrix_dtype):
    activations, matrices = make_layers(channels=40, dtype=dtype)
    if matrix_dtype:
        matrices = [matrix.to(matrix_dtype) for matrix in matrices]
    result = saliency_maps(activations, matrices, "all", size=8, beta=0.5)
    wide = [[value.double() for value in values] for values in (activations, matrices)]
    assert result.dtype == torch.float32
    assert_close(result.double(), saliency_maps(*wide, "all", size=8, beta=0.5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(make_layers, dtype):
    layers = make_layers(channels=40, dtype=dtype)
    expected = saliency_maps(*layers, "all", size=8, beta=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = saliency_maps(*layers, "all", size=8, beta=0.5)
    assert result.dtype == expected.dtype
    assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded"])
def test_memory_layout_does_not_matter(make_layers, layout):
    activations, matrices = make_layers()
    if layout == "expanded":
        activations = [layer[:, :, :1].expand_as(layer) for layer in activations]
    expected = saliency_maps([layer.contiguous() for layer in activations], matrices, "all", size=8, beta=0.5)
    change = {
        "channels_last": lambda layer: layer.contiguous(memory_format=torch.channels_last),
        "transposed": lambda layer: layer.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": lambda layer: torch.cat([layer, layer + 1], dim=1)[:, : layer.shape[1]],
        "expanded": lambda layer: layer,
    }[layout]
    transposed = [matrix.T.contiguous().T for matrix in matrices]
    result = saliency_maps([change(layer) for layer in activations], transposed, "all", size=8, beta=0.5)
    assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_to_activations_and_matrices_are_right(make_layers, settings, normalize):
    activations, matrices = make_layers([(3, 2), (2, 2), (1, 2)], batch=1, classes=3, channels=2)
    inputs = [value.requires_grad_() for value in (*activations, *matrices)]

    def run(*values):
        return saliency_maps(values[:3], values[3:], "all", size=(3, 4), normalize=normalize, **settings)

    assert torch.autograd.gradcheck(run, inputs)


def test_inputs_are_left_as_they_were(make_layers):
    layers = make_layers()
    copies = [[value.clone() for value in values] for values in layers]
    saliency_maps(*layers, "all", size=8, beta=1.0)
    for values, before in zip(layers, copies, strict=True):
        assert_close(values, before, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------ the two halves


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("rectify", [True, False])
def test_signed_maps_hold_the_evidence_layer_by_layer(oracle, make_layers, target, rectify):
    activations, matrices = make_layers()
    rule = {"tau_pos": 0.2, "tau_neg": 0.3, "rectify": rectify}
    options = SaliencyOptions(**rule, beta=0.9, layer_weights=[7.0])  # only the rule is read
    maps = signed_maps(activations, matrices, target, options=options)
    for index, (activation, matrix) in enumerate(zip(activations, matrices, strict=True)):
        for part, rows in zip(maps, oracle.parts(matrix, tau_pos=0.2, tau_neg=0.3), strict=True):
            for sample in range(2):
                wanted = oracle.classes_of(target, sample, 4)
                seen = activation[sample].relu() if rectify else activation[sample]
                expected = torch.from_numpy(oracle.layer_map(seen.numpy(), rows[wanted]))
                single = part[index].ndim == 3
                assert_close(part[index][sample], expected[0] if single else expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_combining_signed_maps_is_what_saliency_maps_does(make_layers, target, settings):
    layers = make_layers()
    options = SaliencyOptions(**settings)
    halves = combine_maps(signed_maps(*layers, target, options=options), size=(9, 5), options=options)
    assert_close(halves, saliency_maps(*layers, target, size=(9, 5), **settings), rtol=0, atol=0)


def test_options_default_to_those_of_saliency_maps(make_layers):
    layers = make_layers()
    halves = combine_maps(signed_maps(*layers, 1), size=5)
    assert_close(halves, saliency_maps(*layers, 1, size=5), rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------------------- errors

A, M = torch.zeros(2, 3, 4, 4), torch.zeros(5, 3)
MAPS = SignedMaps((torch.zeros(2, 4, 4),), (torch.zeros(2, 4, 4),))


@pytest.mark.parametrize(
    ("changes", "error", "name"),
    [
        ({"activations": A}, TypeError, "activations"),
        ({"activations": None}, TypeError, "activations"),
        ({"activations": []}, ValueError, "activations"),
        ({"activations": [A.numpy()]}, TypeError, r"activations\[0\]"),
        ({"activations": [A[0]]}, ValueError, r"activations\[0\]"),
        ({"activations": [A.long()]}, TypeError, r"activations\[0\]"),
        ({"activations": [A[..., :0]]}, ValueError, r"activations\[0\]"),
        ({"activations": [A, A[:1]], "matrices": [M, M]}, ValueError, r"activations\[1\]"),
        ({"matrices": M}, TypeError, "matrices"),
        ({"matrices": [M, M]}, ValueError, "matrices"),
        ({"matrices": [M[:, :2]]}, ValueError, r"matrices\[0\]"),
        ({"matrices": [M[0]]}, ValueError, r"matrices\[0\]"),
        ({"activations": [A, A], "matrices": [M, M[:4]]}, ValueError, r"matrices\[1\]"),
        ({"target": True}, TypeError, "target"),
        ({"target": 1.0}, TypeError, "target"),
        ({"target": None}, TypeError, "target"),
        ({"target": [0, 1.5]}, TypeError, r"target\[1\]"),
        ({"target": [0, 1, 2]}, ValueError, "target"),
        ({"target": [[0], [1]]}, TypeError, r"target\[0\]"),
        ({"target": "first"}, ValueError, "target"),
        ({"target": 5}, ValueError, "target"),
        ({"target": -1}, ValueError, "target"),
        ({"target": 10**30}, ValueError, "target"),
        ({"target": torch.tensor([0, 5])}, ValueError, "target"),
        ({"target": torch.tensor([0, -1])}, ValueError, "target"),
        ({"target": torch.tensor([0.0, 1.0])}, TypeError, "target"),
        ({"target": torch.tensor([True, False])}, TypeError, "target"),
        ({"target": torch.tensor([0])}, ValueError, "target"),
        ({"target": torch.tensor(5)}, ValueError, "target"),
        ({"target": torch.tensor(0.0)}, TypeError, "target"),
        ({"target": torch.zeros(2, 0, dtype=torch.int64)}, ValueError, "target"),
        ({"size": 0}, ValueError, "size"),
        ({"size": True}, TypeError, "size"),
        ({"size": 4.0}, TypeError, "size"),
        ({"size": (4, 4, 4)}, ValueError, "size"),
        ({"size": (4, True)}, TypeError, "size must be an int"),
        ({"size": (-4, 4)}, ValueError, r"size\[0\]"),
        ({"size": "44"}, TypeError, "size"),
        ({"size": (1, 2**32 + 8)}, ValueError, "size must be at most 2147483647 along each side"),
        ({"size": 2**31}, ValueError, "size must be at most 2147483647 along each side"),
        ({"size": torch.tensor(4.0)}, TypeError, "size"),
        ({"matrices": [M.to("meta")]}, ValueError, r"matrices\[0\] must be on the device of .*, cpu, got meta"),
        ({"matrices": SaliencyPlan([M.to("meta")])}, ValueError, r"matrices\[0\] must be on the device"),
        ({"activations": [A.to("meta")]}, ValueError, r"matrices\[0\] must be on the device of .*, meta, got cpu"),
        ({"activations": [A, A.to("meta")], "matrices": [M, M]}, ValueError, r"matrices\[1\] must be on the device"),
        ({"target": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "target must hold values"),
        ({"matrices": [M[:0]], "target": "all"}, ValueError, "must have at least one class"),
        ({"activations": [A.to(torch.float8_e4m3fn)]}, TypeError, r"activations\[0\] .* of 16, 32 or 64 bits"),
        ({"matrices": [M.to(torch.float8_e5m2)]}, TypeError, r"matrices\[0\] .* of 16, 32 or 64 bits"),
        ({"beta": 10**400}, ValueError, r"beta must be in \[0, 1\], got inf"),
        ({"exponent": 10**4000}, ValueError, "exponent must be at least 0, got inf"),
        ({"layer_weights": torch.ones(1, requires_grad=True)}, ValueError, "layer_weights must not require a gradient"),
        ({"beta": True}, TypeError, "beta"),
        ({"beta": -0.1}, ValueError, "beta"),
        ({"tau_pos": -1}, ValueError, "tau_pos"),
        ({"tau_neg": True}, TypeError, "tau_neg"),
        ({"sharpness": "x"}, ValueError, "sharpness"),
        ({"exponent": None}, TypeError, "exponent"),
        ({"layer_weights": [1.0, 1.0]}, ValueError, "layer_weights"),
        ({"layer_weights": []}, ValueError, "layer_weights"),
        ({"layer_weights": 1.0}, TypeError, "layer_weights"),
        ({"decay": 2}, ValueError, "decay"),
        ({"normalize": "yes"}, TypeError, "normalize"),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"backend": None}, TypeError, "backend"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_arguments_are_named(changes, error, name):
    arguments = {"activations": [A], "matrices": [M], "target": 0, "size": 8} | changes
    with pytest.raises(error, match=name):
        saliency_maps(**arguments)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: signed_maps([A], [M], 0, options={"beta": 1}), TypeError, "options"),
        (lambda: signed_maps([A], [M], 9), ValueError, "target"),
        (lambda: combine_maps((MAPS.positive, MAPS.negative), size=8), TypeError, "maps"),
        (lambda: combine_maps(SignedMaps((), ()), size=8), ValueError, r"maps\.positive"),
        (lambda: combine_maps(SignedMaps(MAPS.positive, ()), size=8), ValueError, r"maps\.negative"),
        (lambda: combine_maps(SignedMaps(MAPS.positive, MAPS.negative * 2), size=8), ValueError, r"maps\.negative"),
        (lambda: combine_maps(SignedMaps((M,), (M,)), size=8), ValueError, r"maps\.positive\[0\]"),
        (lambda: combine_maps(MAPS, size=0), ValueError, "size"),
        (lambda: combine_maps(MAPS, size=(2**31, 1)), ValueError, "size must be at most"),
        *(
            (
                lambda maps=maps, backend=backend: combine_maps(SignedMaps(maps, maps), size=8, backend=backend),
                *expected,
            )
            for backend in ("auto", "reference")
            for maps, *expected in (
                ((A[:1, 0], A[:, 0]), ValueError, r"maps\.positive\[1\] must have shape \(1, h, w\)"),
                ((A[:, :1], A), ValueError, r"maps\.positive\[1\] must have shape \(2, 1, h, w\)"),
                ((A[:, 0], A), ValueError, r"maps\.positive\[1\] must have shape \(2, h, w\)"),
                ((A[:, 0, :0],), ValueError, r"maps\.positive\[0\] .* h and w at least 1"),
                ((A[:, 0], A[:, 0].to("meta")), ValueError, r"maps\.positive\[1\] must be on the device"),
            )
        ),
        (
            lambda: combine_maps(SignedMaps((A[:, 0],), (A[:, 0].to("meta"),)), size=8),
            ValueError,
            r"maps\.negative\[0\] must be on the device",
        ),
        (
            lambda: token_saliency([A[:, 0]], [M[:, [0, 0, 1, 2]].to("meta")], 0),
            ValueError,
            r"matrices\[0\] must be on",
        ),
        (
            lambda: token_saliency([A[:, 0]], [M[:, [0, 0, 1, 2]]], 0, mask=torch.ones(2, 4, device="meta")),
            ValueError,
            "mask must hold values",
        ),
        (lambda: combine_maps(MAPS, size=8, options=0.5), TypeError, "options"),
        (
            lambda: combine_maps(MAPS, size=8, options=SaliencyOptions(layer_weights=[1, 2])),
            ValueError,
            "layer_weights",
        ),
    ],
)
def test_bad_arguments_of_the_halves_are_named(call, error, name):
    with pytest.raises(error, match=name):
        call()

"""The floor of a map and its rectified activations against numpy, in every place that knows of them."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mhex_core import SaliencyOptions, combine_maps, saliency_maps, signed_maps


@pytest.fixture
def layers():
    torch.manual_seed(0)
    sizes = (8, 4, 2)
    return [torch.randn(3, 6, size, size).double() for size in sizes], [torch.randn(4, 6).double() for _ in sizes]


TARGET = torch.tensor([0, 3, 1])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("floor", [0.1, 0.5, 0.75, 0.99])
def test_what_lies_below_the_quantile_is_zero(layers, floor, normalize):
    bare = saliency_maps(*layers, TARGET, size=(9, 7), beta=0.5, normalize=False).numpy().reshape(3, -1)
    quantile = np.quantile(bare, floor, axis=1, method="lower", keepdims=True)
    expected = np.maximum(bare - quantile, 0)
    if normalize:
        expected /= expected.max(axis=1, keepdims=True)
    maps = saliency_maps(*layers, TARGET, size=(9, 7), beta=0.5, normalize=normalize, floor=floor)
    assert_close(maps.numpy().reshape(3, -1), expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("target", [TARGET, TARGET.unsqueeze(1).expand(3, 2), "all"], ids=["one", "two", "all"])
def test_both_halves_and_both_backends_agree(layers, backend, target):
    activations, matrices = [[value.float() for value in part] for part in layers]
    options = SaliencyOptions(floor=0.6, beta=0.25, decay=0.5)
    exact = saliency_maps(*layers, target, size=11, floor=0.6, beta=0.25, decay=0.5, backend="reference")
    whole = saliency_maps(activations, matrices, target, size=11, floor=0.6, beta=0.25, decay=0.5, backend=backend)
    halves = combine_maps(signed_maps(activations, matrices, target), size=11, options=options, backend=backend)
    assert_close(whole.double(), exact, rtol=0, atol=1e-5)
    assert_close(halves, whole, rtol=0, atol=1e-6)


def test_a_constant_map_stays_zero_and_gradients_flow():
    maps = saliency_maps([torch.ones(2, 3, 4, 4)], [torch.ones(2, 3)], 0, size=8, floor=0.5, tau_pos=0.0)
    assert not maps.any()
    activation = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda layer: saliency_maps([layer], [matrix], 0, size=4, floor=0.4, tau_pos=0.0), activation
    )


def test_an_empty_batch_has_no_maps():
    assert saliency_maps([torch.ones(0, 3, 4, 4)], [torch.ones(2, 3)], 0, size=8, floor=0.5).shape == (0, 8, 8)


@pytest.mark.parametrize("floor", [-0.1, 1, 1.0, 2])
def test_a_floor_is_a_quantile_below_one(floor):
    with pytest.raises(ValueError, match="floor must be"):
        SaliencyOptions(floor=floor)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rectified_saliency_is_that_of_rectified_activations(layers, backend):
    activations, matrices = [[value.float() for value in part] for part in layers]
    rectified = [layer.clamp(min=0) for layer in activations]
    expected = saliency_maps(rectified, matrices, TARGET, size=9, beta=0.5, backend=backend)
    found = saliency_maps(activations, matrices, TARGET, size=9, beta=0.5, rectify=True, backend=backend)
    assert torch.equal(found, expected)
    options = SaliencyOptions(rectify=True, beta=0.5)
    halves = signed_maps(activations, matrices, TARGET, options=options, backend=backend)
    assert_close(combine_maps(halves, size=9, options=options, backend=backend), expected, rtol=0, atol=1e-6)
    with pytest.raises(TypeError, match="rectify must be a bool"):
        SaliencyOptions(rectify=1)

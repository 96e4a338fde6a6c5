"""Compactness and class sensitivity against counting by hand and scipy."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F
from torch.testing import assert_close

from mhex_vision.metrics import class_sensitivity, compactness


def maps_of(seed, count=4, size=(6, 5), dtype=torch.float64):
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_compactness_counts_what_is_next_to_nothing(threshold, dtype):
    maps = maps_of(1, dtype=dtype) ** 3
    maps[1] = maps[1].clamp(min=0)
    maps[2] = -maps[2].abs()
    maps[3, 0, :3] = torch.tensor([20.0, 1.0, -8.0])  # the largest, and what is exactly on a threshold
    expected = []
    for values in maps.float().numpy() if dtype != torch.float64 else maps.numpy():
        limit = values.dtype.type(threshold) * max(abs(value) for value in values.flat)
        expected.append(np.mean([abs(value) <= limit for value in values.flat]))
    found = compactness(maps, threshold=threshold)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    if threshold == 0.05:
        assert_close(compactness(maps), found)
        assert_close(compactness(-maps / 4), found)
        assert_close(torch.cat([compactness(each[None]) for each in maps]), found)


def test_compactness_of_patches_is_that_of_pixels():
    patches = maps_of(2, 8, (7, 7), torch.float32) ** 3
    found = compactness(patches)
    assert len(set(found.tolist())) > 3
    pixels = F.interpolate(patches.unsqueeze(1), size=(56, 56), mode="nearest").squeeze(1)
    assert torch.equal(compactness(pixels), found)


def test_what_points_at_nothing_is_not_compact():
    maps = torch.zeros(3, 4, 4)
    maps[1] = -0.2
    maps[2, 1, 2] = -3.0
    assert compactness(maps).tolist() == [0.0, 0.0, 15 / 16]
    assert compactness(torch.zeros(0, 4, 4)).shape == (0,)


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
def test_class_sensitivity_equals_scipy(kind):
    first, second = maps_of(3), maps_of(4)
    first[1] = first[1].round()  # ties
    second[2] = first[2] * 5 - 2
    second[3] = -first[3]
    correlation = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[kind]
    expected = [
        correlation(one.ravel(), other.ravel())[0] for one, other in zip(first.numpy(), second.numpy(), strict=True)
    ]
    found = class_sensitivity(first, second, kind=kind)
    assert found.tolist() == pytest.approx(expected, abs=1e-10)
    assert found[2:].tolist() == pytest.approx([1, -1])
    assert_close(class_sensitivity(second, first, kind=kind), found)
    single = [class_sensitivity(first[i : i + 1], second[i : i + 1], kind=kind) for i in range(4)]
    assert_close(torch.cat(single), found)
    if kind == "pearson":
        assert_close(class_sensitivity(first, second), found)


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
def test_constant_maps_do_not_depend_on_the_class(kind):
    first, second = maps_of(3, dtype=torch.float32), maps_of(4, dtype=torch.float32)
    first[:2], second[1:3] = 0.1, -0.7
    found = class_sensitivity(first, second, kind=kind)
    assert found[:3].tolist() == [0, 1, 0]
    assert 0 < abs(found[3]) < 1
    assert class_sensitivity(first[:0], second[:0], kind=kind).shape == (0,)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: compactness([0.0]), TypeError, "attribution must be a torch.Tensor, got list"),
        (lambda: compactness(torch.zeros(4, 4)), ValueError, "attribution must have 3 dimensions"),
        (lambda: compactness(torch.full((1, 2, 2), torch.nan)), ValueError, "attribution must be finite"),
        (lambda: compactness(torch.zeros(1, 0, 2)), ValueError, "attribution must have at least one entry"),
        (lambda: compactness(torch.zeros(1, 2, 2), threshold=2), ValueError, r"threshold must be in \[0, 1\], got 2"),
        (
            lambda: class_sensitivity(torch.zeros(1, 2, 2), torch.zeros(1, 2, 3)),
            ValueError,
            r"second must have the shape of first, \(1, 2, 2\), got \(1, 2, 3\)",
        ),
        (
            lambda: class_sensitivity(None, torch.zeros(1, 2, 3)),
            TypeError,
            "first must be a torch.Tensor, got NoneType",
        ),
        (lambda: class_sensitivity(*torch.zeros(2, 1, 0, 2)), ValueError, "first must have at least one entry"),
        (
            lambda: class_sensitivity(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), kind="ssim"),
            ValueError,
            "kind must be one of 'pearson', 'spearman', got 'ssim'",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()

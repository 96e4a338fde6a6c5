"""Taking pixels away against numpy and a sparse solver."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d
from scipy.sparse import lil_matrix
from scipy.sparse.linalg import spsolve
from torch.testing import assert_close

from mhex_vision.metrics.perturbation import baseline_of, impute, pixel_ranks, replace_pixels, top_pixels


@pytest.fixture
def images(make_images):
    return make_images(3, (9, 12)).double()


def test_baselines_are_what_they_are_called(images):
    assert not baseline_of(images, "blank").any()
    assert_close(baseline_of(images, "mean")[1, 2, 4, 5], images[1, 2].mean())
    blurred = gaussian_filter1d(images.numpy(), 12 / 16, axis=2, mode="mirror", radius=3)
    blurred = gaussian_filter1d(blurred, 12 / 16, axis=3, mode="mirror", radius=3)
    assert_close(baseline_of(images, "blur").numpy(), blurred)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (224, 3)])
def test_blur_knows_any_size(make_images, size):
    images = make_images(2, size)
    assert_close(baseline_of(images * 0 + 3, "blur"), images * 0 + 3)


def test_pixels_are_ranked_and_replaced():
    saliency = torch.tensor([[[0.1, 0.9], [0.5, 0.3]]])
    assert pixel_ranks(saliency).tolist() == [[[3, 0], [1, 2]]]
    assert top_pixels(saliency, 0.5).tolist() == [[[False, True], [True, False]]]
    replaced = replace_pixels(torch.ones(1, 2, 2, 2), top_pixels(saliency, 0.25), torch.zeros(1, 2, 2, 2))
    assert replaced[0, 1].tolist() == [[1, 0], [1, 1]]


def solved(image, missing):
    """The linear system of one channel, pixel by pixel, by a sparse solver."""
    height, width = image.shape
    number = {position: index for index, position in enumerate(zip(*np.nonzero(missing), strict=True))}
    system, right = lil_matrix((len(number), len(number))), np.zeros(len(number))
    for (row, column), index in number.items():
        for down in (-1, 0, 1):
            for across in (-1, 0, 1):
                at = (row + down, column + across)
                if (down, across) == (0, 0) or not (0 <= at[0] < height and 0 <= at[1] < width):
                    continue
                weight = 1 / 12 if down and across else 1 / 6
                system[index, index] += weight
                if at in number:
                    system[index, number[at]] -= weight
                else:
                    right[index] += weight * image[at]
    filled = image.copy()
    filled[missing] = np.atleast_1d(spsolve(system.tocsr(), right))
    return filled


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_missing_pixels_solve_the_linear_system(images, share):
    missing = top_pixels(torch.rand(3, 9, 12, generator=torch.Generator().manual_seed(0)), share)
    filled = impute(images, missing, noise=0.0, tolerance=1e-12)
    for image, mask, result in zip(images.numpy(), missing.numpy(), filled.numpy(), strict=True):
        for channel, found in zip(image, result, strict=True):
            assert_close(found, solved(channel, mask), rtol=1e-8, atol=1e-8)


def test_known_pixels_stay_and_the_noise_is_the_same_for_every_image(images):
    missing = torch.zeros(3, 9, 12, dtype=torch.bool)
    missing[:, 2:5, 3:9] = True
    bare, noisy = impute(images, missing, noise=0.0), impute(images, missing, noise=0.1)
    grain = (noisy - bare)[:, :, 2:5, 3:9]
    assert_close(grain[0], grain[2])
    assert 0.05 < float(grain.std()) < 0.2
    assert_close(torch.where(missing.unsqueeze(1), 0, noisy), torch.where(missing.unsqueeze(1), 0, images))
    assert_close(impute(images[1:2], missing[1:2]), impute(images, missing)[1:2])


def test_nothing_or_everything_may_be_missing(images):
    nothing, everything = torch.zeros(3, 9, 12, dtype=torch.bool), torch.ones(3, 9, 12, dtype=torch.bool)
    assert torch.equal(impute(images, nothing), images)
    assert not impute(images, everything, noise=0.0).any()
    assert impute(images[:0], nothing[:0]).shape == (0, 3, 9, 12)


def test_half_precision_is_filled_in_float32(images):
    half = images.to(torch.bfloat16)
    missing = top_pixels(torch.rand(3, 9, 12, generator=torch.Generator().manual_seed(0)), 0.8)
    filled = impute(half, missing, noise=0.0)
    assert filled.dtype == torch.bfloat16
    assert_close(filled.double(), impute(half.double(), missing, noise=0.0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("missing", "error"),
    [(torch.zeros(3, 9, 12), TypeError), (torch.zeros(3, 9, 11, dtype=torch.bool), ValueError)],
)
def test_errors_name_the_argument(images, missing, error):
    with pytest.raises(error, match="missing must"):
        impute(images, missing)

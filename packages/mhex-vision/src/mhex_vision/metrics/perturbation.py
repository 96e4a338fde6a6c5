"""Taking pixels away: what is put in their place, and in which order they go.

Letters: B batch, C channels, H x W image size, N = H W pixels, S steps.
Sources: deletion and insertion, Petsiuk et al. 2018 (arXiv 1806.07421); noisy linear imputation, Rong et al. 2022
(arXiv 2202.00449).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mhex_core import _checks
from mhex_core.metrics import descending, top_fraction

Baseline = Literal["blank", "mean", "blur"]
BASELINES: tuple[Baseline, ...] = ("blank", "mean", "blur")


def baseline_of(images: Tensor, kind: Baseline) -> Tensor:
    """What stands where pixels are gone.

    Args:
        images: (B, C, H, W), normalised.
        kind: "blank", zeros in normalised space; "mean", each image's own mean per channel; "blur", the image under a
            Gaussian whose standard deviation is a 16th of the longer side (14 pixels at 224).

    Returns:
        (B, C, H, W), which may be a view that repeats values.
    """
    images = _checks.tensor("images", images, ndim=4)
    _checks.choice("kind", kind, BASELINES)
    if kind == "blank":
        return images.new_zeros(1).expand_as(images)
    if kind == "mean":
        return images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    return _blurred(images, max(images.shape[2:]) / 16)


def replace_pixels(images: Tensor, chosen: Tensor, baseline: Tensor) -> Tensor:
    """The baseline where pixels are chosen, the images elsewhere: (B, C, H, W).

    Args:
        images: (B, C, H, W).
        chosen: bool (B, H, W).
        baseline: (B, C, H, W).
    """
    return torch.where(chosen.unsqueeze(1), baseline, images)


def top_pixels(saliency: Tensor, area: float) -> Tensor:
    """The pixels of the highest saliency, as many in every map: bool (B, H, W).

    Args:
        saliency: (B, H, W).
        area: Share of the image, in [0, 1].
    """
    return top_fraction(saliency.flatten(1), area).view_as(saliency)


def pixel_ranks(saliency: Tensor) -> Tensor:
    """Each pixel's place in the order of falling saliency, from 0: int64 (B, H, W)."""
    order = descending(saliency.flatten(1))
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view_as(saliency)


def impute(images: Tensor, missing: Tensor, *, noise: float = 0.01, seed: int = 0, tolerance: float = 1e-4) -> Tensor:
    """Fill pixels from their neighbours, so that the shape of what is missing cannot be seen.

    Each missing pixel is the weighted mean of its eight neighbours (fewer on the image's edge), the missing ones among
    them included: a linear system, symmetric and positive definite, which conjugate gradients solve for all images and
    channels at once. Then a little noise is added to the filled pixels.

    Args:
        images: (B, C, H, W).
        missing: bool (B, H, W).
        noise: Standard deviation of the noise, in the images' units.
        seed: Of the noise, which is the same for every image, so that batches may be split at will.
        tolerance: Largest relative residual at which the solver stops.

    Returns:
        (B, C, H, W). An image without any known pixel becomes zeros and noise.
    """
    images = _checks.tensor("images", images, ndim=4)
    if not isinstance(missing, Tensor) or missing.dtype != torch.bool:
        raise TypeError(f"missing must be a bool tensor, got {getattr(missing, 'dtype', type(missing).__name__)}")
    expected = (images.shape[0], *images.shape[2:])
    if tuple(missing.shape) != expected:
        raise ValueError(f"missing must have shape {expected} to go with images, got {tuple(missing.shape)}")
    _checks.number("noise", noise, low=0)
    _checks.number("tolerance", tolerance, low=0)
    if not images.numel():
        return images.clone()
    # Half precision could not reach the tolerance.
    wide = images if images.dtype == torch.float64 else images.float()
    holes = missing.unsqueeze(1)
    solvable = holes & ~missing.all(dim=2).all(dim=1).view(-1, 1, 1, 1)
    known = torch.where(holes, 0, wide)
    filled = known + _solve(known, solvable.to(wide.dtype), tolerance)
    grain = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    filled = torch.where(holes, filled + noise * grain.to(filled), filled)
    return filled.to(images.dtype)


def _solve(known: Tensor, unknown: Tensor, tolerance: float) -> Tensor:
    """The x, zero where `unknown` (B, 1, H, W) is, of (D - W) x = W known on unknown pixels: (B, C, H, W).

    W sums neighbours with their weights, D is the sum of the weights of the neighbours that are inside the image.
    """
    height, width = known.shape[2:]

    def neighbours(values: Tensor) -> Tensor:
        # The direct neighbours count 1/6, the diagonal ones 1/12 (Rong et al. 2022): [1, 2, 1] along both axes, less
        # the middle. As additions in place this takes a tenth of the time of a convolution with one channel.
        rows = 2 * values
        rows[..., 1:] += values[..., :-1]
        rows[..., :-1] += values[..., 1:]
        both = 2 * rows
        both[..., 1:, :] += rows[..., :-1, :]
        both[..., :-1, :] += rows[..., 1:, :]
        return both.sub_(values, alpha=4).div_(12)

    def dot(first: Tensor, second: Tensor) -> Tensor:
        return (first * second).sum(dim=(2, 3), keepdim=True)

    diagonal = neighbours(torch.ones_like(known[:1, :1]))
    residual = neighbours(known) * unknown
    solution = torch.zeros_like(known)
    goal = tolerance**2 * dot(residual, residual)
    scaled = residual / diagonal
    direction = scaled
    energy = dot(residual, scaled)
    # Exact arithmetic would end after as many steps as there are unknowns; a grid needs a few times its side.
    for _ in range(20 * max(height, width)):
        if bool((dot(residual, residual) <= goal).all()):
            break
        image = (diagonal * direction - neighbours(direction)) * unknown
        curvature = dot(direction, image)
        step = torch.where(curvature > 0, energy / torch.where(curvature > 0, curvature, 1), 0)
        solution = solution + step * direction
        residual = residual - step * image
        scaled = residual / diagonal
        fresh = dot(residual, scaled)
        direction = scaled + torch.where(energy > 0, fresh / torch.where(energy > 0, energy, 1), 0) * direction
        energy = fresh
    return solution


def _blurred(images: Tensor, deviation: float) -> Tensor:
    """A Gaussian along rows, then along columns, mirrored at the edges."""
    for axis in (2, 3):
        reach = min(math.ceil(3 * deviation), images.shape[axis] - 1)
        if reach < 1:
            continue
        offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=torch.float32)
        bell = torch.exp(-(offsets**2) / (2 * deviation**2))
        bell = (bell / bell.sum()).to(images.dtype)
        shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
        padding = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        flat = images.reshape(-1, 1, *images.shape[2:])
        images = F.conv2d(F.pad(flat, padding, mode="reflect"), bell.view(shape)).view_as(images)
    return images

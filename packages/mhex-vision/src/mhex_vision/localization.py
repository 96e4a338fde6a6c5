"""Does saliency lie where the truth is? Metrics against known masks, and the maps that need no model.

Letters: B batch, H x W map size.
Sources: pointing game, Zhang et al. 2018 (arXiv 1608.00507), without its tolerance of 15 pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pointing_game(saliency: Tensor, masks: Tensor) -> Tensor:
    """Whether the strongest point of each map lies inside its mask.

    Args:
        saliency: (B, H, W).
        masks: bool (B, H, W).

    Returns:
        float (B,) in [0, 1]: 1 for a hit, 0 for a miss. Where several points share the maximum, the share of them that
        hit; so a constant map gets the mask's share of the image, as blind pointing would.
    """
    _check(saliency, masks)
    peak = saliency == saliency.amax(dim=(1, 2), keepdim=True)
    return (peak & masks).sum(dim=(1, 2)) / peak.sum(dim=(1, 2))


def mass_inside(saliency: Tensor, masks: Tensor) -> Tensor:
    """How much of each map's total lies inside its mask.

    Args:
        saliency: (B, H, W), not negative.
        masks: bool (B, H, W).

    Returns:
        float (B,) in [0, 1]. A map of zeros gets the mask's share of the image, as an even map would.
    """
    _check(saliency, masks)
    if bool((saliency < 0).any()):
        raise ValueError(f"saliency must not be negative, got a minimum of {float(saliency.min()):g}")
    inside = (saliency * masks).sum(dim=(1, 2))
    total = saliency.sum(dim=(1, 2))
    share = masks.to(saliency.dtype).mean(dim=(1, 2))
    return torch.where(total > 0, inside / torch.where(total > 0, total, 1), share)


def random_maps(count: int, size: int, *, seed: int = 0) -> Tensor:
    """Uniform noise: (count, size, size) in [0, 1]."""
    return torch.rand(count, size, size, generator=torch.Generator().manual_seed(seed))


def centre_gaussian(count: int, size: int, *, width: float = 0.25) -> Tensor:
    """A Gaussian on the image's centre: (count, size, size), its standard deviation `width` times the side."""
    axis = (torch.arange(size) + 0.5) / size - 0.5
    bell = torch.exp(-(axis**2) / (2 * width**2))
    return torch.outer(bell, bell).expand(count, size, size)


def _check(saliency: Tensor, masks: Tensor) -> None:
    for name, value in (("saliency", saliency), ("masks", masks)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if saliency.ndim != 3 or saliency.shape != masks.shape:
        raise ValueError(
            f"saliency and masks must share one shape (B, H, W), got {tuple(saliency.shape)} and {tuple(masks.shape)}"
        )
    if masks.dtype != torch.bool:
        raise TypeError(f"masks must be of dtype torch.bool, got {masks.dtype}")

"""Does saliency lie where the truth is? Metrics against known masks or boxes.

Letters: B batch, H x W map size.
Sources: pointing game, Zhang et al. 2018 (arXiv 1608.00507), without its tolerance of 15 pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhex_core import _checks


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


def mask_iou(saliency: Tensor, masks: Tensor, *, threshold: float = 0.5) -> Tensor:
    """Intersection over union of the pixels above a threshold and the mask.

    Args:
        saliency: (B, H, W) in [0, 1].
        masks: bool (B, H, W).
        threshold: In [0, 1].

    Returns:
        float (B,) in [0, 1]; 1 where both are empty.
    """
    _check(saliency, masks)
    _checks.number("threshold", threshold, low=0, high=1)
    found = saliency > threshold
    intersection = (found & masks).sum(dim=(1, 2))
    union = (found | masks).sum(dim=(1, 2))
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0)


def masks_from_boxes(boxes: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Boxes as masks: a pixel is inside where its centre is.

    Args:
        boxes: (B, 4), each (left, top, right, bottom) in pixels from the image's upper left corner.
        size: (H, W), or one int for a square.

    Returns:
        bool (B, H, W).

    Raises:
        ValueError: A box's right is left of its left, or its bottom above its top.
    """
    boxes = _checks.tensor("boxes", boxes, ndim=2, floating=False).double()
    if boxes.shape[1] != 4:
        raise ValueError(f"boxes must have shape (B, 4), got {tuple(boxes.shape)}")
    if not bool((boxes[:, 2:] >= boxes[:, :2]).all()):
        raise ValueError("boxes must be (left, top, right, bottom) with left <= right and top <= bottom")
    height, width = _checks.size_2d("size", size)
    left, top, right, bottom = boxes.unsqueeze(-1).unbind(dim=1)
    x = torch.arange(width, device=boxes.device) + 0.5
    y = torch.arange(height, device=boxes.device) + 0.5
    columns, rows = (left <= x) & (x < right), (top <= y) & (y < bottom)
    return rows.unsqueeze(2) & columns.unsqueeze(1)


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

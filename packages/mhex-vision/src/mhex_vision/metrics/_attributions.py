"""What the metrics of attributions share: how their arguments are checked, and a correlation that knows its rounding.

Letters: B batch, H x W image size, D draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhex_core import _checks


def check(images: object, attribution: object, target: object) -> tuple[Tensor, Tensor, Tensor]:
    """Images as they are, attribution in float64 on the CPU, a class for each image.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument's shape or value does not fit.
    """
    pictures = _checks.tensor("images", images, ndim=4)
    maps = check_attribution(attribution)
    expected = (pictures.shape[0], *pictures.shape[2:])
    if tuple(maps.shape) != expected:
        raise ValueError(f"attribution must have shape {expected} to go with images, got {tuple(maps.shape)}")
    most = torch.iinfo(torch.int64).max  # how many classes there are, only the judge knows
    wanted = class_of_each(target, batch=pictures.shape[0], num_classes=most, device=pictures.device)
    return pictures, maps.cpu().double(), wanted


def check_attribution(attribution: object) -> Tensor:
    """Maps (B, H, W) of finite numbers, detached."""
    maps = _checks.tensor("attribution", attribution, ndim=3)
    if not bool(maps.isfinite().all()):
        raise ValueError("attribution must be finite, got NaN or infinity among its values")
    return maps.detach()


def class_of_each(target: object, *, batch: int, num_classes: int, device: torch.device) -> Tensor:
    """One class for each image: int64 (B,)."""
    checked = _checks.class_indices("target", target, batch=batch, num_classes=num_classes, device=device)
    if checked.ndim != 1:
        raise ValueError(f"target must have shape ({batch},), got {tuple(checked.shape)}")
    return checked


def pearson(first: Tensor, second: Tensor, first_rounding: Tensor, second_rounding: Tensor) -> Tensor:
    """Correlation of each row: (B,). NaN where a row's standard deviation is no more than its rounding, (B,)."""
    centred = [rows - rows.mean(dim=1, keepdim=True) for rows in (first, second)]
    deviations = [rows.square().mean(dim=1).sqrt() for rows in centred]
    defined = (deviations[0] > first_rounding) & (deviations[1] > second_rounding)
    product = torch.where(defined, deviations[0] * deviations[1], 1)
    return torch.where(defined, ((centred[0] * centred[1]).mean(dim=1) / product).clamp(-1, 1), torch.nan)


def judges_rounding(before: Tensor, after: Tensor) -> Tensor:
    """How much of a spread among a judge's answers may be its rounding: float64 (B,).

    Args:
        before: (B,), of the images as they are, in the judge's own dtype.
        after: float64 (B, D), of the images as they were changed.
    """
    size = torch.maximum(before.cpu().double().abs(), after.abs().amax(dim=1))
    return 4 * torch.finfo(before.dtype).eps * size


def map_rounding(attribution: Tensor) -> Tensor:
    """How much of a spread among sums of a map's values may be rounding: float64 (B,).

    Args:
        attribution: float64 (B, H, W).
    """
    pixels = attribution.shape[1] * attribution.shape[2]
    return torch.finfo(torch.float64).eps * pixels * attribution.abs().flatten(1).amax(dim=1)

"""What metrics of images and of text share: drops, rankings, areas under curves.

Letters: B batch, N positions (pixels or tokens), S steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhex_core import _checks


def relative_drop(before: Tensor, after: Tensor) -> Tensor:
    """max(0, (p - p') / p): which share of a probability is gone, none where it grew.

    Args:
        before: p, (B,), of the input as it is.
        after: p', (B,), of the input with something taken away.

    Returns:
        (B,) in [0, 1]. Where p is 0 there is nothing to lose, and the drop is 0.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes differ, or a value is NaN or infinite.

    Source: Average Drop, Chattopadhay et al. 2018 (arXiv 1710.11063); Sun and Liò (arXiv 2501.01311), metrics.
    """
    before = _checks.tensor("before", before, ndim=1)
    after = _checks.tensor("after", after, ndim=1)
    if before.shape != after.shape:
        raise ValueError(f"after must have the shape of before, {tuple(before.shape)}, got {tuple(after.shape)}")
    _check_finite("before", before)
    _check_finite("after", after)
    drop = ((before - after) / torch.where(before > 0, before, 1)).clamp(0, 1)
    return torch.where(before > 0, drop, 0)


def descending(scores: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Positions from the highest score to the lowest.

    Equal scores come in one fixed, seemingly random order, the same for every sample, batch and method. In the order of
    their places, a map with many equal values (zeros after a ReLU) would be judged by which corner it is read from.

    Args:
        scores: (B, N).
        mask: bool (B, N), the positions that take part; the others come last.

    Returns:
        int64 (B, N).

    Raises:
        ValueError: A score that takes part is NaN.
    """
    scores = _checks.tensor("scores", scores, ndim=2)
    if mask is not None:
        _check_mask(mask, scores)
        scores = torch.where(mask, scores, -torch.inf)
    if bool(scores.isnan().any()):
        raise ValueError("scores must be numbers, got NaN among them")
    shuffled = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(0)).to(scores.device)
    order = scores[:, shuffled].argsort(dim=1, descending=True, stable=True)
    if mask is not None:
        # A score of -inf that takes part must still come before the positions that do not.
        order = order.gather(1, (~mask[:, shuffled]).gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))
    return shuffled[order]


def top_fraction(scores: Tensor, fraction: float, *, mask: Tensor | None = None, at_least: int = 0) -> Tensor:
    """The positions of the highest scores, as many for every method: that is what makes a comparison fair.

    Args:
        scores: (B, N).
        fraction: Of the positions that take part, in [0, 1]; rounded to whole positions, a half upwards.
        mask: bool (B, N), the positions that take part; None means all.
        at_least: How many to choose however small the fraction (never more than take part).

    Returns:
        bool (B, N).
    """
    scores = _checks.tensor("scores", scores, ndim=2)
    share = _checks.number("fraction", fraction, low=0, high=1)
    if isinstance(at_least, bool) or not isinstance(at_least, int) or at_least < 0:
        raise ValueError(f"at_least must be a whole number from 0, got {at_least!r}")
    order = descending(scores, mask=mask)
    taking_part = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    count = taking_part.sum(dim=1)
    # Half an ulp of mercy: 0.1 * 30 is 3.0000000000000004 and 0.15 * 30 is 4.499999999999999.
    wanted = (share * count.double() + 0.5 + 1e-9).floor().long().clamp(min=at_least).minimum(count)
    chosen = torch.arange(scores.shape[1], device=scores.device) < wanted.unsqueeze(1)
    return torch.zeros_like(chosen).scatter(1, order, chosen)


def curve_area(values: Tensor, fractions: Tensor) -> Tensor:
    """Area under a curve by trapezoids, divided by its width: the mean height.

    Args:
        values: (B, S).
        fractions: (S,), ascending.

    Returns:
        (B,).

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes do not fit, the fractions do not ascend, or a value is NaN or infinite.
    """
    values = _checks.tensor("values", values, ndim=2)
    fractions = _checks.tensor("fractions", fractions, ndim=1)
    if fractions.shape[0] != values.shape[1] or fractions.shape[0] < 2:
        raise ValueError(f"fractions must hold {values.shape[1]} numbers, at least 2, got {fractions.shape[0]}")
    if not bool((fractions.diff() > 0).all()):
        raise ValueError("fractions must be ascending")
    _check_finite("values", values)
    return torch.trapezoid(values, fractions.to(values), dim=1) / (fractions[-1] - fractions[0]).to(values)


def min_max(maps: Tensor) -> Tensor:
    """Bring each sample to [0, 1] by its own extremes; a constant one becomes zeros.

    Args:
        maps: (B, N) or (B, H, W), of any sign.

    Raises:
        TypeError: `maps` is no tensor of floats.
        ValueError: Its rank is another, or a value is NaN or infinite: that would look like a map without evidence.
    """
    maps = _checks.tensor("maps", maps, ndim=(2, 3))
    _check_finite("maps", maps)
    if not maps.numel():
        return maps
    axes = tuple(range(1, maps.ndim))
    low, high = maps.amin(dim=axes, keepdim=True), maps.amax(dim=axes, keepdim=True)
    spread = high - low
    return torch.where(spread > 0, (maps - low) / torch.where(spread > 0, spread, 1), 0)


def _check_finite(name: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity among them")


def _check_mask(mask: object, scores: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.shape != scores.shape:
        raise ValueError(f"mask must have the shape of scores, {tuple(scores.shape)}, got {tuple(mask.shape)}")

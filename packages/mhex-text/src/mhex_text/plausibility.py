"""Do the tokens an explanation points at agree with those that people marked as their reasons?

Agreement with people is plausibility, not faithfulness: a model may have other reasons than people, and an explanation
that says so is right. A value is NaN for a text without a rationale, where no agreement is defined; `torch.nanmean`
leaves it out.

Letters: B batch, T tokens (or words).
Source: DeYoung et al. 2020, "ERASER" (arXiv 1911.03429), agreement with human rationales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhex_core import _checks
from mhex_core.metrics.common import top_fraction
from mhex_core.metrics.tokens import token_ranks


def token_f1(scores: Tensor, rationale: Tensor, mask: Tensor | None = None, *, fraction: float | None = None) -> Tensor:
    """F1 of the tokens of the highest scores against the rationale: 2 |top and rationale| / (|top| + |rationale|).

    Equal scores come in one fixed, seemingly random order, which padding does not change.

    Args:
        scores: (B, T), of any sign; only their order counts, and only where `mask` is true.
        rationale: bool (B, T), what people marked; false outside `mask`.
        mask: bool (B, T), the tokens that take part (`mhex_text.score_mask`); None means all.
        fraction: How many tokens are on top: a share of those that take part, in [0, 1], rounded to whole tokens, a
            half upwards, at least 1. None means as many as the rationale has; precision, recall and F1 are then alike.

    Returns:
        (B,) in [0, 1], higher is better. NaN for a text without a rationale.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument's shape or value does not fit.
    """
    top, rationale = _top(scores, rationale, mask, fraction)
    both = (top & rationale).sum(dim=1)
    return _share(2 * both, top.sum(dim=1) + rationale.sum(dim=1), rationale, scores)


def token_iou(
    scores: Tensor, rationale: Tensor, mask: Tensor | None = None, *, fraction: float | None = None
) -> Tensor:
    """Intersection over union of the tokens of the highest scores and the rationale.

    (ERASER's "IOU F1" counts spans of tokens that overlap by at least half; this is the overlap of the tokens.)

    Args:
        scores: See `token_f1`.
        rationale: See `token_f1`.
        mask: See `token_f1`.
        fraction: See `token_f1`.

    Returns:
        (B,) in [0, 1], higher is better. NaN for a text without a rationale.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument's shape or value does not fit.
    """
    top, rationale = _top(scores, rationale, mask, fraction)
    return _share((top & rationale).sum(dim=1), (top | rationale).sum(dim=1), rationale, scores)


def token_auprc(scores: Tensor, rationale: Tensor, mask: Tensor | None = None) -> Tensor:
    """Area under the precision-recall curve as average precision: sum_n (R_n - R_{n-1}) P_n.

    n runs over the distinct scores, so that equal ones enter together and no order among them matters. This is
    `sklearn.metrics.average_precision_score`; ERASER's code joins the points by trapezoids instead, which is
    optimistic where they lie far apart.

    Args:
        scores: See `token_f1`.
        rationale: See `token_f1`.
        mask: See `token_f1`.

    Returns:
        (B,) in [0, 1], higher is better; a constant score has the rationale's share of the tokens. NaN for a text
        without a rationale.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument's shape or value does not fit.
    """
    scores, rationale, mask = _check(scores, rationale, mask)
    length = scores.shape[1]
    if not scores.numel():
        return _share(rationale.sum(dim=1), rationale.sum(dim=1), rationale, scores)
    # Those that take part first, and by falling scores among them: both sorts are stable.
    falling = scores.argsort(dim=1, descending=True, stable=True)
    order = falling.gather(1, (~mask).gather(1, falling).to(torch.uint8).argsort(dim=1, stable=True))
    ranked, marked, real = (value.gather(1, order) for value in (scores, rationale, mask))
    places = torch.arange(length, device=scores.device)
    precision = marked.cumsum(dim=1).double() / (places + 1)
    # Each token is judged where the last of its equals has come in.
    last = torch.ones_like(real)
    last[:, :-1] = (ranked[:, 1:] != ranked[:, :-1]) | ~real[:, 1:]
    closing = torch.where(last, places, length).flip(1).cummin(dim=1).values.flip(1)
    total = torch.where(marked, precision.gather(1, closing), 0).sum(dim=1)
    return _share(total, rationale.sum(dim=1), rationale, scores)


def _top(scores: Tensor, rationale: Tensor, mask: Tensor | None, fraction: float | None) -> tuple[Tensor, Tensor]:
    """Which tokens are on top, bool (B, T), and the rationale."""
    scores, rationale, mask = _check(scores, rationale, mask)
    ranking = token_ranks(scores, mask)
    if fraction is not None:
        return top_fraction(ranking, fraction, mask=mask, at_least=1), rationale
    order = ranking.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    chosen = torch.arange(scores.shape[1], device=scores.device) < rationale.sum(dim=1, keepdim=True)
    return torch.zeros_like(chosen).scatter(1, order, chosen), rationale


def _share(part: Tensor, whole: Tensor, rationale: Tensor, scores: Tensor) -> Tensor:
    """part / whole in float32 or wider, NaN where there is no rationale."""
    value = torch.where(rationale.any(dim=1), part.double() / whole.double().clamp(min=1), torch.nan)
    return value if scores.dtype == torch.float64 else value.float()


def _check(scores: Tensor, rationale: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    scores = _checks.tensor("scores", scores, ndim=2).detach()
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    for name, value in (("rationale", rationale), ("mask", mask)):
        if not isinstance(value, Tensor) or value.dtype != torch.bool:
            raise TypeError(f"{name} must be a bool tensor, got {getattr(value, 'dtype', type(value).__name__)}")
        if value.shape != scores.shape:
            raise ValueError(f"{name} must have the shape of scores, {tuple(scores.shape)}, got {tuple(value.shape)}")
    rationale, mask = rationale.to(scores.device), mask.to(scores.device)
    if bool((rationale & ~mask).any()):
        raise ValueError("rationale must be false where mask is false, got tokens that do not take part")
    if bool((scores.isnan() & mask).any()):
        raise ValueError("scores must be numbers, got NaN among them")
    return scores, rationale, mask

"""Does a judge of texts lose the class when the tokens an explanation points at are hidden?

Tokens are hidden by putting another, usually the tokenizer's mask token, in their place: the text keeps its length. The
judge should be another network than the one explained, so that no method is judged by its own model.

Letters: B batch, T tokens, K classes, F fractions.
Sources: text AVG Drop, Sun and Liò, "Multi-Head Explainer" (arXiv 2501.01311), metrics; comprehensiveness, sufficiency
and their AOPC, DeYoung et al. 2020, "ERASER" (arXiv 1911.03429), after Samek et al. 2017 (arXiv 1509.06321).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mhex_core import _checks
from mhex_core.metrics.common import relative_drop, top_fraction

ERASER_FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)
"""The shares of a text's tokens at which ERASER asks."""

_GOLDEN = 0.6180339887498949
_LEEWAY = 1e-3  # half precision does not sum to 1


def hide_tokens(tokens: Tensor, chosen: Tensor, replacement: int) -> Tensor:
    """The replacement where tokens are chosen, the tokens elsewhere.

    Args:
        tokens: int64 (B, T).
        chosen: bool (B, T).
        replacement: The token that stands for "not shown", usually `tokenizer.mask_token_id`.

    Returns:
        int64 (B, T).
    """
    tokens = _check_tokens(tokens)
    _check_same("chosen", chosen, tokens)
    return torch.where(chosen, _check_replacement(replacement), tokens)


def token_avg_drop(
    predict: Callable[[Tensor], Tensor],
    tokens: Tensor,
    scores: Tensor,
    target: int | Tensor,
    *,
    replacement: int,
    mask: Tensor | None = None,
    fraction: float = 0.1,
) -> Tensor:
    """AVG Drop of texts: max(0, (p - p') / p), p' with the tokens of the highest scores hidden.

    How many are hidden depends on a text's own number of tokens that take part, not on padding; nor does padding decide
    between equal scores.

    Args:
        predict: The judge: takes int64 (B, T) and gives (B, K) probabilities. It knows what is padding; it is called
            twice, with the whole batch, without gradients.
        tokens: int64 (B, T).
        scores: (B, T), of any sign; only their order counts, and only where `mask` is true.
        target: (B,) true classes, or one for all.
        replacement: See `hide_tokens`.
        mask: bool (B, T), the tokens that may be hidden (`mhex_text.score_mask`: real ones that are not special); None
            means all.
        fraction: Of a text's tokens that take part, in [0, 1]; rounded to whole tokens, a half upwards, at least 1.

    Returns:
        (B,) in [0, 1], higher is better. A text without a token that takes part gets 0.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument's shape or value does not fit, or the judge gives no probabilities.
    """
    tokens, ranking, mask = _check(tokens, scores, mask)
    replacement = _check_replacement(replacement)
    chosen = top_fraction(ranking, fraction, mask=mask, at_least=1)
    if not tokens.numel():
        return scores.new_zeros(tokens.shape[0])
    before = _belief(predict, tokens, target)
    drop = relative_drop(before, _belief(predict, hide_tokens(tokens, chosen, replacement), target))
    return torch.where(mask.any(dim=1).to(drop.device), drop, 0)


def comprehensiveness(
    predict: Callable[[Tensor], Tensor],
    tokens: Tensor,
    scores: Tensor,
    target: int | Tensor,
    *,
    replacement: int,
    mask: Tensor | None = None,
    fractions: Sequence[float] = ERASER_FRACTIONS,
) -> Tensor:
    """p(x) - p(x without its top tokens): what the judge loses with them.

    ERASER deletes tokens; here they are replaced, so that positions and length stay as they are.

    Args:
        predict: See `token_avg_drop`; called F + 1 times.
        tokens: See `token_avg_drop`.
        scores: See `token_avg_drop`.
        target: See `token_avg_drop`. (ERASER takes the class the judge predicts.)
        replacement: See `hide_tokens`.
        mask: See `token_avg_drop`.
        fractions: F shares of a text's tokens that take part, each in [0, 1]; rounded to whole tokens, a half upwards,
            at least 1 for any share above 0.

    Returns:
        (B, F) in [-1, 1], higher is better. Zeros for a text without a token that takes part.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument's shape or value does not fit, or the judge gives no probabilities.
    """
    return _curve(predict, tokens, scores, target, replacement, mask, fractions, keep_top=False)


def sufficiency(
    predict: Callable[[Tensor], Tensor],
    tokens: Tensor,
    scores: Tensor,
    target: int | Tensor,
    *,
    replacement: int,
    mask: Tensor | None = None,
    fractions: Sequence[float] = ERASER_FRACTIONS,
) -> Tensor:
    """p(x) - p(only its top tokens are left): what the judge misses where it sees nothing else.

    Tokens outside `mask`, such as [CLS], [SEP] and padding, always stay.

    Args:
        predict: See `token_avg_drop`; called F + 1 times.
        tokens: See `token_avg_drop`.
        scores: See `token_avg_drop`.
        target: See `comprehensiveness`.
        replacement: See `hide_tokens`.
        mask: See `token_avg_drop`.
        fractions: Of tokens that are left, see `comprehensiveness`.

    Returns:
        (B, F) in [-1, 1], lower is better. Zeros for a text without a token that takes part.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument's shape or value does not fit, or the judge gives no probabilities.
    """
    return _curve(predict, tokens, scores, target, replacement, mask, fractions, keep_top=True)


def aopc(curve: Tensor) -> Tensor:
    """Area over the perturbation curve: the mean of `comprehensiveness` or `sufficiency` over the fractions.

    (1 / F) sum_{f=1}^{F} (p(x) - p(x_f)): the mean over thresholds, as ERASER's published code takes it. The equation
    there, and in Samek et al., is 1 / (F + 1) sum_{f=0}^{F}, with a term for no token at all. For comprehensiveness
    that term is 0, which makes the equation's value F / (F + 1) of this one; for sufficiency it is p(x) less what the
    judge believes when it sees no token. With a 0 before the other fractions, this is the equation to the letter.

    Args:
        curve: (B, F), F at least 1.

    Returns:
        (B,) in [-1, 1]. Higher is better for comprehensiveness, lower for sufficiency.
    """
    curve = _checks.tensor("curve", curve, ndim=2)
    if not curve.shape[1]:
        raise ValueError("curve must have at least one fraction, got none")
    return curve.mean(dim=1)


def _curve(
    predict: Callable[[Tensor], Tensor],
    tokens: Tensor,
    scores: Tensor,
    target: int | Tensor,
    replacement: int,
    mask: Tensor | None,
    fractions: Sequence[float],
    *,
    keep_top: bool,
) -> Tensor:
    tokens, ranking, mask = _check(tokens, scores, mask)
    replacement = _check_replacement(replacement)
    shares = _checks.numbers("fractions", fractions, low=0)
    if not shares or max(shares) > 1:
        raise ValueError(f"fractions must be one or more numbers in [0, 1], got {fractions!r}")
    if not tokens.numel():
        return scores.new_zeros(tokens.shape[0], len(shares))
    before = _belief(predict, tokens, target)
    drops = []
    for share in shares:
        top = top_fraction(ranking, share, mask=mask, at_least=1 if share else 0)
        hidden = hide_tokens(tokens, mask & ~top if keep_top else top, replacement)
        drops.append(before - _belief(predict, hidden, target))
    curve = torch.stack(drops, dim=1)
    return torch.where(mask.any(dim=1, keepdim=True).to(curve.device), curve, 0)


def _belief(predict: Callable[[Tensor], Tensor], tokens: Tensor, target: int | Tensor) -> Tensor:
    """The judge's probability of the target: (B,), in float32 or wider."""
    with torch.no_grad():
        probabilities = predict(tokens)
    batch = tokens.shape[0]
    if not isinstance(probabilities, Tensor) or probabilities.ndim != 2 or probabilities.shape[0] != batch:
        came = tuple(probabilities.shape) if isinstance(probabilities, Tensor) else type(probabilities).__name__
        raise ValueError(f"predict must give probabilities of shape ({batch}, K), got {came}")
    wide = probabilities.detach()
    wide = wide if wide.dtype == torch.float64 else wide.float()
    low, high = (float(extreme) for extreme in wide.aminmax())
    if not (low >= -_LEEWAY and high <= 1 + _LEEWAY):
        raise ValueError(f"predict must give probabilities in [0, 1], got values from {low:g} to {high:g}")
    index = _checks.class_indices("target", target, batch=batch, num_classes=wide.shape[1], device=wide.device)
    if index.ndim != 1:
        raise ValueError(f"target must have shape ({batch},), got {tuple(index.shape)}")
    return wide.gather(1, index.unsqueeze(1)).squeeze(1)


def _check(tokens: Tensor, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, a ranking to choose by (the higher the better, no two alike in a text), and the mask."""
    tokens = _check_tokens(tokens)
    scores = _checks.tensor("scores", scores, ndim=2).detach().to(tokens.device)
    if scores.shape != tokens.shape:
        raise ValueError(f"scores must have the shape of tokens, {tuple(tokens.shape)}, got {tuple(scores.shape)}")
    if mask is None:
        mask = torch.ones_like(tokens, dtype=torch.bool)
    else:
        _check_same("mask", mask, tokens)
        mask = mask.to(tokens.device)
    if bool((scores.isnan() & mask).any()):
        raise ValueError("scores must be numbers, got NaN among them")
    return tokens, token_ranks(scores, mask), mask


def token_ranks(scores: Tensor, mask: Tensor) -> Tensor:
    """Minus each token's place in the order of falling scores: float64 (B, T).

    Equal scores are put in an order that depends on a token's place among those that take part: the same text must
    be judged alike however much padding its batch brings, on whichever side. Multiples of the golden ratio scatter
    that order over the text.
    """
    place = (mask.cumsum(dim=1) - 1).clamp(min=0).double() * _GOLDEN % 1
    scattered = place.argsort(dim=1, stable=True)
    falling = scores.gather(1, scattered).argsort(dim=1, descending=True, stable=True)
    order = scattered.gather(1, falling)
    ranks = torch.arange(scores.shape[1], device=scores.device, dtype=torch.float64).expand(scores.shape)
    return -torch.empty_like(ranks).scatter_(1, order, ranks)


def _check_tokens(tokens: object) -> Tensor:
    checked = _checks.tensor("tokens", tokens, ndim=2, floating=False)
    if checked.dtype != torch.int64:
        raise TypeError(f"tokens must be of dtype torch.int64, got {checked.dtype}")
    return checked


def _check_replacement(replacement: object) -> int:
    if isinstance(replacement, bool) or not isinstance(replacement, int):
        raise TypeError(f"replacement must be an int, got {type(replacement).__name__}")
    if replacement < 0:
        raise ValueError(f"replacement must be at least 0, got {replacement}")
    return replacement


def _check_same(name: str, value: object, tokens: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.shape != tokens.shape:
        raise ValueError(f"{name} must have the shape of tokens, {tuple(tokens.shape)}, got {tuple(value.shape)}")

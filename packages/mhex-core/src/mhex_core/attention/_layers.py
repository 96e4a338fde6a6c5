"""What the methods share: checks of the tensors of all layers, and which tokens are real."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mhex_core import _checks

# Half precision adds up to 1 within a few hundredths of a percent per head.
SUM_TOLERANCE = 1e-2


def weights_of(attentions: object) -> tuple[tuple[Tensor, ...], int, int]:
    """The attention weights of all layers, with B and T."""
    layers = _checks.tensors("attentions", attentions, ndim=4)
    batch, _, tokens, _ = layers[0].shape
    for index, weights in enumerate(layers):
        if weights.shape[0] != batch or weights.shape[1] < 1 or weights.shape[2:] != (tokens, tokens):
            raise ValueError(
                f"attentions[{index}] must have shape ({batch}, H, {tokens}, {tokens}), got {tuple(weights.shape)}"
            )
    return layers, batch, tokens


def check_shares(layers: Sequence[Tensor], pairs: Tensor) -> None:
    """Raise unless weights between real tokens can be those after a softmax: scores before it mix to huge numbers."""
    for index, weights in enumerate(layers):
        kept = torch.where(pairs.unsqueeze(1), weights, 0.0)
        total = kept.sum(dim=3)
        # Written so that NaN does not pass. Rows may sum to less: where a part goes to no token.
        if not bool((kept >= 0).all() & (total <= 1 + SUM_TOLERANCE).all()):
            raise ValueError(
                f"attentions[{index}] must be weights after the softmax, not negative and in rows of sum 1, got values "
                f"from {kept.min():g} and sums up to {total.max():g}"
            )


def slopes_of(gradients: object, layers: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of the attention weights, of the same shapes."""
    slopes = _checks.tensors("gradients", gradients, ndim=4)
    if len(slopes) != len(layers):
        raise ValueError(f"gradients must hold one tensor per layer of attentions ({len(layers)}), got {len(slopes)}")
    for index, (slope, weights) in enumerate(zip(slopes, layers, strict=True)):
        if slope.shape != weights.shape:
            raise ValueError(f"gradients[{index}] must have shape {tuple(weights.shape)}, got {tuple(slope.shape)}")
    return slopes


def real_tokens(mask: Tensor | None, batch: int, tokens: int, like: Tensor, *, name: str = "mask") -> Tensor:
    """bool (B, T), the tokens that take part."""
    if mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=like.device)
    mask = _checks.tensor(name, mask, ndim=2, floating=False)
    if mask.shape != (batch, tokens):
        raise ValueError(f"{name} must have shape ({batch}, {tokens}), got {tuple(mask.shape)}")
    return _checks.moved(name, mask, like.device, torch.bool)


def pairs_of(real: Tensor) -> Tensor:
    """bool (B, T, T), where query and key are both real."""
    return real.unsqueeze(2) & real.unsqueeze(1)


def with_skip(mixed: Tensor, residual: float, pairs: Tensor) -> Tensor:
    """Ahat = (1 - residual) A + residual I (B, T, T), rows brought to sum 1 over the real tokens."""
    skip = torch.eye(mixed.shape[2], dtype=mixed.dtype, device=mixed.device)
    mixed = torch.where(pairs, (1 - residual) * mixed + residual * skip, 0.0)
    total = mixed.sum(dim=2, keepdim=True)
    return mixed / torch.where(total > 0, total, 1.0)


def index_below(name: str, value: object, size: int) -> int:
    """Return `value` if it is an int in [0, size - 1]."""
    found = _checks.integer(name, value)
    if not 0 <= found < size:
        raise ValueError(f"{name} must lie in [0, {size - 1}], got {found}")
    return found


def seed_of(value: object) -> int:
    """Return `value` if it can seed numpy's generators."""
    found = _checks.integer("seed", value)
    if found < 0:
        raise ValueError(f"seed must be at least 0, got {found}")
    return found

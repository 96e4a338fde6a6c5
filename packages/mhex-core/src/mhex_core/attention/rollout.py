"""Attention weights as a mixing of tokens: rollout through the layers, and what each token receives.

Letters: B batch, H heads, T tokens, L layers, A^l the weights of layer l after the softmax.
Source: Abnar and Zuidema 2020 (arXiv 2005.00928), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mhex_core import _checks
from mhex_core.attention._layers import (
    SUM_TOLERANCE,
    check_shares,
    index_below,
    pairs_of,
    real_tokens,
    weights_of,
    with_skip,
)


def attention_rollout(
    attentions: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    residual: float = 0.5,
    head_weights: Sequence[Tensor] | None = None,
    start: int = 0,
) -> Tensor:
    """How much of each input token reaches each output token, if tokens were mixed as attention mixes them.

    R = Ahat^L .. Ahat^1, Ahat^l = (1 - residual) sum_h w^l_h A^{l,h} + residual I, each row brought to sum 1 over the
    real tokens. With w = 1 / H, the mean over heads, a residual of 1/2 is the paper's mean_h A + I with rows
    normalised.

    Args:
        attentions: L tensors (B, H, T, T), shallow to deep, after the softmax: not negative, rows of sum 1 (or less).
        mask: (B, T), true (or 1) for real tokens; None means that all are. Padding takes no part: real tokens get the
            numbers that they would have without it.
        residual: The share of the skip connection, in [0, 1].
        head_weights: w, L tensors (B, H), not negative, each row of sum 1 (see `head_importance`); None means 1 / H.
        start: The first layer that is rolled, in [0, L - 1]: those before it count as the identity.

    Returns:
        (B, T, T), row q is output token q, column i input token i. Rows of real tokens sum to 1; rows and columns of
        padding are 0.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes do not fit each other, or a value does not lie where it must.
    """
    layers, batch, tokens = weights_of(attentions)
    residual = _checks.number("residual", residual, low=0, high=1)
    shares = _head_weights(head_weights, layers)
    start = index_below("start", start, len(layers))
    real = real_tokens(mask, batch, tokens, layers[0])
    pairs = pairs_of(real)
    check_shares(layers, pairs)
    # What padding would pass on starts out as nothing, and so stays nothing.
    rolled = torch.eye(tokens, dtype=layers[0].dtype, device=layers[0].device) * pairs
    for index in range(start, len(layers)):
        share = shares[index]
        mixed = layers[index].mean(dim=1) if share is None else (layers[index] * share[:, :, None, None]).sum(dim=1)
        rolled = with_skip(mixed, residual, pairs) @ rolled
    return rolled


def attention_received(attentions: Sequence[Tensor], *, mask: Tensor | None = None) -> Tensor:
    """How much tokens look at each token: sum_l abar^l_i, abar^l_i the mean over heads and real queries of A^l_qi.

    Args:
        attentions: L tensors (B, H, T, T), after the softmax.
        mask: (B, T), true (or 1) for real tokens; None means that all are.

    Returns:
        (B, T), not negative; over the real tokens of a text it sums to L. 0 for padding.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes do not fit each other, or the attentions are none.
    """
    layers, batch, tokens = weights_of(attentions)
    real = real_tokens(mask, batch, tokens, layers[0])
    check_shares(layers, pairs_of(real))
    total = torch.stack([received(weights, real) for weights in layers]).sum(dim=0)
    return torch.where(real, total, 0.0)


def received(weights: Tensor, real: Tensor) -> Tensor:
    """abar of one layer, (B, T)."""
    queries = real.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(real.unsqueeze(2), weights.mean(dim=1), 0.0).sum(dim=1) / queries


def _head_weights(given: Sequence[Tensor] | None, layers: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """w of each layer on its device, None for the mean."""
    if given is None:
        return [None] * len(layers)
    shares = _checks.tensors("head_weights", given, ndim=2)
    if len(shares) != len(layers):
        raise ValueError(
            f"head_weights must hold one tensor per layer of attentions ({len(layers)}), got {len(shares)}"
        )
    for index, (share, weights) in enumerate(zip(shares, layers, strict=True)):
        if share.shape != weights.shape[:2]:
            raise ValueError(
                f"head_weights[{index}] must have shape {tuple(weights.shape[:2])}, got {tuple(share.shape)}"
            )
        # Written so that NaN does not pass.
        if not bool((share >= 0).all()):
            raise ValueError(f"head_weights[{index}] must not be negative, got {share.min().item()} among them")
        total = share.sum(dim=1)
        if not bool(((total - 1).abs() <= SUM_TOLERANCE).all()):
            raise ValueError(f"head_weights[{index}] must have rows of sum 1, got sums {total.tolist()}")
    return [share.to(weights) for share, weights in zip(shares, layers, strict=True)]

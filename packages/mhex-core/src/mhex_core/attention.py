"""What the attention weights of an encoder say about its tokens, in plain torch.

Letters: B batch, H heads, T tokens, C channels, L layers, A^l the weights of layer l after the softmax: A^l_qi is what
query q takes of key i, and each row sums to 1 over the real tokens.
Sources: attention rollout, Abnar and Zuidema 2020 (arXiv 2005.00928), section 3; AttCAT, Qiang et al., NeurIPS 2022,
section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mhex_core import _checks


def attention_rollout(attentions: Sequence[Tensor], *, mask: Tensor | None = None, residual: float = 0.5) -> Tensor:
    """How much of each input token reaches each output token, if tokens were mixed as attention mixes them.

    R = Ahat^L .. Ahat^1, Ahat^l = (1 - residual) mean_h A^{l,h} + residual I, each row brought to sum 1 over the real
    tokens. A residual of 1/2 is the paper's mean_h A + I with rows normalised.

    Args:
        attentions: L tensors (B, H, T, T), shallow to deep; none is negative.
        mask: (B, T), true (or 1) for real tokens; None means that all are. Padding takes no part: real tokens get the
            numbers that they would have without it.
        residual: The share of the skip connection, in [0, 1].

    Returns:
        (B, T, T), row q is output token q, column i input token i. Rows of real tokens sum to 1; rows and columns of
        padding are 0.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes do not fit each other, or `residual` does not lie in [0, 1].
    """
    layers = _checks.tensors("attentions", attentions, ndim=4)
    batch, tokens = _check_weights(layers)
    residual = _checks.number("residual", residual, low=0, high=1)
    real = _real(mask, batch, tokens, layers[0])
    both = real.unsqueeze(2) & real.unsqueeze(1)
    skip = torch.eye(tokens, dtype=layers[0].dtype, device=layers[0].device)
    # What padding would pass on starts out as nothing, and so stays nothing.
    rolled = skip * both
    for weights in layers:
        mixed = torch.where(both, (1 - residual) * weights.mean(dim=1) + residual * skip, 0.0)
        total = mixed.sum(dim=2, keepdim=True)
        rolled = mixed / torch.where(total > 0, total, 1.0) @ rolled
    return rolled


def attention_received(attentions: Sequence[Tensor], *, mask: Tensor | None = None) -> Tensor:
    """How much tokens look at each token: sum_l abar^l_i, abar^l_i the mean over heads and real queries of A^l_qi.

    Args:
        attentions: L tensors (B, H, T, T).
        mask: (B, T), true (or 1) for real tokens; None means that all are.

    Returns:
        (B, T), not negative; over the real tokens of a text it sums to L. 0 for padding.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes do not fit each other.
    """
    layers = _checks.tensors("attentions", attentions, ndim=4)
    real = _real(mask, *_check_weights(layers), layers[0])
    total = torch.stack([_received(weights, real) for weights in layers]).sum(dim=0)
    return torch.where(real, total, 0.0)


def attcat(
    hidden: Sequence[Tensor], gradients: Sequence[Tensor], attentions: Sequence[Tensor], *, mask: Tensor | None = None
) -> Tensor:
    """Attentive class activation of each token: input times gradient in every layer, weighed by attention received.

    AttCAT_i = sum_l abar^l_i sum_d h^l_id df/dh^l_id, abar^l_i the mean over heads and real queries of A^{l,h}_qi. This
    is the mean over the column of a key, as in the authors' code; some restatements take the row of a query.

    Args:
        hidden: h^l, L tensors (B, T, C), what enters each layer, shallow to deep.
        gradients: df/dh^l, the same shapes, f being the target's logit.
        attentions: L tensors (B, H, T, T).
        mask: (B, T), true (or 1) for real tokens; None means that all are.

    Returns:
        (B, T), signed, in the units of f; 0 for padding.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes or the numbers of layers do not fit each other.
    """
    states, slopes = _checks.tensors("hidden", hidden, ndim=3), _checks.tensors("gradients", gradients, ndim=3)
    layers = _checks.tensors("attentions", attentions, ndim=4)
    batch, tokens = _check_weights(layers)
    for name, given in (("hidden", states), ("gradients", slopes)):
        if len(given) != len(layers):
            raise ValueError(f"{name} must hold one tensor per layer of attentions ({len(layers)}), got {len(given)}")
        for index, layer in enumerate(given):
            expected = (batch, tokens, states[index].shape[2])
            if tuple(layer.shape) != expected:
                raise ValueError(f"{name}[{index}] must have shape {expected}, got {tuple(layer.shape)}")
    real = _real(mask, batch, tokens, layers[0])
    scores = torch.zeros_like(states[0][:, :, 0])
    for state, slope, weights in zip(states, slopes, layers, strict=True):
        scores = scores + _received(weights, real) * (state * slope).sum(dim=2)
    return torch.where(real, scores, 0.0)


def _received(weights: Tensor, real: Tensor) -> Tensor:
    """abar of one layer, (B, T)."""
    queries = real.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(real.unsqueeze(2), weights.mean(dim=1), 0.0).sum(dim=1) / queries


def _check_weights(layers: tuple[Tensor, ...]) -> tuple[int, int]:
    """B and T of the attention weights of all layers."""
    batch, _, tokens, _ = layers[0].shape
    for index, weights in enumerate(layers):
        if weights.shape[0] != batch or weights.shape[1] < 1 or weights.shape[2:] != (tokens, tokens):
            raise ValueError(
                f"attentions[{index}] must have shape ({batch}, H, {tokens}, {tokens}), got {tuple(weights.shape)}"
            )
    return batch, tokens


def _real(mask: Tensor | None, batch: int, tokens: int, like: Tensor) -> Tensor:
    """bool (B, T), the tokens that take part."""
    if mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=like.device)
    mask = _checks.tensor("mask", mask, ndim=2, floating=False)
    if mask.shape != (batch, tokens):
        raise ValueError(f"mask must have shape ({batch}, {tokens}), got {tuple(mask.shape)}")
    return mask.to(device=like.device, dtype=torch.bool)

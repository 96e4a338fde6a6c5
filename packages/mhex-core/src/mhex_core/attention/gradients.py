"""Attention weights together with their gradients: what attention does for one target.

Letters: B batch, H heads, T tokens, C channels, L layers, A^l the weights of layer l after the softmax, f the logit of
the target, G^l = df/dA^l.

Sources: GMAR, Jo, Jang and Park, ICIP 2025 (arXiv 2504.19414); generic attention relevance and the attention Grad-CAM,
Chefer, Gur and Wolf, ICCV 2021 (arXiv 2103.15679); Grad-SAM, Barkan et al., CIKM 2021 (arXiv 2204.11073); AttCAT,
Qiang et al., NeurIPS 2022, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mhex_core import _checks
from mhex_core.attention._layers import pairs_of, real_tokens, slopes_of, weights_of
from mhex_core.attention.rollout import attention_rollout, received


def target_gradients(logits: Tensor, targets: Tensor, of: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of each sample's target logit, by one backward pass; the graph is kept.

    Args:
        logits: (B, K), with a graph. One sample's must not depend on another's tensors: the gradient of their sum is
            then that of each.
        targets: int64 (B,).
        of: What is asked for. A tensor that no target depends on has the gradient 0.

    Raises:
        TypeError: The targets are of another type.
        ValueError: They do not fit, or the logits have no graph.
    """
    logits = _checks.tensor("logits", logits, ndim=2)
    if not logits.requires_grad:
        raise ValueError("logits must have a graph, which capture(..., graph=True) keeps, got some without")
    batch, classes = logits.shape
    wanted = _checks.class_indices("targets", targets, batch=batch, num_classes=classes, device=logits.device)
    # The targets, or the caller, may be of inference mode.
    with torch.inference_mode(mode=False), torch.enable_grad():
        total = logits.gather(1, wanted.reshape(batch, -1 if batch else 1).clone()).sum()
        return torch.autograd.grad(total, list(of), retain_graph=True, materialize_grads=True)


def head_importance(
    gradients: Sequence[Tensor], *, norm: Literal["l1", "l2"] = "l1", mask: Tensor | None = None
) -> tuple[Tensor, ...]:
    """GMAR's weights of the heads: w_h = |G_h| / sum_h' |G_h'| in each layer, |G_h| a norm over queries and keys.

    Signs are lost, and nothing but these L x H numbers tells one target from another in GMAR.

    Args:
        gradients: G, L tensors (B, H, T, T).
        norm: "l1", sum |G|; or "l2", sqrt(sum G^2).
        mask: (B, T), true (or 1) for real tokens; None means that all are. Only pairs of real tokens count.

    Returns:
        L tensors (B, H), not negative, rows of sum 1; 1 / H where all gradients of a layer are 0.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes do not fit each other, or there is no such norm.
    """
    slopes = _checks.tensors("gradients", gradients, ndim=4)
    batch, _, tokens, _ = slopes[0].shape
    for index, slope in enumerate(slopes):
        if slope.shape[0] != batch or slope.shape[1] < 1 or slope.shape[2:] != (tokens, tokens):
            raise ValueError(
                f"gradients[{index}] must have shape ({batch}, H, {tokens}, {tokens}), got {tuple(slope.shape)}"
            )
    _checks.choice("norm", norm, ("l1", "l2"))
    pairs = pairs_of(real_tokens(mask, batch, tokens, slopes[0])).unsqueeze(1)
    weights = []
    for slope in slopes:
        flat = torch.where(pairs, slope, 0.0).flatten(2)
        # The largest entry of a sample is brought to 1 first: squares of small gradients would vanish.
        largest = flat.abs().amax(dim=(1, 2), keepdim=True)
        size = (flat / torch.where(largest > 0, largest, 1.0)).norm(p=1 if norm == "l1" else 2, dim=2)
        size = torch.where(largest.squeeze(2) > 0, size, 1.0)
        weights.append(size / size.sum(dim=1, keepdim=True))
    return tuple(weights)


def gmar(
    attentions: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    norm: Literal["l1", "l2"] = "l1",
    residual: float = 0.5,
    mask: Tensor | None = None,
) -> Tensor:
    """Gradient-driven multi-head attention rollout: a rollout with heads weighed by their gradients' size.

    R = B^L .. B^1, B^l the rows of sum_h w^l_h A^{l,h} + alpha I brought to sum 1, w see `head_importance`. As the rows
    of A sum to 1, this is `attention_rollout` with alpha = residual / (1 - residual): 1/2 is alpha = 1.

    The paper's own equation is not at hand in full; this is the form that agrees with rollout where the heads weigh
    alike. The released code takes gradients of channel groups of the last block's norm in place of heads, leaves rows
    without a norm, and reads one head; none of that is followed.

    Args:
        attentions: L tensors (B, H, T, T), shallow to deep.
        gradients: G, the same shapes.
        norm: See `head_importance`.
        residual: The share of the skip connection, in [0, 1].
        mask: (B, T), true (or 1) for real tokens; None means that all are.

    Returns:
        (B, T, T), see `attention_rollout`; not negative, and little specific to a target.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes do not fit each other, or a value does not lie where it must.
    """
    layers, _, _ = weights_of(attentions)
    slopes = slopes_of(gradients, layers)
    weights = head_importance(slopes, norm=norm, mask=mask)
    return attention_rollout(layers, mask=mask, residual=residual, head_weights=weights)


def generic_relevance(
    attentions: Sequence[Tensor], gradients: Sequence[Tensor], *, mask: Tensor | None = None
) -> Tensor:
    """Chefer's rule for self-attention: R = I, then for each layer R <- R + mean_h ReLU(G^l . A^l) R.

    Args:
        attentions: L tensors (B, H, T, T), shallow to deep.
        gradients: G, the same shapes.
        mask: (B, T), true (or 1) for real tokens; None means that all are.

    Returns:
        (B, T, T), not negative, row q output token q; 0 in rows and columns of padding. The identity is in it: it
        favours the token that is read over all others, which is left out where the others are compared.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes do not fit each other.
    """
    layers, batch, tokens = weights_of(attentions)
    slopes = slopes_of(gradients, layers)
    pairs = pairs_of(real_tokens(mask, batch, tokens, layers[0]))
    relevance = torch.eye(tokens, dtype=layers[0].dtype, device=layers[0].device) * pairs
    for weights, slope in zip(layers, slopes, strict=True):
        relevance = relevance + torch.where(pairs, (weights * slope).relu().mean(dim=1), 0.0) @ relevance
    return relevance


def grad_sam(attentions: Sequence[Tensor], gradients: Sequence[Tensor], *, mask: Tensor | None = None) -> Tensor:
    """Gradient self-attention maps: score_i = 1/(L H n) sum_{l,h,j} A_ij ReLU(G_ij), the row of query i.

    Args:
        attentions: L tensors (B, H, T, T).
        gradients: G, the same shapes.
        mask: (B, T), true (or 1) for real tokens; None means that all are. n is their number, and j runs over them.

    Returns:
        (B, T), not negative; 0 for padding.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes do not fit each other.
    """
    layers, batch, tokens = weights_of(attentions)
    real = real_tokens(mask, batch, tokens, layers[0])
    matrix = aggregated_attention(layers, gradients)
    return torch.where(pairs_of(real), matrix, 0.0).sum(dim=2) / real.sum(dim=1, keepdim=True).clamp(min=1)


def attention_gradcam(attention: Tensor, gradient: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Grad-CAM with attention heads for channels: ReLU(mean_h w_h A_h), w_h the gradient's mean over the tokens.

    Args:
        attention: (B, H, T), the row of the query that the prediction is read from, in the last block.
        gradient: Its gradient, the same shape.
        mask: (B, T), true (or 1) for the tokens that are explained (such as patches); None means all. w_h is the mean
            over them.

    Returns:
        (B, T), not negative; 0 for what is not explained.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes do not fit each other.
    """
    attention = _checks.tensor("attention", attention, ndim=3)
    gradient = _checks.tensor("gradient", gradient, ndim=3)
    if gradient.shape != attention.shape:
        raise ValueError(f"gradient must have shape {tuple(attention.shape)}, got {tuple(gradient.shape)}")
    batch, heads, tokens = attention.shape
    if heads < 1:
        raise ValueError(f"attention must have at least one head, got shape {tuple(attention.shape)}")
    shown = real_tokens(mask, batch, tokens, attention).unsqueeze(1)
    count = shown.sum(dim=2, keepdim=True).clamp(min=1)
    weights = torch.where(shown, gradient, 0.0).sum(dim=2, keepdim=True) / count
    return torch.where(shown, weights * attention, 0.0).mean(dim=1).relu()


def aggregated_attention(attentions: Sequence[Tensor], gradients: Sequence[Tensor] | None = None) -> Tensor:
    """The mean over layers and heads of A, or with gradients of A ReLU(G).

    Args:
        attentions: L tensors (B, H, T, T).
        gradients: G, the same shapes; None for A alone.

    Returns:
        (B, T, T). Without gradients the rows of real tokens sum to 1 as those of A do: a sum over keys tells no tokens
        apart.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes do not fit each other.
    """
    layers, _, _ = weights_of(attentions)
    if gradients is None:
        parts = [weights.mean(dim=1) for weights in layers]
    else:
        slopes = slopes_of(gradients, layers)
        parts = [(weights * slope.relu()).mean(dim=1) for weights, slope in zip(layers, slopes, strict=True)]
    return torch.stack(parts).mean(dim=0)


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
    layers, batch, tokens = weights_of(attentions)
    for name, given in (("hidden", states), ("gradients", slopes)):
        if len(given) != len(layers):
            raise ValueError(f"{name} must hold one tensor per layer of attentions ({len(layers)}), got {len(given)}")
        for index, layer in enumerate(given):
            expected = (batch, tokens, states[index].shape[2])
            if tuple(layer.shape) != expected:
                raise ValueError(f"{name}[{index}] must have shape {expected}, got {tuple(layer.shape)}")
    real = real_tokens(mask, batch, tokens, layers[0])
    scores = torch.zeros_like(states[0][:, :, 0])
    for state, slope, weights in zip(states, slopes, layers, strict=True):
        scores = scores + received(weights, real) * (state * slope).sum(dim=2)
    return torch.where(real, scores, 0.0)

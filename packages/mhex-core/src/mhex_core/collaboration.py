"""Do a block's gate and its supervision pull its weights the same way?

Letters: B batch, K classes, L blocks, C_l channels.
Source: Sun and Liò, "Multi-Head Explainer" (arXiv 2501.01311), collaboration between attention and deep supervision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mhex_core import _checks
from mhex_core.matrix import compute_dtype


def collaboration(
    hidden: Sequence[Tensor], head_logits: Sequence[Tensor], target: Tensor, *, multi_label: bool = False
) -> Tensor:
    """Cosine between what a block's own head and the next block's head ask of its W1, for each sample.

    By definition <D, G> / (|D| |G|) with D = d loss_l / d W1_l and G = d loss_{l+1} / d W1_l. W1_l enters once, as
    h_l = W1_l z, so D = d z^T and G = e z^T with the gradients d, e with respect to h_l: z cancels, and what is left is
    cos(d, e). One backward pass per head for the whole batch, none per sample.

    Args:
        hidden: h_l, L tensors (B, C_l) in the graph of one forward pass in evaluation mode. (In training mode batch
            normalisation ties the samples together and no gradient belongs to one of them.)
        head_logits: logits_l, L tensors (B, K) of the same pass.
        target: (B,) class indices, or with `multi_label` (B, K) labels.
        multi_label: Which loss the heads have.

    Returns:
        (B, L - 1) in [-1, 1]. Zero where either gradient vanishes, as it does for every block without a gate.

    Raises:
        ValueError: The tensors do not fit each other, or carry no graph.
    """
    hidden = _checks.tensors("hidden", hidden, ndim=2)
    heads = _checks.tensors("head_logits", head_logits, ndim=2)
    _checks.flag("multi_label", multi_label)
    if len(hidden) != len(heads):
        raise ValueError(f"head_logits must hold one tensor per hidden ({len(hidden)}), got {len(heads)}")
    for index, (h, logits) in enumerate(zip(hidden, heads, strict=True)):
        if logits.shape != heads[0].shape:
            raise ValueError(f"head_logits[{index}] must have shape {tuple(heads[0].shape)}, got {tuple(logits.shape)}")
        if h.shape[0] != logits.shape[0]:
            raise ValueError(f"hidden[{index}] must have a batch of {logits.shape[0]}, got {h.shape[0]}")
    if not all(logits.requires_grad and h.requires_grad for h, logits in zip(hidden, heads, strict=True)):
        raise ValueError("hidden and head_logits must carry a graph; run the forward pass without no_grad")
    batch, num_classes = heads[0].shape
    if multi_label:
        target = _checks.tensor("target", target, ndim=2, floating=False).to(heads[0].device)
        if target.shape != heads[0].shape:
            raise ValueError(f"target must have shape {tuple(heads[0].shape)}, got {tuple(target.shape)}")
    else:
        target = _checks.class_indices("target", target, batch=batch, num_classes=num_classes, device=heads[0].device)
        if target.ndim != 1:
            raise ValueError(f"target must have shape ({batch},), got {tuple(target.shape)}")
    own: list[Tensor] = []  # d_l, of each head with respect to its own h
    passed: list[Tensor] = []  # e_l, of head l + 1 with respect to h_l
    for index, logits in enumerate(heads):
        wanted = hidden[max(index - 1, 0) : index + 1]
        gradients = torch.autograd.grad(
            logits,
            wanted,
            _loss_slope(logits.detach(), target, multi_label=multi_label).to(logits.dtype),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        own.append(gradients[-1])
        if index > 0:
            passed.append(gradients[0])
    if not passed:
        return heads[0].new_zeros(batch, 0)
    return torch.stack([_cosine(d, e) for d, e in zip(own, passed, strict=False)], dim=1)


def _loss_slope(logits: Tensor, target: Tensor, *, multi_label: bool) -> Tensor:
    """d loss / d logits of each sample up to a positive factor, which a cosine does not see: (B, K).

    The factor is what makes confident heads work. The slope of a cross-entropy is (1 - p_y) (q - e_y), q the softmax
    without class y; where p_y rounds to 1 the product is lost, or worse, only its entry y is, and q - e_y is neither.
    """
    logits = logits.to(compute_dtype(logits.dtype))
    if multi_label:
        labels = target.to(logits.dtype)
        up, down = F.logsigmoid(logits), F.logsigmoid(-logits)  # log p and log (1 - p)
        absent = -torch.finfo(logits.dtype).max
        largest = torch.maximum(up.masked_fill(labels == 1, absent), down.masked_fill(labels == 0, absent))
        largest = largest.amax(dim=1, keepdim=True)
        # p - y = (1 - y) p - y (1 - p)
        return (1 - labels) * (up - largest).clamp(max=0).exp() - labels * (down - largest).clamp(max=0).exp()
    if logits.shape[1] == 1:
        return torch.zeros_like(logits)
    chosen = F.one_hot(target, logits.shape[1]).to(torch.bool)
    return logits.masked_fill(chosen, -torch.inf).softmax(dim=1).masked_fill(chosen, -1)


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    return (_unit(first) * _unit(second)).sum(dim=1).clamp(-1, 1)


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; zeros stay. A confident head's gradient is so small that its squares would underflow."""
    tiny = torch.finfo(rows.dtype).tiny
    scaled: Tensor = rows / rows.abs().amax(dim=1, keepdim=True).clamp(min=tiny)
    length: Tensor = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled / length.clamp(min=tiny)

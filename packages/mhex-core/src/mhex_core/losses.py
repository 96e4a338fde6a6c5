"""Deep supervision: one loss over the logits of all heads.

Letters: B batch, K classes, L heads, shallow to deep.
Source: Sun and Liò, "Multi-Head Explainer" (arXiv 2501.01311), training objectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhex_core import _checks

Objective = Literal["layerwise", "joint"]
Reduction = Literal["mean", "sum", "none"]


def _check_heads(head_logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
    heads = _checks.tensors("head_logits", head_logits, ndim=2)
    for index, logits in enumerate(heads):
        if logits.shape != heads[0].shape:
            raise ValueError(
                f"head_logits[{index}] must have the first head's shape {tuple(heads[0].shape)}, "
                f"got {tuple(logits.shape)}"
            )
    return heads


def joint_logits(head_logits: Sequence[Tensor], *, decay: float = 0.8) -> Tensor:
    """s_L of the running sum s_l = logits_l + decay * s_{l-1}, that is sum_l decay^(L - l) logits_l: (B, K)."""
    heads = _check_heads(head_logits)
    decay = _checks.number("decay", decay, low=0, high=1)
    total = heads[0]
    for logits in heads[1:]:
        total = logits + decay * total
    return total


class DeepSupervisionLoss(nn.Module):
    """Loss over the heads of a network, and the prediction that belongs to it.

    "layerwise" (fine-tuning for explanation): sum_l w_l CE(logits_l, y); the prediction is the last head's.
    "joint" (training for accuracy): CE(s_L, y) with s_l = logits_l + decay * s_{l-1}; the prediction is s_L.

    Args:
        mode: "layerwise" or "joint".
        decay: Of the running sum; "joint" only.
        head_weights: w_l, one non-negative number per head; None means 1 for each. "layerwise" only.
        label_smoothing: In [0, 1], as in `torch.nn.CrossEntropyLoss`; for multi-label targets y becomes
            y (1 - s) + s / 2.
        weight: (K,), weight of each class, as in `torch.nn.CrossEntropyLoss` and `torch.nn.BCEWithLogitsLoss`.
        pos_weight: (K,), weight of the positive entries, multi-label only, as in `torch.nn.BCEWithLogitsLoss`.
        multi_label: Whether targets are (B, K) independent yes/no labels (binary cross-entropy) instead of (B,) class
            indices or (B, K) class probabilities (cross-entropy).
        reduction: "mean", "sum" or "none", over samples; heads are always added up.
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        mode: Objective = "layerwise",
        decay: float = 0.8,
        head_weights: Sequence[float] | Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        multi_label: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.mode: Objective = _checks.choice("mode", mode, ("layerwise", "joint"))
        self.decay = _checks.number("decay", decay, low=0, high=1)
        self.head_weights = None if head_weights is None else _checks.numbers("head_weights", head_weights, low=0)
        if mode == "joint" and head_weights is not None:
            raise ValueError("head_weights belong to mode='layerwise'; mode='joint' weighs heads by decay")
        self.label_smoothing = _checks.number("label_smoothing", label_smoothing, low=0, high=1)
        self.multi_label = _checks.flag("multi_label", multi_label)
        if pos_weight is not None and not multi_label:
            raise ValueError("pos_weight belongs to multi_label=True; use weight for single-label targets")
        self.reduction: Reduction = _checks.choice("reduction", reduction, ("mean", "sum", "none"))
        for name, value in (("weight", weight), ("pos_weight", pos_weight)):
            self.register_buffer(name, None if value is None else _checks.tensor(name, value, ndim=1))

    def forward(self, head_logits: Sequence[Tensor], target: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            head_logits: L tensors (B, K), shallow to deep.
            target: (B,) class indices, (B, K) class probabilities, or with `multi_label` (B, K) labels in [0, 1].

        Returns:
            A scalar; with reduction "none" (B,), or (B, K) for multi-label.
        """
        if self.mode == "joint":
            return self._one(joint_logits(head_logits, decay=self.decay), target)
        heads = _check_heads(head_logits)
        weights = (1.0,) * len(heads) if self.head_weights is None else self.head_weights
        if len(weights) != len(heads):
            raise ValueError(f"head_weights must hold one number per head ({len(heads)}), got {len(weights)}")
        return torch.stack(
            [weight * self._one(logits, target) for weight, logits in zip(weights, heads, strict=True)]
        ).sum(dim=0)

    def prediction(self, head_logits: Sequence[Tensor]) -> Tensor:
        """The logits the network predicts with under this objective: (B, K)."""
        if self.mode == "joint":
            return joint_logits(head_logits, decay=self.decay)
        return _check_heads(head_logits)[-1]

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"mode={self.mode!r}, decay={self.decay}, head_weights={self.head_weights}, multi={self.multi_label}"

    def _one(self, logits: Tensor, target: Tensor) -> Tensor:
        if not isinstance(target, Tensor):
            raise TypeError(f"target must be a torch.Tensor, got {type(target).__name__}")
        if self.multi_label:
            if target.shape != logits.shape:
                raise ValueError(f"target must have shape {tuple(logits.shape)}, got {tuple(target.shape)}")
            labels = target.to(logits.dtype)
            if self.label_smoothing:
                labels = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
            return F.binary_cross_entropy_with_logits(
                logits, labels, weight=self.weight, pos_weight=self.pos_weight, reduction=self.reduction
            )
        return F.cross_entropy(
            logits, target, weight=self.weight, label_smoothing=self.label_smoothing, reduction=self.reduction
        )

"""The equivalent matrix of a block, the sharpness of its entries, and the weights that saliency uses.

Letters: K classes, C channels; M (K, C).
Source: Sun and Liò, "Multi-Head Explainer" (arXiv 2501.01311), equivalent matrix, salience sharpness and beta.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mhex_core import _checks
from mhex_core.options import SaliencyOptions, Sharpness

EPSILON = 1e-8


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 stays, everything narrower accumulates in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Turn autocast off where there is such a thing: the device "meta" knows none."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def equivalent_matrix(gate_weight: Tensor, head_weight: Tensor) -> Tensor:
    """M = W2 W1, the matrix the gate's and the head's layers amount to together.

    Args:
        gate_weight: W1, (C, C).
        head_weight: W2, (K, C).

    Returns:
        (K, C), in the weights' dtype.
    """
    gate_weight = _checks.tensor("gate_weight", gate_weight, ndim=2)
    head_weight = _checks.tensor("head_weight", head_weight, ndim=2)
    if gate_weight.shape[0] != gate_weight.shape[1] or head_weight.shape[1] != gate_weight.shape[0]:
        raise ValueError(
            f"gate_weight and head_weight must be (C, C) and (K, C), "
            f"got {tuple(gate_weight.shape)} and {tuple(head_weight.shape)}"
        )
    _checks.on_device("head_weight", head_weight, gate_weight, of="gate_weight")
    # Autocast would round M to half precision, and a sharpness near its threshold would flip.
    with without_autocast(gate_weight.device):
        return head_weight @ gate_weight


def salience_sharpness(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """How specific each channel is to each class, for positive and for negative evidence.

    SS+_{c,k} = M+_{c,k} / (sum_c' M+_{c',k} + 1e-8) with M+ = max(M, 0); SS- the same with |min(M, 0)|.

    Args:
        matrix: M, (K, C).

    Returns:
        (SS+, SS-), each (K, C) in [0, 1]. Where a channel has no entry of that sign, zeros.
    """
    matrix = _checks.tensor("matrix", matrix, ndim=2)
    wide = matrix.to(compute_dtype(matrix.dtype))  # float16 has no 1e-8
    positive = wide.clamp(min=0)
    negative = (-wide).clamp(min=0)
    return (
        (positive / (positive.sum(dim=0, keepdim=True) + EPSILON)).to(matrix.dtype),
        (negative / (negative.sum(dim=0, keepdim=True) + EPSILON)).to(matrix.dtype),
    )


def signed_weights(matrix: Tensor, options: SaliencyOptions) -> tuple[Tensor, Tensor]:
    """Split M into the positive part P and the negative part N that pass the sharpness rule, each (K, C).

    hard: P = M+ [SS+ >= tau_pos], N = M- [SS- >= tau_neg].  soft: P = M+ SS+^a, N = M- SS-^a.
    """
    sharp_positive, sharp_negative = salience_sharpness(matrix)
    positive, negative = matrix.clamp(min=0), matrix.clamp(max=0)
    if options.sharpness == "soft":
        return (
            _softened(positive, sharp_positive, options.exponent),
            _softened(negative, sharp_negative, options.exponent),
        )
    tau_pos = options.positive_threshold(num_classes=matrix.shape[0])
    return positive * (sharp_positive >= tau_pos), negative * (sharp_negative >= options.tau_neg)


def _softened(part: Tensor, sharpness: Tensor, exponent: float) -> Tensor:
    """Multiply by SS^a; the slope of SS^a at 0 is infinite for a < 1, and 0 times it would be a NaN in the gradient."""
    present = part != 0
    return torch.where(present, part * torch.where(present, sharpness, 1) ** exponent, 0)


def adjusted_weights(
    matrix: Tensor,
    *,
    beta: float = 0.0,
    tau_pos: float | None = None,
    tau_neg: float = 0.1,
    sharpness: Sharpness = "hard",
    exponent: float = 1.0,
) -> Tensor:
    """w = P + beta N: the weight of each channel in the map of each class.

    Args:
        matrix: M, (K, C).
        beta: How much negative evidence counts, in [0, 1]. beta = 1 with both thresholds 0 gives M back.
        tau_pos: Smallest positive sharpness that is kept; None means 1/K + 0.1 (0 for K = 1).
        tau_neg: Smallest negative sharpness that is kept.
        sharpness: "hard" keeps or drops a weight, "soft" multiplies it by its sharpness to the power `exponent`.
        exponent: a >= 0, for "soft" only.

    Returns:
        (K, C), in the dtype of `matrix`.
    """
    matrix = _checks.tensor("matrix", matrix, ndim=2)
    options = SaliencyOptions(beta=beta, tau_pos=tau_pos, tau_neg=tau_neg, sharpness=sharpness, exponent=exponent)
    positive, negative = signed_weights(matrix.to(compute_dtype(matrix.dtype)), options)
    return (positive + options.beta * negative).to(matrix.dtype)

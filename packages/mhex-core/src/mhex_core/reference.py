"""The saliency equations in plain torch: the oracle of every faster version, and what runs when there is none.

Clean in float64, differentiable, on any device. Arguments are taken as checked; `mhex_core.saliency` checks them.

Letters: B batch, n targets per sample, K classes, L layers, C_l channels, h_l x w_l layer size, H x W output size,
T tokens. A layer's positions are (h_l, w_l) for maps and (T,) for tokens.
Source: Sun and Liò, "Multi-Head Explainer" (arXiv 2501.01311), saliency equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mhex_core.matrix import compute_dtype, signed_weights, without_autocast
from mhex_core.options import SaliencyOptions


def signed_maps(
    activations: Sequence[Tensor], matrices: Sequence[Tensor], targets: Tensor | None, options: SaliencyOptions
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """cam+_l = sum_k P^l_{c,k} A_l(k, p) and cam-_l with N^l: what speaks for a class, and what against.

    Args:
        activations: A_l, (B, C_l, h_l, w_l) or (B, T, C_l).
        matrices: M_l, (K, C_l).
        targets: (B, n), or None for all K classes.
        options: The sharpness rule and `rectify` are read from here.

    Returns:
        L tensors (B, n, *positions) of each sign; n = K when `targets` is None.
    """
    positive, negative = [], []
    for activation, matrix in zip(activations, matrices, strict=True):
        dtype = compute_dtype(activation.dtype)
        with without_autocast(activation.device):
            signed = [part.to(dtype) for part in signed_weights(matrix.to(compute_dtype(matrix.dtype)), options)]
            seen = torch.relu(activation) if options.rectify else activation
            maps = [_weighted_sum(seen.to(dtype), part, targets) for part in signed]
        positive.append(maps[0])
        negative.append(maps[1])
    return tuple(positive), tuple(negative)


def _weighted_sum(activation: Tensor, weights: Tensor, targets: Tensor | None) -> Tensor:
    """sum_k w_{c,k} A(k, p) for the wanted classes: (B, n, *positions)."""
    positions = "t" if activation.ndim == 3 else "hw"
    layout = "btk" if activation.ndim == 3 else "bkhw"
    if targets is None:
        return torch.einsum(f"ck,{layout}->bc{positions}", weights, activation)
    return torch.einsum(f"bnk,{layout}->bn{positions}", weights[targets], activation)


def aggregate(
    positive: Sequence[Tensor],
    negative: Sequence[Tensor],
    *,
    beta: float,
    layer_weights: Sequence[float],
    size: tuple[int, int] | None,
) -> Tensor:
    """cam = sum_l lambda_l resize(cam+_l + beta cam-_l): (B, n, H, W), or (B, n, T) when `size` is None."""
    total: Tensor | None = None
    for plus, minus, weight in zip(positive, negative, layer_weights, strict=True):
        layer = plus + beta * minus
        if size is not None:
            layer = F.interpolate(layer, size=size, mode="bilinear", align_corners=False)
        total = weight * layer if total is None else total + weight * layer
    if total is None:
        raise ValueError("positive must hold at least one layer, got none")
    return total


def saliency(
    positive: Sequence[Tensor],
    negative: Sequence[Tensor],
    options: SaliencyOptions,
    layer_weights: Sequence[float],
    size: tuple[int, int],
) -> Tensor:
    """`aggregate`, with a floor and brought to [0, 1] if the options say so: (B, n, H, W)."""
    maps = aggregate(positive, negative, beta=options.beta, layer_weights=layer_weights, size=size)
    if options.floor:
        maps = above_floor(maps, options.floor)
    if not options.normalize:
        return maps
    return min_max(maps, magnitude(positive, negative, beta=options.beta, layer_weights=layer_weights))


def above_floor(maps: Tensor, quantile: float) -> Tensor:
    """ReLU(cam - q), q the quantile of each (H, W) map: what little lies everywhere goes.

    The quantile is a value of the map itself, the one at place floor(quantile (N - 1)) of N in ascending order.
    """
    if maps.numel() == 0:
        return maps
    flat = maps.flatten(-2)
    place = int(quantile * (flat.shape[-1] - 1)) + 1
    return torch.relu(flat - flat.kthvalue(place, dim=-1, keepdim=True).values).view_as(maps)


def magnitude(
    positive: Sequence[Tensor], negative: Sequence[Tensor], *, beta: float, layer_weights: Sequence[float]
) -> Tensor:
    """sum_l |lambda_l| (max |cam+_l| + beta max |cam-_l|): (B, n, 1, 1), the size of what is added up to a map."""
    total = torch.zeros((), dtype=positive[0].dtype, device=positive[0].device)
    for plus, minus, weight in zip(positive, negative, layer_weights, strict=True):
        extremes = [part.detach().abs().amax(dim=(-2, -1), keepdim=True) for part in (plus, minus)]
        total = total + abs(weight) * (extremes[0] + beta * extremes[1])
    return total


def min_max(maps: Tensor, size: Tensor) -> Tensor:
    """Bring each (H, W) map to [0, 1] by its own extremes; a constant map becomes zeros.

    Resizing a constant leaves differences of a few units in the last place. Stretched to [0, 1] they would look like a
    finding, so a range that rounding alone can produce counts as constant. How much that is follows from `size`, the
    `magnitude` of what was added up: layers may cancel, and their rounding does not.
    """
    if maps.numel() == 0:
        return maps
    return min_max_parts(maps, size).scaled


class MinMax(NamedTuple):
    """Maps brought to [0, 1], and what that took: each (.., 1, 1) but `scaled`."""

    scaled: Tensor
    low: Tensor
    high: Tensor
    spread: Tensor
    constant: Tensor


def min_max_parts(maps: Tensor, size: Tensor) -> MinMax:
    """`min_max` with its intermediate results; the spread of a constant map is given as 1."""
    low = maps.amin(dim=(-2, -1), keepdim=True)
    high = maps.amax(dim=(-2, -1), keepdim=True)
    constant = high - low <= 16 * torch.finfo(maps.dtype).eps * size
    spread = torch.where(constant, 1, high - low)
    scaled = torch.where(constant, torch.zeros_like(maps), (maps - low) / spread)
    return MinMax(scaled, low, high, spread, constant)

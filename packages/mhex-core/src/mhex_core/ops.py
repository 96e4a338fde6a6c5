"""The compiled operators as differentiable torch functions.

A raw operator (`torch.ops.mhex.*`) is forward only. Where a gradient is wanted, `_SignedMaps` and `_CombinedMaps` run
the operators forward and plain torch backward, so that gradients can be differentiated and mapped again. Arguments are
taken as checked; `mhex_core.saliency` checks them.

Letters: B batch, n targets per sample, K classes, L layers, C_l channels, h_l x w_l layer size, H x W output size,
T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mhex_core import _checks, reference
from mhex_core.matrix import compute_dtype, signed_weights
from mhex_core.options import SaliencyOptions
from mhex_core.plan import SaliencyPlan, prepare

Layers = tuple[Tensor, ...]


# ------------------------------------------------------------------------------------------------------ what is called


def saliency_maps(
    activations: Sequence[Tensor],
    matrices: Sequence[Tensor],
    targets: Tensor | None,
    options: SaliencyOptions,
    size: tuple[int, int],
) -> Tensor:
    """(B, n, H, W), in one launch unless a gradient is wanted."""
    if _wants_gradient(activations, matrices):
        return combine_maps(*signed_maps(activations, matrices, targets, options), options, size)
    result: Tensor = torch.ops.mhex.saliency_maps(
        list(activations),
        *_prepared(matrices, activations),
        targets,
        *_rule(options, matrices),
        options.rectify,
        options.beta,
        list(options.weights_of(len(activations))),
        *size,
        options.normalize,
    )
    return result


def signed_maps(
    activations: Sequence[Tensor], matrices: Sequence[Tensor], targets: Tensor | None, options: SaliencyOptions
) -> tuple[Layers, Layers]:
    """L tensors (B, n, h_l, w_l) of each sign."""
    count = len(activations)
    if _wants_gradient(activations, matrices):
        if options.rectify:
            activations = [torch.relu(layer) for layer in activations]
        parts = [
            tuple(part.to(compute_dtype(layer.dtype)) for part in signed_weights(_wide(matrix), options))
            for matrix, layer in zip(matrices, activations, strict=True)
        ]
        weights = [part for sign in (0, 1) for part in (layer[sign] for layer in parts)]
        maps = _SignedMaps.apply(targets, *activations, *weights)
    else:
        maps = torch.ops.mhex.signed_maps(
            list(activations), *_prepared(matrices, activations), targets, *_rule(options, matrices), options.rectify
        )
    return tuple(maps[:count]), tuple(maps[count:])


def combine_maps(positive: Layers, negative: Layers, options: SaliencyOptions, size: tuple[int, int]) -> Tensor:
    """(B, n, H, W)."""
    settings = (options.beta, options.weights_of(len(positive)), size, options.normalize)
    if _wants_gradient(positive, negative):
        result: Tensor = _CombinedMaps.apply(settings, *positive, *negative)
        return result
    return _combined(settings, positive, negative)


def token_saliency(
    activations: Sequence[Tensor],
    matrices: Sequence[Tensor],
    targets: Tensor | None,
    mask: Tensor | None,
    options: SaliencyOptions,
) -> Tensor:
    """(B, n, T)."""
    weights = options.weights_of(len(activations))
    if _wants_gradient(activations, matrices):
        # Tokens are the positions of a map one pixel wide.
        columns = [layer.transpose(1, 2).unsqueeze(-1) for layer in activations]
        maps = signed_maps(columns, matrices, targets, options)
        positive, negative = ([layer.squeeze(-1) for layer in part] for part in maps)
        scores = reference.aggregate(positive, negative, beta=options.beta, layer_weights=weights, size=None)
        return scores if mask is None else scores.masked_fill(~mask.unsqueeze(1), 0.0)
    result: Tensor = torch.ops.mhex.token_saliency(
        list(activations),
        *_prepared(matrices, activations),
        targets,
        mask,
        *_rule(options, matrices),
        options.beta,
        list(weights),
    )
    return result


def _wants_gradient(*groups: Sequence[Tensor]) -> bool:
    tensors = [tensor for group in groups for tensor in group]
    # What torch.func has wrapped may need a gradient further out than it says itself.
    if not torch.compiler.is_compiling() and any(map(_checks.is_transformed, tensors)):
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _prepared(matrices: Sequence[Tensor], activations: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices and sums in the activations' accumulation dtype, from the plan if there is one that fits."""
    if isinstance(matrices, SaliencyPlan) and all(
        matrix.dtype == compute_dtype(layer.dtype) for matrix, layer in zip(matrices, activations, strict=True)
    ):
        return list(matrices.matrices), list(matrices.sums)
    wide, sums = prepare(matrices, [layer.dtype for layer in activations])
    return list(wide), list(sums)


def _wide(matrix: Tensor) -> Tensor:
    return matrix.to(compute_dtype(matrix.dtype))


def _rule(options: SaliencyOptions, matrices: Sequence[Tensor]) -> tuple[float, float, bool, float]:
    tau_pos = options.positive_threshold(num_classes=matrices[0].shape[0])
    return tau_pos, options.tau_neg, options.sharpness == "soft", options.exponent


_KEEP_ALL = (0.0, 0.0, False, 1.0)  # the rule under which a matrix is taken as the weights themselves


# ----------------------------------------------------------------------------------------------------------- gradients


class _SignedMaps(torch.autograd.Function):
    """Activations and signed weights P, N (K, C_l) -> maps. cam is linear in both, so are its gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(targets: Tensor | None, *tensors: Tensor) -> Layers:
        count = len(tensors) // 3
        activations, positive, negative = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        # An entry of M has one sign, so P + N holds both; sharpness is dealt with, and any sums will do.
        weights = [plus + minus for plus, minus in zip(positive, negative, strict=True)]
        sums = [torch.zeros_like(weight[:1]).expand(2, -1).contiguous() for weight in weights]
        return tuple(torch.ops.mhex.signed_maps(list(activations), weights, sums, targets, *_KEEP_ALL, False))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004 torch calls it by name
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        targets, *tensors = ctx.saved_tensors
        count = len(tensors) // 3
        for_activations: list[Tensor | None] = []
        for_weights: list[Tensor | None] = [None] * (2 * count)
        for index, activation in enumerate(tensors[:count]):
            wide = activation.to(compute_dtype(activation.dtype))
            total = None
            for sign in (0, 1):
                gradient = gradients[sign * count + index]
                if ctx.needs_input_grad[1 + index]:
                    weights = tensors[(1 + sign) * count + index]
                    part = (
                        torch.einsum("bchw,ck->bkhw", gradient, weights)
                        if targets is None
                        else torch.einsum("bnhw,bnk->bkhw", gradient, _chosen(weights, targets))
                    )
                    total = part if total is None else total + part
                if ctx.needs_input_grad[1 + (1 + sign) * count + index]:
                    for_weights[sign * count + index] = _weight_gradient(
                        gradient, wide, targets, tensors[(1 + sign) * count + index].shape[0]
                    )
            for_activations.append(None if total is None else total.to(activation.dtype))
        return None, *for_activations, *for_weights


def _one_hot(targets: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """(B, n, K). A product with it is deterministic on every device; adding up by index is not."""
    return (targets.unsqueeze(-1) == torch.arange(num_classes, device=targets.device)).to(dtype)


def _chosen(weights: Tensor, targets: Tensor) -> Tensor:
    """Rows of (K, C) by (B, n): (B, n, C)."""
    return _one_hot(targets, weights.shape[0], weights.dtype) @ weights


def _weight_gradient(gradient: Tensor, activation: Tensor, targets: Tensor | None, num_classes: int) -> Tensor:
    """(K, C)."""
    by_target = torch.einsum("bnhw,bkhw->bnk", gradient, activation)
    if targets is None:
        return by_target.sum(dim=0)
    return torch.einsum("bnc,bnk->ck", _one_hot(targets, num_classes, gradient.dtype), by_target)


class _CombinedMaps(torch.autograd.Function):
    """Signed maps -> saliency: linear up to the min-max, whose extremes share a gradient evenly where they tie."""

    generate_vmap_rule = True

    @staticmethod
    def forward(settings: tuple[Any, ...], *tensors: Tensor) -> Tensor:
        count = len(tensors) // 2
        return _combined(settings, tensors[:count], tensors[count:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004 torch calls it by name
        ctx.settings = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        beta, layer_weights, size, normalize = ctx.settings
        saved = ctx.saved_tensors
        count = len(saved) // 2
        positive, negative = saved[:count], saved[count:]
        if normalize:
            gradient = _through_min_max(gradient, positive, negative, ctx.settings)
        results: list[Tensor] = []
        for layer, weight in zip(positive, layer_weights, strict=True):
            rows = _axis(layer.shape[-2], size[0], layer)
            columns = _axis(layer.shape[-1], size[1], layer)
            results.append(weight * (rows.T @ gradient @ columns))
        return None, *results, *(beta * result for result in results)


def _combined(settings: tuple[Any, ...], positive: Sequence[Tensor], negative: Sequence[Tensor]) -> Tensor:
    beta, layer_weights, size, normalize = settings
    result: Tensor = torch.ops.mhex.combine_maps(
        list(positive), list(negative), beta, list(layer_weights), *size, normalize
    )
    return result


def _through_min_max(gradient: Tensor, positive: Layers, negative: Layers, settings: tuple[Any, ...]) -> Tensor:
    """The gradient with respect to cam, of (cam - low) / (high - low)."""
    beta, layer_weights, size, _ = settings
    cam = reference.aggregate(positive, negative, beta=beta, layer_weights=layer_weights, size=size)
    scaled, low, high, spread, constant = reference.min_max_parts(
        cam, reference.magnitude(positive, negative, beta=beta, layer_weights=layer_weights)
    )
    inner = torch.where(constant, torch.zeros_like(gradient), gradient / spread)
    for_spread = -(inner * scaled).sum(dim=(-2, -1), keepdim=True)
    for_low = -inner.sum(dim=(-2, -1), keepdim=True) - for_spread
    at_high, at_low = (cam == high).to(cam.dtype), (cam == low).to(cam.dtype)
    return (
        inner
        + for_spread * at_high / at_high.sum(dim=(-2, -1), keepdim=True)
        + for_low * at_low / at_low.sum(dim=(-2, -1), keepdim=True)
    )


def _axis(cells: int, size: int, like: Tensor) -> Tensor:
    """Bilinear resizing along one axis as a matrix (size, cells); align_corners is off."""
    place = (torch.arange(size, dtype=torch.float64, device=like.device) + 0.5) * (cells / size) - 0.5
    place = place.clamp(min=0)
    before = place.floor().clamp(max=cells - 1)
    fraction = (place - before).unsqueeze(1)
    cell = torch.arange(cells, device=like.device)
    after = (before + 1).clamp(max=cells - 1)
    matrix = (1 - fraction) * (cell == before.unsqueeze(1)) + fraction * (cell == after.unsqueeze(1))
    return matrix.to(like.dtype)

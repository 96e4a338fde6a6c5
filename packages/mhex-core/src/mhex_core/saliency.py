"""Saliency maps and token scores from activations and equivalent matrices.

Letters: B batch, n targets per sample, K classes, L layers, C_l channels, h_l x w_l layer size, H x W output size,
T tokens.
Source: Sun and Liò, "Multi-Head Explainer" (arXiv 2501.01311), saliency equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mhex_core import _checks, native, ops, reference
from mhex_core.options import SaliencyOptions, Sharpness
from mhex_core.plan import SaliencyPlan

Target = int | Tensor | Literal["all"]


class SignedMaps(NamedTuple):
    """Per-layer evidence before beta, the layer weights and the min-max; everything after is linear in those.

    Attributes:
        positive: L tensors (B, h_l, w_l) for one target per sample, else (B, n, h_l, w_l); (.., T) for tokens.
        negative: The same for negative evidence; values carry their sign.
    """

    positive: tuple[Tensor, ...]
    negative: tuple[Tensor, ...]


def saliency_maps(
    activations: Sequence[Tensor],
    matrices: Sequence[Tensor],
    target: Target,
    *,
    size: int | tuple[int, int],
    beta: float = 0.0,
    tau_pos: float | None = None,
    tau_neg: float = 0.1,
    sharpness: Sharpness = "hard",
    exponent: float = 1.0,
    layer_weights: Sequence[float] | Tensor | None = None,
    decay: float = 0.9,
    normalize: bool = True,
    floor: float = 0.0,
    rectify: bool = True,
    backend: native.Backend = "auto",
) -> Tensor:
    """Class-specific saliency maps of a batch.

    cam = sum_l lambda_l resize(sum_k w^l_{c,k} ReLU(A_l(k, .))), then (cam - min) / (max - min) for each map. The paper
    has A_l in place of its ReLU: `rectify=False`.

    Args:
        activations: A_l, L tensors (B, C_l, h_l, w_l), shallow to deep.
        matrices: M_l, L tensors (K, C_l), or a `SaliencyPlan` of them.
        target: Class indices: (B,), (B, n), one int for the whole batch, or "all".
        size: (H, W) of the maps in pixels, or one int for a square.
        beta: How much negative evidence counts, in [0, 1].
        tau_pos: Smallest positive sharpness that is kept; None means 1/K + 0.1 (0 for K = 1).
        tau_neg: Smallest negative sharpness that is kept.
        sharpness: "hard" or "soft", see `adjusted_weights`.
        exponent: The power of a soft sharpness.
        layer_weights: lambda_l, L numbers; None means decay^(L - l).
        decay: See `layer_weights`.
        normalize: Whether each map is brought to [0, 1]; a constant map gives zeros.
        floor: A quantile of each map, in [0, 1): max(0, cam - quantile) takes the place of cam. 0 leaves maps as they
            are. It is not in the paper.
        rectify: Whether ReLU(A_l) is read, or, as in the paper, A_l.
        backend: "auto", "reference" or "native".

    Returns:
        (B, H, W) for one target per sample, else (B, n, H, W), n = K for "all". float64 for float64 activations,
        float32 for all narrower ones. A NaN in a channel that counts for a class is in its map. One in a channel of
        weight zero is not always: plain torch multiplies it and hands it on, kernels skip such channels, all of them or
        (where the channels of a position lie together) those that no neighbour needs. So look for NaN in activations
        and not in maps.

    Raises:
        TypeError: An argument is of another type than stated.
        ValueError: An argument's shape or value does not fit the others.
    """
    options = SaliencyOptions(
        beta=beta,
        tau_pos=tau_pos,
        tau_neg=tau_neg,
        sharpness=sharpness,
        exponent=exponent,
        layer_weights=layer_weights,
        decay=decay,
        normalize=normalize,
        floor=floor,
        rectify=rectify,
    )
    layers, checked = _check_layers(activations, matrices, ndim=4)
    height_width = _checks.size_2d("size", size)
    weights = options.weights_of(len(layers))
    chosen = native.resolve(backend, layers, beside=tuple(checked))
    targets, single = _check_target(target, layers[0], checked[0].shape[0], chosen)
    if chosen == "native" and not options.floor:
        saliency = ops.saliency_maps(layers, checked, targets, options, height_width)
    elif chosen == "native":
        saliency = _combined(*ops.signed_maps(layers, checked, targets, options), options, height_width)
    else:
        maps = reference.signed_maps(layers, checked, targets, options)
        saliency = reference.saliency(*maps, options, weights, height_width)
    return saliency.squeeze(1) if single else saliency


def signed_maps(
    activations: Sequence[Tensor],
    matrices: Sequence[Tensor],
    target: Target,
    *,
    options: SaliencyOptions | None = None,
    backend: native.Backend = "auto",
) -> SignedMaps:
    """The layers' positive and negative evidence, kept apart and at the layers' own resolution.

    Args:
        activations: A_l, L tensors (B, C_l, h_l, w_l).
        matrices: M_l, L tensors (K, C_l).
        target: As in `saliency_maps`.
        options: Only the sharpness rule and `rectify` are read.
        backend: "auto", "reference" or "native".

    Returns:
        `SignedMaps`, which `combine_maps` turns into saliency for any beta and layer weights.
    """
    options = _check_options(options)
    layers, matrices = _check_layers(activations, matrices, ndim=4)
    chosen = native.resolve(backend, layers, beside=tuple(matrices))
    targets, single = _check_target(target, layers[0], matrices[0].shape[0], chosen)
    run = ops.signed_maps if chosen == "native" else reference.signed_maps
    return _squeeze(run(layers, matrices, targets, options), single=single)


def combine_maps(
    maps: SignedMaps,
    *,
    size: int | tuple[int, int],
    options: SaliencyOptions | None = None,
    backend: native.Backend = "auto",
) -> Tensor:
    """Add up layers: the second half of `saliency_maps`, cheap enough to repeat for every beta.

    Args:
        maps: From `signed_maps`.
        size: (H, W) in pixels, or one int for a square.
        options: beta, the layer weights, `normalize` and `floor` are read.
        backend: "auto", "reference" or "native".

    Returns:
        (B, H, W) or (B, n, H, W), as the maps have it.
    """
    options = _check_options(options)
    if not isinstance(maps, SignedMaps):
        raise TypeError(f"maps must be SignedMaps, got {type(maps).__name__}")
    check_maps(maps.positive, maps.negative, of="maps.")
    height_width = _checks.size_2d("size", size)
    single = maps.positive[0].ndim == 3
    positive, negative = ([layer.unsqueeze(1) if single else layer for layer in part] for part in maps)
    weights = options.weights_of(len(positive))
    if native.resolve(backend, (*positive, *negative), half=False) == "native":
        saliency = _combined(tuple(positive), tuple(negative), options, height_width)
    else:
        saliency = reference.saliency(positive, negative, options, weights, height_width)
    return saliency.squeeze(1) if single else saliency


def token_saliency(
    activations: Sequence[Tensor],
    matrices: Sequence[Tensor],
    target: Target,
    *,
    mask: Tensor | None = None,
    layers: int | Sequence[int] | Literal["all"] = 3,
    beta: float = 0.0,
    tau_pos: float | None = None,
    tau_neg: float = 0.1,
    sharpness: Sharpness = "hard",
    exponent: float = 1.0,
    layer_weights: Sequence[float] | Tensor | None = None,
    decay: float = 1.0,
    backend: native.Backend = "auto",
) -> Tensor:
    """Score per token: score(t) = sum_l lambda_l sum_k w^l_{c,k} A_l(t, k).

    Args:
        activations: A_l, L tensors (B, T, C_l), shallow to deep.
        matrices: M_l, L tensors (K, C_l).
        target: As in `saliency_maps`.
        mask: (B, T), true (or 1) for the tokens that carry a score; padding and special tokens are false and get 0.
        layers: How many of the first layers are added up (later ones over-smooth), or their indices, or "all".
        beta: As in `saliency_maps`.
        tau_pos: As in `saliency_maps`.
        tau_neg: As in `saliency_maps`.
        sharpness: As in `saliency_maps`.
        exponent: As in `saliency_maps`.
        layer_weights: One number for each layer that is added up.
        decay: As in `saliency_maps`, but 1 unless given: the first layers count alike.
        backend: "auto", "reference" or "native".

    Returns:
        (B, T) for one target per sample, else (B, n, T): signed scores in the units of the heads' logits.

    Raises:
        TypeError: An argument is of another type than stated.
        ValueError: An argument's shape or value does not fit the others.
    """
    options = SaliencyOptions(
        beta=beta,
        tau_pos=tau_pos,
        tau_neg=tau_neg,
        sharpness=sharpness,
        exponent=exponent,
        layer_weights=layer_weights,
        decay=decay,
        normalize=False,
        rectify=False,
    )
    checked, checked_matrices = _check_layers(activations, matrices, ndim=3)
    chosen = _checks.chosen_layers(layers, len(checked))
    batch, tokens = checked[0].shape[:2]
    if any(layer.shape[1] != tokens for layer in checked):
        raise ValueError(f"activations must all have T = {tokens}, got {[layer.shape[1] for layer in checked]}")
    if mask is not None:
        mask = _checks.tensor("mask", mask, ndim=2, floating=False)
        if mask.shape != (batch, tokens):
            raise ValueError(f"mask must have shape ({batch}, {tokens}), got {tuple(mask.shape)}")
        mask = _checks.moved("mask", mask, checked[0].device, torch.bool)
    used = tuple(checked[index] for index in chosen)
    used_matrices = (
        checked_matrices.chosen(chosen)
        if isinstance(checked_matrices, SaliencyPlan)
        else tuple(checked_matrices[index] for index in chosen)
    )
    weights = options.weights_of(len(chosen))
    run = native.resolve(backend, used, beside=tuple(used_matrices))
    targets, single = _check_target(target, checked[0], checked_matrices[0].shape[0], run)
    if run == "native":
        scores = ops.token_saliency(used, used_matrices, targets, mask, options)
    else:
        positive, negative = reference.signed_maps(used, used_matrices, targets, options)
        scores = reference.aggregate(positive, negative, beta=options.beta, layer_weights=weights, size=None)
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(1), 0.0)
    return scores.squeeze(1) if single else scores


def check_maps(positive: Sequence[Tensor], negative: Sequence[Tensor], *, of: str = "") -> None:
    """Raise unless these can be what `SignedMaps` holds; `of` stands before their names in messages."""
    for name, part in (("positive", positive), ("negative", negative)):
        _checks.tensors(f"{of}{name}", part, ndim=(3, 4))
    if [layer.shape for layer in positive] != [layer.shape for layer in negative]:
        raise ValueError(f"{of}negative must have the shapes of {of}positive, layer by layer")
    first = positive[0]
    wanted = ", ".join(map(str, first.shape[:-2]))
    for name, part in (("positive", positive), ("negative", negative)):
        for index, layer in enumerate(part):
            if layer.shape[:-2] != first.shape[:-2] or 0 in layer.shape[-2:]:
                raise ValueError(
                    f"{of}{name}[{index}] must have shape ({wanted}, h, w), h and w at least 1, "
                    f"got {tuple(layer.shape)}"
                )
            _checks.on_device(f"{of}{name}[{index}]", layer, first, of=f"{of}positive[0]")


def _check_layers(
    activations: Sequence[Tensor], matrices: Sequence[Tensor], *, ndim: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | SaliencyPlan]:
    layers = _checks.tensors("activations", activations, ndim=ndim)
    checked = matrices if isinstance(matrices, SaliencyPlan) else _checks.tensors("matrices", matrices, ndim=2)
    if len(layers) != len(checked):
        raise ValueError(f"matrices must hold one matrix per activation ({len(layers)}), got {len(checked)}")
    batch, num_classes = layers[0].shape[0], checked[0].shape[0]
    if num_classes < 1:
        raise ValueError(f"matrices[0] must have at least one class, got shape {tuple(checked[0].shape)}")
    for index, (layer, matrix) in enumerate(zip(layers, checked, strict=True)):
        channels = layer.shape[1 if ndim == 4 else 2]
        if matrix.shape != (num_classes, channels):
            raise ValueError(
                f"matrices[{index}] must have shape ({num_classes}, {channels}) to fit activations[{index}], "
                f"got {tuple(matrix.shape)}"
            )
        _checks.on_device(f"matrices[{index}]", matrix, layer, of=f"activations[{index}]")
        if layer.shape[0] != batch:
            raise ValueError(f"activations[{index}] must have a batch of {batch}, got {layer.shape[0]}")
        if ndim == 4 and 0 in layer.shape[2:]:
            raise ValueError(f"activations[{index}] must have at least one position, got {tuple(layer.shape)}")
    return layers, checked


def _check_options(options: SaliencyOptions | None) -> SaliencyOptions:
    if options is None:
        return SaliencyOptions()
    if not isinstance(options, SaliencyOptions):
        raise TypeError(f"options must be SaliencyOptions, got {type(options).__name__}")
    return options


def _check_target(target: Target, like: Tensor, num_classes: int, run: str) -> tuple[Tensor | None, bool]:
    """Return targets (B, n) or None for all, and whether there is one target per sample and no target axis.

    Looking at values on an accelerator waits for it. Kernels there need no such look: a map of a class that does not
    exist comes out as NaN.
    """
    if isinstance(target, str):
        _checks.choice("target", target, ("all",))
        return None, False
    indices = _checks.class_indices(
        "target",
        target,
        batch=like.shape[0],
        num_classes=num_classes,
        device=like.device,
        look=run == "reference" or like.device.type == "cpu",
    )
    return (indices.unsqueeze(1), True) if indices.ndim == 1 else (indices, False)


def _combined(
    positive: tuple[Tensor, ...], negative: tuple[Tensor, ...], options: SaliencyOptions, size: tuple[int, int]
) -> Tensor:
    """Compiled `combine_maps`, with the floor, which the kernels do not know, between the sum and the min-max."""
    if not options.floor:
        return ops.combine_maps(positive, negative, options, size)
    maps = reference.above_floor(
        ops.combine_maps(positive, negative, replace(options, normalize=False), size), options.floor
    )
    if not options.normalize:
        return maps
    weights = options.weights_of(len(positive))
    return reference.min_max(maps, reference.magnitude(positive, negative, beta=options.beta, layer_weights=weights))


def _squeeze(maps: tuple[tuple[Tensor, ...], tuple[Tensor, ...]], *, single: bool) -> SignedMaps:
    if not single:
        return SignedMaps(*maps)
    return SignedMaps(*(tuple(layer.squeeze(1) for layer in part) for part in maps))

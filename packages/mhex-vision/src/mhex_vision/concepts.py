"""Concepts in vision transformers: what a class rests on, layer by layer, and where in an image.

A concept is a set of images that show it. Scores compare the class's gradient with the direction in which a layer tells
the concept's images from others, weighed by the attention that the token which is read pays to each patch.

Letters: B batch, N images of a concept, n tokens, C channels, E width of what the classifier reads, L blocks, H x W
image size.
Sources: T-TCAV, Eggen, Lysnaes-Larsen and Strumke (arXiv 2508.08966); mean embeddings, CDAM, Brocki, Binda and Chung
(arXiv 2312.02364).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhex_core import _checks
from mhex_core.concept_report import ConceptReport, ConceptSamples, concept_report
from mhex_core.concepts import concept_derivatives
from mhex_vision.explainers.attention import UPSAMPLING, Upsampling, observed, read_out, to_pixels
from mhex_vision.explainers.view import wide
from mhex_vision.vit import Captured, capture


def mean_embedding(model: nn.Module, images: Tensor, *, batch_size: int = 64) -> Tensor:
    """What the classifier reads of each image, averaged: a latent that concept CDAM can explain.

    Args:
        model: A vision transformer with a classifier of its own.
        images: Normalised, (N, 3, H, W).
        batch_size: Images at a time.

    Returns:
        (E,), float32 or wider, detached.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The model is no such network, or there is no image.
    """
    sums = []
    for seen in _passes(model, images, batch_size):
        if seen.features is None:
            raise ValueError("model must have a classifier of its own, got one whose network's classifier was dropped")
        sums.append(wide(seen.features.detach()).sum(dim=0))
    return torch.stack(sums).sum(dim=0) / len(images)


def folder_embedding(model: nn.Module, folder: Path, *, batch_size: int = 64) -> Tensor:
    """`mean_embedding` of the images in a folder, prepared as the model's images are.

    Raises:
        FileNotFoundError: The folder holds no image.
        ValueError: It is not known how the model's images are prepared, or an image cannot be read.
    """
    preprocessing = getattr(getattr(model, "config", None), "preprocessing", None)
    if preprocessing is None:
        raise ValueError(
            f"concept must be a tensor for {type(model).__name__}, which does not say how its images are prepared"
        )
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise FileNotFoundError(f"concept must be a folder of images, and {folder} holds none")
    device = next(model.parameters()).device
    images = torch.stack([preprocessing.load(path) for path in files])
    return mean_embedding(model, preprocessing.normalize(images.to(device)), batch_size=batch_size)


def concept_samples(
    model: nn.Module, images: Tensor, *, layers: Sequence[int] | None = None, batch_size: int = 64
) -> ConceptSamples:
    """The activations of a concept's images.

    Args:
        model: A vision transformer.
        images: Normalised, (N, 3, H, W).
        layers: Indices of blocks; None means all but the last.
        batch_size: Images at a time.

    Returns:
        What the blocks hand on, (N, n, C) each, on the CPU.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The model is no such network, or has no such block.
    """
    parts: list[list[Tensor]] = []
    for seen in _passes(model, images, batch_size):
        chosen = _layers(layers, len(seen.outputs))
        parts.append([wide(seen.outputs[index].detach()).cpu() for index in chosen])
    return ConceptSamples(activations=tuple(torch.cat(layer) for layer in zip(*parts, strict=True)))


def concept_sensitivity(
    model: nn.Module,
    concepts: Mapping[str, Tensor],
    images: Tensor,
    target: int,
    *,
    random: Tensor | None = None,
    layers: Sequence[int] | None = None,
    runs: int = 50,
    held_out: float = 0.33,
    seed: int = 0,
    batch_size: int = 32,
) -> ConceptReport:
    """T-TCAV: for which concepts, and at which blocks, does the class's logit grow towards the concept?

    Args:
        model: A vision transformer.
        concepts: Normalised images (N, 3, H, W) by the concept's name, none of which is among `images`.
        images: Normalised images of the class, (B, 3, H, W).
        target: The class.
        random: Images of no concept in particular, which concepts are told from; None means the other concepts' images.
        layers: Indices of blocks; None means all but the last, whose output has a gradient only where it is read.
        runs: Vectors for each concept and block, and as many random concepts.
        held_out: The share of images that a vector's accuracy is measured on.
        seed: Of all draws.
        batch_size: Images at a time.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The model is no such network, or an argument does not fit.
        ImportError: scikit-learn is not installed.
    """
    if not isinstance(concepts, Mapping):
        raise TypeError(f"concepts must be images by name, got {type(concepts).__name__}")
    samples = {
        name: concept_samples(model, shown, layers=layers, batch_size=batch_size) for name, shown in concepts.items()
    }
    others = None if random is None else concept_samples(model, random, layers=layers, batch_size=batch_size)
    gradients: list[list[Tensor]] = []
    attention: list[list[Tensor]] = []
    names: list[str] = []
    for seen in _passes(model, images, batch_size, graph=True):
        chosen = _layers(layers, len(seen.outputs))
        names = [seen.block_names[index] for index in chosen]
        wanted = torch.full((len(seen.logits),), _class(target, seen), device=seen.logits.device)
        slopes = seen.gradients(wanted, [seen.outputs[index] for index in chosen])
        gradients.append([wide(slope).cpu() for slope in slopes])
        attention.append([_row(seen, index).cpu() for index in chosen])
    class_names: Sequence[str] = getattr(getattr(model, "config", None), "class_names", None) or ()
    return concept_report(
        samples,
        [torch.cat(layer) for layer in zip(*gradients, strict=True)],
        [torch.cat(layer) for layer in zip(*attention, strict=True)],
        layer_names=names,
        target=class_names[target] if class_names else f"class {target}",
        random=others,
        runs=runs,
        held_out=held_out,
        seed=seed,
    )


def concept_maps(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    vector: Tensor,
    *,
    layer: int,
    upsample: Upsampling = "bilinear",
) -> Tensor:
    """Where the class's logit grows towards a concept: the weighted derivative of each patch, signed.

    Args:
        model: A vision transformer.
        images: Normalised, (B, 3, H, W).
        targets: int64 (B,).
        vector: (C,), of unit length, such as a run's `ConceptReport.vectors[concept, layer].vectors[0]`.
        layer: Index of the block it was fitted at. At the last one patches have no gradient if a class token is read.
        upsample: "bilinear", or "nearest", every pixel of a patch alike.

    Returns:
        float32 (B, H, W).

    Raises:
        TypeError: An argument is of another type.
        ValueError: The model is no such network, has no such block, or the vector does not fit.
    """
    _checks.choice("upsample", upsample, UPSAMPLING)
    seen = observed(model, images, targets)
    (index,) = _layers([layer], len(seen.outputs))
    vector = _checks.tensor("vector", vector, ndim=1)
    if vector.shape[0] != seen.outputs[index].shape[2]:
        raise ValueError(f"vector must have shape ({seen.outputs[index].shape[2]},), got {tuple(vector.shape)}")
    (slope,) = seen.gradients(targets, [seen.outputs[index]])
    scores = concept_derivatives(wide(slope), _row(seen, index), vector.to(wide(slope)).unsqueeze(0))[:, 0]
    return to_pixels(seen.maps(scores), images, upsample=upsample)


def _passes(model: nn.Module, images: Any, batch_size: int, *, graph: bool = False) -> Iterator[Captured]:
    images = _checks.tensor("images", images, ndim=4)
    _checks.positive_int("batch_size", batch_size)
    if not len(images):
        raise ValueError(f"images must hold at least one image, got shape {tuple(images.shape)}")
    for part in images.split(batch_size):
        yield capture(model, part, graph=graph)


def _layers(layers: Sequence[int] | None, depth: int) -> list[int]:
    if layers is None:
        return list(range(max(depth - 1, 1)))
    return _checks.chosen_layers(layers, depth)


def _row(seen: Captured, index: int) -> Tensor:
    """What the token that is read attends to in one block, mean over heads: (B, n)."""
    return read_out(wide(seen.attentions[index].detach()).mean(dim=1), seen)


def _class(target: object, seen: Captured) -> int:
    if isinstance(target, bool) or not isinstance(target, int):
        raise TypeError(f"target must be an int, got {type(target).__name__}")
    if not 0 <= target < seen.logits.shape[1]:
        raise ValueError(f"target must lie in [0, {seen.logits.shape[1] - 1}], got {target}")
    return target

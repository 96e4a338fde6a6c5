"""Concepts in text classifiers: what a class rests on, layer by layer.

A concept is a set of texts that show it. Scores compare the class's gradient with the direction in which a layer tells
the concept's tokens from others, weighed by the attention that the token which is read pays to each.

Letters: B batch, N texts of a concept, T tokens, C channels, L layers that are run.
Sources: T-TCAV, Eggen, Lysnaes-Larsen and Strumke (arXiv 2508.08966); mean embeddings, CDAM, Brocki, Binda and Chung
(arXiv 2312.02364).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from mhex_core import _checks
from mhex_core.concept_report import ConceptReport, ConceptSamples, concept_report
from mhex_core.concepts import concept_derivatives
from mhex_text.batch import TokenBatch
from mhex_text.capture import Captured, capture
from mhex_text.explainers.attention import row_read
from mhex_text.explainers.interface import check, finished
from mhex_text.explainers.view import aligned, wanted, wide
from mhex_text.explaining import Texts, class_names, listed_texts, most_tokens, tokenizer_of


def mean_embedding(
    model: PreTrainedModel,
    texts: Texts,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    batch_size: int = 32,
) -> Tensor:
    """What the classifier reads of each text, averaged: a latent that concept CDAM can explain.

    Args:
        model: An `MHEXForSequenceClassification`, or another sequence classifier of transformers.
        texts: N texts, or N pairs.
        tokenizer: The model's own, a fast one; None loads the one that was saved beside the model.
        max_length: The most tokens of a text; None means as many as tokenizer and encoder take.
        batch_size: Texts at a time.

    Returns:
        (C,), float32 or wider, see `Captured.features`.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The model cannot be captured, or there is no text.
    """
    found = [wide(seen.features.detach()) for seen, _ in _passes(model, texts, tokenizer, max_length, batch_size)]
    return torch.cat(found).mean(dim=0)


def concept_samples(
    model: PreTrainedModel,
    texts: Texts,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    layers: Sequence[int] | None = None,
    batch_size: int = 32,
) -> ConceptSamples:
    """The activations of a concept's texts.

    Args:
        model: See `mean_embedding`.
        texts: N texts, or N pairs.
        tokenizer: See `mean_embedding`.
        max_length: See `mean_embedding`.
        layers: Indices of layers; None means all that are run but the last.
        batch_size: Texts at a time.

    Returns:
        What the layers hand on, (N, T, C) each, on the CPU; special tokens count as real.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The model cannot be captured, has no such layer, or there is no text.
    """
    parts: list[list[Tensor]] = []
    masks: list[Tensor] = []
    for seen, mask in _passes(model, texts, tokenizer, max_length, batch_size):
        chosen = _layers(layers, len(seen.outputs))
        parts.append([wide(seen.outputs[index].detach()).cpu() for index in chosen])
        masks.append(mask)
    activations = tuple(_joined(layer) for layer in zip(*parts, strict=True))
    return ConceptSamples(activations=activations, mask=_joined(masks))


def concept_sensitivity(
    model: PreTrainedModel,
    concepts: Mapping[str, Texts],
    texts: Texts,
    target: int,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    random: Texts | None = None,
    layers: Sequence[int] | None = None,
    runs: int = 50,
    held_out: float = 0.33,
    seed: int = 0,
    batch_size: int = 32,
) -> ConceptReport:
    """T-TCAV: for which concepts, and at which layers, does the class's logit grow towards the concept?

    Args:
        model: See `mean_embedding`.
        concepts: Texts by the concept's name, none of which is among `texts`.
        texts: Texts of the class, or pairs.
        target: The class.
        tokenizer: See `mean_embedding`.
        max_length: See `mean_embedding`.
        random: Texts of no concept in particular, which concepts are told from; None means the other concepts' texts.
        layers: Indices of layers; None means all that are run but the last, whose output has a gradient only where it
            is read.
        runs: Vectors for each concept and layer, and as many random concepts.
        held_out: The share of texts that a vector's accuracy is measured on.
        seed: Of all draws.
        batch_size: Texts at a time.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The model cannot be captured, or an argument does not fit.
        ImportError: scikit-learn is not installed.
    """
    if not isinstance(concepts, Mapping):
        raise TypeError(f"concepts must be texts by name, got {type(concepts).__name__}")
    reader: dict[str, Any] = {"tokenizer": tokenizer, "max_length": max_length, "batch_size": batch_size}
    samples = {name: concept_samples(model, shown, layers=layers, **reader) for name, shown in concepts.items()}
    others = None if random is None else concept_samples(model, random, layers=layers, **reader)
    gradients: list[list[Tensor]] = []
    attention: list[list[Tensor]] = []
    masks: list[Tensor] = []
    chosen: list[int] = []
    for seen, mask in _passes(model, texts, tokenizer, max_length, batch_size, graph=True):
        chosen = _layers(layers, len(seen.outputs))
        classes = _class(target, seen)
        gradients.append([wide(slope).cpu() for slope in seen.gradients(classes, [seen.outputs[i] for i in chosen])])
        attention.append([row_read(wide(seen.attentions[i].detach()).mean(dim=1), seen).cpu() for i in chosen])
        masks.append(mask)
    return concept_report(
        samples,
        [_joined(layer) for layer in zip(*gradients, strict=True)],
        [_joined(layer) for layer in zip(*attention, strict=True)],
        layer_names=[f"layer {index}" for index in chosen],
        target=class_names(model)[target],
        mask=_joined(masks),
        random=others,
        runs=runs,
        held_out=held_out,
        seed=seed,
    )


def concept_scores(model: PreTrainedModel, batch: TokenBatch, targets: Tensor, vector: Tensor, *, layer: int) -> Tensor:
    """Which tokens pull the class's logit towards a concept: the weighted derivative of each, signed.

    With vector and layer filled in by `functools.partial` it is an explainer, for `explain_by`, say.

    Args:
        model: See `mean_embedding`.
        batch: B texts.
        targets: int64 (B,).
        vector: (C,), of unit length, such as a run's `ConceptReport.vectors[concept, layer].vectors[0]`.
        layer: Index of the layer it was fitted at. At the last one only what is read has a gradient.

    Returns:
        float32 (B, T), zero outside `batch.mask`.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The model cannot be captured, has no such layer, or the vector does not fit.
    """
    check(model, batch, targets)
    vector = _checks.tensor("vector", vector, ndim=1)
    texts = aligned(model, batch)
    seen = capture(model, texts.inputs)
    (index,) = _layers([layer], len(seen.outputs))
    if vector.shape[0] != seen.outputs[index].shape[2]:
        raise ValueError(f"vector must have shape ({seen.outputs[index].shape[2]},), got {tuple(vector.shape)}")
    (slope,) = seen.gradients(wanted(targets, seen.logits), [seen.outputs[index]])
    row = row_read(wide(seen.attentions[index].detach()).mean(dim=1), seen)
    along = vector.detach().to(wide(slope)).unsqueeze(0)
    scores = concept_derivatives(wide(slope), row, along, mask=texts.batch.attention_mask)[:, 0]
    return finished("concept_scores", texts.back(scores), batch)


def _passes(
    model: PreTrainedModel,
    texts: Texts,
    tokenizer: Any,
    max_length: int | None,
    batch_size: int,
    *,
    graph: bool = False,
) -> Iterator[tuple[Captured, Tensor]]:
    """What each batch of texts shows, and which of its tokens are real, bool on the CPU."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a sequence classifier of transformers, got {type(model).__name__}")
    _checks.positive_int("batch_size", batch_size)
    listed = listed_texts("texts", texts)
    if not listed:
        raise ValueError("texts must hold at least one text, got none")
    reader = tokenizer_of(model) if tokenizer is None else tokenizer
    limit = most_tokens(model, reader, max_length)
    for start in range(0, len(listed), batch_size):
        batch = TokenBatch.make(listed[start : start + batch_size], reader, max_length=limit)
        view = aligned(model, batch)
        yield capture(model, view.inputs, graph=graph), view.batch.attention_mask.cpu() != 0


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Batches (B, T, ...) as one, the shorter ones padded with 0."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, 0) * (part.ndim - 2) + (0, longest - part.shape[1])) for part in parts])


def _layers(layers: Sequence[int] | None, depth: int) -> list[int]:
    if layers is None:
        return list(range(max(depth - 1, 1)))
    return _checks.chosen_layers(layers, depth)


def _class(target: object, seen: Captured) -> Tensor:
    if isinstance(target, bool) or not isinstance(target, int):
        raise TypeError(f"target must be an int, got {type(target).__name__}")
    batch, classes = seen.logits.shape
    return _checks.class_indices("target", target, batch=batch, num_classes=classes, device=seen.logits.device)

"""The same explanation by any method, of any text classifier.

Letters: B batch, T tokens, K classes, N texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mhex_core import _checks
from mhex_text.batch import TokenBatch
from mhex_text.capture import ungraded
from mhex_text.explainers import TextExplainer, explainer, parse
from mhex_text.explainers.interface import finished
from mhex_text.explainers.own import OwnScores
from mhex_text.explainers.view import aligned, all_logits, probabilities
from mhex_text.explaining import Texts, class_names, listed_texts, most_tokens, targets_of, tokenizer_of
from mhex_text.explanation import Explanation, TextExplanation
from mhex_text.modeling import MHEXForSequenceClassification
from mhex_text.progress import bar


def explain_by(
    model: PreTrainedModel,
    texts: Texts,
    method: str | TextExplainer,
    target: int | str | Sequence[int | str] | Tensor | None = None,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    batch_size: int = 32,
    name: str | None = None,
    progress: bool = False,
    **options: Any,
) -> Explanation:
    """Predict, and explain by a method of one's choice.

    The explanation has one layer, called as the method, and scores in the method's own sign and scale: what is above 0
    is evidence for the target, what is below against it, and beta is 1. What "mhex" gives is
    `MHEXForSequenceClassification.explain`'s, with its layers (unless it is told to rectify, which `explain` does not).

    Args:
        model: An `MHEXForSequenceClassification`, or another sequence classifier of transformers.
        texts: A text, N texts, or N pairs of texts.
        method: A name out of `explainers.EXPLAINERS`, with its options after a colon if there are none in `options`:
            "cdam", "cdam:mode=smooth,batch_size=16"; or an explainer.
        target: The class to explain, a number or a name: None for the predicted one, one for all, or one for each.
        tokenizer: The model's own, a fast one; None loads the one that was saved beside the model.
        max_length: The most tokens of a text; what is longer is cut, which the explanation says. None means as many as
            tokenizer and encoder take.
        batch_size: Texts at a time; those of like length go together. (A method's own `batch_size` stands after the
            colon of its name.)
        name: What the explanation calls the method; None means as it was asked for.
        progress: Whether a terminal shows a bar while there is more than one batch. Elsewhere there is none.
        **options: The method's.

    Returns:
        The explanation of each text, in their order.

    Raises:
        TypeError: An argument is of another type, or options come with an explainer that is made already.
        ValueError: The method or an option is unknown, an argument does not fit the model, or there is no tokenizer to
            be found.
        ImportError: The library that the method needs is not installed.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a sequence classifier of transformers, got {type(model).__name__}")
    _checks.positive_int("batch_size", batch_size)
    _checks.flag("progress", progress)
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    known_as, chosen = _chosen(method, options)
    if isinstance(chosen, OwnScores) and isinstance(model, MHEXForSequenceClassification) and not chosen.rectify:
        how = {"tokenizer": tokenizer, "max_length": max_length, "batch_size": batch_size, "progress": progress}
        return _own(model, texts, target, chosen, **how)
    listed = listed_texts("texts", texts)
    shared: dict[str, Any] = {
        "layer_names": (known_as if name is None else name,),
        "class_names": class_names(model),
        "beta": 1.0,
        "layers": "all",
    }
    if not listed:
        return Explanation.of_no_texts(**shared)
    reader = tokenizer_of(model) if tokenizer is None else tokenizer
    limit = most_tokens(model, reader, max_length)
    targets = targets_of(target, len(listed), class_names(model))
    # Texts of like length together: the less padding, the less to compute. Characters tell well enough.
    order = sorted(range(len(listed)), key=lambda index: -len("".join(listed[index])))
    found: dict[int, TextExplanation] = {}
    with bar(len(order), description=known_as, shown=progress and len(order) > batch_size) as shown:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            some = cast("list[str]", [listed[index] for index in part])
            batch = TokenBatch.make(some, reader, max_length=limit)
            made = _explained(model, batch, chosen, known_as, None if targets is None else targets[part], shared)
            found |= dict(zip(part, made, strict=True))
            shown.update(len(part))
    return Explanation(tuple(found[index] for index in range(len(listed))), found[0].settings)


def _explained(
    model: PreTrainedModel,
    batch: TokenBatch,
    method: TextExplainer,
    name: str,
    target: Tensor | None,
    shared: dict[str, Any],
) -> Explanation:
    chances, wanted, scores = scored(model, batch, method, name, target)
    return Explanation.from_evidence(
        cast("Sequence[str]", batch.texts),
        offsets=batch.offsets,
        word_ids=_named(batch.word_ids),
        sequence_ids=_named(torch.where(batch.mask, batch.sequence_ids, -1)),
        positive=[scores.clamp(min=0)],
        negative=[scores.clamp(max=0)],
        probabilities=chances,
        target=wanted,
        **shared,
    )


def scored(
    model: PreTrainedModel, batch: TokenBatch, method: TextExplainer, name: str, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Predict, and explain by a method.

    Args:
        model: The classifier.
        batch: B texts.
        method: The explainer.
        name: What it is called, for messages.
        target: int64 (B,) on the CPU, or None for the predicted classes.

    Returns:
        Probabilities (B, K), the classes explained (B,), scores (B, T).
    """
    with ungraded(model), torch.no_grad():
        chances = probabilities(model, all_logits(model, aligned(model, batch).inputs, len(batch))).cpu()
    wanted = chances.argmax(dim=1) if target is None else target
    return chances, wanted, finished(name, method(model, batch, wanted), batch)


def _own(
    model: MHEXForSequenceClassification,
    texts: Texts,
    target: int | str | Sequence[int | str] | Tensor | None,
    settings: OwnScores,
    **how: Any,
) -> Explanation:
    return model.explain(
        texts,
        target,
        layers=[len(model.layer_indices) - 1] if settings.layers == "last" else settings.layers,
        layer_weights=settings.layer_weights,
        decay=settings.decay,
        attention=settings.attention,
        beta=settings.beta,
        tau_pos=settings.tau_pos,
        tau_neg=settings.tau_neg,
        sharpness=settings.sharpness,
        exponent=settings.exponent,
        **how,
    )


def _chosen(method: str | TextExplainer, options: dict[str, Any]) -> tuple[str, TextExplainer]:
    if isinstance(method, str):
        return method, explainer(method, **options) if options else parse(method)
    if not callable(method):
        raise TypeError(f"method must be a name or an explainer, got {type(method).__name__}")
    if options:
        raise TypeError(f"options must be given to the explainer when it is made, got {', '.join(options)}")
    return getattr(method, "__name__", type(method).__name__), method


def _named(numbers: Tensor) -> list[list[int | None]]:
    """Numbers as a tokenizer gives them: None where there is none."""
    return [[None if number < 0 else number for number in row] for row in numbers.tolist()]

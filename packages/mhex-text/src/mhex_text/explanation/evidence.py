"""From what a tokenizer and a model gave to the explanations of single texts.

Letters: B batch, K classes, L layers, T tokens.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mhex_core import _checks
from mhex_text.explanation.records import ExplanationSettings, Token
from mhex_text.explanation.text import TextExplanation


def stacked(positive: Sequence[Tensor], negative: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Evidence for and against, L tensors (B, T) each, as (B, T, L) each, in double precision on the CPU."""
    plus, minus = _stacked("positive", positive), _stacked("negative", negative)
    if plus.shape != minus.shape:
        raise ValueError(f"negative must have the shapes of positive, {tuple(plus.shape)}, got {tuple(minus.shape)}")
    return plus, minus


def check_lengths(batch: int, length: int, texts: Sequence[Any], **per_token: Sequence[Sequence[Any]]) -> None:
    """Refuse what has not one entry per text, and within it one per token."""
    for name, given in (("texts", texts), *per_token.items()):
        if len(given) != batch:
            raise ValueError(f"{name} must have one entry per text of the batch ({batch}), got {len(given)}")
    for name, rows in per_token.items():
        for index, row in enumerate(rows):
            if len(row) != length:
                raise ValueError(f"{name}[{index}] must have one entry per token ({length}), got {len(row)}")


def head_chances(heads: Sequence[Tensor], *, batch: int, classes: int, layers: int) -> list[list[list[float]]]:
    """The probabilities of each head, L tensors (B, K) or none, as (B, L, K) lists; of no heads B empty lists."""
    if not len(heads):
        return [[] for _ in range(batch)]
    given = _checks.tensors("head_probabilities", heads, ndim=2)
    wanted = (batch, classes)
    if len(given) != layers or any(tuple(head.shape) != wanted for head in given):
        raise ValueError(
            f"head_probabilities must hold {layers} tensors of shape {wanted}, "
            f"got {', '.join(str(tuple(head.shape)) for head in given)}"
        )
    chances: list[list[list[float]]] = torch.stack(given, dim=1).detach().to("cpu", torch.float64).tolist()
    return chances


def classes_of(
    probabilities: Tensor, target: int | Tensor | None, *, batch: int
) -> tuple[list[list[float]], list[int]]:
    """Return the probabilities (B, K), and the class explained of each text."""
    chances = _checks.tensor("probabilities", probabilities, ndim=2).detach().to(device="cpu", dtype=torch.float64)
    if chances.shape[0] != batch or not chances.shape[1]:
        raise ValueError(f"probabilities must have shape ({batch}, K), K at least 1, got {tuple(chances.shape)}")
    if target is None:
        return chances.tolist(), chances.argmax(dim=1).tolist()
    given = target.cpu() if isinstance(target, Tensor) else target
    classes = _checks.class_indices("target", given, batch=batch, num_classes=chances.shape[1], device=chances.device)
    if classes.ndim != 1:
        raise ValueError(f"target must have shape ({batch},), got {tuple(classes.shape)}")
    return chances.tolist(), classes.tolist()


def explained_text(
    texts: tuple[str, ...],
    rows: Iterable[tuple[Any, Any, Any, Any, Any, Any]],
    *,
    probabilities: Sequence[float],
    target: int,
    settings: ExplanationSettings,
    heads: Sequence[Sequence[float]] = (),
) -> TextExplanation:
    """Put one text together, or one pair.

    Args:
        texts: The text, or both of a pair.
        rows: Of each token its offsets, word, part, and evidence for, evidence against and scores, L numbers each.
        probabilities: K numbers.
        target: The class explained.
        settings: What it shares with the other texts of its batch.
        heads: For each head K numbers, or nothing.
    """
    tokens = _tokens(rows, texts)
    return TextExplanation(
        texts=texts,
        tokens=tokens,
        seen=tuple(_seen(text, tokens, part) for part, text in enumerate(texts)),
        target=target,
        probabilities=tuple(probabilities),
        settings=settings,
        head_probabilities=tuple(tuple(head) for head in heads),
    )


def _stacked(name: str, given: Sequence[Tensor]) -> Tensor:
    """L tensors (B, T) as one, (B, T, L), in double precision on the CPU."""
    layers = _checks.tensors(name, given, ndim=2)
    for index, layer in enumerate(layers):
        if layer.shape != layers[0].shape:
            raise ValueError(
                f"{name}[{index}] must have shape (B, T) = {tuple(layers[0].shape)}, got {tuple(layer.shape)}"
            )
    return torch.stack(layers, dim=2).detach().to(device="cpu", dtype=torch.float64)


def _tokens(rows: Iterable[tuple[Any, Any, Any, Any, Any, Any]], texts: tuple[str, ...]) -> tuple[Token, ...]:
    """The tokens of one text that stand for something in it."""
    tokens = []
    # A token without a word is a word of its own; numbers below zero are not the tokenizer's.
    for place, ((start, end), word, part, positive, negative, scores) in enumerate(rows):
        if part is None:
            continue
        if not 0 <= part < len(texts):
            raise ValueError(f"sequence_ids must lie in [0, {len(texts) - 1}] or be None, got {part}")
        if not 0 <= start <= end <= len(texts[part]):
            raise ValueError(f"offsets must lie in a text of {len(texts[part])} characters, got ({start}, {end})")
        number = -1 - place if word is None else word
        tokens.append(
            Token(texts[part][start:end], start, end, part, number, tuple(positive), tuple(negative), tuple(scores))
        )
    return tuple(tokens)


def _seen(text: str, tokens: Sequence[Token], part: int) -> tuple[int, int]:
    """Between which positions the model read a text."""
    spans = [(token.start, token.end) for token in tokens if token.part == part and token.start < token.end]
    start, end = min((span[0] for span in spans), default=0), max((span[1] for span in spans), default=0)
    return (0 if _is_dropped(text[:start]) else start), (len(text) if _is_dropped(text[end:]) else end)


def _is_dropped(text: str) -> bool:
    """Whether tokenizers make no token of a text even where nothing is cut.

    White space, controls and formats; and marks, which a normalizer takes off the letter before them.
    """
    return all(unicodedata.category(character)[0] in "ZCM" or character.isspace() for character in text)

"""Explanations as JSON, written and read back; `Explanation.to_json` says what is in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mhex_core import _checks
from mhex_text.explanation.records import ExplanationSettings, Token, weighed
from mhex_text.explanation.text import TextExplanation

FORMAT = "mhex-text-explanation"
FORMAT_VERSION = 2

_Built = TypeVar("_Built")

_MESSAGE_WIDTH = 200  # characters of an error's cause
# What reading a damaged document, or one of another kind, is known to raise.
_DAMAGE = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError)


def write_document(items: Sequence[TextExplanation], settings: ExplanationSettings) -> str:
    """Everything as JSON."""
    document = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "beta": settings.beta,
        "layer_names": list(settings.layer_names),
        "layer_weights": list(settings.layer_weights),
        "class_names": list(settings.class_names),
        "explanations": [_text_document(item) for item in items],
    }
    return json.dumps(document, ensure_ascii=False, allow_nan=False)


def read_document(
    source: str | Path, build: Callable[[tuple[TextExplanation, ...], ExplanationSettings], _Built]
) -> _Built:
    """Read what `write_document` wrote.

    Args:
        source: The path of a file, or the text itself (a str that begins with "{").
        build: What makes one object of the items and their settings; it may find them damaged, too.

    Raises:
        TypeError: `source` is neither.
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, by a newer version, or not an explanation.
    """
    if not isinstance(source, str | Path):
        raise TypeError(f"source must be a path or a str, got {type(source).__name__}")
    if isinstance(source, str) and source.lstrip().startswith("{"):
        held, where = source.encode("utf-8", "surrogatepass"), "the text"
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"source must name a saved explanation, and there is no file {path}")
        held, where = path.read_bytes(), str(path)
    try:
        document = json.loads(held.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique)
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r}")
        version = _checks.positive_int("version", document["version"])
    except _DAMAGE as error:
        raise ValueError(_damaged(where, error)) from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"source must be of version {FORMAT_VERSION} or older; {where} is of version {str(version)[:20]}, "
            "which a newer mhex-text has written"
        )
    try:
        return build(*_rebuilt(document))
    except _DAMAGE as error:
        raise ValueError(_damaged(where, error)) from error


def _text_document(item: TextExplanation) -> dict[str, Any]:
    # Version 1 knew no heads, and what it wrote must come out the same.
    heads = {"head_probabilities": [list(head) for head in item.head_probabilities]} if item.head_probabilities else {}
    return {
        "texts": list(item.texts),
        "seen": [list(span) for span in item.seen],
        "truncated": item.truncated,
        "target": item.target,
        "prediction": item.prediction,
        "probabilities": list(item.probabilities),
        **heads,
        "tokens": [
            {
                "text": token.text,
                "start": token.start,
                "end": token.end,
                "part": token.part,
                "word": token.word,
                "positive": list(token.positive),
                "negative": list(token.negative),
                "scores": list(token.scores),
                "score": token.score,
            }
            for token in item.tokens
        ],
        "words": [
            {
                "text": word.text,
                "start": word.start,
                "end": word.end,
                "part": word.part,
                "scores": list(word.scores),
                "score": word.score,
            }
            for word in item.words
        ],
    }


def _rebuilt(document: Mapping[str, Any]) -> tuple[tuple[TextExplanation, ...], ExplanationSettings]:
    shared = {"beta", "layer_names", "layer_weights", "class_names"}
    if document.keys() != shared | {"format", "version", "explanations"}:
        raise ValueError(f"keys {sorted(document)}")
    settings = ExplanationSettings(**{name: document[name] for name in shared})
    return tuple(_rebuilt_text(item, settings) for item in document["explanations"]), settings


def _rebuilt_text(document: Mapping[str, Any], settings: ExplanationSettings) -> TextExplanation:
    tokens = []
    for given in document["tokens"]:
        positive = _checks.numbers("tokens.positive", given["positive"])
        negative = _checks.numbers("tokens.negative", given["negative"])
        tokens.append(
            Token(
                text=given["text"],
                start=given["start"],
                end=given["end"],
                part=given["part"],
                word=given["word"],
                positive=positive,
                negative=negative,
                scores=weighed(positive, negative, settings.layer_weights, settings.beta),
            )
        )
    rebuilt = TextExplanation(
        texts=tuple(document["texts"]),
        tokens=tuple(tokens),
        seen=tuple((start, end) for start, end in document["seen"]),
        target=document["target"],
        probabilities=tuple(document["probabilities"]),
        settings=settings,
        head_probabilities=tuple(tuple(head) for head in document.get("head_probabilities", ())),
    )
    # One comparison finds what is missing, what is too much, and every sum that is not the sum of its terms.
    # Numbers are written with all their digits and added up exactly, so that nothing but damage can differ.
    if _text_document(rebuilt) != document:
        raise ValueError("an explanation does not follow from its own evidence")
    return rebuilt


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"numbers must be finite, got {constant}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _damaged(where: str, error: BaseException) -> str:
    cause = " ".join(f"{type(error).__name__}: {error}".split())
    if len(cause) > _MESSAGE_WIDTH:
        cause = f"{cause[:_MESSAGE_WIDTH]}..."
    return f"source must hold a saved explanation; {where} is damaged or something else ({cause})"

"""The texts of a comparison: which of them, in which batches, and what people marked in them.

Letters: N texts, B batch, T tokens.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch import Tensor

from mhex_core import _checks
from mhex_text.batch import TokenBatch

Spans = tuple[tuple[int, int], ...]
Choice = Literal["first", "random"]


@dataclass(frozen=True, kw_only=True)
class LabelledTexts:
    """N texts with their classes.

    Attributes:
        places: Where each stands in the data, ascending.
        texts: The texts or pairs.
        labels: Their classes.
        rationales: Of each text the characters people marked in it (of a pair, in its first part), empty where they
            marked none; or None where there are no rationales at all.
    """

    places: tuple[int, ...]
    texts: tuple[str, ...] | tuple[tuple[str, str], ...]
    labels: tuple[int, ...]
    rationales: tuple[Spans, ...] | None

    @classmethod
    def read(
        cls, texts: datasets.Dataset, *, num_classes: int, limit: int | None, choose: Choice, seed: int
    ) -> LabelledTexts:
        """Choose and check.

        Args:
            texts: With the columns `text` and `label`, and perhaps `pair` and `rationale`.
            num_classes: That labels are numbers of.
            limit: How many to take; None means all.
            choose: The "first" ones, or a "random" choice.
            seed: Of that choice.

        Raises:
            TypeError: An argument, or a value in a column, is of another type.
            ValueError: A column is missing, or a value does not fit.
        """
        if not isinstance(texts, datasets.Dataset):
            raise TypeError(f"texts must be a datasets.Dataset, got {type(texts).__name__}")
        there = texts.column_names
        if not {"text", "label"} <= set(there):
            raise ValueError(f"texts must have the columns text and label, got {', '.join(there) or 'none'}")
        if not len(texts):
            raise ValueError("texts must hold at least one text, got none")
        places = _chosen(len(texts), limit, choose, seed)
        rows = texts.select(places)
        listed = [_string("text", text, place) for text, place in zip(rows["text"], places, strict=True)]
        labels = [_label(label, place, num_classes) for label, place in zip(rows["label"], places, strict=True)]
        rationales = None
        if "rationale" in there:
            marked = zip(rows["rationale"], listed, places, strict=True)
            rationales = tuple(_spans(spans, len(text), place) for spans, text, place in marked)
        if "pair" not in there:
            return cls(places=tuple(places), texts=tuple(listed), labels=tuple(labels), rationales=rationales)
        second = [_string("pair", text, place) for text, place in zip(rows["pair"], places, strict=True)]
        pairs = tuple(zip(listed, second, strict=True))
        return cls(places=tuple(places), texts=pairs, labels=tuple(labels), rationales=rationales)

    def __len__(self) -> int:
        return len(self.places)

    def select(self, rows: Sequence[int]) -> LabelledTexts:
        """Some of them."""
        return LabelledTexts(
            places=tuple(self.places[row] for row in rows),
            texts=tuple(self.texts[row] for row in rows),  # type: ignore[arg-type]  # texts alone or pairs alone
            labels=tuple(self.labels[row] for row in rows),
            rationales=None if self.rationales is None else tuple(self.rationales[row] for row in rows),
        )

    def batches(self, batch_size: int) -> list[LabelledTexts]:
        """Texts of like length together, which saves padding."""
        order = sorted(range(len(self)), key=lambda row: sum(map(len, _parts(self.texts[row]))))
        return [self.select(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]

    def checksum(self) -> str:
        """Enough to notice other texts, classes or rationales: eight hexadecimal digits."""
        text = json.dumps([self.places, self.texts, self.labels, self.rationales])
        return f"{zlib.crc32(text.encode()):08x}"


def rationale_tokens(batch: TokenBatch, rationales: Sequence[Spans]) -> Tensor:
    """The tokens that share a character with what people marked, blanks aside: bool (B, T).

    Only tokens that carry a score are among them; what truncation cut off is not.

    Args:
        batch: The texts.
        rationales: Of each text its spans (start, end), in characters; of a pair, of its first part.
    """
    marked = torch.zeros_like(batch.mask)
    taking_part = (batch.mask & (batch.sequence_ids == 0)).nonzero().tolist()
    for row, place in taking_part:
        text = _parts(batch.texts[row])[0]
        start, end = batch.offsets[row, place].tolist()
        # Some tokenizers take the blank before a word for a part of it.
        characters = [at for at in range(start, end) if not text[at].isspace()]
        if characters:
            first, last = characters[0], characters[-1]
            marked[row, place] = any(begin <= last and first < stop for begin, stop in rationales[row])
    return marked


def _parts(text: str | tuple[str, str]) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


def _chosen(count: int, limit: int | None, choose: Choice, seed: int) -> list[int]:
    _checks.choice("choose", choose, ("first", "random"))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if limit is None:
        return list(range(count))
    _checks.positive_int("limit", limit)
    if choose == "first":
        return list(range(min(limit, count)))
    drawn = np.random.default_rng(seed).permutation(count)[:limit]
    return [int(place) for place in np.sort(drawn)]


def _string(column: str, value: object, place: int) -> str:
    if not isinstance(value, str):
        raise TypeError(f"texts must hold strings in the column {column}, got {type(value).__name__} in row {place}")
    return value


def _label(value: object, place: int, num_classes: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"texts must hold class numbers in the column label, got {value!r} in row {place}")
    if not 0 <= value < num_classes:
        raise ValueError(f"texts must hold labels in [0, {num_classes - 1}], got {value} in row {place}")
    return value


def _spans(value: Any, length: int, place: int) -> Spans:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or not all(
        isinstance(span, Sequence) and len(span) == 2 and all(type(end) is int for end in span) for span in value
    ):
        raise TypeError(f"texts must hold lists of [start, end] in the column rationale, got {value!r} in row {place}")
    for start, end in value:
        if not 0 <= start < end <= length:
            raise ValueError(
                f"texts must hold rationales [start, end] with 0 <= start < end <= {length}, the text's length, got "
                f"[{start}, {end}] in row {place}"
            )
    return tuple((start, end) for start, end in value)

"""From entries to tokens, in the processes that read.

Letters: T tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mhex_core.bulk.job import Decoded
from mhex_text.bulk.checkpoint import Checkpoint
from mhex_text.bulk.sources import TextSource, one_line
from mhex_text.explanation.evidence import _is_dropped

LENGTH_STEP = 16
"""Texts are padded to a multiple of it, so that those of like length share batches."""

_PARALLELISM = "TOKENIZERS_PARALLELISM"


class Tokenized(NamedTuple):
    """A text or a pair, and what the tokenizer made of it.

    Attributes:
        texts: The text, or both of a pair.
        tokens: int32 (6, T): number in the vocabulary, segment, start, end, part, word; part is -1 for tokens that the
            tokenizer added, and so is a word that is none.
        truncated: How many characters were not read.
        cut: Whether tokens were left out.
    """

    texts: tuple[str, ...]
    tokens: npt.NDArray[np.int32]
    truncated: int
    cut: bool


class TextReader:
    """Reads entries and tokenizes their texts.

    Args:
        source: Where they lie.
        checkpoint: Whose tokenizer is used.
        exact: Whether texts share a group, and so a batch, only if they have the same number of tokens. Otherwise they
            are to be padded to `padded_length`.
    """

    def __init__(self, source: TextSource, checkpoint: Checkpoint, *, exact: bool) -> None:
        self._read = source.reader()
        self._tokenizer = checkpoint.tokenizer()
        self._limit = checkpoint.limit
        self._exact = exact

    def __call__(self, entries: pa.RecordBatch) -> Decoded:
        """Each usable text as `Tokenized`; the others with the reason."""
        found = dict(enumerate(self._read(entries)))
        rejected = [(place, read) for place, read in found.items() if isinstance(read, str)]
        usable = {place: read for place, read in found.items() if isinstance(read, tuple)}
        kept, values, groups = [], [], []
        for (place, texts), encoding in zip(usable.items(), self._encoded(list(usable.values())), strict=True):
            if isinstance(encoding, str):
                rejected.append((place, encoding))
                continue
            kept.append(place)
            values.append(tokenized(texts, encoding))
            length = len(encoding.ids)
            groups.append(length if self._exact else padded_length(length, self._limit))
        return Decoded(kept=kept, values=values, rejected=sorted(rejected), groups=groups)

    def _encoded(self, texts: list[tuple[str, ...]]) -> list[Any]:
        """The encoding of each text, or why there is none."""
        if not texts:
            return []
        try:
            found = self._encode(texts)
        except Exception as error:  # noqa: BLE001 - the library raises just that, for a word it has no token for
            if len(texts) == 1:
                return [f"the tokenizer cannot read it: {one_line(error)}"]
            return [encoding for text in texts for encoding in self._encoded([text])]
        return [encoding if encoding.ids else "no token" for encoding in found]

    def _encode(self, texts: list[tuple[str, ...]]) -> list[Any]:
        first = [text[0] for text in texts]
        second = [text[1] for text in texts if len(text) > 1] or None
        limited = {"truncation": False} if self._limit is None else {"truncation": True, "max_length": self._limit}
        with _on_one_thread():
            encodings: list[Any] = self._tokenizer(first, second, **limited).encodings
        return encodings


def padded_length(length: int, limit: int | None) -> int:
    """How many tokens a text of `length` tokens is padded to."""
    padded = max(1, -(-length // LENGTH_STEP)) * LENGTH_STEP
    return padded if limit is None else min(padded, limit)


def tokenized(texts: tuple[str, ...], encoding: Any) -> Tokenized:
    """What the models need of a fast tokenizer's encoding without padding."""
    tokens = np.empty((6, len(encoding.ids)), dtype=np.int32)
    tokens[0], tokens[1] = encoding.ids, encoding.type_ids
    tokens[2:4] = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2).T
    tokens[4] = [-1 if part is None else part for part in encoding.sequence_ids]
    tokens[5] = [-1 if word is None else word for word in encoding.word_ids]
    unseen = sum(_unseen(text, tokens[2:4, tokens[4] == part]) for part, text in enumerate(texts))
    return Tokenized(texts, tokens, unseen, bool(encoding.overflowing))


def _unseen(text: str, spans: npt.NDArray[np.int32]) -> int:
    """How many characters of a text no token stands for, other than those that tokenizers drop from any text."""
    starts, ends = spans[:, spans[0] < spans[1]]
    start, end = (int(starts.min()), int(ends.max())) if starts.size else (0, 0)
    before, after = text[:start], text[end:]
    return (0 if _is_dropped(before) else len(before)) + (0 if _is_dropped(after) else len(after))


@contextmanager
def _on_one_thread() -> Iterator[None]:
    """No threads within a tokenizer: its kind lives in several processes, and in some that were forked."""
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLELISM]
        else:
            os.environ[_PARALLELISM] = before

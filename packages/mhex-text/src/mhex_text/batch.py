"""Texts as a model reads them, with what is needed to say which part of a text a token stands for.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from mhex_core import _checks

# Of tokenizers that were never told how much their model takes, the library says 10^30.
_NO_LIMIT = 10**9


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch:
    """B texts, or B pairs of texts, and their tokens.

    Attributes:
        texts: The texts or pairs as they were written.
        tokenizer: The fast tokenizer that made the tokens.
        input_ids: int64 (B, T), padded on the tokenizer's side.
        attention_mask: int64 (B, T), 1 for real tokens and 0 for padding.
        token_type_ids: int64 (B, T), or None where the tokenizer makes none.
        offsets: int64 (B, T, 2), the characters (start, end) of each token in its text; of a pair, in its own part.
        sequence_ids: int64 (B, T), 0 or 1 for the text a token is of, -1 for special tokens and padding.
        word_ids: int64 (B, T), the number of a token's word in its text, -1 where there is none.
        truncated: bool (B,), whether something of the text was cut.

    Raises:
        TypeError: A field is of another type.
        ValueError: The shapes do not fit.
    """

    texts: tuple[str, ...] | tuple[tuple[str, str], ...]
    tokenizer: Any
    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None
    offsets: Tensor
    sequence_ids: Tensor
    word_ids: Tensor
    truncated: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.texts, tuple) or not self.texts:
            raise ValueError(f"texts must be a tuple of at least one text or pair, got {self.texts!r}")
        shape = tuple(_checks.tensor("input_ids", self.input_ids, ndim=2, floating=False).shape)
        expected = {"input_ids": (len(self.texts), shape[1]), "offsets": (*shape, 2), "truncated": shape[:1]}
        for name, value in self._tensors().items():
            _checks.tensor(name, value, ndim=value.ndim if isinstance(value, Tensor) else 2, floating=False)
            dtype = torch.bool if name == "truncated" else torch.int64
            if value.dtype != dtype:
                raise TypeError(f"{name} must be of dtype {dtype}, got {value.dtype}")
            wanted = expected.get(name, shape)
            if tuple(value.shape) != wanted:
                raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")

    @classmethod
    def make(
        cls, texts: str | Sequence[str] | Sequence[tuple[str, str]], tokenizer: Any, *, max_length: int | None = None
    ) -> Self:
        """Tokenize.

        Args:
            texts: B texts, or B pairs, as one batch; a text alone is a batch of one.
            tokenizer: The model's own, a fast one.
            max_length: The most tokens of a text or pair; what is longer is cut. None means as many as the tokenizer
                says its model takes; a tokenizer that was never told cuts nothing.

        Raises:
            TypeError: An argument is of another type.
            ValueError: There are no texts, or the tokenizer cannot pad.
        """
        listed = _listed(texts)
        if not callable(tokenizer) or not getattr(tokenizer, "is_fast", False):
            raise TypeError(
                "tokenizer must be a fast tokenizer, which says where a token lies in its text, "
                f"got {type(tokenizer).__name__}"
            )
        if len(listed) > 1 and getattr(tokenizer, "pad_token_id", None) is None:
            raise ValueError(f"tokenizer must have a padding token for more than one text, got {len(listed)} texts")
        limit = _limit(tokenizer, max_length)
        limited = {"truncation": limit is not None, "max_length": limit}
        first = [text if isinstance(text, str) else text[0] for text in listed]
        second = [text[1] for text in listed if not isinstance(text, str)] or None
        made = tokenizer(first, second, padding=len(listed) > 1, return_offsets_mapping=True, **limited)
        encodings = made.encodings
        types = made.get("token_type_ids")
        return cls(
            texts=listed,
            tokenizer=tokenizer,
            input_ids=_integers(made["input_ids"]),
            attention_mask=_integers([encoding.attention_mask for encoding in encodings]),
            token_type_ids=None if types is None else _integers(types),
            offsets=_integers(made["offset_mapping"]).reshape(*torch.tensor(made["input_ids"]).shape, 2),
            sequence_ids=_integers([_numbered(encoding.sequence_ids) for encoding in encodings]),
            word_ids=_integers([_numbered(encoding.word_ids) for encoding in encodings]),
            truncated=torch.tensor([bool(encoding.overflowing) for encoding in encodings]),
        )

    @property
    def mask(self) -> Tensor:
        """bool (B, T): the tokens that carry a score, real ones that stand for something in the text."""
        return (self.sequence_ids >= 0) & (self.attention_mask != 0)

    @property
    def pairs(self) -> bool:
        """Whether the texts are pairs."""
        return not isinstance(self.texts[0], str)

    def to(self, device: torch.device | str) -> Self:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self._tensors().items()}
        return replace(self, **moved)

    def inputs(self) -> dict[str, Tensor]:
        """What a model's forward takes: `input_ids`, `attention_mask`, and `token_type_ids` if there are any."""
        given = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return given if self.token_type_ids is None else given | {"token_type_ids": self.token_type_ids}

    def __len__(self) -> int:
        return len(self.texts)

    def _tensors(self) -> dict[str, Tensor]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value
            for name, value in found.items()
            if name not in ("texts", "tokenizer") and not (name == "token_type_ids" and value is None)
        }


def _listed(texts: object) -> tuple[str, ...] | tuple[tuple[str, str], ...]:
    if isinstance(texts, str):
        return (texts,)
    if not isinstance(texts, Sequence):
        raise TypeError(f"texts must be a text, or a sequence of texts or of pairs, got {type(texts).__name__}")
    if not texts:
        raise ValueError("texts must hold at least one text, got none")
    singles = tuple(text for text in texts if isinstance(text, str))
    pairs = tuple(
        (text[0], text[1])
        for text in texts
        if isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)
    )
    if len(singles) == len(texts):
        return singles
    if len(pairs) == len(texts):
        return pairs
    other = next(text for text in texts if not isinstance(text, str))
    raise TypeError(f"texts must hold texts alone or pairs (text, text) alone, got {other!r} among them")


def _limit(tokenizer: Any, max_length: int | None) -> int | None:
    """How many tokens a text may have: what was asked for, within what the tokenizer says its model takes."""
    limits = [] if max_length is None else [_checks.positive_int("max_length", max_length)]
    told = getattr(tokenizer, "model_max_length", None)
    if isinstance(told, int) and told < _NO_LIMIT:
        limits.append(told)
    return min(limits) if limits else None


def _integers(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def _numbered(places: Sequence[int | None]) -> list[int]:
    return [-1 if place is None else place for place in places]

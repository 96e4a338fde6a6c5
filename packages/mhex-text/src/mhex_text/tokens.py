"""From token scores to words of the text: which tokens may carry a score, and how sub-words are put together.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WordScore:
    """The score of one word.

    Attributes:
        text: The word as it stands in the text.
        start: Its first character's position in the text.
        end: The position after its last character.
        score: The sum over its tokens, in the units of the token scores.
    """

    text: str
    start: int
    end: int
    score: float


def score_mask(attention_mask: Tensor, special_tokens_mask: Tensor) -> Tensor:
    """The tokens that carry a score: real ones that stand for something in the text.

    Both arguments are what a Hugging Face tokenizer returns under these names.

    Args:
        attention_mask: (B, T), 1 for real tokens and 0 for padding.
        special_tokens_mask: (B, T), 1 for tokens the tokenizer added ([CLS], [SEP], padding).

    Returns:
        bool (B, T), the `mask` of `mhex_core.token_saliency`.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: The shapes differ, or a value is neither 0 nor 1. (An additive mask of 0 and large negative numbers,
            as some models use inside, would be read the wrong way round.)
    """
    for name, mask in (("attention_mask", attention_mask), ("special_tokens_mask", special_tokens_mask)):
        if not isinstance(mask, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(mask).__name__}")
        if mask.ndim != 2 or mask.shape != attention_mask.shape:
            raise ValueError(f"{name} must have shape (B, T) = {tuple(attention_mask.shape)}, got {tuple(mask.shape)}")
        if not bool(torch.isin(mask.long(), torch.tensor([0, 1], device=mask.device)).all()):
            raise ValueError(f"{name} must hold zeros and ones, got values up to {mask.abs().max().item()}")
    return attention_mask.bool() & ~special_tokens_mask.bool()


def word_scores(
    scores: Sequence[float] | Tensor,
    word_ids: Sequence[int | None],
    offsets: Sequence[tuple[int, int]] | Tensor,
    text: str,
) -> tuple[WordScore, ...]:
    """Put the sub-words of one text together.

    Args:
        scores: T token scores.
        word_ids: For each token the number of its word, or None for a special one: `encoding.word_ids(i)`.
        offsets: (start, end) of each token in the text, in characters: `encoding["offset_mapping"][i]`.
        text: The text itself.

    Returns:
        The words in reading order. A word cut by truncation has the tokens that were left.

    Raises:
        ValueError: The three sequences differ in length, or an offset lies outside the text.
    """
    values = scores.tolist() if isinstance(scores, Tensor) else [float(score) for score in scores]
    spans = [tuple(span) for span in (offsets.tolist() if isinstance(offsets, Tensor) else offsets)]
    if not len(values) == len(word_ids) == len(spans):
        raise ValueError(
            f"scores, word_ids and offsets must have one entry per token, "
            f"got {len(values)}, {len(word_ids)} and {len(spans)}"
        )
    words: dict[int, tuple[int, int, float]] = {}
    for value, word, (start, end) in zip(values, word_ids, spans, strict=True):
        if word is None:
            continue
        if not 0 <= start <= end <= len(text):
            raise ValueError(f"offsets must lie in a text of {len(text)} characters, got ({start}, {end})")
        first, last, total = words.get(word, (start, end, 0.0))
        words[word] = (min(first, start), max(last, end), total + value)
    return tuple(
        WordScore(text[start:end], start, end, total) for start, end, total in (words[word] for word in sorted(words))
    )

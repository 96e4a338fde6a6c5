"""The explanation of one text or one pair of texts.

Letters: K classes, L layers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO, TypeVar

from mhex_core import _checks
from mhex_core.files import write_atomically
from mhex_text import rendering
from mhex_text.explanation.records import (
    ExplanationSettings,
    Layers,
    Token,
    Word,
    as_names,
    as_tuple,
    weighed,
    whole_number,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Explained = TypeVar("_Explained", bound="TextExplanation")

_LEEWAY = 1e-3  # half precision does not sum to 1


@dataclass(frozen=True, kw_only=True, repr=False)
class TextExplanation:
    """The prediction for one text, or one pair of texts, and the evidence for it.

    Attributes:
        texts: The text, or both of a pair.
        tokens: In reading order, those of a second text after those of the first.
        seen: For each text the positions (start, end) between which the model read it; (0, its length) when all of it.
        target: The class explained.
        probabilities: K numbers in [0, 1].
        settings: What it shares with the other texts of its batch.
        head_probabilities: For each of the L heads K numbers in [0, 1]; empty where they are not known, as of a method
            other than the classifier's own.

    Raises:
        TypeError: A value is of another type.
        ValueError: A value does not fit the others, or is not finite.
    """

    texts: tuple[str, ...]
    tokens: tuple[Token, ...]
    seen: tuple[tuple[int, int], ...]
    target: int
    probabilities: tuple[float, ...]
    settings: ExplanationSettings
    head_probabilities: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.settings, ExplanationSettings):
            raise TypeError(f"settings must be ExplanationSettings, got {type(self.settings).__name__}")
        _check_texts(self.texts)
        _check_seen(self.seen, self.texts)
        object.__setattr__(self, "tokens", as_tuple("tokens", self.tokens))
        _check_tokens(self.tokens, self.texts, self.seen, layers=len(self.layer_names))
        probabilities = _probabilities("probabilities", self.probabilities)
        object.__setattr__(self, "probabilities", probabilities)
        heads = tuple(
            _probabilities(f"head_probabilities[{index}]", head)
            for index, head in enumerate(as_tuple("head_probabilities", self.head_probabilities))
        )
        object.__setattr__(self, "head_probabilities", heads)
        if heads and (len(heads) != len(self.layer_names) or {len(head) for head in heads} != {len(probabilities)}):
            raise ValueError(
                f"head_probabilities must hold {len(probabilities)} numbers for each of {len(self.layer_names)} "
                f"layers, or nothing, got {[len(head) for head in heads]}"
            )
        if self.class_names and len(self.class_names) != len(probabilities):
            raise ValueError(
                f"class_names must hold one name per class ({len(probabilities)}), got {len(self.class_names)}"
            )
        if not 0 <= whole_number("target", self.target) < len(probabilities):
            raise ValueError(f"target must lie in [0, {len(probabilities) - 1}], got {self.target}")

    @property
    def layer_names(self) -> tuple[str, ...]:
        """L names, shallow to deep."""
        return self.settings.layer_names

    @property
    def class_names(self) -> tuple[str, ...]:
        """K names, or empty where none are known."""
        return self.settings.class_names

    @property
    def prediction(self) -> int:
        """The class of the highest probability, the first of several."""
        return self.probabilities.index(max(self.probabilities))

    @property
    def prediction_name(self) -> str:
        """The name of the predicted class, or "class 3" where names are not known."""
        return self.settings.label(self.prediction)

    @property
    def target_name(self) -> str:
        """The name of the class explained, or "class 3" where names are not known."""
        return self.settings.label(self.target)

    @property
    def truncated(self) -> int:
        """How many characters the model did not see because the text was cut; 0 when it saw all of it."""
        return sum(len(text) - (end - start) for text, (start, end) in zip(self.texts, self.seen, strict=True))

    @cached_property
    def words(self) -> tuple[Word, ...]:
        """The words in reading order, sub-words summed; a word cut by truncation has the tokens that were left.

        A word's span is that of its tokens, less white space at its ends, which some tokenizers count as part of it.
        """
        return tuple(word for word, _ in self._words)

    @cached_property
    def word_tokens(self) -> tuple[tuple[int, ...], ...]:
        """For each of `words` the places in `tokens` of those it sums up."""
        return tuple(places for _, places in self._words)

    def reweighted(
        self, *, beta: float | None = None, layers: Layers | None = None, layer_weights: Sequence[float] | None = None
    ) -> Self:
        """The same explanation weighed otherwise; the arguments are those of `Explanation.reweighted`."""
        return reweigh(self, self.settings.reweighted(beta=beta, layers=layers, layer_weights=layer_weights))

    def to_html(
        self,
        *,
        name: str | None = None,
        label: int | str | None = None,
        title: str = "Explanation",
        max_bytes: int | None = None,
    ) -> str:
        """The explorer of this text: one page of HTML that needs nothing else, see `mhex_text.report`.

        Args:
            name: What the text is called; None means by its first words.
            label: The true class, its number or its name, where it is known.
            title: Of the page.
            max_bytes: What the page may have.

        Raises:
            TypeError: An argument is of another type.
            ValueError: There is no such class, or the page does not fit.
        """
        from mhex_text.reporting import report

        names = None if name is None else (name,)
        return report(self, names=names, labels=(label,), title=title, max_bytes=max_bytes).html

    def save_html(self, path: str | Path, **options: Any) -> Path:
        """Write `to_html`, whose options these are, to a file, in one step.

        Returns:
            The path written.
        """
        page = self.to_html(**options).encode()
        return write_atomically(path, lambda temporary: temporary.write_bytes(page))

    def plot(self, *, width: float = 5.5, font_size: float = 9.0, legend: bool = True) -> Figure:
        """Draw the text as a figure for print, see `mhex_text.plotting.plot`."""
        from mhex_text.plotting import plot

        return plot([self], width=width, font_size=font_size, legend=legend)

    def print(self, file: TextIO | None = None, *, colour: bool | None = None) -> None:
        """Write it for people to read; the arguments are those of `Explanation.print`."""
        rendering.write_terminal([self], sys.stdout if file is None else file, colour=colour)

    def __str__(self) -> str:
        return rendering.terminal_text([self])

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.texts!r}, target={self.target} ({self.target_name!r}), "
            f"tokens={len(self.tokens)}, truncated={self.truncated})"
        )

    def _repr_html_(self) -> str:
        from mhex_text.reporting import notebook_html

        return notebook_html(self)

    @cached_property
    def _words(self) -> tuple[tuple[Word, tuple[int, ...]], ...]:
        members: dict[tuple[int, int], list[int]] = {}
        for place, token in enumerate(self.tokens):
            members.setdefault((token.part, token.word), []).append(place)
        found = [(self._word([self.tokens[place] for place in places]), tuple(places)) for places in members.values()]
        return tuple(sorted(found, key=lambda entry: (entry[0].part, entry[0].start, entry[0].end)))

    def _word(self, tokens: Sequence[Token]) -> Word:
        part = tokens[0].part
        start, end = min(token.start for token in tokens), max(token.end for token in tokens)
        span = self.texts[part][start:end]
        if span.strip():
            start, end = start + len(span) - len(span.lstrip()), end - (len(span) - len(span.rstrip()))
        scores = tuple(math.fsum(layer) for layer in zip(*(token.scores for token in tokens), strict=True))
        return Word(self.texts[part][start:end], start, end, math.fsum(scores), part, scores)


def reweigh(explanation: _Explained, settings: ExplanationSettings) -> _Explained:
    """The same explanation under other settings, its scores computed anew from the evidence."""
    weights, beta = settings.layer_weights, settings.beta
    tokens = tuple(
        replace(token, scores=weighed(token.positive, token.negative, weights, beta)) for token in explanation.tokens
    )
    return replace(explanation, tokens=tokens, settings=settings)


def _probabilities(name: str, value: object) -> tuple[float, ...]:
    found = _checks.numbers(name, value, low=-_LEEWAY)
    if not found or max(found) > 1 + _LEEWAY:
        raise ValueError(f"{name} must be one or more numbers in [0, 1], got {value!r}")
    return found


def _check_texts(texts: object) -> None:
    if not isinstance(texts, tuple):
        raise TypeError(f"texts must be a tuple of str, got {type(texts).__name__}")
    if len(texts) not in (1, 2):
        raise ValueError(f"texts must hold one text or a pair, got {len(texts)}")
    as_names("texts", texts)


def _check_seen(seen: object, texts: tuple[str, ...]) -> None:
    if not isinstance(seen, tuple) or not all(isinstance(span, tuple) and len(span) == 2 for span in seen):
        raise TypeError(f"seen must be a tuple of pairs (start, end), got {seen!r}")
    if len(seen) != len(texts):
        raise ValueError(f"seen must hold one pair per text ({len(texts)}), got {len(seen)}")
    for text, (start, end) in zip(texts, seen, strict=True):
        if not 0 <= whole_number("seen", start) <= whole_number("seen", end) <= len(text):
            raise ValueError(f"seen must lie in a text of {len(text)} characters, got ({start}, {end})")


def _check_tokens(
    tokens: tuple[Token, ...], texts: tuple[str, ...], seen: tuple[tuple[int, int], ...], *, layers: int
) -> None:
    for index, token in enumerate(tokens):
        if not isinstance(token, Token):
            raise TypeError(f"tokens[{index}] must be a Token, got {type(token).__name__}")
        for name in ("start", "end", "part", "word"):
            whole_number(f"tokens[{index}].{name}", getattr(token, name))
        if not 0 <= token.part < len(texts):
            raise ValueError(f"tokens[{index}].part must lie in [0, {len(texts) - 1}], got {token.part}")
        low, high = seen[token.part]
        # A token may cover nothing; where a tokenizer puts such a one says nothing about what was cut.
        if not (low <= token.start <= token.end <= high or 0 <= token.start == token.end <= len(texts[token.part])):
            raise ValueError(
                f"tokens[{index}] must lie in what the model saw, ({low}, {high}), got ({token.start}, {token.end})"
            )
        if token.text != texts[token.part][token.start : token.end]:
            raise ValueError(
                f"tokens[{index}].text must be {texts[token.part][token.start : token.end]!r}, got {token.text!r}"
            )
        for name in ("positive", "negative", "scores"):
            values = getattr(token, name)
            if not isinstance(values, tuple) or len(values) != layers:
                raise ValueError(
                    f"tokens[{index}].{name} must be a tuple of one number per layer ({layers}), got {values}"
                )
            if not all(map(math.isfinite, values)):
                raise ValueError(f"tokens[{index}].{name} must be finite, got {values}")

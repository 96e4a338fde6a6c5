"""What an explanation of texts holds, how it is weighed anew, and how it is kept in a file.

Everything is computed from the evidence of each layer, in double precision: the score of a token is
sum_l lambda_l (p_l + beta n_l), p_l the evidence for the class and n_l the evidence against it, which carries its sign.
So another beta or other layer weights need no model.

Letters: B batch, K classes, L layers, T tokens.
Source: Sun and Liò, "Multi-Head Explainer" (arXiv 2501.01311), saliency equations.
"""

from __future__ import annotations

import json
import math
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, TextIO, overload

import torch
from torch import Tensor

from mhex_core import _checks
from mhex_core.files import write_atomically
from mhex_text import rendering
from mhex_text.tokens import WordScore

FORMAT = "mhex-text-explanation"
FORMAT_VERSION = 1

Layers = int | Sequence[int] | Literal["all"]

_LEEWAY = 1e-3  # half precision does not sum to 1
_MESSAGE_WIDTH = 200  # characters of an error's cause
# What reading a damaged document, or one of another kind, is known to raise.
_DAMAGE = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError)


@dataclass(frozen=True, slots=True)
class Token:
    """One token that stands for something in a text. Tokens the tokenizer added ([CLS], [SEP], padding) are left out.

    Attributes:
        text: What it covers of the text, as it stands there. (Not the entry in the vocabulary.)
        start: The position of its first character in its text; all positions count Unicode code points.
        end: The position after its last character.
        part: Which text it is of: 0, or 1 for the second of a pair.
        word: The number of its word within its text, as the tokenizer counts.
        positive: L numbers, each layer's evidence for the target, before beta and the layer weights.
        negative: L numbers, the same for evidence against it.
        scores: L numbers, each layer's share of the score: lambda_l (positive + beta negative).
    """

    text: str
    start: int
    end: int
    part: int
    word: int
    positive: tuple[float, ...]
    negative: tuple[float, ...]
    scores: tuple[float, ...]

    @property
    def score(self) -> float:
        """The sum over the layers, in the units of the heads' logits."""
        return math.fsum(self.scores)


@dataclass(frozen=True)
class Word(WordScore):
    """The score of one word: the sum over its tokens.

    Attributes:
        part: Which text it is of: 0, or 1 for the second of a pair.
        scores: L numbers, each layer's share of the score.
    """

    part: int
    scores: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ExplanationSettings:
    """What all texts of one explanation share.

    Attributes:
        layer_names: L names, shallow to deep.
        layer_weights: lambda_l, L numbers; 0 for a layer that is not added up.
        beta: How much negative evidence counts, in [0, 1].
        class_names: K names, or empty where none are known.

    Raises:
        TypeError: A value is of another type.
        ValueError: beta is not in [0, 1], a weight is not finite, or there is not one weight per layer.
    """

    layer_names: tuple[str, ...]
    layer_weights: tuple[float, ...]
    beta: float = 0.0
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        for name in ("layer_names", "class_names"):
            set_field(self, name, _names(name, getattr(self, name)))
        set_field(self, "layer_weights", _checks.numbers("layer_weights", self.layer_weights))
        set_field(self, "beta", _checks.number("beta", self.beta, low=0, high=1))
        if not self.layer_names:
            raise ValueError("layer_names must hold at least one name, got none")
        if len(self.layer_weights) != len(self.layer_names):
            raise ValueError(
                f"layer_weights must hold one number per layer ({len(self.layer_names)}), got {len(self.layer_weights)}"
            )

    def label(self, index: int) -> str:
        """The name of a class, or "class 3" where names are not known."""
        return self.class_names[index] if self.class_names else f"class {index}"

    def reweighted(
        self, *, beta: float | None = None, layers: Layers | None = None, layer_weights: Sequence[float] | None = None
    ) -> Self:
        """The same with another beta or other layer weights; the arguments are those of `Explanation.reweighted`."""
        count = len(self.layer_names)
        if layers is None and layer_weights is None:
            weights = self.layer_weights
        else:
            weights = _spread_weights("all" if layers is None else layers, layer_weights, count=count)
        return replace(self, beta=self.beta if beta is None else beta, layer_weights=weights)


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

    def __post_init__(self) -> None:
        if not isinstance(self.settings, ExplanationSettings):
            raise TypeError(f"settings must be ExplanationSettings, got {type(self.settings).__name__}")
        _check_texts(self.texts)
        _check_seen(self.seen, self.texts)
        object.__setattr__(self, "tokens", _tuple("tokens", self.tokens))
        _check_tokens(self.tokens, self.texts, self.seen, layers=len(self.layer_names))
        probabilities = _checks.numbers("probabilities", self.probabilities, low=-_LEEWAY)
        if not probabilities or max(probabilities) > 1 + _LEEWAY:
            raise ValueError(f"probabilities must be one or more numbers in [0, 1], got {self.probabilities!r}")
        object.__setattr__(self, "probabilities", probabilities)
        if self.class_names and len(self.class_names) != len(probabilities):
            raise ValueError(
                f"class_names must hold one name per class ({len(probabilities)}), got {len(self.class_names)}"
            )
        if not 0 <= _whole("target", self.target) < len(probabilities):
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
        members: dict[tuple[int, int], list[Token]] = {}
        for token in self.tokens:
            members.setdefault((token.part, token.word), []).append(token)
        return tuple(
            sorted(
                (self._word(tokens) for tokens in members.values()), key=lambda word: (word.part, word.start, word.end)
            )
        )

    def reweighted(
        self, *, beta: float | None = None, layers: Layers | None = None, layer_weights: Sequence[float] | None = None
    ) -> Self:
        """The same explanation weighed otherwise; the arguments are those of `Explanation.reweighted`."""
        return self._with(self.settings.reweighted(beta=beta, layers=layers, layer_weights=layer_weights))

    def to_html(self) -> str:
        """One page of HTML that needs nothing else, see `mhex_text.rendering.html_page`."""
        return rendering.html_page([self])

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
        return rendering.html_fragment([self])

    def _word(self, tokens: Sequence[Token]) -> Word:
        part = tokens[0].part
        start, end = min(token.start for token in tokens), max(token.end for token in tokens)
        span = self.texts[part][start:end]
        if span.strip():
            start, end = start + len(span) - len(span.lstrip()), end - (len(span) - len(span.rstrip()))
        scores = tuple(math.fsum(layer) for layer in zip(*(token.scores for token in tokens), strict=True))
        return Word(self.texts[part][start:end], start, end, math.fsum(scores), part, scores)

    def _with(self, settings: ExplanationSettings) -> Self:
        weights, beta = settings.layer_weights, settings.beta
        tokens = tuple(
            replace(token, scores=_weighed(token.positive, token.negative, weights, beta)) for token in self.tokens
        )
        return replace(self, tokens=tokens, settings=settings)

    def _document(self) -> dict[str, Any]:
        return {
            "texts": list(self.texts),
            "seen": [list(span) for span in self.seen],
            "truncated": self.truncated,
            "target": self.target,
            "prediction": self.prediction,
            "probabilities": list(self.probabilities),
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
                for token in self.tokens
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
                for word in self.words
            ],
        }

    @classmethod
    def _rebuild(cls, document: Mapping[str, Any], settings: ExplanationSettings) -> Self:
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
                    scores=_weighed(positive, negative, settings.layer_weights, settings.beta),
                )
            )
        rebuilt = cls(
            texts=tuple(document["texts"]),
            tokens=tuple(tokens),
            seen=tuple((start, end) for start, end in document["seen"]),
            target=document["target"],
            probabilities=tuple(document["probabilities"]),
            settings=settings,
        )
        # One comparison finds what is missing, what is too much, and every sum that is not the sum of its terms.
        # Numbers are written with all their digits and added up exactly, so that nothing but damage can differ.
        if rebuilt._document() != document:
            raise ValueError("an explanation does not follow from its own evidence")
        return rebuilt


@dataclass(frozen=True, repr=False)
class Explanation(Sequence[TextExplanation]):
    """Explanations of a batch of texts, in order: a sequence of `TextExplanation`.

    Attributes:
        items: One per text.
        settings: What they share; stays known when there are none.

    Raises:
        TypeError: A value is of another type.
        ValueError: An item has other settings, or another number of classes than the first.
    """

    items: tuple[TextExplanation, ...]
    settings: ExplanationSettings

    def __post_init__(self) -> None:
        if not isinstance(self.settings, ExplanationSettings):
            raise TypeError(f"settings must be ExplanationSettings, got {type(self.settings).__name__}")
        object.__setattr__(self, "items", _tuple("items", self.items))
        for index, item in enumerate(self.items):
            if not isinstance(item, TextExplanation):
                raise TypeError(f"items[{index}] must be a TextExplanation, got {type(item).__name__}")
            for field in fields(self.settings):
                wanted, given = getattr(self.settings, field.name), getattr(item.settings, field.name)
                if given != wanted:
                    raise ValueError(f"items[{index}].settings.{field.name} must be {wanted}, got {given}")
            classes = len(self.items[0].probabilities)
            if len(item.probabilities) != classes:
                raise ValueError(
                    f"items[{index}].probabilities must hold {classes} numbers, got {len(item.probabilities)}"
                )

    @classmethod
    def from_evidence(
        cls,
        texts: Sequence[str] | Sequence[tuple[str, str]],
        *,
        offsets: Tensor | Sequence[Sequence[tuple[int, int]]],
        word_ids: Sequence[Sequence[int | None]],
        sequence_ids: Sequence[Sequence[int | None]],
        positive: Sequence[Tensor],
        negative: Sequence[Tensor],
        probabilities: Tensor,
        target: int | Tensor | None = None,
        layer_names: Sequence[str],
        class_names: Sequence[str] = (),
        beta: float = 0.0,
        layers: Layers = 3,
        layer_weights: Sequence[float] | None = None,
        decay: float = 1.0,
    ) -> Self:
        """Put together what a tokenizer and a model gave for one batch.

        Args:
            texts: B texts, or B pairs, as they were given to the tokenizer.
            offsets: (B, T, 2), where each token lies in its text, in characters: `encoding["offset_mapping"]`.
            word_ids: B lists of T: `encoding.word_ids(i)`.
            sequence_ids: B lists of T: `encoding.sequence_ids(i)`. Tokens with None carry no score and are left out.
            positive: L tensors (B, T), evidence for the target before beta and the layer weights, shallow to deep: of
                all layers, also those that are not added up, so that `reweighted` can take them in.
            negative: The same for evidence against it; values carry their sign.
            probabilities: (B, K).
            target: The class explained: (B,), or one for all; None means the predicted one.
            layer_names: L names.
            class_names: K names, or none.
            beta: How much negative evidence counts, in [0, 1].
            layers: How many of the first layers are added up (later ones over-smooth), or their indices, or "all".
            layer_weights: One number for each layer that is added up; None means decay^(their number - place).
            decay: In [0, 1]; 1 weighs all layers alike. Not used when `layer_weights` is given.

        Returns:
            The explanation. What lies outside the tokens of a text counts as not seen by the model, unless it is
            nothing but white space, controls and marks, which tokenizers drop from any text.

        Raises:
            TypeError: An argument is of another type.
            ValueError: An argument's shape or value does not fit the others.
        """
        plus, minus = _stacked("positive", positive), _stacked("negative", negative)
        if plus.shape != minus.shape:
            raise ValueError(
                f"negative must have the shapes of positive, {tuple(plus.shape)}, got {tuple(minus.shape)}"
            )
        batch, length, count = plus.shape
        weights = _spread_weights(layers, layer_weights, count=count, decay=decay)
        settings = ExplanationSettings(
            layer_names=_tuple("layer_names", layer_names),
            layer_weights=weights,
            beta=beta,
            class_names=_tuple("class_names", class_names),
        )
        if len(settings.layer_names) != count:
            raise ValueError(f"layer_names must hold one name per layer ({count}), got {len(settings.layer_names)}")
        parts = [(text,) if isinstance(text, str) else _tuple("texts[i]", text) for text in _tuple("texts", texts)]
        spans = offsets.tolist() if isinstance(offsets, Tensor) else offsets
        for name, given in (
            ("texts", parts),
            ("offsets", spans),
            ("word_ids", word_ids),
            ("sequence_ids", sequence_ids),
        ):
            if len(given) != batch:
                raise ValueError(f"{name} must have one entry per text of the batch ({batch}), got {len(given)}")
        for name, lists in (("offsets", spans), ("word_ids", word_ids), ("sequence_ids", sequence_ids)):
            for index, row in enumerate(lists):
                if len(row) != length:
                    raise ValueError(f"{name}[{index}] must have one entry per token ({length}), got {len(row)}")
        chances, targets = _check_classes(probabilities, target, batch=batch)
        shares = torch.tensor(weights, dtype=torch.float64) * (plus + settings.beta * minus)
        items = []
        for index in range(batch):
            rows = zip(
                spans[index],
                word_ids[index],
                sequence_ids[index],
                plus[index].tolist(),
                minus[index].tolist(),
                shares[index].tolist(),
                strict=True,
            )
            tokens = _tokens(rows, parts[index])
            items.append(
                TextExplanation(
                    texts=parts[index],
                    tokens=tokens,
                    seen=tuple(_seen(text, tokens, part) for part, text in enumerate(parts[index])),
                    target=targets[index],
                    probabilities=tuple(chances[index]),
                    settings=settings,
                )
            )
        return cls(tuple(items), settings)

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """One explanation of all texts, in order.

        Args:
            parts: Explanations by one model, weighed alike.

        Raises:
            ValueError: There are none, or their settings differ.
        """
        if not parts:
            raise ValueError("parts must hold at least one explanation, got none")
        return cls(tuple(item for part in parts for item in part), parts[0].settings)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[TextExplanation]:
        return iter(self.items)

    @overload
    def __getitem__(self, index: int) -> TextExplanation: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> TextExplanation | Self:
        """One text's explanation, or a slice of the batch."""
        return replace(self, items=self.items[index]) if isinstance(index, slice) else self.items[index]

    def reweighted(
        self, *, beta: float | None = None, layers: Layers | None = None, layer_weights: Sequence[float] | None = None
    ) -> Self:
        """The same explanation with another beta or other layer weights, without the model.

        Args:
            beta: In [0, 1]; None keeps it.
            layers: How many of the first layers are added up, or their indices, or "all"; None keeps them, or means all
                where `layer_weights` is given.
            layer_weights: One number for each of `layers`; None keeps them, or means 1 each where `layers` is given.

        Raises:
            TypeError: An argument is of another type.
            ValueError: An argument's value does not fit.
        """
        settings = self.settings.reweighted(beta=beta, layers=layers, layer_weights=layer_weights)
        return replace(self, items=tuple(item._with(settings) for item in self), settings=settings)

    def to_html(self) -> str:
        """One page of HTML that needs nothing else, see `mhex_text.rendering.html_page`."""
        return rendering.html_page(self)

    def save_html(self, path: str | Path) -> Path:
        """Write `to_html` to a file, in one step.

        Returns:
            The path written.
        """
        page = self.to_html().encode()
        return write_atomically(path, lambda temporary: temporary.write_bytes(page))

    def print(self, file: TextIO | None = None, *, colour: bool | None = None) -> None:
        """Write it for people to read: each text, its strongest words and their scores.

        Args:
            file: Where to; None means the standard output.
            colour: Whether words have a background. None means where `file` is a terminal that has colours, see
                `mhex_text.rendering.colour_depth`.
        """
        rendering.write_terminal(self, sys.stdout if file is None else file, colour=colour)

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON.

        The object has these keys:

        - `format`: "mhex-text-explanation"; `version`: 1.
        - `beta`; `layer_names` and `layer_weights`: L each; `class_names`: K, or empty.
        - `explanations`: one object per text:

          - `texts`: one or two strings; `seen`: for each the positions [start, end] between which the model read it;
            `truncated`: how many characters it did not see.
          - `target`, `prediction`: class indices; `probabilities`: K numbers.
          - `tokens`: objects with `text`, `start`, `end`, `part` (0 or 1, which text), `word`, and `positive`,
            `negative`, `scores` (L numbers each) and `score`, as in `Token`.
          - `words`: objects with `text`, `start`, `end`, `part`, `scores` and `score`, as in `Word`.

        Positions count Unicode code points, not the UTF-16 units of JavaScript. All numbers are finite.

        Args:
            path: A file to write it to as well, as UTF-8 and in one step.

        Returns:
            The text.
        """
        document = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "beta": self.settings.beta,
            "layer_names": list(self.settings.layer_names),
            "layer_weights": list(self.settings.layer_weights),
            "class_names": list(self.settings.class_names),
            "explanations": [item._document() for item in self],
        }
        text = json.dumps(document, ensure_ascii=False, allow_nan=False)
        if path is not None:
            write_atomically(path, lambda temporary: temporary.write_bytes(text.encode()))
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> Self:
        """Read what `to_json` wrote.

        Args:
            source: The path of a file, or the text itself (a str that begins with "{").

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
                f"source must be of version {FORMAT_VERSION} or older, got version {version}, "
                "which a newer mhex-text has written"
            )
        try:
            return cls._rebuild(document)
        except _DAMAGE as error:
            raise ValueError(_damaged(where, error)) from error

    def __str__(self) -> str:
        return rendering.terminal_text(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(of {len(self)} texts, {self.settings})"

    def _repr_html_(self) -> str:
        return rendering.html_fragment(self)

    @classmethod
    def _rebuild(cls, document: Mapping[str, Any]) -> Self:
        shared = {"beta", "layer_names", "layer_weights", "class_names"}
        if document.keys() != shared | {"format", "version", "explanations"}:
            raise ValueError(f"keys {sorted(document)}")
        settings = ExplanationSettings(**{name: document[name] for name in shared})
        return cls(tuple(TextExplanation._rebuild(item, settings) for item in document["explanations"]), settings)


def _weighed(
    positive: Sequence[float], negative: Sequence[float], weights: Sequence[float], beta: float
) -> tuple[float, ...]:
    """lambda_l (p_l + beta n_l) of one token."""
    return tuple(
        weight * (plus + beta * minus) for plus, minus, weight in zip(positive, negative, weights, strict=True)
    )


def _spread_weights(
    layers: Layers, layer_weights: Sequence[float] | None, *, count: int, decay: float = 1.0
) -> tuple[float, ...]:
    """One weight for each of all layers, 0 for those that are not chosen."""
    chosen = _checks.chosen_layers(layers, count)
    if layer_weights is None:
        share = _checks.number("decay", decay, low=0, high=1)
        given = tuple(share ** (len(chosen) - 1 - place) for place in range(len(chosen)))
    else:
        given = _checks.numbers("layer_weights", layer_weights)
        if len(given) != len(chosen):
            raise ValueError(f"layer_weights must hold one number per layer ({len(chosen)}), got {len(given)}")
    weights = [0.0] * count
    for index, weight in zip(chosen, given, strict=True):
        weights[index] += weight
    return tuple(weights)


def _stacked(name: str, given: Sequence[Tensor]) -> Tensor:
    """L tensors (B, T) as one, (B, T, L), in double precision on the CPU."""
    layers = _checks.tensors(name, given, ndim=2)
    for index, layer in enumerate(layers):
        if layer.shape != layers[0].shape:
            raise ValueError(
                f"{name}[{index}] must have shape (B, T) = {tuple(layers[0].shape)}, got {tuple(layer.shape)}"
            )
    return torch.stack(layers, dim=2).detach().to(device="cpu", dtype=torch.float64)


def _check_classes(
    probabilities: Tensor, target: int | Tensor | None, *, batch: int
) -> tuple[list[list[float]], list[int]]:
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


def _check_texts(texts: object) -> None:
    if not isinstance(texts, tuple):
        raise TypeError(f"texts must be a tuple of str, got {type(texts).__name__}")
    if len(texts) not in (1, 2):
        raise ValueError(f"texts must hold one text or a pair, got {len(texts)}")
    _names("texts", texts)


def _check_seen(seen: object, texts: tuple[str, ...]) -> None:
    if not isinstance(seen, tuple) or not all(isinstance(span, tuple) and len(span) == 2 for span in seen):
        raise TypeError(f"seen must be a tuple of pairs (start, end), got {seen!r}")
    if len(seen) != len(texts):
        raise ValueError(f"seen must hold one pair per text ({len(texts)}), got {len(seen)}")
    for text, (start, end) in zip(texts, seen, strict=True):
        if not 0 <= _whole("seen", start) <= _whole("seen", end) <= len(text):
            raise ValueError(f"seen must lie in a text of {len(text)} characters, got ({start}, {end})")


def _check_tokens(
    tokens: tuple[Token, ...], texts: tuple[str, ...], seen: tuple[tuple[int, int], ...], *, layers: int
) -> None:
    for index, token in enumerate(tokens):
        if not isinstance(token, Token):
            raise TypeError(f"tokens[{index}] must be a Token, got {type(token).__name__}")
        for name in ("start", "end", "part", "word"):
            _whole(f"tokens[{index}].{name}", getattr(token, name))
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


def _tuple(name: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence, got {type(value).__name__}")
    return tuple(value)


def _names(name: str, value: object) -> tuple[str, ...]:
    checked: list[str] = []
    for index, item in enumerate(_tuple(name, value)):
        if not isinstance(item, str):
            raise TypeError(f"{name}[{index}] must be a str, got {type(item).__name__}")
        # Half of a surrogate pair is no character, and no file could hold it.
        if any("\ud800" <= character <= "\udfff" for character in item):
            raise ValueError(f"{name}[{index}] must hold whole characters, got half of a surrogate pair in {item!r}")
        checked.append(item)
    return tuple(checked)


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return value


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

"""Explanations of a batch of texts.

Letters: B batch, K classes, L layers, T tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO, overload

import torch
from torch import Tensor

from mhex_core.files import write_atomically
from mhex_text import rendering
from mhex_text.explanation.document import read_document, write_document
from mhex_text.explanation.evidence import check_lengths, classes_of, explained_text, head_chances, stacked
from mhex_text.explanation.records import ExplanationSettings, Layers, as_tuple, spread_weights
from mhex_text.explanation.text import TextExplanation, reweigh

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        object.__setattr__(self, "items", as_tuple("items", self.items))
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
        head_probabilities: Sequence[Tensor] = (),
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
            head_probabilities: What each layer's head predicts, L tensors (B, K), or nothing.

        Returns:
            The explanation. What lies outside the tokens of a text counts as not seen by the model, unless it is
            nothing but white space, controls and marks, which tokenizers drop from any text.

        Raises:
            TypeError: An argument is of another type.
            ValueError: An argument's shape or value does not fit the others.
        """
        plus, minus = stacked(positive, negative)
        batch, length, count = plus.shape
        weights = spread_weights(layers, layer_weights, count=count, decay=decay)
        settings = ExplanationSettings(
            layer_names=as_tuple("layer_names", layer_names),
            layer_weights=weights,
            beta=beta,
            class_names=as_tuple("class_names", class_names),
        )
        if len(settings.layer_names) != count:
            raise ValueError(f"layer_names must hold one name per layer ({count}), got {len(settings.layer_names)}")
        parts = [(text,) if isinstance(text, str) else as_tuple("texts[i]", text) for text in as_tuple("texts", texts)]
        spans = offsets.tolist() if isinstance(offsets, Tensor) else offsets
        check_lengths(batch, length, parts, offsets=spans, word_ids=word_ids, sequence_ids=sequence_ids)
        chances, targets = classes_of(probabilities, target, batch=batch)
        heads = head_chances(head_probabilities, batch=batch, classes=probabilities.shape[1], layers=count)
        shares = torch.tensor(weights, dtype=torch.float64) * (plus + settings.beta * minus)
        items = []
        for index, given in enumerate(parts):
            rows = zip(
                spans[index],
                word_ids[index],
                sequence_ids[index],
                plus[index].tolist(),
                minus[index].tolist(),
                shares[index].tolist(),
                strict=True,
            )
            items.append(
                explained_text(
                    given,
                    rows,
                    probabilities=chances[index],
                    target=targets[index],
                    settings=settings,
                    heads=heads[index],
                )
            )
        return cls(tuple(items), settings)

    @classmethod
    def of_no_texts(
        cls,
        *,
        layer_names: Sequence[str],
        class_names: Sequence[str] = (),
        beta: float = 0.0,
        layers: Layers = 3,
        layer_weights: Sequence[float] | None = None,
        decay: float = 1.0,
    ) -> Self:
        """The explanation of no texts, which still knows its settings; the arguments are those of `from_evidence`."""
        evidence = [torch.zeros(0, 1)] * len(layer_names)
        return cls.from_evidence(
            (),
            offsets=(),
            word_ids=(),
            sequence_ids=(),
            positive=evidence,
            negative=evidence,
            probabilities=torch.zeros(0, max(len(class_names), 1)),
            target=torch.zeros(0, dtype=torch.int64),
            layer_names=layer_names,
            class_names=class_names,
            beta=beta,
            layers=layers,
            layer_weights=layer_weights,
            decay=decay,
        )

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
        return replace(self, items=tuple(reweigh(item, settings) for item in self), settings=settings)

    def to_html(
        self,
        *,
        names: Sequence[str] | None = None,
        labels: Sequence[int | str | None] | None = None,
        title: str = "Explanations",
        max_bytes: int | None = None,
    ) -> str:
        """The explorer: one page of HTML that needs nothing else, no server and no network; see `mhex_text.report`.

        Layers and beta are weighed anew in the browser. Where scripts do not run, the page shows the texts as they are
        weighed here.

        Args:
            names: What each text is called; None means by its first words.
            labels: Of each text the true class, its number or its name, or None; None means that none is known.
            title: Of the page.
            max_bytes: What the page may have.

        Raises:
            TypeError: An argument is of another type.
            ValueError: An argument does not fit, or the page does not.
        """
        from mhex_text.reporting import report

        return report(self, names=names, labels=labels, title=title, max_bytes=max_bytes).html

    def save_html(self, path: str | Path, **options: Any) -> Path:
        """Write `to_html`, whose options these are, to a file, in one step.

        Returns:
            The path written.
        """
        page = self.to_html(**options).encode()
        return write_atomically(path, lambda temporary: temporary.write_bytes(page))

    def plot(self, *, width: float = 5.5, font_size: float = 9.0, legend: bool = True) -> Figure:
        """Draw the texts below one another as a figure for print, see `mhex_text.plotting.plot`."""
        from mhex_text.plotting import plot

        return plot(self, width=width, font_size=font_size, legend=legend)

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

        - `format`: "mhex-text-explanation"; `version`: 2.
        - `beta`; `layer_names` and `layer_weights`: L each; `class_names`: K, or empty.
        - `explanations`: one object per text:

          - `texts`: one or two strings; `seen`: for each the positions [start, end] between which the model read it;
            `truncated`: how many characters it did not see.
          - `target`, `prediction`: class indices; `probabilities`: K numbers; `head_probabilities`: for each head K
            numbers, where they are known (not in version 1).
          - `tokens`: objects with `text`, `start`, `end`, `part` (0 or 1, which text), `word`, and `positive`,
            `negative`, `scores` (L numbers each) and `score`, as in `Token`.
          - `words`: objects with `text`, `start`, `end`, `part`, `scores` and `score`, as in `Word`.

        Positions count Unicode code points, not the UTF-16 units of JavaScript. All numbers are finite.

        Args:
            path: A file to write it to as well, as UTF-8 and in one step.

        Returns:
            The text.
        """
        text = write_document(self.items, self.settings)
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
        return read_document(source, cls)

    def __str__(self) -> str:
        return rendering.terminal_text(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(of {len(self)} texts, {self.settings})"

    def _repr_html_(self) -> str:
        from mhex_text.reporting import notebook_html

        return notebook_html(self)

"""The bundle of splits a training run takes, and what its columns must hold.

Letters: K classes.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass

import datasets


@dataclass(frozen=True, kw_only=True)
class TextBundle:
    """The splits of a data set with what there is to know about them.

    Each split has the columns "text" and "label" (class numbers from 0), and "pair" where it holds pairs of texts. A
    split may also have a column "rationale", what people marked as the reasons for its labels: of each text a list of
    spans [start, end] of it, or of the first text of a pair. They count characters (Unicode code points), the end is
    the position after the last one, spans may overlap, and where nobody marked anything the list is empty.

    Attributes:
        name: What the data is called.
        train: Texts to learn from.
        validation: Texts to choose by, or None.
        test: Texts to judge by, or None.
        class_names: Name of each class, by class number.

    Raises:
        TypeError: A value is of another type.
        ValueError: A split has other columns or none of texts, or a label or a span lies outside its range.
    """

    name: str
    train: datasets.Dataset
    validation: datasets.Dataset | None
    test: datasets.Dataset | None
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        names = self.class_names
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"class_names must be a tuple of names, got {names!r}")
        if len(names) < 2 or len(set(names)) != len(names):
            raise ValueError(f"class_names must hold at least two different names, got {names!r}")
        for split, texts in self.splits().items():
            if not isinstance(texts, datasets.Dataset):
                raise TypeError(f"{split} must be a datasets.Dataset, got {type(texts).__name__}")
            there = set(texts.column_names)
            if not {"text", "label"} <= there or ("pair" in there) != self.pairs:
                wanted = "text, pair, label" if self.pairs else "text, label"
                raise ValueError(f"{split} must have the columns {wanted}, got {', '.join(texts.column_names)}")
            if not len(texts):
                raise ValueError(f"{split} must hold at least one text, got none")
            _check_labels(split, list(texts["label"]), len(names))
            if "rationale" in there:
                for place, (text, spans) in enumerate(zip(texts["text"], texts["rationale"], strict=True)):
                    check_rationale(f"{split}['rationale'][{place}]", spans, text)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def pairs(self) -> bool:
        """Whether an example is a pair of texts."""
        return "pair" in self.train.column_names

    def splits(self) -> dict[str, datasets.Dataset]:
        """The splits there are, by name."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: texts for name, texts in found.items() if texts is not None or name == "train"}


def check_rationale(name: str, value: object, text: object) -> None:
    """Refuse what is not a list, possibly empty, of spans [start, end] with 0 <= start < end <= len(text).

    Args:
        name: What it is called in an error.
        value: The spans.
        text: What they are of.

    Raises:
        TypeError: It is no such list, or there is no text.
        ValueError: A span lies elsewhere, or covers nothing.
    """
    if not isinstance(text, str):
        raise TypeError(f"{name} must belong to a text, got {type(text).__name__}")
    if not isinstance(value, list):
        raise TypeError(f"{name} must be a list of spans [start, end], got {reprlib.repr(value)}")
    for span in value:
        if not isinstance(span, list | tuple) or len(span) != 2 or not all(type(place) is int for place in span):
            raise TypeError(f"{name} must hold spans [start, end] of whole numbers, got {reprlib.repr(span)}")
        start, end = span
        if not 0 <= start < end <= len(text):
            raise ValueError(
                f"{name} must hold spans with 0 <= start < end <= {len(text)}, the length of the text, "
                f"got {reprlib.repr(list(span))}"
            )


def _check_labels(split: str, labels: list[object], classes: int) -> None:
    whole = [label for label in labels if isinstance(label, int) and not isinstance(label, bool)]
    if len(whole) != len(labels):
        other = next(label for label in labels if isinstance(label, bool) or not isinstance(label, int))
        raise TypeError(f"{split} must hold labels that are class numbers, got {other!r}")
    if not 0 <= min(whole) <= max(whole) < classes:
        raise ValueError(f"{split} must hold labels in [0, {classes - 1}], got {min(whole)} to {max(whole)}")

"""The usable rows of a file: which columns hold texts, labels and rationales, and which rows are left out."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mhex_text.data.bundle import check_rationale
from mhex_text.data.tables import Record, class_names, read_table

TEXT_NAMES = ("text", "sentence", "content", "review", "document")
LABEL_NAMES = ("label", "labels", "class", "category", "target")
PAIR_NAMES = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("text", "text_pair"), ("text", "pair"))
_RATIONALE_NAMES = ("rationale", "rationales")
_SHOWN = 5  # damaged rows a warning tells of


class UnreadableTextWarning(UserWarning):
    """Rows of a file were left out because they are damaged."""


class Row(NamedTuple):
    """One usable row of a file.

    Attributes:
        text: The text, or the first of a pair.
        pair: The second text of a pair, or None.
        label: The name or the number of the class.
        rationale: Spans [start, end] of `text`, or None where the file has no such column.
    """

    text: str
    pair: str | None
    label: str | int
    rationale: list[list[int]] | None = None


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What the columns are called; None means to look for one by its usual names, see `load_texts`."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None
    rationale: str | None = None

    def given(self) -> dict[str, str]:
        """The columns that are named, by what they hold."""
        return {name: value for name, value in vars(self).items() if value is not None}


def read_rows(path: Path, wanted: Columns) -> list[Row]:
    """The usable rows of one file, with a warning of the others.

    Raises:
        ValueError: A column is not to be found, two are the same, or no row is usable.
    """
    columns, table = read_table(path)
    records = list(table)
    places = _places(columns, wanted, path)
    if "rationale" in places and wanted.rationale is None and not _holds_spans(records, places["rationale"]):
        del places["rationale"]
    rows, damage = [], Damage(path)
    for line, cells in records:
        row, reason = _row(cells, places)
        if row is None:
            damage.add(line, reason)
        else:
            rows.append(row)
    return damage.report(rows)


def label_names(path: Path, wanted: Columns) -> tuple[str, ...] | None:
    """The names that a file has for the numbers in its column of labels, or None."""
    named = class_names(path)
    if not named:
        return None
    columns, _ = read_table(path)
    return named.get(columns[_places(columns, wanted, path)["label"]])


def find_column(argument: str, wanted: str | None, columns: Sequence[str], names: Sequence[str], path: Path) -> int:
    """The place of a column that is given, or has one of these names, in capitals or not.

    Raises:
        ValueError: There is none.
    """
    if wanted is not None and wanted in columns:
        return list(columns).index(wanted)
    lower = [column.lower() for column in columns]
    for name in names if wanted is None else (wanted.lower(),):
        if name in lower:
            return lower.index(name)
    raise ValueError(f"{argument} must be one of the columns {', '.join(columns)} of {path.name}, got {wanted!r}")


def why_unusable(text: Any, pair: Any, label: Any) -> str | None:
    """Why a row cannot be used, or None; an empty `pair` counts as missing, None as not wanted."""
    values = [value for value in (text, pair, label) if isinstance(value, str)]
    if any("\udc80" <= letter <= "\udcff" for value in values for letter in value if letter > "\ud7ff"):
        return "not UTF-8"
    # JSON can spell what no file could hold.
    if any("\ud800" <= letter <= "\udfff" for value in values if not value.isascii() for letter in value):
        return "half of a surrogate pair"
    for name, value in (("text", text), ("pair", pair)):
        if (name == "text" or value is not None) and not (isinstance(value, str) and value.strip()):
            return f"no {name}"
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        return "no label"
    return None


class Damage:
    """The rows of a file that are left out."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self.shown: list[str] = []

    def add(self, line: int, reason: str) -> None:
        """Leave a row out."""
        self.count += 1
        if len(self.shown) < _SHOWN:
            self.shown.append(f"line {line}: {reason}")

    def report(self, rows: list[Row]) -> list[Row]:
        """The rows that are left, with a warning of the others.

        Raises:
            ValueError: None is left.
        """
        shown = "; ".join(self.shown) + ("; ..." if self.count > len(self.shown) else "")
        if not rows:
            raise ValueError(f"{self.path} must hold at least one usable row, got none ({shown or 'it is empty'})")
        if self.count:
            what = f"{self.path}: left out {self.count} of {self.count + len(rows)} rows ({shown})"
            warnings.warn(what, UnreadableTextWarning, stacklevel=4)  # where load_texts was called
        return rows


def _places(columns: Sequence[str], wanted: Columns, path: Path) -> dict[str, int]:
    """Where text, label and, if there are any, pair and rationale stand."""
    text, pair = wanted.text, wanted.pair
    lower = [name.lower() for name in columns]
    if text is None and pair is None:
        text, pair = next((names for names in PAIR_NAMES if set(names) <= set(lower)), (None, None))
    places = {"text": find_column("text", text, columns, TEXT_NAMES, path)}
    if pair is not None:
        places["pair"] = find_column("pair", pair, columns, (), path)
    places["label"] = find_column("label", wanted.label, columns, LABEL_NAMES, path)
    if wanted.rationale is not None:
        places["rationale"] = find_column("rationale", wanted.rationale, columns, (), path)
    else:
        free = [lower.index(name) for name in _RATIONALE_NAMES if name in lower]
        free = [place for place in free if place not in places.values()]
        places |= {"rationale": free[0]} if free else {}
    if len(set(places.values())) != len(places):
        names = ", ".join(f"{name}={columns[place]!r}" for name, place in places.items())
        raise ValueError(f"text, pair, label and rationale must be different columns, got {names}")
    return places


def _holds_spans(records: Sequence[Record], place: int) -> bool:
    """Whether a column has a list in any row, or nothing in all. It may also hold reasons in words."""
    cells = [record[place] for _, record in records if isinstance(record, list) and not _is_blank(record[place])]
    return not cells or any(isinstance(_spans(cell), list) for cell in cells)


def _row(cells: list[Any] | str, places: dict[str, int]) -> tuple[Row | None, str]:
    """A row, or None and why it cannot be used."""
    if isinstance(cells, str):
        return None, cells
    held = {name: cells[place] for name, place in places.items()}
    text: Any = held.get("text")
    pair: Any = held.get("pair")
    label: Any = held.get("label")
    if pair is None and "pair" in places:
        pair = ""
    if isinstance(label, str):
        label = label.strip()
    elif isinstance(label, bool) or (isinstance(label, float) and label.is_integer()):
        label = int(label)  # what tables make of whole numbers with gaps between them
    reason = why_unusable(text, pair, label)
    if reason is not None:
        return None, reason
    if "rationale" not in places:
        return Row(text, pair, label), ""
    try:
        spans = _spans(held["rationale"])
        check_rationale("rationale", spans, text)
    except (TypeError, ValueError) as error:
        return None, str(error)
    return Row(text, pair, label, [list(span) for span in spans]), ""


def _is_blank(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _spans(cell: Any) -> Any:
    """What a cell of rationales holds: nothing means that nobody marked anything, a text is JSON."""
    if _is_blank(cell):
        return []
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):  # RecursionError: brackets nested by the thousand
        return cell

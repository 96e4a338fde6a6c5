"""Texts without labels, to be explained: one per line, or out of a table; damaged ones are named, not fatal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mhex_text.data.rows import PAIR_NAMES, TEXT_NAMES, find_column, why_unusable
from mhex_text.data.tables import ENDINGS, Record, read_table, text_lines


@dataclass(frozen=True, kw_only=True)
class UnlabelledTexts:
    """The texts of a file.

    Attributes:
        texts: N texts, or N pairs of texts.
        lines: Where each begins in the file, from 1 (in a Parquet file: its row).
        rejected: The same of what could not be read, with the reason.
    """

    texts: tuple[str, ...] | tuple[tuple[str, str], ...]
    lines: tuple[int, ...]
    rejected: tuple[tuple[int, str], ...]


def read_texts(path: str | Path, *, text: str | None = None, pair: str | None = None) -> UnlabelledTexts:
    """Read texts without labels.

    Args:
        path: A file with the ending .txt, one text per line, empty lines left aside; or a CSV file with a header, a
            JSON Lines or a Parquet file.
        text: The column of the texts. None finds text, sentence, content, review or document.
        pair: The column of second texts. None finds sentence1 and sentence2, premise and hypothesis, text and
            text_pair or pair, unless `text` is given.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The file has another ending, or a column is not to be found.
        FileNotFoundError: There is no such file.
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"path must be a path, got {type(path).__name__}")
    for argument, value in (("text", text), ("pair", pair)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{argument} must be the name of a column or None, got {type(value).__name__}")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file, and there is no {path}")
    if path.suffix.lower() == ".txt":
        if text is not None or pair is not None:
            raise ValueError(f"text and pair name columns, and {path.name} has none")
        return from_lines(text_lines(path))
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"path must have one of the endings .txt, {', '.join(ENDINGS)}, got {path.name}")
    columns, records = read_table(path)
    if text is None and pair is None:
        lower = {name.lower() for name in columns}
        text, pair = next((names for names in PAIR_NAMES if lower.issuperset(names)), (None, None))
    place = find_column("text", text, columns, TEXT_NAMES, path)
    other = None if pair is None else find_column("pair", pair, columns, (), path)
    if place == other:
        raise ValueError(f"text and pair must be different columns, got {text!r} and {pair!r}")
    return _usable(records, place, other)


def from_lines(lines: list[str]) -> UnlabelledTexts:
    """One text per line; empty lines are left aside."""
    stripped = ((number, line.strip()) for number, line in enumerate(lines, 1))
    return _usable(((number, [line]) for number, line in stripped if line), 0, None)


def _usable(records: Iterable[Record], place: int, other: int | None) -> UnlabelledTexts:
    singles: list[str] = []
    pairs: list[tuple[str, str]] = []
    lines, rejected = [], []
    for line, cells in records:
        if isinstance(cells, str):
            rejected.append((line, cells))
            continue
        first = cells[place]
        # Nothing in the place of a second text is one that is missing.
        second = None if other is None else (cells[other] or "")
        reason = why_unusable(first, second, 0)
        if reason is not None:
            rejected.append((line, reason))
            continue
        lines.append(line)
        if second is None:
            singles.append(first)
        else:
            pairs.append((first, second))
    texts = tuple(singles) if other is None else tuple(pairs)
    return UnlabelledTexts(texts=texts, lines=tuple(lines), rejected=tuple(rejected))

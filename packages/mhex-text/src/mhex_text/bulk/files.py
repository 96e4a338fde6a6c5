"""Files of texts by their kind: which columns they have, where their records lie, and what a record says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from pyarrow import parquet

from mhex_text.data.lines import TOO_LONG, csv_cells, csv_records, decoded, delimiter_of, lines
from mhex_text.data.rows import why_unusable

KINDS = {".txt": "txt", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""The kind of a file by its ending."""

JSON_SAMPLE = 1000
"""So many records of a JSON Lines file say what its columns are; a record may lack some."""

Read: TypeAlias = tuple[str, ...] | str
"""A text or a pair of texts as a tuple; or, as a str, why there is none."""


class Listed(NamedTuple):
    """One record of a file.

    Attributes:
        number: The number of its first line, or its row, from 1.
        place: The offset of its first byte, or its row from 0.
        length: Its bytes, or -1.
        key: What stands in the column of names, or None.
        problem: Why it cannot be read, where listing found that out.
    """

    number: int
    place: int
    length: int
    key: Any = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which of a file's columns are read.

    Attributes:
        columns: The names of all.
        text: The place of the texts.
        pair: The place of the second texts, or None.
        key: The place of the records' names, or None.
        delimiter: What stands between the cells of a CSV file.
    """

    columns: tuple[str, ...] = ("text",)
    text: int = 0
    pair: int | None = None
    key: int | None = None
    delimiter: str = ","

    def read(self, cells: Sequence[Any] | None) -> Read:
        """A record's text or pair, or why it is not usable; None is a damaged record."""
        if cells is None:
            return f"not a row of {len(self.columns)} columns"
        first = cells[self.text]
        second = None if self.pair is None else (cells[self.pair] or "")
        reason = why_unusable(first, second, 0)
        if reason is not None:
            return reason
        return (first,) if second is None else (first, second)


def columns_of(path: Path, kind: str) -> tuple[str, ...]:
    """The names of a table's columns.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It has no columns.
    """
    if kind == "parquet":
        with parquet.ParquetFile(path) as table:
            return tuple(table.schema_arrow.names)
    with path.open("rb") as file:
        if kind == "csv":
            header = next(csv_records(file, delimiter=delimiter_of(path)), None)
            if header is None or header.cells is None:
                raise ValueError(f"{path} must begin with a row of column names, and that is damaged or missing")
            return tuple(name.strip() for name in header.cells)
        filled = (line for line in lines(file) if line.data is None or line.data.strip())
        found: dict[str, None] = {}
        for line in islice(filled, JSON_SAMPLE):
            found |= dict.fromkeys(_object(line.data) or ())
    if not found:
        raise ValueError(f"{path} must hold a JSON object per line, got none")
    return tuple(found)


def listed(path: Path, kind: str, layout: Layout) -> Iterator[Listed]:
    """The records of a file, in their order."""
    if kind == "parquet":
        yield from _parquet_rows(path, layout)
        return
    with path.open("rb") as file:
        if kind == "csv":
            records = csv_records(file, delimiter=layout.delimiter)
            next(records)
            for record in records:
                where = (record.number, record.place, record.length)
                if record.cells is None:
                    yield Listed(*where, problem=record.problem)
                else:
                    yield Listed(*where, key=None if layout.key is None else record.cells[layout.key])
            return
        for line in lines(file):
            if line.data is None:
                yield Listed(*line[:3], problem=TOO_LONG)
            elif kind == "txt" and decoded(line.data).strip():
                yield Listed(*line[:3])
            elif kind == "json" and line.data.strip():
                found = None if layout.key is None else _object(line.data)
                yield Listed(*line[:3], key=None if found is None else found.get(layout.columns[layout.key or 0]))


def parser(kind: str, layout: Layout) -> Callable[[bytes], Read]:
    """What reads the bytes of one record of such a file."""

    def table_cells(data: bytes) -> list[str] | None:
        cells = csv_cells(data, layout.delimiter)
        return cells if cells is not None and len(cells) == len(layout.columns) else None

    def json_cells(data: bytes) -> list[Any] | None:
        found = _object(data)
        return None if found is None else [found.get(name) for name in layout.columns]

    def text_cells(data: bytes) -> list[str]:
        return [decoded(data).strip()]

    cells = {"csv": table_cells, "json": json_cells, "txt": text_cells}[kind]
    return lambda data: layout.read(cells(data))


def _object(data: bytes | None) -> dict[str, Any] | None:
    try:
        found = json.loads(decoded(data or b""))
    except (ValueError, RecursionError):  # RecursionError: brackets nested by the thousand
        return None
    return found if isinstance(found, dict) else None


def _parquet_rows(path: Path, layout: Layout) -> Iterator[Listed]:
    with parquet.ParquetFile(path) as table:
        if layout.key is None:
            for row in range(table.metadata.num_rows):
                yield Listed(row + 1, row, -1)
            return
        row = 0
        for batch in table.iter_batches(batch_size=4096, columns=[layout.columns[layout.key]]):
            for key in values_of(batch.column(0)):
                yield Listed(row + 1, row, -1, key=key)
                row += 1


def values_of(column: Any) -> list[Any]:
    """The values of a column; what is not UTF-8 becomes lone surrogates."""
    try:
        found: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        found = [_value(cell) for cell in column]
    return found


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        # What every other kind of file gives for bytes that are not UTF-8.
        return decoded(cell.as_buffer().to_pybytes())

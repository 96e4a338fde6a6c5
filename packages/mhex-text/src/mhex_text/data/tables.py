"""The records of a CSV, JSON Lines or Parquet file, where a damaged one never takes the others along."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

ENDINGS = (".csv", ".jsonl", ".json", ".parquet")

Record = tuple[int, Sequence[Any] | None]
"""The number of a record's first line, from 1, and its cells; None for the cells of a damaged one."""


def read_table(path: Path) -> tuple[list[str], Iterator[Record]]:
    """The names of a file's columns, and its records.

    Raises:
        ValueError: The file has another ending, or nothing in it can be read.
    """
    kind = path.suffix.lower()
    if kind not in ENDINGS:
        raise ValueError(f"source must have one of the endings {', '.join(ENDINGS)}, got {path.name}")
    if kind == ".csv":
        return _csv_table(path)
    return _parquet_table(path) if kind == ".parquet" else _json_table(path)


def text_lines(path: Path) -> list[str]:
    """The lines of a file with their ends; what is not UTF-8 becomes lone surrogates, and spoils its own row alone."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        return list(file)


def csv_records(
    lines: list[str], *, skip: bool = False, width: int | None = None
) -> Iterator[tuple[int, list[str] | None]]:
    """The records of a CSV file's lines.

    A quotation mark that is never closed would swallow all rows to the end. So only the first line of a damaged record
    is given up, and reading goes on with the second.

    Args:
        lines: As `text_lines` gives them.
        skip: Whether the first record, a header, is left out.
        width: How many cells a record must have; None takes any number.
    """
    start, headed = 0, skip
    while start < len(lines):
        reader = csv.reader((lines[index] for index in range(start, len(lines))), strict=True)
        begin = first = start
        while True:
            try:
                cells = next(reader, None)
            except csv.Error:
                cells = []
                damaged = True
            else:
                if cells is None:
                    return
                damaged = bool(cells) and width is not None and len(cells) != width
            end = begin + reader.line_num
            if damaged:
                yield first + 1, None
                start = first + 1
                break
            if cells and headed:
                headed = False
            elif cells:
                yield first + 1, cells
            first = end


def _csv_table(path: Path) -> tuple[list[str], Iterator[Record]]:
    lines = text_lines(path)
    _, header = next(csv_records(lines), (0, None))
    if header is None:
        raise ValueError(f"{path} must begin with a row of column names, and that is damaged or missing")
    columns = [name.strip() for name in header]
    return columns, csv_records(lines, skip=True, width=len(columns))


def _json_table(path: Path) -> tuple[list[str], Iterator[Record]]:
    objects: list[tuple[int, dict[str, Any] | None]] = []
    columns: dict[str, None] = {}
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line.decode("utf-8", errors="surrogateescape"))
        except (ValueError, RecursionError):  # RecursionError: brackets nested by the thousand
            found = None
        objects.append((number, found if isinstance(found, dict) else None))
        if isinstance(found, dict):
            columns |= dict.fromkeys(found)
    if not columns:
        raise ValueError(f"{path} must hold a JSON object per line, got none")
    names = list(columns)
    return names, (
        (number, None if found is None else [found.get(name) for name in names]) for number, found in objects
    )


def _parquet_table(path: Path) -> tuple[list[str], Iterator[Record]]:
    try:
        table = parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} must be a Parquet file: {str(error).splitlines()[0]}") from error
    values = [column.to_pylist() for column in table.columns]
    return list(table.column_names), ((number, cells) for number, cells in enumerate(zip(*values, strict=True), 1))

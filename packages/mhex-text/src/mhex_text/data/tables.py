"""The records of a CSV, JSON Lines or Parquet file, where a damaged one never takes the others along."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from mhex_text.data.lines import csv_records, decoded, delimiter_of, lines

ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".arrow")

Record = tuple[int, list[Any] | str]
"""The number of a record's first line, from 1, and its cells; or, as a str, why it has none."""


def read_table(path: Path) -> tuple[list[str], Iterator[Record]]:
    """The names of a file's columns, and its records.

    Raises:
        ValueError: The file has another ending, or nothing in it can be read.
    """
    kind = path.suffix.lower()
    if kind not in ENDINGS:
        raise ValueError(f"source must have one of the endings {', '.join(ENDINGS)}, got {path.name}")
    if kind in (".csv", ".tsv"):
        return _csv_table(path)
    return _arrow_table(path) if kind in (".parquet", ".arrow") else _json_table(path)


def class_names(path: Path) -> dict[str, tuple[str, ...]]:
    """The names of the classes that a column numbers, as the datasets library notes them in Parquet and Arrow files."""
    if path.suffix.lower() not in (".parquet", ".arrow"):
        return {}
    try:
        noted = json.loads((_read(path).schema.metadata or {}).get(b"huggingface", b"{}"))
        features = noted.get("info", {}).get("features", {})
        kinds = {name: kind for name, kind in features.items() if isinstance(kind, dict)}
    except (AttributeError, ValueError, RecursionError):  # notes of somebody else, or damaged ones
        return {}
    found = {name: kind.get("names") for name, kind in kinds.items() if kind.get("_type") == "ClassLabel"}
    return {
        name: tuple(names)
        for name, names in found.items()
        if isinstance(names, list) and len(names) > 1 and all(isinstance(one, str) for one in names)
    }


def text_lines(path: Path) -> list[str]:
    """The lines of a file with their ends; what is not UTF-8 becomes lone surrogates, and spoils its own row alone."""
    with path.open("rb") as file:
        return [decoded(line.data or b"") for line in lines(file, longest=sys.maxsize)]


def csv_table(path: Path, *, delimiter: str | None = None) -> Iterator[Record]:
    """The records of a CSV file, its header first; None finds out what stands between its cells."""
    with path.open("rb") as file:
        for record in csv_records(file, delimiter=delimiter or delimiter_of(path)):
            yield record.number, record.problem if record.cells is None else record.cells


def _csv_table(path: Path) -> tuple[list[str], Iterator[Record]]:
    records = csv_table(path)
    _, header = next(records, (0, ""))
    if isinstance(header, str):
        raise ValueError(  # noqa: TRY004 - the reason stands in the place of the cells
            f"{path} must begin with a row of column names, and that is damaged or missing"
        )
    return [name.strip() for name in header], records


def _json_table(path: Path) -> tuple[list[str], Iterator[Record]]:
    objects: list[tuple[int, dict[str, Any] | None]] = []
    columns: dict[str, None] = {}
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):  # RecursionError: brackets nested by the thousand
            found = None
        objects.append((number, found if isinstance(found, dict) else None))
        if isinstance(found, dict):
            columns |= dict.fromkeys(found)
    if not columns:
        raise ValueError(f"{path} must hold a JSON object per line, got none")
    names = list(columns)
    damaged = f"not a row of {len(names)} columns"
    return names, (
        (number, damaged if found is None else [found.get(name) for name in names]) for number, found in objects
    )


def _arrow_table(path: Path) -> tuple[list[str], Iterator[Record]]:
    table, named = _read(path), class_names(path)
    values = [column.to_pylist() for column in table.columns]
    for place, column in enumerate(table.column_names):
        if column in named:  # -1 is what the library has for no label
            values[place] = [None if value == -1 else value for value in values[place]]
    return list(table.column_names), (
        (number, list(cells)) for number, cells in enumerate(zip(*values, strict=True), 1)
    )


def _read(path: Path) -> pa.Table:
    try:
        if path.suffix.lower() == ".parquet":
            return parquet.read_table(path)
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_stream(source).read_all()
    except (OSError, pa.ArrowException) as error:
        kind = "a Parquet file" if path.suffix.lower() == ".parquet" else "a stream of Arrow tables"
        raise ValueError(f"{path} must be {kind}: {str(error).splitlines()[0]}") from error

"""Texts in files: listed in a stream, each with the place where it lies, and read from there by whoever needs it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from mhex_core.bulk.job import ENTRY
from mhex_core.bulk.names import repeated
from mhex_text.bulk.files import KINDS, Layout, Read, columns_of, listed, parser, values_of
from mhex_text.data.lines import delimiter_of
from mhex_text.data.rows import PAIR_NAMES, TEXT_NAMES, find_column

_LISTED_AT_ONCE = 4096
_UNREADABLE = (OSError, ValueError, pa.ArrowException)


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """The texts of some files; made by `open_source`. It is small, and can be sent to other processes.

    Attributes:
        folder: Where the files lie, absolute.
        files: Their names, in the order in which they are read.
        kind: "txt", "csv", "json" or "parquet".
        text: The column of the texts; None of text files.
        pair: The column of second texts, or None.
        id_column: The column of the records' names, or None.
    """

    folder: Path
    files: tuple[str, ...]
    kind: str
    text: str | None = None
    pair: str | None = None
    id_column: str | None = None

    @property
    def pairs(self) -> bool:
        """Whether they are pairs of texts."""
        return self.pair is not None

    def entries(self) -> Iterator[pa.RecordBatch]:
        """List the texts, some thousands at a time, in a stream (schema `mhex_core.bulk.ENTRY`).

        An id is "file.csv/12", the line on which the record begins (in a Parquet file: its row), both from 1; or what
        stands in the column of names, if it is a text or a whole number; where that occurs again, file and line are
        added to it. A file that cannot be read is one entry with its problem. With a column of names all files are read
        twice, and what names that occur once leave in memory is eight bytes each.

        Raises:
            ValueError: There is no text at all.
        """
        rows: list[tuple[str, str, int, int, str | None]] = []
        found = False
        suspects = set() if self.id_column is None else repeated(self._keys())
        met: set[str] = set()
        for name in self.files:
            for row in self._listed(self.folder / name, suspects, met):
                rows.append(row)
                if len(rows) == _LISTED_AT_ONCE:
                    yield _entries(rows)
                    rows, found = [], True
        if rows:
            yield _entries(rows)
        elif not found:
            raise ValueError(f"input must hold at least one text, got none in {self.folder} ({', '.join(self.files)})")

    def reader(self) -> SourceReader:
        """What reads the texts of entries, for one process."""
        return SourceReader(self)

    def layout(self, path: Path) -> Layout:
        """Which columns of a file are read.

        Raises:
            OSError: The file cannot be opened.
            ValueError: It has no such columns.
        """
        if self.kind == "txt":
            return Layout()
        columns = columns_of(path, self.kind)
        # Two names for one column were refused when the source was opened; here they may differ in capitals alone.
        return Layout(
            columns=columns,
            text=find_column("text", self.text, columns, (), path),
            pair=None if self.pair is None else find_column("pair", self.pair, columns, (), path),
            key=None if self.id_column is None else find_column("id_column", self.id_column, columns, (), path),
            delimiter=delimiter_of(path) if self.kind == "csv" else ",",
        )

    def _keys(self) -> Iterator[str]:
        for name in self.files:
            try:
                path = self.folder / name
                keys = (_known_as(record.key) for record in listed(path, self.kind, self.layout(path)))
                yield from (key for key in keys if key)
            except _UNREADABLE:
                continue  # listing it says what is wrong

    def _listed(self, path: Path, suspects: set[int], met: set[str]) -> Iterator[tuple[str, str, int, int, str | None]]:
        try:
            for record in listed(path, self.kind, self.layout(path)):
                known_as = f"{path.name}/{record.number}"
                key = _known_as(record.key)
                if key:
                    known_as = f"{key} ({known_as})" if key in met else key
                    if hash(key) in suspects:
                        met.add(key)
                yield known_as, str(path), record.place, record.length, record.problem
        except _UNREADABLE as error:
            yield path.name, str(path), -1, -1, one_line(error)


class SourceReader:
    """Reads the texts of entries. Between calls no file is open, and of a Parquet file the last row group is kept."""

    def __init__(self, source: TextSource) -> None:
        self._source = source
        self._path = ""
        self._layout = Layout()
        self._starts: list[int] = []
        self._group: tuple[int, pa.Table] | None = None

    def __call__(self, entries: pa.RecordBatch) -> list[Read]:
        """Each entry's text or pair as a tuple, or why it has none."""
        found: list[Read] = []
        columns = [entries.column(name).to_pylist() for name in ("source", "place", "length", "problem")]
        for path, some in groupby(zip(*columns, strict=True), key=lambda row: row[0]):
            part = list(some)
            read = iter(self._read(path, [(place, length) for _, place, length, problem in part if problem is None]))
            found += [next(read) if problem is None else problem for *_, problem in part]
        return found

    def _read(self, path: str, wanted: list[tuple[int, int]]) -> list[Read]:
        if not wanted:
            return []
        try:
            self._turn_to(path)
            if self._source.kind == "parquet":
                return [read for number, rows in self._by_group(wanted) for read in self._of_group(number, rows)]
            parse = parser(self._source.kind, self._layout)
            found = []
            with Path(path).open("rb") as file:
                for place, length in wanted:
                    file.seek(place)
                    found.append(parse(file.read(length)))
        except _UNREADABLE as error:
            return [one_line(error)] * len(wanted)
        return found

    def _turn_to(self, path: str) -> None:
        """Know the columns of a file, and the first row of each row group."""
        if path == self._path:
            return
        self._path, self._group = "", None
        self._layout = self._source.layout(Path(path))
        if self._source.kind == "parquet":
            with parquet.ParquetFile(path) as table:
                rows = [table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)]
            self._starts = [0, *accumulate(rows)]
        self._path = path

    def _by_group(self, wanted: list[tuple[int, int]]) -> Iterator[tuple[int, list[int]]]:
        """Row groups and the rows wanted of each, as they are asked for."""
        for number, rows in groupby((row for row, _ in wanted), key=lambda row: bisect_right(self._starts, row) - 1):
            yield number, [row - self._starts[number] for row in rows]

    def _of_group(self, number: int, rows: list[int]) -> list[Read]:
        """Texts of one row group: each may be damaged by itself."""
        if number >= len(self._starts) - 1:  # the file was another one when it was listed
            return ["there is no such row"] * len(rows)
        layout = self._layout
        columns = [layout.columns[place] for place in (layout.text, layout.pair) if place is not None]
        try:
            if self._group is None or self._group[0] != number:
                self._group = None  # not two at once
                with parquet.ParquetFile(self._path) as table:
                    self._group = number, table.read_row_group(number, columns=columns)
            cells = [values_of(self._group[1].column(column).take(rows)) for column in columns]
        except _UNREADABLE as error:
            return [one_line(error)] * len(rows)
        picked = replace(layout, text=0, pair=None if layout.pair is None else 1)
        return [picked.read(row) for row in zip(*cells, strict=True)]


def open_source(
    input: str | Path,  # noqa: A002 - what the command line calls it
    *,
    text: str | None = None,
    pair: str | None = None,
    id_column: str | None = None,
    exclude: str | Path | None = None,
) -> TextSource:
    """Find out what the files of texts are, without reading more than the beginning of one.

    Args:
        input: A file with the ending .txt, one text per line, empty lines left aside; a CSV file with a header, a JSON
            Lines or a Parquet file; or a folder of files of one such kind, taken in the order of their names. Folders
            within it, hidden files, and files with other endings are left aside.
        text: The column of the texts. None finds text, sentence, content, review or document.
        pair: The column of second texts. None finds sentence1 and sentence2, premise and hypothesis, text and
            text_pair or pair, unless `text` is given.
        id_column: The column of the records' names; None names them by file and line.
        exclude: A folder whose files are left aside, such as that of the results.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The input is something else, of no one kind, or a column is not to be found. Columns are looked for
            in the first file that can be read; another one that lacks them is an entry with a problem. Those of a JSON
            Lines file are the keys of its first 1,000 records; a record that lacks one has no text.
        FileNotFoundError: There is no such file or folder.
    """
    for argument, value in (("input", input), ("exclude", exclude)):
        if not isinstance(value, str | Path) and (value is not None or argument == "input"):
            raise TypeError(f"{argument} must be a path, got {type(value).__name__}")
    named = {"text": text, "pair": pair, "id_column": id_column}
    for argument, name in named.items():
        if name is not None and not isinstance(name, str):
            raise TypeError(f"{argument} must be the name of a column or None, got {type(name).__name__}")
    folder, files, kind = _files(Path(input), exclude)
    source = TextSource(folder=folder, files=files, kind=kind)
    if kind == "txt":
        given = [argument for argument, name in named.items() if name is not None]
        if given:
            raise ValueError(f"{' and '.join(given)} must be left out for text files, which have no columns")
        return source
    return _with_columns(source, text, pair, id_column)


def one_line(error: Exception) -> str:
    """What an exception says, as a file can hold it."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(said.split()).encode("utf-8", "backslashreplace").decode()[:300]


def _files(path: Path, exclude: str | Path | None) -> tuple[Path, tuple[str, ...], str]:
    """The folder, the names of the files in it, and their kind."""
    if path.is_dir():
        left_out = None if exclude is None else Path(exclude).resolve()
        names = sorted(
            child.name
            for child in path.iterdir()
            if child.suffix.lower() in KINDS
            and not child.name.startswith(".")
            and child.is_file()
            and not (left_out is not None and child.resolve().is_relative_to(left_out))
        )
        folder = path
    elif path.is_file():
        if path.suffix.lower() not in KINDS:
            raise ValueError(f"input must have one of the endings {', '.join(KINDS)}, got {path.name}")
        names, folder = [path.name], path.parent
    else:
        raise FileNotFoundError(f"input must be a file or a folder, and there is no {path}")
    if not names:
        raise ValueError(f"input must hold files with one of the endings {', '.join(KINDS)}, got {path} without")
    for name in names:
        if one_line(ValueError(name)) != " ".join(name.split())[:300]:
            raise ValueError(f"input must hold files whose names are UTF-8, got {name!r}")
    kinds = sorted({KINDS[Path(name).suffix.lower()] for name in names})
    if len(kinds) > 1:
        raise ValueError(f"input must hold files of one kind, got {' and '.join(kinds)} in {path}")
    return folder.resolve(), tuple(names), kinds[0]


def _with_columns(source: TextSource, text: str | None, pair: str | None, id_column: str | None) -> TextSource:
    """The source with its columns named, as the first file that can be read has them."""
    first: Exception | None = None
    for name in source.files:
        path = source.folder / name
        try:
            columns = columns_of(path, source.kind)
        except _UNREADABLE as error:
            first = first or error
            continue
        wanted, other = text, pair
        if text is None and pair is None:
            lower = {column.lower() for column in columns}
            wanted, other = next((names for names in PAIR_NAMES if lower.issuperset(names)), (None, None))
        place = find_column("text", wanted, columns, TEXT_NAMES, path)
        second = None if other is None else find_column("pair", other, columns, (), path)
        key = None if id_column is None else find_column("id_column", id_column, columns, (), path)
        if place == second:
            raise ValueError(f"text and pair must be different columns, got {wanted!r} and {other!r}")
        return replace(
            source,
            text=columns[place],
            pair=None if second is None else columns[second],
            id_column=None if key is None else columns[key],
        )
    raise ValueError(f"input must hold a file that can be read, got {source.folder}: {one_line(first or ValueError())}")


def _known_as(key: Any) -> str | None:
    """A record's own name, if it has one that a file can hold."""
    if isinstance(key, bool) or not isinstance(key, str | int):
        return None
    name = str(key).strip()
    return name if name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name) else None


def _entries(rows: list[tuple[str, str, int, int, str | None]]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, ENTRY, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=ENTRY)

"""The lines of a file and the records of a CSV file, in a stream, each with the bytes it takes.

What is held at a time is bounded, however long the file, its lines, or what follows a quotation mark that is never
closed.
"""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple

LONGEST_LINE = 1 << 24
"""Bytes; what is longer is no line of text but a file of another kind, or one whose line ends were lost."""

TOO_LONG = f"its line is longer than {LONGEST_LINE >> 20} MiB"

MOST_LINES = 100_000
MOST_BYTES = 1 << 20
"""A CSV record that takes more is not read."""

_LONG_RECORD = f"it is longer than {MOST_BYTES >> 20} MiB or {MOST_LINES:,} lines"

DELIMITERS = ",;\t|"
"""What may stand between the cells of a CSV file; the first of them that its header has does."""

_CHUNK = 1 << 18
_MARK = b"\xef\xbb\xbf"
_QUOTED = re.compile(r'"[^"]*("|$)')
_TO_THE_CLOSING_MARK = re.compile(rb'(?:[^"]|"")*"(?!")')

# The library has one limit for the whole process, and of 131,072 characters.
_LIMIT = Lock()
_LONGEST_CELL = 2**31 - 1


class Line(NamedTuple):
    """One line.

    Attributes:
        number: From 1.
        place: The offset of its first byte in the file.
        length: Its bytes, with those of its end.
        data: The bytes; None of a line longer than `LONGEST_LINE`.
    """

    number: int
    place: int
    length: int
    data: bytes | None


class CsvRecord(NamedTuple):
    """One record of a CSV file.

    Attributes:
        number: The number of its first line, from 1.
        place: The offset of its first byte in the file.
        length: Its bytes, with those of its end; of a damaged one, those of its first line.
        cells: None for one that cannot be read.
        problem: Why it cannot be read.
    """

    number: int
    place: int
    length: int
    cells: list[str] | None
    problem: str = ""


def decoded(data: bytes) -> str:
    """What is not UTF-8 becomes lone surrogates, and spoils its own row alone."""
    return data.decode("utf-8", errors="surrogateescape")


def lines(file: BinaryIO, *, longest: int = LONGEST_LINE) -> Iterator[Line]:
    r"""The lines of a file, which end with "\n", "\r\n" or "\r"; a byte-order mark is left aside.

    Args:
        file: Opened for bytes, at its beginning.
        longest: Of a line that has more bytes only the place is told.

    Raises:
        ValueError: The file is UTF-16 or UTF-32.
    """
    head = file.read(len(_MARK))
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:2]:
        name = Path(str(getattr(file, "name", "file"))).name
        raise ValueError(f"{name} must be UTF-8, got UTF-16; save it as UTF-8, as with iconv -f UTF-16 -t UTF-8 {name}")
    place = len(_MARK) if head == _MARK else 0
    file.seek(place)
    return _lines_from(file, place, 0, longest)


def _lines_from(file: BinaryIO, place: int, number: int, longest: int) -> Iterator[Line]:
    """The lines behind a place, before which there are `number`."""
    tail, dropped = b"", 0
    while True:
        chunk = file.read(_CHUNK)
        parts = (tail + chunk).splitlines(keepends=True)
        # A "\r" at the end of what was read may be half of an end.
        tail = parts.pop() if chunk and parts and not parts[-1].endswith(b"\n") else b""
        for part in parts:
            length = dropped + len(part)
            number, dropped = number + 1, 0
            yield Line(number, place, length, part if length <= longest else None)
            place += length
        if not chunk:
            break
        if len(tail) > longest:
            kept = b"\r" if tail.endswith(b"\r") else b""
            dropped, tail = dropped + len(tail) - len(kept), kept
    if dropped:  # the file ended inside a line of which all was dropped
        yield Line(number + 1, place, dropped, None)


def delimiter_of(path: Path) -> str:
    """What stands between the cells of a CSV file: the first of `DELIMITERS` in its header; a tab in a .tsv file.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is UTF-16 or UTF-32.
    """
    if path.suffix.lower() == ".tsv":
        return "\t"
    with path.open("rb") as file:
        header = next(_from_the_header(lines(file)), None)
    bare = _QUOTED.sub("", "" if header is None else decoded(header.data or b""))
    return next((mark for mark in DELIMITERS if mark in bare), ",")


def csv_cells(data: bytes, delimiter: str) -> list[str] | None:
    """The cells of a record, or None if these bytes are not just one."""
    rows = csv.reader(io.StringIO(decoded(data), newline=""), strict=True, delimiter=delimiter)
    try:
        cells = _next(rows)
        return cells if _next(rows) is None else None
    except csv.Error:
        return None


def csv_records(file: BinaryIO, *, delimiter: str = ",") -> Iterator[CsvRecord]:
    """The records of a CSV file, the header first; the others must have as many cells. Empty ones are left out.

    A quotation mark that is never closed would swallow all rows to the end. So only the first line of a damaged record
    is given up, and reading goes on with the second. One that is closed, but takes more than `MOST_LINES` lines or
    `MOST_BYTES` bytes, is one record that cannot be read.

    Args:
        file: Opened for bytes, at its beginning.
        delimiter: As `delimiter_of` finds it.

    Raises:
        ValueError: The file is UTF-16 or UTF-32.
    """
    source = _from_the_header(lines(file))
    waiting: deque[Line] = deque()
    taken: list[Line] = []
    width: int | None = None
    full = False

    def feed() -> Iterator[str]:
        nonlocal full
        while True:
            # Only a record that is not closed yet asks for more than one line.
            full = len(taken) >= MOST_LINES or (bool(taken) and taken[-1].place - taken[0].place > MOST_BYTES)
            line = None if full else waiting.popleft() if waiting else next(source, None)
            if line is None:
                return
            taken.append(line)
            if line.data is None:
                return
            yield decoded(line.data)

    def reader() -> Any:
        return csv.reader(feed(), strict=True, delimiter=delimiter)

    rows = reader()
    while True:
        try:
            cells = _next(rows)
        except csv.Error:
            cells = None
        if cells is None and not taken:
            return
        first = taken[0]
        if cells is None or (cells and width is not None and len(cells) != width):
            last = None
            if full:
                last = _closing(taken, chain(waiting, source), delimiter, width)
                waiting.clear()
                if last is None:  # all that was looked through is read again
                    file.seek(taken[1].place)
                    source = _lines_from(file, taken[1].place, first.number, LONGEST_LINE)
            else:
                waiting.extendleft(reversed(taken[1:]))
            length = first.length if last is None else last.place + last.length - first.place
            why = TOO_LONG if first.data is None else _LONG_RECORD if last else f"not a row of {width} columns"
            yield CsvRecord(first.number, first.place, length, None, why)
            taken.clear()
            rows = reader()
            continue
        if cells:
            width = len(cells) if width is None else width
            length = taken[-1].place + taken[-1].length - first.place
            yield CsvRecord(first.number, first.place, length, cells)
        taken.clear()


def _next(rows: Any) -> list[str] | None:
    """The next row of the library's reader, however long its cells."""
    with _LIMIT:
        before = csv.field_size_limit(_LONGEST_CELL)
        try:
            found: list[str] | None = next(rows, None)
        finally:
            csv.field_size_limit(before)
    return found


def _from_the_header(source: Iterator[Line]) -> Iterator[Line]:
    """The lines without those before the header that hold nothing."""
    for line in source:
        if line.data is None or line.data.strip(b' \t\r\n,;|"'):
            yield line
            break
    yield from source


def _closing(taken: list[Line], rest: Iterator[Line], delimiter: str, width: int | None) -> Line | None:
    """The line that ends a record whose quotation mark is open behind `taken`; None if none does as it must."""
    for line in rest:
        if line.data is None:
            return None
        if b'"' in line.data and (found := _TO_THE_CLOSING_MARK.match(line.data)):
            ended = b"".join(one.data or b"" for one in taken) + b'"' + line.data[found.end() :]
            cells = csv_cells(ended, delimiter)
            return line if cells is not None and width in (None, len(cells)) else None
    return None

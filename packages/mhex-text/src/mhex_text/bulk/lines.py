"""The lines of a file and the records of a CSV file, in a stream, each with the bytes it takes.

What is held at a time is bounded, however long the file, its lines, or what follows a quotation mark that is never
closed.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

LONGEST_LINE = 1 << 24
"""Bytes; what is longer is no line of text but a file of another kind, or one whose line ends were lost."""

MOST_LINES = 10_000
MOST_BYTES = 1 << 20
"""How far the end of one CSV record is looked for."""

_CHUNK = 1 << 18
_MARK = b"\xef\xbb\xbf"


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
        cells: None for a damaged one.
    """

    number: int
    place: int
    length: int
    cells: list[str] | None


def decoded(data: bytes) -> str:
    """What is not UTF-8 becomes lone surrogates, and spoils its own row alone."""
    return data.decode("utf-8", errors="surrogateescape")


def lines(file: BinaryIO, *, longest: int = LONGEST_LINE) -> Iterator[Line]:
    r"""The lines of a file, which end with "\n", "\r\n" or "\r"; a byte-order mark is left aside.

    Args:
        file: Opened for bytes, at its beginning.
        longest: Of a line that has more bytes only the place is told.
    """
    head = file.read(len(_MARK))
    tail = b"" if head == _MARK else head
    place, number, dropped = (len(_MARK) if head == _MARK else 0), 0, 0
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


def csv_records(source: Iterator[Line]) -> Iterator[CsvRecord]:
    """The records of a CSV file's lines, the header first; the others must have as many cells. Empty ones are left out.

    A quotation mark that is never closed would swallow all rows to the end. So only the first line of a damaged record
    is given up, and reading goes on with the second. The end of a record is looked for within `MOST_LINES` lines and
    `MOST_BYTES` bytes.
    """
    waiting: deque[Line] = deque()
    taken: list[Line] = []
    width: int | None = None

    def feed() -> Iterator[str]:
        while True:
            # Only a record that is not closed yet asks for more than one line.
            if len(taken) >= MOST_LINES or (taken and taken[-1].place - taken[0].place > MOST_BYTES):
                return
            line = waiting.popleft() if waiting else next(source, None)
            if line is None:
                return
            taken.append(line)
            if line.data is None:
                return
            yield decoded(line.data)

    reader = csv.reader(feed(), strict=True)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error:
            cells = None
        if cells is None and not taken:
            return
        first = taken[0]
        if cells is None or (cells and width is not None and len(cells) != width):
            yield CsvRecord(first.number, first.place, first.length, None)
            waiting.extendleft(reversed(taken[1:]))
            taken.clear()
            reader = csv.reader(feed(), strict=True)
            continue
        if cells:
            width = len(cells) if width is None else width
            length = taken[-1].place + taken[-1].length - first.place
            yield CsvRecord(first.number, first.place, length, cells)
        taken.clear()

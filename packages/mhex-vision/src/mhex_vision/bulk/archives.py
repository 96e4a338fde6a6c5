"""The files that hold many images each: one, all in a folder, or all that a pattern names.

A pattern is a path with braces, as WebDataset has it ("shard-{000..012}.tar", "{train,test}.tar"), or with wildcards
(*, ?, []).
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mhex_vision.bulk.listing import Found, is_printable, printable, walk

_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST = 1_000_000  # files that braces may stand for


@dataclass(frozen=True)
class Archives:
    """Files of one kind.

    Attributes:
        place: A file, a folder or a pattern.
        ending: Of the files wanted in a folder.
        exclude: A folder that is left aside.
    """

    place: str
    ending: str
    exclude: Path | None = None

    def files(self) -> Iterator[Found]:
        """The files, by their paths from the folder, or from the last folder that all files of a pattern share."""
        path = Path(self.place)
        if path.is_dir():
            found = walk(path, (self.ending,), self.exclude)
        elif os.path.lexists(path):
            found = iter([Found(os.path.abspath(path), path.name)])  # noqa: PTH100
        else:
            found = _matching(self.place)
        for file in found:
            if is_printable(file.path):
                yield file
            else:
                yield Found(printable(file.path), printable(file.name), "the file's name is not UTF-8 text")


def is_pattern(text: str) -> bool:
    """Whether a path has braces or wildcards."""
    return _BRACES.search(text) is not None or glob.has_magic(text)


def expand(pattern: str) -> Iterator[str]:
    """What the braces of a pattern stand for, in order.

    Raises:
        ValueError: They stand for too many files.
    """
    count = 1
    for found in _BRACES.finditer(pattern):
        count *= len(_choices(found[1]))
        if count > _MOST:
            raise ValueError(f"input must stand for at most {_MOST:,} files, got {pattern}")
    yield from _expanded(pattern)


def _expanded(pattern: str) -> Iterator[str]:
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    for choice in _choices(found[1]):
        yield from _expanded(pattern[: found.start()] + str(choice) + pattern[found.end() :])


class _Numbers:
    """The numbers of "000..012", with their zeros; none is made before it is asked for."""

    def __init__(self, first: str, last: str) -> None:
        low, high = int(first), int(last)
        self._range = range(low, high + 1) if low <= high else range(low, high - 1, -1)
        padded = any(len(text) > 1 and text.startswith("0") for text in (first, last))
        self._width = max(len(first), len(last)) if padded else 0

    def __len__(self) -> int:
        return min(len(self._range), _MOST + 1)

    def __iter__(self) -> Iterator[str]:
        return (str(number).zfill(self._width) for number in self._range)


def _choices(inside: str) -> _Numbers | list[str]:
    span = _RANGE.fullmatch(inside)
    return _Numbers(span[1], span[2]) if span else inside.split(",")


def _matching(pattern: str) -> Iterator[Found]:
    fixed = re.split(r"[*?\[{]", pattern, maxsplit=1)[0]
    base = os.path.abspath(os.path.dirname(fixed) or ".")  # noqa: PTH100, PTH120
    met: set[str] = set()
    for path in (path for text in expand(pattern) for path in _named(text)):
        whole = os.path.abspath(path)  # noqa: PTH100
        if whole in met:
            continue
        met.add(whole)
        name = Path(os.path.relpath(whole, base)).as_posix()
        yield Found(whole, name, None if os.path.isfile(whole) else "no such file")  # noqa: PTH113


def _named(text: str) -> list[str]:
    """One path without wildcards as it is, though it may not exist: braces promised it."""
    return sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else [text]  # noqa: PTH207

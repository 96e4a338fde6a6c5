"""What every source of images is made of: entries, a reader for them, and walking through folders."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import pyarrow as pa
from PIL import Image

from mhex_core.bulk.job import ENTRY

_BATCH = 4096  # entries of a record batch


class Entry(NamedTuple):
    """One input; the fields are those of `mhex_core.bulk.job.ENTRY`."""

    id: str
    source: str
    place: int = -1
    length: int = -1
    problem: str | None = None


class ImageReader(Protocol):
    """Reads images. It may keep one file open between calls, until `close`; it can be sent to another process."""

    def __call__(self, source: str, place: int, length: int) -> Image.Image:
        """Read an entry as 8-bit RGB.

        Raises:
            UnreadableImageError: It cannot be read; the message is the reason alone.
        """
        ...

    def close(self) -> None:
        """Close what is open. The reader can still be used."""
        ...


class ImageSource(Protocol):
    """Where images come from. It holds names only, and can be sent to another process."""

    @property
    def description(self) -> str:
        """What it is, in a few words."""
        ...

    @property
    def reading(self) -> Mapping[str, str | None]:
        """What `mhex_vision.bulk.sources.reader_of` makes the same reader of, for those who read the archive later."""
        ...

    def listed(self) -> Iterator[Entry]:
        """The entries, always in the same order."""
        ...

    def reader(self) -> ImageReader:
        """A reader of them."""
        ...


def in_batches(entries: Iterable[Entry]) -> Iterator[pa.RecordBatch]:
    """Entries as record batches of schema `ENTRY`, some thousands at a time."""
    remaining = iter(entries)
    while some := list(islice(remaining, _BATCH)):
        columns = [pa.array(column, field.type) for column, field in zip(zip(*some, strict=True), ENTRY, strict=True)]
        yield pa.RecordBatch.from_arrays(columns, schema=ENTRY)


def printable(name: str) -> str:
    r"""A file's name as text that can be stored: bytes that are not UTF-8 are shown as \xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def is_printable(name: str) -> bool:
    """Whether a file's name is UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


@cache
def image_endings() -> frozenset[str]:
    """The endings of what Pillow can open, in lower case. What it can only write (PDF, say) is not meant."""
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def ending(name: str) -> str:
    """The ending of a file's name, in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - millions of times, and a Path is slow to make


class Found(NamedTuple):
    """A file in a folder: its path, its name below the folder (with "/"), and why it cannot be read, if so."""

    path: str
    name: str
    problem: str | None = None


def walk(folder: str | Path, endings: Container[str], exclude: str | Path | None = None) -> Iterator[Found]:
    """The files below a folder that have one of these endings, in order of their names, depth first.

    Hidden files and folders are left aside. Links are followed, but no folder is entered through a link twice, nor from
    within itself. No more is held in memory than the names in the folders that are open.

    Args:
        folder: Where to begin.
        endings: In lower case, with the dot.
        exclude: A folder that is left aside.
    """
    top = os.path.abspath(folder)  # noqa: PTH100 - resolving would name files as the user does not
    left_aside = _identity(exclude) if exclude is not None else None
    by_link: set[tuple[int, int]] = set()
    Level = tuple[str, str, tuple[int, int] | None, Iterator[tuple[str, bool, str | None]]]
    levels: list[Level] = []

    def enter(path: str, name: str) -> Found | None:
        try:
            levels.append((path, name, _identity(path), iter(_contents(path, endings))))
        except OSError as error:
            reason = error.strerror or type(error).__name__
            return Found(path, name, f"the folder cannot be read: {reason[0].lower()}{reason[1:]}")
        return None

    problem = enter(top, "")
    if problem is not None:
        yield problem
    while levels:
        path, prefix, _, contents = levels[-1]
        item = next(contents, None)
        if item is None:
            levels.pop()
            continue
        name, is_folder, trouble = item
        below = os.path.join(path, name)  # noqa: PTH118
        if not is_folder:
            yield Found(below, prefix + name, trouble)
            continue
        who = _identity(below)
        if who is not None and (who == left_aside or any(who == level[2] for level in levels)):
            continue
        if who is not None and os.path.islink(below):  # noqa: PTH114
            if who in by_link:
                continue
            by_link.add(who)
        problem = enter(below, f"{prefix}{name}/")
        if problem is not None:
            yield problem


def _contents(folder: str, endings: Container[str]) -> list[tuple[str, bool, str | None]]:
    """What is of interest in a folder, by name: the name, whether it is a folder, and what is wrong with it."""
    wanted: list[tuple[str, bool, str | None]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                wanted.append((entry.name, True, None))
            elif ending(entry.name) in endings:
                # A pipe or a device that is called like an image would be waited for without end.
                if entry.is_file():
                    wanted.append((entry.name, False, None))
                elif entry.is_symlink():
                    wanted.append((entry.name, False, "a link that leads nowhere"))
    wanted.sort()
    return wanted


def _identity(path: str | Path) -> tuple[int, int] | None:
    """What two names of one folder have in common, or None where there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return status.st_dev, status.st_ino


class _Closable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=_Closable)


class KeptOpen(Generic[T]):
    """The file that was asked for last, kept open. What is sent to another process is not the file.

    Args:
        opener: Opens a path; a function of a module.
    """

    def __init__(self, opener: Callable[[str], T]) -> None:
        self._opener = opener
        self._held: list[tuple[str, T]] = []
        # Readers end with their process, which does not say so.
        weakref.finalize(self, _close_all, self._held)

    def __call__(self, path: str) -> T:
        """The open file."""
        if not self._held or self._held[0][0] != path:
            self.close()
            self._held.append((path, self._opener(path)))
        return self._held[0][1]

    def close(self) -> None:
        """Close what is open."""
        _close_all(self._held)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._opener,)


def _close_all(held: list[tuple[str, T]]) -> None:
    while held:
        held.pop()[1].close()

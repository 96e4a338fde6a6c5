"""Images that are files: one, a folder of them, or a list of paths."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mhex_core.bulk.names import repeated
from mhex_vision.bulk.decoding import decode_file
from mhex_vision.bulk.listing import Entry, image_endings, is_printable, printable, walk


class FileReader:
    """Reads image files. It keeps none open."""

    def __call__(self, source: str, place: int, length: int) -> Image.Image:  # noqa: ARG002 - the file is the image
        """Read a file."""
        return decode_file(source)

    def close(self) -> None:
        """There is nothing to close."""


@dataclass(frozen=True)
class SingleFile:
    """One image file.

    Attributes:
        path: The file.
    """

    path: Path

    @property
    def description(self) -> str:
        """What it is."""
        return f"the image {self.path}"

    @property
    def reading(self) -> Mapping[str, str | None]:
        """How its entries are read again."""
        return {"kind": "files"}

    def listed(self) -> Iterator[Entry]:
        """The file, by its name."""
        yield _of_file(os.path.abspath(self.path), self.path.name)  # noqa: PTH100

    def reader(self) -> FileReader:
        """A reader of it."""
        return FileReader()


@dataclass(frozen=True)
class ImageFolder:
    """The images in a folder and below, by their paths from there.

    Attributes:
        path: The folder.
        exclude: A folder that is left aside.
    """

    path: Path
    exclude: Path | None = None

    @property
    def description(self) -> str:
        """What it is."""
        return f"the images in {self.path}"

    @property
    def reading(self) -> Mapping[str, str | None]:
        """How its entries are read again."""
        return {"kind": "files"}

    def listed(self) -> Iterator[Entry]:
        """The files that are called like images, see `walk`."""
        for path, name, problem in walk(self.path, image_endings(), self.exclude):
            yield _of_file(path, name, problem)

    def reader(self) -> FileReader:
        """A reader of them."""
        return FileReader()


@dataclass(frozen=True)
class PathList:
    """A text file with the path of an image on each line, relative ones from the file's folder.

    An input's name is its line. Empty lines are left aside; of equal lines the first is read and the others rejected.

    Attributes:
        path: The text file.
    """

    path: Path

    @property
    def description(self) -> str:
        """What it is."""
        return f"the images listed in {self.path}"

    @property
    def reading(self) -> Mapping[str, str | None]:
        """How its entries are read again."""
        return {"kind": "files"}

    def listed(self) -> Iterator[Entry]:
        """The lines."""
        itself = os.path.abspath(self.path)  # noqa: PTH100
        folder = os.path.dirname(itself)  # noqa: PTH120
        suspects = repeated(line for _, line in self._lines())
        met: set[str] = set()
        for number, line in self._lines():
            if not is_printable(line):
                yield Entry(f"{printable(line)} (line {number})", itself, problem="the line is not UTF-8 text")
                continue
            path = os.path.join(folder, line)  # noqa: PTH118
            if hash(line) in suspects:
                if line in met:
                    yield Entry(f"{line} (line {number})", path, problem=f"listed twice (line {number})")
                    continue
                met.add(line)
            yield Entry(line, path)

    def reader(self) -> FileReader:
        """A reader of them."""
        return FileReader()

    def _lines(self) -> Iterator[tuple[int, str]]:
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                stripped = line.strip()
                if stripped:
                    yield number, stripped


def _of_file(path: str, name: str, problem: str | None = None) -> Entry:
    if is_printable(path):
        return Entry(name, path, problem=problem)
    return Entry(printable(name), printable(path), problem="the file's name is not UTF-8 text")

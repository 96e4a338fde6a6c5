"""Images in tar files, as WebDataset packs them. They are listed once with their places, and read from there."""

from __future__ import annotations

import tarfile
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from mhex_vision.bulk.archives import Archives
from mhex_vision.bulk.decoding import decode_bytes, reason_of
from mhex_vision.bulk.listing import Entry, KeptOpen, ending, image_endings, printable
from mhex_vision.data.preprocessing import UnreadableImageError

ENDING = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")

_BLOCK = tarfile.BLOCKSIZE
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
# What tarfile is known to raise on damaged headers, apart from its own errors.
_HEADER_ERRORS = (tarfile.TarError, OSError, ValueError, LookupError, OverflowError, EOFError, TypeError)


class TarReader:
    """Reads members of tar files. It keeps the last file open."""

    def __init__(self) -> None:
        self._files: KeptOpen[BinaryIO] = KeptOpen(_open)

    def __call__(self, source: str, place: int, length: int) -> Image.Image:
        """Read the member whose `length` bytes begin at `place`."""
        try:
            file = self._files(source)
            file.seek(place)
            data = file.read(length)
        except OSError as error:
            self.close()
            raise UnreadableImageError(reason_of(error)) from error
        if len(data) < length:
            raise UnreadableImageError("the tar file is shorter than when it was listed")
        return decode_bytes(data)

    def close(self) -> None:
        """Close the file."""
        self._files.close()


@dataclass(frozen=True)
class TarImages:
    """The members of tar files that are called like images: "shard-000.tar/dir/key.jpg".

    Of members with one name the later ones have their place after it. A file that is damaged gives the members before
    the damage, and one entry that says so.

    Attributes:
        archives: The tar files.
    """

    archives: Archives

    @property
    def description(self) -> str:
        """What it is."""
        return f"the images in tar files, {self.archives.place}"

    @property
    def reading(self) -> Mapping[str, str | None]:
        """How its entries are read again."""
        return {"kind": "tar"}

    def listed(self) -> Iterator[Entry]:
        """The members, file by file. The names of one file's members are held in memory."""
        for path, name, problem in self.archives.files():
            if problem is not None:
                yield Entry(name, path, problem=problem)
            else:
                yield from _members(path, name)

    def reader(self) -> TarReader:
        """A reader of them."""
        return TarReader()


def _open(path: str) -> BinaryIO:
    return Path(path).open("rb")


def _members(path: str, name: str) -> Iterator[Entry]:
    try:
        with Path(path).open("rb") as file:
            problem = yield from _listed(file, path, name)
    except OSError as error:
        problem = reason_of(error)
    if problem is not None:
        yield Entry(name, path, problem=problem)


def _listed(file: BinaryIO, path: str, name: str) -> Generator[Entry, None, str | None]:
    """The members; what is returned is what is wrong with the file, or None."""
    beginning = file.read(6)
    size = file.seek(0, 2)
    file.seek(0)
    if not size:
        return "the file is empty"
    if beginning.startswith(_MAGIC):
        return "the file is compressed; decompress it first"
    met: set[str] = set()
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # kept for lookups by name, without end
                inside = printable(member.name.removeprefix("./"))
                if not member.isreg() or not _is_image(inside):
                    continue
                repeats = inside in met
                met.add(inside)
                entry = Entry(
                    f"{name}/{inside}@{member.offset_data}" if repeats else f"{name}/{inside}",
                    path,
                    member.offset_data,
                    member.size,
                )
                if member.sparse is not None:
                    yield entry._replace(problem="a sparse member, which lies in pieces")
                elif member.offset_data + member.size > size:
                    yield entry._replace(problem="cut off: the tar file ends within it")
                else:
                    yield entry
            return _after_the_last(file, archive.offset)
    except _HEADER_ERRORS as error:
        return f"not a tar file, or damaged ({' '.join(str(error).split()) or type(error).__name__})"


def _is_image(member: str) -> bool:
    return ending(member) in image_endings() and not any(part.startswith(".") for part in member.split("/"))


def _after_the_last(file: BinaryIO, offset: int) -> str | None:
    """tarfile takes a damaged header for the end; the end of a whole file is a block of zeros, or nothing more."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if not block.strip(b"\0"):
        return None
    return f"damaged at byte {offset:,}: what follows is lost"

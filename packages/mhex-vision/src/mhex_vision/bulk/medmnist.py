"""The images of a MedMNIST set, read row by row: neither the set nor the split is ever held in memory as a whole."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from mhex_vision.bulk.decoding import DECODER_ERRORS, reason_of
from mhex_vision.bulk.listing import Entry, KeptOpen
from mhex_vision.data.medmnist import medmnist_bundle
from mhex_vision.data.preprocessing import UnreadableImageError

SPLITS = {"train": "train", "validation": "val", "test": "test"}
"""The splits, and what they are called in the file."""

_ERRORS = (*DECODER_ERRORS, zipfile.BadZipFile, RuntimeError)


@dataclass(frozen=True)
class MedMNISTImages:
    """One split of a two-dimensional MedMNIST set: "bloodmnist/test/00012".

    Attributes:
        path: The npz file.
        split: A key of `SPLITS`.
    """

    path: Path
    split: str

    @classmethod
    def find(cls, name: str, split: str, *, root: str | Path | None, size: int, download: bool) -> MedMNISTImages:
        """The set's file, downloaded if it is not there.

        Raises:
            ImportError: The file must be looked for or downloaded by the medmnist package, which is not installed.
            FileNotFoundError: It is absent and may not be downloaded.
            OSError: The download failed.
            ValueError: The name or the size is unknown, or the file is damaged.
        """
        folder = Path("~/.medmnist" if root is None else root).expanduser()
        path = folder / (f"{name.lower()}.npz" if size == 28 else f"{name.lower()}_{size}.npz")
        if not path.is_file():
            medmnist_bundle(name, root=folder, size=size, download=download)
        source = cls(path, split)
        source._count()
        return source

    @property
    def description(self) -> str:
        """What it is."""
        return f"the {self.split} images of {self.path.stem}"

    @property
    def reading(self) -> Mapping[str, str | None]:
        """How its entries are read again."""
        return {"kind": "medmnist", "split": self.split}

    def listed(self) -> Iterator[Entry]:
        """The images, by their numbers."""
        source = str(self.path.absolute())
        for row in range(self._count()):
            yield Entry(f"{self.path.stem}/{self.split}/{row:05d}", source, row)

    def reader(self) -> MedMNISTReader:
        """A reader of them."""
        return MedMNISTReader(SPLITS[self.split])

    def _count(self) -> int:
        try:
            rows = _Rows(str(self.path), SPLITS[self.split])
        except _ERRORS as error:
            raise ValueError(f"{self.path}: not a readable MedMNIST file: {_one_line(error)}") from error
        rows.close()
        return rows.count


class MedMNISTReader:
    """Reads rows of a split. It keeps the file open.

    Args:
        split: As it is called in the file.
    """

    def __init__(self, split: str) -> None:
        self._files: KeptOpen[_Rows] = KeptOpen(_Opener(split))

    def __call__(self, source: str, place: int, length: int) -> Image.Image:  # noqa: ARG002 - rows are of one length
        """Read a row."""
        try:
            return self._files(source).at(place)
        except _ERRORS as error:
            raise UnreadableImageError(reason_of(error)) from error

    def close(self) -> None:
        """Close the file."""
        self._files.close()


@dataclass(frozen=True)
class _Opener:
    split: str

    def __call__(self, path: str) -> _Rows:
        return _Rows(path, self.split)


class _Rows:
    """An array of images in an npz file, unpacked as far as it is read. Reading forward is cheap."""

    def __init__(self, path: str, split: str) -> None:
        self._archive = zipfile.ZipFile(path)
        try:
            self._stream: IO[bytes] = self._archive.open(f"{split}_images.npy")
            self._shape = _shape(self._stream)
        except BaseException:
            self.close()
            raise
        self._begin = self._stream.tell()
        self._failed: tuple[int, BaseException] | None = None
        self.count = self._shape[0]

    def at(self, row: int) -> Image.Image:
        if row >= self.count:
            raise ValueError("the set is smaller than when it was listed")
        if self._failed is not None and row >= self._failed[0]:
            raise self._failed[1]
        size = int(np.prod(self._shape[1:]))
        try:
            self._stream.seek(self._begin + row * size)
            data = self._stream.read(size)
            if len(data) < size:
                raise EOFError("the array is cut off")
        except (*_ERRORS, zlib.error) as error:
            # What lies behind the damage is lost; unpacking up to it for every row would take for ever.
            self._failed = row, error
            raise
        return Image.fromarray(np.frombuffer(data, np.uint8).reshape(self._shape[1:])).convert("RGB")

    def close(self) -> None:
        stream = getattr(self, "_stream", None)
        if stream is not None:
            stream.close()
        self._archive.close()


def _shape(stream: IO[bytes]) -> tuple[int, ...]:
    """The shape that an npy file's header states. Nothing is unpickled: only the header is read."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, columns_first, dtype = read(stream)
    if dtype != np.uint8 or columns_first or len(shape) not in (3, 4) or shape[3:] not in ((), (3,)) or not shape[0]:
        raise ValueError(f"expected uint8 images (N, H, W) or (N, H, W, 3), got {dtype} of shape {shape}")
    return tuple(shape)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""Whatever holds images, as one kind of thing: names in a fixed order, and a reader."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mhex_core import _checks
from mhex_vision.bulk import parquets, tars
from mhex_vision.bulk.archives import Archives, expand, is_pattern
from mhex_vision.bulk.decoding import DECODER_ERRORS
from mhex_vision.bulk.files import FileReader, ImageFolder, PathList, SingleFile
from mhex_vision.bulk.listing import ImageReader, ImageSource, ending, image_endings, walk
from mhex_vision.bulk.medmnist import SPLITS, MedMNISTImages, MedMNISTReader
from mhex_vision.bulk.parquets import ParquetImages, ParquetReader
from mhex_vision.bulk.tars import TarImages, TarReader
from mhex_vision.data.medmnist import is_medmnist

_TAKEN = (
    "an image, a folder of images, a .txt list of paths, a tar or Parquet file, a folder or a pattern of such, or the "
    "name of a 2-D MedMNIST set"
)
_COMPRESSED = "decompress it first (images are read from their places in a tar file, which a compressed one has not)"


def open_source(
    input: str | Path,  # noqa: A002 - what the command line calls it
    *,
    split: str = "test",
    root: str | Path | None = None,
    size: int | None = None,
    download: bool = True,
    image_column: str | None = None,
    id_column: str | None = None,
    exclude: str | Path | None = None,
) -> ImageSource:
    """Find out what holds the images.

    Args:
        input: An image file. A folder: its images and those below; if there is none, its tar or else its Parquet files.
            A .txt file with one path a line, relative ones from its folder. A tar file (not compressed) as WebDataset
            has it, or a Parquet file with a column of encoded images, of Hugging Face's Image or of paths. A pattern of
            tar or Parquet files, with wildcards or braces such as "shard-{000..012}.tar". Or the name of a
            two-dimensional MedMNIST set (a `Path` never is one).
        split: Of a MedMNIST set: "train", "validation" or "test".
        root: Where MedMNIST files lie or are downloaded to; None for ~/.medmnist.
        size: Of the images of a MedMNIST set: 28, 64, 128 or 224; None for 28.
        download: Whether a MedMNIST file that is absent may be fetched.
        image_column: Of Parquet files; None finds it by its name.
        id_column: Of Parquet files: what names the images; None numbers them.
        exclude: A folder that is left aside, where results are written, say.

    Raises:
        TypeError: An argument is of another type.
        ValueError: There is no image, or an argument belongs to another kind of input.
        FileNotFoundError: There is no such file or folder.
    """
    if not isinstance(input, str | Path) or not str(input):
        raise TypeError(f"input must be a path or the name of a set, got {input!r}")
    _checks.choice("split", split, tuple(SPLITS))
    _checks.flag("download", download)
    for name, value in (("image_column", image_column), ("id_column", id_column)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name} must be the name of a column or None, got {type(value).__name__}")
    for name, folder in (("root", root), ("exclude", exclude)):
        if folder is not None and not isinstance(folder, str | Path):
            raise TypeError(f"{name} must be a path or None, got {type(folder).__name__}")
    if size is not None:
        _checks.positive_int("size", size)
    if isinstance(input, str) and is_medmnist(input):
        source: ImageSource = MedMNISTImages.find(
            input, split, root=root, size=28 if size is None else size, download=download
        )
    else:
        for name, given in (("root", root is not None), ("size", size is not None)):
            if given:
                raise ValueError(f"{name} must come with the name of a MedMNIST set, got input {str(input)!r}")
        aside = None if exclude is None else Path(exclude)
        source = _of_path(
            str(input), ParquetImages(Archives(str(input), parquets.ENDING, aside), image_column, id_column)
        )
    if not isinstance(source, ParquetImages):
        for name, value in (("image_column", image_column), ("id_column", id_column)):
            if value is not None:
                raise ValueError(f"{name} must come with Parquet files, got input {str(input)!r}")
    _check_any(source, str(input))
    return source


def reader_of(reading: Mapping[str, Any]) -> ImageReader:
    """A reader of images whose entries are known, as the source that listed them has one.

    Args:
        reading: `ImageSource.reading` of that source.

    Raises:
        ValueError: It is of no source.
    """
    kinds: dict[object, Callable[[], ImageReader]] = {
        "files": FileReader,
        "tar": TarReader,
        "parquet": lambda: ParquetReader(reading["image_column"]),
        "medmnist": lambda: MedMNISTReader(SPLITS[reading["split"]]),
    }
    try:
        return kinds[reading["kind"]]()
    except (LookupError, TypeError) as error:
        raise ValueError(f"reading must be that of a source of images, got {reading!r}") from error


def _of_path(place: str, as_parquet: ParquetImages) -> ImageSource:
    """The source that a path names."""
    path, exclude = Path(place), as_parquet.archives.exclude
    if path.is_dir():
        if exclude is not None and exclude.is_dir() and exclude.samefile(path):
            raise ValueError(f"out must be another folder than input, got {place} for both")
        kind = _kind_of_folder(path, exclude)
        return ImageFolder(path, exclude) if kind is None else _of_archives(place, kind, as_parquet)
    if not os.path.lexists(path):
        if not is_pattern(place):
            raise FileNotFoundError(f"input must be {_TAKEN}; there is no {place}")
        return _of_archives(place, ending(next(expand(place), place)), as_parquet)
    if place.lower().endswith(tars.COMPRESSED):
        raise ValueError(f"input must not be a compressed tar file, got {place}; {_COMPRESSED}")
    kind = ending(place)
    if kind == ".txt":
        return PathList(path)
    if kind in (tars.ENDING, parquets.ENDING):
        return _of_archives(place, kind, as_parquet)
    if kind in image_endings() or _is_image(path):
        return SingleFile(path)
    raise ValueError(f"input must be {_TAKEN}; got {place}")


def _of_archives(place: str, kind: str, as_parquet: ParquetImages) -> ImageSource:
    if kind == parquets.ENDING:
        return as_parquet
    if kind == tars.ENDING:
        return TarImages(Archives(place, tars.ENDING, as_parquet.archives.exclude))
    if place.lower().endswith(tars.COMPRESSED):
        raise ValueError(f"input must not name compressed tar files, got {place}; {_COMPRESSED}")
    raise ValueError(f"a pattern must name .tar or .parquet files, got {place}")


def _kind_of_folder(folder: Path, exclude: Path | None) -> str | None:
    """What a folder holds: None for images, or the ending of its archives."""
    images = image_endings()
    packed = {name[name.rindex(".") :] for name in tars.COMPRESSED}
    met: set[str] = set()
    for found in walk(folder, images | packed | {tars.ENDING, parquets.ENDING}, exclude):
        if found.problem is not None:
            continue
        if ending(found.name) in images:
            return None
        if not found.name.lower().endswith(tars.COMPRESSED):
            met.add(ending(found.name))
        else:
            met.add("compressed")
    if "compressed" in met and parquets.ENDING not in met:
        raise ValueError(f"input must hold tar files that are not compressed, got {folder}; {_COMPRESSED}")
    for kind in (tars.ENDING, parquets.ENDING):
        if kind in met:
            return kind
    raise ValueError(f"input must hold images, or tar or Parquet files of images, and there is none in {folder}")


def _is_image(path: Path) -> bool:
    """Whether Pillow knows a file that is not called like an image."""
    if not path.is_file():
        return False
    try:
        with Image.open(path):
            return True
    except DECODER_ERRORS:
        return False


def _check_any(source: ImageSource, place: str) -> None:
    problem = ""
    for entry in source.listed():
        if entry.problem is None:
            return
        problem = problem or f"; {entry.id}: {entry.problem}"
    raise ValueError(f"input must hold images, and there is none in {place}{problem}")

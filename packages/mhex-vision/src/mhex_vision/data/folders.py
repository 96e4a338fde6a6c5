"""Data sets that are folders of images, one sub-folder per class."""

import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np
from torchvision.datasets.folder import (
    IMG_EXTENSIONS,
    has_file_allowed_extension,
    make_dataset,
)

from mhex_vision.data._checks import check_int
from mhex_vision.data.preprocessing import Preprocessing, Resize
from mhex_vision.data.sets import DataBundle, FolderImages

__all__ = ["folder_bundle"]

_Samples: TypeAlias = list[tuple[str, int]]

# Compared in lower case: a folder "Train" taken for a class would spoil the data without a word.
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}


def folder_bundle(
    folder: str | Path,
    *,
    size: int = 224,
    seed: int = 0,
    resize: Resize = "stretch",
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
    std: tuple[float, float, float] = (0.5, 0.5, 0.5),
) -> DataBundle:
    """Find the images of a folder whose sub-folders are classes, or are splits that hold classes.

    Two layouts are known:

    * ``train/CLASS/...`` with, optionally, ``val`` (or ``valid``, ``validation``) and ``test`` of the same classes.
      Without validation images, every tenth training image of each class is set aside for it; without test images, the
      validation images stand in for them.
    * ``CLASS/...``: eight, one and one in ten images of each class become train, validation and test.

    Images are set aside at random by ``seed``, image by image. Where several images show the same patient or slide,
    only folders for train, validation and test can keep these apart.

    Args:
        folder: The folder.
        size: Side of the square the network sees, in pixels.
        seed: Which images are set aside.
        resize: How images are brought to the square, see `Preprocessing`.
        mean: Per-channel mean for normalisation.
        std: Per-channel divisor for normalisation.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The folder has neither layout, or a class has too few images.
    """
    check_int("seed", seed, minimum=0)
    preprocessing = Preprocessing(size=size, mean=mean, std=std, resize=resize)
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"folder: expected a folder of images, got {path}, which {'is a file' if path.exists() else 'is not there'}"
        )
    found = _split_folders(path)
    if found:
        class_names, splits = _from_splits(found, seed)
    else:
        class_names = _class_names(path)
        samples = _samples(path, class_names)
        splits = _share_out(samples, class_names, ("validation", "test"), seed, f"{path}/train and {path}/test")
    sets = {split: FolderImages(part, preprocessing) for split, part in splits.items()}
    return DataBundle(
        name=path.resolve().name,
        train=sets["train"],
        validation=sets["validation"],
        test=sets.get("test", sets["validation"]),
        class_names=tuple(class_names),
        multi_label=False,
        preprocessing=preprocessing,
    )


def _from_splits(found: dict[str, Path], seed: int) -> tuple[list[str], dict[str, _Samples]]:
    class_names = _class_names(found["train"])
    splits = {}
    for split, path in found.items():
        foreign = sorted(set(_class_names(path)) - set(class_names))
        if foreign:
            raise ValueError(f"{path}: expected only classes that {found['train']} has, got also {', '.join(foreign)}")
        splits[split] = _samples(path, class_names)
    if "validation" not in splits:
        advice = str(found["train"].parent / "val")
        splits |= _share_out(splits["train"], class_names, ("validation",), seed, advice)
    return class_names, splits


def _split_folders(folder: Path) -> dict[str, Path]:
    """Folders of the splits, or nothing where the sub-folders are classes."""
    subfolders = _subfolders(folder)
    found: dict[str, Path] = {}
    for split, names in _SPLIT_NAMES.items():
        matching = [path for path in subfolders if path.name.lower() in names]
        if len(matching) > 1:
            raise ValueError(
                f"{folder}: expected one folder of {split} images, got {', '.join(path.name for path in matching)}"
            )
        if matching:
            found[split] = matching[0]
    only_splits = len(found) == len(subfolders)
    if "train" not in found:
        if found and only_splits:
            raise ValueError(
                f"{folder}: expected a folder train next to {', '.join(path.name for path in found.values())}, got none"
            )
        return {}
    # A class may be called "train" too (beside "bus"): then it holds images and no folders.
    return found if only_splits or _subfolders(found["train"]) else {}


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _hidden(path.name))


def _hidden(name: str) -> bool:
    # macOS leaves "._*" files, and in archives "__MACOSX" folders, whose files end like images but are none.
    return name.startswith(".") or name == "__MACOSX"


def _class_names(folder: Path) -> list[str]:
    names = [path.name for path in _subfolders(folder)]
    if not names:
        raise ValueError(f"{folder}: expected one sub-folder per class, with its images inside, got no sub-folder")
    return names


def _samples(folder: Path, class_names: list[str]) -> _Samples:
    def wanted(file: str) -> bool:
        parts = Path(file).relative_to(folder).parts
        return has_file_allowed_extension(file, IMG_EXTENSIONS) and not any(map(_hidden, parts))

    numbers = {name: number for number, name in enumerate(class_names)}
    # The classes of a validation or test folder may be fewer than those of train, but none may be empty.
    samples: _Samples = make_dataset(folder, numbers, is_valid_file=wanted, allow_empty=True)
    counts = Counter(label for _, label in samples)
    empty = [name for name in class_names if (folder / name).is_dir() and not counts[numbers[name]]]
    if empty:
        raise ValueError(
            f"{folder}: expected images ({', '.join(IMG_EXTENSIONS)}) in every class folder, got none in "
            f"{', '.join(empty)}"
        )
    return samples


def _share_out(
    samples: _Samples, class_names: list[str], held_out: tuple[str, ...], seed: int, advice: str
) -> dict[str, _Samples]:
    """Set a tenth of each class aside for each of the ``held_out`` splits; the rest is train."""
    splits: dict[str, _Samples] = {"train": [], **{split: [] for split in held_out}}
    for number, name in enumerate(class_names):
        members = [sample for sample in samples if sample[1] == number]
        if len(members) <= len(held_out):
            raise ValueError(
                f"{name}: expected at least {len(held_out) + 1} images to set some aside for "
                f"{' and '.join(held_out)}, got {len(members)}; add images or sort them yourself into {advice}"
            )
        # Seeded by the name, so that a class added later does not reshuffle the others.
        order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(len(members)).tolist()
        share = max(1, round(len(members) / 10))
        for position, split in enumerate(held_out):
            splits[split] += _pick(members, order[position * share : (position + 1) * share])
        splits["train"] += _pick(members, order[len(held_out) * share :])
    return splits


def _pick(members: _Samples, chosen: Iterable[int]) -> _Samples:
    return [members[index] for index in sorted(chosen)]

"""Which files of a folder hold which split: files by name, in parts as on the Hugging Face hub, or a saved data set."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mhex_text.data.tables import ENDINGS

STATE = "state.json"
"""What the datasets library writes beside the files of one split that it saves to disk."""

_SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
_PART = re.compile(r"(?P<split>[a-z]+)(?:-(?P<number>\d+)-of-(?P<count>\d+))?(?:-[0-9a-f]{16})?")


def files_of(folder: Path) -> dict[str, list[Path]]:
    """The files of each split.

    Looked for are files called train and, if there are any, validation and test, alone or in parts
    (train-00000-of-00002.parquet); in the folder itself, in `data`, or in the only folder in it that has such
    files; and what `save_to_disk` of the datasets library wrote, of one split or of several.

    Raises:
        ValueError: There is no file of training texts, a part is missing, or a split has two files.
    """
    if (folder / STATE).is_file():
        return {"train": _saved(folder)}
    saved = {
        split: folder / name for split, names in _SPLITS.items() for name in names if (folder / name / STATE).is_file()
    }
    if "train" in saved:
        return {split: _saved(path) for split, path in saved.items()}
    for place in (folder, folder / "data"):
        if place.is_dir() and "train" in (files := _parts(place)):
            return files
    others = [files for place in sorted(folder.iterdir()) if place.is_dir() and "train" in (files := _parts(place))]
    if len(others) != 1:
        which = "got several folders that have one: name one of them" if others else f"got {folder}"
        raise ValueError(f"source must hold a file called train with the ending {', '.join(ENDINGS)}, {which}")
    return others[0]


def _parts(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[tuple[int, int, Path]]] = {}
    for path in sorted(folder.iterdir()):
        named = _PART.fullmatch(path.stem.lower())
        if named is None or path.suffix.lower() not in ENDINGS or not path.is_file():
            continue
        split = next((split for split, names in _SPLITS.items() if named["split"] in names), None)
        if split is not None:
            found.setdefault(split, []).append((int(named["number"] or 0), int(named["count"] or 1), path))
    for split, parts in found.items():
        numbers, counts = [number for number, _, _ in parts], {count for _, count, _ in parts}
        if len(set(numbers)) < len(numbers):
            same = " and ".join(path.name for _, _, path in parts[:2])
            raise ValueError(f"source must hold one file of {split} texts, got {same}")
        if counts != {len(parts)}:
            raise ValueError(f"source must hold all parts of {split}, got {len(parts)} of {max(counts)} in {folder}")
    return {split: [path for _, _, path in sorted(parts)] for split, parts in found.items()}


def _saved(folder: Path) -> list[Path]:
    """The files of a saved split, as its state names them: the library keeps others beside them."""
    state = folder / STATE
    try:
        entries: Any = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
        names = [entry["filename"] for entry in entries]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{state} must name the files of a saved data set: {type(error).__name__}: {error}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".arrow"):
            raise ValueError(f"{state} must name .arrow files beside it, got {name!r}")
        if not (folder / name).is_file():
            raise ValueError(f"{state} names {name}, and there is no such file beside it")
    if not names:
        raise ValueError(f"{state} must name at least one file, got none")
    return [folder / name for name in names]

"""Archives that a bulk run wrote, read again: some of their rows, chosen out of millions.

Letters: N rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from mhex_core import _checks
from mhex_core.bulk.manifest import read_manifest
from mhex_core.bulk.plan import DATA_FOLDER, LISTING_FILE, MANIFEST_FILE, read_listing

Index = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RowChoice:
    """Which rows of an archive are wanted.

    Attributes:
        samples: How many at most.
        seed: Of the choice by chance.
        doubtful: Those whose prediction is the least probable, instead of a choice by chance.
        predicted: The name of a class: only rows that were predicted to be of it. None means any.

    Raises:
        TypeError: A value is of another type.
        ValueError: `samples` is below 1, or `seed` below 0.
    """

    samples: int = 200
    seed: int = 0
    doubtful: bool = False
    predicted: str | None = None

    def __post_init__(self) -> None:
        _checks.positive_int("samples", self.samples)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {type(self.seed).__name__}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        _checks.flag("doubtful", self.doubtful)
        if self.predicted is not None and not isinstance(self.predicted, str):
            raise TypeError(f"predicted must be the name of a class or None, got {type(self.predicted).__name__}")


@dataclass(frozen=True)
class ChosenRows:
    """Where the chosen rows lie.

    Attributes:
        files: The shards' files, in order.
        places: N pairs, ascending: the place of a row's file in `files`, and the row's in that file.
        among: How many rows there were to choose from.
        choice: What was asked for.
    """

    files: tuple[Path, ...]
    places: tuple[tuple[int, int], ...]
    among: int
    choice: RowChoice

    @property
    def description(self) -> str:
        """Which rows they are, in words."""
        kind = "" if self.choice.predicted is None else f" predicted to be {self.choice.predicted}"
        if len(self) == self.among:
            return f"all {self.among} rows{kind}"
        if self.choice.doubtful:
            return f"of {self.among:,} rows{kind} the {len(self):,} whose prediction is the least probable"
        return f"{len(self):,} of {self.among:,} rows{kind} by chance (seed {self.choice.seed})"

    def __len__(self) -> int:
        return len(self.places)

    def tables(self) -> Iterator[pa.Table]:
        """The rows, all columns, in the archive's order: those of one row group at a time.

        Raises:
            ValueError: A file is damaged.
        """
        wanted: dict[int, list[int]] = {}
        for number, row in self.places:
            wanted.setdefault(number, []).append(row)
        for number, rows in wanted.items():
            with _opened(self.files[number]) as file:
                start = 0
                for group in range(file.num_row_groups):
                    stop = start + file.metadata.row_group(group).num_rows
                    here = [row - start for row in rows if start <= row < stop]
                    if here:
                        yield _read(file, self.files[number], group).take(here)
                    start = stop


@dataclass(frozen=True)
class Archive:
    """What a bulk run left in a folder.

    Attributes:
        folder: The folder.
        manifest: What its manifest says.
    """

    folder: Path
    manifest: Mapping[str, Any] = field(repr=False)

    @classmethod
    def open(cls, folder: str | Path, *, program: str) -> Archive:
        """Open an archive.

        Args:
            folder: That a run was given as `out`. It need not be finished.
            program: The command it must belong to, "mhex-vision" say.

        Raises:
            TypeError: `folder` is no path.
            ValueError: The folder holds no archive, or that of another command.
            FileNotFoundError: There is no such folder.
        """
        if not isinstance(folder, str | Path):
            raise TypeError(f"archive must be a folder, got {type(folder).__name__}")
        place = Path(folder)
        if not place.is_dir():
            raise FileNotFoundError(f"archive must be a folder that `{program} batch` wrote; there is no {place}")
        manifest = read_manifest(place)
        if manifest is None:
            raise ValueError(
                f"archive must be a folder that `{program} batch` wrote, and there is no {MANIFEST_FILE} in {place}"
            )
        if manifest.get("program") != program:
            raise ValueError(f"{place} was written by `{manifest.get('program')} batch`, which has a report of its own")
        return cls(place, manifest)

    @property
    def settings(self) -> str:
        """What decided the rows' values, in words: all settings that say something, but for the checkpoint."""
        held = self.manifest["settings"].items()
        told = ((name, value) for name, value in held if value is not None and value is not False)
        return ", ".join(f"{name} {value}" for name, value in told if not name.startswith("checkpoint"))

    def choose(self, choice: RowChoice) -> ChosenRows:
        """Find rows. Of each row no more is read than its prediction, and where neither is asked for, nothing.

        The choice depends on the rows and the seed alone, and all rows have the same chance.

        Raises:
            ValueError: There is no such row, no such class, or a file is damaged.
        """
        names = self.manifest["about"].get("class_names") or ()
        if choice.predicted is not None and names and choice.predicted not in names:
            raise ValueError(f"predicted must be one of {', '.join(names)}, got {choice.predicted!r}")
        files = tuple(sorted((self.folder / DATA_FOLDER).glob("part-*.parquet")))
        columns = ["prediction"] * (choice.predicted is not None) + ["probability"] * choice.doubtful
        keys, found, among = np.empty(0), np.empty((0, 2), np.int64), 0
        for number, path in enumerate(files):
            chance = np.random.default_rng([choice.seed, number])
            more_keys, rows = _judged(path, columns, choice, chance)
            among += len(rows)
            keys = np.concatenate([keys, more_keys])
            found = np.concatenate([found, np.stack([np.full(len(rows), number), rows], axis=1)])
            if len(keys) > choice.samples:
                best = np.argsort(keys, kind="stable")[: choice.samples]
                keys, found = keys[best], found[best]
        if not among:
            kind = "" if choice.predicted is None else f" predicted to be {choice.predicted}"
            raise ValueError(f"archive must hold rows, and there is none{kind} in {self.folder}")
        return ChosenRows(files, tuple(sorted((int(file), int(row)) for file, row in found)), among, choice)

    def entries(self, rows: pa.Table) -> pa.RecordBatch:
        """Where the inputs of rows lie, as readers want it told.

        Args:
            rows: Of this archive, with the columns index and id.

        Returns:
            One entry a row, of schema `mhex_core.bulk.ENTRY`.

        Raises:
            ValueError: The list of inputs is damaged, or is not that of the rows.
        """
        listing = self.folder / LISTING_FILE
        parts = [read_listing(listing, index, index + 1) for index in rows.column("index").to_pylist()]
        found = pa.Table.from_batches(parts).combine_chunks()
        if found.num_rows != rows.num_rows or found.column("id").to_pylist() != rows.column("id").to_pylist():
            raise ValueError(f"{listing} is not the list of the inputs that {self.folder} was made of")
        (whole,) = found.to_batches() or [pa.RecordBatch.from_pylist([], found.schema)]
        return whole


def _judged(
    path: Path, columns: list[str], choice: RowChoice, chance: np.random.Generator
) -> tuple[NDArray[np.float64], Index]:
    """The rows of a file that may be chosen, and for each a number: those with the smallest are."""
    with _opened(path) as file:
        count = file.metadata.num_rows
        table = _read(file, path, None, columns) if columns else None
    keys = chance.random(count)
    rows = np.arange(count, dtype=np.int64)
    if table is None:
        return keys, rows
    if choice.doubtful:
        keys = table.column("probability").to_numpy().astype(np.float64)
    if choice.predicted is not None:
        kept = np.array([name == choice.predicted for name in table.column("prediction").to_pylist()], dtype=bool)
        keys, rows = keys[kept], rows[kept]
    return keys, rows


def _opened(path: Path) -> parquet.ParquetFile:
    try:
        return parquet.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}; the same batch command makes it anew") from error


def _read(file: parquet.ParquetFile, path: Path, group: int | None, columns: list[str] | None = None) -> pa.Table:
    try:
        return file.read(columns) if group is None else file.read_row_group(group, columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}; the same batch command makes it anew") from error

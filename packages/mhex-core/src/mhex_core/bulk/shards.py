"""One shard, one Parquet file: its rows, and in its footer what could not be read. It is there whole, or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pyarrow as pa
from pyarrow import parquet

from mhex_core.bulk.job import OWN_COLUMNS
from mhex_core.bulk.plan import DATA_FOLDER, RunPlan
from mhex_core.files import partial_of

_FOOTER = b"mhex"
_GROUP_BYTES = 16 * 2**20  # of a row group, uncompressed; what a writer holds at most
_COMPRESSION = {"compression": "zstd", "compression_level": 1}  # level 3 took twice as long for 3 % less


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What became of a shard.

    Attributes:
        number: Which.
        rows: How many inputs were explained.
        rejected: How many could not be read.
        bytes: Size of the file.
        model_seconds: What lanes spent in the model, added up; 0 where it is not known.
    """

    number: int
    rows: int
    rejected: int
    bytes: int
    model_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Reject:
    """An input that could not be read, and why."""

    index: int
    id: str
    source: str
    reason: str


def full_schema(schema: pa.Schema) -> pa.Schema:
    """The columns of a shard's file: those that every row has, then the job's."""
    return pa.schema([*OWN_COLUMNS, *schema], metadata=schema.metadata)


def encodings(schema: pa.Schema) -> Iterator[tuple[str, str]]:
    """How the numbers in lists are laid out, by Parquet's path of each column.

    What is stored of a map is smooth. Differences of integers, and bytes of equal weight side by side, took half the
    space of plain numbers, three quarters of the time to write and less than half of that to read.
    """
    for column in schema:
        if pa.types.is_nested(column.type):
            yield from _encodings(column.name, column.type)


def _encodings(path: str, kind: pa.DataType) -> Iterator[tuple[str, str]]:
    if pa.types.is_struct(kind):
        for field in kind:
            yield from _encodings(f"{path}.{field.name}", field.type)
    elif pa.types.is_list(kind):
        yield from _encodings(f"{path}.list.element", kind.value_type)
    elif pa.types.is_integer(kind):
        yield path, "DELTA_BINARY_PACKED"
    elif pa.types.is_floating(kind):
        yield path, "BYTE_STREAM_SPLIT"


def rows_of_group(row_bytes: int) -> int:
    """How many rows make a row group. It depends on nothing that differs between runs, so neither do the bytes."""
    return max(16, min(1024, _GROUP_BYTES // max(1, row_bytes)))


class ShardWriter:
    """Writes one shard. Leaving the context without `commit` leaves nothing behind.

    Args:
        plan: The run.
        number: Which shard.
        entries: Its entries.
        schema: The job's columns.
        row_bytes: About how many bytes a row takes.
    """

    def __init__(self, plan: RunPlan, number: int, entries: pa.RecordBatch, schema: pa.Schema, row_bytes: int) -> None:
        self._plan, self._number, self._entries = plan, number, entries
        self._start = plan.bounds(number)[0]
        self._path = plan.path(number)
        self._temporary = partial_of(self._path)
        self._schema = full_schema(schema)
        self._group = rows_of_group(row_bytes)
        flat = [field.name for field in self._schema if not pa.types.is_nested(field.type)]
        texts = [field.name for field in self._schema if pa.types.is_string(field.type)]
        self._writer: parquet.ParquetWriter | None = None
        try:
            self._writer = parquet.ParquetWriter(
                self._temporary,
                self._schema,
                use_dictionary=texts,
                write_statistics=flat,
                column_encoding=dict(encodings(self._schema)),
                write_page_checksum=True,
                **_COMPRESSION,
            )
        except BaseException:
            self._temporary.unlink(missing_ok=True)  # a disk may be full at the first byte
            raise
        self._waiting: list[pa.RecordBatch] = []
        self._late: list[pa.RecordBatch] = []
        self._rejects: list[list[object]] = []
        self._rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            try:
                writer.close()
            finally:
                self._temporary.unlink(missing_ok=True)

    def add(self, places: Sequence[int], rows: pa.RecordBatch, *, in_order: bool = True) -> None:
        """Add rows.

        Args:
            places: Of each row among the shard's entries.
            rows: The job's columns.
            in_order: Whether these come after all that were added, as everything after them will. Otherwise they are
                kept until the end and sorted then.
        """
        wanted = list(self._schema)[len(OWN_COLUMNS) :]
        if [(field.name, field.type) for field in rows.schema] != [(field.name, field.type) for field in wanted]:
            asked, given = (
                ", ".join(f"{field.name}: {field.type}" for field in fields) for fields in (wanted, rows.schema)
            )
            raise ValueError(f"the model must give the columns of the job's schema ({asked}), got {given}")
        index = pa.array([self._start + place for place in places], pa.int64())
        chosen = self._entries.take(pa.array(places, pa.int64()))
        columns = [index, chosen.column("id"), chosen.column("source"), *rows.columns]
        whole = pa.RecordBatch.from_arrays(columns, schema=self._schema)
        self._rows += whole.num_rows
        if not in_order:
            self._late.append(whole)
            return
        self._waiting.append(whole)
        if sum(batch.num_rows for batch in self._waiting) >= self._group:
            self._flush(last=False)

    def reject(self, place: int, reason: str) -> None:
        """Say of an input why it has no row."""
        self._rejects.append([self._start + place, " ".join(reason.split())])

    def commit(self, *, model_seconds: float = 0.0) -> ShardRecord:
        """Put the file in its place, in one step and to the disk.

        Raises:
            RuntimeError: Some input has neither a row nor a reason.
        """
        writer = self._writer
        if writer is None:
            raise RuntimeError("this shard is written already")
        expected = self._entries.num_rows
        if self._rows + len(self._rejects) != expected:
            raise RuntimeError(
                f"shard {self._number} must have a row or a reason for each of {expected} inputs, got {self._rows} "
                f"rows and {len(self._rejects)} reasons"
            )
        if self._late:
            table = pa.Table.from_batches([*self._waiting, *self._late], self._schema)
            self._waiting = table.sort_by("index").combine_chunks().to_batches()
        self._flush(last=True)
        footer = {
            "run": self._plan.digest,
            "shard": self._number,
            "rejected": sorted(self._rejects, key=lambda reject: str(reject[0]).zfill(20)),
        }
        writer.add_key_value_metadata({_FOOTER: json.dumps(footer, ensure_ascii=False).encode()})
        writer.close()
        self._writer = None
        try:
            with self._temporary.open("rb") as file:
                os.fsync(file.fileno())
                size = os.fstat(file.fileno()).st_size
            self._temporary.replace(self._path)
        except BaseException:
            self._temporary.unlink(missing_ok=True)
            raise
        _sync_folder(self._path.parent)
        return ShardRecord(
            number=self._number,
            rows=self._rows,
            rejected=len(self._rejects),
            bytes=size,
            model_seconds=model_seconds,
        )

    def _flush(self, *, last: bool) -> None:
        writer = self._writer
        if writer is None or not self._waiting:
            return
        table = pa.Table.from_batches(self._waiting, self._schema)
        whole = table.num_rows if last else table.num_rows // self._group * self._group
        if whole:
            # Groups of one size and columns of one piece, wherever batches ended: the same bytes.
            for start in range(0, whole, self._group):
                group = table.slice(start, min(self._group, whole - start)).combine_chunks()
                writer.write_table(group, row_group_size=self._group)
        rest = table.slice(whole)
        self._waiting = rest.combine_chunks().to_batches() if rest.num_rows else []


def committed(plan: RunPlan) -> tuple[dict[int, ShardRecord], list[Path]]:
    """The shards that are done, and the files of others that cannot be read.

    Raises:
        ValueError: A shard belongs to another run, or a file looks like one and is none.
    """
    folder = plan.out / DATA_FOLDER
    names = sorted(path for path in folder.glob("part-*.parquet") if path.is_file())
    wanted = {plan.path(number).name: number for number in range(plan.shards())}
    done: dict[int, ShardRecord] = {}
    damaged: list[Path] = []
    with ThreadPoolExecutor(8) as readers:
        for path, found in zip(names, readers.map(_footer, names), strict=True):
            number = wanted.get(path.name)
            if found is None and number is not None:
                damaged.append(path)
                continue
            if found is None:
                raise ValueError(f"{path} is no shard of this run, and was not made by it; move it elsewhere")
            digest, rows, rejects, size = found
            if digest != plan.digest or number is None:
                raise ValueError(f"{path} belongs to another run; choose another folder, or overwrite")
            done[number] = ShardRecord(number=number, rows=rows, rejected=len(rejects), bytes=size)
    return done, damaged


def rejects(plan: RunPlan, numbers: Iterable[int]) -> Iterable[Reject]:
    """What the given shards could not read, in order."""
    for number in numbers:
        found = _footer(plan.path(number))
        if found is None or not found[2]:
            continue
        entries, start = plan.entries(number), plan.bounds(number)[0]
        for index, reason in found[2]:
            place = index - start
            yield Reject(
                index=index,
                id=str(entries.column("id")[place]),
                source=str(entries.column("source")[place]),
                reason=reason,
            )


def _footer(path: Path) -> tuple[str, int, list[tuple[int, str]], int] | None:
    """The run, the number of rows, the rejects and the size of a shard's file; None if it cannot be read."""
    try:
        found = parquet.read_metadata(path)
        held = json.loads(found.metadata[_FOOTER])
        rejected = [(int(index), str(reason)) for index, reason in held["rejected"]]
        return str(held["run"]), int(found.num_rows), rejected, path.stat().st_size
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return None


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk once its folder is."""
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Which inputs a run has, and how they are cut into shards: a list on disk that is made once and then only read.

The list is frozen when the run begins, so that shard k means the same inputs however often the run is stopped and goes
on, and whatever happens to the folder meanwhile.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mhex_core.bulk.job import ENTRY
from mhex_core.files import write_atomically

LISTING_FILE = "inputs.arrow"
DATA_FOLDER = "data"
MANIFEST_FILE = "manifest.json"
REJECTED_FILE = "rejected.csv"

_BLOCK = 4096  # entries of one block of the list, which is what has to be read for a single one

_READ_SHARD_BYTES = 128 * 2**20
_SMALLEST_SHARD, _LARGEST_SHARD = 64, 4096


def default_shard_size(input_bytes: int) -> int:
    """Inputs of a shard: a power of two that takes at most 128 MiB once read, from 64 to 4096."""
    size = _LARGEST_SHARD
    while size > _SMALLEST_SHARD and size * input_bytes > _READ_SHARD_BYTES:
        size //= 2
    return size


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The inputs of a run and their shards. It can be sent to other processes, which read the list themselves.

    Attributes:
        out: The run's folder.
        inputs: How many inputs there are.
        shard_size: How many of them make a shard; the last may have fewer.
        digest: Of the settings, the list and the shard size: what every shard of this run carries.
    """

    out: Path
    inputs: int
    shard_size: int
    digest: str

    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.inputs // self.shard_size)

    def bounds(self, number: int) -> tuple[int, int]:
        """The first input of a shard, and the one after its last."""
        if not 0 <= number < self.shards():
            raise ValueError(f"number must lie in [0, {self.shards() - 1}], got {number}")
        start = number * self.shard_size
        return start, min(start + self.shard_size, self.inputs)

    def entries(self, number: int) -> pa.RecordBatch:
        """The entries of a shard, of schema `ENTRY`."""
        return read_listing(self.out / LISTING_FILE, *self.bounds(number))

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.out / DATA_FOLDER / f"part-{number:06d}.parquet"


def write_listing(path: Path, batches: Iterator[pa.RecordBatch], told: Callable[[int], None]) -> int:
    """Write the list of inputs; returns their number.

    Args:
        path: The file.
        batches: Entries, some at a time.
        told: Called now and then with how many there are so far.
    """
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, ENTRY, options=options) as writer:
            for block in _blocks(batches):
                writer.write_batch(block)
                count += block.num_rows
                told(count)

    write_atomically(path, write)
    return count


def read_listing(path: Path, start: int, stop: int) -> pa.RecordBatch:
    """Some entries of the list.

    Raises:
        ValueError: The list is damaged.
    """
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
            first, last = start // _BLOCK, max(start, stop - 1) // _BLOCK
            parts = [reader.get_batch(block) for block in range(first, last + 1)]
            table = pa.Table.from_batches(parts, ENTRY).slice(start - first * _BLOCK, stop - start)
            (whole,) = table.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], ENTRY)]
            return whole
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}; begin anew with another folder or overwrite") from error


def count_listed(path: Path) -> int:
    """How many entries a list has.

    Raises:
        ValueError: The list is damaged.
    """
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
            blocks = reader.num_record_batches
            return 0 if not blocks else (blocks - 1) * _BLOCK + int(reader.get_batch(blocks - 1).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}; begin anew with another folder or overwrite") from error


def digest_of(settings: Mapping[str, Any], listing: Path, shard_size: int) -> str:
    """What makes two runs the same."""
    known = hashlib.sha256(json.dumps([settings, shard_size], sort_keys=True).encode())
    with listing.open("rb") as file:
        known.update(hashlib.file_digest(file, "sha256").digest())
    return known.hexdigest()


def _blocks(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same entries in blocks of one size, so that the place of each is known."""
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        waiting.append(batch.cast(ENTRY) if batch.schema != ENTRY else batch)
        rows += batch.num_rows
        while rows >= _BLOCK:
            table = pa.Table.from_batches(waiting, ENTRY).combine_chunks()
            yield from table.slice(0, _BLOCK).to_batches()
            waiting = table.slice(_BLOCK).to_batches()
            rows -= _BLOCK
    if rows:
        yield from pa.Table.from_batches(waiting, ENTRY).combine_chunks().to_batches()

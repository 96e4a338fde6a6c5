"""Maps out of the files of a bulk run.

Letters: N rows, H x W map size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mhex_vision.bulk.storing import unpack

_COLUMNS = ("saliency", "saliency_scale", "saliency_offset")


def read_saliency(batch_or_table: pa.RecordBatch | pa.Table) -> NDArray[np.float32]:
    """The maps of some rows, as numbers.

    Args:
        batch_or_table: Rows of a bulk run, in any order, with the columns saliency, saliency_scale and saliency_offset.

    Returns:
        float32 (N, H, W): saliency_scale * saliency + saliency_offset.

    Raises:
        TypeError: It is neither a record batch nor a table.
        ValueError: A column is missing, or holds something else.
    """
    if not isinstance(batch_or_table, pa.RecordBatch | pa.Table):
        raise TypeError(f"batch_or_table must be a pyarrow RecordBatch or Table, got {type(batch_or_table).__name__}")
    missing = [name for name in _COLUMNS if name not in batch_or_table.schema.names]
    if missing:
        raise ValueError(f"batch_or_table must have the columns {', '.join(_COLUMNS)}, got none called {missing[0]}")
    table = batch_or_table if isinstance(batch_or_table, pa.Table) else pa.Table.from_batches([batch_or_table])
    if not table.num_rows:
        return np.zeros((0, *_stated_shape(table.schema)), np.float32)
    maps: NDArray[np.float32] | None = None
    done = 0
    for stored, scale, offset in _parts(table):
        if maps is None:
            maps = np.empty((table.num_rows, *stored.shape[1:]), np.float32)
        if stored.shape[1:] != maps.shape[1:]:
            raise ValueError(f"saliency must hold maps of one size, got {stored.shape[1:]} and {maps.shape[1:]}")
        maps[done : done + len(stored)] = unpack(stored, scale, offset)
        done += len(stored)
    assert maps is not None  # noqa: S101 - there are rows
    return maps


def _parts(table: pa.Table) -> Iterator[tuple[NDArray[np.generic], NDArray[np.float32], NDArray[np.float32]]]:
    """Maps (n, H, W) as they are stored, scales and offsets: as many at a time as lie in memory together."""
    done = 0
    for chunk in table.column("saliency").chunks:
        if not len(chunk):
            continue
        # What the datasets library reads comes as its own type around the same lists.
        rows = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
        stored = _dense(rows)
        scale, offset = (table.column(name).slice(done, len(chunk)).to_numpy() for name in _COLUMNS[1:])
        yield stored, scale, offset
        done += len(chunk)


def _dense(rows: pa.Array) -> NDArray[np.generic]:
    """Lists of lists of one length as an array, without a copy where they lie in order."""
    if not pa.types.is_list(rows.type) or not pa.types.is_list(rows.type.value_type) or rows.null_count:
        raise ValueError(f"saliency must hold a map in every row, as lists of lists, got {rows.type}")
    lines = rows.flatten()
    values = lines.flatten()
    height, width = len(lines) // len(rows), len(values) // max(1, len(lines))
    heights, widths = (np.diff(lists.offsets.to_numpy()) for lists in (rows, lines))
    if not height or not width or (heights != height).any() or (widths != width).any():
        raise ValueError("saliency must hold maps of one size, got rows or lines of different lengths")
    dense: NDArray[np.generic] = values.to_numpy(zero_copy_only=False).reshape(len(rows), height, width)
    return dense


def _stated_shape(schema: pa.Schema) -> tuple[int, int]:
    """H and W as the schema states them, for a table without rows."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        height, width = features["saliency"]["shape"]
        return int(height), int(width)
    except (ValueError, KeyError, TypeError):
        return 0, 0

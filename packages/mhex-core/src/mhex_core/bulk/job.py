"""What a bulk run is made of: a job lists its inputs, reads them, and explains them.

A job is small and can be sent to other processes; readers and models are made where they are used. Everything else
(order, batches, shards, resuming, progress) is the engines' business.

Letters: N rows.
"""

from __future__ import annotations

import pickle  # between processes of one run; no file of a user's
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import pyarrow as pa
import torch
from torch import Tensor

Values: TypeAlias = Tensor | list[Any]
"""N inputs as a model takes them: a tensor whose first axis is N, or a list of N texts or pairs of texts."""

ENTRY = pa.schema(
    [
        # What the input is called, unique within a run and the same in every run over the same inputs.
        pa.field("id", pa.string(), nullable=False),
        # The file it lies in.
        pa.field("source", pa.string(), nullable=False),
        # Where in that file: a byte offset, a row, an index; -1 where the file is the input.
        pa.field("place", pa.int64(), nullable=False),
        # How many bytes there, or -1.
        pa.field("length", pa.int64(), nullable=False),
        # Why it cannot be read, where listing found that out; else null.
        pa.field("problem", pa.string()),
    ]
)

OWN_COLUMNS = (
    pa.field("index", pa.int64(), nullable=False),
    pa.field("id", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
)
"""The columns every row begins with: its number among all inputs, readable or not; its name; its file."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoded:
    """What was read of some entries.

    Attributes:
        kept: Which entries could be read, ascending, by their place among those given.
        values: Their inputs, in that order.
        rejected: The other entries with the reason, one line each. Entries in neither are a defect.
        groups: One number for each of `kept`: only rows of one group share a batch (texts of one padded length, say).
            None means one group.
    """

    kept: list[int]
    values: Values
    rejected: list[tuple[int, str]] = field(default_factory=list)
    groups: list[int] | None = None


class Reader(Protocol):
    """Reads inputs. It lives in one process, is called by one thread, and may keep files open between calls."""

    def __call__(self, entries: pa.RecordBatch) -> Decoded:
        """Read entries (of schema `ENTRY`), those with a problem included; a damaged one is rejected, never raised."""
        ...


class Model(Protocol):
    """Explains batches.

    Attributes:
        shared: Whether several threads may call it at once. Otherwise every thread gets one of its own.
        fixed: Whether every batch must have the same number of rows (because it is compiled for it).
    """

    shared: bool
    fixed: bool

    def __call__(self, values: Values) -> pa.RecordBatch:
        """One row per value, of the job's `schema`.

        A row must depend on its own value alone, to the bit, as long as the batch has a multiple of `BATCH_STEP` rows.
        """
        ...


class BulkJob(Protocol):
    """What is to be explained, by what, and what rows come of it.

    Attributes:
        program: The command it belongs to, such as "mhex-vision".
        schema: The columns of the rows that the model gives, with metadata for readers of the Parquet files.
        settings: What decides the rows' values, as JSON: the checkpoint's digest, the method and its options, sizes. A
            run goes on only under the settings it began with.
        about: What else the manifest says, as JSON: class names, layers, shapes.
        row_bytes: About how many bytes one row takes uncompressed.
        input_bytes: About how many bytes one input takes in memory once it is read.
    """

    @property
    def program(self) -> str: ...  # noqa: D102 - described above
    @property
    def schema(self) -> pa.Schema: ...  # noqa: D102
    @property
    def settings(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def about(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def row_bytes(self) -> int: ...  # noqa: D102
    @property
    def input_bytes(self) -> int: ...  # noqa: D102

    def entries(self) -> Iterator[pa.RecordBatch]:
        """List the inputs, always in the same order, some thousands at a time (schema `ENTRY`)."""
        ...

    def reader(self) -> Reader:
        """A reader, for one process."""
        ...

    def model(self, device: torch.device, *, batch_size: int) -> Model:
        """The model, ready to be called on that device with up to `batch_size` rows, a multiple of `BATCH_STEP`."""
        ...


def sendable(error: Exception) -> Exception:
    """The exception itself if it can be sent to another process, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - just pickled
    except Exception:  # noqa: BLE001 - a class of somebody else's may raise anything
        return RuntimeError(f"{type(error).__name__}: {first_line(error)}")
    return error


def first_line(error: BaseException) -> str:
    """What an exception says, as far as its first line."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


BATCH_STEP = 16
"""Matrix products of few rows take other ways through the libraries than those of many, with other last bits. From 16
rows on, in steps of 16 and on one thread, a row's values were found not to depend on the rows around it."""


def padded_rows(rows: int, batch_size: int, *, fixed: bool) -> int:
    """How many rows a batch of `rows` is filled up to: all of them, or up to the next step."""
    step = -(-batch_size // BATCH_STEP) * BATCH_STEP if fixed else BATCH_STEP
    return -(-rows // step) * step


def pad(values: Values, rows: int) -> Values:
    """Values filled up to `rows` by repeating the last."""
    missing = rows - len(values)
    if missing <= 0:
        return values
    if isinstance(values, Tensor):
        return torch.cat([values, values[-1:].expand(missing, *values.shape[1:])])
    return values + values[-1:] * missing


def join(parts: Sequence[Values]) -> Values:
    """Several values as one."""
    if len(parts) == 1:
        return parts[0]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts):
        return torch.cat(tensors)
    return [value for part in parts for value in part]


def pick(values: Values, places: Sequence[int]) -> Values:
    """The values at these places, in this order."""
    if isinstance(values, Tensor):
        low = places[0]
        if list(places) == list(range(low, low + len(places))):
            return values[low : low + len(places)]
        return values[torch.as_tensor(places)]
    return [values[place] for place in places]

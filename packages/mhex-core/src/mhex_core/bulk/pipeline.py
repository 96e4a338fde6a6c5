"""From what was read to files: batches, lanes that explain them side by side, and writers.

A lane is a thread that runs the model on one torch thread (or on one GPU). On a CPU several lanes are faster than one
forward pass on all cores, and a row's bits depend neither on how many there are nor on the machine's cores.

Letters: N rows.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import pyarrow as pa
import torch

from mhex_core.bulk.job import BATCH_STEP, BulkJob, Decoded, Model, Values, join, pad, padded_rows, pick
from mhex_core.bulk.options import cores
from mhex_core.bulk.plan import RunPlan
from mhex_core.bulk.shards import ShardRecord, ShardWriter

_WRITERS = 4  # more shards than that are never under way at once


@dataclass(frozen=True)
class _Batch:
    """Rows that go through the model together, and where each stands in its shard."""

    places: list[int]
    values: Values


@dataclass(frozen=True)
class _Explained:
    """A batch on its way."""

    places: list[int]
    rows: Future[tuple[pa.RecordBatch, float]]
    in_order: bool


class _Abandoned:
    """Said to a writer whose shard will not be finished."""


_Message = _Explained | tuple[int, str] | _Abandoned | None


class ShardPipeline:
    """Explains shards and writes them. A context manager; models are made on entering.

    Args:
        job: What is explained, and by what.
        plan: The run.
        batch_size: Rows of a batch.
        lanes: How many batches are explained at once on a CPU; None means one per processor. GPUs have one lane each.
        device: One device; None means all GPUs there are, else the CPU.
    """

    def __init__(
        self,
        job: BulkJob,
        plan: RunPlan,
        *,
        batch_size: int,
        lanes: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._job, self._plan = job, plan
        self._batch_size = batch_size
        if device is not None:
            devices = [device]
        elif torch.cuda.is_available():
            devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        else:
            devices = [torch.device("cpu")]
        if devices[0].type == "cpu":
            devices *= cores() if lanes is None else lanes
        self._devices = devices
        self._threads_before = _threads_of_others()
        self._lanes = _Lanes(job, devices, -(-batch_size // BATCH_STEP) * BATCH_STEP)
        # As many as keep every lane busy while one waits to be written; this is what bounds memory.
        self._slots = threading.Semaphore(2 * len(devices) + 2)
        self._writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="mhex-writer")

    @property
    def lanes(self) -> int:
        """How many batches are explained at once."""
        return len(self._devices)

    def __enter__(self) -> Self:
        try:
            self._lanes.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lanes.stop()
        self._writers.shutdown(wait=True, cancel_futures=True)
        # What a lane sets counts for every thread that begins later.
        _in_a_thread(torch.set_num_threads, self._threads_before)

    def submit(
        self,
        number: int,
        entries: pa.RecordBatch,
        chunks: Iterable[Decoded],
        told: Callable[[int], None] | None = None,
    ) -> Future[ShardRecord]:
        """Explain a shard. Waits while lanes are busy; returns when the last batch is handed over.

        Args:
            number: Which shard.
            entries: Its entries.
            chunks: What was read of them: of some first entries, of the next, and so on.
            told: Called with how many more inputs have been explained or rejected, by another thread.

        Returns:
            The record, once the file is in its place.
        """
        messages: queue.Queue[_Message] = queue.Queue()
        given_up = threading.Event()
        record = self._writers.submit(self._write, number, entries, messages, given_up, told or (lambda _: None))
        try:
            offset = 0
            batches = _Batches(self._batch_size)
            for chunk in chunks:
                for place, reason in chunk.rejected:
                    messages.put((offset + place, reason))
                for batch in batches.take(chunk, offset):
                    self._send(batch, messages, given_up, in_order=chunk.groups is None)
                offset += len(chunk.kept) + len(chunk.rejected)
                if given_up.is_set():
                    break
            for batch in batches.rest():
                self._send(batch, messages, given_up, in_order=not batches.grouped)
        except BaseException:
            messages.put(_Abandoned())
            raise
        messages.put(None)
        return record

    def _send(
        self, batch: _Batch, messages: queue.Queue[_Message], given_up: threading.Event, *, in_order: bool
    ) -> None:
        self._slots.acquire()
        if given_up.is_set():
            self._slots.release()
            return
        messages.put(_Explained(batch.places, self._lanes.explain(batch.values), in_order))

    def _write(
        self,
        number: int,
        entries: pa.RecordBatch,
        messages: queue.Queue[_Message],
        given_up: threading.Event,
        told: Callable[[int], None],
    ) -> ShardRecord:
        """Take a shard's rows as they come, in order, and write them."""
        spent = 0.0
        try:
            with ShardWriter(self._plan, number, entries, self._job.schema, self._job.row_bytes) as writer:
                while (message := messages.get()) is not None:
                    if isinstance(message, _Abandoned):
                        raise InterruptedError("this shard was abandoned")
                    if isinstance(message, tuple):
                        writer.reject(*message)
                        told(1)
                        continue
                    try:
                        rows, seconds = message.rows.result()
                    finally:
                        self._slots.release()
                    spent += seconds
                    writer.add(message.places, rows, in_order=message.in_order)
                    told(len(message.places))
                record = writer.commit(model_seconds=spent)
        except BaseException:
            given_up.set()
            self._drain(messages)
            raise
        give_back()
        return record

    def _drain(self, messages: queue.Queue[_Message]) -> None:
        """Give back the slots of what will not be written any more, lest the others wait for ever."""
        while True:
            try:
                message = messages.get(timeout=0.2)
            except queue.Empty:
                return
            if isinstance(message, _Explained):
                message.rows.cancel()
                self._slots.release()


class _Lanes:
    """Threads that call the model."""

    def __init__(self, job: BulkJob, devices: Sequence[torch.device], batch_size: int) -> None:
        self._job, self._devices, self._batch_size = job, devices, batch_size
        self._free: queue.SimpleQueue[Model] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(
            len(devices), thread_name_prefix="mhex-lane", initializer=_settle, initargs=(devices[0].type == "cpu",)
        )

    def start(self) -> None:
        """Make the models. One that can be shared is made once for a CPU."""
        made = self._threads.submit(self._job.model, self._devices[0], batch_size=self._batch_size).result()
        self._free.put(made)
        for device in self._devices[1:]:
            if made.shared and device == self._devices[0]:
                self._free.put(made)
            else:
                again = self._threads.submit(self._job.model, device, batch_size=self._batch_size)
                self._free.put(again.result())

    def stop(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def explain(self, values: Values) -> Future[tuple[pa.RecordBatch, float]]:
        """Explain a batch: its rows, and the seconds it took."""
        return self._threads.submit(self._explained, values)

    def _explained(self, values: Values) -> tuple[pa.RecordBatch, float]:
        model = self._free.get()
        try:
            begun = time.perf_counter()
            rows = model(pad(values, padded_rows(len(values), self._batch_size, fixed=model.fixed)))
            return rows.slice(0, len(values)), time.perf_counter() - begun
        finally:
            self._free.put(model)


def give_back() -> None:
    """Return to the system what allocators keep: with several threads glibc keeps more and more of it."""
    pa.default_memory_pool().release_unused()
    with suppress(OSError, AttributeError):  # other systems have no such call
        ctypes.CDLL(None).malloc_trim(0)


def _threads_of_others() -> int:
    """How many threads torch gives to a thread that begins now."""
    return int(_in_a_thread(torch.get_num_threads))


def _in_a_thread(call: Callable[..., Any], *arguments: Any) -> Any:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call, *arguments).result()


def _settle(on_cpu: bool) -> None:
    if on_cpu:
        torch.set_num_threads(1)


class _Batches:
    """Readable rows of a shard, gathered into batches; rows of different groups never meet."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._places: dict[int, list[int]] = {}
        self._parts: dict[int, list[Values]] = {}
        self.grouped = False

    def take(self, chunk: Decoded, offset: int) -> Iterator[_Batch]:
        """Add what was read; full batches come out."""
        if not chunk.kept:
            return
        groups = [0] * len(chunk.kept) if chunk.groups is None else chunk.groups
        self.grouped |= chunk.groups is not None
        members: dict[int, list[int]] = {}
        for row, group in enumerate(groups):
            members.setdefault(group, []).append(row)
        for group, rows in members.items():
            self._places.setdefault(group, []).extend(offset + chunk.kept[row] for row in rows)
            self._parts.setdefault(group, []).append(pick(chunk.values, rows))
            while len(self._places[group]) >= self._size:
                yield self._cut(group, self._size)

    def rest(self) -> Iterator[_Batch]:
        """What is left at the end of the shard."""
        for group in list(self._places):
            if self._places[group]:
                yield self._cut(group, len(self._places[group]))

    def _cut(self, group: int, size: int) -> _Batch:
        places, values = self._places[group], join(self._parts[group])
        self._places[group] = places[size:]
        self._parts[group] = [values[size:]] if len(places) > size else []
        return _Batch(places[:size], values[:size])

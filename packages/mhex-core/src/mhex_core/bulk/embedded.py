"""The engine for one machine: processes that read, lanes that explain, threads that write, and little between them."""

from __future__ import annotations

import signal
import warnings
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from itertools import groupby
from typing import Any

import pyarrow as pa
from torch.utils.data import DataLoader, Dataset

from mhex_core.bulk.job import ENTRY, BulkJob, Decoded, Reader, sendable
from mhex_core.bulk.options import BulkOptions, cores
from mhex_core.bulk.pipeline import ShardPipeline, give_back
from mhex_core.bulk.plan import RunPlan
from mhex_core.bulk.progress import Progress
from mhex_core.bulk.shards import ShardRecord

_AHEAD = 3  # chunks each process has read before they are asked for
_UNFINISHED = 2  # shards whose last rows are being written while the next is explained

_DEATHS = 4  # of processes that read, in a row without a shard between them or a cause that was found
_DEATHS_TO_LOOK_INTO = 2
_TIMES = 2  # that a process dies over an entry before it is left out
_DEADLY = "the process that read it was killed, twice; it may need more memory than there is"
_KILLED = "DataLoader worker"  # how torch's message begins when a process that reads was killed

_Chunk = tuple[int, int, int]
"""A shard, and which of its entries."""

_Result = tuple[int, Decoded | Exception]
"""A shard, and what was read of it, or why reading must end."""


def run_embedded(job: BulkJob, plan: RunPlan, todo: Sequence[int], *, options: BulkOptions, progress: Progress) -> None:
    """Explain shards in this process.

    Args:
        job: What is explained, and by what.
        plan: The run.
        todo: Numbers of the shards to do.
        options: How.
        progress: Is told, and asked whether to stop.
    """
    workers = default_workers() if options.workers is None else options.workers
    waiting: deque[tuple[int, Future[ShardRecord]]] = deque()
    left = list(todo)
    suspects: Counter[tuple[int, int]] = Counter()
    deaths = 0

    def settle(most: int) -> None:
        """Take note of the shards that are done, and wait until at most `most` are not."""
        nonlocal deaths
        while waiting and (waiting[0][1].done() or len(waiting) > most):
            number, record = waiting.popleft()
            progress.shard_done(record.result())
            left.remove(number)
            deaths = 0

    while left:
        # After two deaths in a row one entry at a time is read by one process: what it dies over then has a name.
        alone = deaths >= _DEATHS_TO_LOOK_INTO
        heard: Counter[int] = Counter()
        deadly = {place for place, times in suspects.items() if times >= _TIMES}
        chunks_of = _Chunks(job, plan, deadly)
        # The processes start before threads do, and read while the model is loaded.
        order = _Order(plan, tuple(left[:1] if alone else left), 1 if alone else options.batch_size, progress)
        stream = _stream(chunks_of, order, 1 if alone else workers, 1 if alone else _AHEAD)
        try:
            with ShardPipeline(job, plan, batch_size=options.batch_size, lanes=options.lanes) as pipeline:
                for number, chunks in groupby(_received(stream, heard), key=_shard_of):
                    settle(len(left))  # what failed ends the run before more is begun
                    record = pipeline.submit(number, plan.entries(number), map(_read, chunks), progress.advance)
                    waiting.append((number, record))
                    settle(_UNFINISHED)
                settle(0)
            if not alone:
                return
        except RuntimeError as error:
            # A process that reads was killed, by the kernel for want of memory, say. The shards in hand are lost with
            # it and done again.
            deaths += 1
            if alone:
                suspects[left[0], heard[left[0]]] += 1
                if suspects[left[0], heard[left[0]]] == _TIMES:
                    deaths = _DEATHS_TO_LOOK_INTO  # the cause is known, and will be left out
            if _KILLED not in str(error) or deaths > _DEATHS:
                raise
            waiting.clear()
        finally:
            # There is no public way, and a traceback that somebody keeps would keep the processes.
            getattr(stream, "_shutdown_workers", int)()
        if progress.stopping:
            return


def _stream(chunks: _Chunks, order: _Order, workers: int, ahead: int) -> Iterator[_Result]:
    """What is read, chunk by chunk, in order."""
    with warnings.catch_warnings():
        # More processes than processors are what was asked for: reading from a slow disk is mostly waiting.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader: DataLoader[_Result] = DataLoader(
            chunks,
            batch_size=None,
            sampler=order,
            num_workers=workers,
            collate_fn=_unchanged,  # type: ignore[arg-type]  # without a batch size it is given one result
            prefetch_factor=ahead if workers else None,
            worker_init_fn=_leave_interrupts_to_the_parent,
        )
        return iter(loader)


def _received(stream: Iterator[_Result], heard: Counter[int]) -> Iterator[_Result]:
    """What is read, counted shard by shard.

    A process that is found dead in the middle of handing something over is told of as any other dead one.
    """
    while True:
        try:
            result = next(stream)
        except StopIteration:
            return
        except (OSError, EOFError) as error:
            # Tensors come through a socket of the process that read them. What reading itself raises comes as a value.
            raise RuntimeError(f"{_KILLED} was lost while it handed over what it had read ({error!r})") from error
        heard[result[0]] += 1
        yield result


def default_workers() -> int:
    """Reading an image takes a tenth of what explaining it does: a process for every four processors, at least one."""
    return max(1, cores() // 4)


class _Chunks(Dataset[_Result]):
    """What was read of a shard, some entries at a time.

    Args:
        job: Whose entries they are.
        plan: The run.
        deadly: Entries that are not read: a shard, and the place in it.
    """

    def __init__(self, job: BulkJob, plan: RunPlan, deadly: Collection[tuple[int, int]]) -> None:
        self._job, self._plan, self._deadly = job, plan, deadly
        self._reader: Reader | None = None
        self._entries: tuple[int, Any] | None = None

    def __getitem__(self, chunk: _Chunk) -> _Result:
        number, start, stop = chunk
        try:
            if self._reader is None:
                self._reader = self._job.reader()
            if self._entries is None or self._entries[0] != number:
                self._entries = (number, self._known(number))
                give_back()
            return number, self._reader(self._entries[1].slice(start, stop - start))
        except Exception as error:  # noqa: BLE001 - of whatever class
            # Raised here it would reach the user with the traceback of this process in its message.
            return number, sendable(error)

    def _known(self, number: int) -> pa.RecordBatch:
        """A shard's entries, those that are not to be read with the reason in the place of a problem."""
        entries = self._plan.entries(number)
        places = [place for shard, place in self._deadly if shard == number]
        if not places:
            return entries
        problems = entries.column("problem").to_pylist()
        for place in places:
            problems[place] = _DEADLY
        column = pa.array(problems, ENTRY.field("problem").type)
        return entries.set_column(ENTRY.get_field_index("problem"), ENTRY.field("problem"), column)


class _Order:
    """The chunks in order. When asked to stop it ends with the shard it is in."""

    def __init__(self, plan: RunPlan, todo: Sequence[int], size: int, progress: Progress) -> None:
        self._plan, self._todo, self._size, self._progress = plan, todo, size, progress

    def __iter__(self) -> Iterator[_Chunk]:
        for number in self._todo:
            if self._progress.stopping:
                return
            start, stop = self._plan.bounds(number)
            for first in range(0, stop - start, self._size):
                yield number, first, min(first + self._size, stop - start)


def _shard_of(result: _Result) -> int:
    return result[0]


def _read(result: _Result) -> Decoded:
    if isinstance(result[1], Exception):
        raise result[1]
    return result[1]


def _unchanged(result: _Result) -> _Result:
    return result


def _leave_interrupts_to_the_parent(_: int) -> None:
    """Ctrl-C reaches every process of a terminal; those that read go on until the shard in hand is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

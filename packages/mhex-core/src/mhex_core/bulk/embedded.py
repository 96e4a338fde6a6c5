"""The engine for one machine: processes that read, lanes that explain, threads that write, and little between them."""

from __future__ import annotations

import signal
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from itertools import groupby
from typing import Any

from torch.utils.data import DataLoader, Dataset

from mhex_core.bulk.job import BulkJob, Decoded, Reader
from mhex_core.bulk.options import BulkOptions
from mhex_core.bulk.pipeline import ShardPipeline, cores, give_back
from mhex_core.bulk.plan import RunPlan
from mhex_core.bulk.progress import Progress
from mhex_core.bulk.shards import ShardRecord

_AHEAD = 3  # chunks each process has read before they are asked for
_UNFINISHED = 2  # shards whose last rows are being written while the next is explained

_DEATHS = 3  # of processes that read, in a row without a shard between them
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
    deaths = 0

    def settle(most: int) -> None:
        """Take note of the shards that are done, and wait until at most `most` are not."""
        nonlocal deaths
        while waiting and (waiting[0][1].done() or len(waiting) > most):
            number, record = waiting.popleft()
            progress.shard_done(record.result())
            left.remove(number)
            deaths = 0

    while True:
        # The processes start before threads do, and read while the model is loaded.
        stream = _stream(job, plan, left, workers, options.batch_size, progress)
        try:
            with ShardPipeline(job, plan, batch_size=options.batch_size, lanes=options.lanes) as pipeline:
                for number, chunks in groupby(_received(stream), key=_shard_of):
                    settle(len(left))  # what failed ends the run before more is begun
                    record = pipeline.submit(number, plan.entries(number), map(_read, chunks), progress.advance)
                    waiting.append((number, record))
                    settle(_UNFINISHED)
                settle(0)
                return
        except RuntimeError as error:
            # A process that reads was killed, by the kernel for want of memory, say. The shards in hand are lost with
            # it and done again.
            deaths += 1
            if _KILLED not in str(error) or deaths > _DEATHS:
                raise
            waiting.clear()
        finally:
            # There is no public way, and a traceback that somebody keeps would keep the processes.
            getattr(stream, "_shutdown_workers", int)()


def _stream(
    job: BulkJob, plan: RunPlan, todo: list[int], workers: int, size: int, progress: Progress
) -> Iterator[_Result]:
    """What is read, chunk by chunk, in order."""
    with warnings.catch_warnings():
        # More processes than processors are what was asked for: reading from a slow disk is mostly waiting.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader: DataLoader[_Result] = DataLoader(
            _Chunks(job, plan),
            batch_size=None,
            sampler=_Order(plan, tuple(todo), size, progress),
            num_workers=workers,
            collate_fn=_unchanged,  # type: ignore[arg-type]  # without a batch size it is given one result
            prefetch_factor=_AHEAD if workers else None,
            worker_init_fn=_leave_interrupts_to_the_parent,
        )
        return iter(loader)


def _received(stream: Iterator[_Result]) -> Iterator[_Result]:
    """What is read; a process found dead in the middle of handing something over is told of as any other dead one."""
    while True:
        try:
            result = next(stream)
        except StopIteration:
            return
        except (OSError, EOFError) as error:
            # Tensors come through a socket of the process that read them. What reading itself raises comes as a value.
            raise RuntimeError(f"{_KILLED} was lost while it handed over what it had read ({error!r})") from error
        yield result


def default_workers() -> int:
    """Reading an image takes a tenth of what explaining it does: a process for every four processors, at least one."""
    return max(1, cores() // 4)


class _Chunks(Dataset[_Result]):
    """What was read of a shard, some entries at a time."""

    def __init__(self, job: BulkJob, plan: RunPlan) -> None:
        self._job, self._plan = job, plan
        self._reader: Reader | None = None
        self._entries: tuple[int, Any] | None = None

    def __getitem__(self, chunk: _Chunk) -> _Result:
        number, start, stop = chunk
        try:
            if self._reader is None:
                self._reader = self._job.reader()
            if self._entries is None or self._entries[0] != number:
                self._entries = (number, self._plan.entries(number))
                give_back()
            return number, self._reader(self._entries[1].slice(start, stop - start))
        except (ValueError, OSError, ImportError, LookupError, TypeError, RuntimeError, MemoryError) as error:
            # Raised here it would reach the user with the traceback of this process in its message.
            return number, error


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

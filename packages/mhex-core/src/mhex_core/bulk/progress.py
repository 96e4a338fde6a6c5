"""Telling how far a run is, and being asked to stop it."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from tqdm import tqdm

from mhex_core.bulk.shards import ShardRecord

Say = Callable[[str], None]

_QUIET_SECONDS = 60.0  # between two lines where nobody watches a bar


class Progress:
    """A bar in a terminal, a line a minute elsewhere. A context manager.

    Args:
        total: Inputs to do.
        say: Takes lines where there is no terminal; None says nothing.
        on_shard: Called with the record of each shard that is done; what it raises ends the run.

    Attributes:
        stopping: Whether no new shard is to be begun.
        rows: Inputs explained so far.
        rejected: Inputs that could not be read so far.
        bytes: Written so far.
        model_seconds: Spent in the model, over all lanes.
    """

    def __init__(self, total: int, say: Say | None, on_shard: Callable[[ShardRecord], None]) -> None:
        self.stopping = False
        self.rows = self.rejected = self.bytes = 0
        self.model_seconds = 0.0
        self._total, self._say, self._on_shard = total, say, on_shard
        self._told = 0
        self._lock = threading.Lock()
        self._begun = self._last = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if say is not None and sys.stderr.isatty():
            self._bar = tqdm(total=total, unit="", desc="explained", smoothing=0.05, leave=False, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._begun

    def advance(self, count: int) -> None:
        """More inputs are explained or rejected, though their shard may not be written yet. Any thread may say so."""
        with self._lock:
            self._told += count
            if self._bar is not None:
                self._bar.update(count)
                return
            now = time.monotonic()
            if self._say is None or now - self._last < _QUIET_SECONDS:
                return
            self._last = now
            rate = self._told / max(1e-9, now - self._begun)
            left = duration((self._total - self._told) / max(1e-9, rate))
            self._say(f"{self._told:,} of {self._total:,}, {rate:.1f} a second, {left} left")

    def shard_done(self, record: ShardRecord) -> None:
        """A shard is in its place."""
        self.rows += record.rows
        self.rejected += record.rejected
        self.bytes += record.bytes
        self.model_seconds += record.model_seconds
        self._on_shard(record)


class Interrupts:
    """Turns the first Ctrl-C or SIGTERM into a request to stop, and a second one into KeyboardInterrupt.

    A context manager; handlers are as before once it is left. In a thread that cannot have handlers it does nothing.
    """

    def __init__(self, progress: Progress, complain: Say | None) -> None:
        self._progress, self._complain = progress, complain
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - what a handler is called with
        if self._progress.stopping:
            raise KeyboardInterrupt
        self._progress.stopping = True
        if self._complain is not None:
            self._complain("stopping once the shards in hand are written; again to stop at once")


def duration(seconds: float) -> str:
    """Seconds for people to read: 42 s, 3:05 min, 2:10 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
    return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02d} h"


def size(count: float) -> str:
    """Bytes for people to read."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"

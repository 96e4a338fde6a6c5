"""How a bulk run is carried out. None of it changes a value that is written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mhex_core import _checks

Engine = Literal["embedded", "ray"]


MOST_PER_PROCESSOR = 4


def at_most_processors(name: str, count: object) -> None:
    """Raise if more processes or threads are asked for than processors could do with."""
    most = MOST_PER_PROCESSOR * cores()
    if isinstance(count, int) and count > most:
        raise ValueError(f"{name} must be at most {most}, {MOST_PER_PROCESSOR} for each processor, got {count}")


def cores() -> int:
    """How many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux knows
        return os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class BulkOptions:
    """How a run is carried out.

    Attributes:
        batch_size: Inputs that go through the model together.
        shard_size: Inputs of one output file; None chooses by their size in memory. A run keeps the one it began with.
        workers: Processes that read inputs; 0 reads where the model runs; None chooses by the machine.
        lanes: Batches explained at once on a CPU, each on one thread; None means one per processor.
        engine: "embedded", in this process, or "ray".
        address: Of a Ray cluster that is there, such as "auto" or "ray://HOST:10001"; None starts one on this machine.
        overwrite: Whether what another run left in the folder is removed first.

    Raises:
        TypeError: A value is of another type.
        ValueError: A value is out of range, or an address comes without the engine "ray".
    """

    batch_size: int = 32
    shard_size: int | None = None
    workers: int | None = None
    lanes: int | None = None
    engine: Engine = "embedded"
    address: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        _checks.positive_int("batch_size", self.batch_size)
        for name in ("shard_size", "lanes"):
            if getattr(self, name) is not None:
                _checks.positive_int(name, getattr(self, name))
        for name in ("lanes", "workers"):
            at_most_processors(name, getattr(self, name))
        if self.workers is not None:
            if isinstance(self.workers, bool) or not isinstance(self.workers, int):
                raise TypeError(f"workers must be an int or None, got {type(self.workers).__name__}")
            if self.workers < 0:
                raise ValueError(f"workers must be at least 0, got {self.workers}")
        _checks.choice("engine", self.engine, get_args(Engine))
        _checks.flag("overwrite", self.overwrite)
        if self.address is not None:
            if not isinstance(self.address, str):
                raise TypeError(f"address must be a str or None, got {type(self.address).__name__}")
            if self.engine != "ray":
                raise ValueError(f"address must come with the engine 'ray', got {self.engine!r}")


@dataclass(frozen=True, kw_only=True)
class BulkSummary:
    """What came of a run.

    Attributes:
        out: The folder.
        inputs: How many inputs there are.
        rows: How many of them are explained, now or earlier.
        rejected: How many could not be read, now or earlier.
        done_before: How many belong to shards that were done when this call began.
        bytes: Size of all shards.
        seconds: What this call took from the first input to the last file.
        rate: Inputs per second of this call; 0 where there was nothing to do.
        model_share: Which part of its time a lane spent in the model, in [0, 1]; 0 where it is not known.
        interrupted: Whether it stopped early because it was asked to.
    """

    out: Path
    inputs: int
    rows: int
    rejected: int
    done_before: int
    bytes: int
    seconds: float
    rate: float
    model_share: float
    interrupted: bool

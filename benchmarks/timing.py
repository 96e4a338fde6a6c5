"""Timing contenders in one run: in turns, after a warm-up, with the device waited for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    def record(self) -> dict[str, Any]:
        """For JSON: median and quartiles in milliseconds."""
        low, middle, high = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else [self.seconds[0]] * 3
        return {"ms": 1e3 * middle, "quartiles_ms": [1e3 * low, 1e3 * high], "rounds": len(self.seconds)}


def in_turns(
    contenders: Mapping[str, Callable[[], Any]], *, device: torch.device, rounds: int, seconds: float = 0.02
) -> dict[str, Timing]:
    """Time each contender once per round, so that what disturbs the machine disturbs all of them.

    Args:
        contenders: Name -> what to run; what it returns is dropped.
        device: Waited for before the clock is read.
        rounds: How many times each is timed.
        seconds: A contender that is quicker is repeated until a timing takes about this long.
    """
    repeats = {}
    for name, run in contenders.items():
        run()
        once = _clock(run, device, 1)
        repeats[name] = max(1, min(200, round(seconds / max(once, 1e-7))))
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            taken[name].append(_clock(run, device, repeats[name]))
    return {name: Timing(tuple(values)) for name, values in taken.items()}


def _clock(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""The tables of docs/scale.md, for `tables.py`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import common


def throughput() -> list[str]:
    """Images a second of a batch beside the bare model."""
    record = common.result("batch-throughput")
    sides = record["sides"]
    found = [
        "| | "
        + " | ".join(f"{side} px, batches of {sides[side]['batch_size']}: images/s" for side in sides)
        + " | "
        + " | ".join(f"{side} px: over the best bare model" for side in sides)
        + " |",
        "|---" * (1 + 2 * len(sides)) + "|",
    ]
    for name in next(iter(sides.values()))["rates"]:
        rates = [_middle(side["rates"][name]) for side in sides.values()]
        ratios = [f"{side['ratios'][name]:.2f}" for side in sides.values()]
        found.append(f"| {name} | {' | '.join(rates)} | {' | '.join(ratios)} |")
    counts = " and ".join(f"{side['images']:,} of {name} px" for name, side in sides.items())
    rounds = len(next(iter(next(iter(sides.values()))["rates"].values())))
    shown = f"{counts}; {common.shape(record)}, medians of {rounds} turns, least and most in brackets"
    return [*found, "", f"`{record['command']}` ({shown})"]


def rival() -> list[str]:
    """A batch beside the usual loop."""
    record = common.result("batch-rival")
    sides = record["sides"]
    found = ["| | " + " | ".join(f"{side} px: images/s" for side in sides) + " |", "|---" * (1 + len(sides)) + "|"]
    found += [
        f"| {name} | {' | '.join(_middle(side['rates'][name]) for side in sides.values())} |"
        for name in next(iter(sides.values()))["rates"]
    ]
    found.append("| times as fast | " + " | ".join(f"**{side['ratio']:.1f}**" for side in sides.values()) + " |")
    counts = " and ".join(f"{side['images']:,} of {name} px" for name, side in sides.items())
    return [*found, "", f"`{record['command']}` ({counts}; {common.shape(record)}, medians)"]


def memory() -> list[str]:
    """The most memory of all processes together."""
    record = common.result("batch-memory")
    found = ["| images | most memory held at once, MB | images/s |", "|---|---|---|"]
    for name, run in record["archives"].items():
        found.append(f"| {name} | {run['peak_bytes'] / 1e6:.0f} | {run['rate']:.0f} |")
    return [*found, "", f"`{record['command']}` ({common.shape(record)})"]


def cost() -> list[str]:
    """What an image costs, part by part."""
    record = common.result("batch-cost")
    sides = record["sides"]
    found = ["| one image, one thread | " + " | ".join(f"{side} px" for side in sides) + " |", "|---|---|---|"]
    found += [
        f"| {part}, ms | {' | '.join(_few(side['milliseconds'][part]) for side in sides.values())} |"
        for part in next(iter(sides.values()))["milliseconds"]
    ]
    found += [
        f"| stored, {kind}, kB | {' | '.join(_few(side['bytes'][kind] / 1e3) for side in sides.values())} |"
        for kind in next(iter(sides.values()))["bytes"]
    ]
    found.append(
        f"| the file it was read from, kB | {' | '.join(_few(s['input_bytes'] / 1e3) for s in sides.values())} |"
    )
    return [*found, "", f"`{record['command']}` ({common.shape(record)}, medians)"]


def plan() -> list[str]:
    """The costs above, a billion times."""
    sides = common.result("batch-cost")["sides"]
    found = [
        "| a billion images of | 224 px | 28 px |",
        "|---|---|---|",
    ]

    def row(name: str, of: Callable[[dict[str, Any]], str]) -> None:
        found.append(f"| {name} | {of(sides['224'])} | {of(sides['28'])} |")

    def hours(side: dict[str, Any], *parts: str) -> float:
        return 1e9 * sum(side["milliseconds"][part] for part in parts) / 3.6e6

    row("core-hours to list, read and decode", lambda side: f"{hours(side, 'list', 'read and decode'):,.0f}")
    row("core-hours to explain on a CPU", lambda side: f"{hours(side, 'explain'):,.0f}")
    row("core-hours to write full uint8", lambda side: f"{hours(side, 'write, full uint8'):,.0f}")
    row("core-hours to write native uint8", lambda side: f"{hours(side, 'write, native uint8'):,.0f}")
    for kind in ("full uint8", "full float16", "native uint8"):
        row(f"TB of {kind}", lambda side, kind=kind: f"{side['bytes'][kind] / 1e3:,.1f}")
    row("TB to read", lambda side: f"{side['input_bytes'] / 1e3:,.1f}")
    row(
        "cores that read and write full uint8 for 1,000 images a second",
        lambda side: f"{side['milliseconds']['read and decode'] + side['milliseconds']['write, full uint8']:.1f}",
    )
    row(
        "MB a second for these, in and out",
        lambda side: f"{side['input_bytes'] / 1e3:.0f} and {side['bytes']['full uint8'] / 1e3:.0f}",
    )
    return found


def faults() -> list[str]:
    """What was done to a batch, and what was seen."""
    record = common.result("faults")
    found = ["| scenario | seen |", "|---|---|"]
    for line in record["scenarios"]:
        seen = ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in line.items() if key != "scenario")
        found.append(f"| {line['scenario']} | {seen} |")
    return [
        *found,
        "",
        f"`{record['command']}` ({record['images']:,} images, seed {record['seed']}; {common.shape(record)})",
    ]


def _middle(values: list[float]) -> str:
    return f"{_few(statistics.median(values))} ({_few(min(values))} to {_few(max(values))})"


def _few(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

"""What a comparison of explanation methods found: means with bootstrap intervals, and tables to read.

Letters: N samples (images or texts), R resamples.
Source: percentile bootstrap, Efron 1979.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mhex_core import _checks

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over samples with its bootstrap interval.

    Attributes:
        mean: Over the samples where the value is defined; NaN where it is nowhere.
        low: Lower end.
        high: Upper end.
        count: How many samples they were.
    """

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One method's results.

    Attributes:
        method: The method.
        scores: Of each metric.
        differences: Of each metric, this method's value less the first method's, sample by sample; with an interval
            that does not hold 0 the two can be told apart. Empty for the first method itself.
        seconds: Median over the samples of what one took.
    """

    method: str
    scores: Mapping[str, Interval]
    differences: Mapping[str, Interval]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Column:
    """One metric of a table.

    Attributes:
        name: The metric, by which summaries hold it.
        title: What the table calls it.
        higher_is_better: Which way is better.
    """

    name: str
    title: str
    higher_is_better: bool


def resampled_counts(count: int, *, resamples: int, seed: int) -> Values:
    """How often each resample draws each sample: (R, N). A mean over a resample is then one matrix product."""
    generator = np.random.default_rng(seed)
    weights = np.zeros((resamples, count))
    for row in weights:
        row[:] = np.bincount(generator.integers(0, count, count), minlength=count) if count else 0
    return weights


def interval(values: Values, weights: Values, *, confidence: float) -> Interval:
    """The mean with its interval.

    Args:
        values: (N,); NaN is left out.
        weights: (R, N), from `resampled_counts`; the same ones for values that are compared.
        confidence: Of the interval, in (0, 1).
    """
    defined = ~np.isnan(values)
    if not defined.any():
        return Interval(mean=math.nan, low=math.nan, high=math.nan, count=0)
    kept, drawn = values[defined], weights[:, defined]
    total = drawn.sum(axis=1)
    if not total.any():
        # Few values among many samples, and no resample drew one of them.
        return Interval(mean=float(kept.mean()), low=math.nan, high=math.nan, count=int(defined.sum()))
    means = (drawn @ kept)[total > 0] / total[total > 0]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean=float(kept.mean()), low=float(low), high=float(high), count=int(defined.sum()))


def summarize(
    values: Mapping[str, Mapping[str, Values]],
    seconds: Mapping[str, Values],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[Summary, ...]:
    """Means with bootstrap intervals over samples; the same resamples for every method and metric.

    Args:
        values: Of each method, of each metric: (N,), the same samples in the same order; NaN where undefined.
        seconds: Of each method: (N,), what each sample took.
        confidence: Of the intervals, in (0, 1).
        resamples: R.
        seed: Of the resamples.

    Returns:
        One summary per method, in their order; differences are from the first.

    Raises:
        ValueError: The methods differ in metrics or number of samples, or a setting does not fit.
    """
    if not 0 < _checks.number("confidence", confidence) < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    _checks.positive_int("resamples", resamples)
    if not values:
        return ()
    first = next(iter(values.values()))
    for method, found in values.items():
        if list(found) != list(first):
            raise ValueError(f"values must have the same metrics of every method, got {', '.join(found)} of {method}")
    shapes = {array.shape for found in values.values() for array in found.values()}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        raise ValueError(f"values must have one shape (N,), got {', '.join(map(str, sorted(shapes)))}")
    (count,) = next(iter(shapes)) if shapes else (0,)
    weights = resampled_counts(count, resamples=resamples, seed=seed)
    summaries = []
    for place, (method, found) in enumerate(values.items()):
        differences = {metric: array - first[metric] for metric, array in found.items()} if place else {}
        taken = seconds[method]
        summaries.append(
            Summary(
                method=method,
                scores={metric: interval(array, weights, confidence=confidence) for metric, array in found.items()},
                differences={
                    metric: interval(array, weights, confidence=confidence) for metric, array in differences.items()
                },
                seconds=float(np.median(taken)) if len(taken) else math.nan,
            )
        )
    return tuple(summaries)


def table(summaries: Sequence[Summary], columns: Sequence[Column], *, unit: str) -> list[list[str]]:
    """Rows of text: a head, then one row per method; the best mean of each metric is marked with a star.

    Args:
        summaries: The methods' results.
        columns: The metrics to show, in their order.
        unit: What one sample is: "image", "text".
    """
    head = ["method", *(f"{c.title} {'↑' if c.higher_is_better else '↓'}" for c in columns), f"s / {unit}"]
    best = {column.name: _best(summaries, column) for column in columns}
    rows = [head]
    for summary in summaries:
        row = [summary.method]
        for column in columns:
            one = summary.scores[column.name]
            star = "*" if one.mean == best[column.name] and len(summaries) > 1 else ""
            row.append(f"{_number(one.mean)}{star} [{_number(one.low)}, {_number(one.high)}]")
        rows.append([*row, f"{summary.seconds:.2g}"])
    return rows


def to_text(rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def to_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown, best values bold."""
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in body:
        cells = [f"**{cell.replace('* [', '** [')}" if "* [" in cell else cell for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def to_record(summaries: Sequence[Summary], *, unit: str) -> dict[str, Any]:
    """Summaries as plain numbers that JSON can hold: of each method its scores, differences and seconds.

    Args:
        summaries: The methods' results.
        unit: What one sample is: counts are called `<unit>s`, and seconds `seconds_per_<unit>`.
    """

    def plain(intervals: Mapping[str, Interval]) -> dict[str, dict[str, float | int | None]]:
        return {
            metric: {
                "mean": _finite(one.mean),
                "low": _finite(one.low),
                "high": _finite(one.high),
                f"{unit}s": one.count,
            }
            for metric, one in intervals.items()
        }

    return {
        summary.method: {
            "scores": plain(summary.scores),
            f"differences from {summaries[0].method}": plain(summary.differences),
            f"seconds_per_{unit}": _finite(summary.seconds),
        }
        for summary in summaries
    }


def _best(summaries: Sequence[Summary], column: Column) -> float | None:
    means = [summary.scores[column.name].mean for summary in summaries]
    defined = [mean for mean in means if not math.isnan(mean)]
    if not defined:
        return None
    return max(defined) if column.higher_is_better else min(defined)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}" if abs(value) < 100 else f"{value:.3g}"


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None

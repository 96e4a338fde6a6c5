"""What a comparison found: a table of samples, means with intervals, tables to read, plots of the curves.

Letters: N images, R resamples, S steps.
Source: percentile bootstrap, Efron 1979.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mhex_core import _checks
from mhex_core.files import write_atomically
from mhex_vision.comparison.scores import CURVES, parse_metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METADATA_KEY = b"mhex_vision_comparison"
_Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over images with its bootstrap interval.

    Attributes:
        mean: Over the images where the value is defined.
        low: Lower end.
        high: Upper end.
        images: How many they were.
    """

    mean: float
    low: float
    high: float
    images: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One method's results.

    Attributes:
        method: The method.
        scores: Of each metric.
        differences: Of each metric, this method's value less the first method's, image by image; with an interval that
            does not hold 0 the two can be told apart. Empty for the first method itself.
        seconds_per_image: Median over batches of what the maps took.
    """

    method: str
    scores: Mapping[str, Interval]
    differences: Mapping[str, Interval]
    seconds_per_image: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Every method's value on every image.

    Attributes:
        samples: One row per method and image: `method`, `image` (its place in the data), `label`, `target`,
            `probability` (the judge's, of the target), one column per metric, `insertion_curve` and `deletion_curve`
            where they were asked for, `seconds` (what the map took, its batch's time shared out).
        settings: What was compared: data, model, judge, methods, metrics, versions.
    """

    samples: pa.Table
    settings: Mapping[str, Any]

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, in the order they were asked for."""
        return tuple(self.settings["methods"])

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics, in the order they were asked for."""
        return tuple(self.settings["metrics"])

    @property
    def places(self) -> tuple[int, ...]:
        """Which images of the data were compared, in ascending order."""
        return tuple(sorted(set(self.samples["image"].to_pylist())))

    def values(self, method: str, column: str) -> _Values:
        """One method's column, by image: float64 (N,), or (N, S + 1) for a curve.

        Raises:
            KeyError: There is no such method or column.
        """
        if method not in self.methods or column not in self.samples.column_names:
            raise KeyError(f"there is no {column!r} of {method!r}")
        rows = self.samples.filter(pa.compute.equal(self.samples["method"], method)).sort_by("image")
        listed: _Values = np.array(rows[column].to_pylist(), dtype=np.float64)
        return listed

    def summary(self, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[Summary, ...]:
        """Means with bootstrap intervals over images; the same resamples for every method and metric.

        Args:
            confidence: Of the intervals, in (0, 1).
            resamples: R.
            seed: Of the resamples.
        """
        if not 0 < _checks.number("confidence", confidence) < 1:
            raise ValueError(f"confidence must be in (0, 1), got {confidence}")
        _checks.positive_int("resamples", resamples)
        first = {metric: self.values(self.methods[0], metric) for metric in self.metrics}
        count = len(next(iter(first.values()))) if first else 0
        weights = _resampled_counts(count, resamples, seed)
        found = []
        for method in self.methods:
            values = {metric: self.values(method, metric) for metric in self.metrics}
            seconds = self.values(method, "seconds")
            found.append(
                Summary(
                    method=method,
                    scores={metric: _interval(value, weights, confidence) for metric, value in values.items()},
                    differences={
                        metric: _interval(value - first[metric], weights, confidence)
                        for metric, value in values.items()
                        if method != self.methods[0]
                    },
                    seconds_per_image=float(np.median(seconds)) if len(seconds) else math.nan,
                )
            )
        return tuple(found)

    def table(self, summaries: Sequence[Summary] | None = None) -> list[list[str]]:
        """Rows of text: a head, then one row per method; the best mean of each metric is marked with a star."""
        summaries = self.summary() if summaries is None else summaries
        measures = [parse_metric(metric) for metric in self.metrics]
        rows = [["method", *(f"{m.title} {'↑' if m.score.higher_is_better else '↓'}" for m in measures), "s / image"]]
        for summary in summaries:
            row = [summary.method]
            for measure in measures:
                means = [other.scores[measure.name].mean for other in summaries]
                best = max(means) if measure.score.higher_is_better else min(means)
                one = summary.scores[measure.name]
                star = "*" if one.mean == best and len(summaries) > 1 else ""
                row.append(f"{_number(one.mean)}{star} [{_number(one.low)}, {_number(one.high)}]")
            rows.append([*row, f"{summary.seconds_per_image:.2g}"])
        return rows

    def to_text(self, summaries: Sequence[Summary] | None = None) -> str:
        """The table for a terminal."""
        rows = self.table(summaries)
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def to_markdown(self, summaries: Sequence[Summary] | None = None) -> str:
        """The table as Markdown, best values bold."""
        head, *rows = self.table(summaries)
        lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for row in rows:
            cells = [f"**{cell.replace('* [', '** [')}" if "* [" in cell else cell for cell in row]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def to_json(self, summaries: Sequence[Summary] | None = None) -> str:
        """Settings and summary as JSON."""
        summaries = self.summary() if summaries is None else summaries
        record = {
            "settings": dict(self.settings),
            "methods": {
                summary.method: {
                    "scores": {metric: _plain(interval) for metric, interval in summary.scores.items()},
                    f"differences from {self.methods[0]}": {
                        metric: _plain(interval) for metric, interval in summary.differences.items()
                    },
                    "seconds_per_image": _finite(summary.seconds_per_image),
                }
                for summary in summaries
            },
        }
        return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def plot(self) -> Figure:
        """The mean insertion and deletion curves of all methods.

        Raises:
            ValueError: Neither curve was measured.
        """
        from matplotlib.figure import Figure

        measured = [m for m in map(parse_metric, self.metrics) if m.curve is not None]
        if not measured:
            raise ValueError(f"metrics must hold {' or '.join(CURVES)} to be plotted, got {', '.join(self.metrics)}")
        figure = Figure(figsize=(4.6 * len(measured) + 2.6, 3.6), layout="constrained")
        axes = figure.subplots(1, len(measured), squeeze=False)[0]
        styles = ("-", "--", ":", "-.")
        for axis, measure in zip(axes, measured, strict=True):
            for number, method in enumerate(self.methods):
                curve = self.values(method, f"{measure.name}_curve").mean(axis=0)
                axis.plot(
                    np.linspace(0, 1, len(curve)),
                    curve,
                    # Ten colours, then the same with other dashes.
                    color=f"C{number % 10}",
                    linestyle=styles[number // 10 % len(styles)],
                    label=method,
                )
            axis.set_xlabel(f"share of pixels {'revealed' if measure.curve == 'insertion' else 'removed'}")
            axis.set_ylabel("judge's probability of the class")
            better = "higher" if measure.score.higher_is_better else "lower"
            axis.set_title(f"{measure.score.title}, {better} is better", fontsize=10)
            axis.set_ylim(0, 1.02)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=7)
        return figure

    def save(self, path: str | Path) -> Path:
        """Write samples and settings to one Parquet file, in one step."""
        table = self.samples.replace_schema_metadata({METADATA_KEY: json.dumps(dict(self.settings)).encode()})
        return write_atomically(path, lambda temporary: pq.write_table(table, temporary))

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, or something else.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"path must name the samples of a comparison, and there is no file {path}")
        try:
            table = pq.read_table(path)
            settings = json.loads((table.schema.metadata or {})[METADATA_KEY])
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged, or not the samples of a comparison ({error})") from error
        return cls(samples=table, settings=settings)


def _resampled_counts(count: int, resamples: int, seed: int) -> _Values:
    """How often each resample draws each image: (R, N). A mean over a resample is then one matrix product."""
    generator = np.random.default_rng(seed)
    weights = np.zeros((resamples, count))
    for row in weights:
        row[:] = np.bincount(generator.integers(0, count, count), minlength=count) if count else 0
    return weights


def _interval(values: _Values, weights: _Values, confidence: float) -> Interval:
    defined = ~np.isnan(values)
    if not defined.any():
        return Interval(mean=math.nan, low=math.nan, high=math.nan, images=0)
    kept, drawn = values[defined], weights[:, defined]
    total = drawn.sum(axis=1)
    means = (drawn @ kept)[total > 0] / total[total > 0]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean=float(kept.mean()), low=float(low), high=float(high), images=int(defined.sum()))


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}" if abs(value) < 100 else f"{value:.3g}"


def _plain(interval: Interval) -> dict[str, float | int | None]:
    return {
        "mean": _finite(interval.mean),
        "low": _finite(interval.low),
        "high": _finite(interval.high),
        "images": interval.images,
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None

"""What a comparison found: a table of samples, means with intervals, tables to read, plots of the curves.

Letters: N images, R resamples, S steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mhex_core import statistics
from mhex_core.files import write_atomically
from mhex_vision.comparison.scores import CURVES, parse_metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METADATA_KEY = b"mhex_vision_comparison"
_Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Interval(statistics.Interval):
    """A mean over images with its bootstrap interval: mean, low, high and count."""

    @property
    def images(self) -> int:
        """Over how many images, the count."""
        return self.count


@dataclass(frozen=True, kw_only=True)
class Summary(statistics.Summary):
    """One method's results, see `mhex_core.statistics.Summary`."""

    scores: Mapping[str, Interval]
    differences: Mapping[str, Interval]

    @property
    def seconds_per_image(self) -> float:
        """Median over batches of what the maps took."""
        return self.seconds


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
        found = statistics.summarize(
            {method: {metric: self.values(method, metric) for metric in self.metrics} for method in self.methods},
            {method: self.values(method, "seconds") for method in self.methods},
            confidence=confidence,
            resamples=resamples,
            seed=seed,
        )
        return tuple(
            Summary(
                method=one.method,
                scores=_of_images(one.scores),
                differences=_of_images(one.differences),
                seconds=one.seconds,
            )
            for one in found
        )

    def table(self, summaries: Sequence[Summary] | None = None) -> list[list[str]]:
        """Rows of text: a head, then one row per method; the best mean of each metric is marked with a star."""
        columns = [
            statistics.Column(name=m.name, title=m.title, higher_is_better=m.score.higher_is_better)
            for m in map(parse_metric, self.metrics)
        ]
        return statistics.table(self.summary() if summaries is None else summaries, columns, unit="image")

    def to_text(self, summaries: Sequence[Summary] | None = None) -> str:
        """The table for a terminal."""
        return statistics.to_text(self.table(summaries))

    def to_markdown(self, summaries: Sequence[Summary] | None = None) -> str:
        """The table as Markdown, best values bold."""
        return statistics.to_markdown(self.table(summaries))

    def to_json(self, summaries: Sequence[Summary] | None = None) -> str:
        """Settings and summary as JSON."""
        summaries = self.summary() if summaries is None else summaries
        record = {"settings": dict(self.settings), "methods": statistics.to_record(summaries, unit="image")}
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


def _of_images(intervals: Mapping[str, statistics.Interval]) -> dict[str, Interval]:
    return {metric: Interval(**vars(one)) for metric, one in intervals.items()}

"""What a comparison of texts found: a table of samples, means with intervals, tables to read.

Letters: N texts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from mhex_core import statistics
from mhex_core.files import write_atomically
from mhex_core.statistics import Summary, Values
from mhex_text.comparison.scores import parse_metric

METADATA_KEY = b"mhex_text_comparison"


@dataclass(frozen=True, kw_only=True, eq=False)
class TextComparison:
    """Every method's value on every text.

    Attributes:
        samples: One row per method and text: `method`, `place` (of the text in the data), `label` (the class
            explained), `probability` (the judge's, of that class), `tokens` (how many carry a score), `truncated`, one
            column per metric, NaN where it is undefined, and `seconds` (what the scores took, the batch's time shared
            out).
        settings: What was compared: data, model, judge, tokenizer, methods, metrics.
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
        """Which texts of the data were compared, in ascending order."""
        return tuple(sorted(set(self.samples["place"].to_pylist())))

    def values(self, method: str, column: str) -> Values:
        """One method's column, by text: float64 (N,).

        Raises:
            KeyError: There is no such method or column.
        """
        if method not in self.methods or column not in self.samples.column_names:
            raise KeyError(f"there is no {column!r} of {method!r}")
        rows = self.samples.filter(pa.compute.equal(self.samples["method"], method)).sort_by("place")
        listed: Values = np.array(rows[column].to_pylist(), dtype=np.float64)
        return listed

    def summary(self, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[Summary, ...]:
        """Means with bootstrap intervals over texts; the same resamples for every method and metric.

        Args:
            confidence: Of the intervals, in (0, 1).
            resamples: How many.
            seed: Of the resamples.
        """
        return statistics.summarize(
            {method: {metric: self.values(method, metric) for metric in self.metrics} for method in self.methods},
            {method: self.values(method, "seconds") for method in self.methods},
            confidence=confidence,
            resamples=resamples,
            seed=seed,
        )

    def table(self, summaries: Sequence[Summary] | None = None) -> list[list[str]]:
        """Rows of text: a head, then one row per method; the best mean of each metric is marked with a star."""
        columns = [
            statistics.Column(name=one.name, title=one.title, higher_is_better=one.score.higher_is_better)
            for one in map(parse_metric, self.metrics)
        ]
        return statistics.table(self.summary() if summaries is None else summaries, columns, unit="text")

    def to_text(self, summaries: Sequence[Summary] | None = None) -> str:
        """The table for a terminal."""
        return statistics.to_text(self.table(summaries))

    def to_markdown(self, summaries: Sequence[Summary] | None = None) -> str:
        """The table as Markdown, best values bold."""
        return statistics.to_markdown(self.table(summaries))

    def to_json(self, summaries: Sequence[Summary] | None = None) -> str:
        """Settings and summary as JSON."""
        summaries = self.summary() if summaries is None else summaries
        record = {"settings": dict(self.settings), "methods": statistics.to_record(summaries, unit="text")}
        return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write samples and settings to one Parquet file, in one step."""
        table = self.samples.replace_schema_metadata({METADATA_KEY: json.dumps(dict(self.settings)).encode()})
        return write_atomically(path, lambda temporary: pq.write_table(table, temporary))

    @classmethod
    def load(cls, path: str | Path) -> TextComparison:
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

"""Explanations of many texts by many methods, measured side by side."""

from __future__ import annotations

try:
    import datasets  # noqa: F401
    import pyarrow  # noqa: F401, ICN001
    import tqdm  # noqa: F401
except ImportError as error:  # the extra is not there
    raise ImportError(f'comparing needs {error.name}: pip install "mhex-text[bench]"') from error

from mhex_core.statistics import Interval, Summary
from mhex_text.comparison.results import TextComparison
from mhex_text.comparison.run import compare
from mhex_text.comparison.scores import DEFAULT_METRICS, SCORES, parse_metric

__all__ = ["DEFAULT_METRICS", "SCORES", "Interval", "Summary", "TextComparison", "compare", "parse_metric"]

"""Explanations of many images by many methods, measured side by side."""

from mhex_vision.comparison.examples import draw_examples
from mhex_vision.comparison.results import Comparison, Interval, Summary
from mhex_vision.comparison.run import compare
from mhex_vision.comparison.scores import DEFAULT_METRICS, SCORES, parse_metric

__all__ = ["DEFAULT_METRICS", "SCORES", "Comparison", "Interval", "Summary", "compare", "draw_examples", "parse_metric"]

"""How good is an explanation? What images and text share, and the metrics of text."""

from mhex_core.metrics.common import curve_area, descending, min_max, relative_drop, top_fraction
from mhex_core.metrics.tokens import (
    ERASER_FRACTIONS,
    aopc,
    comprehensiveness,
    hide_tokens,
    sufficiency,
    token_avg_drop,
)

__all__ = [
    "ERASER_FRACTIONS",
    "aopc",
    "comprehensiveness",
    "curve_area",
    "descending",
    "hide_tokens",
    "min_max",
    "relative_drop",
    "sufficiency",
    "token_avg_drop",
    "top_fraction",
]

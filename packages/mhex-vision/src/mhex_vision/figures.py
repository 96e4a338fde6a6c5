"""Figures fit for a paper: text that stays text, laid out to the inch, with nothing clipped and nothing overlapping.

matplotlib is imported here, so this module is imported when something is drawn.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from mhex_core import _checks
from mhex_vision import drawing

# TrueType in PDF and PostScript, text elements in SVG: words can be searched, and an editor can change them.
_TEXT_STAYS_TEXT: dict[Any, Any] = {"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none"}

# Inches.
_CELL = 1.25
_LEAST_CELL = 0.5
_LEAST_WIDTH = 1.2
_GAP = 0.07
_MARGIN = 0.05
_BELOW_HEADING = 0.03
_BAR = 0.07
_LONGEST_BAR = 2.0
_TICK_LABELS = 0.16

# Points.
_TITLE = 7.0
_SMALL = 6.0
_TITLE_PAD = 2.5

_LEADING = 1.25
_SLACK = 0.94  # of a cell's width that a title may fill: a renderer rounds glyphs to pixels

# Behind a space or one of these a title may be broken, and behind the full stop of a layer's name.
_BREAKS = re.compile(r"(?<=[\s:,_/-])|(?<=\.)(?=[^\W\d])")

_MEANING = {
    False: "saliency, between each map's own extremes",
    True: "evidence for (1) and against (-1) the class, relative to each map's strongest",
}


class PaperFigure(Figure):
    """A figure that pyplot knows nothing of, whose text stays text in PDF, PostScript and SVG files."""

    def savefig(self, fname: Any, **options: Any) -> None:
        """Write it, as matplotlib does."""
        with mpl.rc_context(_TEXT_STAYS_TEXT):
            super().savefig(fname, **options)

    def _repr_png_(self) -> bytes:
        """What a notebook shows; without pyplot nothing else tells it how."""
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=150)
        return file.getvalue()


def draw(
    rows: Sequence[drawing.Row],
    *,
    colormap: str | None = None,
    width: float | None = None,
    signed: bool | None = None,
) -> PaperFigure:
    """Image, overlay and maps of each sample, one sample below the other.

    Args:
        rows: At least one.
        colormap: A matplotlib colour map; None means `drawing.COLORMAP`, or for signed maps `drawing.DIVERGING`.
        width: Of the figure in inches, at least 1.2: a sample's pictures then take as many lines as they need. None
            means one line, as wide as it gets.
        signed: Whether maps lie in [-1, 1]; None means those in whose place any sample's map has a negative value.

    Returns:
        A figure whose first axes are the pictures, sample by sample, followed by one per colour scale.
    """
    signs = _signs(rows, signed)
    across, cell = _grid(rows, len(signs), width)
    total = 2 * _MARGIN + across * (cell + _GAP) - _GAP
    lines = [line for row in rows for line in _lines(row, across, cell, total - 2 * _MARGIN)]
    scales = sorted(set(signs[1:]))
    labels = {kind: _wrapped(_MEANING[kind], total - 2 * _MARGIN, size=_SMALL) for kind in scales}
    bars = {kind: 2 * _GAP + _BAR + _TICK_LABELS + _text_height(labels[kind], _SMALL) for kind in scales}
    height = 2 * _MARGIN + sum(line.height + _GAP for line in lines) - _GAP + sum(bars.values())
    page = _Page(PaperFigure(figsize=(total, height)), total, height)
    top = height - _MARGIN
    for line in lines:
        pictures = _pictures(line.row, signs, colormap)
        for number, place in enumerate(line.places):
            left, tall = _MARGIN + number * (cell + _GAP), cell * _aspect(line.row)
            axes = page.axes(left, top - line.height, cell, tall)
            axes.set_axis_off()
            picture, options = pictures[place]
            axes.imshow(picture, **options)
            text: dict[str, Any] = {"fontsize": _TITLE, "linespacing": _LEADING, "parse_math": False}
            axes.set_title(line.titles[number], pad=_TITLE_PAD, **text)
            if place == 0:
                # It reads on over the next pictures, above their titles.
                axes.set_title(line.heading, pad=_TITLE_PAD + 72 * line.titles_height, loc="left", **text)
        top -= line.height + _GAP
    top += _GAP
    for kind in scales:
        _scale(page, top - 2 * _GAP, kind, labels[kind], colormap)
        top -= bars[kind]
    return page.figure


class _Line(NamedTuple):
    """Pictures beside each other: some or all of a sample, the first below its heading."""

    row: drawing.Row
    places: range
    heading: str
    titles: list[str]
    titles_height: float
    height: float


def _lines(row: drawing.Row, across: int, cell: float, whole: float) -> Iterator[_Line]:
    titles = [_wrapped(title, cell) for title in _titles(row)]
    for start in range(0, len(titles), across):
        some = titles[start : start + across]
        heading = "" if start else _wrapped(row.title, whole)
        above = max(map(_text_height, some)) + (_BELOW_HEADING if heading else 0)
        height = _text_height(heading) + above + _TITLE_PAD / 72 + cell * _aspect(row)
        yield _Line(row, range(start, start + len(some)), heading, some, above, height)


def _titles(row: drawing.Row) -> list[str]:
    return ["", "overlay", *(name for name, _ in row.maps)]


class _Page:
    """A figure in inches from its lower left corner."""

    def __init__(self, figure: PaperFigure, width: float, height: float) -> None:
        self.figure, self.width, self.height = figure, width, height

    def axes(self, left: float, bottom: float, width: float, height: float) -> Axes:
        return self.figure.add_axes((left / self.width, bottom / self.height, width / self.width, height / self.height))


def _scale(page: _Page, top: float, signed: bool, label: str, colormap: str | None) -> None:
    """A colour bar in the middle, its top at `top`."""
    long = min(_LONGEST_BAR, 0.6 * page.width)
    axes = page.axes((page.width - long) / 2, top - _BAR, long, _BAR)
    ticks = (-1, 0, 1) if signed else (0, 0.5, 1)
    colors = ScalarMappable(Normalize(ticks[0], 1), colormap or _default(signed))
    bar = page.figure.colorbar(colors, cax=axes, orientation="horizontal", ticks=ticks)
    bar.ax.set_xticklabels([f"{tick:g}" for tick in ticks])
    bar.ax.tick_params(labelsize=_SMALL, length=2, pad=1, width=0.5)
    bar.outline.set_linewidth(0.5)
    bar.set_label(label, fontsize=_SMALL, labelpad=1, linespacing=_LEADING)


def _signs(rows: Sequence[drawing.Row], signed: bool | None) -> list[bool]:
    """Whether what stands in each place is signed; the image, in the first, never is."""
    columns = 2 + max(len(row.maps) for row in rows)
    signs = [False] * columns
    for row in rows:
        for place, saliency in enumerate((row.overlay, *(found for _, found in row.maps)), start=1):
            signs[place] |= bool((saliency < 0).any()) if signed is None else signed
    return signs


def _pictures(row: drawing.Row, signs: Sequence[bool], colormap: str | None) -> list[tuple[Any, dict[str, Any]]]:
    """What `imshow` is given for each place."""
    over = drawing.overlay(row.image.unsqueeze(0), row.overlay.unsqueeze(0), colormap=colormap, signed=signs[1])[0]
    found: list[tuple[Any, dict[str, Any]]] = [
        (row.image.movedim(0, -1).cpu().numpy(), {}),
        (over.movedim(0, -1).numpy(), {}),
    ]
    for (_, saliency), signed in zip(row.maps, signs[2:], strict=False):
        options = {"cmap": colormap or _default(signed), "vmin": -1 if signed else 0, "vmax": 1}
        found.append((saliency.detach().float().cpu().numpy(), options))
    return found


def _default(signed: bool) -> str:
    return drawing.DIVERGING if signed else drawing.COLORMAP


def _grid(rows: Sequence[drawing.Row], columns: int, width: float | None) -> tuple[int, float]:
    """How many pictures stand in a line, and how wide each is."""
    if width is None:
        return columns, _CELL
    usable = _checks.number("width", width, low=_LEAST_WIDTH) - 2 * _MARGIN + _GAP
    words = {word for row in rows for title in _titles(row) for word in _BREAKS.split(title)}
    longest = max(_length(word, _TITLE) for word in words) / _SLACK
    least = min(max(longest, _LEAST_CELL), _CELL)
    most = min(columns, max(1, int(usable / (least + _GAP))))
    # As many lines as that takes, and these as full as they can be alike.
    across = math.ceil(columns / math.ceil(columns / most))
    return across, usable / across - _GAP


def _aspect(row: drawing.Row) -> float:
    return row.image.shape[1] / row.image.shape[2]


def _text_height(text: str, size: float = _TITLE) -> float:
    return (text.count("\n") + 1) * _LEADING * size / 72 if text else 0.0


def _wrapped(text: str, width: float, *, size: float = _TITLE) -> str:
    """A text in lines no wider than `width` inches; a word that is wider by itself is cut."""
    lines: list[str] = []
    for given in text.splitlines():
        line = ""
        for part in _BREAKS.split(given):
            if line and not _fits(line + part, width, size):
                lines.append(line.rstrip())
                line = ""
            line += part
            while not _fits(line, width, size) and len(line) > 1:
                kept = next(
                    count for count in range(len(line) - 1, 0, -1) if count == 1 or _fits(line[:count], width, size)
                )
                lines.append(line[:kept])
                line = line[kept:]
        lines.append(line.rstrip())
    return "\n".join(lines)


def _fits(text: str, width: float, size: float) -> bool:
    return _length(text, size) <= _SLACK * width


def _length(text: str, size: float) -> float:
    """In inches."""
    long, _, _ = text_to_path.get_text_width_height_descent(text.rstrip(), FontProperties(size=size), ismath=False)
    return float(long) / 72

"""Explanations of texts as a figure for print: words in lines, as strong a colour behind them as they count.

Blue with a solid line below speaks for the class, orange with a dotted line against it, as in `mhex_text.rendering`.
Everything is measured in points, without a screen's pixels, so that a figure comes out alike at any resolution.
matplotlib is imported here and only when something is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from mhex_core import _checks
from mhex_text.rendering import LIGHT, Colour, cut_note, printable, segments, strongest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mhex_text.explanation import TextExplanation

_POINTS = 72  # of an inch
_MARGIN = 6.0  # points, on all sides
_LEADING = 1.75  # line height over font size
_SPACE = 0.4  # between words, over font size
_SLACK = 1.08  # a screen's letters, fitted to its pixels, are that much wider at most
_UNSEEN = 60  # characters of what the model did not see
_FAINT = 0.02  # of the strongest score: below, a word has neither background nor line

# Letters as letters, TrueType where they are embedded; and as wide in pixels as they were measured.
_AS_WRITTEN: Any = {"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none", "text.hinting": "none"}

Measure = Callable[[str], float]


class Bit(NamedTuple):
    """Characters that stand together in one line.

    Attributes:
        text: Without white space.
        strength: Signed, in [-1, 1]; 0 for what has no score.
        grey: Whether it stands back.
    """

    text: str
    strength: float = 0.0
    grey: bool = False


class Placed(NamedTuple):
    """A bit and where it begins in its line, and how wide it is, in points."""

    bit: Bit
    start: float
    width: float


@dataclass(frozen=True)
class Paragraph:
    """What is laid out together: units, between which a line may end, of bits, between which it rather does not.

    Attributes:
        units: Of the paragraph's lines as the text has them.
        bold: Whether it is a heading.
        above: Space above, in font sizes.
    """

    units: Sequence[Sequence[Bit] | None]
    bold: bool = False
    above: float = 0.0


def plot(
    explanations: Sequence[TextExplanation], *, width: float = 5.5, font_size: float = 9.0, legend: bool = True
) -> Figure:
    """Draw texts below one another, each with what is predicted above it.

    The figure is no pyplot's: nothing keeps it but its owner, and `savefig` writes it. There letters stay letters, in
    PDF files (TrueType, as publishers ask for) as in SVG files. Lines run from left to right, whatever the script is.

    Args:
        explanations: Of the texts.
        width: Of the figure, in inches; its height follows.
        font_size: In points.
        legend: Whether the colours are explained below.

    Returns:
        The figure.

    Raises:
        TypeError: An argument is of another type.
        ValueError: There is no text, or an argument does not fit.
        ImportError: matplotlib is not installed.
    """
    inches = _checks.number("width", width, low=1)
    size = _checks.number("font_size", font_size, low=1)
    _checks.flag("legend", legend)
    if not len(explanations):
        raise ValueError("explanations must hold at least one text to be drawn, got none")
    kind = _figure_class()
    room = (_POINTS * inches - 2 * _MARGIN) / _SLACK
    if room < 4 * size:
        raise ValueError(f"width must leave room for four letters of font_size {size:g}, got {width!r}")
    paragraphs = [paragraph for item in explanations for paragraph in _paragraphs(item)]
    if legend:
        paragraphs.append(_legend())
    measures = {bold: _measure(size, bold=bold) for bold in (False, True)}
    laid = [(one, list(lines(one.units, room, measures[one.bold], space=_SPACE * size))) for one in paragraphs]
    rows = sum(_LEADING * len(placed) + one.above for one, placed in laid)
    height = size * rows + 2 * _MARGIN
    figure: Figure = kind(figsize=(inches, height / _POINTS), layout="none", facecolor=_tint(LIGHT.paper))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set(xlim=(0, _POINTS * inches), ylim=(height, 0))
    bottom = _MARGIN
    for one, placed in laid:
        bottom += size * one.above
        for line in placed:
            bottom += size * _LEADING
            for each in line:
                _draw(axes, each, _MARGIN + each.start, bottom, size, bold=one.bold)
    return figure


def lines(
    units: Sequence[Sequence[Bit] | None], room: float, measure: Measure, *, space: float
) -> Iterator[tuple[Placed, ...]]:
    """Break units into lines.

    Args:
        units: Bits that belong together; None ends a line.
        room: How wide a line may be.
        measure: How wide characters are.
        space: Between units.

    Yields:
        The bits of each line. A unit wider than the room is broken between its bits, and a bit within.
    """
    line: list[Placed] = []
    end = 0.0
    for unit in units:
        if unit is None:
            yield tuple(line)
            line, end = [], 0.0
            continue
        wide = sum(measure(bit.text) for bit in unit)
        if line and end + space + wide > room:
            yield tuple(line)
            line, end = [], 0.0
        start = end + space if line else 0.0
        for bit in unit:
            rest = bit
            while rest.text:
                count = _fitting(rest.text, room - start, measure)
                if not count and start:
                    yield tuple(line)
                    line, start = [], 0.0
                    continue
                head = rest._replace(text=rest.text[: max(count, 1)])
                line.append(Placed(head, start, measure(head.text)))
                start += line[-1].width
                rest = rest._replace(text=rest.text[max(count, 1) :])
        end = start
    yield tuple(line)


def _fitting(text: str, room: float, measure: Measure) -> int:
    """How many of its first characters there is room for."""
    if measure(text) <= room:
        return len(text)
    low, high = 0, len(text)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if measure(text[:middle]) <= room else (low, middle)
    return low


# ------------------------------------------------------------------------------------------------------ what is written


def _paragraphs(item: TextExplanation) -> Iterator[Paragraph]:
    title = f"Prediction: {printable(item.prediction_name)} ({item.probabilities[item.prediction]:.1%})"
    if item.target != item.prediction:
        title += f"; explained: {printable(item.target_name)} ({item.probabilities[item.target]:.1%})"
    yield Paragraph(_units([(title, Bit(""))]), bold=True, above=0.4)
    found = [segments(item, part) for part in range(len(item.texts))]
    top = strongest(found)
    for part, pieces in enumerate(found):
        if len(found) > 1:
            yield Paragraph(_units([(f"{('First', 'Second')[part]} text", Bit("", grey=True))]))
        shown = []
        for piece in pieces:
            text = piece.text.replace("\r\n", "\n")
            if not piece.seen and len(text) > _UNSEEN:
                text = f"{text[:_UNSEEN]}..."
            shown.append((text, Bit("", (piece.score or 0.0) / top, not piece.seen)))
        yield Paragraph(_units(shown))
    if note := cut_note(item):
        yield Paragraph(_units([(note, Bit("", grey=True))]))


def _legend() -> Paragraph:
    grey = Bit("", grey=True)
    return Paragraph(
        _units(
            [
                ("speaks\u00a0for", Bit("", 0.8)),
                (" the class explained, ", grey),
                ("against", Bit("", -0.8)),
                (" it; the stronger the colour, the more a word counts within its text", grey),
            ]
        ),
        above=0.6,
    )


def _units(pieces: Sequence[tuple[str, Bit]]) -> list[list[Bit] | None]:
    """Pieces cut at white space, which ends a unit, and at line feeds, which end a line."""
    units: list[list[Bit] | None] = []
    unit: list[Bit] = []
    for text, like in pieces:
        for number, line in enumerate(text.split("\n")):
            if number:
                units += [unit, None] if unit else [None]
                unit = []
            words = _words(line)
            for place, word in enumerate(words):
                if place and unit:
                    units.append(unit)
                    unit = []
                if word:
                    unit.append(like._replace(text=printable(word).replace("\u00a0", " ")))
    return [*units, unit] if unit else units


def _words(line: str) -> list[str]:
    """What white space separates; an empty one where a line begins or ends with it."""
    spaced = "".join(" " if letter.isspace() and letter != "\u00a0" else letter for letter in line)
    return spaced.split(" ")


# ---------------------------------------------------------------------------------------------------- how it is drawn


def _draw(axes: Axes, each: Placed, start: float, bottom: float, size: float, *, bold: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    bit, baseline = each.bit, bottom - 0.45 * size
    if abs(bit.strength) >= _FAINT:
        hue = LIGHT.positive if bit.strength > 0 else LIGHT.negative
        share = min(abs(bit.strength), 1.0)
        # Mixed with the paper, and not see-through: some formats of print know no transparency.
        back = (start, baseline - 1.05 * size)
        axes.add_patch(Rectangle(back, each.width, 1.4 * size, facecolor=_tint(hue, share), edgecolor="none"))
        below = baseline + 0.35 * size
        axes.add_line(
            Line2D(
                (start, start + each.width),
                (below, below),
                color=_tint(LIGHT.ink, share),
                linewidth=0.09 * size,
                linestyle="solid" if bit.strength > 0 else (0, (1.0, 1.0)),
                solid_capstyle="butt",
                dash_capstyle="butt",
            )
        )
    axes.text(
        start,
        baseline,
        bit.text,
        fontsize=size,
        color=_tint(LIGHT.grey if bit.grey else LIGHT.ink),
        fontweight="bold" if bold else "normal",
        va="baseline",
        ha="left",
        parse_math=False,
        usetex=False,
        clip_on=False,
    )


def _tint(hue: Colour, share: float = 1.0) -> tuple[float, float, float]:
    """A colour laid over the paper."""
    red, green, blue = ((paper + share * (one - paper)) / 255 for one, paper in zip(hue, LIGHT.paper, strict=True))
    return red, green, blue


def _measure(size: float, *, bold: bool) -> Measure:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    properties = FontProperties(size=size, weight="bold" if bold else "normal")
    paths = TextToPath()
    known: dict[str, float] = {}

    def measure(text: str) -> float:
        if text not in known:
            known[text] = float(paths.get_text_width_height_descent(text, properties, ismath=False)[0])
        return known[text]

    return measure


@cache
def _figure_class() -> Any:
    """A figure that is written with its letters as letters, and that notebooks show.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing texts needs matplotlib: pip install "mhex-text[plot]"') from error

    class TextFigure(Figure):
        """A figure whose files hold text, not outlines."""

        def savefig(self, fname: Any, **options: Any) -> None:
            """As `Figure.savefig`; what the process is set to is as before afterwards."""
            with mpl.rc_context(_AS_WRITTEN):
                super().savefig(fname, **options)

        def _repr_png_(self) -> bytes:
            import io

            held = io.BytesIO()
            self.savefig(held, format="png", dpi=2 * _POINTS)
            return held.getvalue()

    return TextFigure

"""How explanations of texts are shown without a script: as HTML, and in a terminal.

Blue speaks for a class and orange against it, which stay apart with any kind of colour vision; the sign also shows as
the line below a word. A text's words are measured against the strongest among them, never against those of other texts.
"""

from __future__ import annotations

import html
import itertools
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TextIO

if TYPE_CHECKING:
    from mhex_text.explanation import TextExplanation

ColourDepth = Literal["none", "256", "truecolour"]
Colour = tuple[int, int, int]

STRONGEST = 10
"""How many words are listed with their scores."""

_SHOWN_UNSEEN = 60  # characters of what the model did not see, in a terminal
_FAINT = 0.05  # of the strongest score: below, a word in a terminal has no background
_KEPT_FORMATS = "\u200c\u200d"  # joiners, without which Persian and emoji fall apart
_COLOUR_TERMINALS = ("xterm", "screen", "tmux", "rxvt", "linux", "ansi", "alacritty", "foot", "wezterm", "konsole")


class Palette(NamedTuple):
    """The colours of one scheme; a word's background is laid over the paper, as opaque as its score is strong."""

    paper: Colour
    ink: Colour
    grey: Colour
    positive: Colour
    negative: Colour


LIGHT = Palette((255, 255, 255), (26, 26, 26), (95, 95, 95), (86, 160, 220), (245, 150, 50))
DARK = Palette((22, 24, 28), (240, 240, 240), (165, 165, 165), (30, 95, 150), (150, 75, 0))

_STYLE = """
.mhex-text{VARIABLES_LIGHT;color-scheme:light dark;color:rgb(var(--ink));background:rgb(var(--paper));
 font:1rem/1.5 system-ui,sans-serif;max-width:46rem;padding:.75rem;overflow-wrap:anywhere;
 -webkit-print-color-adjust:exact;print-color-adjust:exact}
.mhex-text article{margin:0 0 1.5rem}
.mhex-text p{margin:.25rem 0}
.mhex-text .note,.mhex-text .unseen,.mhex-text summary{color:rgb(var(--grey))}
.mhex-text .text{white-space:pre-wrap;line-height:1.9;margin:.5rem 0;padding:.25rem .5rem;
 border:1px solid rgb(var(--grey) / .4);border-radius:.25rem}
.mhex-text .for,.mhex-text .against{border-bottom:2px solid rgb(var(--ink) / var(--s));
 -webkit-box-decoration-break:clone;box-decoration-break:clone}
.mhex-text .for{background:rgb(var(--positive) / var(--s))}
.mhex-text .against{background:rgb(var(--negative) / var(--s));border-bottom-style:dotted}
.mhex-text .for:empty::before,.mhex-text .against:empty::before{content:"\\25AB"}
.mhex-text table{border-collapse:collapse}
.mhex-text th,.mhex-text td{text-align:start;font-weight:normal;padding:.1rem 1rem .1rem 0}
.mhex-text td{font-variant-numeric:tabular-nums}
@media (prefers-color-scheme:dark){.mhex-text{VARIABLES_DARK}}
"""


class Cut(NamedTuple):
    """A piece of a text: a word, several that overlap, or what lies between words.

    Attributes:
        text: As it stands in the text; the cuts of a text put together are the text.
        words: The places of its words in `TextExplanation.words`; none for what lies between them.
        seen: Whether the model read it.
    """

    text: str
    words: tuple[int, ...]
    seen: bool


class Segment(NamedTuple):
    """A piece of a text: a word with its score, or, where the score is None, what lies between words.

    Attributes:
        text: As it stands in the text; the segments of a text put together are the text.
        score: The sum over the words it covers.
        seen: Whether the model read it.
    """

    text: str
    score: float | None
    seen: bool


def cuts(explanation: TextExplanation, part: int) -> tuple[Cut, ...]:
    """One text cut into words and what lies between them.

    Words that overlap (a normalizer may make several of one character) are one cut. A word of no characters is a cut
    without text.

    Args:
        explanation: Of the text.
        part: 0, or 1 for the second text of a pair.
    """
    text, (first, last) = explanation.texts[part], explanation.seen[part]
    merged: list[tuple[int, int, tuple[int, ...]]] = []
    for place, word in enumerate(explanation.words):
        if word.part != part:
            continue
        if merged and word.start < merged[-1][1]:
            start, end, places = merged[-1]
            merged[-1] = (start, max(end, word.end), (*places, place))
        else:
            merged.append((word.start, word.end, (place,)))
    found: list[Cut] = []
    position = 0
    for start, end, places in (*merged, (len(text), len(text), ())):
        bounds = [position, *(bound for bound in (first, last) if position < bound < start), start]
        found += [
            Cut(text[low:high], (), first <= low < last) for low, high in itertools.pairwise(bounds) if low < high
        ]
        if places:
            found.append(Cut(text[start:end], places, True))
        position = end
    return tuple(found)


def segments(explanation: TextExplanation, part: int) -> tuple[Segment, ...]:
    """The same with the sum of the scores of each cut's words.

    Args:
        explanation: Of the text.
        part: 0, or 1 for the second text of a pair.
    """
    words = explanation.words
    return tuple(
        Segment(cut.text, sum(words[place].score for place in cut.words) if cut.words else None, cut.seen)
        for cut in cuts(explanation, part)
    )


def html_fragment(explanations: Sequence[TextExplanation]) -> str:
    """One element that needs nothing else, and whose style reaches nothing outside it; each text to the letter."""
    style = _STYLE.replace("VARIABLES_LIGHT", _variables(LIGHT)).replace("VARIABLES_DARK", _variables(DARK))
    legend = (
        '<p class="note"><span class="for" style="--s:.8">speaks for</span> the class explained (blue, solid line), '
        '<span class="against" style="--s:.8">against</span> it (orange, dotted line). '
        "The stronger the colour, the more it counts within its text.</p>"
    )
    articles = "".join(_article(item) for item in explanations)
    return f'<div class="mhex-text"><style>{style}</style>{legend}{articles}</div>'


def colour_depth(stream: TextIO, *, environment: Mapping[str, str] | None = None) -> ColourDepth:
    """Which colours a stream shows.

    NO_COLOR (set to anything) means none. Then FORCE_COLOR means colours wherever the stream goes, unless it is "0",
    which means none. Otherwise there are colours where the stream is a terminal whose TERM is known for them.

    Args:
        stream: Where the text goes.
        environment: The variables that decide; None means those of the process.
    """
    variables = os.environ if environment is None else environment
    if variables.get("NO_COLOR") or variables.get("FORCE_COLOR") == "0":
        return "none"
    depth: ColourDepth = "256"
    if variables.get("COLORTERM") in ("truecolor", "24bit") or variables.get("WT_SESSION"):
        depth = "truecolour"
    if variables.get("FORCE_COLOR"):
        return "truecolour" if variables["FORCE_COLOR"] == "3" else depth
    terminal = variables.get("TERM", "")
    known = "color" in terminal or "kitty" in terminal or terminal.startswith(_COLOUR_TERMINALS)
    if terminal == "dumb" or not (known or variables.get("WT_SESSION")):
        return "none"
    try:
        return depth if stream.isatty() else "none"
    except ValueError:  # a closed stream: writing to it will say so
        return "none"


def write_terminal(explanations: Sequence[TextExplanation], file: TextIO, *, colour: bool | None = None) -> None:
    """Write `terminal_text` to a stream, characters its encoding does not know as escapes.

    Args:
        explanations: What to show.
        file: Where to.
        colour: Whether words have a background; None leaves it to `colour_depth`.

    Raises:
        TypeError: `colour` is neither a bool nor None.
    """
    if colour is not None and not isinstance(colour, bool):
        raise TypeError(f"colour must be a bool or None, got {type(colour).__name__}")
    depth: ColourDepth = "none"
    if colour is None:
        depth = colour_depth(file)
    elif colour:
        depth = colour_depth(file, environment={"FORCE_COLOR": "1", "COLORTERM": os.environ.get("COLORTERM", "")})
    text = f"{terminal_text(explanations, depth=depth)}\n"
    encoding = getattr(file, "encoding", None)
    file.write(text.encode(encoding, "backslashreplace").decode(encoding) if encoding else text)


def terminal_text(explanations: Sequence[TextExplanation], *, depth: ColourDepth = "none") -> str:
    """Each text, its strongest words and their scores, as lines.

    No control character of a text gets through, nor one that turns the direction of writing: they stand as escapes.
    Lines of a text are indented, so that none can pass for one of ours.

    Args:
        explanations: What to show.
        depth: Which colours may be used; with any, words that speak against the class are also underlined.
    """
    blocks = []
    for number, item in enumerate(explanations, start=1):
        lines = [f"text {number} of {len(explanations)}"] if len(explanations) > 1 else []
        lines += _facts(item, printable)
        pieces = [segments(item, part) for part in range(len(item.texts))]
        top = strongest(pieces)
        for part, found in enumerate(pieces):
            lines += ["second text:" if part else "first text:"] if len(pieces) > 1 else []
            written = "".join(_terminal_segment(segment, top, depth) for segment in found)
            lines += [f"  {line}" for line in written.split("\n")]
        lines += [f"{score:>10} {printable(text)}" for text, score in _listed(pieces)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def printable(text: str) -> str:
    """A text without anything that acts on a terminal: controls, formats and line breaks as escapes, tabs as spaces."""
    return "".join(
        " "
        if character == "\t"
        else character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _KEPT_FORMATS
        else character
        for character in text
    )


def signed(score: float) -> str:
    """A score with its sign, to three digits."""
    return f"{score + 0.0:+.3g}"  # + 0.0: no minus before a zero


def _facts(item: TextExplanation, show: Callable[[str], str]) -> list[str]:
    """What is known about a text as a whole, in plain words; `show` makes the name of a class fit to be shown."""
    predicted, explained = show(item.prediction_name), show(item.target_name)
    facts = [f"Prediction: {predicted}, probability {item.probabilities[item.prediction]:.1%}."]
    if item.target != item.prediction:
        facts[0] += f" Explained: {explained}, probability {item.probabilities[item.target]:.1%}."
    return [*facts, *([note] if (note := cut_note(item)) else [])]


def cut_note(item: TextExplanation) -> str:
    """How much of a text the model did not see, in plain words; nothing where it saw all of it."""
    if not item.truncated:
        return ""
    return (
        f"The model did not see {item.truncated} of {sum(map(len, item.texts))} characters: "
        "the text is longer than what it reads."
    )


def strongest(pieces: Sequence[Sequence[Segment]]) -> float:
    """The largest |score| of both texts, or 1 where all are zero."""
    return max((abs(segment.score or 0.0) for found in pieces for segment in found), default=0.0) or 1.0


def _listed(pieces: Sequence[Sequence[Segment]]) -> list[tuple[str, str]]:
    """The words of the largest |score| and their scores, the strongest first; none that has zero."""
    words = [(segment.text, segment.score) for found in pieces for segment in found if segment.score]
    words.sort(key=lambda word: -abs(word[1]))
    return [(text, signed(score)) for text, score in words[:STRONGEST]]


def _article(item: TextExplanation) -> str:
    pieces = [segments(item, part) for part in range(len(item.texts))]
    top = strongest(pieces)
    # The direction of writing of a name, or of a word in the table, must not reach what follows.
    facts = "".join(f"<p>{fact}</p>" for fact in _facts(item, lambda name: f"<bdi>{html.escape(name)}</bdi>"))
    areas = []
    for part, found in enumerate(pieces):
        if len(pieces) > 1:
            areas.append(f'<p class="note">{"Second" if part else "First"} text</p>')
        # The direction of writing follows the text; which language it is in nobody here knows.
        areas.append(
            f'<div class="text" dir="auto" lang="">{"".join(_html_segment(each, top) for each in found)}</div>'
        )
    rows = "".join(
        f'<tr><th scope="row"><bdi>{html.escape(text)}</bdi></th><td>{score}</td></tr>'
        for text, score in _listed(pieces)
    )
    table = f"<details><summary>Strongest words</summary><table>{rows}</table></details>" if rows else ""
    return f"<article>{facts}{''.join(areas)}{table}</article>"


def _html_segment(segment: Segment, strongest: float) -> str:
    # A carriage return that stands as itself would be read as a line feed.
    text = html.escape(segment.text).replace("\r", "&#13;")
    if not segment.seen:
        return f'<span class="unseen" title="not seen by the model">{text}</span>'
    if segment.score is None:
        return text
    strength = abs(segment.score) / strongest
    sign = "for" if segment.score >= 0 else "against"
    return f'<span class="{sign}" style="--s:{strength:.3f}" title="{signed(segment.score)}">{text}</span>'


def _terminal_segment(segment: Segment, strongest: float, depth: ColourDepth) -> str:
    text = segment.text.replace("\r\n", "\n")
    if not segment.seen:
        shown = text if len(text) <= _SHOWN_UNSEEN else f"{text[:_SHOWN_UNSEEN]}..."
        return f"[not seen: {printable(shown)}]"
    strength = abs(segment.score or 0.0) / strongest
    lines = [printable(line) for line in text.split("\n")]
    if depth == "none" or segment.score is None or strength < _FAINT:
        return "\n".join(lines)
    # From grey, which stands back on dark and on light ground, to the full colour; black is readable on both.
    full = LIGHT.positive if segment.score > 0 else LIGHT.negative
    red, green, blue = (round(190 + strength * (channel - 190)) for channel in full)
    if depth == "truecolour":
        paint = f"38;2;0;0;0;48;2;{red};{green};{blue}"
    else:
        paint = f"38;5;16;48;5;{_cube((red, green, blue))}"
    underline = "4;" if segment.score < 0 else ""
    return "\n".join(f"\x1b[{underline}{paint}m{line}\x1b[0m" if line else line for line in lines)


def _cube(colour: Colour) -> int:
    """The nearest of the 256 colours: of the cube of six levels each, or of the ramp of greys."""
    levels = (0, 95, 135, 175, 215, 255)

    def distance(other: Sequence[int]) -> int:
        return sum((one - two) ** 2 for one, two in zip(colour, other, strict=True))

    near = [min(range(6), key=lambda level: abs(levels[level] - channel)) for channel in colour]
    grey = min(max(round((sum(colour) / 3 - 8) / 10), 0), 23)
    if distance((8 + 10 * grey,) * 3) < distance([levels[level] for level in near]):
        return 232 + grey
    return 16 + 36 * near[0] + 6 * near[1] + near[2]


def _variables(palette: Palette) -> str:
    return ";".join(f"--{name}:{' '.join(map(str, colour))}" for name, colour in palette._asdict().items())

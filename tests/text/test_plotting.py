"""`plot`: texts as figures for print, to the letter, within their bounds, and without a trace in the process."""

import builtins
import itertools
import re
import sys
from xml.etree import ElementTree as ET

import pytest

pytest.importorskip("matplotlib")

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg

from mhex_text import Explanation, plotting
from mhex_text.plotting import Bit, lines
from mhex_text.rendering import LIGHT

from .test_rendering import at_words, explain

TEXT = "not a good film, and $5 for x_1^2 \\alpha $ of it"
LONG = " ".join(f"word{number}" for number in range(120)) + " " + "w" * 200


def drawn(figure):
    """The texts of a figure with their extents in pixels, at its own resolution."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    (axes,) = figure.axes
    return [(text, text.get_window_extent(renderer)) for text in axes.texts if text.get_text()]


def shown(figure):
    return "".join(text.get_text() for text in figure.axes[0].texts)


@pytest.mark.parametrize("width", [1.5, 3.3, 7])
@pytest.mark.parametrize("text", [TEXT, LONG, "good", "one\ntwo  three\r\nfour", ""])
def test_every_letter_is_there_and_within_the_figure(text, width):
    figure = explain(text, at_words(text)).plot(width=width)
    assert figure.get_size_inches()[0] == pytest.approx(width)
    assert "".join(text.split()) in shown(figure)
    bounds = figure.bbox
    for _, extent in drawn(figure):
        assert bounds.x0 <= extent.x0 < extent.x1 <= bounds.x1
        assert bounds.y0 <= extent.y0 < extent.y1 <= bounds.y1
    for patch in figure.axes[0].patches:
        box = patch.get_window_extent()
        assert bounds.x0 <= box.x0
        assert box.x1 <= bounds.x1


def test_words_of_a_line_do_not_overlap():
    figure = explain(LONG, at_words(LONG)).plot(legend=False)
    by_line = {}
    for text, extent in drawn(figure):
        by_line.setdefault(round(text.get_position()[1], 3), []).append((extent.x0, extent.x1))
    assert len(by_line) > 5
    for spans in by_line.values():
        spans.sort()
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert end <= start + 1  # a pixel


def test_the_colour_and_the_line_say_how_much_and_which_way():
    figure = explain("not a good film", [(0, 0, 3, -1.0), (0, 6, 10, 0.5), (0, 11, 15, 0.0)]).plot(legend=False)
    (axes,) = figure.axes
    assert len(axes.patches) == len(axes.lines) == 2  # a score of zero has neither
    against, speaks_for = axes.patches
    assert against.get_facecolor()[:3] == pytest.approx([channel / 255 for channel in LIGHT.negative])
    half = [(channel + 255) / 510 for channel in LIGHT.positive]
    assert speaks_for.get_facecolor()[:3] == pytest.approx(half)
    assert [line.get_linestyle() for line in axes.lines] == ["--", "-"]
    assert all(patch.get_facecolor()[3] == 1 for patch in axes.patches)


def test_the_title_says_what_is_predicted_and_explained():
    item = explain("good film", [(0, 0, 4, 1.0)])
    assert shown(item.plot()).startswith("Prediction:good(75.0%)goodfilm")
    other = explain("good film", [(0, 0, 4, 1.0)], seen=((0, 4),), target=0)
    found = shown(other[0].plot())
    assert "Prediction:good(75.0%);explained:bad(25.0%)" in found
    assert "Themodeldidnotsee5of9characters" in found
    assert "speaks fortheclassexplained,againstit" in found
    assert "speaks for" not in shown(other.plot(legend=False))


def test_what_was_not_seen_is_grey_and_short():
    figure = explain("good " + "x" * 1000, [(0, 0, 4, 1.0)], seen=((0, 4),)).plot(width=8)
    grey = [text.get_text() for text in figure.axes[0].texts if text.get_color() == plotting._tint(LIGHT.grey)]
    assert f"{'x' * 59}..." in grey


def test_several_texts_and_pairs_stand_below_one_another():
    one, pair = explain("good film", [(0, 0, 4, 1.0)]), explain(("good", "bad film"), [(1, 0, 3, -2.0)])
    figure = Explanation.concatenate([one, pair]).plot()
    found = shown(figure)
    assert found.count("Prediction:") == 2
    assert found.index("Firsttextgood") < found.index("Secondtextbadfilm")
    assert figure.get_size_inches()[1] > one.plot().get_size_inches()[1]


def test_hostile_text_is_drawn_as_it_is():
    figure = explain("a\x1b[31m \u202e$\\frac$", [(0, 0, 3, 1.0)], class_names=("$x$", "a\nb")).plot()
    found = shown(figure)
    assert "\\x1b[31m" in found
    assert "\\u202e$\\frac$" in found
    assert "a\\nb" in found
    with mpl.rc_context({"text.usetex": True, "text.parse_math": True}):
        drawn(figure)


def test_letters_stay_letters_in_files(tmp_path):
    figure = explain("good film", [(0, 0, 4, 1.0), (0, 5, 9, -0.5)]).plot()
    before = dict(mpl.rcParams)
    figure.savefig(tmp_path / "a.svg")
    figure.savefig(tmp_path / "a.pdf")
    figure.savefig(tmp_path / "a.png")
    assert dict(mpl.rcParams) == before
    words = [
        "".join(element.itertext()).strip()
        for element in ET.parse(tmp_path / "a.svg").iter()
        if element.tag.endswith("text")
    ]
    assert {"good", "film"} <= set(words)
    pdf = (tmp_path / "a.pdf").read_bytes()
    assert b"/FontFile2" in pdf  # TrueType
    assert b"/Type3" not in pdf
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_settings_are_as_before_when_writing_fails(tmp_path):
    figure = explain("good", []).plot()
    before = dict(mpl.rcParams)
    with pytest.raises(FileNotFoundError):
        figure.savefig(tmp_path / "none" / "a.pdf")
    assert dict(mpl.rcParams) == before


def test_the_style_of_the_process_does_not_matter():
    plain = explain(TEXT, at_words(TEXT)).plot()
    dark = {"figure.facecolor": "black", "text.color": "white", "figure.autolayout": True, "axes.facecolor": "black"}
    with mpl.rc_context(dark):
        styled = explain(TEXT, at_words(TEXT)).plot()
    assert styled.get_facecolor() == plain.get_facecolor() == (1, 1, 1, 1)
    assert {text.get_color() for text in styled.axes[0].texts} == {text.get_color() for text in plain.axes[0].texts}


def test_pyplot_is_not_touched(monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    explain("good", [(0, 0, 4, 1.0)]).plot()._repr_png_()
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    plotting._figure_class.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=re.escape('drawing texts needs matplotlib: pip install "mhex-text[plot]"')):
        explain("good", []).plot()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"width": "wide"}, TypeError, "width must be a number, got str"),
        ({"width": 0.5}, ValueError, "width must be at least 1, got 0.5"),
        ({"width": 1, "font_size": 40}, ValueError, "width must leave room for four letters of font_size 40, got 1"),
        ({"font_size": 0}, ValueError, "font_size must be at least 1, got 0"),
        ({"legend": "no"}, TypeError, "legend must be a bool, got str"),
    ],
)
def test_what_does_not_fit_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        explain("good", []).plot(**options)
    with pytest.raises(ValueError, match="explanations must hold at least one text"):
        explain("good", [])[:0].plot()


def laid(units, room):
    return [
        [(each.bit.text, each.start) for each in line]
        for line in lines(
            [None if unit is None else [Bit(text) for text in unit] for unit in units], room, len, space=1
        )
    ]


def test_lines_end_between_units_and_units_where_they_must():
    assert laid([["ab"], ["cd", ","], ["ef"]], 6) == [[("ab", 0), ("cd", 3), (",", 5)], [("ef", 0)]]
    assert laid([["ab"], ["cd", ","], ["ef"]], 5) == [[("ab", 0)], [("cd", 0), (",", 2)], [("ef", 0)]]
    assert laid([["a"], ["bcd", "efg"]], 4) == [[("a", 0)], [("bcd", 0), ("e", 3)], [("fg", 0)]]
    assert laid([["abcdefghij"]], 4) == [[("abcd", 0)], [("efgh", 0)], [("ij", 0)]]
    assert laid([["abc"]], 0.5) == [[("a", 0)], [("b", 0)], [("c", 0)]]
    assert laid([["a"], None, None, ["b"]], 4) == [[("a", 0)], [], [("b", 0)]]
    assert laid([], 4) == [[]]

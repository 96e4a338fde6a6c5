"""How explanations are shown: every text to the letter, nothing of it as markup or as an order to a terminal."""

import io
import itertools
import unicodedata
from html.parser import HTMLParser

import pytest

from mhex_text import rendering
from mhex_text.explanation import Explanation, ExplanationSettings, TextExplanation, Token
from mhex_text.rendering import DARK, LIGHT, Segment, colour_depth, html_fragment, printable, segments

VOID = {"meta", "br"}


def explain(texts, words, *, seen=None, class_names=("bad", "good"), target=1, number=0):
    """An explanation with one token per word, given as (part, start, end, score)."""
    texts = (texts,) if isinstance(texts, str) else texts
    settings = ExplanationSettings(layer_names=("a",), layer_weights=(1.0,), class_names=class_names)
    tokens = tuple(
        Token(texts[part][start:end], start, end, part, index, (score,), (0.0,), (score,))
        for index, (part, start, end, score) in enumerate(words)
    )
    item = TextExplanation(
        texts=texts,
        tokens=tokens,
        seen=seen or tuple((0, len(text)) for text in texts),
        target=target,
        probabilities=(0.25, 0.75),
        settings=settings,
    )
    return Explanation((item,), settings)


def at_words(text):
    """Words between spaces with alternating scores."""
    found, position = [], 0
    for index, word in enumerate(text.split(" ")):
        if word:
            found.append((0, position, position + len(word), (-1) ** index * (index + 1) / 4))
        position += len(word) + 1
    return found


class Reader(HTMLParser):
    """The text areas of some HTML, the spans in them, and every element there is."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.areas, self.spans, self.elements, self.open = [], [], [], []
        self.shown = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if attributes.get("class") == "text":
            self.areas.append("")
        if tag not in VOID:
            self.open.append((tag, attributes))
        if self.inside() and tag == "span":
            self.spans.append([attributes, ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.shown += "" if any(tag == "style" for tag, _ in self.open) else data
        if self.inside():
            self.areas[-1] += data
            if self.open[-1][0] == "span":
                self.spans[-1][1] += data

    def inside(self):
        return any(attributes.get("class") == "text" for _, attributes in self.open)


TEXTS = [
    "a good film",
    '<script>alert(1)</script> </div><div class="text"> & &amp; \'x\' "y" &lt;b&gt;',
    "\n\n leading \n lines\r\nand\rreturns \t tab ",
    "\u05e1\u05e8\u05d8 \u05d8\u05d5\u05d1 good \u202e reversed \u202c \u2067 x \u2069",
    "\U0001f469\u200d\U0001f680 \U0001f44d\U0001f3fd e\u0301te\u0301 zero\u200bwidth \ufeff",
    "\u0627\u0644\u0641\u064a\u0644\u0645 \u062c\u064a\u062f \u2028 \x0b \x1f \x85 &#13; &nbsp;\xa0",
    " ",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_is_shown_to_the_letter(text):
    explanation = explain(text, at_words(text))
    reader = Reader(html_fragment(explanation))
    assert reader.areas == [text]
    assert not {tag for tag, _ in reader.elements} & {"script", "link", "img", "iframe", "object", "svg"}
    assert "".join(segment.text for segment in segments(explanation[0], 0)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_any_cut_is_shown_to_the_letter(text):
    for first, last in itertools.combinations_with_replacement(range(len(text) + 1), 2):
        words = [word for word in at_words(text) if first <= word[1] and word[2] <= last]
        explanation = explain(text, words, seen=((first, last),))
        reader = Reader(html_fragment(explanation))
        assert reader.areas == [text]
        unseen = "".join(shown for attributes, shown in reader.spans if attributes["class"] == "unseen")
        assert unseen == text[:first] + text[last:]
        assert ("did not see" in reader.shown) == (explanation[0].truncated > 0)


def test_words_carry_their_scores():
    explanation = explain("not a good film", [(0, 0, 3, -1.0), (0, 6, 10, 0.5), (0, 11, 15, -0.0)])
    reader = Reader(html_fragment(explanation))
    assert [
        (attributes["class"], attributes["style"], attributes["title"], text) for attributes, text in reader.spans
    ] == [
        ("against", "--s:1.000", "-1", "not"),
        ("for", "--s:0.500", "+0.5", "good"),
        ("for", "--s:0.000", "+0", "film"),
    ]
    assert "Prediction: good, probability 75.0%." in reader.shown
    assert "Explained" not in reader.shown
    assert "not-1" in reader.shown  # in the table


def test_the_page_says_what_is_explained_and_what_was_cut():
    explanation = explain("good film", [(0, 0, 4, 1.0)], seen=((0, 4),), target=0)
    reader = Reader(html_fragment(explanation))
    assert "Prediction: good, probability 75.0%. Explained: bad, probability 25.0%." in reader.shown
    assert "The model did not see 5 of 9 characters" in reader.shown
    assert [text for attributes, text in reader.spans if attributes["class"] == "unseen"] == [" film"]


def test_pairs_share_one_scale():
    explanation = explain(("good", "bad film"), [(0, 0, 4, 0.5), (1, 0, 3, -2.0)])
    reader = Reader(html_fragment(explanation))
    assert reader.areas == ["good", "bad film"]
    assert [attributes["style"] for attributes, _ in reader.spans] == ["--s:0.250", "--s:1.000"]
    shown = str(explanation)
    assert shown.index("first text:\n  good") < shown.index("second text:\n  bad film")


def test_names_of_classes_are_text():
    names = ("\u202ebad</p><script>", "a\"'&\u05d8\x1b[2J\n")
    page = html_fragment(explain("good", [(0, 0, 4, 1.0)], class_names=names, target=0))
    reader = Reader(page)
    assert all(name in reader.shown for name in names)
    assert not any(tag == "script" for tag, _ in reader.elements)


def test_words_that_overlap_are_one_segment():
    # What a compatibility normalizer makes of a fraction: three words of one character.
    explanation = explain(
        "\xbd cup", [(0, 0, 1, 1.0), (0, 0, 1, -0.25), (0, 0, 1, 0.5), (0, 2, 5, 1.0), (0, 3, 5, 1.0)]
    )
    assert segments(explanation[0], 0) == (
        Segment("\xbd", 1.25, True),
        Segment(" ", None, True),
        Segment("cup", 2.0, True),
    )


def test_a_word_of_no_characters_still_shows_its_score():
    explanation = explain("a b", [(0, 1, 1, -2.0), (0, 2, 3, 1.0)])
    reader = Reader(html_fragment(explanation))
    assert reader.areas == ["a b"]
    assert [(attributes["title"], text) for attributes, text in reader.spans] == [("-2", ""), ("+1", "b")]


def test_scores_of_zero_and_very_small_ones():
    for score in (0.0, 5e-324, 1e308):
        reader = Reader(html_fragment(explain("good", [(0, 0, 4, score)])))
        assert reader.spans[0][0]["style"] == ("--s:0.000" if score == 0 else "--s:1.000")


def test_the_element_reaches_for_nothing():
    page = html_fragment(explain("see http://example.org", [(0, 0, 3, 1.0)]))
    reader = Reader(page)
    assert not any({"src", "href", "srcset", "action"} & attributes.keys() for _, attributes in reader.elements)
    assert "url(" not in page
    assert "@import" not in page
    assert "prefers-color-scheme:dark" in page
    assert "VARIABLES" not in page


def test_style_stays_within_its_element():
    style = rendering.html_fragment([]).split("<style>")[1].split("</style>")[0]
    rules = [line for line in style.splitlines() if line and not line.startswith(" ")]
    assert all(line.startswith((".mhex-text", "@media (prefers-color-scheme:dark){.mhex-text{")) for line in rules)


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in colour)]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_text_is_readable_on_every_strength(palette):
    """WCAG 2.1 asks for 4.5."""
    assert contrast(palette.grey, palette.paper) >= 4.5
    for hue in (palette.positive, palette.negative):
        for step in range(21):
            mixed = [p + (h - p) * step / 20 for p, h in zip(palette.paper, hue, strict=True)]
            assert contrast(palette.ink, mixed) >= 4.5


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"TERM": "xterm-256color"}, "256"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "truecolour"),
        ({"TERM": "tmux", "COLORTERM": "24bit"}, "truecolour"),
        ({"WT_SESSION": "1"}, "truecolour"),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, "none"),
        ({"TERM": "xterm-256color", "NO_COLOR": ""}, "256"),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, "none"),
        ({"TERM": "vt100"}, "none"),
        ({}, "none"),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, "none"),
        ({"FORCE_COLOR": "0", "TERM": "xterm"}, "none"),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, "256"),
        ({"FORCE_COLOR": "3"}, "truecolour"),
    ],
)
def test_colours_of_a_terminal(variables, wanted):
    assert colour_depth(Terminal(), environment=variables) == wanted
    forced = wanted if variables.get("FORCE_COLOR") and wanted != "none" else "none"
    assert colour_depth(io.StringIO(), environment=variables) == forced


def test_a_closed_terminal_has_no_colours():
    stream = io.StringIO()
    stream.close()
    assert colour_depth(stream, environment={"TERM": "xterm"}) == "none"


@pytest.fixture
def bare(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "WT_SESSION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return monkeypatch


def test_plain_text_lists_the_strongest_words(bare, capsys):
    explanation = explain("not a good film", [(0, 0, 3, -1.0), (0, 6, 10, 0.5), (0, 11, 15, 0.0)])
    wanted = "Prediction: good, probability 75.0%.\n  not a good film\n        -1 not\n      +0.5 good"
    assert str(explanation) == str(explanation[0]) == wanted
    explanation.print()
    assert capsys.readouterr().out == f"{wanted}\n"
    explanation[0].print()
    assert capsys.readouterr().out == f"{wanted}\n"


def test_colours_only_where_they_are_shown(bare):
    explanation = explain("not a good film", [(0, 0, 3, -1.0), (0, 6, 10, 0.5), (0, 11, 15, 0.01)])
    terminal, plain, forced, refused = Terminal(), io.StringIO(), io.StringIO(), Terminal()
    explanation.print(terminal)
    explanation.print(plain)
    explanation.print(forced, colour=True)
    explanation.print(refused, colour=False)
    assert "\x1b[4;38;5;16;48;5;209mnot\x1b[0m a \x1b[38;5;16;48;5;" in terminal.getvalue()
    assert "\x1b[0m film" in terminal.getvalue()  # too faint for a background
    assert forced.getvalue() == terminal.getvalue()
    assert plain.getvalue() == refused.getvalue() == f"{explanation}\n"
    bare.setenv("COLORTERM", "truecolor")
    terminal = Terminal()
    explanation.print(terminal)
    assert "\x1b[4;38;2;0;0;0;48;2;245;150;50mnot\x1b[0m" in terminal.getvalue()
    bare.setenv("NO_COLOR", "1")
    terminal = Terminal()
    explanation.print(terminal)
    assert terminal.getvalue() == plain.getvalue()
    with pytest.raises(TypeError, match="colour must be a bool or None, got str"):
        explanation.print(plain, colour="yes")


@pytest.mark.parametrize("colour", [False, True])
def test_no_text_gives_orders_to_a_terminal(bare, colour):
    hostile = "".join(map(chr, range(32))) + "".join(map(chr, range(127, 160)))
    hostile += (
        "\u061c\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029\ufeff\U000e0041"
    )
    text = f"{hostile} good {hostile}"
    words = [(0, 0, len(hostile), 1.0), (0, len(hostile) + 1, len(hostile) + 5, -1.0)]
    explanation = explain(text, words, seen=((0, len(hostile) + 6),), class_names=(hostile, hostile), target=0)
    stream = io.StringIO()
    explanation.print(stream, colour=colour)
    shown = stream.getvalue()
    for number in range(256):
        for paint in (f"\x1b[38;5;16;48;5;{number}m", f"\x1b[4;38;5;16;48;5;{number}m", "\x1b[0m"):
            shown = shown.replace(paint, "")
    assert {c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")} == {"\n"}
    assert "\\x1b" in shown
    assert "\\u202e" in shown


def test_lines_of_a_text_cannot_pass_for_ours():
    shown = str(explain("good\nPrediction: bad, probability 99.0%.\r\nfilm", [(0, 0, 4, 1.0)]))
    assert [line for line in shown.split("\n") if line.startswith("Prediction")] == [
        "Prediction: good, probability 75.0%."
    ]
    assert "\n  film\n" in shown


def test_a_background_ends_with_its_line(bare):
    stream = io.StringIO()
    explain("two\nlines", [(0, 0, 9, 1.0)]).print(stream, colour=True)
    assert [line.count("\x1b") for line in stream.getvalue().split("\n")] == [0, 2, 2, 0, 0]


def test_joiners_stay_and_tabs_are_spaces():
    assert (
        printable("\U0001f469\u200d\U0001f680\t\u0645\u06cc\u200c\u062e")
        == "\U0001f469\u200d\U0001f680 \u0645\u06cc\u200c\u062e"
    )


def test_what_was_cut_is_shown_in_short():
    shown = str(explain("good " + "x" * 1000, [(0, 0, 4, 1.0)], seen=((0, 4),)))
    assert f"good[not seen:  {'x' * 59}...]" in shown
    assert "The model did not see 1001 of 1005 characters" in shown


def test_a_stream_that_knows_few_characters():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", newline="\n")
    explain("caf\xe9 \u05d8\u05d5\u05d1", [(0, 0, 4, 1.0)]).print(stream)
    stream.flush()
    assert b"  caf\\xe9 \\u05d8\\u05d5\\u05d1\n" in raw.getvalue()


def test_a_batch_is_numbered_and_may_be_empty():
    one = explain("good", [(0, 0, 4, 1.0)])
    both = Explanation.concatenate([one, one])
    assert str(both).count("text 2 of 2\n") == 1
    assert Reader(html_fragment(both)).areas == ["good", "good"]
    assert str(both[:0]) == ""
    assert Reader(html_fragment(both[:0])).areas == []


def test_only_the_strongest_are_listed():
    text = " ".join("abcdefghijklmno")
    words = [(0, 2 * index, 2 * index + 1, (-1) ** index * (index + 1.0)) for index in range(15)]
    lines = str(explain(text, words)).split("\n")[2:]
    assert [line.split() for line in lines[:2]] == [["+15", "o"], ["-14", "n"]]
    assert len(lines) == rendering.STRONGEST

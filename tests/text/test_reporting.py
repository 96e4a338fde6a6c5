"""`report`: what stands in the page is what the explanations say, text for text and token for token."""

import base64
import html
import json
import re
from dataclasses import replace

import pytest
import torch

from mhex_core.explorer.packing import unpacked
from mhex_text import Explanation, explain_by, report
from mhex_text.rendering import segments
from mhex_text.reporting import pieces
from mhex_text.side_by_side import method_name

from .explainers.models import PAIRS, TEXTS, make_masking, make_model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def tokenizer():
    return make_masking()


@pytest.fixture(scope="module")
def explanation(model, tokenizer):
    return model.explain(TEXTS, tokenizer=tokenizer)


class Page:
    """What a browser would read out of a page."""

    def __init__(self, page):
        (document,) = re.findall(r'<script type="application/json" id="document">(.*?)</script>', page, re.DOTALL)
        self.document = json.loads(document)
        self.samples = self.document["samples"]
        self.methods = self.document["methods"]
        self.blocks = [
            block.split()
            for block in re.findall(r'<script type="text/plain" id="block-\d+">(.*?)</script>', page, re.S)
        ]

    def scores(self, sample, place=0):
        """The scores of the tokens, as the page adds them up."""
        evidence = self.samples[sample]["evidence"][place]
        method = self.methods[evidence["method"]]
        parts = unpacked(base64.b64decode(self.blocks[sample][place]), [tuple(shape) for shape in evidence["shapes"]])
        total = torch.zeros(evidence["shapes"][0], dtype=torch.float64)
        for plus, minus, weight in zip(*parts, method["layer_weights"], strict=True):
            total += weight * (plus + method["beta"] * minus)
        return total.tolist()

    def texts(self, sample):
        return ["".join(text for text, _, _ in part) for part in self.samples[sample]["texts"]]


def check_scores(page, sample, item, place=0):
    scores = page.scores(sample, place)
    leeway = 1e-3 * max([1e-6, *(abs(token.score) for token in item.tokens)])
    assert scores == pytest.approx([token.score for token in item.tokens], abs=leeway)
    for part, shown in enumerate(page.samples[sample]["texts"]):
        wanted = segments(item, part)
        assert [(text, seen) for text, _, seen in shown] == [(segment.text, segment.seen) for segment in wanted]
        for (_, tokens, _), segment in zip(shown, wanted, strict=True):
            assert bool(tokens) == (segment.score is not None)
            assert sum(scores[token] for token in tokens) == pytest.approx(segment.score or 0.0, abs=5 * leeway)


@pytest.mark.parametrize("weighed", [{}, {"beta": 0.25, "layers": "all"}, {"layers": [2], "layer_weights": [-0.5]}])
def test_the_page_adds_up_to_the_explanation(explanation, weighed):
    given = explanation.reweighted(**weighed)
    made = report(given)
    page = Page(made.html)
    assert (made.samples, made.targets, made.left_out) == (len(TEXTS), len(TEXTS), 0)
    assert page.document["kind"] == "texts"
    (method,) = page.methods
    assert (method["name"], method["unit"], method["signed"], method["normalize"]) == ("mhex", "logits", True, False)
    assert method["layer_weights"] == list(given.settings.layer_weights)
    assert method["beta"] == given.settings.beta
    for number, item in enumerate(given):
        sample = page.samples[number]
        assert page.texts(number) == list(item.texts)
        assert sample["tokens"] == [token.text for token in item.tokens]
        assert (sample["prediction"], sample["note"], sample["label"]) == (item.prediction, "", None)
        assert dict(map(tuple, sample["probabilities"])) == pytest.approx(dict(enumerate(item.probabilities)), rel=1e-5)
        check_scores(page, number, item)


def test_heads_are_those_of_the_network(model, tokenizer, explanation):
    with torch.no_grad():
        output = model(**tokenizer(TEXTS[0], return_tensors="pt"), output_heads=True)
    wanted = [logits.softmax(dim=1)[0] for logits in output.head_logits]
    for found, head in zip(explanation[0].head_probabilities, wanted, strict=True):
        assert found == pytest.approx(head.tolist(), abs=1e-5)
    heads = Page(report(explanation).html).samples[0]["heads"]
    assert [index for index, _ in heads] == [int(head.argmax()) for head in wanted]
    assert [probability for _, probability in heads] == pytest.approx([float(head.max()) for head in wanted], abs=1e-5)


def test_pairs_cut_texts_and_texts_of_nothing(model, tokenizer):
    pairs = model.explain(PAIRS, tokenizer=tokenizer)
    page = Page(report(pairs).html)
    for number, item in enumerate(pairs):
        assert page.texts(number) == list(PAIRS[number])
        check_scores(page, number, item)
    cut = model.explain([TEXTS[2], ""], tokenizer=tokenizer, max_length=6)
    page = Page(report(cut).html)
    assert page.samples[0]["note"].startswith(f"The model did not see {cut[0].truncated} of {len(TEXTS[2])} characters")
    assert [seen for _, _, seen in page.samples[0]["texts"][0]][-1] is False
    check_scores(page, 0, cut[0])
    assert page.samples[1]["texts"] == [[]]
    assert page.scores(1) == []
    assert report(cut[:0]).samples == 0


def test_pieces_that_overlap_name_the_tokens_of_all():
    from .test_rendering import explain

    words = [(0, 0, 1, 1.0), (0, 0, 1, -0.25), (0, 2, 5, 1.0), (0, 3, 5, 1.0), (0, 5, 5, 2.0)]
    item = explain("\xbd cup", words)[0]
    assert [(piece.text, piece.tokens) for piece in pieces(item, 0)] == [
        ("\xbd", (0, 1)),
        (" ", ()),
        ("cup", (2, 3)),
        ("", (4,)),
    ]


def test_classes_of_one_method_are_put_together(model, tokenizer, explanation):
    classes = [[(item.prediction + step) % 3 for item in explanation] for step in (1, 2)]
    others = [model.explain(TEXTS, wanted, tokenizer=tokenizer) for wanted in classes]
    made = report([explanation, *others, explanation])
    page = Page(made.html)
    assert (len(page.methods), made.targets) == (1, 3 * len(TEXTS))
    for number, sample in enumerate(page.samples):
        assert [each["target"] for each in sample["evidence"]] == [
            each[number].target for each in (explanation, *others)
        ]
        for place, each in enumerate((explanation, *others)):
            check_scores(page, number, each[number], place)


def test_methods_stand_side_by_side(model, tokenizer, explanation):
    gmar = explain_by(model, TEXTS, "gmar", tokenizer=tokenizer)
    bare = model.explain(TEXTS, tokenizer=tokenizer, attention=True)
    soft = explanation.reweighted(beta=0.5)
    page = Page(report([explanation, gmar, bare, soft]).html)
    assert [method["name"] for method in page.methods] == ["mhex", "gmar", "mhex (2)", "mhex (3)"]
    assert [method["unit"] for method in page.methods] == ["logits", "", "logits", "logits"]
    assert page.samples[0]["heads"]
    for number in range(len(TEXTS)):
        for place, each in enumerate((explanation, gmar, bare, soft)):
            check_scores(page, number, each[number], place)
    # Heads are known as soon as one of the methods knows them.
    page = Page(report({"theirs": gmar, "ours": [explanation]}).html)
    assert [method["name"] for method in page.methods] == ["theirs", "ours"]
    assert page.samples[0]["heads"]


def test_a_method_is_called_as_the_explanation_says(explanation):
    settings = explanation.settings
    assert method_name(settings) == "mhex"
    for layer, name in (("layer 5", "mhex"), ("cdam:mode=smooth", "cdam:mode=smooth"), ("layer x", "layer x")):
        assert method_name(replace(settings, layer_names=(layer,), layer_weights=(1.0,))) == name


def test_names_and_labels(explanation):
    count = len(TEXTS)
    page = Page(report(explanation).html)
    assert [sample["name"].split(":")[0] for sample in page.samples] == [str(number + 1) for number in range(count)]
    assert all(len(sample["name"]) < 60 for sample in page.samples)
    labels = torch.arange(count) % 3
    page = Page(report(explanation, names=[f"n{place}" for place in range(count)], labels=labels).html)
    assert [sample["name"] for sample in page.samples] == [f"n{place}" for place in range(count)]
    assert [sample["label"] for sample in page.samples] == labels.tolist()
    names = explanation.settings.class_names
    page = Page(report(explanation, labels=[names[1], *[None] * (count - 1)]).html)
    assert [sample["label"] for sample in page.samples] == [1, *[None] * (count - 1)]
    page = Page(report(explanation[0], names=["only"], labels=[2]).html)
    assert (page.samples[0]["name"], page.samples[0]["label"]) == ("only", 2)


def test_the_page_says_how_it_came_to_be(explanation):
    page = Page(report(explanation, title="A <title>", about={"data": "reviews"}).html)
    assert page.document["title"] == "A <title>"
    assert list(page.document["about"]) == ["mhex-text", "data"]
    assert page.document["class_names"] == list(explanation.settings.class_names)


def test_a_page_that_must_be_small_keeps_everybodys_first_class(model, tokenizer, explanation):
    both = [explanation, model.explain(TEXTS, [(item.prediction + 1) % 3 for item in explanation], tokenizer=tokenizer)]
    whole = report(both)
    assert whole.left_out == 0
    less = report(both, max_bytes=whole.size - 400)
    assert less.left_out > 0
    assert less.size <= whole.size - 400
    assert all(sample["evidence"] for sample in Page(less.html).samples)
    with pytest.raises(ValueError, match="max_bytes must leave room"):
        report(both, max_bytes=2000)


def test_nothing_of_a_text_ends_an_element(model, tokenizer):
    hostile = "</script><!-- <script> </noscript> <b>good</b> film \u2028 \x00 &amp;"
    explanation = model.explain([hostile], tokenizer=tokenizer)
    made = report(explanation, names=[hostile], title=hostile).html
    page = Page(made)
    assert page.texts(0) == [hostile]
    assert "<b>good" not in made
    assert "<!--" not in made.split("<body>")[1].split('<div id="explorer">')[0]
    assert made.count("</noscript>") == 1


def test_without_scripts_the_first_texts_are_shown(explanation, monkeypatch):
    assert report(explanation).html.partition("</noscript>")[0].count("<article") == len(TEXTS)
    monkeypatch.setattr("mhex_text.reporting._STATIC", 2)
    static = report(explanation).html.partition("</noscript>")[0]
    assert static.count("<article") == 2
    assert f"{len(TEXTS) - 2} more texts are shown where scripts run" in static


def test_a_notebook_shows_a_small_page(explanation):
    shown = explanation._repr_html_()
    assert shown.startswith("<iframe ")
    assert 'sandbox="allow-scripts"' in shown
    page = Page(html.unescape(shown))
    assert page.document["compact"]
    assert len(page.samples) == len(TEXTS)
    many = Explanation.concatenate([explanation] * 3)
    shown = many._repr_html_()
    assert len(Page(html.unescape(shown)).samples) == 8
    assert f"The first 8 of {len(many)} texts" in shown
    assert Page(html.unescape(explanation[1]._repr_html_())).texts(0) == [TEXTS[1]]


def test_the_same_explanations_give_the_same_page(explanation):
    assert report(explanation).html == report(explanation).html == explanation.to_html()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"explanations": 3}, TypeError, r"explanations must be an Explanation or a sequence of them, got int"),
        ({"explanations": "text"}, TypeError, r"explanations must be an Explanation or a sequence"),
        ({"explanations": []}, ValueError, r"explanations must hold at least one explanation, got none"),
        ({"explanations": [1]}, TypeError, r"explanations\[0\] must be an Explanation, got int"),
        ({"explanations": {}}, ValueError, r"explanations must hold at least one, got none"),
        ({"explanations": {1: None}}, TypeError, r"explanations\[1\] must be an Explanation"),
        ({"names": ["a"]}, ValueError, r"names must hold one name per text \(\d\), got 1"),
        ({"names": "abcde"}, TypeError, r"names must be a sequence, got str"),
        ({"names": [1] * 9}, TypeError, r"names\[0\] must be a str, got int"),
        ({"labels": [0]}, ValueError, r"labels must hold one class per text \(\d\), got 1"),
        ({"labels": [0.5] * len(TEXTS)}, TypeError, r"labels\[0\] must be an int, a name or None, got float"),
        ({"labels": [True] * len(TEXTS)}, TypeError, r"labels\[0\] must be an int, a name or None, got bool"),
        ({"labels": [3] * len(TEXTS)}, ValueError, r"labels\[0\] must lie in \[0, 2\], got 3"),
        ({"labels": ["no such"] * len(TEXTS)}, ValueError, r"labels\[0\] must be one of .*, got 'no such'"),
        ({"title": 3}, TypeError, r"title must be a str, got int"),
        ({"title": "\ud800"}, ValueError, r"title\[0\] must hold whole characters"),
        ({"about": ["a"]}, TypeError, r"about must be a mapping of names to texts, got list"),
        ({"about": {"a": 1}}, TypeError, r"about\[1\] must be a str, got int"),
        ({"compact": 1}, TypeError, r"compact must be a bool, got int"),
        ({"max_bytes": 0}, ValueError, r"max_bytes must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(explanation, change, error, message):
    with pytest.raises(error, match=message):
        report(**{"explanations": explanation, **change})


def test_what_does_not_belong_together_is_refused(model, tokenizer, explanation):
    turned = explanation[::-1]
    with pytest.raises(ValueError, match="of the same texts in the same tokens, got different ones at 0"):
        report([explanation, turned])
    with pytest.raises(ValueError, match="of the same texts and classes, got"):
        report([explanation, explanation[:1]])
    cut = model.explain(TEXTS, tokenizer=tokenizer, max_length=4)
    with pytest.raises(ValueError, match="in the same tokens"):
        report({"whole": explanation, "cut": cut})
    with pytest.raises(ValueError, match=r"explanations\['a'\] must all be weighed alike"):
        report({"a": [explanation, explanation.reweighted(beta=0)]})
    other = replace(
        explanation,
        items=tuple(replace(item, probabilities=(0.0, 0.0, 1.0)) for item in explanation),
    )
    with pytest.raises(ValueError, match="explanations must be of one model"):
        report([explanation, other])

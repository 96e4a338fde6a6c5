"""What an explanation of texts holds: with a real tokenizer and weighed anew."""

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mhex_text.explanation import Explanation, ExplanationSettings, TextExplanation, Token
from mhex_text.rendering import segments
from mhex_text.tokens import word_scores

from .conftest import Case


def check_scores(explanation, case, **options):
    wanted = case.reference(**options)
    for index, item in enumerate(explanation):
        real = [place for place, part in enumerate(case.arguments["sequence_ids"][index]) if part is not None]
        assert len(real) == len(item.tokens)
        for place, token in zip(real, item.tokens, strict=True):
            assert token.score == pytest.approx(float(wanted[index, place]), rel=1e-9, abs=1e-12)
            assert item.texts[token.part][token.start : token.end] == token.text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.7},
        {"layers": "all", "decay": 0.8},
        {"layers": [1, -1], "layer_weights": [0.25, -2.0], "beta": 1.0},
        {"layers": 40},
    ],
)
def test_scores_are_those_of_token_saliency(case, pairs, options):
    for each in (case, pairs):
        check_scores(each.explain(**options), each, **options)


def test_words_are_those_of_word_scores(case):
    explanation = case.explain(beta=0.5)
    scores = case.reference(beta=0.5)
    for index, item in enumerate(explanation):
        wanted = word_scores(
            scores[index],
            case.arguments["word_ids"][index],
            case.arguments["offsets"][index],
            case.arguments["texts"][index],
        )
        assert [(w.text, w.start, w.end) for w in item.words] == [(w.text, w.start, w.end) for w in wanted]
        assert [w.score for w in item.words] == pytest.approx([w.score for w in wanted])
        for word in item.words:
            assert sum(word.scores) == pytest.approx(word.score)
    assert [word.text for word in explanation[0].words] == ["Unbelievable", "film", ",", "not", "bad"]


def test_words_of_pairs_stay_apart(pairs):
    item = pairs.explain()[0]
    assert [(word.part, word.text) for word in item.words] == [
        (0, "good"),
        (0, "film"),
        (1, "not"),
        (1, "unbelievable"),
    ]
    assert item.truncated == 0
    assert item.seen == ((0, 9), (0, 16))


def test_a_word_leaves_out_the_space_its_tokens_cover():
    settings = ExplanationSettings(layer_names=("a",), layer_weights=(1.0,))
    text = "x y"
    tokens = (
        Token(" y", 1, 3, 0, 0, (1.0,), (0.0,), (1.0,)),
        Token(" ", 1, 2, 0, 1, (2.0,), (0.0,), (2.0,)),
    )
    item = TextExplanation(
        texts=(text,), tokens=tokens, seen=((0, 3),), target=0, probabilities=(1.0,), settings=settings
    )
    assert [(word.text, word.start, word.end, word.score) for word in item.words] == [
        (" ", 1, 2, 2.0),
        ("y", 2, 3, 1.0),
    ]


def test_a_token_without_a_word_is_one(case):
    ids = [[None] * len(row) for row in case.arguments["word_ids"]]
    item = case.explain(word_ids=ids)[0]
    assert [word.text for word in item.words] == [token.text for token in item.tokens]


@pytest.mark.parametrize("kind", ["bytes", "bytes with their space", "metaspace"])
def test_tokenizers_of_other_kinds(kind):
    """Several tokens may share one character, and cover the space before a word."""
    text = "good \U0001f469\u200d\U0001f680 film \u05d8\u05d5\u05d1 \xbd"
    if kind == "metaspace":
        core = Tokenizer(models.Unigram([("<unk>", 0.0), ("\u2581good", -1.0), ("\u2581fi", -1.0), ("lm", -1.0)], 0))
        core.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.post_processor = processors.ByteLevel(trim_offsets=kind == "bytes")
    case = Case(PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>"), [text, f" {text}\n", "good"])
    for item in case.explain():
        assert item.truncated == 0
        assert [word.text for word in item.words if word.text.strip()] == item.texts[0].split()
        assert math.fsum(word.score for word in item.words) == pytest.approx(sum(t.score for t in item.tokens))
        assert "".join(segment.text for segment in segments(item, 0)) == item.texts[0]


@pytest.mark.parametrize(
    ("text", "side", "truncated", "seen"),
    [
        ("good film not bad", "right", 8, (0, 9)),
        ("good film not bad", "left", 10, (10, 17)),
        ("good film", "right", 0, (0, 9)),
        ("  good film \n", "right", 0, (0, 13)),
        # The normalizer drops what is behind the film; nothing of it was cut.
        ("good film\u200b\u0301", "right", 0, (0, 11)),
        ("", "right", 0, (0, 0)),
    ],
)
def test_truncation_is_counted(tokenizer, text, side, truncated, seen):
    tokenizer.truncation_side = side
    try:
        item = Case(tokenizer, [text], max_length=4).explain()[0]
    finally:
        tokenizer.truncation_side = "right"
    assert item.truncated == truncated
    assert item.seen == (seen,)


def test_a_word_cut_has_the_tokens_that_were_left(tokenizer):
    item = Case(tokenizer, ["good unbelievable"], max_length=4).explain()[0]
    assert [word.text for word in item.words] == ["good", "un"]
    assert item.truncated == len("believable")


def test_a_second_text_that_was_cut_altogether(tokenizer):
    case = Case(tokenizer, [("good", "film")])
    ids = [[None if part == 1 else part for part in row] for row in case.arguments["sequence_ids"]]
    item = case.explain(sequence_ids=ids)[0]
    assert (item.truncated, item.seen) == (4, ((0, 4), (0, 0)))


def test_prediction_and_target(case):
    item = case.explain()[1]
    assert (item.prediction, item.prediction_name) == (2, "good")
    assert (item.target, item.target_name) == (1, "middling")
    assert item.probabilities == pytest.approx((0.1, 0.2, 0.7))
    assert [each.target for each in case.explain(target=None)] == [2, 2, 2]
    assert [each.target for each in case.explain(target=0)] == [0, 0, 0]
    assert case.explain(class_names=())[1].target_name == "class 1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [
        {"beta": 1.0},
        {"layers": 2},
        {"layers": "all"},
        {"layers": [3, 0], "layer_weights": [0.1, 0.3]},
        {"layer_weights": [0.1, 0.2, 0.3, 0.4, 0.5], "beta": 0.3},
    ],
)
def test_weighing_anew_is_the_same_to_the_bit(case, change, dtype):
    evidence = {name: [layer.to(dtype) for layer in getattr(case, name)] for name in ("positive", "negative")}
    changed = case.explain(**evidence, beta=0.2).reweighted(**change)
    direct = {"layers": "all"} if "layer_weights" in change and "layers" not in change else {}
    assert changed == case.explain(**evidence, **{"beta": 0.2, **direct, **change})
    assert changed[0] == case.explain(**evidence)[0].reweighted(**{"beta": 0.2, **change})


def test_weighing_anew_keeps_what_is_not_named(case):
    explanation = case.explain(beta=0.4, layers=[1, 2], layer_weights=[2.0, 3.0])
    assert explanation.settings.layer_weights == (0, 2, 3, 0, 0)
    assert explanation.reweighted() == explanation
    assert explanation.reweighted(beta=0.1).settings.layer_weights == (0, 2, 3, 0, 0)
    assert explanation.reweighted(layers=1).settings.beta == 0.4


def test_it_is_a_sequence(case):
    explanation = case.explain()
    assert len(explanation) == 3
    assert list(explanation) == [explanation[0], explanation[1], explanation[2]]
    assert explanation[-1].texts == ("",)
    assert isinstance(explanation[:2], Explanation)
    assert [item.texts[0] for item in explanation[::-1]] == ["", "good", "Unbelievable  film, not bad"]
    assert len(explanation[3:]) == 0
    assert Explanation.concatenate([explanation[:1], explanation[3:], explanation[1:]]) == explanation
    with pytest.raises(IndexError):
        explanation[3]
    with pytest.raises(ValueError, match=r"items\[1\]\.settings\.beta must be 0\.0, got 1\.0"):
        Explanation.concatenate([explanation[:1], explanation.reweighted(beta=1.0)])
    with pytest.raises(ValueError, match=r"parts must hold at least one explanation"):
        Explanation.concatenate([])
    assert hash(explanation) == hash(case.explain())
    assert len(repr(explanation)) < 400
    assert repr(explanation[1]) == "TextExplanation(('good',), target=1 ('middling'), tokens=1, truncated=0)"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"texts": ["a"]}, ValueError, r"texts must have one entry per text of the batch \(3\), got 1"),
        ({"texts": "abc"}, TypeError, r"texts must be a sequence, got str"),
        ({"texts": ["a", "b", ("c", "d", "e")]}, ValueError, r"offsets must lie in a text of 1 characters"),
        ({"word_ids": [[0]] * 3}, ValueError, r"word_ids\[0\] must have one entry per token \(9\), got 1"),
        ({"sequence_ids": [[1] * 9] * 3}, ValueError, r"sequence_ids must lie in \[0, 0\] or be None, got 1"),
        ({"positive": []}, ValueError, r"positive must hold at least one layer"),
        ({"positive": [torch.zeros(3, 9)]}, ValueError, r"negative must have the shapes of positive, \(3, 9, 1\)"),
        ({"positive": [torch.zeros(3, 9), torch.zeros(3, 8)]}, ValueError, r"positive\[1\] must have shape \(B, T\)"),
        ({"positive": [torch.full((3, 9), torch.nan)] * 5}, ValueError, r"tokens\[0\]\.positive must be finite, got"),
        ({"probabilities": torch.zeros(2, 3)}, ValueError, r"probabilities must have shape \(3, K\)"),
        ({"probabilities": torch.full((3, 3), 2.0)}, ValueError, r"probabilities must be one or more numbers in"),
        ({"target": torch.tensor([0, 1, 3])}, ValueError, r"target must lie in \[0, 2\]"),
        ({"target": torch.zeros(3, 2, dtype=torch.int64)}, ValueError, r"target must have shape \(3,\), got \(3, 2\)"),
        ({"layer_names": ["a"]}, ValueError, r"layer_weights must hold one number per layer \(1\), got 5"),
        ({"layer_names": "abcde"}, TypeError, r"layer_names must be a sequence, got str"),
        ({"class_names": ["a"]}, ValueError, r"class_names must hold one name per class \(3\), got 1"),
        ({"class_names": ["a", "b", "\udcff"]}, ValueError, r"class_names\[2\] must hold whole characters"),
        ({"beta": 2}, ValueError, r"beta must be in \[0, 1\], got 2"),
        ({"layers": [7]}, ValueError, r"layers must name layers in \[0, 4\]"),
        ({"layer_weights": [1.0]}, ValueError, r"layer_weights must hold one number per layer \(3\), got 1"),
    ],
)
def test_what_does_not_fit_is_refused(case, change, error, message):
    with pytest.raises(error, match=message):
        case.explain(**change)


def test_an_item_is_checked(case):
    item = case.explain()[1]
    fields = {name: getattr(item, name) for name in ("texts", "tokens", "seen", "target", "probabilities", "settings")}
    token = item.tokens[0]
    for change, error, message in (
        ({"texts": ["good"]}, TypeError, r"texts must be a tuple of str, got list"),
        ({"texts": ("a", "b", "c")}, ValueError, r"texts must hold one text or a pair, got 3"),
        ({"texts": ("evil",)}, ValueError, r"tokens\[0\]\.text must be 'evil', got 'good'"),
        ({"seen": ((0, 9),)}, ValueError, r"seen must lie in a text of 4 characters, got \(0, 9\)"),
        ({"seen": ((0, 2),)}, ValueError, r"tokens\[0\] must lie in what the model saw, \(0, 2\), got \(0, 4\)"),
        ({"seen": ()}, ValueError, r"seen must hold one pair per text \(1\), got 0"),
        ({"target": True}, TypeError, r"target must be an int, got bool"),
        ({"target": -1}, ValueError, r"target must lie in \[0, 2\], got -1"),
        ({"probabilities": ()}, ValueError, r"probabilities must be one or more numbers"),
        ({"settings": None}, TypeError, r"settings must be ExplanationSettings, got NoneType"),
        ({"tokens": ("good",)}, TypeError, r"tokens\[0\] must be a Token, got str"),
        (
            {"tokens": (Token("good", 0, 4, 0, 0, *[token.positive[:2]] * 3),)},
            ValueError,
            r"one number per layer \(5\)",
        ),
        ({"tokens": (Token("good", 0, 4, 1, 0, *[token.positive] * 3),)}, ValueError, r"part must lie in \[0, 0\]"),
    ):
        with pytest.raises(error, match=message):
            TextExplanation(**{**fields, **change})
    with pytest.raises(TypeError, match=r"items\[0\] must be a TextExplanation, got int"):
        Explanation((1,), item.settings)

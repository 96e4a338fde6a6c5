"""`MHEXForSequenceClassification.explain`: texts in, scores of tokens and words out, whatever the batch."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from mhex_core import token_saliency
from mhex_text import Explanation, MHEXForSequenceClassification
from mhex_text.capture import capture

from .encoders import CASES, make_encoder, make_tokenizer

WORDS = ["un", "##believ", "##able", "good", "bad", "film", "plot", ",", ".", "not", "a", "the", "what", "why"]
WORDS += ["because", "of", "love", "hate", "dull", "bright"]
TEXTS = [
    "Unbelievable  film, not bad.",
    "good",
    "",
    "What a dull plot, the film of the film because the plot, love the film. Not bad, not good!",
    "the\tbright\nplot",
]
PAIRS = [("good film", "why not?"), ("the plot of a film because of love", "dull"), ("", "bad")]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(WORDS)


def make_model(case="bert", **settings):
    torch.manual_seed(0)
    model = MHEXForSequenceClassification.from_encoder(make_encoder(case), 3, **settings)
    with torch.no_grad():
        for block in model.blocks:
            block.gate.weight.normal_(std=0.3)
            block.head.weight.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model(labels=("bad", "middling", "good"))


def scores(explanation):
    return [[token.score for token in item.tokens] for item in explanation]


def assert_alike(ours, theirs, tolerance=1e-5):
    assert [len(row) for row in ours] == [len(row) for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, abs=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_company_padding_and_order_change_nothing(case, tokenizer):
    model = make_model(case)
    together = model.explain(TEXTS, tokenizer=tokenizer, layers="all")
    for options in ({"batch_size": 1}, {"batch_size": 2}):
        apart = model.explain(TEXTS, tokenizer=tokenizer, layers="all", **options)
        assert_alike(scores(apart), scores(together))
        for one, other in zip(apart, together, strict=True):
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    turned = model.explain(TEXTS[::-1], tokenizer=tokenizer, layers="all")
    assert_alike(scores(turned)[::-1], scores(together))
    assert [item.texts for item in together] == [(text,) for text in TEXTS]
    assert sum(map(len, scores(together))) > 20
    assert any(abs(value) > 1e-3 for row in scores(together) for value in row)


@pytest.mark.parametrize(
    "options", [{}, {"beta": 0.6, "layers": "all"}, {"sharpness": "soft", "exponent": 2.0}], ids=str
)
def test_scores_are_those_of_the_equation(model, tokenizer, options):
    text = TEXTS[3]
    batch = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        output = model(**batch, output_activations=True)
    expected = token_saliency(
        [layer.double() for layer in output.activations],
        [matrix.double() for matrix in model.equivalent_matrices()],
        1,
        backend="reference",
        **{"beta": 1.0, **options},
    )
    (item,) = model.explain(text, 1, tokenizer=tokenizer, **options)
    assert [token.score for token in item.tokens] == pytest.approx(expected[0, 1:-1].tolist(), rel=1e-4, abs=1e-5)
    assert item.probabilities == pytest.approx(output.logits.softmax(dim=1)[0].tolist(), abs=1e-6)


@pytest.mark.parametrize("case", ["bert", "distilbert", "deberta-v2", "modernbert"])
def test_evidence_weighed_by_attention(case, tokenizer):
    model = make_model(case)
    before = model.encoder.config._attn_implementation
    plain = model.explain(TEXTS, tokenizer=tokenizer, layers="all")
    weighed = model.explain(TEXTS, tokenizer=tokenizer, layers="all", attention=True)
    assert model.encoder.config._attn_implementation == before
    for text, one, other in zip(TEXTS, plain, weighed, strict=True):
        seen = capture(model, tokenizer(text, return_tensors="pt"), graph=False)
        received = sum(layer.mean(dim=(1, 2)) for layer in seen.attentions)[0, 1:-1].tolist()
        expected = [token.score * factor for token, factor in zip(one.tokens, received, strict=True)]
        assert [token.score for token in other.tokens] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    apart = model.explain(TEXTS, tokenizer=tokenizer, layers="all", attention=True, batch_size=1)
    assert_alike(scores(apart), scores(weighed))
    less = weighed.reweighted(beta=0.0)
    assert_alike(scores(less), scores(model.explain(TEXTS, tokenizer=tokenizer, layers="all", attention=True, beta=0)))


def test_kernels_and_plain_torch_agree(model, tokenizer, monkeypatch):
    ours = model.explain(TEXTS, tokenizer=tokenizer)
    monkeypatch.setenv("MHEX_NATIVE", "0")
    assert_alike(scores(model.explain(TEXTS, tokenizer=tokenizer)), scores(ours))


def test_words_stand_in_the_text_and_add_up(model, tokenizer):
    (item,) = model.explain(TEXTS[0], tokenizer=tokenizer)
    assert [word.text for word in item.words] == ["Unbelievable", "film", ",", "not", "bad", "."]
    assert item.words[0].score == pytest.approx(math.fsum(token.score for token in item.tokens[:3]))
    assert all(item.texts[0][word.start : word.end] == word.text for word in item.words)
    assert item.prediction_name in ("bad", "middling", "good")
    assert item.layer_names == ("layer 0", "layer 1", "layer 2")


@pytest.mark.parametrize("case", ["bert", "distilbert", "modernbert"])
def test_pairs_of_texts(case, tokenizer):
    model = make_model(case)
    found = model.explain(PAIRS, 2, tokenizer=tokenizer)
    assert [item.texts for item in found] == PAIRS
    assert {token.part for token in found[0].tokens} == {0, 1}
    assert [token.text for token in found[2].tokens] == ["bad"]
    assert_alike(scores(model.explain(PAIRS, 2, tokenizer=tokenizer, batch_size=1)), scores(found))


def test_what_was_cut_is_told(model, tokenizer):
    whole, cut = (
        model.explain([TEXTS[3]] * 2, tokenizer=tokenizer),
        model.explain(TEXTS[3], tokenizer=tokenizer, max_length=6),
    )
    assert (whole[0].truncated, len(cut[0].tokens)) == (0, 4)
    assert cut[0].truncated > 40
    assert "not seen" in str(cut)
    long = model.explain("film " * 100, tokenizer=tokenizer)  # the encoder has 40 positions
    assert len(long[0].tokens) == 38
    assert long[0].truncated > 0


def test_roberta_counts_its_positions_behind_the_padding(tokenizer):
    found = make_model("roberta").explain("film " * 100, tokenizer=tokenizer)
    assert len(found[0].tokens) == 40 - 2 - 2


def test_targets(model, tokenizer):
    texts = TEXTS[:2] + TEXTS[3:]
    each = model.explain(texts, [2, 0, 1, 1], tokenizer=tokenizer)
    assert [item.target for item in each] == [2, 0, 1, 1]
    assert_alike(scores(model.explain(texts, torch.tensor([2, 0, 1, 1]), tokenizer=tokenizer)), scores(each), 0)
    assert_alike(scores(model.explain(texts, 2, tokenizer=tokenizer))[:1], scores(each)[:1])
    predicted = model.explain(texts, tokenizer=tokenizer)
    assert [item.target for item in predicted] == [item.prediction for item in predicted]


def test_a_batch_and_its_texts(model, tokenizer):
    for options in ({}, {"padding": True}, {"padding": True, "padding_side": "left"}):
        batch = tokenizer(TEXTS, **options)
        found = model.explain(batch, texts=TEXTS)
        assert_alike(scores(found), scores(model.explain(TEXTS, tokenizer=tokenizer)))


def test_another_weighing_needs_no_model(model, tokenizer):
    found = model.explain(TEXTS, 0, tokenizer=tokenizer).reweighted(beta=0.5, layers="all")
    assert_alike(scores(found), scores(model.explain(TEXTS, 0, tokenizer=tokenizer, beta=0.5, layers="all")), 1e-9)


def test_the_tokenizer_saved_beside_the_model_is_found(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = MHEXForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer must be given: none was found where the model came from"):
        loaded.explain("good film")
    tokenizer.save_pretrained(tmp_path)
    assert_alike(scores(loaded.explain(TEXTS)), scores(model.explain(TEXTS, tokenizer=tokenizer)))
    with pytest.raises(ValueError, match="tokenizer must be given: this model was made in memory"):
        make_model().explain("good film")


def test_nothing_to_explain(model, tokenizer):
    found = model.explain([], tokenizer=tokenizer, beta=0.5)
    assert isinstance(found, Explanation)
    assert (len(found), found.settings.beta, found.settings.layer_names) == (0, 0.5, ("layer 0", "layer 1", "layer 2"))


def test_the_model_is_left_as_it_was(model, tokenizer):
    model.train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.explain(TEXTS, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="target"):
        model.explain(TEXTS, 3, tokenizer=tokenizer)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()


def test_a_layer_of_ones_own_choice_and_half_precision(tokenizer):
    some = make_model(layers=(0, 2))
    found = some.explain(TEXTS, tokenizer=tokenizer, layers="all")
    assert found.settings.layer_names == ("layer 0", "layer 2")
    half = make_model().to(torch.bfloat16)
    for one, other in zip(
        half.explain(TEXTS, 0, tokenizer=tokenizer), make_model().explain(TEXTS, 0, tokenizer=tokenizer), strict=True
    ):
        ours, theirs = (torch.tensor([token.score for token in item.tokens]) for item in (one, other))
        assert_close(ours, theirs, rtol=0, atol=0.1 * max(1.0, float(theirs.abs().max()) if len(theirs) else 1.0))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            {"texts_or_batch": 3},
            TypeError,
            "texts_or_batch must be a text, or a sequence of texts or of pairs, got int",
        ),
        ({"texts_or_batch": ["good", 3]}, TypeError, "texts alone or pairs"),
        ({"texts_or_batch": ["good", ("a", "b")]}, TypeError, "texts alone or pairs"),
        ({"texts_or_batch": "good", "texts": "good"}, ValueError, "texts must be given once"),
        ({"texts_or_batch": "good", "tokenizer": str}, TypeError, "tokenizer must be a fast tokenizer"),
        ({"texts_or_batch": "good", "batch_size": 0}, ValueError, "batch_size"),
        ({"texts_or_batch": "good", "max_length": 0}, ValueError, "max_length"),
        ({"texts_or_batch": "good", "target": [1, 2]}, ValueError, "target must have shape"),
        (
            {"texts_or_batch": "good", "target": "grand"},
            ValueError,
            r"target must be one of the classes \(.*\) or its number",
        ),
        ({"texts_or_batch": "good", "target": "all"}, ValueError, r"target must be one of the classes \(.*, got 'all'"),
        ({"texts_or_batch": "good", "beta": 2}, ValueError, "beta"),
        ({"texts_or_batch": "good", "layers": []}, ValueError, "layers"),
        ({"texts_or_batch": "good", "layer_weights": [1.0]}, ValueError, "layer_weights"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(model, tokenizer, arguments, error, words):
    with pytest.raises(error, match=words):
        model.explain(**{"tokenizer": tokenizer, **arguments})


def test_a_batch_without_its_texts_or_offsets_is_refused(model, tokenizer):
    batch = tokenizer(TEXTS, padding=True)
    with pytest.raises(ValueError, match="texts must be given beside a batch"):
        model.explain(batch)
    with pytest.raises(ValueError, match="one encoding of a fast tokenizer per text"):
        model.explain(batch, texts=TEXTS[:2])


@pytest.mark.parametrize("page", ["README.md", "packages/mhex-text/README.md"])
def test_the_readme_does_what_it_shows(tokenizer, tmp_path, monkeypatch, capsys, page):
    make_encoder("distilbert").save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "mhex_text" in block]
    rows = [f"the film {number} is {word},{word}" for number in range(20) for word in ("good", "bad")]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace('"distilbert-base-uncased"', '"encoder"'), names)
    shown = capsys.readouterr().out
    assert len(names["explanation"])
    assert all(item.texts[0] in shown for item in names["explanation"])

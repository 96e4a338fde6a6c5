"""`explain_by`: the same explanation by any method, of classifiers with blocks and without."""

import pytest
import torch
from torch import nn

from mhex_text import Explanation, explain_by
from mhex_text.batch import TokenBatch
from mhex_text.explainers import EXPLAINERS, explainer

from .explainers.models import FAMILIES, KINDS, PAIRS, TEXTS, State, make_masking, make_model

LIBRARIES = {"integrated-gradients": "captum", "shap": "shap", "attention-flow": "scipy"}
QUICK = {"integrated-gradients": {"steps": 6}, "shap": {"evaluations": 40}}
NAMES = [name for name in EXPLAINERS if name != "mhex"]


def tokens_of(explanation):
    return [[token.score for token in item.tokens] for item in explanation]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_explainers(kind, name):
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name])
    model, tokenizer = make_model(kind), make_masking()
    explanation = explain_by(model, TEXTS, name, tokenizer=tokenizer, batch_size=3, **QUICK.get(name, {}))
    batch = TokenBatch.make(TEXTS, tokenizer)
    with torch.no_grad():
        probabilities = model(**batch.inputs()).logits.softmax(dim=1)
    scores = explainer(name, **QUICK.get(name, {}))(model, batch, probabilities.argmax(dim=1))
    assert [item.texts[0] for item in explanation] == TEXTS
    assert explanation.settings.layer_names == (name,)
    assert explanation.settings.beta == 1
    for row, item in enumerate(explanation):
        assert item.target == item.prediction == int(probabilities[row].argmax())
        assert item.probabilities == pytest.approx(probabilities[row].tolist(), abs=1e-5)
        assert [token.score for token in item.tokens] == pytest.approx(scores[row][batch.mask[row]].tolist(), abs=1e-4)
        assert all(token.positive[0] >= 0 >= token.negative[0] for token in item.tokens)
        assert item.truncated == 0
    assert [word.text for word in explanation[0].words] == ["Unbelievable", "film", ",", "not", "bad", "."]
    again = Explanation.from_json(explanation.to_json())
    assert tokens_of(again) == tokens_of(explanation)
    assert "Unbelievable" in explanation.to_html()
    assert "plot" in str(explanation)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(kind, family):
    model, tokenizer = make_model(kind, family), make_masking(family)
    together = explain_by(model, TEXTS, "cdam", 1, tokenizer=tokenizer)
    apart = explain_by(model, TEXTS[::-1], "cdam", 1, tokenizer=tokenizer, batch_size=1)
    for ours, theirs in zip(tokens_of(together), tokens_of(apart)[::-1], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert {item.target for item in together} == {1}
    assert any(score < 0 for row in tokens_of(together) for score in row)


def test_own_evidence_is_that_of_explain():
    model, tokenizer = make_model(), make_masking()
    for options in ({}, {"layers": "all", "beta": 0.5}, {"attention": True, "decay": 0.5}):
        ours = explain_by(model, TEXTS, "mhex", [0, 1, 2, 0], tokenizer=tokenizer, **options)
        theirs = model.explain(TEXTS, [0, 1, 2, 0], tokenizer=tokenizer, **options)
        assert ours == theirs
    last = explain_by(model, TEXTS, "mhex:layers=last", tokenizer=tokenizer)
    assert last == model.explain(TEXTS, tokenizer=tokenizer, layers=[2])
    rectified = explain_by(model, TEXTS, "mhex", tokenizer=tokenizer, rectify=True, name="rectified")
    assert rectified.settings.layer_names == ("rectified",)
    with pytest.raises(TypeError, match="model must be an MHEXForSequenceClassification for its own scores"):
        explain_by(make_model("plain"), TEXTS, "mhex", tokenizer=tokenizer)


def test_pairs_cut_texts_and_texts_of_nothing():
    model, tokenizer = make_model("plain"), make_masking()
    pairs = explain_by(model, PAIRS, "gmar", torch.tensor([0, 1, 2]), tokenizer=tokenizer)
    assert [item.target for item in pairs] == [0, 1, 2]
    assert [token.part for token in pairs[0].tokens] == [0, 0, 1, 1, 1]
    cut = explain_by(model, TEXTS[2], "gmar", tokenizer=tokenizer, max_length=6)
    assert len(cut[0].tokens) == 4
    assert cut[0].truncated > 20
    assert explain_by(model, ["", "good"], "gmar", tokenizer=tokenizer)[0].tokens == ()
    nothing = explain_by(model, [], "gmar", tokenizer=tokenizer)
    assert (len(nothing), nothing.settings.layer_names) == (0, ("gmar",))


def test_independent_classes():
    model = make_model("mhex", multi_label=True)
    found = explain_by(model, TEXTS[:1], "grad-sam", tokenizer=make_masking())
    with torch.no_grad():
        expected = model(**make_masking()(TEXTS[0], return_tensors="pt")).logits.sigmoid()[0]
    assert found[0].probabilities == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_function_of_ones_own():
    def lengths(model, batch, targets):
        return -(batch.offsets[..., 1] - batch.offsets[..., 0]).float()

    model, tokenizer = make_model("plain"), make_masking()
    found = explain_by(model, "not good", lengths, tokenizer=tokenizer)
    assert found.settings.layer_names == ("lengths",)
    assert tokens_of(found) == [[-3, -4]]
    assert explain_by(model, "not good", lengths, tokenizer=tokenizer, name="x").settings.layer_names == ("x",)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was(kind):
    model = make_model(kind).train()
    before = State.of(model)
    with torch.inference_mode():
        explain_by(model, TEXTS, "cdam:mode=smooth,steps=3,batch_size=4", tokenizer=make_masking())
    assert before.same_as(State.of(model))


def test_what_does_not_fit_is_refused():
    model, tokenizer = make_model("plain"), make_masking()
    with pytest.raises(TypeError, match="model must be a sequence classifier of transformers, got Linear"):
        explain_by(nn.Linear(2, 2), TEXTS, "gmar", tokenizer=tokenizer)
    with pytest.raises(TypeError, match="method must be a name or an explainer, got int"):
        explain_by(model, TEXTS, 3, tokenizer=tokenizer)
    with pytest.raises(TypeError, match="options must be given to the explainer when it is made, got norm"):
        explain_by(model, TEXTS, explainer("gmar"), tokenizer=tokenizer, norm="l2")
    with pytest.raises(TypeError, match="texts must be a text, or a sequence of texts or of pairs, got int"):
        explain_by(model, 3, "gmar", tokenizer=tokenizer)
    with pytest.raises(TypeError, match="name must be a string, got int"):
        explain_by(model, TEXTS, "gmar", tokenizer=tokenizer, name=3)
    with pytest.raises(ValueError, match=r"target must lie in \[0, 2\], got 7"):
        explain_by(model, TEXTS, "gmar", 7, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        explain_by(model, TEXTS, "gmar", tokenizer=tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="tokenizer must be given: this model was made in memory"):
        explain_by(model, TEXTS, "gmar")

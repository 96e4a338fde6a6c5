"""The classifier's own scores are those of `explain`; noise belongs to its text; a user's answer is checked."""

import sys
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from mhex_core import token_saliency
from mhex_text.batch import TokenBatch
from mhex_text.explainers import explainer

from .models import FAMILIES, PAIRS, TEXTS, make_masking, make_model

SETTINGS = [
    {},
    {"layers": 2, "decay": 0.5},
    {"layers": "all", "beta": 1.0, "tau_pos": 0.4, "tau_neg": 0.05},
    {"layers": [2, 0], "layer_weights": [0.5, -2.0], "beta": 0.3},
    {"layers": 1, "sharpness": "soft", "exponent": 0.5},
    {"layers": "all", "attention": True, "beta": 0.2},
]


def explained(model, batch, targets, **options):
    """What `explain` says, in the places of the batch."""
    found = model.explain(list(batch.texts), targets, tokenizer=batch.tokenizer, **options)
    scores = torch.zeros(batch.input_ids.shape, dtype=torch.float64)
    for row, text in enumerate(found):
        scores[row][batch.mask[row]] = torch.tensor([token.score for token in text.tokens], dtype=torch.float64)
    return scores


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("texts", [TEXTS, PAIRS], ids=["texts", "pairs"])
def test_own_scores_are_those_of_explain(texts, options):
    model, batch = make_model(), TokenBatch.make(texts, make_masking())
    targets = torch.arange(len(batch)) % 3
    scores = explainer("mhex", **options)(model, batch, targets)
    assert_close(scores.double(), explained(model, batch, targets, **options), rtol=1e-6, atol=1e-6)
    assert scores.abs().max() > 0.01


@pytest.mark.parametrize("case", FAMILIES)
def test_own_scores_in_every_family(case):
    model, batch = make_model(case=case), TokenBatch.make(TEXTS, make_masking(case))
    targets = torch.tensor([2, 1, 0, 1])
    expected = explained(model, batch, targets)
    assert_close(explainer("mhex")(model, batch, targets).double(), expected, rtol=1e-6, atol=1e-6)


def test_the_last_block_alone():
    model, batch = make_model(), TokenBatch.make(TEXTS, make_masking())
    targets = torch.zeros(4, dtype=torch.int64)
    last = explainer("mhex", layers="last")(model, batch, targets)
    assert_close(last, explainer("mhex", layers=[2])(model, batch, targets), rtol=0, atol=0)
    assert not torch.equal(last, explainer("mhex", layers=1)(model, batch, targets))


def test_rectified_activations():
    model, batch = make_model(), TokenBatch.make(TEXTS, make_masking())
    targets = torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        output = model(**batch.inputs(), output_activations=True)
        activations = [torch.where(layer > 0, layer, 0.0) for layer in output.activations]
        expected = token_saliency(activations, model.equivalent_matrices(), targets, mask=batch.mask, beta=1.0)
    scores = explainer("mhex", rectify=True)(model, batch, targets)
    assert_close(scores, expected)
    assert not torch.allclose(scores, explainer("mhex")(model, batch, targets))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": "first"}, ValueError, "layers must be one of 'all', 'last', got 'first'"),
        ({"layers": 0}, ValueError, "layers must be at least 1, got 0"),
        ({"beta": 2}, ValueError, r"beta must be in \[0, 1\], got 2"),
        ({"sharpness": "sharp"}, ValueError, "sharpness must be one of"),
        ({"rectify": 1}, TypeError, "rectify must be a bool, got int"),
    ],
)
def test_options_are_checked_at_once(options, error, message):
    with pytest.raises(error, match=message):
        explainer("mhex", **options)


def test_only_a_model_with_blocks_has_scores_of_its_own():
    batch = TokenBatch.make(TEXTS, make_masking())
    with pytest.raises(TypeError, match="must be an MHEXForSequenceClassification for its own scores, got BertFor"):
        explainer("mhex")(make_model("plain"), batch, torch.zeros(4, dtype=torch.int64))


def test_noise_belongs_to_its_text():
    model, targets = make_model(), torch.zeros(3, dtype=torch.int64)
    batch = TokenBatch.make([TEXTS[0], TEXTS[2], TEXTS[0]], make_masking())
    scores = explainer("random")(model, batch, targets)
    assert torch.equal(scores[0], scores[2])
    drawn = scores[batch.mask]
    assert 0 <= drawn.min() < 0.2
    assert 0.8 < drawn.max() < 1
    assert not torch.equal(scores, explainer("random", seed=1)(model, batch, targets))
    with pytest.raises(TypeError, match="seed must be an int, got float"):
        explainer("random", seed=0.5)


@pytest.fixture
def own(monkeypatch):
    """A module of the user's, with functions that answer well and badly."""
    module = ModuleType("theirs")
    module.lengths = lambda model, batch, targets: (batch.offsets[..., 1] - batch.offsets[..., 0]).double()
    module.none = lambda model, batch, targets: None
    module.short = lambda model, batch, targets: torch.zeros(1)
    module.infinite = lambda model, batch, targets: torch.where(batch.mask, torch.inf, 0.0)
    module.careless = lambda model, batch, targets: torch.where(batch.mask, 1.0, torch.nan)
    module.number = 3
    monkeypatch.setitem(sys.modules, "theirs", module)


@pytest.mark.usefixtures("own")
def test_a_users_function():
    model, batch = make_model(), TokenBatch.make(TEXTS, make_masking())
    targets = torch.zeros(4, dtype=torch.int64)
    scores = explainer("theirs:lengths")(model, batch, targets)
    assert scores.dtype == torch.float32
    assert scores[1][batch.mask[1]].tolist() == [4]
    assert_close(explainer("theirs:careless")(model, batch, targets), batch.mask.float())
    with pytest.raises(TypeError, match="theirs:none must give a tensor, got NoneType"):
        explainer("theirs:none")(model, batch, targets)
    with pytest.raises(ValueError, match=r"theirs:short must give scores of shape \(4, \d+\), got \(1,\)"):
        explainer("theirs:short")(model, batch, targets)
    with pytest.raises(ValueError, match="theirs:infinite must give finite scores, got inf among them"):
        explainer("theirs:infinite")(model, batch, targets)
    with pytest.raises(TypeError, match="must name a function, got 'theirs:number'"):
        explainer("theirs:number")
    with pytest.raises(ValueError, match="'module:function' that can be imported, got 'theirs:nothing'"):
        explainer("theirs:nothing")

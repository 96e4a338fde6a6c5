"""Concepts in texts: activations and slopes in their places whatever the batch, and the report made of them."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from mhex_core.concepts import concept_derivatives, tcav_scores
from mhex_text import TokenBatch, explain_by
from mhex_text.capture import capture
from mhex_text.concepts import concept_samples, concept_scores, concept_sensitivity, mean_embedding

from .explainers.models import KINDS, TEXTS, make_masking, make_model

GOOD = ["good film", "a bright film of love", "good plots, good films.", "love the plot", "what a bright plot"]
DULL = ["a dull plot", "hate the film, bad", "why not hate dull plots", "bad", "the dull film because of the plot."]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def alone(model, text):
    return capture(model, dict(make_masking()(text, return_tensors="pt")))


@pytest.mark.parametrize("kind", KINDS)
def test_mean_embedding(kind):
    model = make_model(kind)
    expected = sum(alone(model, text).features[0].detach() for text in TEXTS) / 4
    for size in (1, 3, 32):
        assert_close(mean_embedding(model, TEXTS, tokenizer=make_masking(), batch_size=size), expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_what_layers_hand_on(kind):
    model = make_model(kind)
    samples = concept_samples(model, TEXTS, tokenizer=make_masking(), batch_size=3)
    assert (len(samples), len(samples.activations)) == (4, 2)
    for row, text in enumerate(TEXTS):
        seen = alone(model, text)
        tokens = seen.outputs[0].shape[1]
        assert samples.mask[row].tolist() == [True] * tokens + [False] * (17 - tokens)
        for layer, output in zip(samples.activations, seen.outputs, strict=False):
            assert_close(layer[row, :tokens], output[0].detach(), **CLOSE)
    last = concept_samples(model, TEXTS, tokenizer=make_masking(), layers=[-1])
    assert_close(last.activations[0][1, :3], alone(model, TEXTS[1]).outputs[2][0].detach(), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_report(kind):
    pytest.importorskip("sklearn")
    model = make_model(kind)
    given = {"tokenizer": make_masking(), "runs": 4, "batch_size": 3}
    report = concept_sensitivity(model, {"good": GOOD, "dull": DULL}, TEXTS, 1, **given)
    assert [(row.concept, row.layer) for row in report.rows] == [
        (concept, f"layer {layer}") for concept in ("good", "dull") for layer in (0, 1)
    ]
    for row in report.rows:
        vectors = report.vectors[row.concept, row.layer].vectors
        index, signs = int(row.layer[-1]), []
        for text in TEXTS:
            seen = alone(model, text)
            (slope,) = seen.gradients(torch.tensor([1]), [seen.outputs[index]])
            weights = seen.attentions[index][0].detach().mean(dim=0)
            read = weights[0] if kind == "plain" else weights.mean(dim=0)
            signs.append(tcav_scores(concept_derivatives(slope, read[None], vectors)))
        assert row.scores == pytest.approx(torch.stack(signs).mean(dim=0).tolist())
    assert "| good | layer 1 |" in report.to_markdown()
    told = concept_sensitivity(model, {"good": GOOD}, TEXTS, 1, random=DULL, layers=[0], **given)
    assert len(told.rows) == 1


def test_what_does_not_fit_is_refused():
    model, tokenizer = make_model(), make_masking()
    with pytest.raises(ValueError, match="texts must hold at least one text, got none"):
        mean_embedding(model, [], tokenizer=tokenizer)
    with pytest.raises(TypeError, match="model must be a sequence classifier of transformers, got str"):
        concept_samples("bert", TEXTS, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"layers must name layers in \[0, 2\]"):
        concept_samples(model, TEXTS, tokenizer=tokenizer, layers=[3])
    with pytest.raises(TypeError, match="concepts must be texts by name, got list"):
        concept_sensitivity(model, [GOOD], TEXTS, 1, tokenizer=tokenizer)
    for target, error in ((3, ValueError), ("good", TypeError)):
        with pytest.raises(error, match="target must"):
            concept_sensitivity(model, {"good": GOOD}, TEXTS, target, tokenizer=tokenizer, random=DULL, runs=2)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_tokens_follow_their_formula(kind):
    model = make_model(kind)
    vector = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)
    batch = TokenBatch.make(TEXTS, make_masking())
    targets = torch.tensor([0, 1, 2, 1])
    found = concept_scores(model, batch, targets, vector, layer=1)
    assert found.shape == batch.input_ids.shape
    for row, text in enumerate(TEXTS):
        seen = alone(model, text)
        (slope,) = seen.gradients(targets[row : row + 1], [seen.outputs[1]])
        along = slope[0] @ vector
        weights = seen.attentions[1][0].detach().mean(dim=0)
        read = weights[0] if kind == "plain" else weights.mean(dim=0)
        expected = read * along * read.norm() / along.norm()
        real = batch.attention_mask[row] != 0
        kept = torch.where(batch.mask[row][real], expected, 0.0)
        assert_close(found[row][real], kept, rtol=1e-3, atol=1e-6)
    assert (found[~batch.mask] == 0).all()
    shown = explain_by(
        model, TEXTS, partial(concept_scores, vector=vector, layer=1), 1, tokenizer=make_masking(), name="good, layer 1"
    )
    assert shown[0].settings.layer_names == ("good, layer 1",)
    with pytest.raises(ValueError, match="vector must have shape"):
        concept_scores(model, batch, targets, torch.zeros(3), layer=1)

"""Each method against what it claims to compute, worked out in another way."""

from itertools import product

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mhex_text.batch import TokenBatch

from .models import FAMILIES, KINDS, TEXTS, make_masking, make_model

MASK = 4  # the number of [MASK]


@pytest.fixture(params=KINDS)
def model(request):
    return make_model(request.param, attention="eager")


@pytest.fixture
def batch():
    return TokenBatch.make(TEXTS, make_masking())


TARGETS = torch.tensor([2, 1, 0, 1])


def row_of(batch, row):
    """One text without padding."""
    return {name: value[row : row + 1, : batch.attention_mask[row].sum()] for name, value in batch.inputs().items()}


def logit(model, inputs, target):
    with torch.no_grad():
        return float(model(**inputs).logits[0, target])


def masked(inputs, places):
    ids = inputs["input_ids"].clone()
    ids[0, places] = MASK
    return inputs | {"input_ids": ids}


@pytest.mark.parametrize("query", ["cls", "max"])
def test_rollout(make, batch, query):
    model = make_model("plain", attention="eager")
    scores = make("attention-rollout", query=query)(model, batch, TARGETS)
    for row in range(4):
        with torch.no_grad():
            shown = model(**row_of(batch, row), output_attentions=True).attentions
        rolled = np.eye(shown[0].shape[2])
        for weights in shown:
            mixed = weights[0].double().numpy().mean(axis=0) + np.eye(len(rolled))
            rolled = (mixed / mixed.sum(axis=1, keepdims=True)) @ rolled
        expected = rolled[0] if query == "cls" else rolled.max(axis=0)
        places = batch.mask[row]
        expected = torch.from_numpy(expected)[places[: len(expected)]].float()
        assert_close(scores[row][places], expected, rtol=0, atol=1e-6)


def test_rollout_knows_no_class(make, model, batch):
    explain = make("attention-rollout")
    assert torch.equal(explain(model, batch, TARGETS), explain(model, batch, TARGETS.flip(0)))
    with pytest.raises(ValueError, match="query must be one of 'cls', 'max', got 'mean'"):
        make("attention-rollout", query="mean")


def test_attcat(make, batch):
    model = make_model("plain", attention="eager")
    scores = make("attcat")(model, batch, TARGETS)
    for row, target in enumerate(TARGETS):
        shown = model(**row_of(batch, row), output_attentions=True, output_hidden_states=True)
        hidden = shown.hidden_states[:-1]
        gradients = torch.autograd.grad(shown.logits[0, target], hidden)
        expected = 0
        for state, slope, weights in zip(hidden, gradients, shown.attentions, strict=True):
            expected = (
                expected + torch.einsum("hqk,kd,kd->k", weights[0], state[0], slope[0]) / weights[0, :, :, 0].numel()
            )
        places = batch.mask[row]
        assert_close(scores[row][places], expected.detach()[places[: len(expected)]], rtol=1e-4, atol=1e-6)
    assert (scores < 0).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", FAMILIES)
def test_integrated_gradients_are_complete(make, kind, case):
    pytest.importorskip("captum")
    model, batch = make_model(kind, case), TokenBatch.make(TEXTS, make_masking(case))
    with torch.no_grad():
        for weight in model.base_model.parameters():
            if weight.ndim > 1:
                weight.mul_(0.5)  # a way that a hundred steps can follow
    scores = make("integrated-gradients", steps=100)(model, batch, TARGETS)
    for row, target in enumerate(TARGETS.tolist()):
        inputs = row_of(batch, row)
        places = batch.mask[row].nonzero().flatten()
        change = logit(model, inputs, target) - logit(model, masked(inputs, places), target)
        assert abs(float(scores[row].sum()) - change) < 0.02 * max(1, abs(change))


@pytest.mark.parametrize("baseline", ["mask", "pad"])
def test_integrated_gradients_step_by_step(make, model, batch, baseline):
    """The integral by hand: nodes and weights from numpy, embeddings handed to the model."""
    scores = make("integrated-gradients", steps=5, baseline=baseline, batch_size=3)(model, batch, TARGETS)
    nodes, weights = np.polynomial.legendre.leggauss(5)
    embed = model.get_input_embeddings()
    for row, target in enumerate(TARGETS.tolist()):
        inputs = row_of(batch, row)
        ids = inputs.pop("input_ids")
        places = batch.mask[row].nonzero().flatten()
        blank = ids.clone()
        blank[0, places] = MASK if baseline == "mask" else 0
        start, end = embed(blank).detach(), embed(ids).detach()
        total = torch.zeros_like(start)
        for node, weight in zip(nodes, weights, strict=True):
            point = (start + (node + 1) / 2 * (end - start)).requires_grad_()
            total += weight / 2 * torch.autograd.grad(model(inputs_embeds=point, **inputs).logits[0, target], point)[0]
        expected = ((end - start) * total).sum(dim=2)[0]
        assert_close(scores[row, places], expected[places], rtol=1e-4, atol=1e-5)
        assert expected[0] == 0


def test_occlusion(make, model, batch):
    scores = make("occlusion", batch_size=3)(model, batch, TARGETS)
    for row, target in enumerate(TARGETS.tolist()):
        inputs = row_of(batch, row)
        with torch.no_grad():
            whole = model(**inputs).logits.softmax(dim=1)[0, target]
            for place in batch.mask[row].nonzero().flatten().tolist():
                without = model(**masked(inputs, [place])).logits.softmax(dim=1)[0, target]
                assert_close(scores[row, place], whole - without, rtol=0, atol=1e-6)


def test_occlusion_of_independent_classes(make, batch):
    model = make_model("mhex", multi_label=True)
    scores = make("occlusion")(model, batch, TARGETS)
    inputs = row_of(batch, 1)
    with torch.no_grad():
        change = model(**inputs).logits.sigmoid() - model(**masked(inputs, [1])).logits.sigmoid()
    assert_close(scores[1, 1], change[0, 1], rtol=0, atol=1e-6)


def test_shap_sums_to_what_masking_everything_takes(make, model, batch):
    for options in ({}, {"evaluations": 500}, {"evaluations": 6, "batch_size": 3}):
        scores = make("shap", **options)(model, batch, TARGETS)
        for row, target in enumerate(TARGETS.tolist()):
            inputs = row_of(batch, row)
            places = batch.mask[row].nonzero().flatten()
            change = logit(model, inputs, target) - logit(model, masked(inputs, places), target)
            assert float(scores[row].sum()) == pytest.approx(change, abs=1e-4)


def test_shap_of_two_tokens_are_shapley_values(make, model):
    batch = TokenBatch.make(["not good"], make_masking())
    scores = make("shap")(model, batch, TARGETS[:1])
    inputs, target = row_of(batch, 0), int(TARGETS[0])
    worth = {
        kept: logit(model, masked(inputs, [1 + token for token in range(2) if not kept[token]]), target)
        for kept in product((False, True), repeat=2)
    }
    both, none, first, second = worth[True, True], worth[False, False], worth[True, False], worth[False, True]
    expected = [(first - none + both - second) / 2, (second - none + both - first) / 2]
    assert scores[0, 1:3].tolist() == pytest.approx(expected, abs=1e-5)


def test_shap_of_a_word_in_three_pieces_are_owen_values(make, model):
    """Pieces of one word are masked as they are: never cut anew, as text with a gap in it would be."""
    batch = TokenBatch.make(["unbelievable"], make_masking())
    scores = make("shap", evaluations=500)(model, batch, TARGETS[:1])[0, 1:4]
    inputs, target = row_of(batch, 0), int(TARGETS[0])

    def worth(*kept):
        return logit(model, masked(inputs, [1 + token for token in range(3) if token not in kept]), target)

    def owen(pair, lone):
        """Shapley values of the pair and the lone one, then within the pair, where the lone one is there or is not."""
        values = {lone: (worth(lone) - worth() + worth(0, 1, 2) - worth(*pair)) / 2}
        for token, other in (pair, pair[::-1]):
            gains = [worth(token, *rest) - worth(*rest) for rest in ((), (other,), (lone,), (other, lone))]
            values[token] = sum(gains) / 4
        return [values[token] for token in range(3)]

    found = scores.tolist()
    assert any(found == pytest.approx(owen(*tree), abs=1e-5) for tree in (((0, 1), 2), ((1, 2), 0)))


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("integrated-gradients", {"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ("integrated-gradients", {"baseline": "zero"}, ValueError, "baseline must be one of 'mask', 'pad', got 'zero'"),
        ("integrated-gradients", {"batch_size": 2.0}, TypeError, "batch_size must be an int, got float"),
        ("shap", {"evaluations": "many"}, TypeError, "evaluations must be an int, got str"),
        ("shap", {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ("occlusion", {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    ],
)
def test_options_are_checked_at_once(make, name, options, error, message):
    with pytest.raises(error, match=message):
        make(name, **options)

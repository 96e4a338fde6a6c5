"""Methods that read attention, each against loops over one text at a time, from what the library itself shows."""

from itertools import combinations
from math import factorial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mhex_text.batch import TokenBatch
from mhex_text.capture import attention_shown

from .models import KINDS, TEXTS, make_masking, make_model

SHORT = [TEXTS[0], TEXTS[1], TEXTS[3]]  # of at most eight tokens without special ones
TARGETS = torch.tensor([2, 1, 0])


@pytest.fixture(params=[*KINDS, "mean"])
def model(request):
    if request.param == "mean":
        model = make_model("plain", "modernbert", attention="eager")
        model.config.classifier_pooling = "mean"
        return model
    return make_model(request.param, attention="eager")


@pytest.fixture
def batch():
    return TokenBatch.make(SHORT, make_masking())


def shown(model, batch, row):
    """Attention (L, H, n, n) of one text, its slopes, and the shares with which queries are read, in numpy."""
    inputs = {name: value[row : row + 1, : batch.attention_mask[row].sum()] for name, value in batch.inputs().items()}
    with attention_shown(model) as seen:
        logits = model(**inputs).logits
    weights = [seen[index] for index in sorted(seen)]
    slopes = torch.autograd.grad(logits[0, TARGETS[row]], weights, allow_unused=True)
    tokens = inputs["input_ids"].shape[1]
    averaged = hasattr(model, "blocks") or getattr(model.config, "classifier_pooling", "cls") == "mean"
    return SimpleNamespace(
        weights=np.stack([layer[0].detach().double().numpy() for layer in weights]),
        slopes=np.stack([layer[0].double().numpy() for layer in slopes]),
        readout=np.full(tokens, 1 / tokens) if averaged else np.eye(tokens)[0],
        tokens=tokens,
        players=batch.mask[row].nonzero().flatten().tolist(),
    )


def compare(scores, batch, expected_of, model):
    for row in range(len(batch)):
        seen = shown(model, batch, row)
        expected = expected_of(seen)
        for player in seen.players:
            assert float(scores[row, player]) == pytest.approx(expected[player], rel=2e-4, abs=2e-6)


def rolled(layers, tokens):
    result = np.eye(tokens)
    for layer in layers:
        result = (layer / layer.sum(axis=1, keepdims=True)) @ result
    return result


def test_last_attention(make, model, batch):
    scores = make("attention")(model, batch, TARGETS)
    compare(scores, batch, lambda seen: seen.readout @ seen.weights[-1].mean(axis=0), model)


@pytest.mark.parametrize(("residual", "start"), [(0.5, 0), (0.2, 1)])
def test_rollout_of_some_layers(make, model, batch, residual, start):
    scores = make("attention-rollout", residual=residual, start=start)(model, batch, TARGETS)

    def expected(seen):
        mixed = [(1 - residual) * layer.mean(axis=0) + residual * np.eye(seen.tokens) for layer in seen.weights]
        return rolled(mixed[start:], seen.tokens)[0]

    compare(scores, batch, expected, model)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_gmar(make, model, batch, norm, alpha):
    scores = make("gmar", norm=norm, residual=alpha / (1 + alpha))(model, batch, TARGETS)

    def expected(seen):
        layers = []
        for weights, slopes in zip(seen.weights, seen.slopes, strict=True):
            sizes = np.array([np.linalg.norm(head.ravel(), 1 if norm == "l1" else 2) for head in slopes])
            layers.append(np.tensordot(sizes / sizes.sum(), weights, axes=1) + alpha * np.eye(seen.tokens))
        return seen.readout @ rolled(layers, seen.tokens)

    compare(scores, batch, expected, model)


def test_generic_relevance(make, model, batch):
    scores = make("generic-relevance")(model, batch, TARGETS)

    def expected(seen):
        relevance = np.eye(seen.tokens)
        for weights, slopes in zip(seen.weights, seen.slopes, strict=True):
            relevance = relevance + np.maximum(weights * slopes, 0).mean(axis=0) @ relevance
        return seen.readout @ relevance

    compare(scores, batch, expected, model)


def test_grad_sam(make, model, batch):
    scores = make("grad-sam")(model, batch, TARGETS)
    compare(scores, batch, lambda seen: (seen.weights * np.maximum(seen.slopes, 0)).mean(axis=(0, 1, 3)), model)


def test_attention_gradcam(make, model, batch):
    scores = torch.zeros(3, 10)
    for shift in range(3):  # what one class has against it speaks for another
        targets = (TARGETS + shift) % 3
        scores += make("attention-gradcam")(model, batch, targets)
    assert (scores[batch.mask] > 0).any()
    scores = make("attention-gradcam")(model, batch, TARGETS)

    def expected(seen):
        total = np.zeros(seen.tokens)
        for weights, slopes in zip(seen.weights[-1], seen.slopes[-1], strict=True):
            slope = slopes[seen.readout > 0].sum(axis=0)
            total += slope[seen.players].mean() * (seen.readout @ weights)
        return np.maximum(total / len(seen.weights[-1]), 0)

    compare(scores, batch, expected, model)


def test_attention_flow(make, model, batch):
    networkx = pytest.importorskip("networkx")
    scores = make("attention-flow")(model, batch, TARGETS)

    def expected(seen):
        graph = networkx.DiGraph()
        for level, layer in enumerate(seen.weights):
            for (query, key), share in np.ndenumerate((layer.mean(axis=0) + np.eye(seen.tokens)) / 2):
                graph.add_edge((level + 1, query), (level, key), capacity=share)
        total = np.zeros(seen.tokens)
        for query in np.flatnonzero(seen.readout):
            source = (len(seen.weights), query)
            flows = [networkx.maximum_flow_value(graph, source, (0, key)) for key in range(seen.tokens)]
            total += seen.readout[query] * np.array(flows) / sum(flows)
        return total

    for row in range(3):
        seen = shown(model, batch, row)
        wanted = expected(seen)
        for player in seen.players:
            assert float(scores[row, player]) == pytest.approx(wanted[player], abs=2e-5)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("game", ["cls", "mutual", "max_mutual"])
def test_shapley_values_by_all_coalitions(make, model, batch, game, gradient):
    scores = make("attention-shapley", game=game, gradient=gradient)(model, batch, TARGETS)

    def expected(seen):
        shares = seen.weights * np.maximum(seen.slopes, 0) if gradient else seen.weights
        matrix = shares.mean(axis=(0, 1))

        def worth(members):
            if game == "cls":
                return sum((seen.readout @ matrix)[member] for member in members)
            if len(members) == 1:
                return matrix[members[0], members[0]]
            pairs = [(matrix[one, other], matrix[other, one]) for one, other in combinations(members, 2)]
            return sum(map(sum if game == "mutual" else max, pairs))

        count, values = len(seen.players), {}
        for player in seen.players:
            others = [other for other in seen.players if other != player]
            values[player] = sum(
                factorial(size)
                * factorial(count - size - 1)
                / factorial(count)
                * (worth((*some, player)) - worth(some))
                for size in range(count)
                for some in combinations(others, size)
            )
        return values

    compare(scores, batch, expected, model)


def test_flow_refuses_long_texts(make):
    batch = TokenBatch.make(["good " * 63], make_masking())
    with pytest.raises(ValueError, match=r"at most 64 tokens for attention-flow, got 65: cut them with max_length"):
        make("attention-flow")(make_model(), batch, TARGETS[:1])


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("gmar", {"norm": "l3"}, ValueError, "norm must be one of 'l1', 'l2', got 'l3'"),
        ("gmar", {"residual": 2}, ValueError, r"residual must be in \[0, 1\], got 2"),
        ("attention-flow", {"residual": "half"}, TypeError, "residual must be a number, got str"),
        ("attention-rollout", {"residual": -1}, ValueError, r"residual must be in \[0, 1\], got -1"),
        ("attention-rollout", {"start": -1}, ValueError, "start must be at least 0, got -1"),
        ("attention-rollout", {"start": 1.0}, TypeError, "start must be an int, got float"),
        ("attention-shapley", {"game": "chess"}, ValueError, "game must be one of 'cls', 'mutual', 'max_mutual'"),
        ("attention-shapley", {"gradient": 1}, TypeError, "gradient must be a bool, got int"),
    ],
)
def test_options_are_checked_at_once(make, name, options, error, message):
    with pytest.raises(error, match=message):
        make(name, **options)


def test_a_layer_that_is_not_there(make, batch):
    with pytest.raises(ValueError, match=r"start must lie in \[0, 2\], got 3"):
        make("attention-rollout", start=3)(make_model(), batch, TARGETS)

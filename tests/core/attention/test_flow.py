"""Attention flow against the maximum flows of networkx."""

import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mhex_core.attention import attention_flow

pytest.importorskip("scipy")


def slow_flow(weights, query, residual):
    """One text (H, t, t) per layer: a graph with named nodes and real numbers for capacities."""
    networkx = pytest.importorskip("networkx")
    tokens = weights[0].shape[1]
    graph = networkx.DiGraph()
    for level, layer in enumerate(weights):
        for above in range(tokens):
            row = (1 - residual) * layer.mean(axis=0)[above] + residual * (np.arange(tokens) == above)
            for below in range(tokens):
                graph.add_edge(f"{level + 1}/{above}", f"{level}/{below}", capacity=float(row[below] / row.sum()))
    flows = [networkx.maximum_flow_value(graph, f"{len(weights)}/{query}", f"0/{key}") for key in range(tokens)]
    return torch.tensor(flows, dtype=torch.float64) / sum(flows)


@pytest.mark.parametrize("residual", [0.0, 0.3, 0.5])
def test_flow_equals_that_of_networkx(make_attentions, residual):
    lengths = (5, 3, 1)
    weights, _, mask = make_attentions(lengths=lengths)
    # Edges that nothing passes.
    weights[1][:, :, :, 1] *= mask[:, None, None, 0] * 0.0
    flow = attention_flow(weights, mask=mask, residual=residual, queries=(0, 2))
    assert flow.shape == (3, 2, 5)
    for row, length in enumerate(lengths):
        own = [layer[row, :, :length, :length].numpy() for layer in weights]
        for place, query in enumerate((0, 2)):
            if query < length:
                assert_close(flow[row, place, :length], slow_flow(own, query, residual), rtol=0, atol=1e-5)
            else:
                assert (flow[row, place] == 0).all()
    assert_close(flow.sum(dim=2), torch.tensor([[1, 1], [1, 1], [1, 0]]).double(), rtol=0, atol=1e-12)


def test_one_layer_lets_through_its_own_weights(make_attentions):
    weights, _, _ = make_attentions(layers=1, lengths=(5,))
    expected = 0.5 * weights[0][0].mean(dim=0) + 0.5 * torch.eye(5).double()
    assert_close(attention_flow(weights, queries=range(5))[0], expected, rtol=0, atol=2e-6)


def test_padding_is_not_felt_and_gradients_are_not_followed(make_attentions, spoil):
    weights, _, mask = make_attentions(lengths=(3, 2), tokens=6)
    clean = attention_flow(weights, mask=mask)
    assert torch.equal(attention_flow(spoil(weights, mask), mask=mask.long()), clean)
    assert torch.equal(attention_flow([layer[:1, :, :3, :3] for layer in weights])[0], clean[0, :, :3])
    assert (clean[:, 0][~mask] == 0).all()
    graphed = [layer.float().requires_grad_() for layer in weights]
    found = attention_flow(graphed, mask=mask)
    assert found.dtype == torch.float32
    assert not found.requires_grad


def test_too_many_tokens_are_refused_with_a_way_out(make_attentions):
    weights, _, mask = make_attentions(lengths=(5, 2), tokens=5)
    with pytest.raises(ValueError, match="attentions must have at most 4 real tokens, got 5: pool the tokens"):
        attention_flow(weights, mask=mask, max_tokens=4)
    mask[0, 4] = False
    assert attention_flow(weights, mask=mask, max_tokens=4).shape == (2, 1, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": 0}, TypeError, "queries must be a sequence of ints, got int"),
        ({"queries": ()}, ValueError, "queries must name at least one token"),
        ({"queries": (0, 2)}, ValueError, r"queries\[1\] must lie in \[0, 1\], got 2"),
        ({"queries": (0.0,)}, TypeError, r"queries\[0\] must be an int, got float"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1"),
        ({"residual": -1}, ValueError, r"residual must be in \[0, 1\]"),
        ({"mask": torch.ones(1, 3)}, ValueError, "mask must have shape"),
        ({"attentions": [torch.ones(2, 2, 2)]}, ValueError, r"attentions\[0\] must have 4 dimensions"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        attention_flow(**({"attentions": [torch.full((1, 1, 2, 2), 0.5)]} | change))


def test_a_missing_scipy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ImportError, match=r'attention_flow needs scipy: pip install "mhex-vision\[bench\]"'):
        attention_flow([torch.full((1, 1, 2, 2), 0.5)])

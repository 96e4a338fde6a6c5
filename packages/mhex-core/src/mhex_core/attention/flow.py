"""Attention as a network of pipes: how much can flow from an output token to each input token.

Letters: B batch, H heads, T tokens, L layers, A^l the weights of layer l after the softmax.
Source: attention flow, Abnar and Zuidema 2020 (arXiv 2005.00928), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from mhex_core import _checks
from mhex_core._extras import library
from mhex_core.attention._layers import check_shares, index_below, pairs_of, real_tokens, weights_of, with_skip

_SCALE = 1_000_000  # scipy's maximum flow takes whole numbers


def attention_flow(
    attentions: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    residual: float = 0.5,
    queries: Sequence[int] = (0,),
    max_tokens: int = 64,
) -> Tensor:
    """The largest flow from an output token down to each input token by itself, brought to sum 1 over the inputs.

    The graph has the L + 1 levels of tokens; an edge from token q above layer l to token i below it lets through
    Ahat^l_qi = (1 - residual) mean_h A^{l,h}_qi + residual [q = i], rows of sum 1. Capacities are rounded to
    millionths. It is the same for every target. It takes one maximum flow for each query and token, on the CPU: below
    a second per query for 64 tokens and 12 layers.

    Args:
        attentions: L tensors (B, H, T, T), shallow to deep, after the softmax.
        mask: (B, T), true (or 1) for real tokens; None means that all are.
        residual: The share of the skip connection, in [0, 1].
        queries: The output tokens, indices in [0, T - 1].
        max_tokens: More real tokens than these are refused, as the time grows with their third power or faster.

    Returns:
        (B, len(queries), T), not negative, rows of sum 1; 0 for padding, and the whole row of a query in padding.

    Raises:
        ImportError: scipy is missing.
        TypeError: An argument is of another type.
        ValueError: The shapes do not fit each other, a value does not lie where it must, or there are too many tokens.
    """
    layers, batch, tokens = weights_of(attentions)
    residual = _checks.number("residual", residual, low=0, high=1)
    if isinstance(queries, str) or not isinstance(queries, Sequence):
        raise TypeError(f"queries must be a sequence of ints, got {type(queries).__name__}")
    if not queries:
        raise ValueError("queries must name at least one token, got none")
    wanted = [index_below(f"queries[{place}]", query, tokens) for place, query in enumerate(queries)]
    _checks.positive_int("max_tokens", max_tokens)
    real = real_tokens(mask, batch, tokens, layers[0])
    most = int(real.sum(dim=1).max()) if batch else 0
    if most > max_tokens:
        raise ValueError(
            f"attentions must have at most {max_tokens} real tokens, got {most}: pool the tokens, shorten the input, "
            "or raise max_tokens and wait"
        )
    sparse = library("scipy.sparse", needed_by="attention_flow", distribution="scipy")
    graphs = library("scipy.sparse.csgraph", needed_by="attention_flow", distribution="scipy")
    pairs = pairs_of(real)
    check_shares(layers, pairs)
    mixed = torch.stack([with_skip(weights.mean(dim=1).double(), residual, pairs) for weights in layers], dim=1)
    capacities = (mixed.detach() * _SCALE).round().to("cpu", torch.int32).numpy()
    result = np.zeros((batch, len(wanted), tokens))
    for sample, kept in enumerate(real.cpu().numpy()):
        (places,) = kept.nonzero()
        graph = _graph(capacities[sample][:, kept][:, :, kept], sparse)
        for row, query in enumerate(wanted):
            if kept[query]:
                source = len(layers) * len(places) + int(places.searchsorted(query))
                flows = [graphs.maximum_flow(graph, source, sink).flow_value for sink in range(len(places))]
                result[sample, row, places] = np.asarray(flows) / sum(flows)
    return torch.from_numpy(result).to(layers[0])


def _graph(capacities: np.ndarray[tuple[int, ...], np.dtype[np.int32]], sparse: ModuleType) -> object:
    """Levels of n nodes, the inputs first; capacities (L, n, n) of the edges down from each level, in CSR form."""
    layers, tokens, _ = capacities.shape
    layer, query, key = capacities.nonzero()
    above, below = (layer + 1) * tokens + query, layer * tokens + key
    nodes = (layers + 1) * tokens
    graph = sparse.csr_matrix((capacities[layer, query, key], (above, below)), shape=(nodes, nodes), dtype=np.int32)
    graph.sort_indices()
    return graph

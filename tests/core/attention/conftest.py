"""Attention weights and their gradients as an encoder gives them."""

import pytest
import torch


@pytest.fixture
def make_attentions():
    """Weights (real queries give padding nothing), gradients and the mask of texts of these lengths."""

    def make(*, lengths=(5, 2, 1), tokens=5, layers=3, heads=2, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shape = (len(lengths), heads, tokens, tokens)
        mask = torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]
        weights, gradients = [], []
        for _ in range(layers):
            scores = torch.randn(shape, generator=generator, dtype=torch.float64)
            weights.append(scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(dim=3))
            gradients.append(torch.randn(shape, generator=generator, dtype=torch.float64))
        return weights, gradients, mask

    return make


@pytest.fixture
def spoil():
    """The same with anything at all where padding is the query or the key."""

    def spoiled(layers, mask):
        both = (mask[:, :, None] & mask[:, None])[:, None]
        return [torch.where(both, layer, torch.full_like(layer, torch.nan)) for layer in layers]

    return spoiled

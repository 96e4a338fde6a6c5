"""Attention rollout and AttCAT against slow loops in numpy, and padding that must not be felt."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mhex_core.attention import attcat, attention_flow, attention_received, attention_rollout

LENGTHS = (5, 2, 1)
EXACT = {"rtol": 0, "atol": 1e-12}


def make(*, tokens=5, layers=3, heads=2, channels=4, lengths=LENGTHS, seed=0):
    """Weights as an encoder gives them: padding gets none of a real query's."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch = len(lengths)
    mask = torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]
    scores = [draw(batch, heads, tokens, tokens).masked_fill(~mask[:, None, None], -torch.inf) for _ in range(layers)]
    hidden, gradients = ([draw(batch, tokens, channels) for _ in range(layers)] for _ in range(2))
    return [layer.softmax(dim=3) for layer in scores], hidden, gradients, mask


def slow_rollout(attentions, length, residual):
    """One text by itself, layer by layer, with nothing but its real tokens; from the last layer down."""
    rolled = None
    for weights in reversed(attentions):
        mixed = np.zeros((length, length))
        for query in range(length):
            for key in range(length):
                mean = sum(head[query, key] for head in weights) / len(weights)
                mixed[query, key] = (1 - residual) * mean + residual * (query == key)
            mixed[query] /= sum(mixed[query])
        rolled = mixed if rolled is None else rolled @ mixed
    return rolled


def slow_attcat(hidden, gradients, attentions, length):
    scores = [0.0] * length
    for state, slope, weights in zip(hidden, gradients, attentions, strict=True):
        for token in range(length):
            received = [head[query, token] for head in weights for query in range(length)]
            products = [float(h * g) for h, g in zip(state[token], slope[token], strict=True)]
            scores[token] += sum(received) / len(received) * sum(products)
    return np.array(scores)


def test_attention_received_equals_the_slow_loop_and_adds_up():
    attentions, _, _, mask = make()
    received = attention_received(attentions, mask=mask)
    for row, length in enumerate(LENGTHS):
        expected = np.zeros(length)
        for layer in attentions:
            for head in layer[row].numpy():
                expected += head[:length, :length].sum(axis=0) / (length * len(layer[row]))
        assert_close(received[row, :length], torch.from_numpy(expected), **EXACT)
    assert_close(received.sum(dim=1), torch.full((3,), 3.0, dtype=torch.float64), **EXACT)
    assert (received[~mask] == 0).all()
    with pytest.raises(ValueError, match=r"attentions\[1\] must have shape"):
        attention_received([attentions[0], attentions[1][:, :, :2]])


@pytest.mark.parametrize("residual", [0.0, 0.5, 0.8, 1.0])
def test_rollout_equals_the_slow_loop(residual):
    attentions, _, _, mask = make()
    rolled = attention_rollout(attentions, mask=mask, residual=residual)
    assert rolled.dtype == torch.float64
    for row, length in enumerate(LENGTHS):
        expected = slow_rollout([layer[row].numpy() for layer in attentions], length, residual)
        assert_close(rolled[row, :length, :length], torch.from_numpy(expected), **EXACT)
    assert (rolled.masked_select(~(mask[:, :, None] & mask[:, None])) == 0).all()


def test_rows_of_a_rollout_sum_to_one():
    attentions, _, _, mask = make()
    assert_close(attention_rollout(attentions, mask=mask).sum(dim=2), mask.double(), **EXACT)
    assert_close(attention_rollout(attentions).sum(dim=2), torch.ones(3, 5).double(), **EXACT)


def test_layers_are_rolled_in_their_order():
    attentions, _, _, _ = make(layers=2, lengths=(5,))
    forwards, backwards = attention_rollout(attentions), attention_rollout(attentions[::-1])
    first, second = (0.5 * layer.mean(dim=1) + 0.5 * torch.eye(5).double() for layer in attentions)
    assert_close(forwards, second @ first, **EXACT)
    assert not torch.allclose(forwards, backwards)


def test_attcat_equals_the_slow_loop():
    attentions, hidden, gradients, mask = make()
    scores = attcat(hidden, gradients, attentions, mask=mask)
    for row, length in enumerate(LENGTHS):
        one = [[layer[row].numpy() for layer in part] for part in (hidden, gradients, attentions)]
        assert_close(scores[row, :length], torch.from_numpy(slow_attcat(*one, length)), **EXACT)
    assert (scores[~mask] == 0).all()
    assert (scores < 0).any()


def test_padding_is_not_felt():
    attentions, hidden, gradients, mask = make(lengths=(3, 3))
    # Whatever padded queries look at, and whatever a careless encoder lets real ones look at in padding.
    spoiled = [layer.clone() for layer in attentions]
    for layer in spoiled:
        layer[:, :, 3:] = torch.rand(2, 2, 2, 5).double()
        layer[:, :, :, 3:] = 0.3
    cut = [[layer[:, :3] for layer in part] for part in (hidden, gradients)]
    short = [layer[:, :, :3, :3] for layer in attentions]
    for given in (mask, mask.long(), mask.float()):
        assert_close(attention_rollout(spoiled, mask=given)[:, :3, :3], attention_rollout(short), **EXACT)
        assert_close(attcat(hidden, gradients, spoiled, mask=given)[:, :3], attcat(*cut, short), **EXACT)


def test_a_text_of_padding_alone_has_nothing():
    attentions, hidden, gradients, mask = make()
    mask[1] = False
    assert (attention_rollout(attentions, mask=mask)[1] == 0).all()
    assert (attcat(hidden, gradients, attentions, mask=mask)[1] == 0).all()


def test_heads_and_channels_may_differ_from_layer_to_layer():
    attentions, hidden, gradients, _ = make()
    attentions[1] = attentions[1][:, :1]
    hidden[2], gradients[2] = hidden[2][..., :2], gradients[2][..., :2]
    assert attention_rollout(attentions).shape == (3, 5, 5)
    assert attcat(hidden, gradients, attentions).shape == (3, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attentions": []}, ValueError, "attentions must hold at least one layer"),
        ({"attentions": torch.ones(1, 1, 2, 2)}, TypeError, "attentions must be a sequence of tensors"),
        ({"attentions": [torch.ones(2, 2, 2)]}, ValueError, r"attentions\[0\] must have 4 dimensions"),
        ({"attentions": [torch.ones(1, 1, 2, 2).long()]}, TypeError, r"attentions\[0\] must be of a floating-point"),
        ({"attentions": [torch.ones(1, 1, 2, 3)]}, ValueError, r"attentions\[0\] must have shape \(1, H, 2, 2\)"),
        (
            {"attentions": [torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 3)]},
            ValueError,
            r"attentions\[1\] must have shape \(1, H, 2, 2\), got \(1, 1, 3, 3\)",
        ),
        ({"mask": torch.ones(1, 3)}, ValueError, r"mask must have shape \(1, 2\), got \(1, 3\)"),
        ({"residual": 1.5}, ValueError, r"residual must be in \[0, 1\], got 1.5"),
        ({"residual": True}, TypeError, "residual must be a number, got bool"),
    ],
)
def test_rollout_refuses_what_does_not_fit(change, error, message):
    with pytest.raises(error, match=message):
        attention_rollout(**({"attentions": [torch.ones(1, 1, 2, 2)]} | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": [torch.ones(1, 2, 3)] * 2}, ValueError, r"hidden must hold one tensor per layer .* \(1\), got 2"),
        ({"gradients": [torch.ones(1, 2, 3)] * 2}, ValueError, "gradients must hold one tensor per layer"),
        ({"hidden": [torch.ones(1, 3, 3)]}, ValueError, r"hidden\[0\] must have shape \(1, 2, 3\), got \(1, 3, 3\)"),
        ({"gradients": [torch.ones(1, 2, 4)]}, ValueError, r"gradients\[0\] must have shape \(1, 2, 3\)"),
        ({"mask": [1, 1]}, TypeError, "mask must be a torch.Tensor, got list"),
    ],
)
def test_attcat_refuses_what_does_not_fit(change, error, message):
    given = {"hidden": [torch.ones(1, 2, 3)], "gradients": [torch.ones(1, 2, 3)]}
    with pytest.raises(error, match=message):
        attcat(**(given | {"attentions": [torch.ones(1, 1, 2, 2)]} | change))


@pytest.mark.parametrize("spoil", ["scores", "negative", "twice", "nan"])
@pytest.mark.parametrize("method", [attention_rollout, attention_received, attention_flow], ids=lambda f: f.__name__)
def test_what_is_no_attention_is_refused_unless_it_lies_in_padding(method, spoil):
    attentions, _, _, mask = make()
    clean = method(attentions, mask=mask)

    def spoilt(place):
        changed = attentions[1].clone()
        if spoil == "scores":
            changed[place] = 7 * torch.randn(changed[place].shape, generator=torch.Generator().manual_seed(0)).double()
        elif spoil == "twice":
            changed[place] = 1.0
        else:
            changed[place] = {"negative": -0.1, "nan": torch.nan}[spoil]
        return [attentions[0], changed, attentions[2]]

    with pytest.raises(ValueError, match=r"attentions\[1\] must be weights after the softmax"):
        method(spoilt((0, 0)), mask=mask)
    assert_close(method(spoilt((1, slice(None), slice(2, None))), mask=mask), clean, **EXACT)  # rows of padding


def test_rows_of_sum_less_than_one_are_attention_too():
    """As where a part of it goes to a place that is no token."""
    attentions, _, _, mask = make()
    assert_close(
        attention_received([0.5 * layer for layer in attentions], mask=mask).sum(dim=1), torch.full((3,), 1.5).double()
    )

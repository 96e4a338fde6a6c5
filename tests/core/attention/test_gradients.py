"""Methods that read attention with its gradients, against slow loops in numpy, one text at a time."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import mhex_core.attention
from mhex_core.attention import (
    aggregated_attention,
    attention_gradcam,
    attention_rollout,
    generic_relevance,
    gmar,
    grad_sam,
    head_importance,
)

LENGTHS = (5, 2, 1)
EXACT = {"rtol": 0, "atol": 1e-12}


def cut(layers, row, length):
    """One text's numbers without its padding, (H, t, t) each."""
    return [layer[row, :, :length, :length].numpy() for layer in layers]


def slow_importance(slope, norm):
    sizes = []
    for head in slope:
        entries = [abs(entry) for entry in head.ravel()]
        sizes.append(sum(entries) if norm == "l1" else sum(entry**2 for entry in entries) ** 0.5)
    return [size / sum(sizes) if sum(sizes) else 1 / len(sizes) for size in sizes]


def slow_gmar(weights, slopes, norm, alpha):
    """B^L (.. (B^1 I)) with the identity added alpha times, as the method is written down."""
    rolled = np.eye(weights[0].shape[1])
    for layer, slope in zip(weights, slopes, strict=True):
        mixed = sum(share * head for share, head in zip(slow_importance(slope, norm), layer, strict=True))
        mixed = mixed + alpha * np.eye(len(mixed))
        rolled = (mixed / mixed.sum(axis=1, keepdims=True)) @ rolled
    return rolled


def slow_relevance(weights, slopes):
    tokens = weights[0].shape[1]
    relevance = np.eye(tokens)
    for layer, slope in zip(weights, slopes, strict=True):
        step = np.zeros((tokens, tokens))
        for query in range(tokens):
            for key in range(tokens):
                through = [max(a[query, key] * g[query, key], 0) for a, g in zip(layer, slope, strict=True)]
                step[query] += sum(through) / len(through) * relevance[key]
        relevance = relevance + step
    return relevance


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("alpha", [0.25, 1.0, 3.0])
def test_gmar_equals_the_slow_loop_in_the_form_with_alpha(make_attentions, norm, alpha):
    weights, gradients, mask = make_attentions(heads=3)
    rolled = gmar(weights, gradients, norm=norm, residual=alpha / (1 + alpha), mask=mask)
    assert_close(rolled.sum(dim=2), mask.double(), **EXACT)
    for row, length in enumerate(LENGTHS):
        expected = slow_gmar(cut(weights, row, length), cut(gradients, row, length), norm, alpha)
        assert_close(rolled[row, :length, :length], torch.from_numpy(expected), **EXACT)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gmar_of_heads_that_weigh_alike_is_rollout(make_attentions, norm):
    weights, gradients, mask = make_attentions()
    alike = [slope[:, :1].expand_as(slope) for slope in gradients]
    none = [torch.zeros_like(slope) for slope in gradients]
    for given in (alike, none):
        assert_close(gmar(weights, given, norm=norm, mask=mask), attention_rollout(weights, mask=mask), **EXACT)


def test_gmar_sees_neither_the_sign_nor_the_size_of_gradients(make_attentions):
    weights, gradients, mask = make_attentions()
    other = [slope * factor for slope, factor in zip(gradients, (-3.0, 1e-200, 2.0), strict=True)]
    for norm in ("l1", "l2"):
        assert_close(
            gmar(weights, other, norm=norm, mask=mask), gmar(weights, gradients, norm=norm, mask=mask), **EXACT
        )


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_head_importance_equals_the_slow_loop_where_heads_differ_in_number(make_attentions, norm):
    _, gradients, mask = make_attentions(heads=3)
    gradients[1] = gradients[1][:, :2]
    gradients[2][1] = 0
    weights = head_importance(gradients, norm=norm, mask=mask)
    assert [tuple(layer.shape) for layer in weights] == [(3, 3), (3, 2), (3, 3)]
    for index, layer in enumerate(weights):
        for row, length in enumerate(LENGTHS):
            expected = slow_importance(gradients[index][row, :, :length, :length].numpy(), norm)
            assert_close(layer[row], torch.tensor(expected, dtype=torch.float64), **EXACT)
    assert_close(weights[2][1], torch.full((3,), 1 / 3, dtype=torch.float64), **EXACT)


def test_rollout_with_head_weights_and_from_a_later_layer(make_attentions):
    weights, _, mask = make_attentions(heads=2)
    shares = [
        torch.tensor([[0.2, 0.8]] * 3, dtype=torch.float64),
        torch.tensor([[1.0, 0.0]] * 3),
        torch.tensor([[0.5, 0.5]] * 3),
    ]
    rolled = attention_rollout(weights, mask=mask, head_weights=shares, start=1)
    fused = [weights[1][:, :1], weights[2]]
    assert_close(rolled, attention_rollout(fused, mask=mask), **EXACT)
    first = attention_rollout([(0.2 * weights[0][:, 0] + 0.8 * weights[0][:, 1])[:, None]], mask=mask)
    assert_close(attention_rollout(weights, mask=mask, head_weights=shares), rolled @ first, **EXACT)


def test_generic_relevance_equals_the_slow_loop(make_attentions):
    weights, gradients, mask = make_attentions()
    relevance = generic_relevance(weights, gradients, mask=mask)
    for row, length in enumerate(LENGTHS):
        expected = slow_relevance(cut(weights, row, length), cut(gradients, row, length))
        assert_close(relevance[row, :length, :length], torch.from_numpy(expected), **EXACT)
    assert (relevance.masked_select(~(mask[:, :, None] & mask[:, None])) == 0).all()
    none = [torch.zeros_like(slope) for slope in gradients]
    assert_close(generic_relevance(weights, none), torch.eye(5).double().expand(3, 5, 5), **EXACT)


def test_grad_sam_equals_the_slow_loop(make_attentions):
    weights, gradients, mask = make_attentions()
    scores = grad_sam(weights, gradients, mask=mask)
    for row, length in enumerate(LENGTHS):
        expected = np.zeros(length)
        for layer, slope in zip(cut(weights, row, length), cut(gradients, row, length), strict=True):
            for a, g in zip(layer, slope, strict=True):
                expected += (a * np.maximum(g, 0)).sum(axis=1)
        expected /= len(weights) * 2 * length
        assert_close(scores[row, :length], torch.from_numpy(expected), **EXACT)
    assert (scores[~mask] == 0).all()


def test_attention_gradcam_equals_the_slow_loop(make_attentions):
    weights, gradients, _ = make_attentions(heads=4)
    attention, gradient = weights[-1][:, :, 0], gradients[-1][:, :, 0]
    patches = torch.tensor([[False, True, True, True, True], [False, True, False, False, False], [False] * 5])
    shown = attention_gradcam(attention, gradient, mask=patches)
    for row in range(3):
        kept = patches[row].nonzero().flatten().tolist()
        for token in range(5):
            expected = 0.0
            for a, g in zip(attention[row].tolist(), gradient[row].tolist(), strict=True):
                if token in kept:
                    expected += sum(g[other] for other in kept) / len(kept) * a[token] / 4
            assert shown[row, token].item() == pytest.approx(max(expected, 0.0), abs=1e-12)
    assert (shown > 0).any()
    assert_close(
        attention_gradcam(attention, gradient),
        attention_gradcam(attention, gradient, mask=torch.ones(3, 5)),
        **EXACT,
    )


def test_aggregated_attention_equals_the_slow_loop(make_attentions):
    weights, gradients, _ = make_attentions()
    plain, weighed = np.zeros((3, 5, 5)), np.zeros((3, 5, 5))
    for layer, slope in zip(weights, gradients, strict=True):
        for head in range(2):
            plain += layer[:, head].numpy() / 6
            weighed += (layer[:, head] * slope[:, head].clamp(min=0)).numpy() / 6
    assert_close(aggregated_attention(weights), torch.from_numpy(plain), **EXACT)
    assert_close(aggregated_attention(weights, gradients), torch.from_numpy(weighed), **EXACT)


def test_attention_summed_over_its_keys_tells_no_tokens_apart(make_attentions):
    weights, _, mask = make_attentions()
    summed = aggregated_attention(weights).sum(dim=2)
    assert_close(summed, torch.ones(3, 5).double(), **EXACT)
    assert torch.unique(aggregated_attention(weights).sum(dim=1)[mask]).numel() == mask.sum()


def test_padding_is_not_felt(make_attentions, spoil):
    weights, gradients, mask = make_attentions(lengths=(3, 2), tokens=5)
    dirty = spoil(weights, mask), spoil(gradients, mask)
    for method in (gmar, generic_relevance, grad_sam):
        assert_close(method(*dirty, mask=mask), method(weights, gradients, mask=mask), **EXACT)
        for given in (mask.long(), mask.float()):
            assert_close(method(*dirty, mask=given), method(*dirty, mask=mask), **EXACT)
        short = [[layer[:1, :, :3, :3] for layer in part] for part in (weights, gradients)]
        found = method(*dirty, mask=mask)[0]
        assert_close(found[tuple(slice(3) for _ in found.shape)], method(*short)[0], **EXACT)
        assert (method(weights, gradients, mask=torch.zeros(2, 5)) == 0).all()
    for clean, spoiled in zip(head_importance(gradients, mask=mask), head_importance(dirty[1], mask=mask), strict=True):
        assert_close(clean, spoiled, **EXACT)


@pytest.mark.parametrize("name", mhex_core.attention.__all__)
def test_every_public_name_is_documented(name):
    assert not getattr(mhex_core.attention, name).__doc__.startswith(f"{name}(")
    assert list(mhex_core.attention.__all__) == sorted(set(mhex_core.attention.__all__))


ONE = [torch.full((1, 2, 3, 3), 1 / 3)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gmar(ONE, ONE * 2), ValueError, r"gradients must hold one tensor per layer .* \(1\), got 2"),
        (lambda: gmar(ONE, [ONE[0][:, :1]]), ValueError, r"gradients\[0\] must have shape \(1, 2, 3, 3\)"),
        (lambda: gmar(ONE, ONE, norm="l3"), ValueError, "norm must be one of 'l1', 'l2', got 'l3'"),
        (lambda: gmar(ONE, ONE, residual=2), ValueError, r"residual must be in \[0, 1\]"),
        (lambda: head_importance(ONE[0]), TypeError, "gradients must be a sequence of tensors"),
        (
            lambda: head_importance([torch.ones(1, 2, 3, 4)]),
            ValueError,
            r"gradients\[0\] must have shape \(1, H, 3, 3\)",
        ),
        (lambda: grad_sam(ONE, ONE, mask=torch.ones(2, 3)), ValueError, r"mask must have shape \(1, 3\)"),
        (lambda: generic_relevance([], ONE), ValueError, "attentions must hold at least one layer"),
        (lambda: aggregated_attention(ONE, ONE * 2), ValueError, "gradients must hold one tensor per layer"),
        (lambda: attention_gradcam(ONE[0], ONE[0]), ValueError, "attention must have 3 dimensions"),
        (
            lambda: attention_gradcam(torch.ones(1, 2, 3), torch.ones(1, 2, 4)),
            ValueError,
            r"gradient must have shape \(1, 2, 3\), got \(1, 2, 4\)",
        ),
        (
            lambda: attention_gradcam(torch.ones(1, 0, 3), torch.ones(1, 0, 3)),
            ValueError,
            "attention must have at least",
        ),
        (lambda: attention_rollout(ONE, start=1), ValueError, r"start must lie in \[0, 0\], got 1"),
        (lambda: attention_rollout(ONE, start=True), TypeError, "start must be an int, got bool"),
        (lambda: attention_rollout(ONE, head_weights=[]), ValueError, "head_weights must hold at least one layer"),
        (
            lambda: attention_rollout(ONE, head_weights=[torch.ones(1, 1)] * 2),
            ValueError,
            "head_weights must hold one tensor per layer",
        ),
        (
            lambda: attention_rollout(ONE, head_weights=[torch.ones(1, 3)]),
            ValueError,
            r"head_weights\[0\] must have shape \(1, 2\), got \(1, 3\)",
        ),
        (
            lambda: attention_rollout(ONE, head_weights=[torch.tensor([[1.5, -0.5]])]),
            ValueError,
            r"head_weights\[0\] must not be negative, got -0.5",
        ),
        (
            lambda: attention_rollout(ONE, head_weights=[torch.tensor([[0.5, 0.6]])]),
            ValueError,
            r"head_weights\[0\] must have rows of sum 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()

"""Kernels against a third implementation: numpy, float64, every step a matrix product, written from the equations."""

import numpy as np
import pytest
import torch

from mhex_core import SaliencyOptions, combine_maps, saliency_maps, signed_maps, token_saliency

LAYERS = ((3, 9, 7), (17, 5, 5), (64, 4, 4), (1, 1, 6), (130, 1, 1))  # C, h, w
RULES = [
    {"tau_pos": 0.0, "tau_neg": 0.0},
    {"tau_pos": 0.2141, "tau_neg": 0.3137},
    {"sharpness": "soft", "exponent": 0.5},
    {"sharpness": "soft", "exponent": 2.0},
]
MAP_RULES = [
    *({**rule, "rectify": False} for rule in RULES),
    {"tau_pos": 0.0, "tau_neg": 0.0, "rectify": True},
    {"sharpness": "soft", "exponent": 2.0, "rectify": True},
]


def hat(cells, size):
    """(size, cells): row i holds the hat function around the centre of output i, kept inside the layer."""
    centres = np.clip((np.arange(size) + 0.5) * cells / size - 0.5, 0, cells - 1)
    return np.clip(1 - np.abs(centres[:, None] - np.arange(cells)), 0, None)


def parts(matrix, *, tau_pos=0.0, tau_neg=0.1, sharpness="hard", exponent=1.0):
    up, down = np.maximum(matrix, 0), np.maximum(-matrix, 0)
    sharp = [side / (side.sum(axis=0, keepdims=True) + 1e-8) for side in (up, down)]
    if sharpness == "soft":
        return up * sharp[0] ** exponent, -down * sharp[1] ** exponent
    return up * (sharp[0] >= tau_pos), -down * (sharp[1] >= tau_neg)


def sums(activations, matrices, targets, *, rectify=False, **rule):
    """Per layer (P A, N A), each (B, n, positions); rectified, with max(A, 0)."""
    for activation, matrix in zip(activations, matrices, strict=True):
        flat = activation.double().flatten(2).numpy()
        flat = np.maximum(flat, 0) if rectify else flat
        yield tuple(part[targets] @ flat for part in parts(matrix.double().numpy(), **rule))


def cams(activations, matrices, targets, size, beta, lambdas, **rule):
    total = 0
    for (plus, minus), layer, factor in zip(
        sums(activations, matrices, targets, **rule), activations, lambdas, strict=True
    ):
        height, width = layer.shape[2:]
        small = (plus + beta * minus).reshape(*plus.shape[:2], height, width)
        total = total + factor * (hat(height, size[0]) @ small @ hat(width, size[1]).T)
    return total


def stretched(maps):
    low, high = maps.min(axis=(2, 3), keepdims=True), maps.max(axis=(2, 3), keepdims=True)
    return (maps - low) / (high - low)


def close(ours, expected, relative):
    error = np.abs(ours.double().numpy() - expected).max()
    assert error <= relative * np.abs(expected).max()


@pytest.mark.parametrize("size", [(1, 9), (3, 2), (33, 70), (48, 15)], ids=str)
@pytest.mark.parametrize("rule", MAP_RULES, ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_maps_are_products_of_matrices(make, channels_last, dtype, relative, beta, rule, size):
    activations, matrices = make(LAYERS, batch=2, classes=6, dtype=dtype, channels_last=channels_last)
    matrices = [matrix.to(dtype) for matrix in matrices]
    targets, lambdas = torch.tensor([[5, 0, 0], [1, 4, 2]]), [0.5, -1.0, 0.0, 2.0, 1.0]
    settings = {"size": size, "beta": beta, "layer_weights": lambdas, "backend": "native", **rule}
    expected = cams(activations, matrices, targets.numpy(), size, beta, lambdas, **rule)
    close(saliency_maps(activations, matrices, targets, normalize=False, **settings), expected, relative)
    close(saliency_maps(activations, matrices, targets, **settings), stretched(expected), 2 * relative)


@pytest.mark.parametrize("rule", MAP_RULES, ids=str)
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float16, 1e-5)])
def test_both_halves_are_products_of_matrices(make, dtype, relative, rule):
    activations, matrices = make(LAYERS, batch=2, classes=6, dtype=dtype)
    matrices = [matrix.to(dtype) for matrix in matrices]
    targets = torch.tensor([[5, 0], [1, 4]])
    options = SaliencyOptions(beta=0.7, layer_weights=[1.0, 2.0, 3.0, -4.0, 5.0], normalize=False, **rule)
    maps = signed_maps(activations, matrices, targets, options=options, backend="native")
    for index, pair in enumerate(sums(activations, matrices, targets.numpy(), **rule)):
        for part, expected in zip(maps, pair, strict=True):
            close(part[index].flatten(2), expected, relative)
    whole = combine_maps(maps, size=(11, 30), options=options, backend="native")
    expected = cams(activations, matrices, targets.numpy(), (11, 30), 0.7, options.layer_weights, **rule)
    close(whole, expected, relative)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_token_scores_are_products_of_matrices(make, tokens, beta, rule):
    activations, matrices = make(((24, tokens, 1), (7, tokens, 1)), batch=2, classes=6, dtype=torch.float16)
    matrices = [matrix.half() for matrix in matrices]
    mask = torch.rand(2, tokens, generator=torch.Generator().manual_seed(0)) > 0.3
    targets = torch.tensor([[5], [1]])
    layers = [layer.squeeze(-1).transpose(1, 2).contiguous() for layer in activations]
    ours = token_saliency(
        layers, matrices, targets, mask=mask, beta=beta, layer_weights=[2.0, -0.5], backend="native", **rule
    )
    pairs = list(sums(activations, matrices, targets.numpy(), **rule))
    expected = 2.0 * (pairs[0][0] + beta * pairs[0][1]) - 0.5 * (pairs[1][0] + beta * pairs[1][1])
    error = np.abs(ours.double().numpy() - expected * mask.numpy()[:, None]).max()
    assert error <= 1e-5 * np.abs(expected).max()

"""A second implementation of sections 1-4 of the method: plain numpy, float64, matrix-shaped.

Nothing here comes from mhex_core or torch. Everything is spelled out sample by sample: bilinear resizing is a product
with two explicit matrices, a layer's map is W A with A as a (C, positions) matrix.
"""

from __future__ import annotations

import math

import numpy as np

EPS = 1e-8


def f64(value):
    """Anything array-like (a tensor too) as float64."""
    if hasattr(value, "detach"):
        value = value.detach().double().cpu().numpy()
    return np.asarray(value, dtype=np.float64)


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def relu(x):
    return np.where(x > 0, x, 0.0)


# ---------------------------------------------------------------------------------------------------------- section 1


def block(w1, w2, shortcut, branch, mask=None, *, gate=True, activation="sum", tokens=False):
    """Return gated shortcut, h, logits and activation of one block, one sample after the other."""
    w1, w2, shortcut, branch = map(f64, (w1, w2, shortcut, branch))
    gated, hidden, logits, read = [], [], [], []
    for index, (x, r) in enumerate(zip(shortcut, branch, strict=True)):
        # One column per position: (C, positions).
        columns_x = x.T if tokens else x.reshape(x.shape[0], -1)
        columns_r = r.T if tokens else r.reshape(r.shape[0], -1)
        real = np.ones(columns_x.shape[1], dtype=bool)
        if mask is not None:
            real = f64(mask[index]).reshape(-1) != 0
        if real.any():
            pooled = relu(columns_x[:, real].mean(axis=1) + columns_r[:, real].mean(axis=1))
        else:
            pooled = np.zeros(columns_x.shape[0])
        h = w1 @ pooled
        diagonal = np.diag(sigmoid(h)) if gate else np.eye(len(h))
        weighted = (x @ diagonal) if tokens else (diagonal @ columns_x).reshape(x.shape)
        gated.append(weighted)
        hidden.append(h)
        logits.append(w2 @ h)
        read.append(r + weighted if activation == "sum" else weighted)
    return tuple(np.stack(part) for part in (gated, hidden, logits, read))


# ---------------------------------------------------------------------------------------------------------- section 2


def sharpness(matrix):
    """(SS+, SS-), entry by entry."""
    matrix = f64(matrix)
    classes, channels = matrix.shape
    plus, minus = np.zeros_like(matrix), np.zeros_like(matrix)
    for k in range(channels):
        up = sum(max(matrix[c, k], 0.0) for c in range(classes)) + EPS
        down = sum(max(-matrix[c, k], 0.0) for c in range(classes)) + EPS
        for c in range(classes):
            plus[c, k] = max(matrix[c, k], 0.0) / up
            minus[c, k] = max(-matrix[c, k], 0.0) / down
    return plus, minus


def parts(matrix, *, tau_pos=None, tau_neg=0.1, sharpness_rule="hard", exponent=1.0):
    """(P, N)."""
    matrix = f64(matrix)
    classes = matrix.shape[0]
    if tau_pos is None:
        tau_pos = 1 / classes + 0.1 if classes > 1 else 0.0
    up, down = np.maximum(matrix, 0), np.minimum(matrix, 0)
    sharp_up, sharp_down = sharpness(matrix)
    if sharpness_rule == "soft":
        return up * np.power(sharp_up, exponent), down * np.power(sharp_down, exponent)
    return np.where(sharp_up >= tau_pos, up, 0.0), np.where(sharp_down >= tau_neg, down, 0.0)


def weights(matrix, *, beta=0.0, **rule):
    up, down = parts(matrix, **rule)
    return up + beta * down


# ---------------------------------------------------------------------------------------------------------- section 3


def resize_matrix(source, target):
    """(target, source): bilinear, align_corners=False, as a matrix.

    Output pixel i has its centre at (i + 1/2) source / target - 1/2 in source pixels, moved to the nearest pixel centre
    where it lies outside; each source pixel counts by a hat function of its distance.
    """
    resize = np.zeros((target, source))
    for i in range(target):
        centre = min(max((i + 0.5) * source / target - 0.5, 0.0), source - 1.0)
        for j in range(source):
            resize[i, j] = max(0.0, 1.0 - abs(centre - j))
    return resize


def layer_map(activation, rows):
    """W A of one sample: activation (C, h, w), rows (n, C) -> (n, h, w)."""
    channels, height, width = activation.shape
    return (rows @ activation.reshape(channels, height * width)).reshape(-1, height, width)


def classes_of(target, index, classes):
    """The classes wanted for one sample, as a list."""
    if isinstance(target, str):
        return list(range(classes))
    if isinstance(target, int):
        return [target]
    return np.atleast_1d(np.asarray(target)[index]).tolist()


def cams(activations, matrices, target, size, *, beta=0.0, layer_weights=None, decay=0.9, rectify=True, **rule):
    """Maps before the min-max, always (B, n, H, W)."""
    activations = [relu(f64(a)) if rectify else f64(a) for a in activations]
    rows = [weights(m, beta=beta, **rule) for m in matrices]
    count = len(activations)
    lambdas = [decay ** (count - 1 - i) for i in range(count)] if layer_weights is None else list(layer_weights)
    height, width = size
    out = []
    for index in range(activations[0].shape[0]):
        wanted = classes_of(target, index, rows[0].shape[0])
        total = np.zeros((len(wanted), height, width))
        for activation, weight, factor in zip(activations, rows, lambdas, strict=True):
            vertical = resize_matrix(activation.shape[2], height)
            horizontal = resize_matrix(activation.shape[3], width)
            for n, small in enumerate(layer_map(activation[index], weight[wanted])):
                total[n] += factor * (vertical @ small @ horizontal.T)
        out.append(total)
    return np.stack(out)


def min_max(maps):
    """Each trailing (H, W) map by its own extremes."""
    out = np.zeros_like(maps)
    for index in np.ndindex(maps.shape[:-2]):
        low, high = maps[index].min(), maps[index].max()
        if high > low:
            out[index] = (maps[index] - low) / (high - low)
    return out


def saliency(activations, matrices, target, size, *, normalize=True, **settings):
    """`cams` and the min-max, with the target axis where several targets are asked for."""
    maps = cams(activations, matrices, target, size, **settings)
    maps = min_max(maps) if normalize else maps
    several = isinstance(target, str) or (not isinstance(target, int) and np.asarray(target).ndim == 2)
    return maps if several else maps[:, 0]


def token_scores(
    activations, matrices, target, *, mask=None, layers=(0, 1, 2), beta=0.0, layer_weights=None, decay=1.0, **rule
):
    """Scores, always (B, n, T)."""
    chosen = [(f64(activations[i]), weights(matrices[i], beta=beta, **rule)) for i in layers]
    lambdas = [decay ** (len(chosen) - 1 - i) for i in range(len(chosen))] if layer_weights is None else layer_weights
    batch, tokens, _ = chosen[0][0].shape
    out = []
    for index in range(batch):
        wanted = classes_of(target, index, chosen[0][1].shape[0])
        scores = np.zeros((len(wanted), tokens))
        for t in range(tokens):
            if mask is None or bool(mask[index][t]):
                for (activation, weight), factor in zip(chosen, lambdas, strict=True):
                    scores[:, t] += factor * (weight[wanted] @ activation[index, t])
        out.append(scores)
    return np.stack(out)


# ---------------------------------------------------------------------------------------------------------- section 4


def log_softmax(row):
    shifted = row - row.max()
    return shifted - math.log(np.exp(shifted).sum())


def cross_entropy(logits, target, *, label_smoothing=0.0, weight=None, reduction="mean"):
    """As torch.nn.CrossEntropyLoss documents it; target (B,) classes or (B, K) probabilities."""
    logits = f64(logits)
    batch, classes = logits.shape
    weight = np.ones(classes) if weight is None else f64(weight)
    target = np.asarray(target)
    losses, denominator = [], 0.0
    for index in range(batch):
        truth = np.eye(classes)[target[index]] if target.ndim == 1 else f64(target[index])
        denominator += weight[target[index]] if target.ndim == 1 else 1.0
        truth = (1 - label_smoothing) * truth + label_smoothing / classes
        losses.append(-(weight * truth * log_softmax(logits[index])).sum())
    return reduce(np.array(losses), reduction, denominator)


def binary_cross_entropy(logits, target, *, label_smoothing=0.0, weight=None, pos_weight=None, reduction="mean"):
    """Of (B, K) labels; y becomes y (1 - s) + s / 2."""
    logits, target = f64(logits), f64(target)
    weight = 1.0 if weight is None else f64(weight)
    pos_weight = 1.0 if pos_weight is None else f64(pos_weight)
    target = target * (1 - label_smoothing) + label_smoothing / 2
    losses = pos_weight * target * np.logaddexp(0, -logits) + (1 - target) * np.logaddexp(0, logits)
    return reduce(weight * losses, reduction, losses.size)


def reduce(losses, reduction, denominator):
    if reduction == "none":
        return losses
    return losses.sum() / (denominator if reduction == "mean" else 1.0)


def joint_logits(heads, decay=0.8):
    """s_L by the recursion."""
    running = np.zeros_like(f64(heads[0]))
    for logits in heads:
        running = f64(logits) + decay * running
    return running


def layerwise(heads, target, *, head_weights=None, loss=cross_entropy, **settings):
    head_weights = [1.0] * len(heads) if head_weights is None else head_weights
    return sum(w * loss(logits, target, **settings) for w, logits in zip(head_weights, heads, strict=True))


def joint(heads, target, *, decay=0.8, loss=cross_entropy, **settings):
    return loss(joint_logits(heads, decay), target, **settings)

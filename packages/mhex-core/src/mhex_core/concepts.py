"""Do a network's tokens move along a concept when its target's score rises? Attention-weighted concept derivatives.

Letters: B batch, N samples, T tokens, C channels, V concept vectors (runs), W those of random concepts. Activations are
what a block gives out; at the last block only the token that the prediction is read from has a gradient.

Sources: Kim et al. 2018, "TCAV" (arXiv 1711.11279); Eggen, Lysnaes-Larsen and Strumke, "Integrating attention into
explanation frameworks" (arXiv 2508.08966), its attention-weighted, token-level form; Nadeau and Bengio 2003, "Inference
for the generalization error", Machine Learning 52, for the test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mhex_core import _checks
from mhex_core._extras import library
from mhex_core.attention._layers import real_tokens, seed_of

_EPS = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class ConceptVectors:
    """Directions of one concept, one for each run.

    Attributes:
        vectors: (runs, C), of unit length, pointing to the concept.
        accuracies: (runs,), how well each tells samples apart that it was not fitted to: the share of a sample's
            tokens on the right side, mean over samples and then over the two kinds. 1/2 is chance: such a vector
            means nothing.
    """

    vectors: Tensor
    accuracies: Tensor


def fit_concept_vectors(
    positive: Tensor,
    negative: Tensor,
    *,
    positive_mask: Tensor | None = None,
    negative_mask: Tensor | None = None,
    runs: int = 50,
    held_out: float = 0.33,
    regularisation: float = 1.0,
    seed: int = 0,
) -> ConceptVectors:
    """Logistic regressions that tell a concept's tokens from others; each run with samples and a split of its own.

    Every real token carries its sample's label. In each run the larger set is drawn down to the size of the smaller,
    and whole samples are held out: tokens of one sample resemble each other too much to judge one by another.

    Args:
        positive: (N, T, C), activations of N >= 2 samples of the concept.
        negative: (M, T', C), of M >= 2 others: random samples, or other concepts; scores then mean "more than those".
        positive_mask: (N, T), true (or 1) for real tokens; None means that all are.
        negative_mask: (M, T').
        runs: How many vectors.
        held_out: Share of the samples that are held out, in (0, 1); at least one of either kind, and never all.
        regularisation: scikit-learn's C: the smaller, the stronger the L2 penalty.
        seed: Of draws and splits.

    Returns:
        Vectors in the dtype (half precision: float32) and on the device of `positive`.

    Raises:
        ImportError: scikit-learn is missing.
        TypeError: An argument is of another type.
        ValueError: The shapes do not fit each other, a sample has no real token, a number does not lie where it must,
            or the two sets have the same mean.
    """
    positive, negative = _checks.tensor("positive", positive, ndim=3), _checks.tensor("negative", negative, ndim=3)
    if negative.shape[2] != positive.shape[2]:
        raise ValueError(f"negative must have {positive.shape[2]} channels, got shape {tuple(negative.shape)}")
    runs = _checks.positive_int("runs", runs)
    held_out = _share(held_out)
    regularisation = _checks.number("regularisation", regularisation, low=0)
    if regularisation == 0:
        raise ValueError("regularisation must be above 0, got 0")
    seed = seed_of(seed)
    kinds = [
        _samples("positive", positive, positive_mask),
        _samples("negative", negative, negative_mask),
    ]
    linear = library("sklearn.linear_model", needed_by="fit_concept_vectors", distribution="scikit-learn")
    vectors, accuracies = [], []
    for run in range(runs):
        vector, accuracy = _fit(kinds, np.random.default_rng([seed, run]), held_out, regularisation, linear)
        vectors.append(vector)
        accuracies.append(accuracy)
    dtype = torch.promote_types(positive.dtype, torch.float32)
    return ConceptVectors(
        vectors=torch.from_numpy(np.stack(vectors)).to(positive.device, dtype),
        accuracies=torch.tensor(accuracies, dtype=dtype, device=positive.device),
    )


def concept_derivatives(gradients: Tensor, attention: Tensor, vectors: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """s_t = a_t D_t |a| / |D|, D_t = df/dh_t . v: how each token's pull along a concept moves the score.

    The norms run over the real tokens. They bring heat maps of samples to one scale, and change no sign.

    Args:
        gradients: df/dh, (B, T, C), h what a block gives out, f the target's logit.
        attention: a, (B, T), the mean over heads of the read query's row, in the same block.
        vectors: v, (V, C).
        mask: (B, T), true (or 1) for real tokens; None means that all are.

    Returns:
        (B, V, T), signed; 0 for padding.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes do not fit each other.
    """
    gradients = _checks.tensor("gradients", gradients, ndim=3)
    attention = _checks.tensor("attention", attention, ndim=2)
    vectors = _checks.tensor("vectors", vectors, ndim=2)
    batch, tokens, channels = gradients.shape
    if attention.shape != (batch, tokens):
        raise ValueError(f"attention must have shape ({batch}, {tokens}), got {tuple(attention.shape)}")
    if vectors.shape[1] != channels:
        raise ValueError(f"vectors must have shape (V, {channels}), got {tuple(vectors.shape)}")
    real = real_tokens(mask, batch, tokens, gradients).unsqueeze(1)
    along = torch.where(real, vectors.to(gradients) @ gradients.transpose(1, 2), 0.0)
    weights = torch.where(real, attention.to(gradients).unsqueeze(1), 0.0)
    size: Tensor = weights.norm(dim=2, keepdim=True) / along.norm(dim=2, keepdim=True).clamp(min=_EPS)
    return weights * along * size


def tcav_scores(derivatives: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The share of samples whose mean derivative over tokens is positive, for each concept vector.

    Args:
        derivatives: s, (B, V, T), see `concept_derivatives`, of B >= 1 samples of one class.
        mask: (B, T), true (or 1) for real tokens; None means that all are.

    Returns:
        (V,) in [0, 1].

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes do not fit each other, or there are no samples.
    """
    derivatives = _checks.tensor("derivatives", derivatives, ndim=3)
    batch, _, tokens = derivatives.shape
    if not batch:
        raise ValueError("derivatives must hold at least one sample, got none")
    real = real_tokens(mask, batch, tokens, derivatives).unsqueeze(1)
    # The mean over a sample's tokens has the sign of their sum.
    return (torch.where(real, derivatives, 0.0).sum(dim=2) > 0).to(derivatives.dtype).mean(dim=0)


def concept_significance(scores: Tensor, control: Tensor, *, held_out: float = 0.33) -> float:
    """How likely scores this far from those of random concepts are by chance: a corrected t-test, two-sided.

    Runs draw on the same samples, so that their scores resemble each other, and the usual variance of a mean over V
    runs, s^2 / V, is far too small: it would vanish with more runs, which tell nothing new. Nadeau and Bengio's
    estimate for repeated splits is s^2 (1/V + held_out / (1 - held_out)), each side's here, with Welch's degrees of
    freedom. It suits random concepts drawn anew for each run, too, where it errs on the careful side.

    Args:
        scores: (V,), V >= 2, of the concept (`tcav_scores`).
        control: (W,), W >= 2, of random concepts: vectors that tell random samples from other random samples.
        held_out: The share of samples that a run holds out, in (0, 1), as for `fit_concept_vectors`.

    Returns:
        p, in [0, 1]. Where neither side varies at all, 1 if the means are equal and 0 if not.

    Raises:
        ImportError: scipy is missing.
        TypeError: An argument is of another type.
        ValueError: There are fewer than two scores, or a value is not finite.
    """
    held_out = _share(held_out)
    means, variances, counts = [], [], []
    for name, given in (("scores", scores), ("control", control)):
        values = _checks.tensor(name, given, ndim=1).detach().double().cpu().numpy()
        if len(values) < 2:
            raise ValueError(f"{name} must hold at least two scores, got {len(values)}")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite, got {values[~np.isfinite(values)][0]} among them")
        # Equal numbers have a mean beside them, by rounding, and a variance for it.
        same = bool((values == values[0]).all())
        means.append(float(values[0]) if same else float(values.mean()))
        variances.append(0.0 if same else float(values.var(ddof=1)))
        counts.append(len(values))
    overlap = held_out / (1 - held_out)
    parts = [variance * (1 / count + overlap) for variance, count in zip(variances, counts, strict=True)]
    difference = means[0] - means[1]
    if sum(parts) == 0:
        return float(difference == 0)
    # In shares of the whole, whose squares do not vanish.
    shares = [part / sum(parts) for part in parts]
    degrees = 1 / sum(share**2 / (count - 1) for share, count in zip(shares, counts, strict=True))
    special = library("scipy.special", needed_by="concept_significance", distribution="scipy")
    return min(2 * float(special.stdtr(degrees, -abs(difference) / math.sqrt(sum(parts)))), 1.0)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """P values adjusted for testing them all (Holm 1979): what is below alpha then is so for the whole family.

    With p_(1) <= .. <= p_(m), the adjusted p_(i) is max_{j <= i} min(1, (m - j + 1) p_(j)).

    Raises:
        TypeError: A value is no number.
        ValueError: A value does not lie in [0, 1].
    """
    given = [_checks.number(f"p_values[{index}]", value, low=0, high=1) for index, value in enumerate(p_values)]
    adjusted = [0.0] * len(given)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(given)), key=given.__getitem__)):
        largest = max(largest, min(1.0, (len(given) - rank) * given[index]))
        adjusted[index] = largest
    return tuple(adjusted)


def _samples(name: str, activations: Tensor, mask: Tensor | None) -> list[Any]:
    """The real tokens of each sample, float64 (t, C)."""
    count, tokens, _ = activations.shape
    if count < 2:
        raise ValueError(f"{name} must hold at least two samples, got {count}")
    real = real_tokens(mask, count, tokens, activations, name=f"{name}_mask")
    if not bool(real.any(dim=1).all()):
        raise ValueError(f"{name}_mask must leave every sample a token, got none for sample {_first(~real.any(dim=1))}")
    if not bool(activations[real].isfinite().all()):
        raise ValueError(f"{name} must be finite, got other values in real tokens")
    activations, real = activations.detach().cpu(), real.cpu()
    return [sample[kept].double().numpy() for sample, kept in zip(activations, real, strict=True)]


def _first(flags: Tensor) -> int:
    return int(flags.nonzero()[0, 0])


def _fit(
    kinds: list[list[Any]], generator: np.random.Generator, held_out: float, regularisation: float, linear: Any
) -> tuple[Any, float]:
    """One run: its vector (C,) and its accuracy on samples that were held out."""
    size = min(len(samples) for samples in kinds)
    aside = min(max(round(held_out * size), 1), size - 1)
    orders = [generator.permutation(len(samples))[:size] for samples in kinds]
    fitted = [np.concatenate([samples[i] for i in order[aside:]]) for samples, order in zip(kinds, orders, strict=True)]
    tokens = np.concatenate(fitted)
    labels = np.repeat([1, 0], [len(part) for part in fitted])
    # The intercept carries no penalty: taking off the mean changes nothing but how well the equations can be solved.
    centre = tokens.mean(axis=0)
    # Newton's method takes some ten steps whatever the channels' scales; lbfgs may not end within its 1000 steps.
    tokens = tokens - centre
    # Coefficients are 0 where the means are the same, and only there.
    apart = np.abs(tokens[labels == 1].mean(axis=0) - tokens[labels == 0].mean(axis=0)).max()
    if apart <= _EPS * np.abs(tokens).max():
        raise ValueError("positive and negative must differ in some channel's mean, got none that does")
    model = linear.LogisticRegression(C=regularisation, max_iter=1000, solver="newton-cholesky", tol=1e-6)
    model.fit(tokens, labels)
    right = []
    for label, samples, order in zip((1, 0), kinds, orders, strict=True):
        shares = [float((model.predict(samples[i] - centre) == label).mean()) for i in order[:aside]]
        right.append(sum(shares) / len(shares))
    return model.coef_[0] / np.linalg.norm(model.coef_[0]), sum(right) / 2


def _share(held_out: object) -> float:
    """A share in (0, 1)."""
    share = _checks.number("held_out", held_out, low=0, high=1)
    if share in (0, 1):
        raise ValueError(f"held_out must lie between 0 and 1, got {held_out!r}")
    return share

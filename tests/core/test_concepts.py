"""Concept vectors, derivatives along them, and whether they say more than random ones."""

import math
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mhex_core.concepts import concept_derivatives, concept_significance, fit_concept_vectors, holm, tcav_scores

EXACT = {"rtol": 0, "atol": 1e-12}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def concept(count=20, tokens=4, channels=6, shift=4.0, seed=0):
    """Samples whose tokens lie towards the first channel, and others; scales differ widely, as those of networks do."""
    scale = torch.logspace(-1, 2, channels, dtype=torch.float64)
    positive, negative = (draw(count, tokens, channels, seed=seed + part) for part in range(2))
    positive[..., 0] += shift
    return positive * scale + 5, negative * scale + 5


@pytest.fixture
def learned():
    return pytest.importorskip("sklearn")


def test_a_separable_concept_is_found_and_its_vectors_point_to_it(learned):
    positive, negative = concept()
    fitted = fit_concept_vectors(positive, negative, runs=8)
    assert fitted.vectors.shape == (8, 6)
    assert fitted.vectors.dtype == torch.float64
    assert_close(fitted.vectors.norm(dim=1), torch.ones(8).double(), **EXACT)
    assert (fitted.vectors[:, 0] > 0.9).all()
    assert (fitted.accuracies > 0.9).all()
    assert len({tuple(vector.tolist()) for vector in fitted.vectors}) == 8


def test_a_random_concept_is_told_apart_by_chance_only(learned):
    # Many tokens of few samples that resemble each other: a split by tokens would learn the samples by heart.
    own = 3 * draw(24, 1, 12, seed=3)
    samples = own + 0.1 * draw(24, 10, 12, seed=4)
    fitted = fit_concept_vectors(samples[:12], samples[12:], runs=30)
    assert 0.35 < fitted.accuracies.mean() < 0.65
    assert fitted.accuracies.min() >= 0


def test_it_is_the_logistic_regression_of_scikit_learn(learned):
    """The same problem by another of its solvers, of data that are not centred; accuracy counted by hand."""
    from sklearn.linear_model import LogisticRegression

    positive, negative = draw(5, 3, 4) + 0.6, draw(9, 3, 4, seed=1)
    seen = set()
    fitted = fit_concept_vectors(positive, negative, runs=6, held_out=0.4, regularisation=0.5, seed=11)

    for run in range(6):
        generator = np.random.default_rng([11, run])
        first, second = generator.permutation(5), generator.permutation(9)[:5]
        seen.add(tuple(sorted(second)))
        tokens = torch.cat([positive[first[2:]].flatten(0, 1), negative[second[2:]].flatten(0, 1)]).numpy()
        labels = [1] * 9 + [0] * 9
        model = LogisticRegression(C=0.5, max_iter=10_000, tol=1e-10).fit(tokens, labels)
        expected = torch.from_numpy(model.coef_[0] / np.linalg.norm(model.coef_[0]))
        assert_close(fitted.vectors[run], expected, rtol=0, atol=1e-3)
        right = (model.predict(positive[first[:2]].flatten(0, 1).numpy()) == 1).sum()
        right += (model.predict(negative[second[:2]].flatten(0, 1).numpy()) == 0).sum()
        assert fitted.accuracies[run].item() == pytest.approx(right / 12)
    assert len(seen) > 1


def test_fitting_repeats_itself_draws_nothing_elsewhere_and_takes_any_precision(learned):
    positive, negative = concept(count=6)
    state = torch.get_rng_state()
    first = fit_concept_vectors(positive, negative, runs=2, seed=5)
    more = fit_concept_vectors(positive, negative, runs=3, seed=5)
    assert torch.equal(first.vectors, more.vectors[:2])
    assert not torch.equal(fit_concept_vectors(positive, negative, runs=2, seed=6).vectors, first.vectors)
    assert torch.equal(torch.get_rng_state(), state)
    half = fit_concept_vectors(positive.bfloat16(), negative.bfloat16().requires_grad_(), runs=1)
    assert half.vectors.dtype == half.accuracies.dtype == torch.float32


def test_padding_is_not_felt_when_fitting(learned):
    positive, negative = concept(count=6)
    junk = torch.full((6, 2, 6), torch.nan, dtype=torch.float64)
    padded, other = torch.cat([positive, junk], dim=1), torch.cat([junk, negative], dim=1)
    mask = ~padded.isnan().any(dim=2)
    clean = fit_concept_vectors(positive, negative, runs=2)
    found = fit_concept_vectors(padded, other, positive_mask=mask, negative_mask=~other.isnan().any(dim=2), runs=2)
    assert_close(found.vectors, clean.vectors, **EXACT)
    assert torch.equal(found.accuracies, clean.accuracies)


def test_derivatives_equal_the_slow_loop():
    gradients, attention, vectors = draw(3, 5, 4), draw(3, 5, seed=1).softmax(dim=1), draw(2, 4, seed=2)
    mask = torch.arange(5)[None] < torch.tensor([5, 2, 0])[:, None]
    found = concept_derivatives(gradients, attention, vectors, mask=mask)
    assert found.shape == (3, 2, 5)
    for sample, length in enumerate((5, 2, 0)):
        for run in range(2):
            along = [
                sum(g * v for g, v in zip(gradients[sample, t].tolist(), vectors[run].tolist(), strict=True))
                for t in range(length)
            ]
            a = attention[sample, :length].tolist()
            factor = math.dist(a, [0] * length) / math.dist(along, [0] * length) if length else 0
            for token in range(length):
                assert found[sample, run, token].item() == pytest.approx(a[token] * along[token] * factor, abs=1e-12)
    assert (found.transpose(1, 2)[~mask] == 0).all()
    spoiled = [torch.where(mask if t.ndim == 2 else mask[..., None], t, torch.nan) for t in (gradients, attention)]
    assert torch.equal(concept_derivatives(*spoiled, vectors, mask=mask.long()), found)
    assert torch.equal(tcav_scores(torch.where(mask[:, None], found, torch.nan), mask=mask), tcav_scores(found))


def test_the_norm_factor_changes_no_score():
    gradients, attention, vectors = draw(30, 5, 4), draw(30, 5, seed=1).softmax(dim=1), draw(7, 4, seed=2)
    scores = tcav_scores(concept_derivatives(gradients, attention, vectors))
    bare = attention[:, None] * (gradients @ vectors.T).transpose(1, 2)
    expected = (bare.mean(dim=2) > 0).double().mean(dim=0)
    assert torch.equal(scores, expected)
    assert 0 < scores.min() < scores.max() < 1
    small = tcav_scores(concept_derivatives(1e-9 * gradients, 3 * attention, vectors))
    assert torch.equal(small, expected)


def test_no_gradient_means_no_derivative_and_no_score():
    none = concept_derivatives(torch.zeros(2, 3, 4), torch.rand(2, 3), torch.ones(1, 4))
    assert (none == 0).all()
    assert tcav_scores(none).tolist() == [0.0]


def density(value, degrees):
    scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    return scale * (1 + value**2 / degrees) ** (-(degrees + 1) / 2)


def test_significance_equals_the_test_worked_by_hand():
    scores, control = torch.tensor([0.7, 0.9, 0.8, 0.8]).double(), torch.tensor([0.4, 0.6, 0.5]).double()
    # Variances 0.02 / 3 and 0.01; with a quarter held out, 1/3 is added to 1/V and 1/W.
    first, second = 0.02 / 3 * (1 / 4 + 1 / 3), 0.01 * (1 / 3 + 1 / 3)
    t = 0.3 / math.sqrt(first + second)
    degrees = (first + second) ** 2 / (first**2 / 3 + second**2 / 2)
    step = 1e-4
    middle = sum(density((k + 0.5) * step, degrees) * step for k in range(round(t / step)))
    found = concept_significance(scores, control, held_out=0.25)
    assert found == pytest.approx(1 - 2 * middle, abs=1e-4)
    assert concept_significance(control, scores, held_out=0.25) == pytest.approx(found, abs=1e-12)


def test_without_overlap_it_is_welchs_test():
    stats = pytest.importorskip("scipy.stats")
    scores, control = 0.6 + 0.1 * draw(9), 0.5 + 0.3 * draw(14, seed=1)
    expected = stats.ttest_ind(scores.numpy(), control.numpy(), equal_var=False).pvalue
    assert concept_significance(scores, control, held_out=1e-12) == pytest.approx(expected, abs=1e-9)
    assert concept_significance(scores, control) > expected


def test_more_runs_of_the_same_samples_prove_nothing_more():
    scores, control = 0.55 + 0.05 * draw(10), 0.5 + 0.05 * draw(10, seed=1)
    bound = concept_significance(scores, control)
    many = concept_significance(scores.repeat(1000), control.repeat(1000))
    assert many > 0.05 * bound
    assert concept_significance(scores.repeat(1000), control.repeat(1000), held_out=1e-9) < 1e-12


def test_scores_without_any_variance():
    tenth = torch.full((3,), 0.1)
    assert concept_significance(tenth, tenth[:2]) == 1.0
    assert concept_significance(tenth, torch.full((3,), 0.3)) == 0.0
    assert 0 < concept_significance(tenth, torch.tensor([0.1, 0.2])) < 1
    assert 0 < concept_significance(tenth.double(), torch.tensor([0.1, 0.1 + 1e-160]).double()) <= 1


def test_holm_equals_numbers_worked_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.5, 0.9, 0.6]) == (1.0, 1.0, 1.0)
    assert holm([0.2]) == (0.2,)
    assert holm([]) == ()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fit_concept_vectors([1], draw(3, 2, 2)), TypeError, "positive must be a torch.Tensor"),
        (lambda: fit_concept_vectors(draw(3, 2, 2), draw(3, 2)), ValueError, "negative must have 3 dimensions"),
        (lambda: fit_concept_vectors(draw(3, 2, 2), draw(3, 2, 3)), ValueError, "negative must have 2 channels"),
        (
            lambda: fit_concept_vectors(draw(3, 2, 2), draw(1, 2, 2)),
            ValueError,
            "negative must hold at least two samples",
        ),
        (lambda: fit_concept_vectors(draw(3, 2, 2), draw(3, 2, 2), runs=0), ValueError, "runs must be at least 1"),
        (
            lambda: fit_concept_vectors(draw(3, 2, 2), draw(3, 2, 2), held_out=1.0),
            ValueError,
            "held_out must lie between",
        ),
        (
            lambda: fit_concept_vectors(draw(3, 2, 2), draw(3, 2, 2), held_out=0),
            ValueError,
            "held_out must lie between",
        ),
        (
            lambda: fit_concept_vectors(draw(3, 2, 2), draw(3, 2, 2), regularisation=0),
            ValueError,
            "regularisation must be above 0",
        ),
        (lambda: fit_concept_vectors(draw(3, 2, 2), draw(3, 2, 2), seed=-1), ValueError, "seed must be at least 0"),
        (
            lambda: fit_concept_vectors(draw(3, 2, 2), draw(3, 2, 2), negative_mask=torch.ones(3, 3)),
            ValueError,
            r"negative_mask must have shape \(3, 2\)",
        ),
        (
            lambda: fit_concept_vectors(
                draw(3, 2, 2), draw(3, 2, 2), positive_mask=torch.tensor([[1, 1], [0, 0], [1, 0]])
            ),
            ValueError,
            "positive_mask must leave every sample a token, got none for sample 1",
        ),
        (
            lambda: fit_concept_vectors(draw(3, 2, 2), draw(3, 2, 2) / 0),
            ValueError,
            "negative must be finite",
        ),
        (
            lambda: concept_derivatives(draw(2, 3, 4), draw(2, 4), draw(1, 4)),
            ValueError,
            r"attention must have shape \(2, 3\), got \(2, 4\)",
        ),
        (
            lambda: concept_derivatives(draw(2, 3, 4), draw(2, 3), draw(1, 3)),
            ValueError,
            r"vectors must have shape \(V, 4\), got \(1, 3\)",
        ),
        (lambda: tcav_scores(draw(0, 1, 2)), ValueError, "derivatives must hold at least one sample"),
        (lambda: tcav_scores(draw(2, 1, 2), mask=torch.ones(2, 3)), ValueError, "mask must have shape"),
        (lambda: concept_significance(draw(1), draw(3)), ValueError, "scores must hold at least two scores, got 1"),
        (lambda: concept_significance(draw(3), draw(3) / 0), ValueError, "control must be finite"),
        (lambda: concept_significance(draw(3), draw(3), held_out=1), ValueError, "held_out must lie between 0 and 1"),
        (lambda: holm([0.1, 1.2]), ValueError, r"p_values\[1\] must be in \[0, 1\], got 1.2"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_sets_that_nothing_tells_apart_are_refused(learned):
    with pytest.raises(ValueError, match="positive and negative must differ in some channel's mean"):
        fit_concept_vectors(torch.ones(4, 2, 3), torch.ones(4, 2, 3), runs=1)


@pytest.mark.parametrize("size", [1e-8, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("tokens", [1, 30])
def test_no_size_of_activations_upsets_the_solver(learned, size, tokens):
    # Warnings are errors here. Half of these have fewer tokens than channels.
    positive, negative = draw(12, tokens, 40) + 0.2, draw(12, tokens, 40, seed=1)
    outlier = torch.ones(40, dtype=torch.float64)
    outlier[3] = 300
    fitted = fit_concept_vectors(size * outlier * positive, size * outlier * negative, runs=3)
    assert_close(fitted.vectors.norm(dim=1), torch.ones(3).double(), **EXACT)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(
        ImportError, match=r'fit_concept_vectors needs scikit-learn: pip install "mhex-vision\[bench\]"'
    ):
        fit_concept_vectors(draw(3, 2, 2), draw(3, 2, 2))
    with pytest.raises(ImportError, match=r'concept_significance needs scipy: pip install .* or "mhex-text\[bench\]"'):
        concept_significance(draw(3), draw(3))


def test_scipy_and_scikit_learn_are_imported_only_where_used(python):
    script = (
        "import sys, mhex_core.attention, mhex_core.concepts\n"
        "found = [name for name in ('scipy', 'sklearn') if name in sys.modules]\n"
        "assert not found, found\n"
    )
    done = python.run("-c", script)
    assert done.returncode == 0, done.stderr

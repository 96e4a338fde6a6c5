"""A whole T-TCAV study: what is found on activations whose concepts are known, and what is refused."""

import json

import pytest
import torch
from torch.testing import assert_close

from mhex_core.concept_report import ConceptSamples, concept_report
from mhex_core.concepts import concept_derivatives, tcav_scores

pytest.importorskip("sklearn")
pytest.importorskip("scipy")

RUNS, CHANNELS, TOKENS = 12, 6, 4


def samples(channel, *, count=14, strength=5.0, layers=2, seed=0, tokens=TOKENS):
    """Noise, and a channel that is the concept's; the second layer knows nothing of it."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(layers, count, tokens, CHANNELS, generator=generator, dtype=torch.float64)
    if channel is not None:
        found[0, ..., channel] += strength
    return ConceptSamples(activations=tuple(found))


@pytest.fixture(scope="module")
def explained():
    """Gradients along channel 0 and against channel 1, and the attention to each token, of 60 samples."""
    generator = torch.Generator().manual_seed(5)
    gradients = torch.randn(2, 60, TOKENS, CHANNELS, generator=generator, dtype=torch.float64)
    gradients[0, ..., 0] += 1
    gradients[0, ..., 1] -= 1
    return list(gradients), list(torch.rand(2, 60, TOKENS, generator=generator, dtype=torch.float64))


@pytest.fixture(scope="module")
def report(explained):
    concepts = {"for": samples(0, seed=1), "against": samples(1, seed=2), "neither": samples(None, seed=3)}
    return concept_report(
        concepts, *explained, layer_names=("a", "b"), target="cat", random=samples(None, count=60, seed=4), runs=RUNS
    )


def rows(report):
    return {(row.concept, row.layer): row for row in report.rows}


def test_known_concepts_are_found_and_others_are_not(report):
    found = rows(report)
    assert list(found) == [(c, layer) for c in ("for", "against", "neither") for layer in ("a", "b")]
    assert found["for", "a"].score > 0.9
    assert found["against", "a"].score < 0.1
    assert found["for", "a"].accuracy > 0.9
    for blind in (("neither", "a"), ("neither", "b"), ("for", "b")):
        assert 0.3 < found[blind].accuracy < 0.7
        assert found[blind].adjusted > 0.05
    for row in report.rows:
        assert len(row.scores) == len(row.control) == RUNS
        assert 0.3 < row.control_accuracy < 0.7
        assert row.p_value <= row.adjusted <= 1
    assert found["for", "a"].p_value < min(found["neither", "a"].p_value, found["for", "b"].p_value)
    # Random directions score high or low, hardly ever between, where a class has one direction of its own: that is why
    # a score near 1 alone says little.
    assert max(found["for", "a"].control) - min(found["for", "a"].control) > 0.5
    assert (report.target, report.samples) == ("cat", 60)


def test_scores_are_those_of_the_vectors_it_hands_out(report, explained):
    gradients, attention = explained
    vectors = report.vectors["for", "a"].vectors
    assert vectors.shape == (RUNS, CHANNELS)
    scores = tcav_scores(concept_derivatives(gradients[0], attention[0], vectors))
    assert_close(scores, torch.tensor(rows(report)["for", "a"].scores, dtype=torch.float64))


def test_it_can_be_read(report):
    text = report.to_markdown(level=0.99)
    assert text.startswith("T-TCAV of 'cat', 60 samples, 12 runs\n")
    row = rows(report)["for", "a"]
    assert f"| for | a | **{row.score:.3f}** | {row.control_score:.3f} | {row.accuracy:.3f} |" in text
    assert "**" not in report.to_markdown(level=1e-12)
    record = json.loads(json.dumps(report.to_record()))
    assert record["rows"][0]["concept"] == "for"
    assert len(record["rows"]) == 6


def test_the_same_seed_gives_the_same_report(report, explained):
    concepts = {"for": samples(0, seed=1)}
    options = {"layer_names": ("a", "b"), "target": "cat", "random": samples(None, count=60, seed=4), "runs": RUNS}
    again = concept_report(concepts, *explained, **options)
    assert [row.scores for row in again.rows] == [row.scores for row in report.rows[:2]]
    other = concept_report(concepts, *explained, seed=1, **options)
    assert not torch.equal(other.vectors["for", "a"].vectors, again.vectors["for", "a"].vectors)


def test_other_concepts_are_the_negatives_where_none_are_given(explained):
    concepts = {"for": samples(0, seed=1), "against": samples(1, seed=2)}
    found = rows(concept_report(concepts, *explained, layer_names=("a", "b"), target="cat", runs=3))
    assert found["for", "a"].score > 0.9 > 0.1 > found["against", "a"].score
    vectors = concept_report(concepts, *explained, layer_names=("a", "b"), target="cat", runs=3).vectors
    assert float(vectors["for", "a"].vectors[0, 1]) < -0.3  # away from the other concept


def test_padding_says_nothing(explained):
    short, long = samples(0, seed=1), samples(1, seed=2)

    def padded(given, extra):
        noise = torch.full((len(given), extra, CHANNELS), 1e3, dtype=torch.float64)
        mask = torch.ones(len(given), TOKENS + extra, dtype=torch.bool)
        mask[:, TOKENS:] = False
        layers = tuple(torch.cat([layer, noise], dim=1) for layer in given.activations)
        return ConceptSamples(activations=layers, mask=mask)

    options = {"layer_names": ("a", "b"), "target": "cat", "runs": 3}
    plain = concept_report({"short": short, "long": long}, *explained, **options)
    other = concept_report({"short": padded(short, 3), "long": padded(long, 1)}, *explained, **options)
    for key, vectors in plain.vectors.items():
        assert_close(other.vectors[key].vectors, vectors.vectors)
    assert [row.scores for row in other.rows] == [row.scores for row in plain.rows]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"concepts": {}}, ValueError, "concepts must be at least one"),
        ({"concepts": {"one": samples(0)}, "random": None}, ValueError, "'one' is the only concept"),
        ({"layer_names": ("a",)}, ValueError, r"concepts\['for'\] must have 1 layers, got 2"),
        ({"gradients": [torch.zeros(3, TOKENS, CHANNELS)]}, ValueError, "gradients must hold one tensor per layer"),
        ({"random": samples(None, count=3)}, ValueError, "random must hold at least 4 samples"),
        ({"runs": 0}, ValueError, "runs must be at least 1"),
    ],
)
def test_what_does_not_fit_is_named(explained, change, error, words):
    given = {
        "concepts": {"for": samples(0)},
        "gradients": explained[0],
        "attention": explained[1],
        "layer_names": ("a", "b"),
        "target": "cat",
        "random": samples(None, count=20),
        "runs": 2,
    }
    with pytest.raises(error, match=words):
        concept_report(**(given | change))


def test_samples_are_checked():
    with pytest.raises(ValueError, match=r"activations\[1\] must have shape \(3, 4, C\), got \(3, 5, 6\)"):
        ConceptSamples(activations=(torch.zeros(3, 4, 6), torch.zeros(3, 5, 6)))
    with pytest.raises(ValueError, match=r"mask must have shape \(3, 4\), got \(4,\)"):
        ConceptSamples(activations=(torch.zeros(3, 4, 6),), mask=torch.ones(4))

"""Concepts in vision transformers: a planted one is found, scores follow their formula, and images show where."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from mhex_vision import MHEXClassifier
from mhex_vision.concepts import concept_maps, concept_samples, concept_sensitivity
from mhex_vision.vit import capture

pytest.importorskip("sklearn")
pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def shown():
    """Images that are red, green or neither."""

    def make(channel, count, seed):
        found = 0.3 * torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
        if channel is not None:
            found[:, channel] += 1.5
        return found

    return make


def test_activations_are_what_the_blocks_hand_on(make_vit, make_images, family):
    model, images = make_vit(family), make_images(5, (28, 28))
    samples = concept_samples(model, images, batch_size=2)
    outputs = capture(model, images, graph=False).outputs
    assert len(samples.activations) == len(outputs) - 1
    for layer, expected in zip(samples.activations, outputs, strict=False):
        assert_close(layer, expected, rtol=1e-4, atol=1e-5)
    (last,) = concept_samples(model, images, layers=[-1]).activations
    assert_close(last, outputs[-1], rtol=1e-4, atol=1e-5)


def test_a_report_scores_each_concept_at_each_block(make_vit, shown, some_family):
    model = make_vit(some_family)
    concepts = {"red": shown(0, 8, 1), "green": shown(1, 8, 2)}
    report = concept_sensitivity(model, concepts, shown(0, 6, 3), 2, random=shown(None, 16, 4), runs=3, batch_size=4)
    names = capture(model, shown(0, 1, 0), graph=False).block_names
    assert [(row.concept, row.layer) for row in report.rows] == [(c, n) for c in concepts for n in names[:-1]]
    assert (report.target, report.samples) == ("class 2", 6)
    # A colour that fills the image is easy to tell at the first block.
    assert all(row.accuracy > 0.9 for row in report.rows if row.layer == names[0])
    assert all(0 <= row.score <= 1 for row in report.rows)


def test_scores_count_images_whose_weighted_derivative_is_positive(make_vit, shown):
    model = make_vit("ViT")
    images = shown(0, 7, 3)
    report = concept_sensitivity(model, {"red": shown(0, 8, 1)}, images, 1, random=shown(None, 16, 4), runs=2)
    seen = capture(model, images)
    gradients = seen.gradients(torch.full((7,), 1), seen.outputs)
    for index, row in enumerate(report.rows):
        vectors = report.vectors["red", row.layer].vectors
        for run, vector in enumerate(vectors):
            positive = 0
            for image in range(7):
                attention = seen.attentions[index][image].mean(dim=0)[0].detach()
                positive += float((attention * (gradients[index][image] @ vector)).mean()) > 0
            assert row.scores[run] == pytest.approx(positive / 7)


def test_a_heat_map_shows_the_weighted_derivative_of_each_patch(make_vit, images, some_family):
    model = make_vit(some_family)
    vector = F.normalize(torch.randn(24, generator=torch.Generator().manual_seed(0)), dim=0)
    targets = torch.tensor([0, 1, 2])
    found = concept_maps(model, images, targets, vector, layer=1, upsample="nearest")
    seen = capture(model, images)
    (gradient,) = seen.gradients(targets, [seen.outputs[1]])
    along = gradient @ vector
    attention = (seen.readout[:, None] * seen.attentions[1].detach().mean(dim=1)).sum(dim=1)
    scores = attention * along * (attention.norm(dim=1) / along.norm(dim=1))[:, None]
    assert_close(found[:, ::7, ::7], seen.maps(scores), rtol=1e-4, atol=1e-6)
    assert (found < 0).any()
    assert (found > 0).any()


def test_patches_of_the_last_block_have_no_gradient_where_a_class_token_is_read(make_vit, images):
    vector = torch.ones(24) / 24**0.5
    found = concept_maps(make_vit("timm"), images, torch.tensor([0, 1, 2]), vector, layer=2)
    assert found.abs().amax() == 0


def test_heads_on_a_network_have_concepts_too(make_vit, shown):
    model = MHEXClassifier.from_backbone(make_vit("timm"), 5).eval()
    report = concept_sensitivity(model, {"red": shown(0, 6, 1), "green": shown(1, 6, 2)}, shown(0, 4, 3), 0, runs=2)
    assert len(report.rows) == 4


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"concepts": [1]}, TypeError, "concepts must be images by name, got list"),
        ({"concepts": {}}, ValueError, "concepts must be at least one"),
        ({"target": 5}, ValueError, r"target must lie in \[0, 4\], got 5"),
        ({"target": True}, TypeError, "target must be an int"),
        ({"layers": [3]}, ValueError, r"layers must name layers in \[0, 2\]"),
        ({"images": torch.zeros(0, 3, 28, 28)}, ValueError, "images must hold at least one"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ],
)
def test_what_is_wrong_is_named(make_vit, shown, change, error, words):
    given = {
        "concepts": {"red": shown(0, 4, 1), "green": shown(1, 4, 2)},
        "images": shown(0, 3, 3),
        "target": 1,
        "runs": 2,
    } | change
    with pytest.raises(error, match=words):
        concept_sensitivity(make_vit("timm"), **given)


def test_a_vector_must_fit_the_block(make_vit, images):
    with pytest.raises(ValueError, match=r"vector must have shape \(24,\), got \(7,\)"):
        concept_maps(make_vit("timm"), images, torch.tensor([0, 1, 2]), torch.zeros(7), layer=0)

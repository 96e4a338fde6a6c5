"""Localization metrics against counting pixel by pixel."""

import pytest
import torch
from torch.testing import assert_close

from mhex_vision.metrics import localization


@pytest.fixture(params=["random", "coarse", "empty mask", "full mask"])
def case(request):
    """Maps and masks; coarse maps share their maximum between several points, and one is constant, one zero."""
    generator = torch.Generator().manual_seed(0)
    saliency = torch.rand(5, 4, 7, generator=generator)
    masks = torch.rand(5, 4, 7, generator=generator) > 0.6
    if request.param == "coarse":
        saliency = (saliency * 3).round() / 3
        saliency[3], saliency[4] = 0.5, 0.0
    if request.param.endswith("mask"):
        masks = torch.full_like(masks, request.param == "full mask")
    return saliency, masks


def test_the_pointing_game_counts_the_strongest_points(case):
    saliency, masks = case
    expected = []
    for values, mask in zip(saliency.flatten(1).tolist(), masks.flatten(1).tolist(), strict=True):
        hits = [inside for value, inside in zip(values, mask, strict=True) if value == max(values)]
        expected.append(sum(hits) / len(hits))
    assert_close(localization.pointing_game(saliency, masks), torch.tensor(expected))


def test_mass_inside_is_the_share_of_the_sum(case):
    saliency, masks = case
    expected = []
    for values, mask in zip(saliency.flatten(1).tolist(), masks.flatten(1).tolist(), strict=True):
        if sum(values) == 0:
            values = [1.0] * len(values)
        inside = sum(value for value, member in zip(values, mask, strict=True) if member)
        expected.append(inside / sum(values))
    assert_close(localization.mass_inside(saliency, masks), torch.tensor(expected))


@pytest.mark.parametrize("metric", [localization.pointing_game, localization.mass_inside])
def test_no_map_gives_no_value(metric):
    assert metric(torch.zeros(0, 3, 3), torch.zeros(0, 3, 3, dtype=torch.bool)).shape == (0,)


@pytest.mark.parametrize("metric", [localization.pointing_game, localization.mass_inside])
@pytest.mark.parametrize(
    ("saliency", "masks", "error", "words"),
    [
        ([[1.0]], torch.ones(1, 1, 1, dtype=torch.bool), TypeError, "saliency must be a tensor, got list"),
        (torch.ones(1, 2, 2), None, TypeError, "masks must be a tensor, got NoneType"),
        (torch.ones(1, 2, 2), torch.ones(1, 2, 2), TypeError, "masks must be of dtype torch.bool, got torch.float32"),
        (torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool), ValueError, r"share one shape \(B, H, W\)"),
        (torch.ones(1, 2, 2), torch.ones(1, 2, 3, dtype=torch.bool), ValueError, r"\(1, 2, 2\) and \(1, 2, 3\)"),
    ],
    ids=["list", "None", "float mask", "rank", "shape"],
)
def test_bad_arguments_are_named(metric, saliency, masks, error, words):
    with pytest.raises(error, match=words):
        metric(saliency, masks)


def test_negative_mass_is_refused():
    with pytest.raises(ValueError, match="must not be negative, got a minimum of -1"):
        localization.mass_inside(-torch.ones(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool))


def test_intersection_over_union_counts_pixels(case):
    saliency, masks = case
    for threshold in (0.0, 0.4):
        expected = []
        for values, mask in zip(saliency.flatten(1).tolist(), masks.flatten(1).tolist(), strict=True):
            found = [value > threshold for value in values]
            union = sum(a or b for a, b in zip(found, mask, strict=True))
            both = sum(a and b for a, b in zip(found, mask, strict=True))
            expected.append(both / union if union else 1.0)
        assert_close(localization.mask_iou(saliency, masks, threshold=threshold), torch.tensor(expected))


def test_boxes_hold_the_pixels_whose_centres_they_hold():
    boxes = torch.tensor([[0.0, 0.0, 3.0, 2.0], [0.5, 0.5, 1.5, 1.4], [1.0, 1.0, 1.0, 9.0]])
    masks = localization.masks_from_boxes(boxes, (3, 4))
    assert masks[0].nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert masks[1].nonzero().tolist() == [[0, 0]]
    assert not masks[2].any()
    assert torch.equal(localization.masks_from_boxes(boxes[:1].int(), (3, 4)), masks[:1])


@pytest.mark.parametrize("boxes", [torch.zeros(1, 3), torch.tensor([[2.0, 0.0, 1.0, 1.0]]), torch.zeros(4)])
def test_boxes_that_are_none_are_refused(boxes):
    with pytest.raises(ValueError, match="boxes must"):
        localization.masks_from_boxes(boxes, 4)

import numpy as np
import pytest
import torch

from mhex_vision.data import LESION_CLASSES, load_data, synthetic_lesions
from mhex_vision.data.sets import ArrayImages


@pytest.fixture(scope="module")
def lesions() -> ArrayImages:
    return synthetic_lesions(400)


def masks_of(images: ArrayImages) -> torch.Tensor:
    assert images.masks is not None
    return images.masks


def nearest_centroid_accuracy(features: torch.Tensor, labels: torch.Tensor) -> float:
    """Fit on the first half, judge on the second."""
    features = (features - features.mean(0)) / features.std(0)
    half = len(labels) // 2
    centroids = torch.stack([features[:half][labels[:half] == k].mean(0) for k in range(len(LESION_CLASSES))])
    guesses = torch.cdist(features[half:], centroids).argmin(1)
    return (guesses == labels[half:]).float().mean().item()


def colours(lesions: ArrayImages) -> torch.Tensor:
    rows = []
    for image, mask in zip(lesions.images.float(), masks_of(lesions), strict=True):
        pixels = image[:, mask]
        rows.append(torch.cat([pixels.mean(1), pixels.std(1)]))
    return torch.stack(rows)


def test_same_seed_same_images() -> None:
    first, second = synthetic_lesions(12, seed=5), synthetic_lesions(12, seed=5)
    assert torch.equal(first.images, second.images)
    assert torch.equal(masks_of(first), masks_of(second))


def test_larger_set_begins_with_smaller() -> None:
    small, large = synthetic_lesions(5), synthetic_lesions(9)
    assert torch.equal(small.images, large.images[:5])
    assert torch.equal(small.labels, large.labels[:5])
    assert torch.equal(masks_of(small), masks_of(large)[:5])


def test_other_seed_other_images() -> None:
    first, second = synthetic_lesions(4), synthetic_lesions(4, seed=1)
    assert not torch.equal(first.images, second.images)


def test_classes_are_balanced(lesions: ArrayImages) -> None:
    assert lesions.labels.bincount().tolist() == [100] * 4
    assert synthetic_lesions(6).labels.bincount(minlength=4).max() == 2


@pytest.mark.parametrize("size", [32, 47, 64, 96])
def test_any_size(size: int) -> None:
    made = synthetic_lesions(16, size=size)
    assert made.images.shape == (16, 3, size, size)
    assert made.images.dtype == torch.uint8
    assert masks_of(made).shape == (16, size, size)
    areas = masks_of(made).float().mean((1, 2))
    assert areas.min() > 0.02
    assert areas.max() < 0.22


def test_lesion_covers_a_small_part(lesions: ArrayImages) -> None:
    areas = masks_of(lesions).float().mean((1, 2))
    assert areas.min() > 0.025
    assert areas.max() < 0.22
    assert 0.07 < areas.mean() < 0.14


def test_lesions_spread_over_the_image(lesions: ArrayImages) -> None:
    masks = masks_of(lesions).double()
    place = torch.arange(64) + 0.5
    for axis in (1, 2):
        centres = (masks.sum(axis) * place).sum(1) / masks.sum((1, 2)) / 64
        assert centres.min() < 0.16
        assert centres.max() > 0.84
        assert abs(centres.mean() - 0.5) < 0.04
        assert centres.std() > 0.18
    # Every place of the middle is covered about equally often, so always pointing at its centre gains little.
    heat = masks.mean(0)[16:48, 16:48]
    assert heat.min() > 0.5 * heat.max()


def test_colour_does_not_tell_the_class(lesions: ArrayImages) -> None:
    assert nearest_centroid_accuracy(colours(lesions), lesions.labels) < 0.25 + 0.12


def test_outside_does_not_tell_the_class(lesions: ArrayImages) -> None:
    outside = lesions.images.float() * ~masks_of(lesions)[:, None]
    features = torch.nn.functional.avg_pool2d(outside, 16).flatten(1)
    assert nearest_centroid_accuracy(features, lesions.labels) < 0.25 + 0.12


def test_texture_tells_the_class(lesions: ArrayImages) -> None:
    """How edges inside the lesion are oriented separates the classes far better than chance."""
    rows = []
    for image, mask in zip(lesions.images.double().mean(1).numpy(), masks_of(lesions).numpy(), strict=True):
        gy, gx = np.gradient(image)
        inner = mask & np.roll(mask, 2, 0) & np.roll(mask, -2, 0) & np.roll(mask, 2, 1) & np.roll(mask, -2, 1)
        angle, weight = np.arctan2(gy, gx)[inner], np.hypot(gy, gx)[inner]
        # One orientation (stripes), two at right angles (mesh), three (spots), all (rings).
        rows.append([abs((weight * np.exp(1j * k * angle)).sum()) / weight.sum() for k in (2, 4, 6)] + [weight.mean()])
    accuracy = nearest_centroid_accuracy(torch.tensor(rows), lesions.labels)
    assert accuracy > 0.6


def test_bundle() -> None:
    from mhex_vision.data.lesions import lesions_bundle

    bundle = lesions_bundle(size=32, seed=2, train=12, validation=4, test=8)
    assert bundle.class_names == LESION_CLASSES
    assert bundle.num_classes == 4
    assert not bundle.multi_label
    assert bundle.preprocessing.size == 32
    assert bundle.validation is not None
    assert bundle.test is not None
    sets = (bundle.train, bundle.validation, bundle.test)
    assert [len(split) for split in sets] == [12, 4, 8]
    seen = torch.cat([split[i].images for split in sets for i in range(len(split))]).flatten(1)
    following = lesions_bundle(size=32, seed=3, train=12, validation=4, test=8).train
    seen = torch.cat([seen, *(following[i].images.flatten(1) for i in range(12))])
    assert len(seen.unique(dim=0)) == 36


def test_by_name() -> None:
    bundle = load_data("synthetic-lesions", size=32)
    assert len(bundle.train) == 1600
    assert bundle.train[0].masks is not None


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"count": 0}, ValueError, "count: "),
        ({"count": 2.5}, TypeError, "count: "),
        ({"count": 1, "size": 28}, ValueError, "size: .*32, got 28"),
        ({"count": 1, "seed": -1}, ValueError, "seed: "),
    ],
)
def test_refuses_nonsense(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        synthetic_lesions(**arguments)

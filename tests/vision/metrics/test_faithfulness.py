"""Each metric against its formula, one image and one pixel at a time, in numpy."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mhex_vision.metrics import faithfulness
from mhex_vision.metrics.judge import Judge
from mhex_vision.metrics.perturbation import baseline_of, impute

H, W = 6, 8


class Linear(nn.Module):
    """A judge whose softmax numpy can repeat; with dropout, which must be off."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.weight = nn.Parameter(torch.randn(4, 3, H, W, dtype=torch.float64) / 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, images):
        return torch.einsum("bchw,kchw->bk", self.drop(images.double()), self.weight)


@pytest.fixture
def judge():
    return Linear()


@pytest.fixture
def images(make_images):
    return make_images(5, (H, W)).double()


@pytest.fixture
def saliency():
    maps = torch.rand(5, H, W, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    maps[1] = (maps[1] * 3).round() / 3
    maps[2] = 0.0
    return maps


TARGET = torch.tensor([0, 3, 2, 1, 1])


def belief(judge, image, target):
    logits = (image[None] * judge.weight.detach().numpy()).sum(axis=(1, 2, 3))
    exponentials = np.exp(logits - logits.max())
    return (exponentials / exponentials.sum())[target]


def drop(judge, image, changed, target):
    before = belief(judge, image, target)
    return max(0.0, (before - belief(judge, changed, target)) / before)


def one_by_one(formula, judge, images, saliency):
    values = [
        formula(judge, image, maps, target)
        for image, maps, target in zip(images.numpy(), saliency.numpy(), TARGET.tolist(), strict=True)
    ]
    return torch.tensor(np.array(values), dtype=torch.float64)


def hard(judge, image, maps, target, threshold=0.5):
    return drop(judge, image, image * (maps <= threshold), target)


def soft(judge, image, maps, target):
    mean = image.mean(axis=(1, 2), keepdims=True)
    return drop(judge, image, image * (1 - maps) + mean * maps, target)


def effective(judge, image, maps, target):
    area = (maps > 0.2).mean()
    return hard(judge, image, maps, target) * 5 * area / (1 + 256 * area**5)


def increases(judge, image, maps, target):
    return float(belief(judge, image * maps, target) > belief(judge, image, target))


@pytest.mark.parametrize(
    ("metric", "formula"),
    [
        (faithfulness.avg_drop, hard),
        (faithfulness.sad, soft),
        (faithfulness.ead, effective),
        (faithfulness.confidence_increase, increases),
    ],
    ids=["avg_drop", "sad", "ead", "confidence_increase"],
)
def test_a_metric_is_its_formula(judge, images, saliency, metric, formula):
    expected = one_by_one(formula, judge, images, saliency)
    found = metric(judge, images, saliency, TARGET)
    assert_close(found, expected)
    assert judge.training  # as it was
    probability = Judge(judge).probability(images, TARGET)
    assert torch.equal(metric(judge, images, saliency, TARGET, probability=probability), found)
    parts = [metric(judge, images[i : i + 2], saliency[i : i + 2], TARGET[i : i + 2]) for i in (0, 2, 4)]
    assert_close(torch.cat(parts), found)
    assert metric(judge, images[:0], saliency[:0], TARGET[:0]).shape == (0,)


def test_thresholds_are_options(judge, images, saliency):
    expected = one_by_one(lambda *a: hard(*a, threshold=0.3), judge, images, saliency)
    assert_close(faithfulness.avg_drop(judge, images, saliency, TARGET, threshold=0.3), expected)


def test_the_effective_area_is_best_at_a_quarter():
    areas = torch.linspace(0, 1, 101, dtype=torch.float64)
    weight = 5 * areas / (1 + 256 * areas**5)
    assert areas[weight.argmax()] == 0.25
    assert weight.max() == 1


def ordered(maps):
    """Pixels from the strongest; where maps tie, any order is right, so cases with ties are left to other tests."""
    return np.argsort(-maps.reshape(-1), kind="stable")


def without(image, order, count, baseline):
    changed = image.copy().reshape(3, -1)
    changed[:, order[:count]] = baseline.reshape(3, -1)[:, order[:count]]
    return changed.reshape(image.shape)


DISTINCT = [0, 3, 4]


@pytest.mark.parametrize("baseline", ["blank", "mean", "blur"])
@pytest.mark.parametrize("area", [0.25, 0.1])
def test_an_area_drop_takes_the_same_number_from_all(judge, images, saliency, baseline, area):
    ground = baseline_of(images, baseline).numpy()
    found = faithfulness.area_drop(judge, images, saliency, TARGET, area=area, baseline=baseline)
    for row in DISTINCT:
        image = images[row].numpy()
        order = ordered(saliency[row].numpy())
        changed = without(image, order, int(np.floor(area * H * W + 0.5)), ground[row])
        assert float(found[row]) == pytest.approx(drop(judge, image, changed, TARGET[row]), abs=1e-12)


@pytest.mark.parametrize("baseline", [None, "mean"])
@pytest.mark.parametrize("steps", [1, 5, 48])
@pytest.mark.parametrize("kind", ["insertion", "deletion"])
def test_curves_begin_and_end_where_they_should(judge, images, saliency, kind, steps, baseline):
    curve = faithfulness.perturbation_curve(judge, images, saliency, TARGET, kind=kind, steps=steps, baseline=baseline)
    ground = baseline_of(images, baseline or ("blur" if kind == "insertion" else "blank")).numpy()
    counts = [round(step * H * W / steps) for step in range(steps + 1)]
    assert_close(curve.fractions, torch.tensor(counts, dtype=torch.float64) / (H * W))
    for row in DISTINCT:
        image, order = images[row].numpy(), ordered(saliency[row].numpy())
        start, end = (image, ground[row]) if kind == "deletion" else (ground[row], image)
        expected = [belief(judge, without(start, order, count, end), TARGET[row]) for count in counts]
        assert_close(curve.probabilities[row], torch.tensor(np.array(expected)))
        area = np.trapezoid(expected, np.array(counts) / (H * W))
        assert float(curve.auc[row]) == pytest.approx(area)
    metric = getattr(faithfulness, kind)
    if baseline is not None:
        assert_close(metric(judge, images, saliency, TARGET, steps=steps, baseline=baseline), curve.auc)
    else:
        assert_close(metric(judge, images, saliency, TARGET, steps=steps), curve.auc)


def test_road_compares_the_two_orders(judge, images, saliency):
    fractions = (0.25, 0.5)
    values = {}
    for order, sign in (("most", 1), ("least", -1)):
        curve = faithfulness.road_curve(judge, images, saliency, TARGET, order=order, fractions=fractions)
        values[order] = curve
        for row in DISTINCT:
            for column, fraction in enumerate(fractions):
                mask = torch.zeros(H * W, dtype=torch.bool)
                mask[torch.tensor(ordered(sign * saliency[row].numpy())[: int(fraction * H * W)].copy())] = True
                filled = impute(images[row : row + 1], mask.view(1, H, W))[0].numpy()
                assert float(curve[row, column]) == pytest.approx(belief(judge, filled, TARGET[row]), abs=1e-3)
    found = faithfulness.road(judge, images, saliency, TARGET, fractions=fractions)
    assert_close(found, (values["least"] - values["most"]).mean(dim=1) / 2)


def test_a_map_that_knows_the_judge_beats_one_that_does_not(judge, images):
    """The judge is linear, so what each pixel adds to its belief is known."""
    added = (images * judge.weight.detach()[TARGET]).sum(dim=1)
    noise = torch.rand(5, H, W, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for metric, sign in (
        (faithfulness.area_drop, 1),
        (faithfulness.insertion, 1),
        (faithfulness.deletion, -1),
        (faithfulness.road, 1),
    ):
        knowing, blind = (metric(judge, images, maps, TARGET).mean() for maps in (added, noise))
        assert sign * knowing > sign * blind


def test_a_judge_may_be_a_function_and_splits_its_batches(judge, images):
    judge.eval()
    seen = []

    def model(part):
        seen.append(len(part))
        return judge(part)

    whole = Judge(judge).probabilities(images)
    assert_close(Judge(model, batch_size=2).probabilities(images), whole)
    assert seen == [2, 2, 1]
    assert_close(Judge(judge, multi_label=True).probabilities(images), judge(images).sigmoid().detach())


def test_a_classifier_with_heads_judges_by_its_prediction(make_classifier, make_images):
    model, images = make_classifier(), make_images(3)
    with torch.no_grad():
        expected = model(images).logits.softmax(dim=1)
    assert_close(Judge(model).probabilities(images), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"saliency": torch.rand(5, H, W) * 2}, ValueError, r"saliency must lie in \[0, 1\]"),
        ({"saliency": torch.full((5, H, W), torch.nan)}, ValueError, "NaN"),
        ({"saliency": torch.rand(5, W, H)}, ValueError, "saliency must have shape"),
        ({"images": torch.zeros(5, 3, H, W, dtype=torch.uint8)}, TypeError, "images must be of a floating-point"),
        ({"target": torch.tensor([0, 1, 2, 3, 4])}, ValueError, "target must lie in"),
        ({"target": torch.tensor([0, 1])}, ValueError, "target must have shape"),
        ({"judge": "resnet"}, TypeError, "judge must be a Judge or a network"),
        ({"judge": nn.Flatten(0)}, ValueError, "model must give logits"),
        ({"threshold": 2}, ValueError, "threshold must be in"),
        ({"probability": torch.ones(3)}, ValueError, "probability must have shape"),
    ],
)
def test_errors_name_the_argument(judge, images, saliency, change, error, message):
    arguments = {"judge": judge, "images": images, "saliency": saliency, "target": TARGET} | change
    options = {key: arguments.pop(key) for key in ("threshold", "probability") if key in arguments}
    with pytest.raises(error, match=message):
        faithfulness.avg_drop(*arguments.values(), **options)


def test_curves_refuse_what_they_cannot_do(judge, images, saliency):
    with pytest.raises(ValueError, match="steps must be at most 48"):
        faithfulness.deletion(judge, images, saliency, TARGET, steps=49)
    with pytest.raises(ValueError, match="fractions must be"):
        faithfulness.road(judge, images, saliency, TARGET, fractions=(0.5, 1.0))

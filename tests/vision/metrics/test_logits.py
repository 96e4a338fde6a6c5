"""Fidelity and box sensitivity against their formulas: one image, one step and one box at a time, in numpy."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.testing import assert_close

from mhex_vision.metrics import logits as metrics
from mhex_vision.metrics.judge import Judge
from mhex_vision.metrics.perturbation import baseline_of

H, W = 6, 8
TARGET = torch.tensor([0, 2, 1, 1, 0])


class Bent(nn.Module):
    """A small judge that is not linear, with dropout, which must be off; it remembers what it was shown."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.drop, self.second = nn.Linear(3 * H * W, 8), nn.Dropout(0.5), nn.Linear(8, 3)
        self.to(dtype)
        self.images = []

    def forward(self, images):
        self.images.append(images.clone())
        return self.second(self.drop(torch.tanh(self.first(images.flatten(1)))))

    def numpy(self, image, target):
        weights = [each.detach().double().numpy() for each in self.parameters()]
        hidden = np.tanh(weights[0] @ image.ravel() + weights[1])
        return float(weights[2][target] @ hidden + weights[3][target])


class Linear(nn.Module):
    """Logits that are linear in the pixels."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, 3, H, W, dtype=dtype))

    def forward(self, images):
        return torch.einsum("bchw,kchw->bk", images, self.weight) + 0.3


@pytest.fixture
def case(make_images):
    """Images, attributions of any sign with ties and zeros among them, classes."""
    images = make_images(5, (H, W), seed=2, dtype=torch.float64)
    # Of float32's digits, as maps are: in float64 their sums are exact, and ties do not depend on the order of adding.
    maps = torch.randn(5, H, W, generator=torch.Generator().manual_seed(4)).double()
    maps[1] = (maps[1] * 2).round() / 2
    maps[2] = maps[2].clamp(min=0.5) - 0.5
    maps[3] = maps[3, ::3, ::4].repeat_interleave(3, 0).repeat_interleave(4, 1)  # constant in patches
    return images, maps, TARGET


def ground_of(image, baseline):
    if baseline == "blank":
        return np.zeros_like(image)
    if baseline == "mean":
        return np.stack([np.full_like(channel, channel.mean()) for channel in image])
    return baseline_of(torch.from_numpy(image)[None], "blur")[0].numpy()


def in_order(scores):
    """Positions by falling score; of equal ones, the one first that the library's shuffling puts first."""
    place = {position: at for at, position in enumerate(torch.randperm(len(scores), generator=seeded()).tolist())}
    return sorted(range(len(scores)), key=lambda position: (-scores[position], place[position]))


def seeded():
    return torch.Generator().manual_seed(0)


def pixels_of(cell, grid):
    """All (y, x) of a cell: those whose nearest value in the grid, stretched over the image, is the cell's."""
    row, column = divmod(cell, grid[1])
    return [
        (y, x)
        for y in range(H)
        for x in range(W)
        if int(y * grid[0] / H + 1e-9) == row and int(x * grid[1] / W + 1e-9) == column
    ]


def slow_curve(judge, image, scores, target, steps, baseline, grid):
    """The logit at every step, most important first."""
    cells = [pixels_of(cell, grid) for cell in range(grid[0] * grid[1])]
    means = [sum(scores[place] for place in cell) / len(cell) for cell in cells]
    ground, values = ground_of(image, baseline), []
    for step in range(steps + 1):
        changed = image.copy()
        for cell in in_order(means)[: int(step / steps * len(cells) + 1e-9)]:
            for y, x in cells[cell]:
                changed[:, y, x] = ground[:, y, x]
        values.append(judge.numpy(changed, target))
    return values


@pytest.mark.parametrize(
    ("steps", "baseline", "cells"),
    [(40, "mean", None), (7, "blank", None), (5, "blur", (2, 4)), (4, "mean", 2), (12, "mean", (4, 3)), (1, "mean", 1)],
)
def test_fidelity_equals_numpy(case, steps, baseline, cells):
    images, maps, target = case
    grid = {None: (H, W), 1: (1, 1), 2: (2, 2)}.get(cells, cells)
    judge = Bent().train()
    options = {"steps": steps, "baseline": baseline, "cells": cells}
    curves = metrics.fidelity_curves(judge, *case, **options)
    assert judge.training
    areas = []
    for index, (image, scores, label) in enumerate(zip(images.numpy(), maps.numpy(), target.tolist(), strict=True)):
        most = slow_curve(judge, image, scores, label, steps, baseline, grid)
        least = slow_curve(judge, image, -scores, label, steps, baseline, grid)
        assert curves.most[index].tolist() == pytest.approx(most, abs=1e-10)
        assert curves.least[index].tolist() == pytest.approx(least, abs=1e-10)
        gap = np.array(least) - np.array(most)
        areas.append(sum((gap[k] + gap[k + 1]) / 2 / steps for k in range(steps)))
    assert curves.fractions.tolist() == pytest.approx([k / steps for k in range(steps + 1)])
    found = metrics.fidelity(judge, *case, **options)
    assert found.tolist() == pytest.approx(areas, abs=1e-10)
    assert_close(curves.gap, found)


def test_the_order_is_that_of_signed_values(case):
    """What speaks against the class goes last, and not among the zeros of a rectified map."""
    images, _, target = case
    judge = Linear()
    exact = (judge.weight[target] * (images - images.mean(dim=(2, 3), keepdim=True))).sum(dim=1).detach()
    found, rectified = (metrics.fidelity(judge, images, maps, target) for maps in (exact, exact.clamp(min=0)))
    assert (found > rectified).all()
    assert (rectified > 0).all()
    assert_close(metrics.fidelity(judge, images, -exact, target), -found)
    assert_close(metrics.fidelity(judge, images, exact * 1e-6 + 3, target), found)


def test_a_constant_map_has_no_fidelity(case):
    images, maps, target = case
    for value in (0.0, -0.3, 0.1):
        assert (metrics.fidelity(Bent(), images, torch.full_like(maps, value), target) == 0).all()


def test_patches_go_whole(case):
    """By cells, a map that is constant within patches is read as the map of patches is; by pixels it is not."""
    images, _, target = case
    patches = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float32)
    patches[0] = patches[0].round()  # patches may tie, too
    maps = patches.repeat_interleave(2, 1).repeat_interleave(2, 2)
    judge = Bent()
    whole = metrics.fidelity(judge, images, maps, target, steps=12, cells=(3, 4))
    gone = (torch.cat(judge.images).view(2, 13, 5, 3, H, W) != images).any(dim=3)
    assert torch.equal(gone, gone[..., ::2, ::2].repeat_interleave(2, -2).repeat_interleave(2, -1))
    assert gone[..., ::2, ::2].sum(dim=(3, 4)).tolist() == [[[k] * 5 for k in range(13)]] * 2
    most, least = gone[..., ::2, ::2].sum(dim=1)  # in how many steps each patch was gone: the more, the earlier
    for index, values in enumerate(patches.flatten(1).tolist()):
        assert in_order(most[index].flatten().tolist()) == in_order(values)
        assert in_order(least[index].flatten().tolist()) == in_order([-value for value in values])
    judge.images.clear()
    pixelwise = metrics.fidelity(judge, images, maps, target, steps=24)
    gone = (torch.cat(judge.images) != images.repeat(50, 1, 1, 1)).any(dim=1)
    assert not torch.equal(gone, gone[..., ::2, ::2].repeat_interleave(2, -2).repeat_interleave(2, -1))
    assert not torch.isclose(whole, pixelwise).any()


def boxes_seen(image, maps, target, baseline, **options):
    """The boxes, read off what the judge was shown: per box the sum of the map in it and the logit that was lost."""
    judge = Bent()
    metrics.box_sensitivity(judge, image[None], maps[None], target, baseline=baseline, **options)
    original, *varied = (each.numpy() for each in torch.cat(judge.images))
    ground = ground_of(original, baseline)
    for changed in varied:
        inside = (changed != original).any(axis=0)
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        y, x, side = rows[0], columns[0], len(rows)
        assert inside.sum() == side * len(columns) == side * side
        assert inside[y : y + side, x : x + side].all()
        assert np.allclose(changed[:, inside], ground[:, inside], rtol=0, atol=1e-12)
        claimed = sum(maps[row, column].item() for row in rows for column in columns)
        yield (y, x, side), claimed, judge.numpy(original, target) - judge.numpy(changed, target)


@pytest.mark.parametrize("baseline", ["blur", "blank", "mean"])
@pytest.mark.parametrize(
    ("sides", "lengths"), [((0.125, 0.25, 0.5), (1, 2, 3)), (2, (2,)), (0.4, (2,)), ([5, 1], (5, 1))]
)
def test_box_sensitivity_equals_scipy(case, sides, lengths, baseline):
    images, maps, target = case
    options = {"sides": sides, "boxes": 12, "seed": 4}
    expected, places = [], []
    for image, scores, label in zip(images, maps, target.tolist(), strict=True):
        boxes, claimed, lost = zip(*boxes_seen(image, scores, label, baseline, **options), strict=True)
        assert [side for *_, side in boxes] == [length for length in lengths for _ in range(12)]
        places.append(boxes)
        found = []
        for start in range(0, len(boxes), 12):
            some = slice(start, start + 12)
            constant = np.ptp(claimed[some]) < 1e-9
            found.append(0.0 if constant else stats.pearsonr(claimed[some], lost[some])[0])
        expected.append(np.mean(found))
    assert len(set(places)) == 1  # every image gets the same boxes
    result = metrics.box_sensitivity(Judge(Bent(), batch_size=7), *case, baseline=baseline, **options)
    assert result.tolist() == pytest.approx(expected, abs=1e-8)


def test_the_defaults_are_an_eighth_a_quarter_and_half_of_the_shorter_side(case):
    images, maps, target = case
    boxes = [box for box, *_ in boxes_seen(images[0], maps[0], int(target[0]), "blur")]
    assert [side for *_, side in boxes] == [1] * 100 + [2] * 100 + [3] * 100
    assert {(y, x) for y, x, side in boxes if side == 3} == {(y, x) for y in range(H - 2) for x in range(W - 2)}


def test_the_places_of_a_side_do_not_depend_on_the_others():
    alone, again = (metrics._places(H, W, 2, 9, 5) for _ in range(2))
    assert alone == again
    assert alone != metrics._places(H, W, 2, 9, 6)
    often = np.zeros((5, 7))
    for top, left in metrics._places(H, W, 2, 7000, 0):
        often[top, left] += 1
    assert abs(often - 200).max() < 60


def test_what_adds_up_has_box_sensitivity_one(case):
    images, _, target = case
    judge = Linear()
    exact = (judge.weight[target] * (images - baseline_of(images, "blur"))).sum(dim=1).detach()
    for maps, wanted in ((exact, 1.0), (exact * 1e-6 + 40, 1.0), (-exact, -1.0)):
        found = metrics.box_sensitivity(judge, images, maps, target, boxes=20)
        assert_close(found, torch.full((5,), wanted, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_spread_box_sensitivity_is_zero(case, dtype):
    images, maps, target = (each.to(dtype) if each.is_floating_point() else each for each in case)
    assert (metrics.box_sensitivity(Bent(dtype), images, torch.full_like(maps, 0.1), target, boxes=9) == 0).all()
    blind = Linear(dtype)
    nn.init.zeros_(blind.weight)
    assert (metrics.box_sensitivity(blind, images, maps, target, boxes=9) == 0).all()
    flat = torch.ones_like(images)
    assert (metrics.box_sensitivity(Bent(dtype), flat, maps, target, boxes=9, baseline="mean") == 0).all()
    square = images[..., :H], maps[..., :H]
    judge = Linear(dtype)
    judge.weight = nn.Parameter(judge.weight[..., :H])
    assert (metrics.box_sensitivity(judge, *square, target, sides=H, boxes=9) == 0).all()  # there is one place


METRICS = {
    "fidelity": metrics.fidelity,
    "fidelity of cells": lambda *given, **options: metrics.fidelity(*given, steps=5, cells=(2, 4), **options),
    "box sensitivity": metrics.box_sensitivity,
}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_the_batch_is_not_felt(case, metric):
    whole = metric(Bent(), *case)
    assert whole.shape == (5,)
    assert len(set(whole.tolist())) == 5
    single = [metric(Judge(Bent(), batch_size=3), *(each[i : i + 1] for each in case)) for i in range(5)]
    assert_close(torch.cat(single), whole, rtol=1e-10, atol=1e-12)
    turned = metric(Judge(Bent(), batch_size=500), *(each.flip(0) for each in case))
    assert_close(turned.flip(0), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_answers_are_of_the_judges_precision(case, metric):
    images, maps, target = case
    narrow = metric(Bent(torch.float32), images.float(), maps.half(), target)
    assert narrow.dtype == torch.float32
    wide = metric(Bent(), images.float().double(), maps.half(), target)
    assert wide.dtype == torch.float64
    assert_close(narrow.double(), wide, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_one_class_for_all_and_no_image(case, metric):
    images, maps, _ = case
    assert_close(metric(Bent(), images, maps, 2), metric(Bent(), images, maps, torch.full((5,), 2)), rtol=0, atol=0)
    empty = torch.zeros(0, 3, H, W), torch.zeros(0, H, W), torch.zeros(0, dtype=torch.int64)
    assert metric(Bent(), *empty).shape == (0,)


BAD = [
    ({"judge": len}, TypeError, "judge must be a Judge or a network"),
    ({"images": torch.zeros(2, 3, 4)}, ValueError, "images must have 4 dimensions"),
    ({"attribution": [0.0]}, TypeError, "attribution must be a torch.Tensor, got list"),
    ({"attribution": torch.zeros(2, 7, 7)}, ValueError, r"attribution must have shape \(2, 6, 8\).*got \(2, 7, 7\)"),
    ({"attribution": torch.full((2, H, W), torch.inf)}, ValueError, "attribution must be finite"),
    ({"target": torch.tensor([[0, 1], [1, 2]])}, ValueError, r"target must have shape \(2,\), got \(2, 2\)"),
    ({"target": 3}, ValueError, r"target must lie in \[0, 2\], got 3|got values from 3 to 3"),
    ({"target": 0.5}, TypeError, "target must be an int"),
    ({"baseline": "black"}, ValueError, "kind must be one of 'blank', 'mean', 'blur', got 'black'"),
]
BAD_STEPS = [
    ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    ({"steps": 49}, ValueError, "steps must be at most 48, the number of positions, got 49"),
    ({"steps": 9, "cells": (2, 4)}, ValueError, "steps must be at most 8, the number of positions, got 9"),
    ({"cells": (7, 2)}, ValueError, r"cells must be at most \(6, 8\), the number of pixels, got \(7, 2\)"),
    ({"cells": 0}, ValueError, r"cells\[0\] must be at least 1, got 0"),
    ({"cells": "2x4"}, TypeError, r"cells must be an int or a pair \(H, W\), got str"),
]
BAD_BOXES = [
    ({"boxes": 1}, ValueError, "boxes must be at least 2, got 1"),
    ({"sides": ()}, ValueError, "sides must be at least one, got none"),
    ({"sides": 1.0}, ValueError, r"sides must be in \(0, 1\) where they are shares of the shorter side, got 1.0"),
    ({"sides": (2, 7)}, ValueError, "sides must be at most 6, the images' shorter side, got 7"),
    ({"sides": 0}, ValueError, "sides must be at least 1, got 0"),
    ({"sides": "half"}, TypeError, "sides must be an int, got str"),
    ({"seed": 0.5}, TypeError, "seed must be an int, got float"),
    ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
]
CASES = [
    *((metrics.fidelity, *bad) for bad in BAD + BAD_STEPS),
    *((metrics.box_sensitivity, *bad) for bad in BAD + BAD_BOXES),
]


@pytest.mark.parametrize(
    ("metric", "change", "error", "words"), CASES, ids=[f"{metric.__name__}: {words}" for metric, *_, words in CASES]
)
def test_bad_arguments_are_named(metric, change, error, words):
    fitting = {"judge": Linear(torch.float32), "images": torch.zeros(2, 3, H, W), "target": 0}
    fitting |= {"attribution": torch.zeros(2, H, W)} | change
    given = [fitting.pop(name) for name in ("judge", "images", "attribution", "target")]
    with pytest.raises(error, match=words):
        metric(*given, **fitting)


def test_a_judges_logit_is_that_of_the_target(case):
    images, _, target = case
    network = Bent()
    expected = [network.numpy(image, label) for image, label in zip(images.numpy(), target.tolist(), strict=True)]
    judge = Judge(network, multi_label=True, batch_size=2)
    assert judge.logit(images, target).tolist() == pytest.approx(expected, abs=1e-12)
    assert_close(judge.probability(images, target), judge.logit(images, target).sigmoid())
    with pytest.raises(ValueError, match=r"target must have shape \(5,\), got \(5, 1\)"):
        judge.logit(images, target.unsqueeze(1))

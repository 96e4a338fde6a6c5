"""Attribution metrics: against numpy on the very images the judge was shown, and against a network that is linear."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.testing import assert_close

from mhex_vision.metrics import attribution as metrics
from mhex_vision.metrics.judge import Judge

SIZE = (7, 6)
PIXELS = SIZE[0] * SIZE[1]


class Seen(nn.Module):
    """A small network that is not linear, and remembers what it was shown."""

    def __init__(self, seed=3, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(3 * PIXELS, 8), nn.Linear(8, 3)
        self.to(dtype)
        self.images = []

    def forward(self, images):
        self.images.append(images.clone())
        return self.second(torch.tanh(self.first(images.flatten(1))))


class LinearJudge(nn.Module):
    """Logits that are linear in the pixels."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, 3, *SIZE, dtype=dtype))

    def forward(self, images):
        return torch.einsum("bchw,kchw->bk", images, self.weight) + 0.3

    def exact(self, images, target, baseline=0):
        """w (x - x0), summed over channels."""
        return (self.weight[target] * (images - baseline)).sum(dim=1).detach()


@pytest.fixture
def case(make_images):
    """Images, attributions of any sign, classes."""
    images = make_images(4, SIZE, seed=2, dtype=torch.float64)
    maps = torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return images, maps, torch.tensor([0, 2, 1, 1])


def value(network, images, target, output):
    logits = network(torch.as_tensor(images)).detach().numpy()
    if output == "probability":
        logits = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return logits[:, target]


def shown_one_by_one(images, maps, target, baseline, metric, **options):
    """For each image the I of every draw, read off what the judge was shown, and the judge's answers: numpy."""
    for index, (image, label) in enumerate(zip(images, target.tolist(), strict=True)):
        judge = Seen()
        metric(judge, image[None], maps[index][None], label, baseline=baseline, **options)
        original, *varied = (each.numpy() for each in torch.cat(judge.images))
        assert (original == image.numpy()).all()
        x = image.numpy()
        x0 = np.zeros_like(x) if baseline == "blank" else np.broadcast_to(x.mean(axis=(1, 2), keepdims=True), x.shape)
        moves = []
        for other in varied:
            share = (x - other) / (x - x0)
            assert np.allclose(share, share[:1], atol=1e-9)  # all channels alike
            moves.append(share[0])
        output = options.get("output", "probability")
        change = value(Seen(), x[None], label, output) - value(Seen(), np.stack(varied), label, output)
        yield maps[index].numpy(), np.stack(moves), change


def summed(attribution, move):
    total = 0.0
    for y in range(SIZE[0]):
        for x in range(SIZE[1]):
            total += attribution[y, x] * move[y, x]
    return total


@pytest.mark.parametrize("baseline", ["blank", "mean"])
@pytest.mark.parametrize("output", ["probability", "logit"])
@pytest.mark.parametrize("perturbation", ["square", "noise"])
@pytest.mark.parametrize("normalize", [True, False])
def test_infidelity_equals_numpy(case, perturbation, normalize, output, baseline):
    images, maps, target = case
    options = {"perturbation": perturbation, "normalize": normalize, "draws": 9, "output": output}
    expected = []
    for attribution, moves, change in shown_one_by_one(images, maps, target, baseline, metrics.infidelity, **options):
        claimed = np.array([summed(attribution, move) for move in moves])
        if normalize:
            claimed = np.linalg.lstsq(claimed[:, None], change, rcond=None)[0] * claimed
        expected.append(np.mean((claimed - change) ** 2))
    result = metrics.infidelity(Judge(Seen(), batch_size=5), *case, baseline=baseline, **options)
    assert_close(result, torch.tensor(expected), rtol=1e-8, atol=1e-12)


def test_squares_are_squares_of_the_sizes_asked_for(case):
    images, maps, target = case
    sides = set()
    for _, moves, _ in shown_one_by_one(images, maps, target, "blank", metrics.infidelity, draws=40, sides=(0.3, 0.7)):
        for move in moves.round(9):
            rows, columns = np.flatnonzero(move.any(axis=1)), np.flatnonzero(move.any(axis=0))
            block = move[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert set(move.flat) == {0, 1}
            assert block.all()
            assert block.shape[0] == block.shape[1]
            sides.add(block.shape[0])
    assert sides == {2, 3, 4}


def test_every_place_of_a_square_is_as_likely():
    draw = metrics._squares(3, 4, (0.6, 0.6))
    squares = draw(np.random.default_rng(0), 6000)
    places = {tuple(each.ravel()): 0 for each in squares}
    for each in squares:
        places[tuple(each.ravel())] += 1
    assert len(places) == 2 * 3
    assert all(abs(count - 1000) < 150 for count in places.values())


def test_noise_has_the_deviation_asked_for():
    moves = metrics._noise(20, 30, 0.4)(np.random.default_rng(0), 50)
    assert moves.shape == (50, 20, 30)
    assert abs(moves.std() - 0.4) < 0.01
    assert abs(moves.mean()) < 0.01


@pytest.mark.parametrize("perturbation", ["square", "noise"])
@pytest.mark.parametrize("baseline", ["blank", "mean", "blur"])
def test_what_is_exact_for_a_linear_judge(case, perturbation, baseline):
    images, _, target = case
    judge = LinearJudge()
    exact = judge.exact(images, target, metrics.baseline_of(images, baseline))
    options = {"perturbation": perturbation, "baseline": baseline, "output": "logit"}
    assert_close(
        metrics.infidelity(judge, images, exact, target, normalize=False, **options),
        torch.zeros(4, dtype=torch.float64),
        rtol=0,
        atol=1e-12,
    )
    # In other units only the best factor finds back.
    assert (metrics.infidelity(judge, images, 5 * exact, target, normalize=False, **options) > 0.01).all()
    assert (metrics.infidelity(judge, images, -5 * exact, target, **options) < 1e-12).all()
    assert (metrics.infidelity(judge, images, exact.flip(1), target, **options) > 1e-3).all()


def test_infidelity_of_nothing_is_the_power_of_the_change(case):
    images, maps, target = case
    expected = []
    for _, _, change in shown_one_by_one(images, maps, target, "blank", metrics.infidelity, draws=12):
        expected.append(np.mean(change**2))
    nothing = metrics.infidelity(Seen(), images, torch.zeros_like(maps), target, draws=12)
    assert_close(nothing, torch.tensor(expected))
    assert (metrics.infidelity(Seen(), images, maps, target, draws=12) <= nothing).all()


@pytest.mark.parametrize("baseline", ["blank", "mean"])
@pytest.mark.parametrize("output", ["probability", "logit"])
@pytest.mark.parametrize(("n", "count"), [(1, 1), (9, 9), (PIXELS - 1, PIXELS - 1), (0.25, 10), (0.001, 1)])
def test_sensitivity_n_equals_scipy(case, n, count, output, baseline):
    images, maps, target = case
    options = {"n": n, "subsets": 15, "output": output}
    expected = []
    for attribution, moves, change in shown_one_by_one(
        images, maps, target, baseline, metrics.sensitivity_n, **options
    ):
        assert (moves.round(9).sum(axis=(1, 2)) == count).all()
        assert set(moves.round(9).flat) == {0, 1}
        expected.append(stats.pearsonr([summed(attribution, move) for move in moves], change)[0])
    result = metrics.sensitivity_n(Judge(Seen(), batch_size=7), *case, baseline=baseline, **options)
    assert_close(result, torch.tensor(expected), rtol=1e-8, atol=1e-10)


def test_every_pixel_is_as_often_in_a_subset():
    often = metrics._subsets(*SIZE, 10)(np.random.default_rng(0), 4000).mean(axis=0)
    assert abs(often - 10 / PIXELS).max() < 0.03


def test_sensitivity_n_sees_neither_scale_nor_offset(case):
    images, _, target = case
    judge = LinearJudge()
    exact = judge.exact(images, target)
    for maps, wanted in ((exact, 1), (exact * 1e-6 + 40, 1), (-exact, -1)):
        result = metrics.sensitivity_n(judge, images, maps, target, output="logit")
        assert_close(result, torch.full((4,), float(wanted), dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sensitivity_n_without_spread_is_not_defined(case, dtype):
    images, maps, target = (each.to(dtype) if each.is_floating_point() else each for each in case)
    assert metrics.sensitivity_n(Seen(dtype=dtype), images, torch.full_like(maps, 0.1), target).isnan().all()
    blind = LinearJudge(dtype)
    nn.init.zeros_(blind.weight)
    assert metrics.sensitivity_n(blind, images, maps, target).isnan().all()
    one = torch.cat([maps[:1], torch.ones_like(maps[1:])])
    assert metrics.sensitivity_n(Seen(dtype=dtype), images, one, target).isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize("baseline", ["blank", "mean"])
@pytest.mark.parametrize("output", ["probability", "logit"])
def test_completeness_equals_numpy(case, output, baseline):
    images, maps, target = case
    expected = []
    for image, attribution, label in zip(images.numpy(), maps.numpy(), target.tolist(), strict=True):
        empty = (
            np.zeros_like(image) if baseline == "blank" else np.zeros_like(image) + image.mean((1, 2))[:, None, None]
        )
        change = (value(Seen(), image[None], label, output) - value(Seen(), empty[None], label, output)).item()
        expected.append(abs(attribution.sum() - change) / abs(change))
    result = metrics.completeness(Seen(), images, maps, target, output=output, baseline=baseline)
    assert_close(result, torch.tensor(expected))


def test_completeness_of_what_adds_up(case):
    images, maps, target = case
    judge = LinearJudge()
    assert (metrics.completeness(judge, images, judge.exact(images, target), target) < 1e-12).all()
    assert_close(metrics.completeness(judge, images, maps * 0, target), torch.ones(4, dtype=torch.float64))
    images = torch.cat([images[:1] * 0, images[1:]])
    assert metrics.completeness(judge, images, maps, target).isnan().tolist() == [True, False, False, False]


METRICS = {
    "infidelity": metrics.infidelity,
    "infidelity, noise": lambda *given, **options: metrics.infidelity(*given, perturbation="noise", **options),
    "sensitivity-n": metrics.sensitivity_n,
    "completeness": metrics.completeness,
}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_the_batch_is_not_felt(case, metric):
    """Neither how it was split nor in which order it came, nor how many images the judge takes at a time."""
    whole = metric(Seen(), *case)
    assert len(set(whole.tolist())) == 4
    parts = [metric(Judge(Seen(), batch_size=3), *(each[i] for each in case)) for i in (slice(0, 1), slice(1, 4))]
    assert_close(torch.cat(parts), whole, rtol=1e-10, atol=1e-12)
    turned = metric(Judge(Seen(), batch_size=500), *(each.flip(0) for each in case))
    assert_close(turned.flip(0), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("metric", list(METRICS.values())[:3], ids=list(METRICS)[:3])
def test_the_seed_decides(case, metric):
    first, again, other = (metric(Seen(), *case, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.isclose(first, other, rtol=1e-3).any()


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_answers_are_of_the_judges_precision(case, metric):
    images, maps, target = case
    narrow, wide = images.float(), images.float().double()
    result = metric(Seen(dtype=torch.float32), narrow, maps.float(), target)
    assert result.dtype == torch.float32
    reference = metric(Seen(), wide, maps, target)
    assert reference.dtype == torch.float64
    assert_close(result.double(), reference, rtol=2e-3, atol=1e-5)  # the draws are the same


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_one_class_for_all(case, metric):
    images, maps, _ = case
    everywhere = torch.full((4,), 2)
    assert_close(metric(Seen(), images, maps, 2), metric(Seen(), images, maps, everywhere), rtol=0, atol=0)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_no_image_gives_no_value(metric):
    empty = torch.zeros(0, 3, *SIZE), torch.zeros(0, *SIZE), torch.zeros(0, dtype=torch.int64)
    assert metric(Seen(), *empty).shape == (0,)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_the_judge_may_be_another_network(case, metric, make_classifier):
    images, maps, target = case
    judge = make_classifier().double().train()
    assert metric(judge, images, maps, target).isfinite().all()
    assert judge.training


BAD = [
    ({"judge": len}, TypeError, "judge must be a Judge or a network"),
    ({"images": torch.zeros(2, 3, 4)}, ValueError, "images must have 4 dimensions"),
    ({"attribution": [0.0]}, TypeError, "attribution must be a torch.Tensor, got list"),
    ({"attribution": torch.zeros(2, 7, 7)}, ValueError, r"attribution must have shape \(2, 7, 6\).*got \(2, 7, 7\)"),
    ({"attribution": torch.full((2, 7, 6), torch.nan)}, ValueError, "attribution must be finite"),
    ({"target": torch.tensor([[0, 1], [1, 2]])}, ValueError, r"target must have shape \(2,\), got \(2, 2\)"),
    ({"target": torch.tensor([0, 7])}, ValueError, r"target must lie in \[0, 2\], got values from 0 to 7"),
    ({"target": -1}, ValueError, "target must lie in"),
    ({"target": 0.5}, TypeError, "target must be an int"),
    ({"baseline": "black"}, ValueError, "kind must be one of 'blank', 'mean', 'blur', got 'black'"),
    ({"output": "loss"}, ValueError, "output must be one of 'probability', 'logit', got 'loss'"),
]
BAD_DRAWS = [
    (
        metrics.infidelity,
        {"perturbation": "cut"},
        ValueError,
        "perturbation must be one of 'square', 'noise', got 'cut'",
    ),
    (metrics.infidelity, {"draws": 0}, ValueError, "draws must be at least 1, got 0"),
    (
        metrics.infidelity,
        {"sides": (0.5, 0.1)},
        ValueError,
        r"sides must be two numbers in \(0, 1\], the shorter first",
    ),
    (metrics.infidelity, {"sides": 0.5}, TypeError, "sides must be a sequence of numbers, got float"),
    (metrics.infidelity, {"deviation": -1.0, "perturbation": "noise"}, ValueError, "deviation must be at least 0"),
    (metrics.infidelity, {"normalize": 1}, TypeError, "normalize must be a bool, got int"),
    (metrics.infidelity, {"seed": 0.5}, TypeError, "seed must be an int, got float"),
    (metrics.sensitivity_n, {"n": 42}, ValueError, "n must be below 42, the number of pixels, got 42"),
    (metrics.sensitivity_n, {"n": 0}, ValueError, "n must be at least 1, got 0"),
    (
        metrics.sensitivity_n,
        {"n": 1.0},
        ValueError,
        r"n must be in \(0, 1\) where it is a share of the pixels, got 1.0",
    ),
    (metrics.sensitivity_n, {"n": "all"}, TypeError, "n must be an int, got str"),
    (metrics.sensitivity_n, {"subsets": 1}, ValueError, "subsets must be at least 2, got 1"),
]
CASES = [(metric, *case) for metric in list(METRICS.values())[1:] for case in BAD] + BAD_DRAWS


@pytest.mark.parametrize(("metric", "change", "error", "words"), CASES, ids=[words for *_, words in CASES])
def test_bad_arguments_are_named(metric, change, error, words):
    fitting = {"judge": LinearJudge(torch.float32), "images": torch.zeros(2, 3, *SIZE), "target": 0}
    fitting |= {"attribution": torch.zeros(2, *SIZE)} | change
    given = [fitting.pop(name) for name in ("judge", "images", "attribution", "target")]
    with pytest.raises(error, match=words):
        metric(*given, **fitting)


@pytest.mark.parametrize("options", [{}, {"gate": False}, {"at": "downsample"}, {"activation": "shortcut"}], ids=str)
@pytest.mark.parametrize("target", [1, torch.tensor([2, 0])], ids=["int", "(B,)"])
def test_head_completeness_is_what_the_maps_add_up_to(make_classifier, make_images, options, target):
    model = make_classifier(**options).double().train()
    images = make_images(dtype=torch.float64)
    found = metrics.head_completeness(model, images, target)
    assert model.training
    maps = model.eval().explain(images, target, beta=1.0, tau_pos=0.0, tau_neg=0.0, rectify=False)
    output = model(images)
    labels = torch.as_tensor(target).expand(2).tolist()
    for block in range(len(model.blocks)):
        whole = (maps.positive[block] + maps.negative[block]).double().mean(dim=(1, 2))
        for index, label in enumerate(labels):
            matrix = model.equivalent_matrices()[block][label].tolist()
            activation = output.activations[block][index].detach().numpy()
            evidence = sum(weight * activation[k].mean() for k, weight in enumerate(matrix))
            logit = output.head_logits[block][index, label].item()
            assert found.evidence[index, block].item() == pytest.approx(evidence, abs=1e-10)
            assert whole[index].item() == pytest.approx(evidence, abs=1e-5)
            assert found.logits[index, block].item() == pytest.approx(logit, abs=1e-10)
            assert found.relative_gap[index, block].item() == pytest.approx(
                abs(evidence - logit) / abs(logit), rel=1e-6
            )


def test_a_block_without_gate_and_without_negative_means_is_complete(make_classifier, make_images):
    model = make_classifier(gate=False)
    with torch.no_grad():
        for step, bias in zip(model.backbone.steps, (50.0, 500.0, 50000.0), strict=True):
            step.norm.bias.fill_(bias)
    assert (metrics.head_completeness(model, make_images(), 0).relative_gap < 1e-4).all()


def test_a_logit_of_zero_has_no_relative_gap():
    found = metrics.HeadCompleteness(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, -4.0]]))
    assert_close(found.relative_gap, torch.tensor([[torch.nan, 1.5]]), equal_nan=True)


def test_head_completeness_of_half_precision_and_of_no_image(make_classifier, make_images):
    model = make_classifier()
    assert metrics.head_completeness(model, make_images(0), 0).evidence.shape == (0, 3)
    half = metrics.head_completeness(model.bfloat16(), make_images(dtype=torch.bfloat16), 0)
    assert half.evidence.dtype == half.logits.dtype == torch.float32


def test_head_completeness_refuses_what_does_not_fit(make_classifier, make_images):
    with pytest.raises(TypeError, match="model must be an MHEXClassifier, got Linear"):
        metrics.head_completeness(nn.Linear(2, 2), make_images(), 0)
    with pytest.raises(ValueError, match=r"target must have shape \(2,\), got \(2, 1\)"):
        metrics.head_completeness(make_classifier(), make_images(), torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="images must have 4 dimensions"):
        metrics.head_completeness(make_classifier(), torch.zeros(3, 4, 4), 0)

"""Sanity checks: similarity against scipy, and which layer becomes random when, and how."""

import copy
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats
from torch import nn
from torch.testing import assert_close

from mhex_vision import MHEXClassifier, Preprocessing
from mhex_vision.data import DataBundle
from mhex_vision.data.sets import ArrayImages, FolderImages
from mhex_vision.metrics import sanity


def explain(model, images, target):
    return model.explain(images, target).saliency


def gradient(model, images, target):
    """An explainer that needs gradients, of any network."""
    images = images.clone().requires_grad_()
    model(images).gather(1, target.unsqueeze(1)).sum().backward()
    return images.grad.abs().sum(dim=1)


@pytest.fixture
def pair():
    """Maps with many equal values, one nearly constant, one all negative."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(4, 14, 17, generator=generator, dtype=torch.float64) for _ in range(2))
    second[0] = first[0] + 0.1 * second[0]
    first[1], second[1] = (each[1].clamp(min=0).mul(2).round() for each in (first, second))
    first[2] = 7 + 1e-9 * first[2]
    second[3] = -1 - second[3] ** 2
    return first, second


@pytest.mark.parametrize(("kind", "reference"), [("spearman", stats.spearmanr), ("pearson", stats.pearsonr)])
def test_correlations_equal_scipy(pair, kind, reference):
    first, second = pair
    expected = [reference(a.numpy().ravel(), b.numpy().ravel())[0] for a, b in zip(first, second, strict=True)]
    assert_close(sanity.similarity(first, second, kind=kind), torch.tensor(expected), rtol=1e-6, atol=1e-7)


def ssim_by_scipy(first, second):
    """Wang et al. 2004 with scipy's Gaussian filter, whose window is cut at 5, where it lies inside."""
    first, second = ((each - each.min()) / (each.max() - each.min()) for each in (first, second))

    def blur(values):
        return ndimage.gaussian_filter(values, 1.5, truncate=3.4)[5:-5, 5:-5]

    a, b = blur(first), blur(second)
    var_a, var_b, cov = blur(first**2) - a**2, blur(second**2) - b**2, blur(first * second) - a * b
    c1, c2 = 0.01**2, 0.03**2
    return np.mean((2 * a * b + c1) * (2 * cov + c2) / ((a**2 + b**2 + c1) * (var_a + var_b + c2)))


def test_ssim_equals_scipy(pair):
    first, second = pair
    expected = [ssim_by_scipy(a.numpy(), b.numpy()) for a, b in zip(first, second, strict=True)]
    assert_close(sanity.similarity(first, second, kind="ssim"), torch.tensor(expected), rtol=1e-7, atol=1e-9)


def test_ssim_of_small_maps_by_hand():
    """2 x 4: the window is cut to 1 x 3."""
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.rand(1, 2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = ((each[0].numpy() - each.min().item()) / (each.max() - each.min()).item() for each in (first, second))
    bell = np.exp(-np.array([1, 0, 1]) / (2 * 1.5**2))
    bell /= bell.sum()
    values = []
    for row in range(2):
        for column in range(2):
            p, q = a[row, column : column + 3], b[row, column : column + 3]
            mp, mq = (bell * p).sum(), (bell * q).sum()
            vp, vq, cov = (
                (bell * (x - mx) * (y - my)).sum() for x, mx, y, my in ((p, mp, p, mp), (q, mq, q, mq), (p, mp, q, mq))
            )
            values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert sanity.similarity(first, second, kind="ssim").item() == pytest.approx(np.mean(values))


@pytest.mark.parametrize("kind", sanity.KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_map_is_like_itself(kind, dtype):
    maps = torch.randn(3, 12, 13, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = sanity.similarity(maps, maps, kind=kind)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(found, torch.ones_like(found))
    if kind != "ssim":
        assert_close(sanity.similarity(maps, -maps, kind=kind), -torch.ones_like(found))


@pytest.mark.parametrize("kind", sanity.KINDS)
def test_similarity_of_one_pair_is_its_own(pair, kind):
    first, second = pair
    whole = sanity.similarity(first, second, kind=kind)
    single = [sanity.similarity(first[i : i + 1], second[i : i + 1], kind=kind) for i in range(4)]
    assert_close(torch.cat(single), whole, rtol=1e-12, atol=1e-12)
    assert sanity.similarity(first[:0], second[:0], kind=kind).shape == (0,)


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_a_constant_map_correlates_with_nothing(kind):
    maps = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) * 1e-30
    constant = torch.stack([maps[0], torch.full((4, 4), 0.1)])
    assert sanity.similarity(maps, constant, kind=kind).isnan().tolist() == [False, True]
    assert sanity.similarity(constant, maps, kind=kind).isnan().tolist() == [False, True]


def test_ssim_of_constant_maps_is_defined():
    zeros = torch.zeros(1, 4, 4)
    assert sanity.similarity(zeros, zeros + 3, kind="ssim").item() == 1


@pytest.mark.parametrize(
    ("first", "second", "kind", "error", "words"),
    [
        ([1], torch.ones(1, 2, 2), "ssim", TypeError, "first must be a torch.Tensor, got list"),
        (
            torch.ones(1, 2, 2),
            torch.ones(1, 2, 3),
            "ssim",
            ValueError,
            r"second must have the shape of first, \(1, 2, 2\)",
        ),
        (torch.ones(1, 2, 2), torch.ones(2, 2), "ssim", ValueError, "second must have 3 dimensions"),
        (torch.ones(1, 2, 2), torch.full((1, 2, 2), torch.nan), "ssim", ValueError, "second must be finite"),
        (torch.ones(1, 2, 2), torch.ones(1, 2, 2), "cosine", ValueError, "kind must be one of 'spearman', 'ssim'"),
    ],
    ids=["list", "shape", "rank", "nan", "kind"],
)
def test_bad_maps_are_named(first, second, kind, error, words):
    with pytest.raises(error, match=words):
        sanity.similarity(first, second, kind=kind)


def named(layers):
    return {layer.name: set(layer.modules) for layer in layers}


def test_the_layers_of_a_classifier(make_classifier, make_images):
    layers = sanity.layers_of(make_classifier(), make_images())
    assert [layer.name for layer in layers] == ["steps.2", "steps.1", "steps.0", "stem"]
    assert named(layers) == {
        "stem": {"backbone.stem"},
        "steps.0": {"backbone.steps.0.conv", "backbone.steps.0.norm", "blocks.0.gate", "blocks.0.head"},
        "steps.1": {"backbone.steps.1.conv", "backbone.steps.1.norm", "blocks.1.gate", "blocks.1.head"},
        "steps.2": {
            "backbone.steps.2.conv",
            "backbone.steps.2.norm",
            "backbone.steps.2.project",
            "blocks.2.gate",
            "blocks.2.head",
        },
    }


def test_the_layers_of_a_classifier_with_its_own_last_layer(make_classifier, make_images):
    layers = sanity.layers_of(make_classifier(classifier="keep", at="downsample"), make_images())
    assert [layer.name for layer in layers] == ["classifier", "steps.2", "stem"]
    assert named(layers)["classifier"] == {"backbone.fc"}
    assert "backbone.steps.0.conv" in named(layers)["stem"]


def test_the_layers_of_a_resnet(make_images):
    model = MHEXClassifier.from_backbone("resnet18", 3)
    layers = sanity.layers_of(model, make_images())
    stages = [f"layer{stage}.{block}" for stage in (4, 3, 2, 1) for block in (1, 0)]
    assert [layer.name for layer in layers] == [*stages, "stem"]
    assert named(layers)["stem"] == {"backbone.conv1", "backbone.bn1"}
    every = {name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None}
    assert set().union(*named(layers).values()) == every


class Attention(nn.Module):
    """Attention uses its projection's weights without running it; `scale` belongs to the root, `unused` to nobody."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3))
        self.blocks = nn.ModuleDict({"late": nn.Linear(4, 3), "early": nn.MultiheadAttention(4, 1, batch_first=True)})

    def forward(self, images):
        tokens = images.flatten(2).transpose(1, 2)[..., :1].expand(-1, -1, 4)
        return self.blocks["late"](self.blocks["early"](tokens, tokens, tokens)[0].mean(dim=1)) * self.scale


def test_the_layers_of_any_network(networks, make_images):
    net = networks.Net()
    assert [layer.name for layer in sanity.layers_of(net, make_images())] == [
        "fc",
        *(f"steps.{i}.{part}" for i, part in ((2, "project"), (2, "norm"), (2, "conv"))),
        *(f"steps.{i}.{part}" for i in (1, 0) for part in ("norm", "conv")),
        "stem",
    ]
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert named(sanity.layers_of(Attention(), make_images(1, (2, 2)))) == {
        "Attention": {""},
        "blocks.early": {"blocks.early", "blocks.early.out_proj"},
        "blocks.late": {"blocks.late"},
    }
    traced = MHEXClassifier.from_backbone(networks.RawWeight(), 2, classifier="keep", image_size=64)
    assert "backbone" in set().union(*named(sanity.layers_of(traced, make_images())).values())


def changed(before, after):
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("order", ["cascading", "independent"])
def test_layers_become_random_in_order(make_classifier, make_images, order):
    model = make_classifier()
    before = copy.deepcopy(model.state_dict())
    states = []

    def watched(subject, images, target):
        assert not subject.training
        states.append(copy.deepcopy(subject.state_dict()))
        return explain(subject, images, target)

    results = sanity.parameter_randomization(model, watched, make_images(), 1, order=order)
    assert [result.layer for result in results] == ["steps.2", "steps.1", "steps.0", "stem"]
    assert not changed(before, states[0])
    so_far = set()
    for layer, state in zip(sanity.layers_of(model, make_images()), states[1:], strict=True):
        mine = {name for name in before if name.rpartition(".")[0] in layer.modules and "num_batches" not in name}
        so_far = so_far | mine if order == "cascading" else mine
        assert changed(before, state) == so_far
    assert not changed(before, model.state_dict())


def test_either_order_draws_the_same(make_classifier, make_images):
    states = {}

    def watched(subject, images, target):
        states.setdefault(order, []).append(copy.deepcopy(subject.state_dict()))
        return explain(subject, images, target)

    for order in ("cascading", "independent"):
        sanity.parameter_randomization(make_classifier(), watched, make_images(), 1, order=order)
    for after, alone in zip(states["cascading"][1:], states["independent"][1:], strict=True):
        for name in changed(states["cascading"][0], alone):
            assert torch.equal(after[name], alone[name])


def test_statistics_and_weights_are_those_of_a_fresh_network(make_classifier, make_images):
    final = {}

    def watched(subject, images, target):
        final.update(subject.state_dict())
        return explain(subject, images, target)

    sanity.parameter_randomization(make_classifier(), watched, make_images(), 1)
    assert not final["backbone.steps.1.norm.running_mean"].any()
    assert (final["backbone.steps.1.norm.running_var"] == 1).all()
    assert final["backbone.steps.1.conv.weight"].abs().max() <= 1 / 6  # 1 / sqrt(fan in of 36)


def test_similarities_are_those_of_the_maps(make_classifier, make_images):
    maps = []

    def watched(subject, images, target):
        maps.append(explain(subject, images, target))
        return maps[-1]

    target = torch.tensor([2, 0])
    results = sanity.parameter_randomization(make_classifier(), watched, make_images(), target, kind="ssim")
    for result, later in zip(results, maps[1:], strict=True):
        assert torch.equal(result.similarity, sanity.similarity(maps[0], later, kind="ssim"))
        assert (result.similarity < 0.999).all()


def test_an_explainer_that_ignores_the_network_is_found_out(make_classifier, make_images):
    results = sanity.parameter_randomization(make_classifier(), lambda model, x, t: x[:, 0], make_images(), 0)
    for result in results:
        assert_close(result.similarity, torch.ones(2))


def test_the_seed_decides_and_torchs_own_random_state_stays(make_classifier, make_images):
    model = make_classifier()
    runs = []
    for seed in (3, 3, 4):
        before = torch.get_rng_state()
        found = sanity.parameter_randomization(model, explain, make_images(), 1, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(torch.stack([result.similarity for result in found]))
        torch.rand(1)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("order", ["cascading", "independent"])
def test_any_network_and_explainers_with_gradients(networks, make_images, order):
    torch.manual_seed(0)
    net = networks.shaken(networks.Net())
    results = sanity.parameter_randomization(net.train(), gradient, make_images(), torch.tensor([0, 2]), order=order)
    assert len(results) == 9
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())
    assert (results[0].similarity < 1).all()


def test_what_cannot_be_reset_is_shuffled(make_images):
    torch.manual_seed(0)
    net = Attention().eval()
    seen = []

    def watched(subject, images, target):
        seen.append(copy.deepcopy(subject.state_dict()))
        return gradient(subject, images, target)

    results = sanity.parameter_randomization(
        net, watched, make_images(2, (3, 3)), 1, layers=["Attention", "blocks.early"]
    )
    assert [result.layer for result in results] == ["Attention", "blocks.early"]
    assert changed(seen[0], seen[1]) <= {"scale"}
    assert "blocks.early.in_proj_weight" in changed(seen[1], seen[2])
    assert "blocks.early.out_proj.weight" in changed(seen[1], seen[2])
    for name in ("scale", "blocks.early.in_proj_weight"):
        assert_close(seen[2][name].flatten().sort().values, seen[0][name].flatten().sort().values, rtol=0, atol=0)


def test_layers_may_be_chosen_and_named_as_modules(make_classifier, make_images):
    model = make_classifier()
    states = []

    def watched(subject, images, target):
        states.append(copy.deepcopy(subject.state_dict()))
        return explain(subject, images, target)

    names = ["steps.0", "blocks.2", "backbone.stem"]
    results = sanity.parameter_randomization(model, watched, make_images(), 1, layers=names)
    assert [result.layer for result in results] == names
    assert changed(states[1], states[2]) == {"blocks.2.gate.weight", "blocks.2.head.weight"}
    assert changed(states[2], states[3]) == {"backbone.stem.weight", "backbone.stem.bias"}


BAD = [
    ({"model": len}, TypeError, "model must be a network, got builtin"),
    ({"explainer": None}, TypeError, "explainer must be a function, got NoneType"),
    ({"explainer": lambda *_: None}, TypeError, "explainer must give a tensor, got NoneType"),
    ({"explainer": lambda *_: torch.zeros(2, 3, 3)}, ValueError, r"must have shape \(2, 32, 32\)"),
    ({"images": torch.zeros(3, 8, 8)}, ValueError, "images must have 4 dimensions"),
    ({"images": torch.zeros(0, 3, 8, 8)}, ValueError, "images must hold at least one, got none"),
    ({"target": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"target must have shape \(2,\), got \(2, 2\)"),
    ({"order": "random"}, ValueError, "order must be one of 'cascading', 'independent', got 'random'"),
    ({"kind": "cosine"}, ValueError, "kind must be one of 'spearman', 'ssim', 'pearson', got 'cosine'"),
    ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ({"seed": 0.5}, TypeError, "seed must be an int, got float"),
    ({"layers": "stem"}, TypeError, "layers must be a sequence of names, got str"),
    ({"layers": ["layer9"]}, ValueError, "layers must be modules or among 'steps.2', .*got 'layer9'"),
    (
        {"layers": ["backbone.steps.0.project"]},
        ValueError,
        "layers must have parameters, got 'backbone.steps.0.project'",
    ),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD, ids=[words for _, _, words in BAD])
def test_bad_arguments_are_named(make_classifier, make_images, change, error, words):
    fitting = {"model": make_classifier(), "explainer": explain, "images": make_images(), "target": 0} | change
    given = [fitting.pop(name) for name in ("model", "explainer", "images", "target")]
    with pytest.raises(error, match=words):
        sanity.parameter_randomization(*given, **fitting)


def test_label_randomization_compares_two_networks(make_classifier, make_images):
    first, second = make_classifier(seed=0).train(), make_classifier(seed=1)
    images, target = make_images(3), torch.tensor([0, 1, 2])
    found = sanity.label_randomization(first, second, explain, images, target, kind="pearson")
    assert first.training
    maps = [explain(model.eval(), images, target) for model in (first, second)]
    assert_close(found, sanity.similarity(*maps, kind="pearson"))
    assert_close(sanity.label_randomization(first, first, explain, images, 1), torch.ones(3))
    with pytest.raises(TypeError, match="trained_on_random_labels must be a network, got NoneType"):
        sanity.label_randomization(first, None, explain, images, 1)


def bundle(train, labels=3):
    return DataBundle(
        name="made up",
        train=train,
        validation=train,
        test=train,
        class_names=tuple("abc"[:labels]),
        multi_label=train.labels.ndim == 2,
        preprocessing=Preprocessing(size=8),
    )


@pytest.mark.parametrize("several", [False, True])
def test_labels_of_arrays_are_shuffled(several):
    images = torch.arange(60, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 8, 8)
    labels = torch.arange(60) % 3
    labels = nn.functional.one_hot(labels, 3).float() if several else labels
    data = bundle(ArrayImages(images, labels, torch.ones(60, 8, 8, dtype=torch.bool)))
    before = labels.clone()
    shuffled = sanity.shuffled_labels(data, seed=1)
    assert torch.equal(data.train.labels, before)
    assert data.validation is not None
    assert shuffled.validation is None
    assert shuffled.test is data.test
    assert shuffled.train.images is images
    assert shuffled.train.masks is data.train.masks
    assert not torch.equal(shuffled.train.labels, before)
    assert_close(shuffled.train.labels.sum(dim=0), before.sum(dim=0))
    assert torch.equal(sanity.shuffled_labels(data, seed=1).train.labels, shuffled.train.labels)
    assert not torch.equal(sanity.shuffled_labels(data, seed=2).train.labels, shuffled.train.labels)


def test_labels_of_files_are_shuffled(tmp_path):
    samples = []
    for number in range(8):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        samples.append((tmp_path / f"{number}.png", number % 2))
    data = bundle(FolderImages(samples, Preprocessing(size=8)))
    shuffled = sanity.shuffled_labels(data, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = shuffled.train.__getitems__(list(range(8)))
    assert batch.images[:, 0, 0, 0].tolist() == list(range(8))
    assert batch.labels.tolist() != data.train.labels.tolist()
    assert sorted(batch.labels.tolist()) == sorted(data.train.labels.tolist())
    assert data.train.labels.tolist() == [0, 1] * 4


def test_shuffling_refuses_what_is_no_data():
    with pytest.raises(TypeError, match="bundle must be a DataBundle, got list"):
        sanity.shuffled_labels([])

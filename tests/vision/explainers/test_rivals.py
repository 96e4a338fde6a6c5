"""Other people's methods compute what they should on our networks."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close


def grad_cam(features, gradients, size):
    """By hand: ReLU of the channels weighted by their mean gradients, scaled as pytorch-grad-cam scales."""
    weights = gradients.mean(dim=(2, 3), keepdim=True)
    return scaled(F.interpolate(scaled(F.relu((weights * features).sum(dim=1, keepdim=True))), size, mode="bilinear"))


def scaled(maps):
    maps = maps - maps.amin(dim=(-2, -1), keepdim=True)
    return (maps / (1e-7 + maps.amax(dim=(-2, -1), keepdim=True))).detach()


def at_block(model, index, images, targets):
    """S = x + r of a block, and the gradient of the targets' logits with respect to r, of the classifier itself."""
    caught = {}

    def add_nothing(block, inputs):
        shortcut, branch = inputs
        caught["nothing"] = torch.zeros_like(branch).requires_grad_()
        caught["sum"] = shortcut.detach() + branch.detach()
        return shortcut, branch + caught["nothing"]

    handle = model.blocks[index].register_forward_pre_hook(add_nothing)
    logits = model(images).logits
    handle.remove()
    (gradients,) = torch.autograd.grad(logits.gather(1, targets.unsqueeze(1)).sum(), caught["nothing"])
    return caught["sum"], gradients


@pytest.mark.parametrize(
    ("classifier", "gate", "objective", "index"),
    [(c, g, o, i) for c in ("drop", "keep") for g in (True, False) for o in ("layerwise", "joint") for i in (0, 1, 2)],
)
def test_grad_cam_of_a_block(make, make_classifier, make_images, classifier, gate, objective, index):
    model = make_classifier(classifier=classifier, gate=gate, objective=objective)
    images, targets = make_images(3, (16, 12)), torch.tensor([0, 2, 1])
    (expected,) = grad_cam(*at_block(model, index, images, targets), (16, 12)).unbind(1)
    maps = make("gradcam", layer=model.layer_names[index])(model, images, targets)
    assert_close(maps, expected, rtol=0, atol=1e-4)
    assert expected.any()


@pytest.mark.parametrize("classifier", ["drop", "keep"])
@pytest.mark.parametrize("gate", [True, False])
def test_grad_cam_does_not_depend_on_what_saliency_reads(make, make_classifier, make_images, classifier, gate):
    """Where that is the shortcut, the sum is made outside of the block."""
    images, targets = make_images(2, (16, 12)), torch.tensor([2, 1])
    kinds = [make_classifier(classifier=classifier, gate=gate, activation=kind) for kind in ("sum", "shortcut")]
    for layer in kinds[0].layer_names:
        explain = make("gradcam", layer=layer)
        assert_close(*(explain(model, images, targets) for model in kinds), rtol=0, atol=1e-4)


def test_grad_cam_of_the_block_that_predicts(make, make_classifier, make_images):
    """The last head reads the mean of S through two matrices, and nothing else."""
    model, images, targets = make_classifier(), make_images(2, (16, 12)), torch.tensor([2, 1])
    block = model.blocks[-1]
    features = at_block(model, 2, images, targets)[0].requires_grad_()
    logits = F.relu(features.mean(dim=(2, 3))) @ block.gate.weight.T @ block.head.weight.T
    assert_close(logits, model(images).logits)
    (gradients,) = torch.autograd.grad(logits.gather(1, targets.unsqueeze(1)).sum(), features)
    expected = grad_cam(features, gradients, (16, 12)).squeeze(1)
    assert_close(make("gradcam")(model, images, targets), expected, rtol=0, atol=1e-4)


def test_grad_cam_of_a_frozen_network(make, make_classifier, make_images):
    model = make_classifier(freeze_backbone=True, gate=False, classifier="keep")
    images, targets = make_images(2, (16, 12)), torch.tensor([2, 1])
    backbone = model.backbone
    features = backbone.steps[:2](backbone.stem(images))
    last = backbone.steps[2]
    total = (last.project(features) + last.norm(last.conv(features))).detach().requires_grad_()
    logits = backbone.fc(F.relu(total).mean(dim=(2, 3)))
    (gradients,) = torch.autograd.grad(logits.gather(1, targets.unsqueeze(1)).sum(), total)
    expected = grad_cam(total, gradients, (16, 12)).squeeze(1)
    assert_close(make("gradcam")(model, images, targets), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("layer", ["conv", "norm", "deep.0", "deep"])
def test_grad_cam_of_a_plain_network(make, make_plain, make_images, layer, inplace):
    """Whatever works in place behind the layer does not reach what the map is made of."""
    network = make_plain(inplace=inplace)
    images, targets = make_images(2, (16, 12)), torch.tensor([2, 1])
    plain = make_plain(inplace=False)
    steps = {
        "conv": plain.conv,
        "norm": plain.norm,
        "relu": plain.relu,
        "deep.0": plain.deep[0],
        "deep.1": plain.deep[1],
    }
    features, logits = images, images
    for name, step in steps.items():
        logits = step(logits)
        if name == ("deep.1" if layer == "deep" else layer):
            features = logits = logits.detach().requires_grad_()
    logits = plain.fc(logits.mean(dim=(2, 3)).relu())
    (gradients,) = torch.autograd.grad(logits.gather(1, targets.unsqueeze(1)).sum(), features)
    expected = grad_cam(features, gradients, (16, 12)).squeeze(1)
    assert_close(make("gradcam", layer=layer)(network, images, targets), expected, rtol=0, atol=1e-4)
    if layer == "deep":
        assert_close(make("gradcam")(network, images, targets), expected, rtol=0, atol=1e-4)


class Mixer(nn.Module):
    """One linear map over channels, of (B, C, h, w) by a convolution or of (B, h, w, C) by a linear layer."""

    def __init__(self, channels, last, norm):
        super().__init__()
        self.last = last
        self.stem = nn.Conv2d(3, channels, 3, padding=1, stride=2)
        weight, bias = torch.randn(channels, channels), torch.randn(channels)
        mix = nn.Linear(channels, channels) if last else nn.Conv2d(channels, channels, 1)
        mix.weight.data, mix.bias.data = weight.reshape(mix.weight.shape), bias
        self.mix = nn.Sequential(mix, nn.LayerNorm(channels)) if norm else mix
        self.fc = nn.Linear(channels, 3)

    def forward(self, images):
        features = self.stem(images)
        features = self.mix(features.permute(0, 2, 3, 1) if self.last else features)
        return self.fc(F.gelu(features).mean(dim=(1, 2) if self.last else (2, 3)))


@pytest.mark.parametrize("name", ["gradcam", "gradcam++", "layercam", "scorecam", "eigencam"])
@pytest.mark.parametrize(("channels", "size"), [(5, (16, 12)), (5, (16, 16)), (8, (16, 16)), (12, (24, 16))])
def test_maps_with_their_channels_last_are_read_by_channel(make, make_images, name, channels, size):
    """Every method gives what it gives the same network with (B, C, h, w), also with as many channels as rows."""
    networks = []
    for last in (True, False):
        torch.manual_seed(0)
        networks.append(Mixer(channels, last, norm=False).eval())
    images, targets = make_images(2, size), torch.tensor([2, 1])
    assert_close(networks[0](images), networks[1](images))
    last, first = (make(name, layer="mix")(network, images, targets) for network in networks)
    assert first.amax() > 0.5
    assert_close(last, first, atol=1e-4, rtol=1e-4)
    assert_close(make(name)(networks[0], images, targets), last)  # it is the deepest, too


def test_grad_cam_of_normalised_channels_by_hand(make, make_images):
    torch.manual_seed(0)
    network, images, targets = Mixer(6, last=True, norm=True).eval(), make_images(2, (16, 16)), torch.tensor([2, 1])
    features = network.mix(network.stem(images).permute(0, 2, 3, 1)).detach().requires_grad_()
    logits = network.fc(F.gelu(features).mean(dim=(1, 2)))
    (gradients,) = torch.autograd.grad(logits.gather(1, targets.unsqueeze(1)).sum(), features)
    expected = grad_cam(features.permute(0, 3, 1, 2), gradients.permute(0, 3, 1, 2), (16, 16)).squeeze(1)
    assert_close(make("gradcam", layer="mix")(network, images, targets), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["gradcam", "scorecam"])
@pytest.mark.parametrize("kind", ["mhex", "plain"])
def test_an_unknown_layer_is_answered_with_the_known_ones(make, make_classifier, make_plain, make_images, name, kind):
    network, known = (
        (make_classifier(), "steps.0, steps.1, steps.2")
        if kind == "mhex"
        else (make_plain(), "conv, norm, relu, deep, deep.0, deep.1, pool, unused, fc")
    )
    with pytest.raises(ValueError, match=f"layer must be one of {known}, got 'stepps'"):
        make(name, layer="stepps")(network, make_images(1, (8, 8)), torch.tensor([0]))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("relu", "layer must be run once in a forward pass, got 'relu', which is run more often"),
        ("unused", "layer must be run in every forward pass, got 'unused', which is not"),
        ("fc", r"layer must give a feature map \(B, C, h, w\) or \(B, h, w, C\), got 'fc', which gives shape \(1, 3\)"),
    ],
)
def test_a_layer_one_cannot_look_at(make, make_plain, make_images, layer, message):
    with pytest.raises(ValueError, match=message):
        make("gradcam", layer=layer)(make_plain(), make_images(1, (8, 8)), torch.tensor([0]))


def test_a_layer_that_has_no_part_in_the_logits(make, make_images):
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.aside, self.fc = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

        def forward(self, images):
            features = self.seen(images)
            self.aside(features)
            return self.fc(features.mean(dim=(2, 3)))

    network, images, target = Aside(), make_images(1, (8, 8)), torch.tensor([0])
    with pytest.raises(ValueError, match="layer must lie on the way to the logits, got 'aside'"):
        make("gradcam", layer="aside")(network, images, target)
    assert make("gradcam", layer="seen")(network, images, target).any()


def test_a_network_without_a_feature_map(make, make_images):
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    with pytest.raises(ValueError, match=r"model must have a layer with a feature map .* Sequential has none for"):
        make("gradcam")(network, make_images(1, (4, 4)), torch.tensor([0]))


def test_a_network_that_gives_no_logits(make, make_images):
    with pytest.raises(ValueError, match=r"model must give logits of shape \(6, K\), got \(6, 2, 4, 4\)"):
        make("integrated-gradients")(nn.Conv2d(3, 2, 1), make_images(1, (4, 4)), torch.tensor([0]))


def test_a_network_without_parameters(make, make_images):
    network = nn.Sequential(nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert make("gradcam")(network, make_images(1, (8, 8)), torch.tensor([2])).isfinite().all()


def test_eigen_cam_looks_at_no_class(make, make_plain, make_images):
    network, images, explain = make_plain(), make_images(1, (16, 16)), make("eigencam")
    assert torch.equal(explain(network, images, torch.tensor([0])), explain(network, images, torch.tensor([1])))


def test_score_cam_sees_no_negative_features_of_a_block(make, make_classifier, make_images):
    """Weights that sum up to one over channels, by hand; the signed sums give nothing but zeros here."""
    model, images, targets = make_classifier(), make_images(1, (16, 12)), torch.tensor([1])
    features = F.relu(at_block(model, 2, images, targets)[0])
    masks = F.interpolate(features, (16, 12), mode="bilinear", align_corners=True).squeeze(0).unsqueeze(1)
    masks = masks - masks.amin(dim=(2, 3), keepdim=True)
    scores = model(images * (masks / (masks.amax(dim=(2, 3), keepdim=True) + 1e-8))).logits[:, 1]
    total = (scores.softmax(dim=0)[None, :, None, None] * features).sum(dim=1, keepdim=True)
    expected = scaled(F.interpolate(scaled(total), (16, 12), mode="bilinear")).squeeze(1)
    assert_close(make("scorecam")(model, images, targets), expected, rtol=0, atol=1e-4)


def test_score_cam_does_not_depend_on_how_many_images_it_masks_at_a_time(make, make_plain, make_images):
    network, images, targets = make_plain(), make_images(2, (16, 12)), torch.tensor([0, 2])
    maps = [make("scorecam", batch_size=size)(network, images, targets) for size in (1, 32)]
    assert_close(*maps, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["mhex", "plain"])
@pytest.mark.parametrize("baseline", ["blank", "mean"])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_integrated_gradients_add_up(make, make_classifier, make_plain, make_images, kind, baseline, batch_size):
    network = make_classifier() if kind == "mhex" else make_plain()
    images, targets = make_images(5, (16, 12)), torch.tensor([0, 2, 1, 1, 0])
    explain = make("integrated-gradients", steps=100, baseline=baseline, batch_size=batch_size)
    maps = explain(network, images, targets)
    start = torch.zeros_like(images) if baseline == "blank" else images.mean(dim=(2, 3), keepdim=True)
    difference = logit(network, images, targets) - logit(network, start.expand_as(images), targets)
    assert_close(maps.sum(dim=(1, 2)), difference, rtol=0.01, atol=0.01 * float(difference.abs().max()))
    assert (maps < 0).any()


@pytest.mark.parametrize("kind", ["mhex", "plain"])
@pytest.mark.parametrize("evaluations", [1, 40, 300])
def test_shapley_values_add_up(make, make_classifier, make_plain, make_images, kind, evaluations):
    import cv2

    network = make_classifier() if kind == "mhex" else make_plain()
    images, targets = make_images(3, (12, 10)), torch.tensor([0, 2, 1])
    maps = make("shap", evaluations=evaluations, blur=4)(network, images, targets)
    blurred = torch.stack(
        [
            torch.from_numpy(cv2.blur(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), (4, 4))).permute(2, 0, 1)
            for image in images
        ]
    )
    difference = logit(network, images, targets) - logit(network, blurred, targets)
    assert_close(maps.sum(dim=(1, 2)), difference, rtol=1e-3, atol=1e-5)


def test_shapley_values_find_the_pixel_that_counts(make):
    class Corner(nn.Module):
        def forward(self, images):
            return torch.stack([images[:, :, 1, 2].sum(dim=1), images[:, :, 6, 5].sum(dim=1)], dim=1)

    images = torch.zeros(2, 3, 8, 8)
    images[:, :, 1, 2] = images[:, :, 6, 5] = 1
    maps = make("shap", evaluations=600, blur=8)(Corner(), images, torch.tensor([0, 1]))
    assert [int(one.argmax()) for one in maps] == [1 * 8 + 2, 6 * 8 + 5]


def test_numpys_own_generator_goes_on_as_if_nothing_had_happened(make, make_plain, make_images):
    np.random.seed(5)  # noqa: NPY002 - the generator that shap draws from
    expected = np.random.random(3)  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    make("shap")(make_plain(), make_images(2, (8, 8)), torch.tensor([0, 1]))
    assert np.array_equal(np.random.random(3), expected)  # noqa: NPY002


def logit(network, images, targets):
    with torch.no_grad():
        output = network(images)
    return getattr(output, "logits", output).gather(1, targets.unsqueeze(1)).squeeze(1)

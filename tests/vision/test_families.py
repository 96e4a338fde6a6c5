"""Kinds of networks that people use: where their maps have their channels, and what always worked."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision import models, ops

from mhex_vision import MHEXClassifier


@pytest.fixture
def twins(networks):
    """The same network with maps (B, H, W, C) and (B, C, H, W), with blocks of the same weights."""

    def make(**options):
        torch.manual_seed(0)
        last = networks.Mixer(last=True)
        first = networks.Mixer(last=False)
        first.load_state_dict(last.state_dict())
        made = [MHEXClassifier.from_backbone(network, 3, image_size=16, **options).eval() for network in (last, first)]
        made[1].load_state_dict(made[0].state_dict())
        return made

    return make


@pytest.mark.parametrize("options", [{}, {"classifier": "keep", "gate": False}, {"activation": "shortcut"}])
def test_maps_with_their_channels_last_are_read_by_channel(twins, make_images, tmp_path, networks, options):
    last, first = twins(**options)
    assert [addition.channels_last for addition in last._additions] == [True, True]
    assert not any(addition.channels_last for addition in first._additions)
    assert [block.channels for block in last.blocks] == [5, 5]
    images = make_images(3, (20, 12))  # of a size that it was not probed with, and not square
    ours, theirs = last(images), first(images)
    assert_close(ours, theirs)
    assert [tuple(activation.shape) for activation in ours.activations] == [(3, 5, 10, 6)] * 2
    assert_close(last.explain(images).saliency, first.explain(images).saliency)
    assert_close(last.explain(images, "all").positive, first.explain(images, "all").positive)
    assert_close(last.collaboration(images), first.collaboration(images))
    assert_close(copy.deepcopy(last)(images).logits, ours.logits, rtol=0, atol=0)
    assert_close(last.strip_heads()(images), ours.logits, rtol=0, atol=0)
    last.save_pretrained(tmp_path)
    loaded = MHEXClassifier.from_pretrained(tmp_path, backbone=networks.Mixer(last=True))
    assert_close(loaded(images).logits, ours.logits, rtol=0, atol=0)
    losses = [
        model.loss()(model.supervised_logits(output), torch.tensor([0, 1, 2]))
        for model, output in ((last, ours), (first, theirs))
    ]
    gradients = [
        torch.autograd.grad(loss, model.blocks[0].gate.weight)[0]
        for loss, model in zip(losses, (last, first), strict=True)
    ]
    assert_close(*gradients)


@pytest.mark.parametrize(
    ("name", "size", "channels", "last"),
    [
        ("swin_t", 32, 96, True),
        ("swin_v2_t", 32, 96, True),
        ("timm/mambaout_femto", 32, 48, True),
        ("timm/swin_tiny_patch4_window7_224:img_size=32", 32, 96, True),
        ("timm/swinv2_tiny_window16_256:img_size=64", 64, 96, True),
        ("timm/coatnet_nano_rw_224:img_size=64", 64, 64, False),
        ("timm/maxvit_rmlp_pico_rw_256:img_size=64", 64, 32, False),
    ],
)
def test_known_families_are_read_by_channel_and_keep_their_bits(make_images, name, size, channels, last):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    model = MHEXClassifier.from_backbone(
        name, 3, at="all", freeze_backbone=True, gate=False, classifier="keep", image_size=size
    ).eval()
    assert model.blocks[0].channels == channels
    assert len(model.blocks) >= 11  # all stages
    assert model._additions[0].channels_last == last
    images = make_images(3, (size, size))
    with torch.no_grad():
        output = model(images)
        assert_close(output.logits, model.backbone(images), rtol=0, atol=0)
    assert [activation.shape[1] for activation in output.activations] == [block.channels for block in model.blocks]


# ------------------------------------------------------------------------------------------------ what always worked


class Block(nn.Module):
    """A residual step whose branch is made of any layers."""

    def __init__(self, *branch, first=None):
        super().__init__()
        self.first = first
        self.branch = nn.Sequential(*branch)

    def forward(self, features):
        return features + self.branch(features if self.first is None else self.first(features))


class Pyramid(nn.Module):
    """Res2Net: groups of channels that read one another."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.convs = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(2))

    def forward(self, features):
        parts = self.enter(features).chunk(2, dim=1)
        done = [self.convs[0](parts[0])]
        done.append(self.convs[1](parts[1] + done[0]))
        return F.relu(features + self.leave(torch.cat(done, dim=1)))


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(4, 4, 1)

    def forward(self, features):
        return features * self.fc(features.mean(dim=(2, 3), keepdim=True)).sigmoid()


class Pool(nn.Module):
    """PoolFormer's mixer."""

    def forward(self, features):
        return F.avg_pool2d(features, 3, 1, 1) - features


def conv():
    return nn.Conv2d(4, 4, 3, padding=1)


SHARED = Block(conv(), nn.ReLU())
KEPT = {
    "a head of pooled maps on a body": ([Block(conv())], 1),
    "frozen batch norm": ([Block(conv(), ops.FrozenBatchNorm2d(4), nn.ReLU(inplace=True))], 1),
    "Res2Net": ([Pyramid()], 2),
    "SE-ResNet with drop path": ([Block(conv(), Squeeze(), ops.StochasticDepth(0.5, "row"))] * 1, 1),
    "pre-activation": ([Block(conv(), first=nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))], 1),
    "ConvMixer": ([Block(nn.Conv2d(4, 4, 5, groups=4, padding="same"), nn.GELU(), nn.BatchNorm2d(4))], 1),
    "PoolFormer": ([Block(nn.GroupNorm(1, 4), Pool()), Block(nn.GroupNorm(1, 4), nn.Conv2d(4, 4, 1))], 2),
    "a block used twice": ([SHARED, SHARED], 2),
}


@pytest.mark.parametrize("channels", [3, 1, 5])
@pytest.mark.parametrize("kind", KEPT)
def test_what_always_worked_stays_so(kind, channels):
    torch.manual_seed(0)
    layers, count = KEPT[kind]
    body = nn.Sequential(nn.Conv2d(channels, 4, 3, stride=2, padding=1), *copy.deepcopy(layers))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    network = nn.Sequential(body, head)
    model = MHEXClassifier.from_backbone(
        network, 3, freeze_backbone=True, gate=False, classifier="keep", image_size=12
    ).eval()
    images = torch.randn(3, channels, 14, 10)
    assert len(model.blocks) == len(set(model.layer_names)) == count
    assert_close(model(images).logits, network.eval()(images), rtol=0, atol=0)
    assert model.explain(images).saliency.shape == (3, 14, 10)
    trained = MHEXClassifier.from_backbone(network, 3, image_size=12)
    trained.loss()(trained.supervised_logits(trained(images)), torch.tensor([0, 1, 2])).backward()
    assert all(block.gate.weight.grad is not None for block in trained.blocks)


def test_a_network_of_the_children_of_another_is_one(make_images):
    torch.manual_seed(0)
    whole = models.resnet18(num_classes=3)
    *body, last = whole.children()
    network = nn.Sequential(*body, nn.Flatten(), last)
    model = MHEXClassifier.from_backbone(
        network, 3, freeze_backbone=True, gate=False, classifier="keep", image_size=32
    ).eval()
    images = make_images()
    assert len(model.blocks) == 8
    assert_close(model(images).logits, whole.eval()(images), rtol=0, atol=0)

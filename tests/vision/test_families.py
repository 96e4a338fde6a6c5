"""Kinds of networks that people use: where their maps have their channels, and what always worked."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision import models, ops

from mhex_vision import MHEXClassifier, surgery


def watched(network, size=16, classes=3, **options):
    """The network with blocks that only watch, in evaluation mode."""
    watching = {"freeze_backbone": True, "gate": False, "classifier": "keep"}
    return MHEXClassifier.from_backbone(network, classes, image_size=size, **(watching | options)).eval()


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
    model = watched(name, size, at="all")
    assert model.blocks[0].channels == channels
    assert len(model.blocks) >= 11  # all stages
    assert model._additions[0].channels_last == last
    images = make_images(3, (size, size))
    with torch.no_grad():
        output = model(images)
        assert_close(output.logits, model.backbone(images), rtol=0, atol=0)
    assert [activation.shape[1] for activation in output.activations] == [block.channels for block in model.blocks]


class Windows(nn.Module):
    """A residual step that computes on (B, H, W, C), as Swin does, and if asked hands that on."""

    def __init__(self, norm=nn.LayerNorm, channels=5):
        super().__init__()
        self.norm, self.linear = norm(channels), nn.Linear(channels, channels)

    def forward(self, features):
        return features + self.linear(self.norm(features))


class Last(nn.Module):
    """Feature maps (B, H, W, C) between a stem and a classifier, moved there in one of three ways."""

    def __init__(self, move, channels=5, size=None):
        super().__init__()
        self.stem, self.move, self.size = nn.Conv2d(3, channels, 3, padding=1), move, size
        self.steps = nn.Sequential(Windows(channels=channels), Windows(channels=channels))
        self.fc = nn.Linear(channels, 3)

    def forward(self, images):
        if self.size is not None:
            torch._assert(images.shape[3] == self.size, "insists on its size")
        return self.fc(self.steps(self.move(self.stem(images))).mean(dim=(1, 2)))


class Mixed(nn.Module):
    """Channels that a product of matrices mixes: no layer says where they are."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 5, 1), nn.Parameter(torch.randn(5, 5))

    def forward(self, images):
        features = torch.einsum("bchw->bhwc", self.stem(images))
        return (features + torch.relu(features @ self.first)).mean(dim=(1, 2))


MOVES = {
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, 2).transpose(2, 3),
    "reshape": lambda x: x.flatten(2).transpose(1, 2).reshape(x.shape[0], x.shape[2], x.shape[3], x.shape[1]),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize(("channels", "size"), [(5, None), (16, None), (5, 16), (16, 16)])
def test_blocks_read_the_channels_where_they_are(move, channels, size, make_images):
    """Also of a network that insists on its size, and where channels are as many as rows."""
    torch.manual_seed(0)
    network = Last(MOVES[move], channels, size).eval()
    model = watched(network)
    assert [(block.channels, a.channels_last) for block, a in zip(model.blocks, model._additions, strict=True)] == [
        (channels, True)
    ] * 2
    images = make_images(2, (16, 16))
    output = model(images)
    features = network.steps(network.move(network.stem(images)))
    assert torch.equal(output.activations[-1], features.permute(0, 3, 1, 2))
    assert torch.equal(output.logits, network(images))
    block = model.blocks[-1]
    expected = torch.relu(features.mean(dim=(1, 2))) @ block.gate.weight.T @ block.head.weight.T
    torch.testing.assert_close(output.head_logits[-1], expected)
    assert model.explain(images, 1).saliency.shape == (2, 16, 16)


def test_where_no_layer_tells_the_width_does(make_images):
    model = watched(Mixed(), classes=5)
    assert model._additions[0].channels_last
    assert model.blocks[0].channels == 5


def in_windows(net, x):
    """Windows as many as their positions, a grid of them, and windows that are samples of their own."""
    x = x + net.first(x)
    parts = x.unflatten(2, (-1, 4)).unflatten(4, (-1, 4)).permute(0, 2, 4, 3, 5, 1)  # (B, h, w, 4, 4, C)
    windows = parts.flatten(3, 4).flatten(1, 2)
    grid = parts.flatten(3, 4).flatten(1, 2).transpose(1, 2)
    own = parts.flatten(0, 2)
    return sum((part + net.tokens(part)).mean() for part in (windows, grid, own)) * x


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("only", [False, True])
def test_windows_beside_maps_get_no_block(networks, size, only):
    def forward(net, x):
        assert not only or x.shape[2:] == (size, size)
        return in_windows(net, x)

    (addition,) = surgery.trace(networks.Residue(forward), image_size=size).additions
    assert (addition.channels, addition.size) == (3, (size, size))


def test_what_is_the_same_for_every_image_is_no_map(networks):
    """Positions that are computed from a small map of them, as in SAM 2, have the shape of one image's features."""

    def forward(net, x):
        x = x + net.second(net.first(net.position.expand(-1, -1, *x.shape[2:])))
        return x + net.third(x)

    (addition,) = surgery.trace(networks.Residue(forward), image_size=16).additions
    assert addition.ordinal == 1


def test_windows_that_a_layer_cuts_are_no_map():
    """MaxViT of torchvision takes one size; here its first map has 8 x 8 windows of 8 x 8 positions."""
    network = models.MaxVit(
        input_size=(256, 256), stem_channels=8, partition_size=8, block_channels=[8, 8], block_layers=[1, 1],
        head_dim=4, stochastic_depth_prob=0, num_classes=3,
    )  # fmt: skip
    names = [addition.name for addition in surgery.trace(network, image_size=256).additions]
    assert [name.rpartition(".")[2] for name in names] == ["MBconv", "MBconv"]


def test_windows_of_a_map_are_no_map():
    """Their positions are no rows and columns of the image."""

    class Partitioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.step, self.fc = nn.Conv2d(3, 5, 1), Windows(), nn.Linear(5, 3)

        def forward(self, images):
            x = self.stem(images).unfold(2, 8, 8).unfold(3, 8, 8)  # (B, C, 2, 2, 8, 8)
            return self.fc(self.step(x.flatten(2, 3).flatten(3).permute(0, 2, 3, 1)).mean(dim=(1, 2)))

    with pytest.raises(
        ValueError, match=r"no residual addition.*1 residual additions are of tokens or windows.*explain_by"
    ):
        watched(Partitioned())


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
    model = watched(network, 12)
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
    model = watched(network, 32)
    images = make_images()
    assert len(model.blocks) == 8
    assert_close(model(images).logits, whole.eval()(images), rtol=0, atol=0)

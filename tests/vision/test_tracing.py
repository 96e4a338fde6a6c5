"""A network is traced as its users call it, or refused in words that are true."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.optim.swa_utils import AveragedModel
from torchvision import models

from mhex_vision import MHEXClassifier, surgery

WATCHING = {"freeze_backbone": True, "gate": False, "classifier": "keep"}


def watched(network, size=16, classes=3, **options):
    """The network with blocks that only watch, in evaluation mode."""
    return MHEXClassifier.from_backbone(network, classes, image_size=size, **(WATCHING | options)).eval()


# --------------------------------------------------------------------------------------------- what a call goes through


def halved(module, inputs):
    return tuple(value / 2 for value in inputs)


def doubled(module, inputs, output):
    return output * 2


@pytest.mark.parametrize("place", ["", "steps", "steps.1", "stem"])
@pytest.mark.parametrize("hook", [halved, doubled])
def test_hooks_take_part(networks, make_images, place, hook):
    network = networks.shaken(networks.Net()).eval()
    plain = network(make_images())
    module = network.get_submodule(place)
    module.register_forward_pre_hook(hook) if hook is halved else module.register_forward_hook(hook)
    hooked = network(make_images())
    assert not torch.equal(hooked, plain)
    assert torch.equal(watched(network)(make_images()).logits, hooked)


def rolled(module, inputs, output):
    return output.roll(1, dims=-1)


class Watcher:
    """Keeps what it sees and looks at it in Python, as libraries that explain networks do."""

    def __init__(self, network):
        self.seen = []
        for module in (network, network.steps[1], network.steps[0].conv):
            module.register_forward_hook(self.look)

    def look(self, module, inputs, output):
        if output.requires_grad:
            output.register_hook(self.seen.append)
        self.seen.append(float(output.detach().sum()))


@pytest.mark.parametrize("taken", [lambda network: network, copy.deepcopy], ids=["itself", "a copy"])
def test_hooks_that_only_observe_stay_where_they_were(networks, make_images, taken):
    network = networks.shaken(networks.Net())
    watcher = Watcher(network)
    network.steps[2].register_forward_hook(doubled)  # this one changes the output
    model = watched(taken(network))
    assert not watcher.seen
    assert [len(module._forward_hooks) for module in (network, network.steps[1], network.steps[2])] == [1, 1, 1]
    assert [name for name, module in model.named_modules() if module._forward_hooks] == ["backbone.steps.2"]
    assert torch.equal(model(make_images()).logits, network.eval()(make_images()))


def test_a_hook_that_decides_by_values_is_named(networks):
    class Activations:
        def scale(self, module, inputs, output):
            return output * 2 if output.abs().sum() > 0 else output

    network = networks.Net()
    network.steps.register_forward_hook(Activations().scale)
    with pytest.raises(ValueError, match=r"carries hooks, remove them first: steps \(.*Activations.scale\)"):
        watched(network)
    assert len(network.steps._forward_hooks) == 1


@pytest.mark.parametrize("place", ["encoder", "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_0.mlp"])
def test_a_vision_transformer_keeps_its_hooks_or_names_them(make_images, place):
    torch.manual_seed(0)
    network = models.VisionTransformer(16, 8, 1, 2, 8, 16, num_classes=3).eval()
    nn.init.normal_(network.heads.head.weight)
    seen = []
    handle = network.get_submodule(place).register_forward_hook(lambda module, inputs, output: seen.append(output))
    model = watched(network)
    seen.clear()
    with torch.no_grad():
        assert torch.equal(model(make_images(2, (16, 16))).logits, network(make_images(2, (16, 16))))
    assert len(seen) == 1
    handle.remove()
    network.get_submodule(place).register_forward_hook(rolled)
    if place.endswith("mlp"):  # a part that is called, and its hook with it
        model = watched(network)
        with torch.no_grad():
            assert torch.equal(model(make_images(2, (16, 16))).logits, network(make_images(2, (16, 16))))
    else:
        with pytest.raises(ValueError, match=f"run block by block, without its hooks on {place} \\(rolled"):
            MHEXClassifier.from_backbone(network, 3)


def test_what_fx_does_not_see_is_found_by_comparing(networks):
    network = networks.Net()
    calls = []

    def third(images):
        calls.append(images)
        return type(network).forward(network, images) * (1 if len(calls) < 3 else 2)

    network.forward = third
    with pytest.raises(ValueError, match="computes something that torch"):
        surgery.trace(network, image_size=16)


# ------------------------------------------------------------------------------------------------- arguments and shapes


class Options(nn.Module):
    def __init__(self, net, forward):
        super().__init__()
        self.net, self.age, self._forward = net, nn.Linear(4, 3), forward

    def forward(self, x, features=False, age=None, *, scale=2):
        return self._forward(self, x, features, age, scale)


def with_age(own, x, features, age, scale):
    logits = own.net(x) if age is None else own.net(x) + own.age(age)
    return (logits, x) if features else logits * scale


def by_shape(own, x, features, age, scale):
    if x.shape[1] == 1:
        x = x.expand(-1, 3, -1, -1)
    assert x.size(-1) % 8 == 0
    if x.ndim == 3:
        return own.net(x[None])
    return own.net(x if x.shape[2:] != (24, 24) else x[..., 4:-4, 4:-4])


@pytest.mark.parametrize("forward", [with_age, by_shape])
def test_defaults_and_shapes_decide_as_in_a_call(networks, make_images, forward):
    network = Options(networks.shaken(networks.Net()), forward).eval()
    model = watched(network)
    again = copy.deepcopy(model)
    for images in (make_images(2, (16, 16)), make_images(5, (8, 32))):
        assert torch.equal(model(images).logits, network(images))
        assert torch.equal(again(images).logits, network(images))
    if forward is by_shape:
        with pytest.raises(ValueError, match="size for which the network takes the way that was traced"):
            model(make_images(1, (24, 24)))


def each_row(own, x, features, age, scale):
    rows = [row for row in x.flatten(0, 1)]  # noqa: C416 - as many as there are
    half = int(x.shape[2] / 2) + float(x.shape[2]) / 2
    return own.net(torch.stack(rows).view(x.shape)) if len(x.shape) == 4 and half == x.shape[2] else x


def test_lengths_are_answered_too(networks, make_images):
    network = Options(networks.shaken(networks.Net()), each_row).eval()
    model = watched(network)
    images = make_images(1, (16, 24))
    assert torch.equal(model(images).logits, network(images))
    for others in (make_images(2, (16, 24)), make_images(1, (24, 16))):
        with pytest.raises(ValueError, match="size for which the network takes the way that was traced"):
            model(others)


def test_a_second_input_is_asked_for_in_one_line(networks):
    class Two(networks.Net):
        def forward(self, images, table):
            return super().forward(images) + table

    with pytest.raises(ValueError, match=r"missing 1 required positional argument: 'table'") as caught:
        watched(Two())
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------- wrapped and pruned


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, torch.compile, AveragedModel, lambda net: torch.compile(nn.DataParallel(net))],
    ids=["DataParallel", "torch.compile", "AveragedModel", "both"],
)
def test_wrappers_are_taken_off_and_said(networks, make_images, wrap):
    network = networks.shaken(networks.Net()).eval()
    with pytest.warns(UserWarning, match="blocks go onto the Net inside"):
        model = watched(wrap(network))
    assert torch.equal(model(make_images()).logits, network(make_images()))
    assert not any("module" in name or "_orig_mod" in name for name in model.state_dict())


def test_torchscript_is_refused_with_advice(networks):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        scripted = torch.jit.trace(networks.Net().eval(), torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"TorchScript.*pass the network that was scripted"):
        watched(scripted)


def pruned(layer):
    prune.l1_unstructured(layer, "weight", amount=0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("change", [pruned, weight_norm], ids=["prune", "weight_norm"])
def test_computed_weights_are_named(networks, change):
    network = networks.Net()
    change(network.steps[0].conv)
    with pytest.raises(
        ValueError, match=r"cannot be copied: it holds computed tensors: steps\.0\.conv\.weight.*prune.remove"
    ):
        watched(network)
    network = networks.Net()
    network.steps[1].cached = network.fc.weight * 2  # whoever computed it
    with pytest.raises(ValueError, match=r"steps\.1\.cached"):
        watched(network)


def test_parametrized_weights_stay_parametrized(networks, make_images):
    network = networks.shaken(networks.Net()).eval()
    parametrizations.weight_norm(network.steps[0].conv)
    assert torch.equal(watched(network)(make_images()).logits, network(make_images()))


# ----------------------------------------------------------------------------------------------- promises, and how many


class Strided(nn.Module):
    """Adds two maps that lie differently in memory, and a layer whose rounding depends on how its input lies."""

    def __init__(self, shortcut_first):
        super().__init__()
        self.stem, self.conv, self.next = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3)
        self.shortcut_first, self.fc = shortcut_first, nn.Linear(8, 3)

    def forward(self, images):
        shortcut = self.stem(images)
        branch = self.conv(shortcut).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        total = shortcut + branch if self.shortcut_first else branch + shortcut
        return self.fc(self.next(total).mean(dim=(2, 3))), total.stride()


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(
    ("write", "factors"),
    [
        (lambda net, x: torch.add(x, net.first(x), alpha=0.3), (1, 0.3)),
        (lambda net, x: net.first(x).add_(x, alpha=3), (3, 1)),
        (lambda net, x: torch.add(alpha=0.7, other=x, input=net.first(x)), (0.7, 1)),
    ],
)
def test_a_factor_of_an_addition_is_rounded_as_the_network_does(networks, make_images, write, factors, gate):
    torch.manual_seed(0)
    network = networks.Residue(write).eval()
    traced = surgery.trace(network, image_size=8)
    forward, _ = surgery.compile_forward(network, traced.evaluation, traced.additions, keep_output=True)
    block = MHEXClassifier.from_backbone(network, 3, image_size=8, gate=gate).blocks[0]
    images = make_images(2, (16, 16))
    own, (output,) = forward(network, images, [block])
    _, read = block(images * factors[0], network.first(images) * factors[1])
    torch.testing.assert_close(output.activation, read.activation)
    if gate:
        torch.testing.assert_close(own, read.activation)
    else:
        assert torch.equal(own, network(images))


@pytest.mark.parametrize("shortcut_first", [True, False])
def test_a_sum_lies_as_it_did(shortcut_first, make_images):
    network = Strided(shortcut_first).eval()
    traced = surgery.trace(network, image_size=16)
    forward, _ = surgery.compile_forward(network, traced.evaluation, traced.additions, keep_output=True)
    model = MHEXClassifier.from_backbone(network, 3, image_size=16, gate=False)
    images = make_images(2, (16, 16))
    (logits, strides), _ = forward(network, images, model.blocks)
    assert strides == network(images)[1]
    assert torch.equal(logits, network(images)[0])


def test_a_sum_of_heads_promises_nothing(networks, make_images):
    model = watched(networks.shaken(networks.Net()), objective="joint")
    assert not torch.equal(model(make_images()).logits, model.backbone(make_images()))


def test_a_classifier_that_would_predict_otherwise_is_refused(networks, monkeypatch):
    monkeypatch.setattr(surgery, "residual_sum", lambda branch, gated, **_: branch + gated * 1.01)
    with pytest.raises(ValueError, match=r"must predict what it does without, and is off by 0\.0"):
        watched(networks.shaken(networks.Net()), activation="shortcut")
    monkeypatch.setattr(surgery, "residual_sum", lambda branch, gated, **_: branch + gated * (1 + 1e-6))
    with pytest.warns(UserWarning, match="predicts the same but for rounding"):
        watched(networks.shaken(networks.Net()), activation="shortcut")


class Constants(nn.Module):
    """Computes with a buffer, and with a tensor that it makes on its way."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("scale", torch.rand(3, 1, 1))

    def forward(self, images):
        features = images + self.conv(images) * (self.scale * 2)
        return (features * torch.arange(3.0).view(3, 1, 1)).mean(dim=(2, 3))


def test_what_a_network_makes_on_its_way_moves_with_it(make_images):
    network = Constants()
    names = [sorted(vars(module)) for module in network.modules()]
    model = watched(network)
    assert [sorted(vars(module)) for module in model.backbone.modules()] == names
    images = make_images()
    assert torch.equal(model(images).logits, network(images))
    model.backbone.scale.mul_(2)
    network.scale.mul_(2)
    assert torch.equal(model(images).logits, network(images))
    assert model.to("meta")(images.to("meta")).logits.device.type == "meta"


def dropped_connections(net, x):
    """Drop connect, written out: what it adds in training is no residual addition."""
    branch = net.first(x)
    if net.training:
        branch = branch * torch.floor(torch.rand([x.shape[0], 1, 1, 1]) + net.position.detach().abs() * 0 + 0.5)
    return x + branch


def test_other_additions_of_training_do_not_matter(networks):
    model = MHEXClassifier.from_backbone(networks.Residue(dropped_connections), 3, image_size=8)
    assert [(a.ordinal, a.ordinal_in_training) for a in model._additions] == [(0, 1)]
    images = torch.zeros(32, 3, 8, 8)
    for trained in (model, copy.deepcopy(model)):
        kept = trained.train()(images).activations[0].flatten(1).abs().sum(dim=1) > 0
        assert 0 < kept.sum() < 32


def test_a_frozen_network_may_train_as_it_likes(networks):
    """Drop connect adds in training only."""

    def forward(net, x):
        branch = net.first(x)
        return x + (branch + torch.rand(1) if net.training else branch)

    network = networks.Residue(forward)
    with pytest.raises(
        ValueError,
        match=r"draws random numbers.*switch off what it does in training only, such as drop connect",
    ):
        MHEXClassifier.from_backbone(network, 3, image_size=8)
    assert len(MHEXClassifier.from_backbone(network, 3, image_size=8, freeze_backbone=True).blocks) == 1


@pytest.mark.parametrize(("steps", "expected"), [(12, "all"), (13, "stage")])
def test_above_a_dozen_additions_a_stage_gets_one_block(networks, steps, expected):
    strides = [1 + (index in (4, 8)) for index in range(steps)]
    network = nn.Sequential(*(networks.Step(3, 3, stride=stride) for stride in strides))
    for index, stride in enumerate(strides):
        if stride == 2:
            network[index].project = nn.Conv2d(3, 3, 1, stride=2)
    model = MHEXClassifier.from_backbone(network, 3, image_size=32)
    assert model.config.at == expected
    assert len(model.blocks) == (steps if expected == "all" else 3)
    assert len(MHEXClassifier.from_backbone(network, 3, image_size=32, at="all").blocks) == steps

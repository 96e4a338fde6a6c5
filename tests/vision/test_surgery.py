"""Residual additions are found as they are written, and rewriting them changes nothing else."""

import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision import models

from mhex_core import MHEXBlock
from mhex_vision import surgery

SIZE = 64
WAYS = [
    *("a + b", "b + a", "+=", "torch.add", "Tensor.add", "Tensor.add_"),
    *("torch.add by name", "torch.add, once", "Tensor.add_ by name"),
]

# The modules that hold one residual addition each, which of them really add, and whether the shortcut is written first.
FAMILIES = {
    "resnet": ({"BasicBlock", "Bottleneck"}, lambda block: True, False),
    "convnext": ({"CNBlock", "ConvNeXtBlock"}, lambda block: True, False),
    "efficientnet": ({"MBConv"}, lambda block: block.use_res_connect, False),
    "mobilenet": ({"InvertedResidual"}, lambda block: block.use_res_connect, True),
}
BACKBONES = {
    "resnet18": ("resnet", 8),
    "resnet34": ("resnet", 16),
    "resnet50": ("resnet", 16),
    "resnext50_32x4d": ("resnet", 16),
    "wide_resnet50_2": ("resnet", 16),
    "convnext_tiny": ("convnext", 18),
    "efficientnet_b0": ("efficientnet", 9),
    "mobilenet_v2": ("mobilenet", 10),
    "timm/resnet18": ("resnet", 8),
    "timm/convnext_atto": ("convnext", 12),
}


def build(name):
    """A network on the meta device: shapes without numbers."""
    if name.startswith("timm/"):
        timm = pytest.importorskip("timm")
        return timm.create_model(name.removeprefix("timm/"), num_classes=5).to("meta")
    with torch.device("meta"):
        return models.get_model(name, num_classes=5)


def residual_modules(network, family):
    """Name -> shapes of input and output of every module that adds, by running the network."""
    kinds, adds, _ = FAMILIES[family]
    shapes, handles = {}, []
    for name, module in network.named_modules():
        if type(module).__name__ in kinds and adds(module):

            def record(_, inputs, output, name=name):
                shapes[name] = (tuple(inputs[0].shape[1:]), tuple(output.shape[1:]))

            handles.append(module.register_forward_hook(record))
    network.eval()(torch.zeros(1, 3, SIZE, SIZE, device="meta"))
    for handle in handles:
        handle.remove()
    return shapes


@pytest.mark.parametrize("name", BACKBONES)
def test_every_residual_addition_of_a_known_network_is_found(name):
    family, count = BACKBONES[name]
    network = build(name)
    shapes = residual_modules(network, family)
    additions = surgery.trace(network, image_size=SIZE).additions
    assert len(additions) == len(shapes) == count
    assert [addition.name for addition in additions] == list(shapes)
    assert [(addition.channels, *addition.size) for addition in additions] == [after for _, after in shapes.values()]
    assert {addition.shortcut_first for addition in additions} == {FAMILIES[family][2]}
    before = next(iter(shapes.values()))[0]
    for addition, (_, after) in zip(additions, shapes.values(), strict=True):
        assert addition.changes_shape == (after != before), addition.name
        before = after


@pytest.mark.parametrize(
    ("name", "at", "expected"),
    [
        ("resnet18", "downsample", ["layer2.0", "layer3.0", "layer4.0"]),
        ("resnet50", "downsample", ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]),
        ("resnet18", "stage", ["layer1.1", "layer2.1", "layer3.1", "layer4.1"]),
        ("resnet50", "stage", ["layer1.2", "layer2.3", "layer3.5", "layer4.2"]),
        ("convnext_tiny", "stage", ["features.1.2", "features.3.2", "features.5.8", "features.7.2"]),
        ("convnext_tiny", "downsample", ["features.3.0", "features.5.0", "features.7.0"]),
    ],
)
@pytest.mark.parametrize("with_last", [True, False])
def test_placements_take_the_additions_they_name(name, at, expected, with_last):
    additions = surgery.trace(build(name), image_size=SIZE).additions
    chosen = [addition.name for addition in surgery.choose(additions, at, with_last=with_last)]
    last = additions[-1].name
    assert chosen == expected + [last] * (with_last and last not in expected)
    assert surgery.choose(additions, "all", with_last=with_last) == additions


def test_a_scaled_branch_is_a_branch(networks, make_images):
    network = networks.Residue(lambda net, x: torch.add(x, net.first(x), alpha=0.5)).eval()
    (forward, _), traced = compiled(network, image_size=8)
    assert [addition.shortcut_first for addition in traced.additions] == [True]
    images, recorder = make_images(2, (8, 8)), Recorder()
    own, _ = forward(network, images, [recorder])
    assert_close(own, network(images))
    ((_, branch),) = recorder.calls
    assert_close(branch, 0.5 * network.first(images))


@pytest.mark.parametrize("add", WAYS)
def test_an_addition_is_found_however_it_is_written(networks, add):
    function, shortcut_first = networks.ADDITIONS[add]
    additions = surgery.trace(networks.Net(add=function), image_size=SIZE).additions
    assert [(a.name, a.channels, a.size, a.shortcut_first, a.changes_shape) for a in additions] == [
        ("steps.0", 4, (64, 64), shortcut_first, False),
        ("steps.1", 4, (64, 64), shortcut_first, False),
        ("steps.2", 6, (32, 32), shortcut_first, True),
    ]


def doubled(net, x):
    x = x + net.first(x)
    return x + net.second(x)


NOT_RESIDUAL = {
    "a parameter": lambda net, x: net.first(x) + net.position,
    "a number": lambda net, x: net.first(x) + 1,
    "two equally deep ways": lambda net, x: net.first(x) + net.second(x),
    "tokens": lambda net, x: x.flatten(2).transpose(1, 2) + net.tokens(x.flatten(2).transpose(1, 2)),
    "one value for all positions": lambda net, x: x + net.first(x).mean(dim=(2, 3), keepdim=True),
    "nothing at all": lambda net, x: net.first(x),
}


@pytest.mark.parametrize("kind", NOT_RESIDUAL)
def test_what_is_no_residual_addition_gets_no_block(networks, kind):
    network = networks.Residue(NOT_RESIDUAL[kind])
    with pytest.raises(ValueError, match="Residue has no residual addition") as caught:
        surgery.trace(network, image_size=8)
    assert surgery.LOOKED_FOR in str(caught.value)
    # Beside a residual addition, the others are passed over.
    beside = networks.Residue(lambda net, x: NOT_RESIDUAL[kind](net, x + net.third(x)))
    (found,) = surgery.trace(beside, image_size=8).additions
    assert (found.size, found.shortcut_first) == ((8, 8), True)


def test_two_additions_in_one_module_are_numbered(networks):
    network = nn.Sequential(nn.Conv2d(3, 3, 1), networks.Residue(doubled), networks.Step(3, 3))
    additions = surgery.trace(network, image_size=8).additions
    assert [addition.name for addition in additions] == ["1#1", "1#2", "2"]


def test_a_step_that_is_used_twice_adds_twice(networks):
    step = networks.Step(3, 3)
    additions = surgery.trace(nn.Sequential(step, step), image_size=8).additions
    assert len({addition.name for addition in additions}) == 2


def test_the_first_operand_may_be_the_deeper_one_in_one_place_and_not_in_another(networks):
    def forward(net, x):
        x = net.second(net.first(x)) + net.third(x)
        return x + net.drop(net.first(x))

    additions = surgery.trace(networks.Residue(forward), image_size=8).additions
    assert [addition.shortcut_first for addition in additions] == [False, True]


@pytest.mark.parametrize("image_size", [224, 64])
def test_a_network_without_residual_additions_is_told_what_was_looked_for(image_size):
    with torch.device("meta"):
        vgg = models.vgg11()
    with pytest.raises(ValueError, match="VGG has no residual addition") as caught:
        surgery.trace(vgg, image_size=image_size)
    assert re.search(r"looked for `a \+ b`, `a \+= b`, torch.add and Tensor.add", str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_network_that_decides_by_its_input_cannot_be_traced(networks):
    network = networks.Residue(lambda net, x: x + net.first(x) if x.sum() > 0 else x)
    with pytest.raises(ValueError, match=r"Residue cannot be traced by torch\.fx: TraceError"):
        surgery.trace(network, image_size=8)
    assert network.training


def test_a_network_that_insists_on_a_size_names_the_one_it_was_given(networks):
    with pytest.raises(ValueError, match=r"Sized does not take images of shape \(1, 3, 64, 64\)") as caught:
        surgery.trace(networks.Sized(), image_size=64)
    assert "\n" not in str(caught.value)
    assert len(surgery.trace(networks.Sized(), image_size=40).additions) == 1


def test_placements_that_match_nothing_say_so(networks):
    additions = surgery.trace(nn.Sequential(networks.Step(3, 3), networks.Step(3, 3)), image_size=8).additions
    with pytest.raises(ValueError, match="at='downsample' matches none of the 2 residual additions"):
        surgery.choose(additions, "downsample", with_last=False)
    assert surgery.choose(additions, "downsample", with_last=True) == additions[-1:]


@pytest.mark.parametrize("raises", [False, True])
def test_tracing_leaves_a_network_as_it_was(networks, raises):
    network = networks.Sized()
    network.step.norm.eval()
    modes = [module.training for module in network.modules()]
    keys = [sorted(vars(module)) for module in network.modules()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    if raises:
        with pytest.raises(ValueError, match="does not take"):
            surgery.trace(network, image_size=8)
    else:
        surgery.trace(network, image_size=40)
    assert [module.training for module in network.modules()] == modes
    assert [sorted(vars(module)) for module in network.modules()] == keys
    for name, value in network.state_dict().items():
        assert_close(value, state[name], rtol=0, atol=0)


class Recorder(nn.Module):
    """Stands for a block and keeps what it is given; it gates nothing."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, shortcut, branch, *, reuse_branch=False):
        self.calls.append((shortcut, branch.clone()))  # the sum may be written over it
        return shortcut, None


def compiled(network, *, image_size, keep_output=True, mode="evaluation"):
    traced = surgery.trace(network, image_size=image_size)
    surgery.forbid_in_place(network)
    graph = getattr(traced, mode)
    return surgery.compile_forward(network, graph, traced.additions, keep_output=keep_output), traced


@pytest.mark.parametrize("add", WAYS)
def test_blocks_get_the_shortcut_first_and_then_the_branch(networks, make_images, add):
    torch.manual_seed(0)
    network = networks.shaken(networks.Net(add=networks.ADDITIONS[add][0])).eval()
    images = make_images(2, (9, 7))
    with torch.no_grad():
        expected = network(images)
        (forward, _), _ = compiled(network, image_size=16)
        blocks = [Recorder() for _ in range(3)]
        own, outputs = forward(network, images, blocks)
        assert_close(own, expected, rtol=0, atol=0)
        assert outputs == (None, None, None)
        features = network.stem(images)
        for step, block in zip(network.steps, blocks, strict=True):
            ((shortcut, branch),) = block.calls
            assert_close(shortcut, step.project(features), rtol=0, atol=0)
            assert_close(branch, step.norm(step.conv(features)), rtol=0, atol=0)
            features = torch.relu(shortcut + branch)


@pytest.mark.parametrize("add", ["a + b", "+="])
@pytest.mark.parametrize(
    "activation",
    [
        "F.relu",
        "F.relu in place",
        "F.relu in place, by position",
        "F.relu_",
        "torch.relu_",
        "Tensor.relu_",
        "relu_ as a statement",
        "F.relu in place as a statement",
        "Tensor.clamp_min_",
        "nn.ReLU in place",
    ],
)
def test_nothing_is_written_into_what_a_block_hands_out(networks, make_images, activation, add):
    torch.manual_seed(0)
    function = networks.ADDITIONS[add][0]
    network = networks.shaken(networks.Net(add=function, activation=networks.ACTIVATIONS[activation])).eval()
    plain = networks.Net()
    plain.load_state_dict(network.state_dict())
    plain.eval()
    images = make_images(2, (8, 8))
    with torch.no_grad():
        expected = plain(images)
        assert_close(network(images), expected, rtol=0, atol=0)
        (forward, _), traced = compiled(network, image_size=16)
        blocks = [MHEXBlock(addition.channels, 3, gate=False) for addition in traced.additions]
        own, outputs = forward(network, images, blocks)
        assert_close(own, expected, rtol=0, atol=0)
        features = plain.stem(images)
        for step, output in zip(plain.steps, outputs, strict=True):
            total = step.project(features) + step.norm(step.conv(features))
            assert_close(output.activation, total, rtol=0, atol=0)
            assert total.min() < 0
            features = torch.relu(total)


def overwritten(net, x):
    """The shortcut is x, and x has been overwritten by then."""
    x = net.first(x)
    y = net.second(x.relu_())
    return x + y


def test_an_in_place_function_is_felt_by_all_who_read_its_input_later(networks, make_images):
    network = networks.Residue(overwritten).eval()
    images = make_images(2, (8, 8))
    with torch.no_grad():
        expected = network(images)
        (forward, _), _ = compiled(network, image_size=8)
        assert_close(forward(network, images, [Recorder()])[0], expected, rtol=0, atol=0)


def test_an_in_place_module_whose_input_is_read_later_is_refused(networks):
    """Its flag is taken away, and with it what the later reader would have seen."""
    network = networks.Residue(lambda net, x: x + net.second(net.drop(x)))
    network.drop.inplace = True
    with pytest.raises(ValueError, match=r"drop.*in place.*inplace=False"):
        surgery.trace(network, image_size=8)
    network.drop.inplace = False
    assert len(surgery.trace(network, image_size=8).additions) == 1


class Container(nn.Module):
    """Decides by its mode what it computes: a dropout of its own, and in training another order of the sum."""

    def __init__(self, networks):
        super().__init__()
        self.step = networks.Step(3, 3)

    def forward(self, images):
        features = torch.nn.functional.dropout(self.step(images), 0.5, training=self.training)
        if self.training:
            return features * 2
        return features


@pytest.mark.parametrize("training", [False, True])
def test_each_mode_has_the_graph_it_would_run(networks, make_images, training):
    network = Container(networks).train(training)
    images = make_images(2, (8, 8))
    (forward, _), _ = compiled(network, image_size=8, mode="training" if training else "evaluation")
    torch.manual_seed(1)
    expected = network(images)
    torch.manual_seed(1)
    own, _ = forward(network, images, [Recorder()])
    assert_close(own, expected, rtol=0, atol=0)
    assert bool((own == 0).float().mean() > 0.6) == training  # half by relu, more by dropout


def test_a_network_that_adds_only_in_training_is_refused(networks):
    network = networks.Residue(lambda net, x: doubled(net, x) if net.training else x + net.first(x))
    with pytest.raises(ValueError, match="adds at other places in training than in evaluation"):
        surgery.trace(network, image_size=8)


def test_what_follows_the_last_block_is_left_out_unless_wanted(networks, make_images):
    network = networks.Net().eval()
    (forward, used), _ = compiled(network, image_size=16, keep_output=False)
    assert "fc" not in used
    assert "steps.2.conv" in used
    own, outputs = forward(network, make_images(), [MHEXBlock(width, 2) for width in (4, 4, 6)])
    assert own is None
    assert len(outputs) == 3
    (_, used), _ = compiled(network, image_size=16, keep_output=True)
    assert "fc" in used


def test_compiling_leaves_the_graph_as_it_was(networks):
    network = networks.Net()
    traced = surgery.trace(network, image_size=16)
    before = str(traced.evaluation)
    surgery.compile_forward(network, traced.evaluation, traced.additions, keep_output=False)
    assert str(traced.evaluation) == before


def test_only_what_no_forward_pass_reaches_is_taken_away(networks):
    network = nn.Module()
    network.kept, network.gone = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    surgery.drop_unused(network, {"kept"})
    assert sorted(network.state_dict()) == sorted(f"kept.{name}" for name in nn.BatchNorm2d(2).state_dict())
    assert network.gone.weight is None


class ReadAgain(nn.Module):
    """Batch norms whose results have several readers: a ReLU and the sum, or a ReLU and what follows."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(4, 2)

    def forward(self, images):
        first = self.norm1(self.conv1(images))
        features = self.relu(first)
        branch = self.norm2(self.conv2(features))
        total = features + branch
        rest = self.relu(branch) + first.detach()
        return self.fc((self.relu(total) * rest).mean(dim=(2, 3)))


@pytest.mark.parametrize("training", [False, True])
def test_memory_that_is_read_again_is_not_reused(make_images, training):
    torch.manual_seed(0)
    network = ReadAgain().train(training)
    images = make_images(2, (16, 16))
    expected = network(images)
    mode = "training" if training else "evaluation"
    (forward, _), traced = compiled(network, image_size=16, mode=mode)
    output, _ = forward(network, images, [Recorder() for _ in traced.additions])
    assert_close(output, expected, rtol=0, atol=0)


def test_a_fresh_result_is_written_over(make_images):
    """In a ResNet each ReLU inside a block overwrites a batch norm's result, and each sum the branch's."""
    network = models.resnet18().eval()
    images = make_images(1)
    seen = {}
    (forward, _), traced = compiled(network, image_size=32)
    for name in ("layer1.0.bn1", "layer1.0.bn2"):
        network.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: (output, output.clone())})
        )
    forward(network, images, [MHEXBlock(addition.channels, 2) for addition in traced.additions])
    for after, before in seen.values():
        assert not torch.equal(after, before)


def test_what_a_hook_has_seen_is_not_written_over(make_images):
    network = models.resnet18().eval()
    seen = []
    network.layer1[0].bn2.register_forward_hook(lambda module, inputs, output: seen.append((output, output.clone())))
    (forward, _), traced = compiled(network, image_size=32)
    forward(network, make_images(1), [MHEXBlock(addition.channels, 2) for addition in traced.additions])
    after, before = seen[-1]
    assert torch.equal(after, before)

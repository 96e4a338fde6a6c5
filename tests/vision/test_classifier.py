"""A classifier computes what the method says, takes a network as it is, and leaves nothing behind."""

import gc
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision import models

from mhex_core import DeepSupervisionLoss
from mhex_vision import ClassifierOutput, MHEXClassifier

SLOW = ["resnet34", "resnext50_32x4d", "wide_resnet50_2", "convnext_tiny", "timm/resnet18"]
FAST = ["resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "timm/convnext_atto"]
every_backbone = pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)


def build(name, classes=5):
    """A named network, without the classifier around it."""
    torch.manual_seed(0)
    if name.startswith("timm/"):
        return pytest.importorskip("timm").create_model(name.removeprefix("timm/"), num_classes=classes)
    return models.get_model(name, num_classes=classes)


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(ours, theirs):
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert_close(value, theirs[name], rtol=0, atol=0, msg=name)


def attributes(model):
    """What hangs on every module besides its parameters: new entries would be something stashed there."""
    return [(name, sorted(vars(module))) for name, module in model.named_modules()]


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


# ----------------------------------------------------------------------------------------------------- what it computes


@every_backbone
def test_every_backbone_gives_logits_heads_and_activations(name, make_images):
    network = build(name)
    keep = MHEXClassifier.from_backbone(
        network, 5, gate=False, freeze_backbone=True, classifier="keep", image_size=64
    ).eval()
    images = make_images(2, (64, 64))
    with torch.no_grad():
        output = keep(images)
        # Nothing but heads was added: the predictions are the network's own, to the bit.
        assert_close(output.logits, network.eval()(images), rtol=0, atol=0)
    assert isinstance(output, ClassifierOutput)
    assert len(output.head_logits) == len(output.activations) == len(keep.blocks) == len(keep.layer_names)
    for logits, activation, block in zip(output.head_logits, output.activations, keep.blocks, strict=True):
        assert logits.shape == (2, 5)
        assert activation.shape[:2] == (2, block.channels)
        assert activation.ndim == 4

    model = MHEXClassifier.from_backbone(name, 5, image_size=64)
    assert model.training
    assert model.layer_names == keep.layer_names
    output = model(images)
    assert_close(output.logits, output.head_logits[-1], rtol=0, atol=0)
    model.loss()(model.supervised_logits(output), torch.tensor([0, 4])).backward()
    idle = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not idle


def resnet_by_hand(model, images):
    """Section 1 of the method on torchvision's resnet18, from the weights alone: logits of the heads, activations."""
    weights = dict(model.state_dict())

    def norm(features, name):
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        scaled = (features - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]

    def conv(features, name, stride):
        kernel = weights[f"{name}.weight"]
        return F.conv2d(features, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    y = norm(conv(images, "backbone.conv1", 2), "backbone.bn1").clamp(min=0)
    y = F.max_pool2d(y, 3, 2, 1)
    heads, activations = [], []
    for index in range(8):
        place = f"backbone.layer{index // 2 + 1}.{index % 2}"
        stride = 2 if index % 2 == 0 and index > 0 else 1
        r = norm(conv(y, f"{place}.conv1", stride), f"{place}.bn1").clamp(min=0)
        r = norm(conv(r, f"{place}.conv2", 1), f"{place}.bn2")
        x = y
        if f"{place}.downsample.0.weight" in weights:
            x = norm(conv(y, f"{place}.downsample.0", stride), f"{place}.downsample.1")
        z = (x.mean(dim=(2, 3)) + r.mean(dim=(2, 3))).clamp(min=0)
        h = z @ weights[f"blocks.{index}.gate.weight"].T
        g = 1 / (1 + (-h).exp()) if model.config.gate else torch.ones_like(h)
        gated = g[:, :, None, None] * x
        heads.append(h @ weights[f"blocks.{index}.head.weight"].T)
        activations.append(r + gated if model.config.activation == "sum" else gated)
        y = (r + gated).clamp(min=0)
    own = None
    if model.config.classifier == "keep":
        own = y.mean(dim=(2, 3)) @ weights["backbone.fc.weight"].T + weights["backbone.fc.bias"]
    return heads, activations, own


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize(("classifier", "activation"), [("drop", "sum"), ("keep", "shortcut")])
def test_resnet18_is_the_method_written_out_by_hand(make_classifier, make_images, gate, classifier, activation):
    model = make_classifier("resnet18", 4, gate=gate, classifier=classifier, activation=activation).double()
    images = make_images(2, (48, 64), dtype=torch.float64)
    with torch.no_grad():
        heads, activations, own = resnet_by_hand(model, images)
        output = model(images)
    assert_close(output.head_logits, tuple(heads), rtol=1e-9, atol=1e-9)
    assert_close(output.activations, tuple(activations), rtol=1e-9, atol=1e-9)
    assert_close(output.logits, heads[-1] if own is None else own, rtol=1e-9, atol=1e-9)
    if activation == "sum":  # read before the network's own ReLU
        assert all(bool((read < 0).any()) for read in output.activations)


@pytest.mark.parametrize("decay", [0.8, 0.3])
@pytest.mark.parametrize("classifier", ["drop", "keep"])
def test_the_joint_prediction_is_the_decayed_sum(make_classifier, make_images, classifier, decay):
    model = make_classifier(objective="joint", decay=decay, classifier=classifier)
    plain = make_classifier(classifier=classifier)
    plain.load_state_dict(model.state_dict())
    images = make_images()
    output = model(images)
    supervised = list(output.head_logits)
    if classifier == "keep":
        supervised.append(plain(images).logits)
    expected = sum(decay ** (len(supervised) - 1 - index) * logits for index, logits in enumerate(supervised))
    assert_close(output.logits, expected)
    assert model.supervised_logits(output) == (output.logits,)


def test_supervision_takes_every_head_and_a_kept_classifier(make_classifier, make_images):
    images, truth = make_images(3), torch.tensor([0, 2, 1])
    dropped, kept = make_classifier(), make_classifier(classifier="keep")
    output = dropped(images)
    assert dropped.supervised_logits(output) == output.head_logits
    expected = sum(F.cross_entropy(logits, truth) for logits in output.head_logits)
    assert_close(dropped.loss()(dropped.supervised_logits(output), truth), expected)
    output = kept(images)
    assert kept.supervised_logits(output) == (*output.head_logits, output.logits)
    weights = (0.5, 1.0, 0.0, 2.0)
    expected = sum(
        weight * F.cross_entropy(logits, truth, label_smoothing=0.1)
        for weight, logits in zip(weights, kept.supervised_logits(output), strict=True)
    )
    loss = kept.loss(head_weights=weights, label_smoothing=0.1)
    assert_close(loss(kept.supervised_logits(output), truth), expected)


def test_the_joint_loss_is_the_cross_entropy_of_the_prediction(make_classifier, make_images):
    model, truth = make_classifier(objective="joint"), torch.tensor([0, 2])
    output = model(make_images())
    loss = model.loss()(model.supervised_logits(output), truth)
    assert_close(loss, F.cross_entropy(output.logits, truth))
    assert_close(loss, DeepSupervisionLoss("joint", 0.8)(output.head_logits, truth))


def test_independent_classes_get_a_sigmoid_each_and_a_binary_loss(make_classifier, make_images):
    model = make_classifier(multi_label=True)
    images, labels = make_images(), torch.tensor([[1, 0, 1], [0, 0, 0]])
    output = model(images)
    assert_close(model.explain(images).probabilities, 1 / (1 + (-output.logits).exp()))
    expected = sum(F.binary_cross_entropy_with_logits(logits, labels.float()) for logits in output.head_logits)
    assert_close(model.loss()(model.supervised_logits(output), labels), expected)
    assert model.collaboration(images).shape == (2, 2)


# --------------------------------------------------------------------------------------------- the network handed over


@pytest.mark.parametrize("training", [True, False])
def test_the_network_handed_over_stays_as_it_was(make_images, training):
    network = build("resnet18")
    network.layer1.eval()
    network.train(training)
    state, before = state_of(network), (attributes(network), modes(network))
    flags = [module.inplace for module in network.modules() if isinstance(module, nn.ReLU)]
    model = MHEXClassifier.from_backbone(network, 5, freeze_backbone=True, image_size=64)
    model.train()
    model.explain(make_images(2, (64, 64)))
    assert_same_state(network.state_dict(), state)
    assert (attributes(network), modes(network)) == before
    assert [module.inplace for module in network.modules() if isinstance(module, nn.ReLU)] == flags
    assert all(flags)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert hooks(network) == hooks(model) == 0


@pytest.mark.parametrize("gate", [True, False])
def test_training_the_heads_leaves_a_frozen_network_alone(networks, make_images, gate):
    torch.manual_seed(0)
    network = networks.shaken(networks.Net())
    model = MHEXClassifier.from_backbone(network, 3, freeze_backbone=True, gate=gate, classifier="keep", image_size=64)
    model.train()
    assert not model.backbone.training
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == [name for name, _ in model.named_parameters() if name.startswith("blocks.")]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    frozen, heads = state_of(model.backbone), state_of(model.blocks)
    for step in range(3):
        output = model(make_images(4, seed=step))
        model.loss()(model.supervised_logits(output), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    assert_same_state(model.backbone.state_dict(), frozen)
    assert_same_state(model.backbone.state_dict(), network.state_dict())
    assert all(
        not torch.equal(value, heads[name]) for name, value in model.blocks.state_dict().items() if "head" in name
    )
    with torch.no_grad():
        same = torch.equal(model(make_images()).logits, network.eval()(make_images()))
    assert same == (not gate)


def test_batch_statistics_move_where_nothing_is_frozen(make_classifier, make_images):
    model = make_classifier().train()
    before = state_of(model)
    model(make_images())
    assert not torch.equal(model.backbone.steps[0].norm.running_mean, before["backbone.steps.0.norm.running_mean"])


@pytest.mark.parametrize("objective", ["layerwise", "joint"])
def test_without_the_classifier_every_parameter_is_trained(make_classifier, make_images, objective):
    for at in ("all", "downsample", "stage"):
        model = make_classifier(at=at, objective=objective).train()
        assert not any(name.startswith("backbone.fc") for name in model.state_dict())
        output = model(make_images())
        model.loss()(model.supervised_logits(output), torch.tensor([0, 1])).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("at", "names"),
    [("all", ("steps.0", "steps.1", "steps.2")), ("downsample", ("steps.2",)), ("stage", ("steps.1", "steps.2"))],
)
def test_blocks_sit_where_they_were_asked_for(make_classifier, make_images, at, names):
    model = make_classifier(at=at)
    assert model.layer_names == names
    output = model(make_images())
    assert [activation.shape[1] for activation in output.activations] == [block.channels for block in model.blocks]
    assert len(output.head_logits) == len(names)


def test_a_network_with_other_classes_gets_a_new_last_layer(make_classifier, make_images, networks):
    model = make_classifier(networks.Net(classes=7), 3, classifier="keep")
    assert model(make_images()).logits.shape == (2, 3)
    assert model.backbone.fc.in_features == 6


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 3.0}, TypeError, "num_classes must be an int"),
        ({"at": "somewhere"}, ValueError, "at must be one of 'all', 'downsample', 'stage', got 'somewhere'"),
        ({"classifier": True}, ValueError, "classifier must be one of"),
        ({"objective": "both"}, ValueError, "objective must be one of"),
        ({"activation": "relu"}, ValueError, "activation must be one of"),
        ({"gate": 1}, TypeError, "gate must be a bool"),
        ({"decay": 2}, ValueError, r"decay must be a number in \[0, 1\], got 2"),
        ({"image_size": 0}, ValueError, "image_size must be at least 1"),
        ({"weights": "DEFAULT"}, ValueError, "weights belong to a backbone given by name"),
        ({"name_or_module": 18}, TypeError, "name_or_module must be a name or an nn.Module, got int"),
        (
            {"num_classes": 4, "classifier": "keep", "freeze_backbone": True, "gate": False},
            ValueError,
            "a frozen classifier keeps its classes",
        ),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_settings_are_named(networks, change, error, words):
    arguments = {"name_or_module": networks.Net(), "num_classes": 3, "image_size": 16} | change
    with pytest.raises(error, match=words):
        MHEXClassifier.from_backbone(**arguments)


@pytest.mark.parametrize("kind", ["features", "no linear layer"])
def test_a_classifier_that_cannot_be_kept_is_explained(networks, kind):
    step = networks.Step(3, 3)
    network = step if kind == "features" else nn.Sequential(step, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    words = "returns one .B, K. tensor" if kind == "features" else "has 3 outputs and ends in BatchNorm2d"
    with pytest.raises(ValueError, match=words):
        MHEXClassifier.from_backbone(network, 2, classifier="keep", image_size=16)
    assert MHEXClassifier.from_backbone(network, 2, image_size=16).layer_names


# --------------------------------------------------------------------------------------------------- nothing is stashed


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_on_any_module(make_classifier, make_images, training):
    model = make_classifier().train(training)
    before = attributes(model)
    output = model(make_images())
    model.loss()(model.supervised_logits(output), torch.tensor([0, 1])).backward()
    model.explain(make_images(), "all")
    model.collaboration(make_images())
    assert attributes(model) == before
    assert hooks(model) == 0


class Broken(nn.Module):
    """A module of which the network only finds out when it runs."""

    def forward(self, features):
        if not torch.fx._symbolic_trace.is_fx_tracing():
            raise RuntimeError("out of memory, say")
        return features


@pytest.mark.parametrize("call", [lambda m, x: m(x), lambda m, x: m.explain(x), lambda m, x: m.collaboration(x)])
def test_an_exception_inside_leaves_nothing_behind_either(make_classifier, make_images, call):
    model = make_classifier().train()
    model.backbone.steps[1].eval()
    model.backbone.steps[2].conv = Broken()
    before = (attributes(model), modes(model))
    with pytest.raises(RuntimeError, match="out of memory, say"):
        call(model, make_images())
    assert (attributes(model), modes(model)) == before
    assert hooks(model) == 0


def live_tensors():
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # touching everything touches other libraries' deprecated attributes
        return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())


@pytest.mark.parametrize("training", [True, False])
def test_many_explanations_leave_no_tensor_alive(make_classifier, make_images, training):
    model, images = make_classifier().train(training), make_images(1, (8, 8))
    model.explain(images)
    before = live_tensors()
    for _ in range(300):
        model.explain(images)
    for _ in range(30):
        model.collaboration(images)
    assert live_tensors() <= before


def test_explaining_restores_the_mode_of_each_module(make_classifier, make_images):
    model = make_classifier().train()
    model.backbone.steps[1].eval()
    model.blocks[0].eval()
    before, statistics = modes(model), state_of(model)
    model.explain(make_images())
    assert modes(model) == before
    assert_same_state(model.state_dict(), statistics)
    with pytest.raises(ValueError, match="target"):
        model.explain(make_images(), 99)
    assert modes(model) == before


# -------------------------------------------------------------------------------------------------------- collaboration


@pytest.mark.parametrize("training", [True, False])
def test_collaboration_is_its_definition(make_classifier, make_images, training):
    model, images, truth = make_classifier().double(), make_images(3, dtype=torch.float64), torch.tensor([0, 2, 1])
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for row in range(3):
        losses = [F.cross_entropy(logits, truth[row : row + 1]) for logits in model(images[row : row + 1]).head_logits]
        for layer in range(2):
            w1 = model.blocks[layer].gate.weight
            own, passed = (torch.autograd.grad(losses[layer + n], w1, retain_graph=True)[0] for n in (0, 1))
            expected[row, layer] = (own * passed).sum() / (own.norm() * passed.norm())
    model.train(training)
    with torch.no_grad():  # it needs gradients whatever its caller does without
        result = model.collaboration(images, truth)
    assert_close(result, expected, rtol=0, atol=1e-9)
    assert result.abs().max() <= 1
    assert model.training == training
    assert all(parameter.grad is None for parameter in model.parameters())
    predicted = model.eval()(images).logits.argmax(dim=1)
    assert_close(model.collaboration(images), model.collaboration(images, predicted), rtol=0, atol=0)

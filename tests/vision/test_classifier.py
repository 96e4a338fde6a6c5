"""A classifier computes what the method says, shows what it saw, and leaves nothing behind."""

import copy
import gc
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import scatter_gather
from torch.testing import assert_close
from torchvision import models

from mhex_core import DeepSupervisionLoss, saliency_maps
from mhex_vision import ClassifierOutput, MHEXClassifier, Preprocessing

SLOW = ["resnet34", "resnext50_32x4d", "wide_resnet50_2", "convnext_tiny", "timm/resnet18"]
FAST = ["resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "timm/convnext_atto"]
every_backbone = pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
every_kind = pytest.mark.parametrize(
    ("classifier", "gate", "objective"),
    [(c, g, o) for c in ("drop", "keep") for g in (True, False) for o in ("layerwise", "joint")],
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


# -------------------------------------------------------------------------------------------------------------- explain


def test_an_explanation_is_a_forward_pass_in_evaluation_mode_and_saliency_of_it(make_classifier, make_images):
    model, images = make_classifier(), make_images()
    with torch.no_grad():
        output = model(images)
        matrices = [block.head.weight @ block.gate.weight for block in model.blocks]
    assert_close(model.equivalent_matrices(), tuple(matrices))
    model.train()
    explanation = model.explain(images, beta=0.5, decay=0.8)
    assert_close(explanation.probabilities, output.logits.softmax(dim=1))
    assert_close(explanation.head_logits, torch.stack(output.head_logits))
    assert_close(explanation.target, output.logits.argmax(dim=1))
    expected = saliency_maps(output.activations, matrices, explanation.target, size=(32, 32), beta=0.5, decay=0.8)
    assert_close(explanation.saliency, expected, rtol=1e-5, atol=1e-5)
    assert not explanation.saliency.requires_grad
    assert explanation.layer_names == model.layer_names
    assert [layer.shape for layer in explanation.positive] == [a.shape[:1] + a.shape[2:] for a in output.activations]


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


@pytest.mark.parametrize("training", [True, False])
def test_an_explanation_does_not_depend_on_its_company(make_classifier, make_images, training):
    model, images = make_classifier().train(training), make_images(4)
    together = model.explain(images)
    apart = type(together).concatenate([model.explain(images[row : row + 1]) for row in range(4)])
    padded = model.explain(torch.cat([images, torch.zeros(3, 3, 32, 32)]))
    for name in ("saliency", "probabilities", "target"):
        assert_close(getattr(together, name), getattr(apart, name), rtol=0, atol=1e-5)
        assert_close(getattr(together, name), getattr(padded, name)[:4], rtol=0, atol=1e-5)


TARGETS = {
    "None": (None, (4,)),
    "int": (2, (4,)),
    "(B,)": (torch.tensor([0, 2, 1, 1]), (4,)),
    "(B, n)": (torch.tensor([[0, 1], [2, 1], [0, 0], [1, 2]]), (4, 2)),
    "(B, 1)": (torch.tensor([[0], [1], [2], [0]]), (4, 1)),
    "int32": (torch.tensor([0, 2, 1, 1], dtype=torch.int32), (4,)),
    "all": ("all", (4, 3)),
}


@pytest.mark.parametrize("target", TARGETS)
def test_one_class_or_several_can_be_explained(make_classifier, make_images, target):
    asked, shape = TARGETS[target]
    model, images = make_classifier(), make_images(4, (16, 12))
    explanation = model.explain(images, asked)
    assert explanation.saliency.shape == (*shape, 16, 12)
    assert explanation.target.shape == shape
    assert explanation.target.dtype == torch.int64
    assert 0 <= explanation.saliency.min() <= explanation.saliency.max() <= 1
    every = model.explain(images, "all").saliency
    columns = explanation.target if explanation.target.ndim == 2 else explanation.target[:, None]
    chosen = torch.stack([every[row, columns[row]] for row in range(4)])
    assert_close(explanation.saliency.reshape(chosen.shape), chosen, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "expected"), [(None, (20, 14)), (7, (7, 7)), ((5, 40), (5, 40))])
def test_maps_have_the_size_asked_for(make_classifier, make_images, size, expected):
    assert make_classifier().explain(make_images(2, (20, 14)), size=size).saliency.shape == (2, *expected)


@pytest.mark.parametrize(
    ("images", "options", "error", "words"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), {}, TypeError, "normalised floating-point.*torch.uint8"),
        ([[0.0]], {}, TypeError, "images must be .*got list"),
        (torch.zeros(3, 8, 8), {}, ValueError, r"\(B, 3, H, W\), got \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8), {"betta": 1}, TypeError, "betta"),
        (torch.zeros(2, 3, 8, 8), {"beta": 2}, ValueError, "beta"),
        (torch.zeros(2, 3, 8, 8), {"layer_weights": [1.0]}, ValueError, "layer_weights"),
        (torch.zeros(2, 3, 8, 8), {"target": 3}, ValueError, "target"),
        (torch.zeros(2, 3, 8, 8), {"target": -1}, ValueError, "target"),
        (torch.zeros(2, 3, 8, 8), {"target": "everything"}, ValueError, "target"),
        (torch.zeros(2, 3, 8, 8), {"target": torch.tensor([0.0, 1.0])}, TypeError, "target"),
        (torch.zeros(2, 3, 8, 8), {"target": torch.tensor([0])}, ValueError, "target"),
        (torch.zeros(2, 3, 8, 8), {"target": [0, 1]}, TypeError, "target"),
        (torch.zeros(2, 3, 8, 8), {"size": 0}, ValueError, "size"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_cannot_be_explained_is_named(make_classifier, images, options, error, words):
    with pytest.raises(error, match=words):
        make_classifier().explain(images, **options)


@pytest.mark.parametrize("objective", ["layerwise", "joint"])
def test_an_empty_batch_gives_empty_results(make_classifier, make_images, objective):
    model, images = make_classifier(objective=objective), make_images(0, (16, 12))
    output = model(images)
    assert output.logits.shape == (0, 3)
    explanation = model.explain(images)
    assert explanation.saliency.shape == (0, 16, 12)
    assert explanation.target.shape == (0,)
    assert model.explain(images, "all").saliency.shape == (0, 3, 16, 12)
    assert model.collaboration(images).shape == (0, 2)
    assert model.strip_heads()(images).shape == (0, 3)


def test_one_class_is_explained_too(make_classifier, make_images):
    explanation = make_classifier(num_classes=1).explain(make_images())
    assert explanation.saliency.isfinite().all()
    assert_close(explanation.probabilities, torch.ones(2, 1))


def test_images_are_kept_where_it_is_known_how_they_were_normalised(make_classifier, make_images):
    model = make_classifier()
    assert model.explain(make_images()).images is None
    preprocessing = Preprocessing(size=32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    model.with_metadata(preprocessing=preprocessing)
    pictures = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    images = preprocessing.normalize(pictures)
    assert_close(model.explain(images).images, pictures, rtol=0, atol=0)
    assert model.explain(images, keep_images=False).images is None


def test_class_names_reach_the_explanation(make_classifier, make_images):
    model = make_classifier().with_metadata(class_names=("a", "b", "c"))
    assert model.explain(make_images()).class_names == ("a", "b", "c")
    with pytest.raises(ValueError, match="only class_names and preprocessing can be changed, got gate"):
        model.with_metadata(gate=False)
    with pytest.raises(ValueError, match="class_names must hold 3 names, got 2"):
        model.with_metadata(class_names=("a", "b"))


# --------------------------------------------------------------------------------------------------------- environments


def test_half_precision_keeps_prediction_and_map_close(make_classifier, make_images):
    model, images = make_classifier(), make_images()
    exact = model.explain(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images)
        half = model.explain(images, exact.target)
    assert output.logits.dtype == torch.bfloat16
    assert half.saliency.dtype == half.probabilities.dtype == half.head_logits.dtype == torch.float32
    assert_close(half.probabilities, exact.probabilities, rtol=0, atol=0.03)
    assert_close(half.saliency, exact.saliency, rtol=0, atol=0.05)
    low = copy.deepcopy(model).to(torch.bfloat16).explain(images.to(torch.bfloat16), exact.target)
    assert_close(low.saliency, exact.saliency, rtol=0, atol=0.1)


def test_autocast_trains(make_classifier, make_images):
    model = make_classifier().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(make_images())
        loss = model.loss()(model.supervised_logits(output), torch.tensor([0, 1]))
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_memory_format_does_not_matter(make_classifier, make_images):
    model, images = make_classifier(), make_images(2, (20, 14))
    expected = model.explain(images, "all")
    result = model.to(memory_format=torch.channels_last).explain(images.to(memory_format=torch.channels_last), "all")
    assert_close(result.saliency, expected.saliency, rtol=0, atol=1e-4)
    assert_close(result.probabilities, expected.probabilities, rtol=0, atol=1e-5)


def test_threads_may_share_a_classifier_in_evaluation_mode(make_classifier, make_images):
    model = make_classifier()
    jobs = [(make_images(2, (16 + seed, 12), seed=seed), "all" if seed % 2 else None) for seed in range(6)]
    expected = [model.explain(*job).saliency for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            for ours, theirs in zip(pool.map(lambda job: model.explain(*job).saliency, jobs), expected, strict=True):
                assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@every_kind
def test_a_copy_computes_the_same_and_shares_nothing(make_classifier, make_images, way, classifier, gate, objective):
    model = make_classifier(classifier=classifier, gate=gate, objective=objective)
    model = model.with_metadata(class_names=("a", "b", "c"))
    images = make_images()
    expected = model(images)
    copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert_close(copied(images), expected, rtol=0, atol=0)
    assert copied.config == model.config
    assert copied.layer_names == model.layer_names
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in model.parameters()}
    with torch.no_grad():
        copied.backbone.stem.weight.zero_()
    assert_close(model(images), expected, rtol=0, atol=0)
    copied.train()(images)  # the graph of training mode is there as well


@pytest.mark.parametrize("name", ["resnet18", "timm/convnext_atto"])
def test_a_named_network_survives_pickle(make_classifier, make_images, name):
    model = make_classifier(name)
    images = make_images(1, (64, 64))
    with torch.no_grad():
        assert_close(pickle.loads(pickle.dumps(model))(images), model(images), rtol=0, atol=0)


def test_a_classifier_that_is_no_module_goes_without_harm(networks, make_classifier, make_images):
    """What a forward computes with must be there to trace a copy, though no block depends on it."""
    model = make_classifier(networks.RawWeight(), 2)
    images = make_images()
    assert_close(copy.deepcopy(model)(images), model(images), rtol=0, atol=0)
    output = model.train()(images)
    model.loss()(model.supervised_logits(output), torch.tensor([0, 1])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert model.strip_heads()(images).shape == (2, 2)


def test_data_parallel_is_transparent_without_accelerators(make_classifier, make_images):
    model, images = make_classifier(), make_images()
    assert_close(nn.DataParallel(model)(images), model(images), rtol=0, atol=0)


def test_outputs_of_several_devices_are_gathered_into_one(make_classifier, make_images, monkeypatch):
    """The batch of two that gives one map elsewhere (pytorch-grad-cam #322)."""
    monkeypatch.setattr(scatter_gather.Gather, "apply", lambda device, dim, *parts: torch.cat(parts, dim))
    model, images = make_classifier(), make_images(4)
    merged = scatter_gather.gather([model(images[:2]), model(images[2:])], "cpu")
    assert isinstance(merged, ClassifierOutput)
    assert_close(merged, model(images), rtol=0, atol=1e-5)


def test_a_replica_computes_with_its_own_blocks(make_classifier, make_images):
    """What DataParallel does to a module before it sends it to a device."""
    model, images = make_classifier(), make_images()
    replicas = {name: module._replicate_for_data_parallel() for name, module in model.named_modules()}
    for name, replica in replicas.items():
        for child in replica._modules:
            setattr(replica, child, replicas[f"{name}.{child}" if name else child])
        for key, parameter in dict(model.get_submodule(name)._parameters).items():
            # A tensor of its own, no nn.Parameter.
            setattr(replica, key, None if parameter is None else parameter * 0.5)
    output = replicas[""](images)
    halved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in halved.parameters():
            parameter.mul_(0.5)
    assert_close(output, halved(images))
    sum(logits.sum() for logits in output.head_logits).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_as_one_graph(make_classifier, make_images, training):
    torch._dynamo.reset()
    model, images = make_classifier().train(training), make_images()
    expected = copy.deepcopy(model)(images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        output = torch.compile(model, backend="eager", fullgraph=True)(images)
    assert isinstance(output, ClassifierOutput)
    assert_close(output, expected)


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

"""MHEX blocks on vision transformers compute what the method says, and behave as they do on convolutional networks."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from mhex_core import SaliencyOptions, native, signed_maps
from mhex_vision import MHEXClassifier, PlainClassifier, commands
from mhex_vision.explainers import explainer
from mhex_vision.vit import architecture_of, capture

NAMED = "timm/vit_tiny_patch16_224:img_size=28,patch_size=7,depth=3,embed_dim=24,num_heads=4"


@pytest.fixture
def make(make_vit):
    """A classifier on a small vision transformer, in evaluation mode."""

    def build(family, classes=5, **options):
        model = make_vit(family)
        torch.manual_seed(0)
        return MHEXClassifier.from_backbone(model, classes, **options).eval()

    return build


def by_hand(model, images):
    """The method's blocks from the weights alone: logits of the heads, activations of the patches, last stream."""
    backbone, weights = model.backbone, dict(model.blocks.state_dict())
    architecture = architecture_of(backbone)
    prefix = architecture.prefix(backbone)
    stream, (h, w) = architecture.embed(backbone, images)
    heads, activations = [], []
    for index, name in enumerate(architecture.block_names(backbone)):
        layer = backbone.get_submodule(name)
        places = architecture.places(backbone, (h, w))[index]
        x = stream + architecture.attend(layer, architecture.normalize(layer, stream), places=places)[0]
        r = architecture.feed_forward(layer, x)
        z = (x[:, prefix:].mean(dim=1) + r[:, prefix:].mean(dim=1)).clamp(min=0)
        hidden = z @ weights[f"{index}.gate.weight"].T
        gate = 1 / (1 + (-hidden).exp()) if model.config.gate else torch.ones_like(hidden)
        heads.append(hidden @ weights[f"{index}.head.weight"].T)
        gated = x * gate[:, None]
        stream = gated + r
        shown = gated if model.config.activation == "shortcut" else stream
        activations.append(shown[:, prefix:].transpose(1, 2).reshape(len(images), -1, h, w))
    return heads, activations, stream


@pytest.mark.parametrize(
    ("gate", "classifier", "activation"), [(True, "drop", "sum"), (True, "keep", "shortcut"), (False, "keep", "sum")]
)
def test_it_is_the_method_written_out_by_hand(make, images, family, gate, classifier, activation):
    model = make(family, gate=gate, classifier=classifier, activation=activation).double()
    images = images.double()
    with torch.no_grad():
        heads, activations, stream = by_hand(model, images)
        output = model(images)
        architecture = architecture_of(model.backbone)
        own = None
        if classifier == "keep":
            own = architecture.classify(model.backbone, architecture.features(model.backbone, stream))
    assert_close(output.head_logits, tuple(heads), rtol=1e-9, atol=1e-9)
    assert_close(output.activations, tuple(activations), rtol=1e-9, atol=1e-9)
    assert_close(output.logits, heads[-1] if own is None else own, rtol=1e-9, atol=1e-9)
    assert model.layer_names == architecture.block_names(model.backbone)


def test_a_frozen_network_that_is_only_watched_keeps_its_bits(make_vit, own_logits, images, family):
    network = make_vit(family)
    model = MHEXClassifier.from_backbone(network, 5, gate=False, freeze_backbone=True, classifier="keep")
    assert not model.train().backbone.training
    with torch.no_grad():
        assert_close(model.eval()(images).logits, own_logits(network, images), rtol=0, atol=0)


def test_the_network_handed_over_stays_as_it_was(make_vit, images, family):
    network = make_vit(family).train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    before = [(name, sorted(vars(module)), module.training) for name, module in network.named_modules()]
    model = MHEXClassifier.from_backbone(network, 3, freeze_backbone=True)
    model.explain(images)
    assert [(name, sorted(vars(module)), module.training) for name, module in network.named_modules()] == before
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("objective", ["layerwise", "joint"])
def test_every_parameter_is_trained_and_what_no_head_needs_is_gone(make, images, family, objective):
    model = make(family, objective=objective).train()
    left = [name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad]
    architecture = architecture_of(model.backbone)
    unread = (*architecture.after_blocks(model.backbone), *architecture.idle(model.backbone))
    assert not [name for name in left if any(name == gone or name.startswith(f"{gone}.") for gone in unread)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model.loss()(model.supervised_logits(model(images)), torch.tensor([0, 4, 1]))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_activations_are_views_of_the_stream(make, images, some_family):
    model = make(some_family)
    prefix = architecture_of(model.backbone).prefix(model.backbone)
    for activation in model(images).activations:
        assert activation._is_view()
        assert activation.shape == (3, 24, 4, 4)
        assert activation.stride() == ((prefix + 16) * 24, 1, 4 * 24, 24)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_an_explanation_is_the_evidence_of_the_activations(make, images, some_family, backend):
    if backend == "native" and native.status().backend != "native":
        pytest.skip("there is no compiled code here")
    model = make(some_family)
    with torch.no_grad():
        output = model(images)
    options = SaliencyOptions(tau_pos=0.0, tau_neg=0.0, beta=1.0, rectify=False)
    given = {"tau_pos": 0.0, "tau_neg": 0.0, "beta": 1.0, "rectify": False, "normalize": False, "attention": False}
    explanation = model.explain(images, 2, **given)
    assert explanation.saliency.shape == (3, 28, 28)
    copies = [activation.contiguous() for activation in output.activations]
    maps = signed_maps(copies, model.equivalent_matrices(), 2, options=options, backend=backend)
    for ours, theirs in ((explanation.positive, maps.positive), (explanation.negative, maps.negative)):
        assert_close([part.detach() for part in ours], [part.detach() for part in theirs], rtol=1e-5, atol=1e-6)


def test_evidence_adds_up_to_the_head_where_its_relu_is_open(make, images, some_family):
    model = make(some_family, gate=False).double()
    images = images.double()
    with torch.no_grad():
        output = model(images)
        for block, activation, logits in zip(model.blocks, output.activations, output.head_logits, strict=True):
            pooled = activation.mean(dim=(2, 3))
            assert_close(pooled.clamp(min=0) @ block.equivalent_matrix().T, logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("at", "classifier", "expected"),
    [("all", "drop", (0, 1, 2)), ("stage", "drop", (2,)), ("stage", "keep", (2,)), ("downsample", "drop", (2,))],
)
def test_placements(make, images, at, classifier, expected):
    model = make("timm", at=at, classifier=classifier)
    assert model.layer_names == tuple(f"blocks.{index}" for index in expected)
    assert len(model(images).activations) == len(expected)
    captured = capture(model, images)
    assert_close(captured.logits, model(images).logits, rtol=1e-5, atol=1e-5)


def test_a_placement_that_matches_nothing_says_so(make):
    with pytest.raises(ValueError, match="at='downsample' matches none of the 3 residual additions; use at='all'"):
        make("timm", at="downsample", classifier="keep")


def test_other_classes_get_a_new_last_layer(make, images, family):
    model = make(family, 7, classifier="keep")
    assert model(images).logits.shape == (3, 7)
    with pytest.raises(ValueError, match="a frozen classifier keeps its classes"):
        make(family, 7, classifier="keep", freeze_backbone=True, gate=False)


@pytest.mark.parametrize(
    ("classifier", "gate", "objective", "activation"),
    [
        ("drop", True, "layerwise", "sum"),
        ("drop", True, "joint", "sum"),
        ("keep", True, "layerwise", "shortcut"),
        ("keep", False, "layerwise", "sum"),
    ],
)
def test_stripped_predictions_do_not_change_by_one_bit(make, images, family, classifier, gate, objective, activation):
    model = make(family, classifier=classifier, gate=gate, objective=objective, activation=activation)
    deployed = model.strip_heads()
    with torch.no_grad():
        assert_close(deployed(images), model(images).logits, rtol=0, atol=0)
    if objective == "layerwise":
        assert not any("head" in name for name in deployed.blocks[0].state_dict())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("classifier", ["drop", "keep"])
def test_copies_compute_the_same(make, images, family, way, classifier):
    model = make(family, classifier=classifier)
    again = way(model)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(again(images).logits, expected.logits)
        again.blocks[0].gate.weight.zero_()
        assert not torch.equal(again(images).head_logits[0], expected.head_logits[0])
        assert torch.equal(model(images).logits, expected.logits)


def test_saving_by_name(images, tmp_path):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    model = MHEXClassifier.from_backbone(NAMED, 5).eval()
    model.save_pretrained(tmp_path)
    again = MHEXClassifier.from_pretrained(tmp_path)
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)


@pytest.mark.parametrize("classifier", ["drop", "keep"])
def test_saving_a_module_of_ones_own(make, make_vit, images, some_family, tmp_path, classifier):
    model = make(some_family, classifier=classifier)
    model.save_pretrained(tmp_path)
    again = MHEXClassifier.from_pretrained(tmp_path, backbone=make_vit(some_family, seed=3))
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)


def test_torchvision_by_name_and_plain_with_pretrained_weights(monkeypatch, make_images, tmp_path):
    name = "vit_b_16:image_size=32"
    model = MHEXClassifier.from_backbone(name, 3)
    assert len(model.blocks) == 12
    assert model.layer_names[3] == "encoder.layers.encoder_layer_3"
    from mhex_vision import backbones

    monkeypatch.setattr(backbones, "build", lambda *_, **__: small())
    plain = PlainClassifier.from_name("vit_b_16", 3, weights="DEFAULT")
    assert plain(make_images(2, (28, 28))).shape == (2, 3)


def small():
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(28, 7, 2, 2, 8, 8)


def test_collaboration_is_its_definition(make, images, some_family):
    model = make(some_family).double()
    images, truth = images.double(), torch.tensor([0, 2, 1])
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for row in range(3):
        losses = [F.cross_entropy(logits, truth[row : row + 1]) for logits in model(images[row : row + 1]).head_logits]
        for layer in range(2):
            w1 = model.blocks[layer].gate.weight
            own, passed = (torch.autograd.grad(losses[layer + n], w1, retain_graph=True)[0] for n in (0, 1))
            expected[row, layer] = (own * passed).sum() / (own.norm() * passed.norm())
    assert_close(model.collaboration(images, truth), expected, rtol=0, atol=1e-9)


def test_an_image_does_not_depend_on_its_company(make, images, some_family):
    model = make(some_family).double()
    images = images.double()
    with torch.no_grad():
        together = model(images)
        for index in range(3):
            alone = model(images[index : index + 1])
            assert_close(alone.logits[0], together.logits[index], rtol=1e-10, atol=1e-10)
            assert_close(alone.activations[1][0], together.activations[1][index], rtol=1e-10, atol=1e-10)


def test_prefix_tokens_are_gated_and_not_averaged(make, images):
    """What a class token holds reaches later blocks through their attention, and no head of its own block."""
    model = make("timm").double()
    captured = capture(model, images.double())
    (gradient,) = captured.gradients(torch.tensor([0, 1, 2]), captured.outputs[-1:])
    assert bool((gradient == 0).all())  # the last head reads both sides before they are added
    assert captured.readout[0] == 0
    _, _, last = by_hand(model, images.double())
    assert_close(captured.outputs[-1], last, rtol=1e-9, atol=1e-9)


def test_images_that_are_not_square(make, make_images, family, takes_any_size):
    if not takes_any_size(family):
        pytest.skip("takes one size only")
    images = make_images(2, (21, 42))
    model = make(family)
    assert model.explain(images).saliency.shape == (2, 21, 42)
    assert model(images).activations[0].shape == (2, 24, 3, 6)


def test_it_compiles_as_one_graph_and_trains(make, images, some_family):
    model = make(some_family).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = model.loss()(model.supervised_logits(compiled(images)), torch.tensor([0, 4, 1]))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.blocks.parameters())


def test_autocast_trains(make, images, some_family):
    model = make(some_family).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images)
        loss = model.loss()(model.supervised_logits(output), torch.tensor([0, 4, 1]))
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)
    half = make(some_family).bfloat16()
    with torch.no_grad():
        assert_close(half(images.bfloat16()).logits.float(), make(some_family)(images).logits, rtol=0.2, atol=0.2)


def test_it_compiles(make, images, some_family):
    model = make(some_family)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        output, expected = compiled(images), model(images)
    assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert_close(output.activations, expected.activations, rtol=1e-5, atol=1e-5)


def test_it_can_be_exported(make, images, some_family):
    deployed = make(some_family).strip_heads()
    exported = torch.export.export(deployed, (images,)).module()
    assert_close(exported(images), deployed(images), rtol=0, atol=1e-6)


def test_a_replica_computes_with_its_own_parts(make, images, some_family):
    model = make(some_family)
    replica = model._replicate_for_data_parallel()
    parts = dict(copy.deepcopy(model).named_children())
    replica._modules = dict(parts)
    with torch.no_grad():
        expected = model(images).logits
        assert torch.equal(MHEXClassifier.forward(replica, images).logits, expected)
        for parameter in parts["backbone"].parameters():
            parameter.zero_()
        assert not torch.equal(MHEXClassifier.forward(replica, images).logits, expected)


def test_the_command_line_shows_a_vision_transformer(capsys):
    pytest.importorskip("timm")
    from mhex_vision import cli

    assert cli.main(["info", "--backbone", NAMED]) == 0
    shown = capsys.readouterr().out
    assert "3 residual additions (sizes at 28 px)" in shown
    assert "at=stage: blocks.2" in shown
    assert "blocks.0: 24 channels, 4 x 4" in shown
    assert commands.info


def test_unsupported_kinds_are_named_not_probed(make_vit):
    model = make_vit("timm")
    model.blocks[1] = nn.Identity()
    with pytest.raises(ValueError, match=r"made of Block modules of timm\..*got torch\..*Identity"):
        MHEXClassifier.from_backbone(model, 5)


# -------------------------------------------------------------------------------------------- evidence times attention


@pytest.mark.parametrize(
    "options", [{}, {"gate": False, "classifier": "keep"}, {"activation": "shortcut"}, {"at": "stage"}]
)
@pytest.mark.parametrize("target", [None, "all"])
def test_evidence_is_multiplied_by_the_attention_a_patch_receives(make_vit, images, some_family, options, target):
    model = MHEXClassifier.from_backbone(make_vit(some_family), 5, **options).eval()
    plain = model.explain(images, target, beta=0.5, attention=False)
    found = model.explain(images, target, beta=0.5)
    assert torch.equal(found.saliency, model.explain(images, target, beta=0.5, attention=True).saliency)
    seen = capture(model, images, graph=False)
    received = torch.stack([weights.mean(dim=(1, 2)) for weights in seen.attentions]).sum(dim=0)
    weights = seen.maps(received) if target is None else seen.maps(received).unsqueeze(1)
    for before, after in ((plain.positive, found.positive), (plain.negative, found.negative)):
        for one, other in zip(before, after, strict=True):
            assert_close(other, one * weights, rtol=1e-3, atol=1e-5 * float(one.abs().max()))
    assert_close(found.probabilities, plain.probabilities, rtol=1e-4, atol=1e-6)
    assert_close(found.head_logits, plain.head_logits, rtol=1e-3, atol=1e-4)
    assert (found.method, plain.method) == ("mhex:attention=true", "mhex")
    assert found.layer_names == plain.layer_names
    by_name = explainer("mhex", attention=True, beta=0.5)(
        model, images, found.target if target is None else found.target[:, 0]
    )
    assert_close(by_name, found.saliency if target is None else found.saliency[:, 0], rtol=1e-3, atol=1e-4)


def test_attention_is_a_vision_transformers(make_classifier, make_images):
    with pytest.raises(ValueError, match="attention must be False or None for Net, which is no vision transformer"):
        make_classifier().explain(make_images(1), attention=True)
    with pytest.raises(TypeError, match="attention must be a bool"):
        explainer("mhex", attention="much")

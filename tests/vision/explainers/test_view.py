"""A view gives the network's own logits, through a tap at the chosen layer."""

import pytest
import torch
from torch.testing import assert_close

from mhex_vision.explainers import layers
from mhex_vision.explainers.view import LogitsView, TappedView, prepared

every_kind = pytest.mark.parametrize(
    ("classifier", "gate", "objective"),
    [(c, g, o) for c in ("drop", "keep") for g in (True, False) for o in ("layerwise", "joint")],
)
TARGETS = torch.tensor([0, 2])


@every_kind
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("activation", ["sum", "shortcut"])
def test_a_classifiers_logits(make_classifier, make_images, classifier, gate, objective, frozen, activation):
    model = make_classifier(
        classifier=classifier, gate=gate, objective=objective, freeze_backbone=frozen, activation=activation
    )
    images = make_images(2, (16, 12))
    expected = model(images).logits
    assert_close(LogitsView(model, images, TARGETS)(images), expected, rtol=0, atol=0)
    for name in model.layer_names:
        with prepared(model, freeze=True):
            assert_close(viewed(model, name, images), expected)
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in model.blocks)


def viewed(model, name, images):
    return TappedView(model, name, images, TARGETS)(images)


def test_a_plain_networks_logits(make_plain, make_images):
    network, images = make_plain(), make_images(2, (16, 12))
    for name in ("conv", "norm", "deep", "deep.0", "deep.1", "pool"):
        with prepared(network, freeze=True):
            assert_close(viewed(network, name, images), network(images), rtol=0, atol=0)


def test_a_named_torchvision_network(make_classifier, make_images):
    model, images = make_classifier("resnet18", 3, image_size=64), make_images(2, (28, 28))
    with prepared(model, freeze=True):
        assert_close(viewed(model, "layer2.1", images), model(images).logits)


def test_what_passes_the_tap_is_overwritten_by_nobody(make_classifier, make_images):
    """In evaluation mode sums are written over branches."""
    model, images = make_classifier(), make_images(2, (16, 12))
    for name in model.layer_names:
        view, caught = TappedView(model, name, images, TARGETS), []
        view.tap.register_forward_hook(
            lambda tap, inputs, output, caught=caught: caught.append((output, output.clone()))
        )
        with prepared(model, freeze=True):
            view(images)
        ((features, at_once),) = caught
        assert torch.equal(features, at_once)


def test_the_deepest_layer_with_more_than_one_position(make_classifier, make_images, networks):
    from torchvision.models import resnet18

    model, plain = make_classifier("resnet18", 3, image_size=64), resnet18(num_classes=3).eval()
    for side, block, stage in ((28, "layer3.1", "layer3"), (64, "layer4.1", "layer4"), (28, "layer3.1", "layer3")):
        images = make_images(2, (side, side))
        assert layers.chosen(model, None, images) == block
        assert layers.chosen(plain, None, images) == stage
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_hooks for module in plain.modules())


def test_a_stripped_network_is_a_network_like_any_other(make, make_classifier, make_images):
    model, images = make_classifier(), make_images(2, (16, 12))
    deployed = model.strip_heads()
    maps = make("integrated-gradients")(deployed, images, TARGETS)
    assert_close(maps, make("integrated-gradients")(model, images, TARGETS))
    assert make("gradcam", layer="backbone.stem")(deployed, images, TARGETS).any()

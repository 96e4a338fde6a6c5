"""Each family is run as it runs itself, to the bit; what would be run otherwise is refused by name."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mhex_vision.vit import architecture_of
from mhex_vision.vit.ungraded import ungraded


def by_hand(model, images, *, weights=False):
    architecture = architecture_of(model)
    hidden, grid = architecture.embed(model, images)
    for block, places in zip(architecture.blocks(model), architecture.places(model, grid), strict=True):
        normed = architecture.normalize(block, hidden)
        hidden = hidden + architecture.attend(block, normed, weights=weights, places=places)[0]
        hidden = hidden + architecture.feed_forward(block, hidden)
    return architecture.classify(model, architecture.features(model, hidden))


@pytest.mark.parametrize("graded", [False, True])
def test_logits_are_the_models_own_to_the_bit(make_vit, own_logits, images, family, graded):
    model = make_vit(family)
    with torch.set_grad_enabled(graded):
        expected = own_logits(model, images)
        assert expected.std() > 0.01
        assert_close(by_hand(model, images), expected, rtol=0, atol=0)
        assert_close(by_hand(ungraded(model), images), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert_close(by_hand(ungraded(model), images), own_logits(model, images), rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_attention_that_is_shown_changes_nothing(make_vit, own_logits, images, family, dtype, tolerance):
    model, images = make_vit(family).to(dtype), images.to(dtype)
    with torch.no_grad():
        assert_close(by_hand(model, images, weights=True), own_logits(model, images), rtol=tolerance, atol=tolerance)


def test_training_is_the_models_own_too(make_vit, own_logits, images, family):
    """Dropout and stochastic depth are drawn in the model's own order."""
    model = make_vit(family).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    expected, got = [], []
    for results, run in ((expected, own_logits), (got, by_hand)):
        torch.manual_seed(1)
        results.append(run(model, images))
    assert_close(got, expected, rtol=0, atol=0)


def test_names_prefix_grid_and_readout(make_vit, images, family, prefix_of, reads_patches):
    model = make_vit(family)
    architecture = architecture_of(model)
    names = architecture.block_names(model)
    assert [model.get_submodule(name) for name in names] == list(architecture.blocks(model))
    assert len(names) == 3
    hidden, grid = architecture.embed(model, images)
    assert grid == (4, 4) == architecture.grid(model, architecture.image_size(model))
    assert architecture.prefix(model) == prefix_of(family)
    assert hidden.shape == (3, prefix_of(family) + 16, 24)
    assert architecture.width(model) == 24
    shares = architecture.readout(model, hidden.shape[1])
    assert_close(shares.sum(), torch.tensor(1.0))
    assert bool((shares[prefix_of(family) :] > 0).all()) == reads_patches(family)


def test_what_follows_the_blocks_is_what_the_logits_need_besides(make_vit, images, family):
    model = make_vit(family)
    architecture = architecture_of(model)
    hidden, grid = architecture.embed(model, images)
    for block, places in zip(architecture.blocks(model), architecture.places(model, grid), strict=True):
        hidden = hidden + architecture.attend(block, architecture.normalize(block, hidden), places=places)[0]
        hidden = hidden + architecture.feed_forward(block, hidden)
    hidden.sum().backward()
    after = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    named = (*architecture.after_blocks(model), *architecture.idle(model))
    expected = {
        name for name, _ in model.named_parameters() if any(name == n or name.startswith(f"{n}.") for n in named)
    }
    assert after == expected
    assert after


def test_another_number_of_classes(make_vit, own_logits, images, family):
    model = make_vit(family).double()
    architecture = architecture_of(model)
    assert architecture.num_classes(model) == 5
    assert not architecture.set_num_classes(model, 5)
    assert architecture.set_num_classes(model, 7)
    assert architecture.num_classes(model) == 7
    assert own_logits(model, images.double()).shape == (3, 7)


def test_images_that_are_not_square(make_vit, own_logits, make_images, family, takes_any_size):
    model, images = make_vit(family), make_images(2, (21, 42))
    if not takes_any_size(family):
        with pytest.raises((AssertionError, RuntimeError)):
            by_hand(model, images)
        return
    with torch.no_grad():
        assert_close(by_hand(model, images), own_logits(model, images), rtol=0, atol=0)
    assert architecture_of(model).embed(model, images)[1] == (3, 6)


def test_eager_models_are_run_too(make_vit, own_logits, images):
    for family in ("ViT", "DINOv2 with registers"):
        model = make_vit(family)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            assert_close(by_hand(model, images), own_logits(model, images), rtol=0, atol=0)


def test_other_networks_have_no_architecture(networks):
    assert architecture_of(networks.Net()) is None
    assert architecture_of(nn.Linear(2, 2)) is None


def test_no_library_is_imported_for_a_network_of_another(python):
    code = """
import sys
from torchvision.models.vision_transformer import VisionTransformer
from mhex_vision.vit import architecture_of, capture
assert architecture_of(VisionTransformer(8, 4, 1, 2, 8, 8)) is not None
assert not {"timm", "transformers"} & set(sys.modules), "imported"
"""
    result = python.run("-c", code)
    assert result.returncode == 0, result.stderr


def overridden(model, name):
    """The model as one of a subclass with a method of its own."""
    kind = type(model)
    model.__class__ = type("Mine", (kind,), {name: lambda self, *args: getattr(kind, name)(self, *args)})
    return model


@pytest.mark.parametrize(
    ("family", "part", "method"),
    [
        ("torchvision", "", "forward"),
        ("torchvision", "encoder", "forward"),
        ("torchvision", "encoder.layers.encoder_layer_1", "forward"),
        ("torchvision", "encoder.layers.encoder_layer_1.self_attention", "forward"),
        ("timm", "", "forward"),
        ("timm", "", "forward_features"),
        ("timm", "", "forward_head"),
        ("timm", "blocks.1", "forward"),
        ("timm", "blocks.1.attn", "forward"),
        ("timm, distilled", "", "forward_head"),
        ("ViT", "", "forward"),
        ("DeiT", "deit", "forward"),
        ("DINOv2", "dinov2.encoder", "forward"),
    ],
)
def test_an_overridden_forward_is_refused(make_vit, family, part, method):
    model = make_vit(family)
    overridden(model.get_submodule(part), method)
    with pytest.raises(ValueError, match=f"Mine overrides {method} of "):
        architecture_of(model)


def test_a_subclass_that_runs_as_its_family_is_taken(make_vit, own_logits, images):
    model = make_vit("timm")
    model.__class__ = type("Mine", (type(model),), {"hello": 1})
    assert_close(by_hand(model, images), own_logits(model, images), rtol=0, atol=0)
    model.forward = lambda images: images
    with pytest.raises(ValueError, match="overrides forward"):
        architecture_of(model)


def test_parts_of_another_kind_are_refused_by_name(make_vit):
    pytest.importorskip("timm")
    from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

    small = {"img_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 1, "num_heads": 4}
    for options, words in (
        ({"block_fn": ParallelScalingBlock}, r"made of Block modules of timm\..*got timm\..*ParallelScalingBlock"),
        ({"patch_drop_rate": 0.5}, "keep all of its patches"),
        ({"global_pool": "", "num_classes": 0}, "pool its tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            architecture_of(VisionTransformer(**(small | options)))
    averaged = VisionTransformer(**small, global_pool="max")
    with pytest.raises(ValueError, match="global_pool must be 'token' or 'avg', got 'max'"):
        architecture_of(averaged).readout(averaged, 17)
    distilled = make_vit("timm, distilled")
    distilled.set_distilled_training(enable=True)
    with pytest.raises(ValueError, match="distilled_training"):
        architecture_of(distilled)
    headless = VisionTransformer(**small, num_classes=0)
    with pytest.raises(ValueError, match=r"last layer is an nn\.Linear, and that of VisionTransformer is none"):
        architecture_of(headless).set_num_classes(headless, 3)

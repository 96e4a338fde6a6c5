"""The same explanation by any method: values as the method gives them, drawn by sign, from Python."""

import pytest
import torch
from torch.testing import assert_close

from mhex_vision import Explanation, MHEXClassifier, PlainClassifier, Preprocessing, drawing, explain_by
from mhex_vision.explainers import explainer
from mhex_vision.explainers.own import RandomMaps

VIT = "timm/vit_tiny_patch16_224:img_size=28,patch_size=7,depth=2"


@pytest.fixture(scope="module")
def plain():
    pytest.importorskip("timm")
    torch.manual_seed(0)
    model = PlainClassifier.from_name(VIT, 3)
    return model.with_metadata(preprocessing=Preprocessing(size=28), class_names=("a", "b", "c")).train()


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def test_maps_are_the_methods_own(plain, images):
    found = explain_by(plain, images, "cdam:mode=smooth,steps=3")
    with torch.no_grad():
        probabilities = plain.eval()(images).softmax(dim=1)
    plain.train()
    assert isinstance(found, Explanation)
    assert_close(found.probabilities, probabilities)
    assert torch.equal(found.target, probabilities.argmax(dim=1))
    assert torch.equal(found.saliency, explainer("cdam", mode="smooth", steps=3)(plain, images, found.target))
    assert (found.method, found.class_names) == ("cdam:mode=smooth,steps=3", ("a", "b", "c"))
    assert found.signed
    assert found.images.dtype == torch.uint8
    assert plain.training
    options = explain_by(plain, images, "cdam", mode="smooth", steps=3, name="smooth", keep_images=False)
    assert torch.equal(options.saliency, found.saliency)
    assert (options.method, options.images) == ("smooth", None)


@pytest.mark.parametrize("method", ["cdam", "gmar"])
def test_several_targets(plain, images, method):
    every = explain_by(plain, images, method, "all")
    assert every.saliency.shape == (4, 3, 28, 28)
    assert torch.equal(every.target, torch.arange(3).expand(4, 3))
    for target in range(3):
        one = explain_by(plain, images, method, target)
        assert_close(every.saliency[:, target], one.saliency, rtol=1e-4, atol=1e-7)
    assert every.overlay().shape == (4, 3, 3, 28, 28)


def test_an_explainer_may_be_handed_over(plain, images):
    found = explain_by(plain, images, RandomMaps(seed=3), 1)
    assert (found.method, found.signed) == ("RandomMaps", False)
    assert torch.equal(found.saliency, RandomMaps(seed=3)(plain, images, found.target))

    def brightness(model, given, targets):
        return given.mean(dim=1)

    assert explain_by(plain, images, brightness).method == "brightness"
    with pytest.raises(TypeError, match="options must be given to the explainer when it is made, got seed"):
        explain_by(plain, images, RandomMaps(), seed=3)


def test_of_the_classifiers_own_saliency_the_layers_come_along(images):
    pytest.importorskip("timm")
    model = MHEXClassifier.from_backbone(VIT, 3)
    found = explain_by(model, images, "mhex:beta=0.5", 2)
    assert (found.method, found.layer_names) == ("mhex:attention=true", model.layer_names)
    assert torch.equal(found.saliency, model.explain(images, 2, beta=0.5).saliency)
    other = explain_by(model, images, "attention-rollout")
    assert other.layer_names == ("attention-rollout",)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"method": "cdamm"}, ValueError, "name must be one of"),
        ({"method": 3}, TypeError, "method must be a name or an explainer, got int"),
        ({"method": "mhex"}, TypeError, "must be an MHEXClassifier for its own saliency"),
        ({"target": 3}, ValueError, r"target must lie in \[0, 2\], got 3"),
        ({"target": "most"}, ValueError, "target must be one of the classes \\(a, b, c\\) or its number, got 'most'"),
        ({"images": torch.zeros(3, 28, 28)}, ValueError, "images must have 4 dimensions"),
        ({"model": "vit"}, TypeError, "model must be an nn.Module"),
        ({"keep_images": 1}, TypeError, "keep_images must be a bool"),
    ],
)
def test_what_is_wrong_is_named(plain, images, arguments, error, words):
    given = {"model": plain, "images": images, "method": "cdam", "target": None} | arguments
    with pytest.raises(error, match=words):
        explain_by(**given)


# ---------------------------------------------------------------------------------------------------------- drawing


def test_signed_maps_are_scaled_by_their_largest_value_and_keep_zero():
    maps = torch.tensor([[[0.0, -4.0], [2.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    expected = torch.tensor([[[0.0, -1.0], [0.5, 0.25]], [[0.0, 0.0], [0.0, 0.0]]])
    assert torch.equal(drawing.drawable(maps, signed=True), expected)
    plain = drawing.drawable(maps.abs() + 3, signed=False)
    assert torch.equal(plain, torch.tensor([[[0.0, 1.0], [0.5, 0.25]], [[0.0, 0.0], [0.0, 0.0]]]))


def test_evidence_for_is_red_and_evidence_against_blue(plain, images):
    found = explain_by(plain, images, "cdam", keep_images=True)
    over = found.overlay(opacity=1.0)
    scaled = drawing.drawable(found.saliency, signed=True)
    for row in range(4):
        strongest, weakest = scaled[row] > 0.9, scaled[row] < -0.9
        for chosen, more, less in ((strongest, 0, 2), (weakest, 2, 0)):
            if chosen.any():
                colour = over[row][:, chosen].float().mean(dim=1)
                assert colour[more] > colour[less] + 50
    untouched = scaled.abs() < 1e-3
    assert (over.float() - found.images.float()).abs().amax(dim=1)[untouched].amax() <= 1


def test_a_figure_of_another_method_shows_one_map(plain, images):
    figure = explain_by(plain, images, "cdam").plot(samples=2)
    assert len(figure.axes) == 2 * 3 + 1  # image, overlay, map, and one scale
    assert figure.axes[2].get_title() == "cdam"
    shown = figure.axes[2].images[0]
    assert (shown.norm.vmin, shown.norm.vmax, shown.get_cmap().name) == (-1, 1, drawing.DIVERGING)
    rollout = explain_by(plain, images, "attention-rollout").plot(samples=1)
    shown = rollout.axes[2].images[0]
    assert (shown.norm.vmin, shown.norm.vmax, shown.get_cmap().name) == (0, 1, drawing.COLORMAP)

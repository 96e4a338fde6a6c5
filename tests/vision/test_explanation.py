"""Overlays, figures and files of explanations."""

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import mhex_core
from mhex_vision import Explanation, Preprocessing, drawing


@pytest.fixture
def pictures():
    return torch.randint(0, 256, (3, 3, 6, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------------- overlays


@pytest.mark.parametrize("opacity", [0.0, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("colormap", ["inferno", "viridis"])
def test_an_overlay_mixes_image_and_colour_by_saliency(pictures, opacity, colormap):
    saliency = torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(1))
    result = drawing.overlay(pictures, saliency, opacity=opacity, colormap=colormap)
    assert result.dtype == torch.uint8
    for row, y, x in np.ndindex(3, 6, 8):
        strength = opacity * float(saliency[row, y, x])
        colour = np.array(mpl.colormaps[colormap](float(saliency[row, y, x]))[:3]) * 255
        expected = (1 - strength) * pictures[row, :, y, x].numpy() + strength * colour
        assert np.abs(result[row, :, y, x].numpy() - expected).max() <= 0.51


def test_where_saliency_is_zero_the_image_shows_unchanged(pictures):
    saliency = torch.zeros(3, 6, 8)
    saliency[:, 2:4] = 1
    result = drawing.overlay(pictures, saliency)
    outside = (saliency == 0).unsqueeze(1).expand_as(pictures)
    assert_close(result[outside], pictures[outside], rtol=0, atol=0)
    assert not torch.equal(result[~outside], pictures[~outside])


@pytest.mark.parametrize(
    ("target", "shape"),
    [(None, (2, 3, 12, 10)), (torch.tensor([[0, 1], [2, 0]]), (2, 2, 3, 12, 10)), ("all", (2, 3, 3, 12, 10))],
    ids=["one", "two", "all"],
)
@pytest.mark.parametrize("size", [None, (5, 20)])
def test_overlays_have_the_images_size_whatever_the_maps_have(make_explanation, target, shape, size):
    explanation = make_explanation(target, size=(12, 10))
    assert explanation.overlay().shape == shape
    if target is not None:
        first = explanation.overlay()[:, 0]
        assert_close(first, drawing.overlay(explanation.images, explanation.saliency[:, 0]), rtol=0, atol=0)


def test_maps_of_another_size_are_brought_to_the_images(make_classifier, make_images, make_explanation):
    explanation = make_explanation()
    model = make_classifier().with_metadata(preprocessing=Preprocessing(size=12))
    small = model.explain(make_images(2, (12, 10)), "all", size=(4, 5))
    assert small.saliency.shape == (2, 3, 4, 5)
    overlay = small.overlay()
    assert overlay.shape == (2, 3, 3, 12, 10)
    assert_close(small.images, explanation.images, rtol=0, atol=0)
    fitted = torch.nn.functional.interpolate(small.saliency, (12, 10), mode="bilinear", align_corners=False)
    assert_close(overlay, drawing.overlay(small.images, fitted), rtol=0, atol=0)


@pytest.mark.parametrize("opacity", [-0.1, 1.5, float("nan")])
def test_an_opacity_out_of_range_is_named(make_explanation, opacity):
    with pytest.raises(ValueError, match=r"opacity must be in \[0, 1\]"):
        make_explanation().overlay(opacity=opacity)


def test_a_colour_map_nobody_knows_is_named(make_explanation):
    with pytest.raises(ValueError, match="name of a matplotlib colour map, got 'infrared'"):
        make_explanation().overlay(colormap="infrared")


def test_an_empty_batch_has_an_empty_overlay(make_explanation):
    assert make_explanation(batch=0).overlay().shape == (0, 3, 12, 10)


# -------------------------------------------------------------------------------------------------------------- figures


def test_a_figure_shows_image_overlay_aggregate_and_each_layer(make_explanation):
    explanation = make_explanation(batch=3, beta=0.5)
    extra = [("beta = 1", explanation.reweighted(beta=1.0).saliency)]
    figure = explanation.plot(samples=2, extra=extra)
    columns = ["overlay", "beta = 0.5", "beta = 1", "steps.0", "steps.1", "steps.2"]
    assert len(figure.axes) == 2 * (1 + len(columns)) + 1
    layers = explanation.layer_saliency()
    for row in range(2):
        axes = figure.axes[row * 7 : row * 7 + 7]
        name = explanation.class_names[int(explanation.target[row])]
        assert axes[0].get_title(loc="left").startswith(f"{name}, p = 0.")
        assert [axis.get_title() for axis in axes[1:]] == columns
        drawn = [np.asarray(axis.images[0].get_array()) for axis in axes]
        assert np.array_equal(drawn[0], explanation.images[row].movedim(0, -1).numpy())
        assert np.array_equal(drawn[1], explanation.overlay()[row].movedim(0, -1).numpy())
        maps = [explanation.saliency[row], extra[0][1][row], *layers[:, row]]
        for picture, expected in zip(drawn[2:], maps, strict=True):
            assert np.array_equal(picture, expected.numpy())
        assert {axis.images[0].get_clim() for axis in axes[2:]} == {(0, 1)}


def test_a_figure_shows_as_many_samples_as_there_are(make_explanation):
    assert len(make_explanation(batch=1).plot(samples=4).axes) == 6 + 1
    assert len(make_explanation(batch=6).plot().axes) == 4 * 6 + 1


def test_a_class_without_a_name_is_numbered(make_classifier, make_images, make_explanation):
    explanation = make_explanation()
    nameless = type(explanation)(**{**vars(explanation), "class_names": ()})
    assert nameless.label(2) == "class 2"
    assert explanation.label(2) == "c"
    assert nameless.plot().axes[0].get_title(loc="left").startswith("class ")


@pytest.mark.parametrize(
    ("target", "batch", "samples", "words"),
    [
        ("all", 2, 4, r"one target per sample; explain with target=None"),
        (None, 2, 0, "samples must be at least 1 and the explanation not empty, got 0 of 2"),
        (None, 0, 4, "not empty, got 4 of 0"),
    ],
)
def test_what_cannot_be_drawn_is_named(make_explanation, target, batch, samples, words):
    with pytest.raises(ValueError, match=words):
        make_explanation(target, batch=batch).plot(samples=samples)


@pytest.mark.parametrize("draw", [lambda e: e.overlay(), lambda e: e.plot()])
def test_without_images_there_is_nothing_to_lay_over(make_explanation, draw):
    with pytest.raises(ValueError, match="carries no images; explain with keep_images=True"):
        draw(make_explanation(keep_images=False))


def test_drawing_does_not_touch_pyplot(python, tmp_path):
    """pyplot would keep every figure until it is closed, and look for a screen."""
    script = (
        "import sys, torch\n"
        "from mhex_vision import drawing\n"
        "assert 'matplotlib' not in sys.modules\n"
        "image, map = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.rand(4, 4)\n"
        "figure = drawing.figure([drawing.Row(image, 'title', [('map', map)], map)])\n"
        "drawing.save_figure(figure, __import__('pathlib').Path(sys.argv[1]))\n"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    path = tmp_path / "figure.png"
    done = python.run("-c", script, path)
    assert done.returncode == 0, done.stderr
    with Image.open(path) as image:
        assert image.format == "PNG"


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_picture_is_written_pixel_by_pixel(pictures, tmp_path):
    drawing.save_png(pictures[0], tmp_path / "no extension")
    with Image.open(tmp_path / "no extension") as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), pictures[0].movedim(0, -1).numpy())


@pytest.mark.parametrize("kind", ["png", "figure"])
def test_a_failure_leaves_the_picture_that_was_there(make_explanation, monkeypatch, tmp_path, kind):
    explanation, path = make_explanation(), tmp_path / "picture.png"
    figure = explanation.plot(samples=1)

    def save():
        if kind == "png":
            drawing.save_png(explanation.overlay()[0], path)
        else:
            drawing.save_figure(figure, path, dpi=20)

    save()
    before = path.read_bytes()

    def fail(self, target, **_):
        target.write_bytes(b"half of it")
        raise OSError("no space left on device")

    owner, method = (Image.Image, "save") if kind == "png" else (type(figure), "savefig")
    monkeypatch.setattr(owner, method, fail)
    with pytest.raises(OSError, match="no space left"):
        save()
    assert [entry.name for entry in tmp_path.iterdir()] == ["picture.png"]
    assert path.read_bytes() == before


def same(ours, theirs):
    assert type(ours) is type(theirs) is Explanation
    for name in ("saliency", "target", "probabilities", "head_logits", "positive", "negative", "images"):
        one, other = getattr(ours, name), getattr(theirs, name)
        if one is None:
            assert other is None
        else:
            assert_close(one, other, rtol=0, atol=0)
    assert ours.options == theirs.options
    assert (ours.layer_names, ours.class_names) == (theirs.layer_names, theirs.class_names)


@pytest.mark.parametrize("target", [None, "all"])
@pytest.mark.parametrize("keep_images", [True, False])
def test_a_file_keeps_the_images_too(make_explanation, tmp_path, target, keep_images):
    explanation = make_explanation(target, keep_images=keep_images, beta=0.5, layer_weights=[0.0, 1.0, 2.0])
    path = explanation.save(tmp_path / "explanation.npz")
    loaded = Explanation.load(path)
    same(loaded, explanation)
    if keep_images:
        assert_close(loaded.overlay(), explanation.overlay(), rtol=0, atol=0)
    same(loaded.reweighted(beta=0.0), explanation.reweighted(beta=0.0))


def test_mhex_core_reads_the_rest_of_the_file(make_explanation, tmp_path):
    explanation = make_explanation()
    loaded = mhex_core.Explanation.load(explanation.save(tmp_path / "explanation.npz"))
    assert_close(loaded.saliency, explanation.saliency, rtol=0, atol=0)


def test_slices_and_their_concatenation_keep_the_images(make_explanation):
    explanation = make_explanation(batch=4)
    parts = [explanation[:1], explanation[1:]]
    assert parts[0].images.shape == (1, 3, 12, 10)
    same(Explanation.concatenate(parts), explanation)
    bare = type(explanation)(**{**vars(parts[1]), "images": None})
    assert Explanation.concatenate([parts[0], bare]).images is None
    assert Explanation.concatenate([bare, parts[0]]).images is None

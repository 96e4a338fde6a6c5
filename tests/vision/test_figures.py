"""Figures for papers: nothing clipped, nothing overlapping, and text that stays text."""

import itertools

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from mhex_vision import drawing

LONG = "immature granulocytes (myelocytes, metamyelocytes and promyelocytes)"
NAMES = {
    "short": ("short", [f"layer{1 + index // 2}.{index % 2}" for index in range(8)]),
    "long": (LONG, [f"encoder.layers.encoder_layer_{index}.attention-block" for index in range(8)]),
    "one word": ("pneumonoultramicroscopicsilicovolcanoconiosis" * 3, ["m" * 60] * 8),
    "formulas": ("a $x_1$ and $\\nope", [f"$\\alpha_{index}$ % & #" for index in range(8)]),
}


def row(title, names, *, size=(12, 10), low=0.0):
    generator = torch.Generator().manual_seed(len(title))
    maps = [(name, low + (1 - low) * torch.rand(6, 5, generator=generator)) for name in ["beta = 0.35", *names]]
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    overlay = low + (1 - low) * torch.rand(size, generator=generator)
    return drawing.Row(image, f"{title}, p = 0.93", maps, overlay)


def extents(figure):
    """The box of every text that shows, in pixels."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    # An axis that is switched off keeps its tick labels, which nobody sees.
    hidden = {
        text
        for axes in figure.axes
        if not axes.axison
        for axis in (axes.xaxis, axes.yaxis)
        for text in axis.findobj(Text)
    }
    seen = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in seen if text not in hidden]


CASES = [(name, width, 1) for name in NAMES for width in (None, 3.3)]
CASES += [("long", None, 6), ("long", 3.3, 6), ("long", 1.2, 2), ("short", 6.9, 4), ("one word", 1.2, 1)]


@pytest.mark.parametrize(("name", "width", "samples"), CASES)
def test_no_text_is_clipped_and_none_lies_on_another(name, width, samples):
    title, layers = NAMES[name]
    low = -1.0 if samples == 2 else 0.0
    figure = drawing.figure([row(title, layers, low=low)] * samples, width=width)
    assert width is None or figure.get_figwidth() == pytest.approx(width)
    found = extents(figure)
    assert len(found) >= samples * (3 + 8) + 4
    for text, box in found:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
        assert inside, (text, box.extents, figure.bbox.extents)
    pictures = [axes.get_window_extent() for axes in figure.axes]
    for (one, box), (other, other_box) in itertools.combinations(found, 2):
        assert not overlap(box, other_box), (one, other)
    for text, box in found:
        assert not any(overlap(box, picture) for picture in pictures), text
    for one, other in itertools.combinations(pictures, 2):
        assert not overlap(one, other)


def overlap(one, other):
    # Half a pixel: a box of glyphs is rounded up.
    wide = min(one.x1, other.x1) - max(one.x0, other.x0)
    high = min(one.y1, other.y1) - max(one.y0, other.y0)
    return wide > 0.5 and high > 0.5


@pytest.mark.parametrize("size", [(64, 64), (20, 60), (60, 20)])
def test_pictures_keep_their_shape(size):
    figure = drawing.figure([row("a", ["b"], size=size)], width=3.3)
    figure.draw(FigureCanvasAgg(figure).get_renderer())
    box = figure.axes[0].get_window_extent()
    assert box.height / box.width == pytest.approx(size[0] / size[1], rel=1e-3)


def test_every_kind_of_map_has_its_scale():
    rows = [row("a", ["x", "y"]), row("b", ["x", "y"])]
    rows[1].maps[2] = ("y", rows[1].maps[2][1] - 0.5)
    figure = drawing.figure(rows)
    pictures, scales = figure.axes[:-2], figure.axes[-2:]
    assert [axes.get_xlabel().split(",")[0] for axes in scales] == [
        "saliency",
        "evidence for (1) and against (-1) the class",
    ]
    assert [[text.get_text() for text in axes.get_xticklabels()] for axes in scales] == [
        ["0", "0.5", "1"],
        ["-1", "0", "1"],
    ]
    # The same place is drawn alike in every row.
    kinds = [axes.images[0].get_cmap().name for axes in pictures if axes.get_title() == "y"]
    assert kinds == [drawing.DIVERGING] * 2
    assert [axes.images[0].get_clim() for axes in pictures if axes.get_title() == "x"] == [(0, 1)] * 2


def test_text_stays_text_and_nothing_else_changes(tmp_path):
    figure = drawing.figure([row("erythroblast", ["layer1.0"])], width=3.3)
    before = dict(mpl.rcParams)
    for name in ("figure.svg", "figure.pdf", "figure.png"):
        drawing.save_figure(figure, tmp_path / name)
        figure.savefig(tmp_path / f"direct-{name}")
    assert dict(mpl.rcParams) == before
    for name in ("figure.svg", "direct-figure.svg"):
        svg = (tmp_path / name).read_text()
        assert "erythroblast, p = 0.93</text>" in svg
        assert ">layer1.0</text>" in svg
    for name in ("figure.pdf", "direct-figure.pdf"):
        pdf = (tmp_path / name).read_bytes()
        assert pdf.startswith(b"%PDF")
        assert b"/Subtype /Type3" not in pdf
        assert b"/FontFile2" in pdf
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_settings_come_back_when_a_figure_cannot_be_written(tmp_path):
    figure = drawing.figure([row("a", ["b"])])
    before = dict(mpl.rcParams)
    with pytest.raises(OSError, match="nowhere"):
        figure.savefig(tmp_path / "nowhere" / "figure.pdf")
    assert dict(mpl.rcParams) == before


def test_a_notebook_shows_the_figure_without_pyplot():
    assert drawing.figure([row("a", ["b"])])._repr_png_().startswith(b"\x89PNG")


def test_samples_with_fewer_maps_leave_their_places_empty():
    figure = drawing.figure([row("a", ["x", "y", "z"]), row("b", [])], width=3.3)
    assert [axes.get_title() for axes in figure.axes[-4:-1]] == ["", "overlay", "beta = 0.35"]


@pytest.mark.parametrize("width", [0.5, float("nan"), "3in", True])
def test_a_width_that_cannot_be_is_named(width):
    with pytest.raises((TypeError, ValueError), match="width must be"):
        drawing.figure([row("a", ["b"])], width=width)


def test_an_explanation_is_drawn_to_a_papers_width(make_explanation):
    explanation = make_explanation(batch=3)
    figure = explanation.plot(width=3.3)
    assert figure.get_figwidth() == pytest.approx(3.3)
    name = explanation.class_names[int(explanation.target[0])]
    assert figure.axes[0].get_title(loc="left").startswith(f"{name}, p = 0.")
    drawn = np.asarray(figure.axes[2].images[0].get_array())
    assert np.array_equal(drawn, explanation.saliency[0].numpy())

"""Maps of images in a real browser: the numbers are Python's, whatever a reader sets."""

import io
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

from mhex_core.explorer import Evidence, Sample, explorer_page

from .pages import CLASSES, Maps, image_sample, method, picture, random_maps

CLOSE = 1e-3


def values(page, pane=0):
    page.evaluate("() => window.mhexExplorer.settled()")
    return np.array(page.evaluate("(pane) => window.mhexExplorer.values(pane)", pane))


def state(page):
    page.evaluate("() => window.mhexExplorer.settled()")
    return page.evaluate("() => window.mhexExplorer.state()")


def slide(page, name, value):
    """Press the mouse where a slider has a value."""
    slider = page.get_by_role("slider", name=name, exact=True)
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    low, high = (float(slider.get_attribute(end)) for end in ("min", "max"))
    thumb = 16
    x = box["x"] + thumb / 2 + (value - low) / (high - low) * (box["width"] - thumb)
    page.mouse.move(x + 9, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(x, box["y"] + box["height"] / 2)
    page.mouse.up()


@pytest.fixture
def mhex(write_page, open_page):
    """A page of four images by one method, and the maps of its first image."""
    one = method()
    samples, maps = zip(*(image_sample(seed, [one]) for seed in range(4)), strict=True)
    page = open_page(write_page(explorer_page(samples, methods=[one], class_names=CLASSES)))
    return page, one, samples, maps


def test_sliders_that_are_really_moved_give_the_maps_of_python(mhex):
    page, one, samples, maps = mhex
    target = samples[0].evidence[0].target
    found = maps[0][0, target]
    np.testing.assert_allclose(values(page), found.saliency(one).ravel(), atol=CLOSE)
    slide(page, "Evidence against, β", 0.35)
    slide(page, "layer2.0", 1.6)
    page.get_by_role("slider", name="layer3.0", exact=True).focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.get_by_role("spinbutton", name="Weight of layer4.0").fill("0.25")
    page.keyboard.press("Enter")
    pane = state(page)["panes"][0]
    assert pane["beta"] == pytest.approx(0.35, abs=0.02)
    assert pane["weights"][0] == pytest.approx(0.729)
    assert pane["weights"][1] == pytest.approx(1.6, abs=0.03)
    assert pane["weights"][2:] == pytest.approx([0.95, 0.25])
    expected = found.saliency(one, beta=pane["beta"], weights=pane["weights"])
    np.testing.assert_allclose(values(page), expected.ravel(), atol=CLOSE)
    page.get_by_role("button", name="Reset all").click()
    np.testing.assert_allclose(values(page), found.saliency(one).ravel(), atol=CLOSE)


def test_a_layer_alone_and_another_class(mhex):
    page, one, samples, maps = mhex
    second = samples[0].evidence[1].target
    page.get_by_label("Class explained").first.select_option(str(second))
    np.testing.assert_allclose(values(page), maps[0][0, second].saliency(one).ravel(), atol=CLOSE)
    for place, layer in enumerate(one.layer_names):
        only = [float(index == place) for index in range(len(one.layer_names))]
        page.get_by_role("button", name=f"Only {layer}").first.click()
        expected = maps[0][0, second].saliency(one, weights=only)
        np.testing.assert_allclose(values(page), expected.ravel(), atol=CLOSE)
        assert page.get_by_role("button", name=f"Only {layer}").first.get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name="Reset the layer weights").click()
    np.testing.assert_allclose(values(page), maps[0][0, second].saliency(one).ravel(), atol=CLOSE)


SETTINGS = [(0.0, (1, 1, 1, 1)), (1.0, (0, 2, 0.5, 1)), (0.35, (0.1, 0, 0, 1.9)), (0.7, (0, 0, 0, 0))]
KINDS = {
    "plain": {},
    "floor": {"floor": 0.6},
    "high floor": {"floor": 0.95},
    "bare": {"normalize": False},
    "bare with a floor": {"normalize": False, "floor": 0.5},
    "signed": {"normalize": False, "signed": True},
}


@pytest.mark.parametrize("size", [(13, 11), (1, 9), (40, 17)], ids=str)
def test_every_kind_of_map_at_odd_sizes(write_page, open_page, size):
    methods = [method(name, **settings) for name, settings in KINDS.items()]
    sample, maps = image_sample(3, methods, size=size, targets=1)
    path = write_page(explorer_page([sample], methods=methods, class_names=CLASSES))
    page = open_page(path)
    for number, one in enumerate(methods):
        found = maps[number, sample.evidence[0].target]
        for beta, weights in SETTINGS:
            fragment = f"s=0&m={number}&b={beta}&w={','.join(map(str, weights))}"
            page.evaluate("(fragment) => { location.hash = fragment; }", fragment)
            page.wait_for_function(
                "([m, b]) => { const p = mhexExplorer.state().panes[0]; return p.method === m && p.beta === b }",
                arg=[number, beta],
            )
            expected = found.saliency(one, beta=beta, weights=weights).ravel()
            scale = 1 if one.normalize else max(1e-9, np.abs(expected).max())
            np.testing.assert_allclose(values(page) / scale, expected / scale, atol=CLOSE, err_msg=f"{one.name} {beta}")


def test_constant_and_cancelled_maps_are_nothing(write_page, open_page):
    one = method(layers=((3, 2), (3, 2)), layer_weights=(1.0, 1.0))
    level = torch.full((3, 2), 0.3)
    noise = random_maps(0, layers=((3, 2),)).positive[0].float()
    cases = {
        "constant": ((level, level), (-level, -level)),
        "zero": ((0 * level, 0 * level), (0 * level, 0 * level)),
        # Every layer's evidence against takes away what is for: with beta 1 nothing is left but rounding.
        "cancelled": ((noise, noise), (-noise, -noise)),
    }
    samples = [
        Sample(
            name=name,
            probabilities=(0.5, 0.5),
            evidence=(Evidence.of_layers(*parts, method=0, target=0, size=(9, 7)),),
            picture=picture(0, (9, 7)),
        )
        for name, parts in cases.items()
    ]
    page = open_page(write_page(explorer_page(samples, methods=[one])))
    for number, (name, parts) in enumerate(cases.items()):
        page.get_by_role("button", name=name).click()
        for _ in range(20 if name == "cancelled" else 0):
            page.keyboard.press("b")
        beta = state(page)["panes"][0]["beta"]
        expected = Maps(*parts, (9, 7)).saliency(one, beta=beta)
        assert state(page)["panes"][0]["sample"] == number
        assert not expected.any()
        assert not values(page).any()
        page.get_by_text("the same everywhere", exact=True).wait_for()
        assert "The same everywhere" in page.get_by_role("img").get_attribute("aria-label")


def canvas_pixels(page, selector):
    """What is on a canvas: (H, W, 4)."""
    script = """(selector) => { const canvas = document.querySelector(selector);
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        return [canvas.height, canvas.width, Array.from(data)]; }"""
    height, width, data = page.evaluate(script, selector)
    return np.array(data).reshape(height, width, 4)


@pytest.mark.parametrize("colours", ["inferno", "viridis", "cividis", "magma", "grey", "signed"])
def test_pixels_have_the_colours_of_the_map(write_page, open_page, colours):
    one = method(**({"normalize": False, "signed": True, "beta": 0.8} if colours == "signed" else {}))
    sample, _ = image_sample(2, [one], targets=1)
    page = open_page(write_page(explorer_page([sample], methods=[one], class_names=CLASSES)))
    name = {"grey": "gray", "signed": "RdBu_r"}.get(colours, colours)
    if colours != "signed":
        page.get_by_label("Colours", exact=True).select_option(colours)
    drawn = values(page).reshape(13, 11)
    if colours == "signed":
        drawn = drawn / np.abs(drawn).max()
        assert drawn.min() < -0.1 < 0.1 < drawn.max()
    expected = np.rint(255 * mpl.colormaps[name]((drawn + 1) / 2 if colours == "signed" else drawn)[..., :3])
    alone = canvas_pixels(page, "figure:nth-child(3) .heat")
    assert (alone[..., 3] == 255).all()
    # Values that lie at the border of two of 256 colours may get either.
    steps = np.abs(np.diff(mpl.colormaps[name](np.arange(256))[:, :3], axis=0)).max() * 255
    assert np.abs(alone[..., :3] - expected).max() <= np.ceil(steps)
    assert (np.abs(alone[..., :3] - expected).max(axis=-1) == 0).mean() > 0.95
    over = canvas_pixels(page, "figure:nth-child(2) .heat")
    assert np.abs(over[..., 3] - 255 * np.abs(drawn)).max() <= 1
    shown = canvas_pixels(page, "figure:nth-child(2) .picture")
    np.testing.assert_array_equal(shown[..., :3], np.array(Image.open(io.BytesIO(sample.picture.data)).convert("RGB")))


def test_what_is_seen_is_the_mixture(write_page, open_page):
    one = method()
    sample, _ = image_sample(2, [one], size=(128, 96), targets=1)
    page = open_page(write_page(explorer_page([sample], methods=[one], class_names=CLASSES)))
    slide(page, "Opacity", 0.9)
    opacity = state(page)["opacity"]
    assert opacity == pytest.approx(0.9, abs=0.02)
    drawn = values(page).reshape(128, 96)
    stack = page.get_by_role("img")
    page.mouse.move(2, 2)
    seen = Image.open(io.BytesIO(stack.screenshot())).convert("RGB").resize((96, 128), Image.Resampling.BOX)
    below = np.array(Image.open(io.BytesIO(sample.picture.data)).convert("RGB"), dtype=float)
    cover = (opacity * drawn)[..., None]
    mixed = below * (1 - cover) + 255 * mpl.colormaps["inferno"](drawn)[..., :3] * cover
    inner = np.abs(np.array(seen, dtype=float) - mixed)[8:-8, 8:-8]  # corners are round
    assert np.median(inner) < 3
    assert inner.mean() < 6


def test_an_outline_and_the_share_of_the_area(mhex):
    page, *_ = mhex
    assert page.locator("figure:nth-child(2) path.line").first.get_attribute("d") == ""
    slide(page, "Outline at", 0.5)
    drawn = values(page).reshape(13, 11)
    threshold = state(page)["threshold"]
    share = (drawn >= threshold).mean()
    page.get_by_text(f"{100 * share:.1f} % of the area at or above {threshold:.2f}").wait_for()
    data = page.locator("figure:nth-child(2) path.line").first.get_attribute("d")
    points = np.array([[float(number) for number in point.split()] for point in data[1:].replace("M", "L").split("L")])
    # On every point of the line the map, read bilinearly, has the threshold's value.
    x, y = (points - 0.5).T
    column, row = (np.clip(np.floor(part).astype(int), 0, side - 2) for part, side in ((x, 11), (y, 13)))
    across, down = x - column, y - row
    upper = (1 - across) * drawn[row, column] + across * drawn[row, column + 1]
    lower = (1 - across) * drawn[row + 1, column] + across * drawn[row + 1, column + 1]
    np.testing.assert_allclose((1 - down) * upper + down * lower, threshold, atol=0.01)


def test_values_are_read_by_pointer_and_by_keys(mhex):
    page, *_ = mhex
    drawn = values(page).reshape(13, 11)
    stack = page.get_by_role("img")
    box = stack.bounding_box()
    page.mouse.move(box["x"] + (4.5 / 11) * box["width"], box["y"] + (7.5 / 13) * box["height"])
    reading = page.locator("#reading-0")
    assert reading.inner_text().startswith("Column 4, row 7: ")
    assert float(reading.inner_text().split(": ")[1]) == pytest.approx(drawn[7, 4], abs=CLOSE)
    page.mouse.move(2, 2)
    stack.focus()
    page.keyboard.press("ArrowLeft")
    assert reading.inner_text().startswith("Column 5, row 6: ")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Shift+ArrowLeft")
    assert reading.inner_text().startswith("Column 0, row 5: ")
    assert state(page)["panes"][0]["sample"] == 0


def test_two_views_beside_one_another(write_page, open_page):
    methods = [method(), method("gradcam", layers=((1, 1),), normalize=False, signed=True, beta=1.0)]
    samples, maps = zip(*(image_sample(seed, methods) for seed in range(3)), strict=True)
    page = open_page(write_page(explorer_page(samples, methods=methods, class_names=CLASSES)))
    page.keyboard.press("c")
    second = page.get_by_role("region", name="View B")
    second.get_by_label("Method").select_option("1")
    target = samples[0].evidence[0].target
    expected = maps[0][1, target].saliency(methods[1]).ravel()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(values(page, 1) / scale, expected / scale, atol=CLOSE)
    np.testing.assert_allclose(values(page, 0), maps[0][0, target].saliency(methods[0]).ravel(), atol=CLOSE)
    # Linked sliders act on both, others on the active one.
    slide(page, "Evidence against, β", 0.5)
    assert state(page)["panes"][0]["beta"] == state(page)["panes"][1]["beta"] != 0
    page.get_by_role("radio", name="A", exact=True).check()
    slide(page, "Evidence against, β", 0.2)
    first, other = state(page)["panes"]
    assert first["beta"] == pytest.approx(0.2, abs=0.02)
    assert other["beta"] == pytest.approx(0.5, abs=0.02)
    second.get_by_label("Sample", exact=True).select_option("2")
    assert [pane["sample"] for pane in state(page)["panes"]] == [0, 2]
    # What is right of the active view goes, and the rest stays.
    page.get_by_role("region", name="View A").get_by_role("heading").first.click()
    page.get_by_role("button", name="Compare").click()
    assert [pane["sample"] for pane in state(page)["panes"]] == [0]


def test_a_link_shows_the_same_again(mhex, open_page, tmp_path):
    page, *_ = mhex
    page.keyboard.press("ArrowRight")
    slide(page, "Evidence against, β", 0.4)
    slide(page, "layer1.0", 1.3)
    slide(page, "Outline at", 0.6)
    page.keyboard.press("c")
    page.keyboard.press("j")
    before = state(page)
    page.wait_for_function("() => location.hash.includes('s2=2')")
    page.wait_for_timeout(200)
    again = open_page(tmp_path / "page.html", fragment=page.evaluate("() => location.hash"))
    after = state(again)
    before["active"] = 0
    assert after == before
    np.testing.assert_allclose(values(again, 1), values(page, 1), atol=1e-6)


@pytest.mark.parametrize(
    "fragment",
    ["s=99&m=7&t=-1&b=9&w=1,2", "s=&b=&w=&q=&o=", "s=1.5&b=x&w=a,b,c,d", "%E0%A4%A", "s=0&s2=77&c=__proto__"],
)
def test_a_link_that_does_not_fit_changes_nothing(mhex, open_page, tmp_path, fragment):
    *_, samples, _ = mhex
    page = open_page(tmp_path / "page.html", fragment=f"#{fragment}")
    shown = state(page)
    assert shown["panes"][0]["target"] == samples[0].evidence[0].target
    assert shown["panes"][0]["beta"] == 0
    assert (shown["colours"], shown["threshold"]) == ("inferno", 0)


def test_a_picture_and_a_line_of_python_to_take_along(mhex):
    page, one, samples, maps = mhex
    slide(page, "Evidence against, β", 0.35)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save PNG").click()
    with Image.open(download.value.path()) as saved:
        assert saved.format == "PNG"
        assert saved.width >= 512
        assert saved.width / saved.height == pytest.approx(11 / 13)
    page.evaluate(
        "() => { navigator.clipboard.writeText = (text) => { window.copied = text; return Promise.resolve(); } }"
    )
    page.get_by_role("button", name="Copy Python").click()
    text = page.evaluate("() => window.copied")
    explanation = SimpleNamespace(reweighted=lambda *, beta, layer_weights: (beta, layer_weights))
    beta, weights = eval(text, {"explanation": explanation})
    assert beta == pytest.approx(0.35, abs=0.02)
    assert weights == pytest.approx(list(one.layer_weights), abs=1e-9)
    found = maps[0][0, samples[0].evidence[0].target]
    np.testing.assert_allclose(values(page), found.saliency(one, beta=beta, weights=weights).ravel(), atol=CLOSE)
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no')); }")
    page.get_by_role("button", name="Copy Python").click()
    assert page.get_by_role("dialog").get_by_role("textbox").input_value() == text

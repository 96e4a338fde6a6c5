"""The page as a whole: gallery, keys, names, contrast, narrow and dark screens, faults, and how fast it is there."""

import itertools
import re

import numpy as np
import pytest

from mhex_core.explorer import Method, explorer_page, notebook_frame

from .pages import CLASSES, MOVED, image_sample, method, picture, text_sample

RESNET = ((56, 56), (56, 56), (28, 28), (28, 28), (14, 14), (14, 14), (7, 7), (7, 7))


@pytest.fixture
def gallery(write_page, open_page):
    """A page of twelve images, the last without a label."""
    one = method()
    samples = [image_sample(seed, [one], **({"label": None} if seed == 11 else {}))[0] for seed in range(12)]
    return open_page(write_page(explorer_page(samples, methods=[one], class_names=CLASSES, title="Twelve"))), samples


def names(page):
    return page.locator(".card-name bdi").all_text_contents()


def drag(page, name, key, presses):
    page.get_by_role("slider", name=name, exact=True).focus()
    for _ in range(presses):
        page.keyboard.press(key)


def test_filters_and_orders(gallery):
    page, samples = gallery
    assert names(page) == [sample.name for sample in samples]
    page.get_by_role("radio", name="Wrong").check()
    wrong = [sample.name for sample in samples if sample.label not in (None, sample.prediction)]
    assert names(page) == wrong
    page.get_by_text(f"{len(wrong)} of 12").wait_for()
    assert page.locator("#announcement").text_content() == f"{len(wrong)} samples shown"
    page.get_by_role("radio", name="Unknown").check()
    assert names(page) == ["sample 11"]
    page.get_by_role("radio", name="Right").check()
    assert names(page) == [sample.name for sample in samples if sample.label == sample.prediction]
    page.get_by_text("Filter and sort").click()
    page.get_by_role("button", name="Clear filters").click()
    page.get_by_label("Predicted", exact=True).select_option(label="cat")
    assert names(page) == [sample.name for sample in samples if sample.prediction == 0]
    page.get_by_label("Predicted", exact=True).select_option(label="Any")
    page.get_by_label("True class", exact=True).select_option(label="dog")
    assert names(page) == [sample.name for sample in samples if sample.label == 2]
    page.get_by_role("button", name="Clear filters").click()
    drag(page, "Confidence from", "ArrowRight", 70)
    sure = [sample.name for sample in samples if max(sample.probabilities) >= 0.7]
    assert names(page) == sure
    drag(page, "Confidence to", "ArrowLeft", 10)
    assert names(page) == [sample.name for sample in samples if 0.7 <= max(sample.probabilities) <= 0.9]
    page.get_by_role("button", name="Clear filters").click()
    page.get_by_label("Order").select_option("doubtful")
    assert names(page) == [sample.name for sample in sorted(samples, key=lambda sample: max(sample.probabilities))]
    page.get_by_role("searchbox").fill("E 1")
    assert sorted(names(page)) == ["sample 1", "sample 10", "sample 11"]
    page.get_by_role("searchbox").fill("nobody")
    assert names(page) == []
    assert page.locator("#announcement").text_content() == "No sample passes these filters"


def test_keys(gallery):
    page, _ = gallery
    here = """() => { const { panes, opacity } = mhexExplorer.state();
        return [panes[0].sample, panes[0].beta, opacity, panes.length]; }"""
    for key in ("ArrowRight", "j", "j", "ArrowLeft", "b", "b", "B", "o", "c"):
        page.keyboard.press(key)
    page.evaluate("() => mhexExplorer.settled()")
    assert page.evaluate(here) == [2, 0.05, 0.7, 2]
    page.keyboard.press("c")
    page.keyboard.press("l")
    assert page.evaluate("() => document.activeElement.getAttribute('aria-label')") == "Only layer1.0"
    page.keyboard.press("/")
    page.keyboard.type("jbo")
    assert page.get_by_role("searchbox").input_value() == "jbo"
    page.get_by_role("searchbox").fill("")
    page.get_by_role("heading", level=1).click()
    page.keyboard.press("?")
    page.get_by_role("dialog", name="Keys").wait_for()
    page.keyboard.press("j")
    page.keyboard.press("Escape")
    assert page.get_by_role("dialog").count() == 0
    assert page.evaluate(here)[0] == 2


def test_a_link_followed_while_a_slider_moves_is_not_lost(gallery):
    page, _ = gallery
    # A movement's address is written a moment later; here that moment comes between a link and the event it causes.
    page.evaluate("() => { window.late = []; window.setTimeout = (f) => late.push(f); }")
    page.keyboard.press("b")
    page.evaluate("() => { location.hash = 's=3&b=0.5'; late.forEach((f) => f()); }")
    page.wait_for_function("() => mhexExplorer.state().panes[0].sample === 3")
    assert page.evaluate("() => mhexExplorer.state().panes[0].beta") == 0.5
    # And later movements are written as before.
    page.evaluate("() => { late.length = 0; }")
    page.keyboard.press("b")
    page.wait_for_function("() => late.length > 0")
    page.evaluate("() => late.forEach((f) => f())")
    assert "b=0.55" in page.evaluate("() => location.hash")


@pytest.mark.parametrize("fixed", [True, False])
def test_what_was_stored_cannot_be_weighed_anew(write_page, open_page, fixed):
    one = method("mhex", layers=((8, 8),), layer_weights=(1.0,), fixed=fixed)
    sample, _ = image_sample(0, [one], layers=((8, 8),))
    page = open_page(write_page(explorer_page([sample], methods=[one], class_names=CLASSES)))
    against = page.get_by_role("slider", name="Evidence against, β")
    assert against.count() == page.get_by_role("button", name="Copy Python").count() == (0 if fixed else 1)
    assert page.get_by_text("Shown as it was stored").count() == fixed
    before = page.evaluate("() => mhexExplorer.state().panes[0].beta")
    page.keyboard.press("b")
    assert (page.evaluate("() => mhexExplorer.state().panes[0].beta") == before) == fixed


def test_everything_has_a_name_and_can_be_reached(gallery):
    page, _ = gallery
    page.keyboard.press("c")
    page.get_by_text("Filter and sort").click()
    page.evaluate("() => mhexExplorer.settled()")
    assert page.get_by_role("heading", level=1).count() == 1
    assert page.locator("main").count() == 1
    script = """() => [...document.querySelectorAll("button, input, select, summary, [tabindex='0']")]
        .filter((element) => element.checkVisibility())
        .filter((element) => !(element.getAttribute("aria-label") || element.textContent.trim() ||
            element.labels?.[0]?.textContent.trim()))
        .map((element) => element.outerHTML)"""
    assert page.evaluate(script) == []
    ids = page.evaluate("() => [...document.querySelectorAll('[id]')].map((element) => element.id)")
    assert len(ids) == len(set(ids))
    for attribute in ("aria-labelledby", "aria-describedby"):
        used = page.evaluate(
            f"() => [...document.querySelectorAll('[{attribute}]')].map((e) => e.getAttribute('{attribute}'))"
        )
        assert set(used) <= set(ids)
    levels = page.evaluate(
        "() => [...document.querySelectorAll('h1, h2, h3')].map((heading) => Number(heading.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    # Tab goes through the page as it is read: header, gallery, views, settings.
    page.get_by_role("heading", level=1).click()
    seen = []
    where = """() => { const area = document.activeElement.closest("header, .gallery, .pane, .settings");
        return area?.className || area?.tagName || "elsewhere"; }"""
    for _ in range(80):
        page.keyboard.press("Tab")
        place = page.evaluate(where)
        if not seen or seen[-1] != place:
            seen.append(place)
    assert seen[:4] == ["HEADER", "gallery", "pane active", "settings"]
    outline = "() => getComputedStyle(document.activeElement).outlineStyle"
    page.get_by_role("heading", level=1).click()
    page.keyboard.press("Tab")
    assert page.evaluate(outline) == "solid"


def luminance(colour):
    red, green, blue = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in np.array(colour) / 255
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_contrast(write_page, open_page, dark):
    one = Method(name="mhex", layer_names=("a",), layer_weights=(1,))
    page = open_page(write_page(explorer_page([text_sample(0, layers=1)[0]], methods=[one])), dark=dark)
    script = """(names) => { const probe = document.body.appendChild(document.createElement("i"));
        const read = (name) => { probe.style.color = `var(--${name})`;
            return getComputedStyle(probe).color.match(/\\d+/g).map(Number); };
        return Object.fromEntries(names.map((name) => [name, read(name)])); }"""
    grounds, inks = ("ground", "surface", "raised", "tint"), ("ink", "muted", "accent", "right", "wrong")
    colours = page.evaluate(script, [*grounds, *inks, "field"])

    def contrast(one, other):
        low, high = sorted((luminance(colours[one]), luminance(colours[other])))
        return (high + 0.05) / (low + 0.05)

    for text in inks:
        for below in grounds:
            assert contrast(text, below) >= 4.5, (text, below)
    assert contrast("field", "surface") >= 3
    # A word at full strength is still read.
    span = (
        "(s) => { s.style.setProperty('--s', 1); const c = getComputedStyle(s); return [c.color, c.backgroundColor] }"
    )
    for kind in ("for", "against"):
        ink, paper = page.locator(f".legend .piece.{kind}").first.evaluate(span)
        colours["ink"], colours["paper"] = ([int(n) for n in re.findall(r"\d+", part)[:3]] for part in (ink, paper))
        assert contrast("ink", "paper") >= 4.5, kind


@pytest.mark.parametrize(("width", "height"), [(1440, 900), (1024, 768), (360, 740)])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_no_screen_scrolls_sideways(write_page, open_page, screenshot, kind, width, height, dark):
    if kind == "images":
        methods = [method(layers=RESNET), method("gradcam", layers=((1, 1),), normalize=False, signed=True, beta=1.0)]
        samples = [image_sample(seed, methods, size=(96, 128), layers=RESNET, targets=2)[0] for seed in range(8)]
        names = ("ventricular septal defect with a very long name", "Ωμέγα", "قطة", "dog")
    else:
        methods = [Method(name="mhex", layer_names=("a", "b.output", "c"), layer_weights=(1, 1, 1), beta=0.4)]
        samples = [text_sample(seed, words=60, pair=seed == 0)[0] for seed in range(8)]
        names = ("world", "sports", "business", "science")
    path = write_page(explorer_page(samples, methods=methods, class_names=names, title="What the network saw"))
    page = open_page(path, width=width, height=height, dark=dark, fragment="#q=0.5")
    page.wait_for_timeout(300)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    screenshot(page, f"{kind}-{width}-{'dark' if dark else 'light'}")
    page.get_by_role("button", name="Compare").click()
    page.evaluate("() => mhexExplorer.settled()")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    screenshot(page, f"{kind}-{width}-{'dark' if dark else 'light'}-compare")
    if width < 1180:
        page.locator(".settings > summary").click()
        page.get_by_role("slider", name="Evidence against, β").wait_for()
        screenshot(page, f"{kind}-{width}-{'dark' if dark else 'light'}-settings")
    page.emulate_media(media="print")
    page.locator(".gallery").wait_for(state="hidden")


def test_light_and_dark_can_be_chosen(gallery):
    page, _ = gallery
    ground = "() => getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(ground)
    button = page.get_by_role("button", name=re.compile("^Colours:"))
    button.click()
    assert page.evaluate(ground) == before
    button.click()
    assert page.evaluate(ground) != before
    assert button.get_attribute("aria-label") == "Colours: dark"


def test_one_sample_and_five_hundred(write_page, open_page):
    one = method()
    sample, _ = image_sample(0, [one])
    page = open_page(write_page(explorer_page([sample], methods=[one]), "one.html"))
    assert page.locator(".card").count() == 0
    page.get_by_role("heading", name="sample 0").wait_for()
    page.keyboard.press("ArrowRight")
    many = [image_sample(0, [one], name=f"<b>{number}</b> & more", targets=1)[0] for number in range(500)]
    page = open_page(write_page(explorer_page(many, methods=[one]), "many.html"))
    assert page.locator(".card").count() == 500
    assert page.locator(".card b").count() == 0
    for _ in range(3):
        page.keyboard.press("j")
    page.evaluate("() => mhexExplorer.settled()")
    page.get_by_role("heading", name="<b>3</b> & more").wait_for()


def test_no_more_is_unpacked_than_is_seen(write_page, open_page):
    one = method(layers=((64, 64),))
    samples = [image_sample(seed, [one], layers=((64, 64),), targets=1)[0] for seed in range(120)]
    path = write_page(explorer_page(samples, methods=[one]))
    counting = """"use strict"; window.made = 0;
        window.DecompressionStream = class extends DecompressionStream {
            constructor(...kind) { super(...kind); window.made += 1; } };"""
    text = path.read_text().replace('"use strict";', counting, 1)
    path.write_text(text)
    page = open_page(path)
    page.wait_for_timeout(500)
    assert 1 <= page.evaluate("() => window.made") < 40


@pytest.mark.parametrize("damage", ["evidence", "picture", "missing"])
def test_a_damaged_sample_is_one_sentence_and_the_others_stay(write_page, open_page, damage):
    one = method()
    samples = [image_sample(seed, [one], targets=1)[0] for seed in range(3)]
    path = write_page(explorer_page(samples, methods=[one]))
    text = path.read_text()
    lines = re.search(r'id="block-0">\n(.*?)\n</script>', text, re.DOTALL).group(1).split("\n")
    if damage == "missing":
        text = text.replace('id="block-0"', 'id="block-x"')
    else:
        line = lines[damage == "evidence"]
        broken = line[:40] + "AAAA" + line[44:-8] if damage == "evidence" else "data:image/png;base64,AAAA"
        text = text.replace(line, broken, 1)
    path.write_text(text)
    page = open_page(path)
    fault = page.get_by_role("alert")
    fault.wait_for()
    assert "the file is damaged" in fault.inner_text()
    page.keyboard.press("j")
    page.evaluate("() => mhexExplorer.settled()")
    fault.wait_for(state="hidden")
    assert len(page.evaluate("() => mhexExplorer.values()")) == 13 * 11


def test_a_browser_that_cannot_unpack_and_a_file_that_was_cut(write_page, open_page, tmp_path):
    one = method()
    text = explorer_page([image_sample(0, [one])[0]], methods=[one]).html
    path = tmp_path / "old.html"
    path.write_text(text.replace('"use strict";', '"use strict"; delete window.DecompressionStream;', 1))
    page = open_page(path)
    assert "This browser cannot unpack" in page.get_by_role("alert").inner_text()
    path = tmp_path / "version.html"
    path.write_text(text.replace('"version":1', '"version":2'))
    page = open_page(path)
    assert "version 1" in page.get_by_role("alert").inner_text()
    path = tmp_path / "empty.html"
    path.write_text(explorer_page([], methods=[one]).html)
    assert "no samples" in open_page(path).get_by_role("alert").inner_text()


def test_a_notebook_shows_it_in_a_frame(open_page, tmp_path):
    one = method()
    samples = [image_sample(seed, [one])[0] for seed in range(3)]
    frame = notebook_frame(explorer_page(samples, methods=[one], class_names=CLASSES, compact=True))
    path = tmp_path / "notebook.html"
    path.write_text(f"<!DOCTYPE html><title>x</title><body>{frame}<script>window.mhexExplorer = {{}}</script>")
    page = open_page(path, width=900)
    inner = page.frame_locator("iframe")
    inner.get_by_role("heading", name="sample 0").wait_for()
    map_, slider = (inner.get_by_role(role).first.bounding_box() for role in ("img", "slider"))
    assert map_["x"] + map_["width"] < slider["x"]
    assert slider["y"] < map_["y"] + map_["height"]
    inner.get_by_role("button", name="Next sample").click()
    inner.get_by_role("heading", name="sample 1").wait_for()
    inner.get_by_label("Sample", exact=True).select_option("2")
    inner.get_by_role("heading", name="sample 2").wait_for()
    assert inner.locator(".card").count() == 0
    assert inner.get_by_role("button", name="Compare").count() == 0
    assert inner.get_by_role("alert").count() == 0


def test_two_hundred_images_are_there_at_once(write_page, open_page, screenshot):
    one = method(layers=RESNET)
    samples = []
    for seed in range(200):
        # A few dozen different ones: making them takes longer than showing them.
        sample, _ = image_sample(
            seed % 25, [one], size=(224, 224), layers=RESNET, targets=3, name=f"image {seed}",
            picture=picture(seed % 25, (224, 224), jpeg=True),
        )  # fmt: skip
        samples.append(sample)
    made = explorer_page(samples, methods=[one], class_names=CLASSES, max_bytes=30_000_000)
    path = write_page(made)
    assert path.stat().st_size <= 30_000_000
    page = open_page(path)
    milliseconds = page.evaluate(
        "async () => { await mhexExplorer.ready; return performance.getEntriesByName('mhex-ready')[0].startTime }"
    )
    movement = page.evaluate(MOVED)
    print(  # noqa: T201
        f"200 images: {path.stat().st_size / 1e6:.1f} MB, ready in {milliseconds / 1000:.2f} s, "
        f"{movement:.0f} ms per movement, {made.left_out} of {made.left_out + made.targets} maps left out"
    )
    screenshot(page, "images-200")
    assert milliseconds < 4000

"""The page: what is in it, what it refuses, how it is kept small, and that no name can break out of it."""

import base64
import html
import json
import re
from html.parser import HTMLParser

import pytest
import torch

from mhex_core.explorer import Evidence, Method, Picture, Piece, Sample, explorer_page, notebook_frame
from mhex_core.explorer.packing import unpacked

SHAPES = ((3, 2), (2, 2))
NASTY = "</script><script>alert(1)</script><!-- <b>&amp;\u2028\"'"


def evidence(method=0, target=0, seed=0, *, noisy=(40, 40)):
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(shape, generator=generator) for shape in (noisy, SHAPES[1])]
    return Evidence.of_layers(layers, layers, method=method, target=target, size=(9, 7))


def image(number=0, targets=(1, 0, 2), methods=1, **fields):
    found = tuple(evidence(m, t, 100 * number + 10 * m + t) for m in range(methods) for t in targets)
    defaults = {"name": f"image {number}", "picture": Picture(b"\x89PNG", "image/png", 7, 9)}
    return Sample(probabilities=(0.2, 0.7, 0.1), evidence=found, **(defaults | fields))


def text(**fields):
    layers = [torch.randn(2), torch.randn(2)]
    found = (Evidence.of_layers(layers, layers, method=0, target=0),)
    pieces = (Piece("a", (0,)), Piece(" "), Piece("b", (1,)), Piece("c", seen=False))
    defaults = {"name": "text", "texts": (pieces,), "tokens": ("a", "b")}
    return Sample(probabilities=(0.2, 0.7, 0.1), evidence=found, **(defaults | fields))


METHOD = Method(name="mhex", layer_names=("one", "two"), layer_weights=(0.9, 1))


class Scripts(HTMLParser):
    """The script elements of a page as a browser finds them: (attributes, content)."""

    def __init__(self, page):
        super().__init__()
        self.found, self.inside = [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "script":
            self.found.append([dict(attributes), ""])
            self.inside = True

    def handle_data(self, data):
        if self.inside:
            self.found[-1][1] += data

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "script"


def document(page):
    return json.loads(Scripts(page.html).found[0][1])


def test_what_is_in_a_page():
    samples = [image(0, label=1, heads=((1, 0.8), (0, 0.5)), note="cut"), image(1)]
    page = explorer_page(
        samples, methods=[METHOD], class_names=("a", "b", "c"), title="Title", about={"checkpoint": "run"}
    )
    found = document(page)
    assert {key: found[key] for key in ("format", "version", "kind", "title", "about", "compact", "class_names")} == {
        "format": "mhex-explorer",
        "version": 1,
        "kind": "images",
        "title": "Title",
        "about": {"checkpoint": "run"},
        "compact": False,
        "class_names": ["a", "b", "c"],
    }
    first = found["samples"][0]
    assert (first["name"], first["label"], first["prediction"], first["note"]) == ("image 0", 1, 1, "cut")
    assert first["probabilities"] == [[1, 0.7], [0, 0.2], [2, 0.1]]
    assert first["heads"] == [[1, 0.8], [0, 0.5]]
    assert [one["target"] for one in first["evidence"]] == [1, 0, 2]
    assert (page.samples, page.targets, page.left_out) == (2, 6, 0)
    lines = Scripts(page.html).found[1][1].strip().split("\n")
    assert lines[0] == f"data:image/png;base64,{base64.b64encode(bytes([0x89]) + b'PNG').decode()}"
    for line, one in zip(lines[1:], samples[0].evidence, strict=True):
        assert base64.b64decode(line) == one.data
        unpacked(one.data, one.shapes)


def test_only_the_most_probable_classes_are_kept_beside_those_that_matter():
    shares = tuple(0.5 / 2**index for index in range(40))
    sample = Sample(
        name="x", probabilities=shares, evidence=(evidence(0, 33),), label=39, picture=Picture(b"", "image/png", 1, 1)
    )
    kept = [index for index, _ in document(explorer_page([sample], methods=[METHOD]))["samples"][0]["probabilities"]]
    assert kept == [*range(10), 33, 39]


def test_texts():
    found = document(explorer_page([text()], methods=[METHOD]))
    assert found["kind"] == "texts"
    assert found["samples"][0]["texts"] == [[["a", [0], True], [" ", [], True], ["b", [1], True], ["c", [], False]]]
    assert found["samples"][0]["tokens"] == ["a", "b"]
    assert found["samples"][0]["evidence"][0]["size"] is None


def test_no_name_breaks_out():
    method = Method(name=NASTY, layer_names=(NASTY, "two"), layer_weights=(1, 1), unit=NASTY)
    sample = image(name=NASTY, note=NASTY)
    settings = {"class_names": (NASTY, "b", "c"), "title": NASTY, "about": {NASTY: NASTY}}
    plain = explorer_page([image()], methods=[METHOD], class_names=("a", "b", "c"))
    page = explorer_page([sample], methods=[method], **settings)
    assert len(Scripts(page.html).found) == len(Scripts(plain.html).found) == 3
    assert page.html.count("</script") == plain.html.count("</script")
    assert "<!--" not in page.html
    found = document(page)
    assert found["title"] == found["samples"][0]["name"] == found["methods"][0]["layer_names"][0] == NASTY
    assert found["about"] == {NASTY: NASTY}
    sample = text(texts=((Piece(NASTY, (0, 1)),),), tokens=(NASTY, "\ud800"))
    page = explorer_page([sample], methods=[METHOD])
    assert document(page)["samples"][0]["texts"][0][0][0] == NASTY
    assert document(page)["samples"][0]["tokens"] == [NASTY, "\ud800"]
    assert page.html.count("</script") == plain.html.count("</script")


def test_the_script_stands_in_the_page_whole_and_asks_for_nothing():
    page = explorer_page([image()], methods=[METHOD]).html
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    *_, (attributes, script) = Scripts(page).found
    assert attributes == {}
    assert script.strip().startswith('"use strict";')
    assert script.strip().endswith("})();")
    assert not re.search(r"\b(fetch|XMLHttpRequest|import|eval|localStorage|innerHTML)\b", script)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert "window.mhexExplorer" in script


def test_a_page_that_must_be_small_leaves_out_what_comes_last():
    samples = [image(number) for number in range(6)]
    whole = explorer_page(samples, methods=[METHOD])
    assert whole.left_out == 0
    for limit in (whole.size - 1, whole.size - 15_000, whole.size - 40_000):
        page = explorer_page(samples, methods=[METHOD], max_bytes=limit)
        assert page.size <= limit
        assert page.left_out > 0
        assert page.targets + page.left_out == whole.targets
        counts = [len(sample["evidence"]) for sample in document(page)["samples"]]
        assert min(counts) >= 1
        assert max(counts) - min(counts) <= 1
        assert [sample["evidence"][0]["target"] for sample in document(page)["samples"]] == [1] * 6
        blocks = [content.strip().split("\n") for _, content in Scripts(page.html).found[1:-1]]
        assert [len(lines) - 1 for lines in blocks] == counts
    assert explorer_page(samples, methods=[METHOD], max_bytes=whole.size + 2000).left_out == 0


def test_a_method_of_every_sample_stays():
    methods = [METHOD, Method(name="other", layer_names=("one", "two"), layer_weights=(1, 1))]
    samples = [image(number, methods=2) for number in range(3)]
    whole = explorer_page(samples, methods=methods)
    page = explorer_page(samples, methods=methods, max_bytes=whole.size - 30_000)
    for sample in document(page)["samples"]:
        assert {one["method"] for one in sample["evidence"]} == {0, 1}
    with pytest.raises(ValueError, match="max_bytes must leave room"):
        explorer_page(samples, methods=methods, max_bytes=10_000)


@pytest.mark.parametrize("wrong", [0, -5, 1.5, True, "1"])
def test_max_bytes_is_a_positive_int(wrong):
    with pytest.raises((TypeError, ValueError), match="max_bytes must be"):
        explorer_page([image()], methods=[METHOD], max_bytes=wrong)


def test_parts_that_do_not_fit():
    with pytest.raises(ValueError, match="all images or all texts"):
        explorer_page([image(), text()], methods=[METHOD])
    with pytest.raises(TypeError, match=r"samples\[1\] must be a Sample, got str"):
        explorer_page([image(), "x"], methods=[METHOD])
    with pytest.raises(ValueError, match="class_names must hold one name per class"):
        explorer_page([image()], methods=[METHOD], class_names=("a", "b"))
    with pytest.raises(ValueError, match="one of 1 methods, got 1"):
        explorer_page([image(methods=2)], methods=[METHOD])
    with pytest.raises(ValueError, match="one of 3 classes, got 3"):
        explorer_page([image(targets=(3,))], methods=[METHOD])
    one_layer = Method(name="m", layer_names=("one",), layer_weights=(1,))
    with pytest.raises(ValueError, match="must have the layers of 'm', got 2"):
        explorer_page([image()], methods=[one_layer])
    for fields in ({"label": 3}, {"label": -1}, {"heads": ((7, 0.5),)}):
        with pytest.raises(ValueError, match="must be one of 3 classes"):
            explorer_page([image(**fields)], methods=[METHOD])
    with pytest.raises(ValueError, match="tokens of a piece must lie in"):
        explorer_page([text(texts=((Piece("x", (2,)),),))], methods=[METHOD])


def test_methods_samples_and_evidence_are_checked():
    with pytest.raises(ValueError, match="layer_weights must hold one number for each of 2 layers, got 1"):
        Method(name="m", layer_names=("a", "b"), layer_weights=(1,))
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\]"):
        Method(name="m", layer_names=("a",), layer_weights=(1,), beta=1.1)
    with pytest.raises(ValueError, match="probabilities must not be empty"):
        Sample(name="x", probabilities=(), evidence=(evidence(),), picture=Picture(b"", "image/png", 1, 1))
    with pytest.raises(ValueError, match="either a picture or texts"):
        Sample(name="x", probabilities=(1.0,), evidence=(evidence(),))
    with pytest.raises(ValueError, match="must hold the same layers"):
        Evidence.of_layers([torch.zeros(2, 2)], [torch.zeros(2, 3)], method=0, target=0)
    with pytest.raises(ValueError, match="must hold the same layers"):
        Evidence.of_layers([], [], method=0, target=0)


def test_it_is_written_in_one_step_and_a_frame_holds_it(tmp_path):
    page = explorer_page([image(name="Ωμέγα")], methods=[METHOD], compact=True)
    path = page.save(tmp_path / "page.html")
    assert path.read_bytes().decode() == page.html
    assert page.size == path.stat().st_size
    assert [item.name for item in tmp_path.iterdir()] == ["page.html"]
    frame = notebook_frame(page, height=300)
    (inner,) = re.findall(r'srcdoc="([^"]*)"', frame)
    assert html.unescape(inner) == page.html
    assert 'sandbox="allow-scripts"' in frame
    with pytest.raises(ValueError, match="height must be"):
        notebook_frame(page, height=0)


@pytest.mark.parametrize(
    "kind", ["image/png</script><script>alert(1)</script>", "image/svg+xml", "text/html", "", None]
)
def test_a_picture_is_of_a_kind_that_pages_show(kind):
    with pytest.raises((TypeError, ValueError), match="media_type must be"):
        Picture(b"", kind, 1, 1)

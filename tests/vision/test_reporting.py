"""Explanations of images as pages: what the page is given is what the explanations hold."""

import base64
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mhex_core import SaliencyOptions, SignedMaps, combine_maps
from mhex_core.explorer.packing import unpacked
from mhex_vision import Explanation, Preprocessing, report
from mhex_vision.reporting import picture_of


def document(page):
    """What the script of a page reads: the document, and each sample's lines."""
    html = page if isinstance(page, str) else page.html
    found = json.loads(re.search(r'id="document">(.*?)</script>', html, re.DOTALL)[1])
    lines = [
        re.search(rf'id="block-{sample["block"]}">\n(.*?)\n</script>', html, re.DOTALL)[1].split("\n")
        for sample in found["samples"]
    ]
    return found, lines


def maps_of(found, lines, number, place, **changes):
    """The map that a sample's evidence makes, as the browser adds it up."""
    evidence = found["samples"][number]["evidence"][place]
    method = found["methods"][evidence["method"]]
    shapes = [tuple(shape) for shape in evidence["shapes"]]
    parts = unpacked(base64.b64decode(lines[number][1 + place]), shapes)
    names = ("beta", "layer_weights", "normalize", "floor")
    options = SaliencyOptions(**({name: method[name] for name in names} | changes))
    maps = SignedMaps(*(tuple(layer.unsqueeze(0) for layer in part) for part in parts))
    return combine_maps(maps, size=tuple(evidence["size"]), options=options)[0]


def of_maps(explanation, name="other", *, shift=0.3):
    """What another method might find in the same images."""
    shape = (*explanation.target.shape, *explanation.images.shape[-2:])
    generator = torch.Generator().manual_seed(len(name))
    return Explanation.of_maps(
        torch.randn(shape, generator=generator) - shift,
        explanation.target,
        explanation.probabilities,
        method=name,
        class_names=explanation.class_names,
        images=explanation.images,
    )


# ---------------------------------------------------------------------------------------------------------- the page


@pytest.mark.parametrize("options", [{}, {"beta": 0.4, "floor": 0.5}, {"normalize": False, "beta": 1.0}])
@pytest.mark.parametrize("changes", [{}, {"beta": 0.7, "layer_weights": [0.2, 0.0, 1.5]}])
def test_the_maps_of_a_page_are_those_of_the_explanation(make_explanation, options, changes):
    explanation = make_explanation(torch.tensor([[2, 0], [1, 2]]), size=(12, 10), **options)
    found, lines = document(report(explanation))
    expected = explanation.reweighted(**changes).saliency
    (method,) = found["methods"]
    assert (method["name"], method["signed"]) == ("mhex", explanation.signed)
    assert method["layer_names"] == list(explanation.layer_names)
    for number, sample in enumerate(found["samples"]):
        assert [one["target"] for one in sample["evidence"]] == explanation.target[number].tolist()
        for place in range(2):
            ours = maps_of(found, lines, number, place, **changes)
            scale = 1 if explanation.options.normalize else float(expected[number, place].abs().max())
            assert float((ours - expected[number, place]).abs().max()) <= 3e-4 * scale


def test_methods_stand_side_by_side_and_keep_sign_and_scale(make_explanation):
    explanation = make_explanation(torch.tensor([[2, 0], [1, 2]]))
    other, third = of_maps(explanation), of_maps(explanation, "one more", shift=-9)
    found, lines = document(report([explanation, other, third]))
    assert [method["name"] for method in found["methods"]] == ["mhex", "other", "one more"]
    assert [method["signed"] for method in found["methods"]] == [False, True, False]
    assert [method["normalize"] for method in found["methods"]] == [True, False, False]
    for number in range(2):
        # What a page without room leaves out comes last: every method's second class.
        targets = explanation.target[number].tolist()
        order = [(one["method"], one["target"]) for one in found["samples"][number]["evidence"]]
        assert order == [(method, target) for target in targets for method in range(3)]
        for place, (method, target) in enumerate(order):
            given = (explanation, other, third)[method].saliency[number, targets.index(target)]
            span = float(given.max() - given.min())
            assert float((maps_of(found, lines, number, place) - given).abs().max()) <= 3e-4 * span


def test_samples_carry_their_names_labels_probabilities_and_heads(make_explanation):
    explanation = make_explanation(batch=3)
    page = report(explanation, names=["a", "<b>", "c"], labels=[0, 2, 1], title="T", about={"seed": "0"})
    found, _ = document(page)
    assert (found["title"], found["about"], found["class_names"]) == ("T", {"seed": "0"}, ["a", "b", "c"])
    assert (page.samples, page.targets, page.left_out) == (3, 3, 0)
    heads = explanation.head_logits.softmax(dim=-1)
    for number, sample in enumerate(found["samples"]):
        assert sample["name"] == ["a", "<b>", "c"][number]
        assert sample["label"] == [0, 2, 1][number]
        assert sample["prediction"] == int(explanation.prediction[number])
        for label, probability in sample["probabilities"]:
            assert probability == pytest.approx(float(explanation.probabilities[number, label]), abs=1e-5)
        assert [head for head, _ in sample["heads"]] == heads[:, number].argmax(dim=1).tolist()
        assert [value for _, value in sample["heads"]] == pytest.approx(heads[:, number].amax(dim=1).tolist(), abs=1e-5)


def test_names_and_labels_may_be_left_to_the_page(make_explanation):
    found, _ = document(report(make_explanation()))
    assert [sample["name"] for sample in found["samples"]] == ["1", "2"]
    assert [sample["label"] for sample in found["samples"]] == [None, None]
    labels = torch.tensor([1, 2], dtype=torch.int32)
    found, _ = document(report(make_explanation(), labels=labels))
    assert [sample["label"] for sample in found["samples"]] == [1, 2]


def test_classes_that_are_independent_have_sigmoid_heads_and_several_labels(make_classifier, make_images):
    model = make_classifier(multi_label=True).with_metadata(
        preprocessing=Preprocessing(size=12), class_names=("a", "b", "c")
    )
    explanation = model.explain(make_images(3, (12, 10)))
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    found, _ = document(report(explanation, labels=labels))
    best = 0 if float(explanation.probabilities[0, 0]) >= float(explanation.probabilities[0, 2]) else 2
    assert [sample["label"] for sample in found["samples"]] == [best, None, 1]
    assert [sample["note"] for sample in found["samples"]] == ["true: a, c", "no class is true", ""]
    values = explanation.head_logits.sigmoid().amax(dim=-1)
    for number, sample in enumerate(found["samples"]):
        assert [value for _, value in sample["heads"]] == pytest.approx(values[:, number].tolist(), abs=1e-5)


def test_the_image_is_kept_to_the_pixel_while_it_is_small(make_explanation):
    explanation = make_explanation()
    _, lines = document(report(explanation))
    kind, _, data = lines[0][0].partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert np.array_equal(np.asarray(image), explanation.images[0].movedim(0, -1).numpy())


@pytest.mark.parametrize(("size", "kind"), [((64, 64), "image/png"), ((65, 20), "image/jpeg")])
def test_larger_images_become_jpeg(size, kind):
    ramp = torch.linspace(0, 255, size[1]).expand(3, *size).to(torch.uint8)
    picture = picture_of(ramp)
    assert (picture.media_type, picture.height, picture.width) == (kind, *size)
    with Image.open(io.BytesIO(picture.data)) as image:
        assert image.size == (size[1], size[0])
        assert np.abs(np.asarray(image).astype(int) - ramp.movedim(0, -1).numpy()).max() <= 8


def test_a_class_that_is_asked_for_twice_is_shown_once(make_explanation):
    found, _ = document(report(make_explanation(torch.tensor([[2, 2, 0], [1, 1, 1]]))))
    assert [[one["target"] for one in sample["evidence"]] for sample in found["samples"]] == [[2, 0], [1]]


def test_of_all_classes_the_most_probable_comes_first(make_explanation):
    explanation = make_explanation("all")
    found, lines = document(report(explanation))
    for number, sample in enumerate(found["samples"]):
        order = explanation.probabilities[number].argsort(descending=True).tolist()
        assert [one["target"] for one in sample["evidence"]] == order
        for place, target in enumerate(order):
            ours = maps_of(found, lines, number, place)
            assert float((ours - explanation.saliency[number, target]).abs().max()) <= 3e-4


def test_constant_and_empty_evidence_stays_what_it_is(make_explanation):
    explanation = make_explanation()
    flat = replace(of_maps(explanation), positive=(torch.ones(2, 12, 10),), negative=(torch.zeros(2, 12, 10),))
    found, lines = document(report(flat))
    assert torch.equal(maps_of(found, lines, 0, 0), torch.ones(12, 10))


def test_a_page_that_must_stay_small_leaves_out_later_classes(make_explanation):
    explanation = make_explanation("all", batch=4)
    whole = report(explanation)
    small = report(explanation, max_bytes=whole.size - 1500)
    assert (whole.left_out, whole.targets) == (0, 12)
    assert small.size <= whole.size - 1500
    assert 0 < small.left_out < 9
    with pytest.raises(ValueError, match="max_bytes must leave room"):
        report(explanation, max_bytes=1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda e: [], "at least one sample, got none"),
        (lambda e: e[:0], "at least one sample, got none"),
        (lambda e: replace(e, images=None), "must carry their images"),
        (lambda e: [e, replace(of_maps(e), images=255 - e.images)], r"explanations\[1\] shows others"),
        (lambda e: [e, of_maps(e)[:1]], r"explanations\[1\] shows others"),
        (lambda e: [e, replace(of_maps(e), class_names=("x", "y", "z"))], r"explanations\[1\] is not"),
        (lambda e: [e, replace(of_maps(e), probabilities=e.probabilities.flip(1))], "one model's predictions"),
        (lambda e: [e, e], "got 'mhex' twice"),
        (lambda e: replace(e, positive=tuple(p + torch.nan for p in e.positive)), "must be finite"),
    ],
)
def test_what_cannot_be_shown_together_is_named(make_explanation, make, words):
    with pytest.raises(ValueError, match=words):
        report(make(make_explanation()))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"names": ["a"]}, ValueError, "names must be 2, one per sample, got 1"),
        ({"names": "ab"}, TypeError, "names must be a sequence of strings"),
        ({"names": [1, 2]}, TypeError, "names must be a sequence of strings"),
        ({"labels": [0]}, ValueError, "labels must have shape"),
        ({"labels": [0, 3]}, ValueError, r"labels must lie in \[0, 2\]"),
        ({"labels": [0, True]}, TypeError, r"labels\[1\] must be an int, got bool"),
        ({"labels": "01"}, TypeError, "labels must be a sequence of ints"),
        ({"labels": torch.tensor([[0.0, 2.0, 0.0]] * 2)}, ValueError, "zeros and ones"),
        ({"title": 3}, TypeError, "title must be a string, got int"),
        ({"max_bytes": 0}, ValueError, "max_bytes must be at least 1"),
    ],
)
def test_arguments_are_checked(make_explanation, options, error, words):
    with pytest.raises(error, match=words):
        report(make_explanation(), **options)


@pytest.mark.parametrize("given", [None, "x", 3, [3], ["x"], {"a": 1}])
def test_something_else_than_explanations_is_named(given):
    with pytest.raises(TypeError, match=r"explanations(\[0\])? must be an Explanation"):
        report(given)


def test_images_may_come_with_any_of_the_explanations(make_explanation):
    explanation = make_explanation()
    bare = replace(explanation, images=None)
    assert document(report([bare, of_maps(explanation)]))[1] == document(report([explanation, of_maps(explanation)]))[1]


# ------------------------------------------------------------------------------------------------------- explanations


def test_an_explanation_writes_its_page(make_explanation, tmp_path):
    explanation = make_explanation()
    options = {"names": ["a", "b"], "labels": [0, 1], "title": "One & two"}
    html = explanation.to_html(**options)
    assert html == report(explanation, **options).html
    assert "<title>One &amp; two</title>" in html
    path = explanation.save_html(tmp_path / "page.html", **options)
    assert path == tmp_path / "page.html"
    assert path.read_text(encoding="utf-8") == html
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(ValueError, match="must carry their images"):
        make_explanation(keep_images=False).to_html()


@pytest.mark.parametrize(
    ("batch", "target", "words"),
    [
        (2, None, ""),
        (10, None, "Shown are 8 of 10 samples; <code>save_html</code> writes all."),
        (9, "all", "Shown are 8 of 9 samples and 10 of 12 classes;"),
    ],
)
def test_a_notebook_shows_a_compact_page_of_the_first_samples(make_explanation, batch, target, words):
    explanation = make_explanation(batch=batch)
    if target is not None:
        twelve = torch.arange(12).expand(batch, 12)
        explanation = Explanation.of_maps(
            torch.rand(batch, 12, 4, 4),
            twelve,
            torch.full((batch, 12), 1 / 12),
            method="other",
            images=explanation.images,
        )
    shown = explanation._repr_html_()
    assert shown.startswith("<iframe ")
    assert shown.endswith(words and "</p>")
    assert words in shown
    found, _ = document(shown.replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">"))
    assert found["compact"]
    assert len(found["samples"]) == min(batch, 8)
    assert all(len(sample["evidence"]) == (10 if target else 1) for sample in found["samples"])


def test_without_images_a_notebook_shows_plain_text(make_explanation):
    assert make_explanation(keep_images=False)._repr_html_() is None
    assert make_explanation(batch=0)._repr_html_() is None


def test_as_text_an_explanation_is_one_line(make_explanation):
    explanation = make_explanation("all")
    expected = "<Explanation by mhex: target (2, 3) of 3 classes, saliency (2, 3, 12, 10), 3 layers, with images>"
    assert repr(explanation) == expected
    assert repr(replace(explanation, images=None)).endswith("3 layers, no images>")

"""Pages of real classifiers in a real browser, from the command or the call that writes them to what a reader sees."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from mhex_text import MHEXForSequenceClassification
from mhex_text import report as report_texts
from mhex_text.demo import HTML_FILE, small_encoder, wordpiece_tokenizer
from mhex_vision import MHEXClassifier, explain_by, load_data, report
from mhex_vision.demo import PAGE_FILE

from .test_pictures import CLOSE, slide, state, values

TEXTS = ["a dull plot and a duller hero", "not a dull minute", "the hero is never dull"]


@pytest.fixture(scope="module")
def lesions():
    return load_data("synthetic-lesions", seed=0)


@pytest.fixture(scope="module")
def classifier(lesions):
    torch.manual_seed(0)
    size = lesions.preprocessing.size
    model = MHEXClassifier.from_backbone("resnet18", lesions.num_classes, image_size=size).eval()
    return model.with_metadata(preprocessing=lesions.preprocessing, class_names=lesions.class_names)


def test_images_are_weighed_as_python_weighs_them(lesions, classifier, write_page, open_page):
    images = lesions.preprocessing.normalize(lesions.test.images[:3])
    targets = torch.tensor([[0, 2], [1, 0], [3, 1]])
    own = classifier.explain(images, targets)
    other = explain_by(classifier, images, "gradcam:layer=layer2.1", targets[:, 0])
    page = open_page(write_page(report([own, other], labels=lesions.test.labels[:3])))
    np.testing.assert_allclose(values(page), own.saliency[0, 0].ravel(), atol=CLOSE)
    slide(page, "Evidence against, β", 0.6)
    slide(page, "layer4.1", 0.2)
    moved = state(page)["panes"][0]
    assert moved["beta"] == pytest.approx(0.6, abs=0.02)
    again = own.reweighted(beta=moved["beta"], layer_weights=moved["weights"])
    np.testing.assert_allclose(values(page), again.saliency[0, 0].ravel(), atol=CLOSE)
    page.get_by_label("Class explained").first.select_option("2")
    np.testing.assert_allclose(values(page), again.saliency[0, 1].ravel(), atol=CLOSE)
    page.keyboard.press("j")
    np.testing.assert_allclose(values(page), again.saliency[1, 0].ravel(), atol=CLOSE)
    page.get_by_label("Method").first.select_option("1")
    raw = other.saliency[1].ravel()
    scale = float(raw.max() - raw.min()) or 1.0
    np.testing.assert_allclose(values(page) / scale, raw / scale, atol=CLOSE)


def test_texts_are_weighed_as_python_weighs_them(write_page, open_page):
    torch.manual_seed(0)
    tokenizer = wordpiece_tokenizer(TEXTS)
    model = MHEXForSequenceClassification.from_encoder(small_encoder(tokenizer), 2, labels=("bad", "good")).eval()
    explanation = model.explain(TEXTS, tokenizer=tokenizer)
    page = open_page(write_page(report_texts(explanation, labels=["bad", "good", "good"])))
    size = max(abs(token.score) for token in explanation[0].tokens)
    np.testing.assert_allclose(values(page) / size, [t.score / size for t in explanation[0].tokens], atol=CLOSE)
    for _ in range(4):
        page.keyboard.press("b")
    slider = page.get_by_role("slider", name=explanation.settings.layer_names[-1], exact=True)
    slider.focus()
    page.keyboard.press("End")
    moved = state(page)["panes"][0]
    again = explanation.reweighted(beta=moved["beta"], layer_weights=moved["weights"])
    assert moved["weights"] != list(explanation.settings.layer_weights)
    np.testing.assert_allclose(values(page) / size, [t.score / size for t in again[0].tokens], atol=CLOSE)


@pytest.mark.slow
def test_what_the_demonstrations_write_looks_right(tmp_path, open_page, screenshot):
    """The pictures of the documentation: `MHEX_SCREENSHOTS=docs/images nox -s browser -- -m slow -k demonstrations`."""
    for module in ("mhex_vision", "mhex_text"):
        command = [sys.executable, "-m", f"{module}.cli", "demo", "--out", str(tmp_path / module)]
        subprocess.run(command, check=True, capture_output=True, timeout=580)
    images, texts = tmp_path / "mhex_vision" / PAGE_FILE, tmp_path / "mhex_text" / HTML_FILE
    looks = {
        "explorer-desktop": (images, {"width": 1440, "height": 900}),
        "explorer-dark": (images, {"width": 1440, "height": 900, "dark": True}),
        "explorer-phone": (images, {"width": 390, "height": 844}),
        "explorer-text": (texts, {"width": 1440, "height": 900}),
    }
    for name, (path, view) in looks.items():
        page = open_page(path, **view)
        if name == "explorer-dark":
            page.get_by_role("button", name="Compare").click()
            page.get_by_label("Sample", exact=True).nth(1).select_option(index=1)
        state(page)
        page.wait_for_timeout(2000)  # the gallery paints what is in sight, bit by bit
        screenshot(page, name)
        sideways = page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert sideways <= 0, name

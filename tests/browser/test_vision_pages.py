"""Pages of images from a real network: the browser shows what Python computes."""

import numpy as np
import pytest
import torch

from mhex_vision import MHEXClassifier, Preprocessing, explain_by, report
from mhex_vision.explainers import explainer

AGREES = 1e-3


def slope(model, images, targets):
    """A map of both signs on a scale of its own, as other people's methods give."""
    ramp = torch.linspace(-3, 5, images.shape[2] * images.shape[3]).reshape(images.shape[2:])
    return ramp * (1 + targets.reshape(-1, 1, 1)) + images.mean(dim=1)


@pytest.fixture(scope="module")
def explanations():
    torch.manual_seed(0)
    model = MHEXClassifier.from_backbone("resnet18", 3, image_size=48).eval()
    model.with_metadata(class_names=("a", "b", "c"), preprocessing=Preprocessing(size=48))
    images = torch.randn(3, 3, 48, 40, generator=torch.Generator().manual_seed(1))
    # Fresh heads are sharp about nothing: without thresholds there is evidence of both signs.
    options = {"tau_pos": 0.0, "tau_neg": 0.0}
    target = torch.tensor([[2, 0], [1, 2], [0, 1]])
    return [
        model.explain(images, target, **options),
        explain_by(model, images, slope, target),
        explain_by(model, images, explainer("centre-gaussian"), target, name="centre-gaussian"),
    ]


@pytest.mark.parametrize("settings", [{}, {"beta": 0.37, "layer_weights": [0.25 * index for index in range(8)]}])
def test_maps_agree_with_python(explanations, open_page, write_page, settings):
    path = write_page(report(explanations, labels=[2, 2, 2]))
    for number, explanation in enumerate(explanations):
        changes = settings if number == 0 else {"beta": settings["beta"]} if settings else {}
        expected = explanation.reweighted(**changes).saliency
        for sample, column in ((0, 0), (1, 1), (2, 0)):
            asked = {"s": sample, "m": number, "t": int(explanation.target[sample, column])}
            asked |= {"b": changes["beta"]} if changes else {}
            asked |= {"w": ",".join(map(str, changes["layer_weights"]))} if "layer_weights" in changes else {}
            page = open_page(path, fragment="#" + "&".join(f"{key}={value}" for key, value in asked.items()))
            state = page.evaluate("() => mhexExplorer.settled().then(() => mhexExplorer.state())")["panes"][0]
            assert (state["sample"], state["method"], state["target"]) == (sample, number, asked["t"])
            shown = np.array(page.evaluate("() => mhexExplorer.values()")).reshape(48, 40)
            wanted = expected[sample, column].numpy()
            scale = 1 if explanation.options.normalize else np.ptp(wanted)
            assert np.abs(shown - wanted).max() <= AGREES * scale
            page.close()


def test_a_notebooks_frame_shows_the_first_image(explanations, browser, tmp_path):
    path = tmp_path / "cell.html"
    path.write_text(f"<!DOCTYPE html><title>cell</title>{explanations[0]._repr_html_()}", encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("canvas").first.wait_for()
    assert frame.locator("h1").inner_text() == "Explanations"
    page.close()

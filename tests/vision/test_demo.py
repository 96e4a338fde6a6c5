"""The demo: the main job in one command, without a download."""

import json
import os

import pytest
import torch
from PIL import Image

from mhex_vision import Explanation, MHEXClassifier
from mhex_vision.data import LESION_CLASSES
from mhex_vision.data.lesions import lesions_bundle
from mhex_vision.demo import _one_of_each_class, beta_figure, explain_all


@pytest.fixture(scope="module")
def demo(vision_python, tmp_path_factory):
    """The finished process, and its folder."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    command = ("-m", "mhex_vision.cli", "demo", "--epochs", 1, "--out", out)
    done = vision_python.run(*command, environment=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=500)
    assert done.returncode == 0, done.stderr
    return done, out


def test_prints_what_it_found_and_what_it_wrote(demo):
    done, out = demo
    lines = done.stdout.splitlines()
    assert done.stderr == ""
    assert [line.split()[0] for line in lines if line.endswith(" %") and line.startswith("  ")] == [
        "aggregate",
        "random",
        "centre-gaussian",
    ]
    for name in ("demo.png", "explanation.npz", "report.html"):
        assert str(out / name) in done.stdout
    assert lines[-1].strip() == f"mhex-vision explain --checkpoint {out} --input FILE --out DIR"


def test_leaves_a_checkpoint_a_figure_and_an_explanation(demo):
    _, out = demo
    names = {"config.json", "demo.png", "explanation.npz", "log.csv", "model.safetensors", "report.html", "run.json"}
    assert {path.name for path in out.iterdir()} == names
    record = json.loads((out / "run.json").read_text())
    assert record["result"]["test"]["images"] == 400
    with Image.open(out / "demo.png") as figure:
        assert figure.width > figure.height > 500
    explanation = Explanation.load(out / "explanation.npz")
    assert explanation.class_names == LESION_CLASSES
    assert explanation.saliency.shape == (4, 64, 64)

    model = MHEXClassifier.from_pretrained(out)
    again = model.explain(model.config.preprocessing.normalize(explanation.images))
    torch.testing.assert_close(again.saliency, explanation.saliency, rtol=0, atol=1e-4)


def test_shows_one_sample_of_each_class_if_possible_a_right_one():
    data = lesions_bundle(size=32, train=4, validation=4, test=12)
    torch.manual_seed(0)
    model = MHEXClassifier.from_backbone("resnet18", 4, at="stage", image_size=32)
    model.with_metadata(class_names=data.class_names, preprocessing=data.preprocessing)
    explanation = explain_all(model, data, data.test, batch_size=5)
    assert len(explanation) == 12
    shown = _one_of_each_class(explanation, data.test)
    assert len(shown) == 4
    for label in range(4):
        candidates = [index for index in range(12) if int(data.test.labels[index]) == label]
        right = [index for index in candidates if int(explanation.prediction[index]) == label]
        torch.testing.assert_close(shown.saliency[label], explanation.saliency[(right or candidates)[0]])
    axes = beta_figure(shown).axes
    titles = [axis.get_title() for axis in axes[: len(axes) // 4]]
    assert titles[1:] == ["overlay", "beta = 0", "beta = 1", *model.layer_names]

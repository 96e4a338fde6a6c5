"""The main job on real images: train for an epoch on blood cells, explain photographs of such cells."""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mhex_vision import Explanation, load_classifier, load_data
from mhex_vision.explainers import parse
from mhex_vision.metrics import parameter_randomization

DATA = Path(os.environ.get("MHEX_DATA", ""))
CLASSES = 8

pytestmark = pytest.mark.skipif(
    not os.environ.get("MHEX_DATA") or not (DATA / "medmnist" / "bloodmnist.npz").is_file(),
    reason="needs real images: MHEX_DATA must name a folder with medmnist/bloodmnist.npz",
)


@pytest.fixture(scope="module")
def run(vision_python):
    def printed(*arguments):
        done = vision_python.run("-m", "mhex_vision.cli", *arguments, timeout=500)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    return printed


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "blood"
    data = ("--data", "bloodmnist", "--root", DATA / "medmnist", "--no-download")
    run("train", *data, "--epochs", 1, "--seed", 0, "--out", out)
    return out


def test_one_epoch_is_enough_to_tell_most_cells_apart(trained):
    test = json.loads((trained / "run.json").read_text())["result"]["test"]
    assert test["images"] == 3421
    assert test["accuracy"] > 0.7
    assert len(test["head_accuracy"]) == 8  # the residual additions of a ResNet-18
    assert test["head_accuracy"][-1] == test["accuracy"]


def test_photographs_of_cells_are_explained(run, trained, tmp_path):
    source = DATA / "blood224" / "test"
    if not source.is_dir():
        pytest.skip("needs photographs: MHEX_DATA has no folder blood224/test")
    for folder in sorted(source.iterdir()):
        (tmp_path / "cells" / folder.name).mkdir(parents=True)
        for path in sorted(folder.glob("*.jpg"))[:3]:
            shutil.copy(path, tmp_path / "cells" / folder.name)
    out = tmp_path / "out"
    run("explain", "--checkpoint", trained, "--input", tmp_path / "cells", "--out", out, "--maps")

    record = json.loads((out / "explanations.json").read_text())
    entries = record["images"]
    assert (len(entries), record["rejected"]) == (3 * CLASSES, [])
    # The folders are called after the cells, as the classes are; "ig" stands for immature granulocytes.
    right = [Path(entry["file"]).parent.name[:5] == entry["prediction"][:5] for entry in entries]
    assert sum(right) > len(entries) / 3  # by chance: an eighth
    for entry in entries:
        assert sum(entry["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        with Image.open(out / entry["overlay"]) as overlay:
            assert overlay.size == (28, 28)
    explanation = Explanation.load(out / "maps" / "000000.npz")
    assert explanation.saliency.shape == (len(entries), 28, 28)
    assert float(explanation.saliency.min()) >= 0
    assert float(explanation.saliency.max()) <= 1
    assert float(explanation.saliency.flatten(1).std(dim=1).min()) > 0.01  # maps, not blanks


def test_explanations_of_cells_are_measured_side_by_side(run, trained, tmp_path):
    data = ("--data", "bloodmnist", "--root", DATA / "medmnist", "--no-download")
    asked = ("--limit", "128", "--methods", "mhex,random,centre-gaussian", "--metrics", "area_drop,deletion:steps=8")
    # One epoch has to do for both parts here; a judge should be another network.
    asked += ("--self-judged",)
    shown = run("evaluate", "--checkpoint", trained, "--judge", trained, *data, *asked, "--out", tmp_path)
    assert "128 of 128 images" in shown
    summary = json.loads((tmp_path / "summary.json").read_text())["methods"]
    ours, noise = (summary[name]["scores"] for name in ("mhex", "random"))
    assert ours["area_drop"]["low"] > noise["area_drop"]["high"]
    assert ours["deletion:steps=8"]["mean"] < noise["deletion:steps=8"]["mean"]


def test_maps_change_when_weights_are_randomised(trained):
    model = load_classifier(trained)
    images = load_data("bloodmnist", root=DATA / "medmnist", download=False).test
    batch = images.__getitems__(range(32))
    inputs = model.config.preprocessing.normalize(batch.images)
    steps = parameter_randomization(model, parse("mhex"), inputs, batch.labels)
    assert steps[0].layer.startswith("layer4")
    assert steps[-1].layer == "stem"
    assert abs(float(steps[-1].similarity.nanmean())) < 0.5

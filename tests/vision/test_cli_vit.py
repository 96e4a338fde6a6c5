"""Vision transformers through the command line: train one, attach heads to it, explain by other methods, compare."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mhex_vision import Explanation, MHEXClassifier, load_classifier
from mhex_vision.cli import main

VIT = "timm/vit_tiny_patch16_224:img_size=28,patch_size=7,depth=2,embed_dim=24,num_heads=2"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Dark and light pictures, a folder each."""
    place = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4), ("test", 4)):
        for label, shade in (("dark", 60), ("light", 190)):
            (place / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(rng.normal(shade, 30, (28, 28, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / split / label / f"{index}.png")
    return place


@pytest.fixture(scope="module")
def plain(photos, tmp_path_factory):
    """A plain vision transformer's run."""
    pytest.importorskip("timm")
    out = tmp_path_factory.mktemp("runs") / "plain"
    words = ["train", "--data", str(photos), "--size", "28", "--plain", "--backbone", VIT, "--epochs", "1"]
    assert main([*words, "--batch-size", "10", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def heads(photos, plain):
    """Heads on that network, frozen."""
    out = plain.with_name("heads")
    words = ["train", "--data", str(photos), "--size", "28", "--backbone", str(plain), "--recipe", "heads"]
    more = ["--freeze-backbone", "--no-gate", "--classifier", "keep", "--epochs", "1", "--batch-size", "10"]
    assert main([*words, *more, "--out", str(out)]) == 0
    return out


def test_heads_on_a_trained_run_leave_its_predictions_alone(plain, heads):
    images = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    model = load_classifier(heads)
    assert isinstance(model, MHEXClassifier)
    assert (model.config.backbone, model.layer_names) == (VIT, ("blocks.0", "blocks.1"))
    with torch.no_grad():
        assert torch.equal(model(images).logits, load_classifier(plain)(images))


@pytest.mark.parametrize("kind", ["plain", "heads"])
def test_explaining_by_another_method(request, photos, tmp_path, kind, capsys):
    run = request.getfixturevalue(kind)
    words = ["explain", "--checkpoint", str(run), "--input", str(photos / "test"), "--out", str(tmp_path)]
    assert main([*words, "--method", "cdam:mode=smooth,steps=3", "--maps", "--target", "light"]) == 0
    record = json.loads((tmp_path / "explanations.json").read_text())
    assert (record["method"], len(record["images"])) == ("cdam:mode=smooth,steps=3", 8)
    assert "beta" not in record
    found = Explanation.load(next((tmp_path / "maps").glob("*.npz")))
    assert found.signed
    assert found.method == "cdam:mode=smooth,steps=3"
    assert (tmp_path / "light" / "0.png.png").is_file()
    assert "explained 8 of 8" in capsys.readouterr().out


def test_comparing_methods_on_a_plain_vision_transformer(photos, plain, tmp_path, capsys):
    words = ["evaluate", "--checkpoint", str(plain), "--judge", str(plain), "--self-judged", "--data", str(photos)]
    metrics = "fidelity:steps=4,cells=4,compactness,class_sensitivity"
    more = ["--methods", "cdam,gmar,attention-rollout,random", "--metrics", metrics, "--out", str(tmp_path)]
    assert main([*words, *more]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["methods"]) == {"cdam", "gmar", "attention-rollout", "random"}
    assert (tmp_path / "examples.png").is_file()
    assert "cdam" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["explain", "--checkpoint", "PLAIN", "--method", "mhex"], "is a plain network; choose another --method"),
        (["explain", "--checkpoint", "HEADS", "--method", "cdam", "--beta", "1"], "--beta belongs to"),
        (["explain", "--checkpoint", "HEADS", "--method", "cdamm"], "--method must be one of"),
        (["explain", "--checkpoint", "HEADS", "--method", "cdam:concept=nowhere"], "concept must be a tensor or a"),
        (["train", "--data", "PHOTOS", "--backbone", "HEADS"], "has blocks already; name a run of train --plain"),
        (["train", "--data", "PHOTOS", "--backbone", "PLAIN", "--plain"], "is a run, which blocks can be attached to"),
        (["train", "--data", "PHOTOS", "--backbone", "PLAIN", "--weights", "DEFAULT"], "is trained already"),
        (["train", "--data", "PHOTOS", "--backbone", "timm/vit_tiny_patch16_224:imgsize=3"], "imgsize"),
    ],
)
def test_what_cannot_be_done_is_one_line(words, said, photos, plain, heads, tmp_path, capsys):
    places = {"PLAIN": str(plain), "HEADS": str(heads), "PHOTOS": str(photos)}
    given = [places.get(word, word) for word in words]
    if words[0] == "explain":
        given += ["--input", str(photos / "test")]
    assert main([*given, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_blocks_of_a_vision_transformer_are_listed(plain, capsys):
    assert main(["info", "--backbone", VIT]) == 0
    assert "blocks.1: 24 channels, 4 x 4" in capsys.readouterr().out

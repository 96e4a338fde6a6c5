"""`train --plain` and `evaluate` as a user meets them."""

import json
import signal
import time

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mhex_vision import cli, load_classifier
from mhex_vision.comparison import Comparison

from .test_cli import ENVIRONMENT, MODULE, picture

METHODS = "mhex:beta=0.5,decay=1,gradcam:layer=layer2.1,random,mymaps:brightness"
METRICS = "sad,deletion:steps=4,baseline=mean,road"
OWN = "def brightness(model, images, targets):\n    return images.mean(dim=1)\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, masks, a network, a judge, and a method of one's own."""
    folder = tmp_path_factory.mktemp("evaluate")
    for label, shade in (("dark", 60), ("light cells", 190)):
        for number in range(20):
            picture(folder / "photos" / label / f"{number:02d}.png", shade=shade, seed=number)
            mask = Image.new("L", (40, 36))
            mask.paste(255, (10, 10, 30, 30))
            path = folder / "masks" / label / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            mask.save(path)
    asked = ("--data", folder / "photos", "--size", 32, "--epochs", 1, "--batch-size", 8)
    for name, more in (("net", ()), ("judge", ("--plain", "--seed", 1))):
        # In this process: that `train` works in one of its own is shown elsewhere, and each costs its imports.
        assert cli.main([str(part) for part in ("train", *asked, *more, "--out", folder / name)]) == 0
    (folder / "mymaps.py").write_text(OWN)
    return folder


def arguments(place, out, **changes):
    asked = {
        "checkpoint": place / "net",
        "judge": place / "judge",
        "data": place / "photos",
        "split": "train",
        "methods": METHODS,
        "metrics": METRICS,
        "out": out,
    } | changes
    return [
        "evaluate",
        *(str(part) for key, value in asked.items() for part in (f"--{key}", value) if value is not None),
    ]


def test_a_table_figures_and_every_sample_come_of_it(vision_python, place, tmp_path):
    pytest.importorskip("pytorch_grad_cam")
    asked = arguments(place, tmp_path / "out", metrics=f"{METRICS},pointing", masks=place / "masks")
    done = vision_python.run(*MODULE, *asked, environment=ENVIRONMENT, folder=place)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == [
        "mhex:beta=0.5,decay=1",
        "gradcam:layer=layer2.1",
        "random",
        "mymaps:brightness",
    ]
    assert "32 of 32 images" in lines[-2]
    assert lines[-1].endswith(f"--methods {METHODS} --out report.html")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "comparison.json",
        "curves.png",
        "examples.png",
        "samples.parquet",
        "summary.json",
        "summary.md",
    ]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["settings"]["note"]["judge"] == str(place / "judge")
    found = Comparison.load(tmp_path / "out" / "samples.parquet")
    assert pq.read_table(tmp_path / "out" / "samples.parquet").num_rows == 4 * 32
    shown = summary["methods"]["random"]["scores"]["sad"]
    assert shown["low"] <= shown["mean"] <= shown["high"]
    assert shown["mean"] == pytest.approx(found.values("random", "sad").mean())
    with Image.open(tmp_path / "out" / "curves.png") as figure:
        assert figure.width > 300
    assert (tmp_path / "out" / "summary.md").read_text().startswith("| method | SAD ↑ |")


def test_a_killed_evaluation_goes_on_when_repeated(vision_python, place, tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(
        "import time\ndef slow(model, images, targets):\n    time.sleep(1)\n    return images.mean(dim=1)\n"
    )
    more = ["--batch-size", "4"]
    asked = [*arguments(place, tmp_path / "out", methods="mhex,slow:slow", metrics="sad"), *more]
    process = vision_python.start(*MODULE, *asked, environment=ENVIRONMENT, folder=tmp_path)
    start = time.monotonic()
    while len(list(tmp_path.glob("out/pieces/*/*.parquet"))) < 4:
        assert time.monotonic() - start < 120
        assert process.poll() is None, process.output("stderr")
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL
    pieces = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/pieces/*/*.parquet")}
    (tmp_path / "slow.py").write_text("def slow(model, images, targets):\n    return images.mean(dim=1)\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(asked) == 0
    found = Comparison.load(tmp_path / "out" / "samples.parquet")
    # What had been done was not done again: it took its second per batch.
    slow = found.values("slow:slow", "seconds")
    kept = sum("slow" in path.parent.name for path in pieces)
    assert int((slow > 0.2).sum()) == 4 * kept
    assert len(slow) == 32


def test_a_plain_network_is_explained_by_the_rivals_alone(place, tmp_path, capsys):
    pytest.importorskip("pytorch_grad_cam")
    asked = arguments(place, tmp_path / "out", checkpoint=place / "judge", methods="gradcam", metrics="sad", limit="4")
    assert cli.main(asked) == 1
    assert "--judge must be another network" in capsys.readouterr().err
    assert cli.main([*asked, "--self-judged"]) == 0
    assert "the judge is the network that is explained" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["settings"]["self_judged"] is True
    other = {"checkpoint": place / "judge", "judge": place / "net"}
    asked = arguments(place, tmp_path / "other", **other, methods="mhex", metrics="sad")
    assert cli.main(asked) == 1
    assert "MHEXClassifier" in capsys.readouterr().err


@pytest.mark.filterwarnings("default::mhex_vision.data.UnreadableImageWarning")
def test_unreadable_images_are_named_and_the_status_says_so(place, tmp_path, capsys):
    broken = place / "photos" / "dark" / "03.png"
    content = broken.read_bytes()
    broken.write_bytes(b"no image")
    try:
        splits = {}
        for split in ("train", "validation", "test"):
            asked = arguments(place, tmp_path / split, methods="random", metrics="sad", split=split)
            splits[split] = cli.main(asked)
    finally:
        broken.write_bytes(content)
    assert sorted(splits.values()) == [0, 0, 3]
    assert "03.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"judge": "nowhere"}, "there is no folder nowhere"),
        ({"data": "synthetic-lesions"}, "--checkpoint must know the classes of synthetic-lesions"),
        ({"methods": "gradcamel"}, "--methods must be one of mhex"),
        ({"methods": "mymaps:nothing"}, "mymaps:nothing"),
        ({"metrics": "beauty"}, "--metrics must be one of"),
        ({"metrics": "iou"}, "need masks"),
        ({"masks": "nowhere"}, "expected a mask nowhere"),
        ({"limit": "0"}, "--limit must be at least 1"),
    ],
    ids=str,
)
def test_an_error_is_one_line_that_names_its_cause(place, tmp_path, capsys, monkeypatch, changes, words):
    monkeypatch.chdir(place)
    assert cli.main(arguments(place, tmp_path / "out", **changes)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_a_plain_network_has_no_blocks_to_speak_of(place, tmp_path, capsys):
    asked = ["train", "--data", str(place / "photos"), "--plain", "--no-gate", "--at", "stage", "--out", str(tmp_path)]
    assert cli.main(asked) == 1
    assert "--at, --no-gate is about blocks" in capsys.readouterr().err
    judge = load_classifier(place / "judge")
    assert judge.config.class_names == ("dark", "light cells")
    with torch.no_grad():
        assert judge(torch.zeros(1, 3, 32, 32)).shape == (1, 2)

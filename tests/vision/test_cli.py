"""The command line as a user meets it. What must hold for the process is run as one; the many messages are not.

Processes come from the forge, which spares them their imports; the installed script itself is run where it fails.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from mhex_core.bulk import Engine
from mhex_vision import Explanation, cli, commands
from mhex_vision.bulk.model import Autocast
from mhex_vision.bulk.storing import Storage
from mhex_vision.config import Classifier, Objective
from mhex_vision.surgery import Placement

COMMANDS = ("train", "explain", "report", "batch", "evaluate", "demo", "info")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
MODULE = ("-m", "mhex_vision.cli")
UNREADABLE = ("empty.png", "text.png", "nested/truncated.jpg")


@pytest.fixture(scope="module")
def run(vision_python):
    def finished(*arguments):
        return vision_python.run(*MODULE, *arguments, environment=ENVIRONMENT)

    return finished


def picture(path, mode="RGB", shade=100, *, seed=0, size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-20, 20, size=(size[1], size[0], 3))
    Image.fromarray((noise + shade).astype(np.uint8)).convert(mode).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of classes that a network can tell apart, with one file that is no image."""
    folder = tmp_path_factory.mktemp("photos")
    for label, shade in (("dark", 60), ("light cells", 190)):
        for number in range(20):
            picture(folder / label / f"{number:02d}.png", shade=shade, seed=number)
    (folder / "dark" / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def trained(run, photos, tmp_path_factory):
    """The finished process of `train`, and its folder."""
    out = tmp_path_factory.mktemp("runs") / "photos"
    return run("train", "--data", photos, "--size", 32, "--epochs", 2, "--batch-size", 8, "--out", out), out


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """What users have in a folder."""
    folder = tmp_path_factory.mktemp("mixed")
    picture(folder / "a.png", shade=60)
    picture(folder / "a.jpg", shade=190)
    picture(folder / "nested" / "a.png", "L", size=(31, 57))
    picture(folder / "nested" / "deeper" / "clear.PNG", "RGBA")
    picture(folder / "nested" / "palette.gif", "P")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not an image\n")
    truncated = (folder / "a.jpg").read_bytes()
    (folder / "nested" / "truncated.jpg").write_bytes(truncated[: len(truncated) // 3])
    # None of these is an image that the user would expect to be explained.
    (folder / "notes.txt").write_text("text")
    (folder / "paper.pdf").write_bytes(b"%PDF-1.7")
    (folder / "._a.png").write_bytes(b"resource fork")
    picture(folder / ".thumbnails" / "a.png")
    return folder


# ---------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option_and_does_not_wait_for_torch(command):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mhex_vision.cli", command, "--help"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "mhex_vision" in imported
    assert not {"torch", "torchvision", "numpy", "PIL"} & imported
    for action in subparser(command)._actions:
        assert action.help
        assert set(action.option_strings) <= set(done.stdout.replace(",", " ").split())


def subparser(command):
    (commands_,) = [action for action in cli._parser()._actions if action.choices]
    return commands_.choices[command]


def test_help_lists_the_commands_and_how_to_begin(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert all(f"\n    {command} " in text for command in COMMANDS)
    assert "mhex-vision demo --out demo" in text


@pytest.mark.parametrize(
    ("written_out", "meant"),
    [
        (cli.PLACEMENTS, Placement),
        (cli.CLASSIFIERS, Classifier),
        (cli.OBJECTIVES, Objective),
        (cli.ENGINES, Engine),
        (cli.STORAGES, Storage),
        (cli.AUTOCAST, Autocast),
    ],
)
def test_choices_are_those_of_the_library(written_out, meant):
    assert written_out == get_args(meant)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["train"],
        ["train", "--data", "synthetic-lesions"],
        ["train", "--data", "x", "--out", "y", "--epochs", "many"],
        ["train", "--data", "x", "--out", "y", "--at", "everywhere"],
        ["train", "--data", "x", "--out", "y", "--recipe", "soup"],
        ["explain", "--checkpoint", "x", "--input", "y"],
        ["explain", "--checkpoint", "x", "--input", "y", "--out", "z", "--beta", "much"],
        ["info", "--colour"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_ends_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("usage: mhex-vision")


# --------------------------------------------------------------------------------------------------------------- train


def test_train_reports_each_epoch_and_names_the_file_it_left_out(trained):
    done, out = trained
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith("training images of 32 px, 2 classes")
    assert [line.split(":")[0] for line in lines if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    assert lines[-1].startswith(f"wrote {out}; next: mhex-vision explain --checkpoint {out} ")
    assert {path.name for path in out.iterdir()} == {"config.json", "log.csv", "model.safetensors", "run.json"}
    complaints = done.stderr.splitlines()
    assert complaints
    assert all(line.startswith("mhex-vision: warning: left out: ") and "broken.png" in line for line in complaints)


def test_a_finished_run_is_not_trained_again(trained, photos, capsys):
    done, out = trained
    options = ["--data", photos, "--size", 32, "--epochs", 2, "--batch-size", 8, "--out", out]
    assert cli.main(["train", *map(str, options)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith("epoch")]
    assert f"{out} is finished already, after 2 epochs; nothing was trained now" in lines
    assert lines[-2] == done.stdout.splitlines()[-2]  # the test accuracy
    assert lines[-1] == f"{out} is as it was{done.stdout.splitlines()[-1].removeprefix(f'wrote {out}')}"


def test_ctrl_c_ends_with_one_line_and_the_same_command_goes_on(vision_python, run, photos, tmp_path):
    clean = tmp_path / "clean"
    shutil.copytree(photos, clean, ignore=shutil.ignore_patterns("broken.png"))
    command = ["train", "--data", clean, "--size", 32, "--epochs", 3, "--batch-size", 8, "--out", tmp_path / "run"]
    process = vision_python.start(*MODULE, *command, environment=ENVIRONMENT)
    while "epoch 1/3" not in process.output():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    done = process.wait()
    assert done.returncode == 130
    assert done.stderr.splitlines() == [
        "mhex-vision: interrupted; the same command goes on from the last finished epoch",
    ]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/3" not in done.stdout
    assert "epoch 3/3" in done.stdout
    log = (tmp_path / "run" / "log.csv").read_text().splitlines()[1:]
    assert [line.partition(",")[0] for line in log] == [str(epoch) for epoch in range(1, 4)]


def test_options_reach_the_network_and_the_recipe(photos, tmp_path, monkeypatch, capsys):
    seen = {}

    def record(model, data, recipe, **rest):
        seen.update(model=model, recipe=recipe, **rest)
        raise RuntimeError("enough seen")

    monkeypatch.setattr(commands, "train_model", record)
    options = "--backbone timm/resnet18 --at stage --no-gate --freeze-backbone --classifier keep --objective joint "
    options += "--size 32 --recipe heads --batch-size 4 --learning-rate 0.5 --patience 3 --seed 7 --overwrite"
    assert cli.main(["train", "--data", str(photos), "--out", str(tmp_path), *options.split()]) == 1
    capsys.readouterr()
    config = seen["model"].config
    assert (config.backbone, config.at, config.gate) == ("timm/resnet18", "stage", False)
    assert (config.freeze_backbone, config.classifier, config.objective) == (True, "keep", "joint")
    recipe = seen["recipe"]
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.patience) == (2, 4, 0.5, 3)
    assert (seen["seed"], seen["overwrite"], seen["workers"]) == (7, True, 0)


# ------------------------------------------------------------------------------------------------------------- explain


@pytest.fixture(scope="module")
def explained(run, trained, mixed, tmp_path_factory):
    """The finished process of `explain` on the mixed folder, its folder and its JSON."""
    out = tmp_path_factory.mktemp("explained") / "not" / "there yet"
    options = ("--out", out, "--batch-size", 2, "--maps", "--beta", 0.5)
    done = run("explain", "--checkpoint", trained[1], "--input", mixed, *options)
    record = json.loads((out / "explanations.json").read_text()) if done.returncode == 3 else None
    return done, out, record


def test_unreadable_images_are_named_line_by_line_and_the_status_says_so(explained, mixed):
    done, _, record = explained
    assert done.returncode == 3, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(UNREADABLE)
    for name in UNREADABLE:
        assert sum(line.startswith(f"mhex-vision: skipped: {mixed / name}: ") for line in lines) == 1
    assert {entry["file"] for entry in record["rejected"]} == {str(mixed / name) for name in UNREADABLE}
    assert all(entry["reason"] for entry in record["rejected"])
    assert done.stdout.startswith("explained 5 of 8 images")


def test_every_good_image_is_explained(explained, mixed):
    _, out, record = explained
    good = ["a.jpg", "a.png", "nested/a.png", "nested/deeper/clear.PNG", "nested/palette.gif"]
    assert [Path(entry["file"]).relative_to(mixed).as_posix() for entry in record["images"]] == good
    assert (record["beta"], record["class_names"]) == (0.5, ["dark", "light cells"])
    assert len({entry["overlay"] for entry in record["images"]}) == len(good)
    for entry in record["images"]:
        with Image.open(out / entry["overlay"]) as overlay:
            assert (overlay.size, overlay.mode) == ((32, 32), "RGB")
        probabilities = entry["probabilities"]
        assert list(probabilities) == record["class_names"]
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert entry["prediction"] == entry["target"] == max(probabilities, key=probabilities.get)
        assert entry["probability"] == max(probabilities.values())
        assert len(entry["head_predictions"]) == len(record["layers"])
        assert entry["head_predictions"][-1] == entry["prediction"]


def test_nothing_but_what_is_named_is_written(explained):
    _, out, record = explained
    maps = {f"maps/{number:06d}.npz" for number in range(3)}
    expected = {entry["overlay"] for entry in record["images"]} | maps | {"explanations.json"}
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == expected


def test_maps_can_be_loaded_and_weighed_anew(explained):
    _, out, record = explained
    parts = [Explanation.load(path) for path in sorted((out / "maps").iterdir())]
    whole = Explanation.concatenate(parts)
    assert len(whole) == len(record["images"])
    assert whole.options.beta == 0.5
    assert whole.saliency.shape == (5, 32, 32)
    assert 0 <= float(whole.saliency.min()) <= float(whole.saliency.max()) <= 1
    assert [whole.label(int(target)) for target in whole.target] == [entry["target"] for entry in record["images"]]
    assert not torch.equal(whole.reweighted(beta=0.0).saliency, whole.saliency)
    first = whole.overlay()[0].movedim(0, -1).numpy()
    with Image.open(out / record["images"][0]["overlay"]) as overlay:
        assert np.array_equal(np.asarray(overlay), first)


@pytest.mark.parametrize("target", ["light cells", "1"])
def test_the_target_is_a_name_or_a_number(trained, mixed, tmp_path, capsys, target):
    options = ["--input", str(mixed / "a.png"), "--out", str(tmp_path / "out"), "--target", target]
    assert cli.main(["explain", "--checkpoint", str(trained[1]), *options]) == 0
    (entry,) = json.loads((tmp_path / "out" / "explanations.json").read_text())["images"]
    assert entry["target"] == "light cells"
    assert entry["overlay"] == "a.png.png"
    assert capsys.readouterr().err == ""


def test_an_output_folder_within_the_input_is_not_explained_the_next_time(trained, mixed, tmp_path, capsys):
    shutil.copy(mixed / "a.png", tmp_path)
    for _ in range(2):
        options = ["--input", str(tmp_path), "--out", str(tmp_path / "explained")]
        assert cli.main(["explain", "--checkpoint", str(trained[1]), *options]) == 0
        assert capsys.readouterr().out.startswith("explained 1 of 1 images")


def test_when_no_image_can_be_read_the_record_says_so(trained, tmp_path, capsys):
    (tmp_path / "text.png").write_text("text")
    options = ["--input", str(tmp_path / "text.png"), "--out", str(tmp_path / "out")]
    assert cli.main(["explain", "--checkpoint", str(trained[1]), *options]) == 3
    record = json.loads((tmp_path / "out" / "explanations.json").read_text())
    assert (record["images"], len(record["rejected"])) == ([], 1)
    said = capsys.readouterr().out
    assert "explained 0 of 1 images; wrote " in said
    assert "overlay" not in said


# ---------------------------------------------------------------------------------------------------------------- info


def test_info_shows_a_checkpoint_and_a_backbone(trained, capsys):
    assert cli.main(["info", "--checkpoint", str(trained[1]), "--backbone", "resnet18"]) == 0
    text = capsys.readouterr().out
    for expected in (
        "torch ",
        "saliency: ",
        "resnet18: 8 residual additions",
        "layer4.1: 512 channels, 7 x 7",
        "at=downsample: layer2.0, layer3.0, layer4.0, layer4.1",
        "num_classes: 2",
        "preprocessing mean: [0.5, 0.5, 0.5]",
        "blocks: layer1.0, layer1.1",
    ):
        assert expected in text


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def places(trained, mixed, photos, tmp_path):
    """Names for folders and files in command lines that go wrong."""
    made = {"run": trained[1], "mixed": mixed, "photos": photos, "tmp": tmp_path, "image": mixed / "a.png"}
    for name in ("file", "nothing", "damaged", "truncated", "foreign"):
        made[name] = tmp_path / name
    made["file"].write_text("in the way")
    made["nothing"].mkdir()
    (made["nothing"] / "notes.txt").write_text("text")
    for name in ("damaged", "truncated", "foreign"):
        shutil.copytree(trained[1], made[name])
    (made["damaged"] / "config.json").write_text("{")
    (made["foreign"] / "config.json").write_text('{"model_type": "bert"}')
    weights = made["truncated"] / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    return made


LESIONS = "train --data synthetic-lesions --size 32 --out {tmp}/run"
EXPLAIN = "explain --checkpoint {run} --input {image} --out {tmp}/out"
ERRORS = [
    ("train --data nowhere --out {tmp}/run", "there is no folder nowhere"),
    ("train --data bloodmnist --root {tmp} --no-download --out {tmp}/run", "no such file: {tmp}/bloodmnist.npz"),
    ("train --data bloodmnist --root {tmp} --no-download --size 30 --out {tmp}/run", "expected one of 28, 64, 128"),
    ("train --data {nothing} --out {tmp}/run", "expected one sub-folder per class"),
    ("train --data synthetic-lesions --size 8 --out {tmp}/run", "size: expected an integer of at least 32, got 8"),
    (f"{LESIONS} --epochs 0", "--epochs must be at least 1, got 0"),
    (f"{LESIONS} --learning-rate nan", "--learning-rate must be >= 0, got nan"),
    (f"{LESIONS} --seed -1", "seed"),
    (f"{LESIONS} --recipe imagenet-finetune", "augment='imagenet' works on image files"),
    (f"{LESIONS} --backbone resnet1", "--backbone must be a torchvision classification network"),
    (f"{LESIONS} --backbone timm/resnet1", "--backbone must name a timm network"),
    (f"{LESIONS} --backbone squeezenet1_1", "has no residual addition"),
    (f"{LESIONS} --weights BEST", "--weights must be one of"),
    ("train --data synthetic-lesions --size 32 --out {file}", "--out: File exists: {file}"),
    ("train --data {photos} --size 32 --epochs 2 --batch-size 8 --seed 1 --out {run}", "another run (it differs in "),
    ("explain --checkpoint {tmp}/none --input {image} --out {tmp}/out", "there is no folder {tmp}/none"),
    ("explain --checkpoint someone/nothing --input {image} --out {tmp}/out", "could not be fetched from the hub"),
    ("explain --checkpoint {nothing} --input {image} --out {tmp}/out", "config.json is missing"),
    ("explain --checkpoint {damaged} --input {image} --out {tmp}/out", "config.json cannot be used: not JSON"),
    ("explain --checkpoint {foreign} --input {image} --out {tmp}/out", "not the configuration of an MHEX classifier"),
    ("explain --checkpoint {truncated} --input {image} --out {tmp}/out", "model.safetensors is damaged, truncated"),
    ("explain --checkpoint {run} --input {tmp}/none.png --out {tmp}/out", "there is no {tmp}/none.png"),
    ("explain --checkpoint {run} --input {nothing} --out {tmp}/out", "--input must hold images"),
    ("explain --checkpoint {run} --input {image} --out {file}", "{file}"),
    ("explain --checkpoint {run} --input {image} --out {file}/below", "--out: Not a directory: {file}/below"),
    ("explain --checkpoint {run} --input {mixed} --out {mixed}", "--out must be another folder than --input"),
    (f"{EXPLAIN} --target grey", "--target must be one of the classes (dark, light cells) or its number, got 'grey'"),
    (f"{EXPLAIN} --target 2", "--target must be one of the classes"),
    (f"{EXPLAIN} --target -1", "--target must be one of the classes"),
    (f"{EXPLAIN} --beta 2", "beta"),
    (f"{EXPLAIN} --beta nan", "beta"),
    (f"{EXPLAIN} --batch-size 0", "--batch-size must be at least 1, got 0"),
    ("info --checkpoint {tmp}/none", "there is no folder {tmp}/none"),
    ("info --backbone resnet1", "--backbone must be a torchvision"),
    ("demo --epochs 0 --out {tmp}/demo", "--epochs must be at least 1, got 0"),
    ("demo --seed -1 --out {tmp}/demo", "seed"),
]


@pytest.mark.parametrize(("line", "expected"), ERRORS, ids=[line for line, _ in ERRORS])
@pytest.mark.filterwarnings("ignore::mhex_vision.data.UnreadableImageWarning")
def test_an_error_is_one_line_that_names_its_cause(places, capsys, monkeypatch, line, expected):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main([part.format(**places) for part in line.split()]) == 1
    (complaint,) = capsys.readouterr().err.splitlines()
    assert complaint.startswith("mhex-vision: error: ")
    assert expected.format(**places) in complaint
    assert not (places["tmp"] / "out" / "explanations.json").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_named(places, capsys):
    places["nothing"].chmod(0o500)
    line = "explain --checkpoint {run} --input {image} --out {nothing}"
    assert cli.main([part.format(**places) for part in line.split()]) == 1
    assert str(places["nothing"]) in capsys.readouterr().err


def test_the_installed_script_ends_an_error_with_status_1_and_one_line(tmp_path):
    found = shutil.which("mhex-vision", path=Path(sys.executable).parent)
    script = [found] if found else [sys.executable, *MODULE]
    command = [*script, "explain", "--checkpoint", tmp_path / "none", "--input", tmp_path, "--out", tmp_path / "out"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    (complaint,) = done.stderr.splitlines()
    assert complaint.startswith("mhex-vision: error: ")


def test_an_interrupted_command_that_cannot_go_on_does_not_promise_to(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "info", interrupt)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "mhex-vision: interrupted\n"

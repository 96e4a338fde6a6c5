"""A run is the same to the bit after a kill, keeps its best epoch, and leaves nothing half-written in its folder."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from mhex_core.files import partial_of
from mhex_core.weights import read_weights
from mhex_vision import MHEXClassifier, checkpoint, training
from mhex_vision.evaluation import Metrics
from mhex_vision.training import train

from .runs import (
    ENVIRONMENT,
    MOMENTS,
    RECIPE,
    SCRIPT,
    Residual,
    assert_same_weights,
    bundle,
    classifier,
    losses,
    plain_network,
    rows,
    stop_after,
    weights,
)


@pytest.fixture(scope="module")
def data():
    return bundle()


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run nobody disturbed."""
    model, out = classifier(), tmp_path_factory.mktemp("whole")
    return model, train(model, data, RECIPE, out=out), out


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_bits(vision_python, whole, data, tmp_path, moment):
    died = vision_python.run(SCRIPT, moment, tmp_path, environment=ENVIRONMENT)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert json.loads((tmp_path / "run.json").read_text())["result"] is None
    finished = [row["epoch"] for row in rows(tmp_path)]
    assert finished == ["1"]

    model = classifier()
    epochs = []
    result = train(model, data, RECIPE, out=tmp_path, on_epoch=lambda epoch: epochs.append(epoch.epoch))
    expected_model, expected, _ = whole
    assert epochs == [2, 3]
    assert losses(result) == losses(expected)
    assert (result.best_epoch, result.test) == (expected.best_epoch, expected.test)
    assert_same_weights(weights(model), weights(expected_model))
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2", "3"]
    assert not (tmp_path / "resume.safetensors").exists()


KINDS = {
    "plain network": (plain_network, RECIPE),
    "joint": (lambda: classifier(objective="joint"), RECIPE),
    "kept classifier": (lambda: classifier(classifier="keep"), replace(RECIPE, label_smoothing=0.1)),
    "frozen": (lambda: classifier(freeze_backbone=True, gate=False, classifier="keep"), RECIPE),
    "bf16": (classifier, replace(RECIPE, mixed_precision="bf16")),
}


@pytest.mark.parametrize(("make", "recipe"), KINDS.values(), ids=KINDS.keys())
def test_every_kind_of_run_resumes_to_the_same_bits(data, tmp_path, make, recipe):
    expected_model, model = make(), make()
    expected = train(expected_model, data, recipe, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(make(), data, recipe, out=tmp_path / "stopped", on_epoch=stop_after(2))
    result = train(model, data, recipe, out=tmp_path / "stopped")
    assert losses(result) == losses(expected)
    assert result.test == expected.test
    assert_same_weights(weights(model), weights(expected_model))


def test_the_state_of_the_caller_does_not_matter(whole, data, tmp_path):
    torch.manual_seed(99)
    model = classifier()
    torch.rand(1000)
    np.random.seed(5)  # noqa: NPY002 - the old generator is meant
    assert losses(train(model, data, RECIPE, out=tmp_path)) == losses(whole[1])


def test_another_seed_is_another_run(whole, data, tmp_path):
    assert losses(train(classifier(), data, RECIPE, out=tmp_path, seed=1)) != losses(whole[1])


def test_a_finished_run_is_not_run_again(whole, data, monkeypatch):
    expected_model, expected, out = whole
    monkeypatch.setattr(training._Run, "_train_epoch", lambda *_: pytest.fail("trained again"))
    model = classifier()
    result = train(model, data, RECIPE, out=out)
    assert result == expected
    assert not model.training
    assert_same_weights(weights(model), weights(expected_model))


OTHERS = {
    "recipe": {"recipe": replace(RECIPE, epochs=4)},
    "seed": {"seed": 1},
    "data": {"data": bundle(train=44)},
    "network": {"model": classifier(gate=False)},
    "network, of another kind": {"model": plain_network()},
}


@pytest.mark.parametrize(("name", "change"), OTHERS.items(), ids=OTHERS.keys())
def test_another_run_in_the_folder_is_refused_and_what_differs_is_named(whole, data, name, change):
    arguments = {"model": classifier(), "data": data, "recipe": RECIPE, "seed": 0} | change
    before = (whole[2] / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=rf"holds another run \(it differs in {name.partition(',')[0]}\)"):
        train(**arguments, out=whole[2])
    assert (whole[2] / "model.safetensors").read_bytes() == before


def test_overwrite_starts_anew_and_leaves_nothing_of_the_other_run(whole, data, tmp_path):
    train(classifier(), data, replace(RECIPE, epochs=1), out=tmp_path, seed=1)
    result = train(classifier(), data, RECIPE, out=tmp_path, overwrite=True)
    assert losses(result) == losses(whole[1])
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2", "3"]
    train(plain_network(), data, replace(RECIPE, epochs=1), out=tmp_path, overwrite=True)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"something else"),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: checkpoint.write_tensors(path, {"model.fc": torch.zeros(2)}),
        lambda path: checkpoint.write_tensors(path, {"model.fc": torch.zeros(2)}, {"progress": "{}"}),
        lambda path: checkpoint.write_tensors(path, {"optimizer.x.step": torch.zeros(2)}, {"progress": "[]"}),
    ],
    ids=["empty", "foreign", "truncated", "no progress", "other tensors", "odd names"],
)
def test_a_damaged_resume_file_is_named_with_the_way_out(data, tmp_path, damage):
    recipe = replace(RECIPE, epochs=2)
    with pytest.raises(KeyboardInterrupt):
        train(classifier(), data, recipe, out=tmp_path, on_epoch=stop_after(1))
    damage(tmp_path / "resume.safetensors")
    with pytest.raises(ValueError, match=r"resume\.safetensors is damaged or something else; delete") as caught:
        train(classifier(), data, recipe, out=tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "resume.safetensors").unlink()
    assert len(train(classifier(), data, recipe, out=tmp_path).history) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "log.csv", "resume.safetensors", "run.json"])
def test_a_folder_with_files_of_somebody_else_is_refused(data, tmp_path, name):
    (tmp_path / name).write_text("[]")
    with pytest.raises(ValueError, match="something else"):
        train(classifier(), data, RECIPE, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "[]"


@pytest.mark.parametrize("file", ["model.safetensors", "resume.safetensors"])
def test_a_failed_write_leaves_the_files_before_it(whole, data, tmp_path, monkeypatch, file):
    save_file = checkpoint.save_file
    finished = []

    def fail(tensors, path, metadata=None):
        if finished and path.name.startswith(f".{file}."):
            path.write_bytes(b"half")
            raise OSError("no space left on device")
        save_file(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", fail)
        # Every epoch is the best one, so that both files are written in the second one too.
        patch.setattr(training._Run, "_is_best", lambda *_: True)
        with pytest.raises(OSError, match="no space left"):
            train(classifier(), data, RECIPE, out=tmp_path, on_epoch=finished.append)
    assert len(finished) == 1
    expected = {"config.json", "log.csv", "model.safetensors", "resume.safetensors", "run.json"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    MHEXClassifier.from_pretrained(tmp_path, backbone=Residual())
    assert losses(train(classifier(), data, RECIPE, out=tmp_path)) == losses(whole[1])


def test_what_a_killed_run_had_begun_to_write_goes_and_what_users_put_there_stays(vision_python, data, tmp_path):
    died = vision_python.run(SCRIPT, "while files are written", tmp_path, environment=ENVIRONMENT)
    assert died.returncode == -signal.SIGKILL, died.stderr
    left = {path.name for path in tmp_path.iterdir() if path.name.endswith(".mhex-partial")}
    assert left
    own = partial_of(tmp_path / "run.json")
    own.write_text("half")
    theirs = {".notes.important123", ".run.json.0123456789ab", ".run.json.bak.mhex-partial", ".gitignore"}
    theirs |= {partial_of(tmp_path / "diary.txt").name, ".run.json.0123456789AB.mhex-partial"}
    for name in theirs:
        (tmp_path / name).write_text("mine")
    train(classifier(), data, RECIPE, out=tmp_path)
    there = {path.name for path in tmp_path.iterdir()}
    assert theirs <= there
    assert not (left | {own.name}) & there


# ---------------------------------------------------------------------------------------------------------- best epoch

SCORES = [(0.5, 1.0), (0.7, 0.9), (0.7, 0.8), (0.7, 0.8), (0.6, 0.7)]  # accuracy, loss of each epoch


@pytest.mark.parametrize(
    ("monitor", "patience", "scores", "best", "epochs"),
    [
        ("accuracy", None, SCORES, 3, 5),
        ("loss", None, SCORES, 5, 5),
        ("accuracy", 1, SCORES, 3, 4),
        ("accuracy", 2, SCORES, 3, 5),
        ("loss", 1, [(0.1, 1.0), (0.9, 2.0), (0.9, 0.5)], 1, 2),
        ("auc", None, [(0.9, 1.0, 0.5), (0.1, 2.0, 0.8), (0.9, 1.5, 0.8), (0.9, 1.6, 0.8)], 3, 4),
        ("auc", 1, [(0.9, 1.0, None), (0.1, 0.5, None), (0.9, 0.6, None), (0.9, 0.6, 0.9)], 2, 3),
    ],
)
def test_the_best_epoch_is_kept_and_patience_ends_the_run(
    data, tmp_path, monkeypatch, monitor, patience, scores, best, epochs
):
    judged = iter([*scores, (0.0, 9.0, 0.1)])

    def judge(run, images, name):
        accuracy, loss, *auc = next(judged)
        return Metrics(loss=loss, accuracy=accuracy, head_accuracy=(), images=len(images), auc=auc[0] if auc else 0.5)

    monkeypatch.setattr(training._Run, "_judge", judge)
    model = classifier()
    kept = []
    recipe = replace(RECIPE, epochs=len(scores), monitor=monitor, patience=patience)
    result = train(model, data, recipe, out=tmp_path, on_epoch=lambda _: kept.append(weights(model)))
    assert (result.best_epoch, len(result.history)) == (best, epochs)
    assert_same_weights(weights(model), kept[best - 1])
    assert_same_weights(read_weights(tmp_path / "model.safetensors"), kept[best - 1])


def test_without_validation_and_test_images_the_last_epoch_is_kept(data, tmp_path):
    bare = replace(data, validation=None, test=None)
    result = train(classifier(), bare, replace(RECIPE, patience=1), out=tmp_path)
    assert (result.best_epoch, len(result.history), result.test) == (3, 3, None)
    assert all(epoch.validation is None for epoch in result.history)
    assert [row["validation_loss"] for row in rows(tmp_path)] == [""] * 3


# --------------------------------------------------------------------------------------------------------------- files


def test_what_is_written_is_a_checkpoint_a_log_and_a_record(whole):
    model, result, out = whole
    assert {path.name for path in out.iterdir()} == {"config.json", "log.csv", "model.safetensors", "run.json"}
    loaded = MHEXClassifier.from_pretrained(out, backbone=Residual())
    assert_same_weights(weights(loaded), weights(model))
    assert loaded.config == model.config
    record = json.loads((out / "run.json").read_text())
    assert record["settings"]["seed"] == 0
    assert record["result"]["test"]["accuracy"] == result.test.accuracy
    for row, epoch in zip(rows(out), result.history, strict=True):
        assert float(row["train_loss"]) == epoch.train_loss
        assert float(row["validation_loss"]) == epoch.validation.loss
        heads = [float(row[f"accuracy {name}"]) for name in model.layer_names]
        assert tuple(heads) == epoch.validation.head_accuracy

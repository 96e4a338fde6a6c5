"""Training: the same to the bit after a kill, the best epoch kept, nothing half-written.

Run as a script, this file is the run that gets killed, or one process of a distributed one.
"""

import csv
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from mhex_vision import MHEXClassifier, checkpoint, training
from mhex_vision.data import DataBundle, Preprocessing, UnreadableImageWarning
from mhex_vision.data.folders import folder_bundle
from mhex_vision.data.lesions import lesions_bundle
from mhex_vision.data.sets import ArrayImages
from mhex_vision.evaluation import IndexBatches, Metrics, evaluate
from mhex_vision.recipes import Recipe
from mhex_vision.training import train

RECIPE = Recipe(epochs=3, batch_size=16, learning_rate=3e-3)
MOMENTS = ("after epoch 1", "inside epoch 2", "while files are written")


class Residual(nn.Module):
    """Two residual additions, with batch statistics and dropout: whatever a resumed run could get wrong."""

    def __init__(self, classes=4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.first = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, classes)

    def forward(self, images):
        x = self.stem(images)
        x = torch.relu(x + self.first(x))
        x = torch.relu(x + self.second(x))
        return self.fc(x.mean(dim=(2, 3)))


def bundle(**counts):
    return lesions_bundle(size=32, **{"train": 45, "validation": 16, "test": 12} | counts)


def classifier(classes=4, **settings):
    torch.manual_seed(3)
    return MHEXClassifier.from_backbone(Residual(classes), classes, image_size=32, **settings)


def plain_network():
    torch.manual_seed(3)
    return Residual()


def killed(moment, out):
    """A run that ends its own process the hard way."""
    model = classifier()
    seen = {"steps": 0, "files": 0}

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def after_epoch(epoch):
        if moment == "after epoch 1":
            die()

    def before_step(module, _):
        seen["steps"] += module.training
        if moment == "inside epoch 2" and seen["steps"] == 5:  # an epoch has three
            die()

    def write_half(tensors, path, metadata=None):
        seen["files"] += 1
        save_file(tensors, path, metadata=metadata)
        if moment == "while files are written" and seen["files"] == 3:  # an epoch writes two at most
            os.truncate(path, path.stat().st_size // 2)
            die()

    save_file = checkpoint.save_file
    checkpoint.save_file = write_half
    model.register_forward_pre_hook(before_step)
    train(model, bundle(), RECIPE, out=out, on_epoch=after_epoch)


def distributed(out):
    """One of two processes; there are fewer validation images than processes."""
    train(classifier(), bundle(train=33, validation=1, test=5), replace(RECIPE, epochs=1), out=out)


def run_as_script(*arguments, launcher=()):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, __file__, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As in the subprocesses: sums depend on how they are split."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data():
    return bundle()


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run nobody disturbed."""
    model, out = classifier(), tmp_path_factory.mktemp("whole")
    return model, train(model, data, RECIPE, out=out), out


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def losses(result):
    """All but the seconds."""
    return [replace(epoch, seconds=0.0) for epoch in result.history]


def rows(out):
    with (out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def stop_after(count):
    def on_epoch(epoch):
        if epoch.epoch == count:
            raise KeyboardInterrupt

    return on_epoch


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_bits(whole, data, tmp_path, moment):
    died = run_as_script(moment, tmp_path)
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
        ("loss", None, [(0.1, float("nan")), (0.1, 2.0), (0.1, float("nan"))], 2, 3),
    ],
)
def test_the_best_epoch_is_kept_and_patience_ends_the_run(
    data, tmp_path, monkeypatch, monitor, patience, scores, best, epochs
):
    judged = iter([*scores, (0.0, 9.0)])

    def judge(run, images):
        accuracy, loss = next(judged)
        return Metrics(loss=loss, accuracy=accuracy, head_accuracy=(), images=len(images))

    monkeypatch.setattr(training._Run, "_judge", judge)
    model = classifier()
    kept = []
    recipe = replace(RECIPE, epochs=len(scores), monitor=monitor, patience=patience)
    result = train(model, data, recipe, out=tmp_path, on_epoch=lambda _: kept.append(weights(model)))
    assert (result.best_epoch, len(result.history)) == (best, epochs)
    assert_same_weights(weights(model), kept[best - 1])
    assert_same_weights(checkpoint.read_tensors(tmp_path / "model.safetensors"), kept[best - 1])


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


# -------------------------------------------------------------------------------------------------------------- judging


def normalised(images):
    """Mean and standard deviation 0.5, by hand."""
    return torch.from_numpy((images.numpy().astype(np.float32) / 255 - 0.5) / 0.5)


@pytest.mark.parametrize("settings", [{}, {"objective": "joint"}, {"classifier": "keep"}], ids=str)
def test_every_accuracy_is_that_of_a_count_by_hand(data, settings):
    model = classifier(**settings)
    metrics = evaluate(model, data.test, data, batch_size=5)
    assert model.training  # as it was
    model.eval()
    with torch.no_grad():
        each = [model(normalised(data.test.images[index : index + 1])) for index in range(len(data.test))]
    labels = data.test.labels.tolist()
    right = [int(output.logits.argmax()) == label for output, label in zip(each, labels, strict=True)]
    assert metrics.images == len(labels) == 12
    assert metrics.accuracy == sum(right) / 12
    for head in range(2):
        hits = sum(int(output.head_logits[head].argmax()) == label for output, label in zip(each, labels, strict=True))
        assert metrics.head_accuracy[head] == hits / 12
    probability = [output.logits.double().softmax(1)[0, label] for output, label in zip(each, labels, strict=True)]
    assert metrics.loss == pytest.approx(-float(torch.stack(probability).log().mean()), rel=1e-5)


def multi_label_bundle():
    generator = torch.Generator().manual_seed(1)

    def images(count):
        labels = (torch.rand(count, 3, generator=generator) > 0.6).float()
        return ArrayImages(torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8), labels)

    return DataBundle(
        name="findings",
        train=images(20),
        validation=images(7),
        test=images(9),
        class_names=("a", "b", "c"),
        multi_label=True,
        preprocessing=Preprocessing(size=32),
    )


def test_several_labels_are_judged_answer_by_answer(tmp_path):
    data = multi_label_bundle()
    model = classifier(3, multi_label=True)
    result = train(model, data, replace(RECIPE, batch_size=4, epochs=1), out=tmp_path)
    with torch.no_grad():
        output = model(normalised(data.test.images))
    answers = [(logits > 0) == data.test.labels.bool() for logits in (output.logits, *output.head_logits)]
    shares = [float(answer.double().mean()) for answer in answers]
    assert result.test.images == 9
    assert (result.test.accuracy, *result.test.head_accuracy) == pytest.approx(shares, rel=1e-6)
    expected = F.binary_cross_entropy_with_logits(output.logits, data.test.labels)
    assert result.test.loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 7, 64, 65])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_batches_share_the_images_out(count, batch_size, world):
    judging = [IndexBatches(count, batch_size, rank=rank, world=world) for rank in range(world)]
    assert sorted(index for part in judging for batch in part for index in batch) == list(range(count))
    shuffled = [IndexBatches(count, batch_size, seed=0, rank=rank, world=world) for rank in range(world)]
    batches = [list(part) for part in shuffled]
    assert {index for part in batches for batch in part for index in batch} == set(range(count))
    sizes = [[len(batch) for batch in part] for part in batches]
    assert sizes == [sizes[0]] * world  # processes wait for each other at every step
    assert [len(part) for part in shuffled] == [len(part) for part in batches]
    assert max(sizes[0]) <= batch_size
    assert max(sizes[0]) - min(sizes[0]) <= 1
    shuffled[0].epoch = 1
    assert count < 7 or list(shuffled[0]) != batches[0]


# --------------------------------------------------------------------------------------------------- kinds of training


@pytest.mark.parametrize("gate", [True, False])
def test_a_frozen_backbone_stays_to_the_bit(data, tmp_path, gate):
    model = classifier(freeze_backbone=True, gate=gate, classifier="keep")
    before, heads = weights(model.backbone), weights(model.blocks)
    own = model.backbone.eval()(normalised(data.test.images))
    train(model, data, replace(RECIPE, epochs=1), out=tmp_path)
    assert_same_weights(weights(model.backbone), before)  # the running statistics of BatchNorm are among them
    assert all(not torch.equal(heads[name], value) for name, value in model.blocks.state_dict().items())
    if not gate:
        assert torch.equal(model(normalised(data.test.images)).logits, own)


def test_a_plain_network_trains_and_learns(tmp_path):
    images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    labels = torch.arange(64) % 2
    images[labels == 1] = 200
    split = ArrayImages(images, labels)
    data = DataBundle(
        name="black-white",
        train=split,
        validation=split,
        test=split,
        class_names=("black", "white"),
        multi_label=False,
        preprocessing=Preprocessing(size=32),
    )
    torch.manual_seed(0)
    result = train(Residual(2), data, RECIPE, out=tmp_path)
    assert result.test.accuracy == 1.0
    assert result.test.head_accuracy == ()
    assert result.history[-1].train_loss < result.history[0].train_loss
    assert {path.name for path in tmp_path.iterdir()} == {"log.csv", "model.safetensors", "run.json"}


def test_the_precision_of_training_ends_with_it(data, tmp_path):
    """A process may train in one precision after another, and the network can be copied and judged as before."""
    recipe = replace(RECIPE, epochs=1)
    first = train(classifier(), data, recipe, out=tmp_path / "first")
    model = classifier()
    result = train(model, data, replace(recipe, mixed_precision="bf16"), out=tmp_path / "second")
    assert losses(result) != losses(first)
    assert evaluate(pickle.loads(pickle.dumps(model)), data.test, data) == result.test
    assert losses(train(classifier(), data, recipe, out=tmp_path / "third")) == losses(first)


def test_each_epoch_sees_every_image_once_in_another_order(data, tmp_path, monkeypatch):
    seen = []
    to_device = training._Run._to_device

    def record(run, batch):
        seen.extend(image.sum().item() for image in batch.images.long())
        return to_device(run, batch)

    monkeypatch.setattr(training._Run, "_to_device", record)
    train(classifier(), data, replace(RECIPE, epochs=2), out=tmp_path)
    first, second = seen[:45], seen[45:]
    assert sorted(first) == sorted(second) == sorted(image.sum().item() for image in data.train.images.long())
    assert first != second


def test_the_learning_rate_follows_the_schedule(data, tmp_path):
    result = train(classifier(), data, RECIPE, out=tmp_path)
    steps = 3  # 45 images in batches of at most 16
    expected = [RECIPE.learning_rate_at(steps * epoch - 1, steps * 3) for epoch in (1, 2, 3)]
    assert [epoch.learning_rate for epoch in result.history] == expected


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def photos(tmp_path):
    """A folder with two classes, and one file in each that is no image."""
    generator = np.random.default_rng(0)
    for label in ("ant", "bee"):
        for split, count in (("train", 8), ("val", 3)):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(256, size=(20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
            (folder / "broken.png").write_bytes(b"no image")
    return tmp_path / "photos"


def test_unreadable_files_are_warned_about_and_the_rest_trains(photos, tmp_path):
    data = folder_bundle(photos, size=32)
    with pytest.warns(UnreadableImageWarning, match=r"broken\.png") as caught:
        result = train(classifier(2), data, replace(RECIPE, epochs=1, batch_size=6), out=tmp_path / "run")
    named = {str(warning.message).partition(str(photos))[2].partition(":")[0] for warning in caught}
    assert named == {f"/{split}/{label}/broken.png" for split in ("train", "val") for label in ("ant", "bee")}
    assert result.test.images == 6


def test_augmentation_needs_files_and_resumes_to_the_same_bits(photos, data, tmp_path):
    recipe = replace(RECIPE, epochs=2, batch_size=8, augment="imagenet")
    for path in photos.rglob("broken.png"):
        path.unlink()
    files = folder_bundle(photos, size=32)
    expected = train(classifier(2), files, recipe, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(classifier(2), files, recipe, out=tmp_path / "stopped", on_epoch=stop_after(1))
    assert losses(train(classifier(2), files, recipe, out=tmp_path / "stopped")) == losses(expected)
    with pytest.raises(ValueError, match="augment='imagenet' works on image files"):
        train(classifier(), data, recipe, out=tmp_path / "other")


@pytest.mark.filterwarnings("ignore::mhex_vision.data.UnreadableImageWarning")
def test_nothing_readable_is_said_so(photos, tmp_path):
    for path in photos.rglob("*.png"):
        path.write_bytes(b"no image")
    data = folder_bundle(photos, size=32)
    with pytest.raises(RuntimeError, match="two that can be read"):
        train(classifier(2), data, RECIPE, out=tmp_path / "run")
    with pytest.raises(ValueError, match="at least one that can be read"):
        evaluate(classifier(2), data.test, data)


WRONG = {
    "number of classes": ({"model": classifier(3)}, ValueError, "model has 3 classes and data has 4"),
    "kind of labels": ({"model": classifier(multi_label=True)}, ValueError, "multi_label=True and data False"),
    "nothing to train": ({"model": plain_network().requires_grad_(False)}, ValueError, "requires a gradient"),
    "negative seed": ({"seed": -1}, ValueError, "seed must be a whole number from 0, got -1"),
    "rate": ({"recipe": replace(RECIPE, learning_rate=1e30)}, RuntimeError, "loss of epoch 1 is (nan|inf)"),
}


@pytest.mark.parametrize(("change", "error", "text"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_trained_is_said_in_words(data, tmp_path, change, error, text):
    arguments = {"model": classifier(), "data": data, "recipe": RECIPE, "seed": 0} | change
    with pytest.raises(error, match=text):
        train(**arguments, out=tmp_path)


def test_a_run_that_diverges_keeps_its_best_weights(data, tmp_path):
    model = classifier()

    def spoil(epoch):
        with torch.no_grad():
            model.blocks[-1].head.weight.fill_(torch.nan)

    with pytest.raises(RuntimeError, match="loss of epoch 2 is nan; lower the learning rate"):
        train(model, data, RECIPE, out=tmp_path, on_epoch=spoil)
    kept = MHEXClassifier.from_pretrained(tmp_path, backbone=Residual())
    assert all(bool(value.isfinite().all()) for value in kept.state_dict().values())


def test_a_network_with_another_output_is_refused(data, tmp_path):
    class Pair(Residual):
        def forward(self, images):
            return super().forward(images), None

    with pytest.raises(TypeError, match=r"\(B, K\) logits or a ClassifierOutput, got tuple"):
        train(Pair(), data, RECIPE, out=tmp_path)


# -------------------------------------------------------------------------------------------------------- two processes


def test_two_processes_train_together_and_judge_each_image_once(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    start = time.perf_counter()
    done = run_as_script("distributed", tmp_path, launcher=launcher)
    assert done.returncode == 0, f"after {time.perf_counter() - start:.0f} s: {done.stderr[-4000:]}"
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "log.csv", "model.safetensors", "run.json"}
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["settings"]["processes"] == 2
    assert [epoch["validation"]["images"] for epoch in record["result"]["history"]] == [1]
    assert len(rows(tmp_path)) == 1

    data = bundle(train=33, validation=1, test=5)
    alone = evaluate(MHEXClassifier.from_pretrained(tmp_path, backbone=Residual()), data.test, data)
    together = record["result"]["test"]
    assert together["images"] == alone.images == 5
    assert together["accuracy"] == alone.accuracy
    assert tuple(together["head_accuracy"]) == alone.head_accuracy
    assert together["loss"] == pytest.approx(alone.loss, rel=1e-6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "distributed":
        distributed(folder)
    else:
        killed(what, folder)

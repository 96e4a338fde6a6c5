"""Training: what each kind of it changes, how it is judged, what it refuses, and that two processes agree."""

import json
import pickle
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mhex_vision import MHEXClassifier, training
from mhex_vision.data import DataBundle, Preprocessing, UnreadableImageWarning
from mhex_vision.data.folders import folder_bundle
from mhex_vision.data.sets import ArrayImages
from mhex_vision.evaluation import IndexBatches, evaluate, macro_auc
from mhex_vision.explaining import explain_by
from mhex_vision.training import train

from .runs import (
    ENVIRONMENT,
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
    assert result.test.exact_match == pytest.approx(float(answers[0].all(dim=1).double().mean()))
    areas = [area_by_hand(output.logits[:, k], data.test.labels[:, k].bool()) for k in range(3)]
    assert result.test.auc == pytest.approx(np.mean(areas), abs=1e-6)
    expected = F.binary_cross_entropy_with_logits(output.logits, data.test.labels)
    assert result.test.loss == pytest.approx(float(expected), rel=1e-5)


def area_by_hand(scores, positive):
    """How often an image of the class scores above one of another class; half of it where they are equal."""
    differences = scores[positive].unsqueeze(1) - scores[~positive].unsqueeze(0)
    return float(((differences > 0).double() + 0.5 * (differences == 0)).mean())


def test_the_area_under_the_curve_is_that_of_counted_pairs():
    generator = torch.Generator().manual_seed(2)
    logits = (3 * torch.randn(40, 4, generator=generator)).round()  # with ties
    labels = torch.randint(3, (40,), generator=generator)
    auc, without = macro_auc(logits, labels)
    assert without == (3,)  # no image has it
    chances = logits.double().softmax(1)
    assert auc == pytest.approx(np.mean([area_by_hand(chances[:, k], labels == k) for k in range(3)]), abs=1e-6)
    answers = torch.rand(40, 4, generator=generator) > 0.7
    answers[:, 1] = True  # every image has it
    auc, without = macro_auc(logits, answers.float())
    assert without == (1,)
    assert auc == pytest.approx(np.mean([area_by_hand(logits[:, k], answers[:, k]) for k in (0, 2, 3)]), abs=1e-6)


def test_of_images_of_one_class_there_is_no_area_and_no_crash(data, tmp_path):
    labels = torch.zeros_like(data.validation.labels)
    one = replace(data, validation=ArrayImages(data.validation.images, labels))
    result = train(classifier(), one, replace(RECIPE, epochs=2, monitor="auc"), out=tmp_path)
    assert [epoch.validation.auc for epoch in result.history] == [None, None]
    assert result.history[0].validation.without_auc == (0, 1, 2, 3)
    assert [row["validation_auc"] for row in rows(tmp_path)] == ["", ""]
    assert result.test.auc is not None
    assert train(classifier(), one, replace(RECIPE, epochs=2, monitor="auc"), out=tmp_path) == result


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


@pytest.mark.parametrize("left", [("validation", "test"), ("validation",), ("test",), ()], ids=str)
def test_a_run_whose_last_step_is_the_one_too_far_is_no_finished_run(data, tmp_path, left):
    """One step an epoch: the loss of training was computed before it."""
    data = replace(data, **{name: None for name in ("validation", "test") if name not in left})
    recipe = replace(RECIPE, epochs=1, batch_size=64, learning_rate=1e30)
    with pytest.raises(RuntimeError, match=r"the loss of epoch 1.* is (nan|inf); lower the learning rate"):
        train(classifier(), data, recipe, out=tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["result"] is None
    assert not (tmp_path / "model.safetensors").exists()


def test_a_network_that_gives_no_numbers_is_not_judged(data):
    model = classifier()
    with torch.no_grad():
        model.blocks[-1].head.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"the loss of the images of .* is nan"):
        evaluate(model, data.test, data)
    images = torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match="by mhex must be finite, got NaN or infinity"):
        model.explain(images)
    with pytest.raises(ValueError, match="probabilities by random must be finite"):
        explain_by(model, images, "random")
    with pytest.raises(ValueError, match="saliency by mine must be finite"):
        explain_by(classifier(), images, lambda *_: torch.full((2, 32, 32), torch.inf), name="mine")


def test_a_network_with_another_output_is_refused(data, tmp_path):
    class Pair(Residual):
        def forward(self, images):
            return super().forward(images), None

    with pytest.raises(TypeError, match=r"\(B, K\) logits or a ClassifierOutput, got tuple"):
        train(Pair(), data, RECIPE, out=tmp_path)


# -------------------------------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("launcher", ["environment", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_processes_train_together_and_judge_each_image_once(vision_python, free_port, tmp_path, launcher):
    command = (SCRIPT, "distributed", tmp_path)
    if launcher == "torchrun":
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
        processes = [vision_python.start(*launch, *command, environment=ENVIRONMENT)]
    else:
        together = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port)}
        processes = [
            vision_python.start(*command, environment=ENVIRONMENT | together | {"RANK": rank, "LOCAL_RANK": rank})
            for rank in "01"
        ]
    for process in processes:
        done = process.wait(timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]
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

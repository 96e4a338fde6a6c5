"""Classes with far fewer images than others: what they weigh, and how often they are drawn."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mhex_vision import cli
from mhex_vision.data import DataBundle, Preprocessing
from mhex_vision.data.sets import ArrayImages
from mhex_vision.evaluation import IndexBatches
from mhex_vision.imbalance import chances, class_weights
from mhex_vision.recipes import Recipe, read_class_weights
from mhex_vision.training import _Run, train

from .runs import RECIPE, assert_same_weights, classifier, losses, plain_network, weights

BALANCED = replace(RECIPE, epochs=2, batch_size=8, class_weights="balanced")
NAMES = ("a", "b", "c", "d")


def bundle(labels):
    images = torch.randint(256, (len(labels), 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return DataBundle(
        name="rare",
        train=ArrayImages(images, labels),
        validation=None,
        test=None,
        class_names=NAMES,
        multi_label=labels.ndim == 2,
        preprocessing=Preprocessing(size=32),
    )


@pytest.fixture(scope="module")
def single():
    return bundle(torch.tensor([0] * 24 + [1] * 6 + [2] * 2))  # none of the fourth


@pytest.fixture(scope="module")
def several():
    labels = torch.zeros(20, 4)
    labels[:2, 0] = 1
    labels[1:11, 1] = 1
    labels[:, 2] = 1  # all images have the third, none has the fourth
    return bundle(labels)


def test_balanced_weights_are_those_of_the_counts(single, several):
    assert class_weights(single, BALANCED) == pytest.approx({"a": 32 / 72, "b": 32 / 18, "c": 32 / 6, "d": 1})
    assert class_weights(several, BALANCED) == pytest.approx({"a": 9, "b": 1, "c": 1, "d": 1})
    assert class_weights(single, RECIPE) is None
    given = {"d": 4, "c": 3.0, "b": 2, "a": 1}
    assert list(class_weights(single, replace(RECIPE, class_weights=given)).items()) == [
        ("a", 1.0),
        ("b", 2.0),
        ("c", 3.0),
        ("d", 4.0),
    ]


@pytest.mark.parametrize("make", [classifier, plain_network], ids=["heads", "plain"])
def test_the_loss_is_weighed(single, tmp_path, make):
    run = _Run(make(), single, BALANCED, tmp_path, seed=0, workers=0, overwrite=False)
    logits, labels = (
        torch.randn(8, 4, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 1, 2, 2, 0, 0, 1, 1]),
    )
    each = F.cross_entropy(logits, labels, reduction="none")
    weight = torch.tensor(list(class_weights(single, BALANCED).values()))[labels]
    assert float(run.loss((logits,), labels)) == pytest.approx(float((weight * each).sum() / weight.sum()), rel=1e-6)
    assert json.loads((tmp_path / "run.json").read_text())["class_weights"] == class_weights(single, BALANCED)


def test_positive_answers_are_weighed_where_classes_are_independent(several, tmp_path):
    run = _Run(classifier(multi_label=True), several, BALANCED, tmp_path, seed=0, workers=0, overwrite=False)
    logits, labels = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), several.train.labels
    factor = 1 + labels * (torch.tensor([9.0, 1, 1, 1]) - 1)
    expected = (factor * F.binary_cross_entropy_with_logits(logits, labels, reduction="none")).mean()
    assert float(run.loss((logits,), labels)) == pytest.approx(float(expected), rel=1e-6)


def test_every_class_is_drawn_as_often_as_any_other(single, several):
    labels = single.train.labels
    drawn = chances(labels, 4)
    assert [drawn[labels.numpy() == k].sum() for k in range(3)] == pytest.approx([1 / 3] * 3)
    rare = chances(several.train.labels[:, :2], 2)  # two of the rare class, nine of the other alone, nine of none
    assert rare / rare[0] == pytest.approx([1, 1] + [0.2] * 9 + [2 / 9] * 9)
    epochs = []
    for epoch in (0, 1):
        parts = [IndexBatches(32, 8, seed=0, rank=rank, world=2, chances=drawn) for rank in (0, 1)]
        for part in parts:
            part.epoch = epoch
        epochs.append([index for part in parts for batch in part for index in batch])
        assert epochs[-1] == [index for part in parts for batch in part for index in batch]
    assert len(epochs[0]) == 32
    assert epochs[0] != epochs[1]
    many = IndexBatches(32000, 8, seed=0, chances=np.repeat(drawn, 1000) / 1000)
    counts = np.bincount(labels.numpy()[np.concatenate(list(many)) // 1000])
    assert counts == pytest.approx([32000 / 3] * 3, rel=0.05)


@pytest.mark.parametrize(
    "change", [{"sampler": "balanced"}, {"class_weights": {"a": 1, "b": 2, "c": 3, "d": 4}}], ids=str
)
def test_a_stopped_run_goes_on_and_another_one_is_refused(single, tmp_path, change):
    recipe = replace(RECIPE, epochs=2, batch_size=8, **change)
    whole, model = classifier(), classifier()
    expected = train(whole, single, recipe, out=tmp_path / "whole")

    def stop(epoch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(classifier(), single, recipe, out=tmp_path / "run", on_epoch=stop)
    with pytest.raises(ValueError, match=r"holds another run \(it differs in recipe\)"):
        train(classifier(), single, replace(RECIPE, epochs=2, batch_size=8), out=tmp_path / "run")
    assert losses(train(model, single, recipe, out=tmp_path / "run")) == losses(expected)
    assert_same_weights(weights(model), weights(whole))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("w.json", '{"a": 1, "b, c": 2.5}'),
        ("w.csv", 'a,1\n"b, c",2.5\n'),
        ("w.csv", '\ufeffname,weight\r\na,1\r\n\r\n"b, c",2.5'),
    ],
)
def test_weights_are_read_from_files(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_class_weights(tmp_path / name) == {"a": 1.0, "b, c": 2.5}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("w.json", '{"a": 1, "a": 2}'),
        ("w.json", "[1, 2]"),
        ("w.json", '{"a": NaN}'),
        ("w.json", '{"a": "1"}'),
        ("w.json", "[" * 100_000),
        ("w.csv", "a,1\na,2"),
        ("w.csv", "a,1\nb,x"),
        ("w.csv", "a;1\nb;2"),
        ("w.csv", "a,-1"),
        ("w.csv", "a,1,2"),
        ("w.csv", b"\xff\xfe\x00"),
    ],
)
def test_a_file_of_something_else_is_refused_with_its_name(tmp_path, name, text):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"class_weights must be an object of numbers.*{name}"):
        read_class_weights(tmp_path / name)


@pytest.mark.parametrize(
    "value", ["Balanced", 3, [1.0], {1: 2}, {"a": "1"}, {"a": True}, {"a": 0}, {"a": float("inf")}]
)
def test_a_recipe_takes_no_other_weights(value):
    with pytest.raises((TypeError, ValueError), match="class_weights must"):
        Recipe(class_weights=value)


def test_names_must_be_those_of_the_data(single):
    with pytest.raises(
        ValueError, match=r"every class of rare, got others: 'e' is none, 'a' is missing, 'd' is missing"
    ):
        class_weights(single, replace(RECIPE, class_weights={"b": 1, "c": 1, "e": 1}))


def test_the_command_line_takes_and_says_them(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("mhex_vision.commands.train_model", lambda *given, **_: seen.append(given[2]) or 1 / 0)
    command = ["train", "--data", "synthetic-lesions", "--size", "32", "--out", str(tmp_path / "out")]
    with pytest.raises(ZeroDivisionError):
        cli.main([*command, "--class-weights", "balanced", "--sampler", "balanced", "--monitor", "auc"])
    assert (seen[0].class_weights, seen[0].sampler, seen[0].monitor) == ("balanced", "balanced", "auc")
    said = capsys.readouterr().out
    assert "weights of classes in the loss: " in said
    assert "every class is drawn as often as any other" in said
    assert cli.main([*command, "--class-weights", str(tmp_path / "none.json")]) == 1
    assert "--class-weights must be 'balanced' or a JSON or CSV file, and there is no file" in capsys.readouterr().err

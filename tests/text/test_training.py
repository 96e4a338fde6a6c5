"""`train`: it learns, goes on after a kill to the same bits, and leaves a folder that explains itself."""

import csv
import json
import random
import signal
import textwrap
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, BertModel

from mhex_core.files import partial_of
from mhex_text import RECIPES, MHEXForSequenceClassification, TextBundle, TextRecipe, train

from .encoders import make_tokenizer

WORDS = ["good", "bad", "film", "plot", "the", "a", "of", "what", "and", "long", "short", "it", "was", "by", "in", "on"]
RECIPE = TextRecipe(epochs=4, batch_size=16, learning_rate=5e-3, max_length=12, mixed_precision="no")


def make_texts(count, seed, *, pairs=False):
    """One word among others decides the class."""
    draw = random.Random(seed)
    rows = {"text": [], "label": []}
    for index in range(count):
        words = draw.choices(WORDS[2:], k=draw.randint(2, 8))
        words.insert(draw.randrange(len(words)), WORDS[index % 2])
        rows["text"].append(" ".join(words))
        rows["label"].append(index % 2)
    if pairs:
        rows |= {"pair": rows["text"], "text": ["a film"] * count}
    return datasets.Dataset.from_dict(rows)


def make_bundle(**changes):
    settings = {"name": "films", "class_names": ("good", "bad"), "train": make_texts(192, 0)}
    return TextBundle(**{**settings, "validation": make_texts(64, 1), "test": make_texts(64, 2), **changes})


def make_config(**settings):
    return BertConfig(
        **settings,
        vocab_size=4 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=24,
        initializer_range=0.1,
    )


def make_model(seed=0, **settings):
    torch.manual_seed(seed)
    config = make_config()
    return MHEXForSequenceClassification.from_encoder(BertModel(config), 2, **settings)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(WORDS)


@pytest.fixture(scope="module")
def bundle():
    return make_bundle()


@pytest.fixture(scope="module")
def finished(tokenizer, bundle, tmp_path_factory):
    """A run that nothing disturbed."""
    out, model, seen = tmp_path_factory.mktemp("run") / "out", make_model(), []
    result = train(model, tokenizer, bundle, RECIPE, out=out, on_epoch=seen.append)
    return out, model, result, seen


def weights(out):
    return load_file(out / "model.safetensors")


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def without_seconds(result):
    return replace(result, history=tuple(replace(epoch, seconds=0.0) for epoch in result.history))


def test_it_learns_and_explains(finished):
    out, model, result, seen = finished
    assert result.test.accuracy > 0.95
    assert result.test.head_accuracy[-1] == result.test.accuracy
    assert len(result.test.head_accuracy) == 2
    assert tuple(seen) == result.history
    assert result.best_epoch == min(result.history, key=lambda epoch: epoch.validation.loss).epoch
    assert result.history[0].learning_rate > result.history[-1].learning_rate > 0
    assert not model.training
    loaded = MHEXForSequenceClassification.from_pretrained(out)
    for item in (*loaded.explain(["the film was good", "what a bad plot"]), *model.explain("it was bad")):
        assert item.target_name in item.texts[0].split()
        best = max(item.words, key=lambda word: word.score)
        assert best.text == item.target_name
    assert_same_bits(weights(out), {name: tensor.cpu() for name, tensor in model.state_dict().items()})


def test_what_lies_in_the_folder(finished):
    out, _, result, _ = finished
    names = {path.name for path in out.iterdir()}
    assert names >= {"model.safetensors", "config.json", "log.csv", "run.json"}
    assert names >= {"tokenizer.json", "tokenizer_config.json"}
    assert ".checkpoints" not in names
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    with (out / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["validation_loss"]) for row in rows] == [epoch.validation.loss for epoch in result.history]
    assert [float(row["accuracy layer 1"]) for row in rows] == [
        epoch.validation.head_accuracy[1] for epoch in result.history
    ]
    record = json.loads((out / "run.json").read_text())
    assert record["settings"]["recipe"]["epochs"] == 4
    assert record["result"]["test"]["accuracy"] == result.test.accuracy
    assert record["versions"].keys() >= {"torch", "transformers", "mhex-text"}
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "good", "1": "bad"}
    assert "use_cache" not in config


def test_it_says_nothing_unasked(tokenizer, tmp_path, capfd):
    small = make_bundle(train=make_texts(16, 0), test=None)
    train(make_model(), tokenizer, small, replace(RECIPE, epochs=1, mixed_precision="bf16"), out=tmp_path / "out")
    assert capfd.readouterr() == ("", "")


def test_a_finished_run_is_not_trained_again(finished, tokenizer, bundle):
    out, _, result, _ = finished
    model = make_model(seed=5)
    again = train(model, tokenizer, bundle, RECIPE, out=out, on_epoch=lambda epoch: pytest.fail("an epoch"))
    assert again == result
    assert_same_bits(weights(out), model.state_dict())
    assert not model.training


def test_another_run_is_refused(finished, tokenizer, bundle, tmp_path):
    out, *_ = finished
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = make_bundle(train=make_texts(192, 3))
    for changes, message in (
        ({"recipe": replace(RECIPE, epochs=9)}, r"\(recipe.epochs is 4 there and 9 here\); choose another folder"),
        ({"seed": 1}, r"\(seed is 0 there and 1 here\)"),
        ({"bundle": other}, r"\(data.sha256 is '\w+' there and '\w+' here\)"),
        ({"model": make_model(gate=False)}, r"\(network.gate is True there and False here\)"),
    ):
        call = {"model": make_model(), "bundle": bundle, "recipe": RECIPE, "seed": 0, **changes}
        with pytest.raises(ValueError, match=message):
            train(call["model"], tokenizer, call["bundle"], call["recipe"], out=out, seed=call["seed"])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"out must be empty or a folder of this run, got .* with config.json"):
        train(make_model(), tokenizer, bundle, RECIPE, out=tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run.json is damaged or something else"):
        train(make_model(), tokenizer, bundle, RECIPE, out=tmp_path)


class StopError(Exception):
    pass


@pytest.mark.parametrize("epoch", [1, 4])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(finished, tokenizer, bundle, tmp_path, epoch):
    out, _, result, _ = finished

    def stop(line):
        if line.epoch == epoch:
            raise StopError

    with pytest.raises(StopError):
        train(make_model(), tokenizer, bundle, RECIPE, out=tmp_path, on_epoch=stop)
    # A checkpoint that a kill cut short has no history, and is not gone on from.
    short = tmp_path / ".checkpoints" / "checkpoint-999"
    short.mkdir()
    (short / "model.safetensors").write_bytes(b"half")
    seen = []
    torch.manual_seed(99)
    model = make_model(seed=7)
    again = train(model, tokenizer, bundle, RECIPE, out=tmp_path, on_epoch=seen.append)
    assert [line.epoch for line in seen] == list(range(epoch + 1, 5))
    assert without_seconds(again) == without_seconds(result)
    assert_same_bits(weights(tmp_path), weights(out))
    assert not (tmp_path / ".checkpoints").exists()


def test_a_run_that_was_killed_goes_on_to_the_same_bits(finished, tokenizer, bundle, tmp_path, python):
    out, _, result, _ = finished
    script = tmp_path / "killed.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import importlib, os, signal, sys
            sys.path.insert(0, {str(Path(__file__).parents[2])!r})
            from tests.text.test_training import *
            import mhex_text.training as training

            torch.set_num_threads({torch.get_num_threads()})
            steps = 0
            step = training._Trainer.training_step

            def counted(*arguments, **settings):
                global steps
                steps += 1
                if steps == 30:  # in the third epoch
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(*arguments, **settings)

            training._Trainer.training_step = counted
            train(make_model(), make_tokenizer(WORDS), make_bundle(), RECIPE, out={str(tmp_path / "out")!r})
            """
        )
    )
    done = python.run(script)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with (tmp_path / "out" / "log.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    again = train(make_model(), tokenizer, bundle, RECIPE, out=tmp_path / "out")
    assert without_seconds(again) == without_seconds(result)
    assert_same_bits(weights(tmp_path / "out"), weights(out))


def test_training_stops_early_and_keeps_the_best(tokenizer, tmp_path):
    # Labels of validation are the wrong way round: the better the network, the higher the loss.
    turned = make_texts(64, 1)
    turned = turned.remove_columns("label").add_column("label", [1 - label for label in turned["label"]])
    data = make_bundle(validation=turned, test=None)
    result = train(make_model(), tokenizer, data, replace(RECIPE, epochs=9, patience=1), out=tmp_path)
    assert (result.best_epoch, len(result.history), result.test) == (1, 2, None)
    again = train(make_model(), tokenizer, data, replace(RECIPE, epochs=9, patience=1), out=tmp_path)
    assert again == result


@pytest.mark.parametrize(
    "settings",
    [{"freeze_backbone": True, "gate": False}, {"gate": False}, {"objective": "joint", "layers": [1]}],
    ids=str,
)
def test_frozen_ungated_and_joint(tokenizer, bundle, tmp_path, settings):
    model = make_model(**settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = replace(RECIPE, epochs=2, schedule="cosine", warmup_ratio=0.25, gradient_checkpointing=True)
    result = train(model, tokenizer, bundle, recipe, out=tmp_path)
    after = model.state_dict()
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert changed == ({"blocks"} if "freeze_backbone" in settings else {"blocks", "encoder"})
    assert result.history[1].train_loss < result.history[0].train_loss
    assert not model.gradient_checkpointing
    assert_same_bits(model.state_dict(), MHEXForSequenceClassification.from_pretrained(tmp_path).state_dict())


def test_a_plain_classifier_is_trained_alike(tokenizer, bundle, tmp_path):
    torch.manual_seed(0)
    model = BertForSequenceClassification(make_config(num_labels=2))
    recipe = replace(RECIPE, epochs=3, gradient_checkpointing=True)
    lines = []
    result = train(model, tokenizer, bundle, recipe, out=tmp_path, on_epoch=lines.append)
    assert result.test.accuracy > 0.9
    assert result.test.head_accuracy == ()
    assert [line.epoch for line in lines] == [1, 2, 3]
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["network"]["plain"] == type(model).__name__
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.id2label == {0: "good", 1: "bad"}
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())
    with pytest.raises(ValueError, match=r"network\.plain is 'BertForSequenceClassification' there and None here"):
        train(make_model(), tokenizer, bundle, recipe, out=tmp_path)


def test_another_run_is_replaced_where_that_is_allowed(tokenizer, bundle, tmp_path):
    short = replace(RECIPE, epochs=1)
    train(make_model(), tokenizer, bundle, short, out=tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"seed is 1 there and 2 here.*; choose another folder, or allow to overwrite"):
        train(make_model(), tokenizer, bundle, short, out=tmp_path, seed=2)
    again = train(make_model(), tokenizer, bundle, short, out=tmp_path, seed=2, overwrite=True)
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["seed"] == 2
    assert len(again.history) == 1


def test_pairs_without_validation_cut_to_length(tokenizer, tmp_path):
    data = make_bundle(train=make_texts(64, 0, pairs=True), validation=None, test=make_texts(32, 1, pairs=True))
    recipe = replace(RECIPE, epochs=1, max_length=9, schedule="constant")
    result = train(make_model(), tokenizer, data, recipe, out=tmp_path)
    assert (result.best_epoch, result.history[0].validation, result.max_length) == (1, None, 9)
    assert result.history[0].learning_rate == RECIPE.learning_rate
    for name, texts in data.splits().items():
        cut = sum(len(text.split()) + 5 > 9 for text in texts["pair"]) / len(texts)
        assert result.truncated[name] == pytest.approx(cut)
        assert 0 < cut < 1
    assert (tmp_path / "log.csv").read_text().splitlines()[1].split(",")[3:5] == ["", ""]


def test_what_does_not_go_together(tokenizer, bundle, tmp_path):
    call = {"model": make_model(), "tokenizer": tokenizer, "bundle": bundle, "recipe": RECIPE, "out": tmp_path / "out"}
    unpadded = make_tokenizer(WORDS)
    unpadded.pad_token = None
    larger = make_tokenizer(["more", *WORDS])
    wholly = make_model(freeze_backbone=True)
    wholly.blocks.requires_grad_(requires_grad=False)
    three = make_bundle(class_names=("a", "b", "c"))
    for changes, error, message in (
        (
            {"model": torch.nn.Linear(2, 2)},
            TypeError,
            "model must be an MHEXForSequenceClassification or .*, got Linear",
        ),
        ({"tokenizer": None}, TypeError, "tokenizer must be a fast tokenizer, got NoneType"),
        ({"tokenizer": unpadded}, ValueError, "tokenizer must have a padding token"),
        ({"tokenizer": larger}, ValueError, "the encoder knows 20 tokens, got token 20"),
        ({"bundle": {}}, TypeError, "bundle must be a TextBundle, got dict"),
        ({"bundle": three}, ValueError, "model must have the bundle's 3 classes, got 2"),
        ({"model": make_model(multi_label=True)}, ValueError, "model must have one label per text"),
        ({"model": wholly}, ValueError, "model must have a parameter that is trained"),
        ({"recipe": "ag-news"}, TypeError, "recipe must be a TextRecipe, got str"),
        ({"out": 3}, TypeError, "out must be a path, got int"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\^32 - 1\], got -1"),
        ({"seed": True}, TypeError, "seed must be an int, got bool"),
        ({"progress": 1}, TypeError, "progress must be a bool, got int"),
    ):
        with pytest.raises(error, match=message):
            train(**{**call, **changes})
    assert not (tmp_path / "out").exists()
    with pytest.raises(RuntimeError, match=r"the loss of epoch 1 is nan; lower the learning rate"):
        train(**{**call, "recipe": replace(RECIPE, learning_rate=1e30)})


@pytest.mark.parametrize("left", [("validation", "test"), ("test",), ()], ids=str)
def test_a_run_whose_last_step_is_the_one_too_far_is_no_finished_run(tokenizer, tmp_path, left):
    """One step an epoch: the loss of training was computed before it."""
    texts = {name: make_texts(8, 1) if name in left else None for name in ("validation", "test")}
    bundle, out = make_bundle(train=make_texts(16, 0), **texts), tmp_path / "out"
    recipe = replace(RECIPE, epochs=1, learning_rate=1e30, schedule="constant", warmup_ratio=0.0)
    with pytest.raises(RuntimeError, match=r"the loss of the (validation|train) texts is nan; lower the learning rate"):
        train(make_model(), tokenizer, bundle, recipe, out=out)
    assert json.loads((out / "run.json").read_text())["result"] is None
    assert not (out / "model.safetensors").exists()


def test_what_a_killed_run_had_begun_to_write_goes_and_what_users_put_there_stays(tokenizer, tmp_path):
    own, theirs = partial_of(tmp_path / "run.json"), tmp_path / ".notes.important123"
    own.write_text("half")
    theirs.write_text("mine")
    small = make_bundle(train=make_texts(16, 0), validation=None, test=None)
    train(make_model(), tokenizer, small, replace(RECIPE, epochs=1), out=tmp_path)
    assert theirs.read_text() == "mine"
    assert not own.exists()


def test_recipes():
    paper = RECIPES["ag-news"]
    assert (paper.epochs, paper.batch_size, paper.learning_rate, paper.weight_decay) == (5, 32, 2e-5, 0.01)
    assert paper.max_length == 71
    for settings, error in (
        ({"epochs": 0}, ValueError),
        ({"batch_size": 2.0}, TypeError),
        ({"patience": 0}, ValueError),
        ({"learning_rate": -1}, ValueError),
        ({"warmup_ratio": 2}, ValueError),
        ({"schedule": "steps"}, ValueError),
        ({"mixed_precision": "fp16"}, ValueError),
        ({"gradient_checkpointing": 1}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(settings))):
            TextRecipe(**settings)

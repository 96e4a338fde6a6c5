"""Comparisons of texts: that they go on where they stopped, what they leave alone, and what they refuse."""

import copy
import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mhex_text.comparison import TextComparison, compare
from mhex_text.judge import TextJudge

from .models import CLASSES, TEXTS, WORDS, make_masking_tokenizer, make_model, make_plain, make_texts, wave


@pytest.fixture(scope="module")
def tokenizer():
    return make_masking_tokenizer()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def judge():
    return make_plain()


def columns_of(comparison):
    """All columns but the time that was taken."""
    return {name: comparison.samples[name].to_pylist() for name in comparison.samples.column_names if name != "seconds"}


def test_a_stopped_comparison_goes_on_where_it_stopped(model, judge, tokenizer, tmp_path):
    asked = {"tokenizer": tokenizer, "judge": judge, "metrics": ("avg_drop", "sufficiency"), "batch_size": 3}
    calls = {"steady": 0, "shaky": 0}

    def steady(network, batch, targets):
        calls["steady"] += 1
        return wave(network, batch, targets)

    def shaky(network, batch, targets):
        calls["shaky"] += 1
        if calls["shaky"] == 4:  # a first call on one text to warm up, then batches
            raise KeyboardInterrupt
        return -wave(network, batch, targets)

    methods = {"steady": steady, "shaky": shaky}
    with pytest.raises(KeyboardInterrupt):
        compare(model, make_texts(), methods=methods, out=tmp_path / "stopped", **asked)
    pieces = sorted(path.name for path in (tmp_path / "stopped" / "pieces").rglob("*"))
    assert [name for name in pieces if name.endswith(".parquet")] == [
        *(["000000.parquet"] * 2),
        *(["000001.parquet"] * 2),
        "000002.parquet",
    ]
    assert not any(name.startswith(".") for name in pieces)
    before = dict(calls)
    resumed = compare(model, make_texts(), methods=methods, out=tmp_path / "stopped", **asked)
    assert calls["steady"] == before["steady"]  # all of its pieces were there
    assert calls["shaky"] == before["shaky"] + 2  # warming up, and the last batch
    whole = compare(model, make_texts(), methods=methods, out=tmp_path / "whole", **asked)
    assert columns_of(resumed) == columns_of(whole)
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == ["comparison.json", "samples.parquet"]
    before = dict(calls)
    again = compare(model, make_texts(), methods=methods, out=tmp_path / "whole", **asked)
    assert calls == before
    assert columns_of(again) == columns_of(whole)


def test_a_folder_of_another_comparison_is_not_touched(judge, tokenizer, tmp_path):
    model = make_model()
    asked = {"tokenizer": tokenizer, "judge": judge, "methods": {"wave": wave}, "out": tmp_path}
    first = compare(model, make_texts(), metrics=["avg_drop"], **asked)
    for change, differing in (
        ({"metrics": ["sufficiency"]}, "metrics"),
        ({"limit": 3}, "compared, data"),
        ({"batch_size": 3}, "batch_size"),
        ({"max_length": 9}, "max_length"),
    ):
        with pytest.raises(ValueError, match=rf"another comparison \(it differs in {differing}\)"):
            compare(model, make_texts(), **{"metrics": ["avg_drop"]} | asked | change)
    with pytest.raises(ValueError, match=r"\(it differs in data\)"):
        compare(model, make_texts(label=[0] * len(TEXTS)), metrics=["avg_drop"], **asked)
    weight = model.blocks[0].head.weight
    with torch.no_grad():
        weight += 1
    with pytest.raises(ValueError, match=r"\(it differs in model\)"):
        compare(model, make_texts(), metrics=["avg_drop"], **asked)
    with torch.no_grad():
        weight -= 1
    model.config.objective = "joint"
    with pytest.raises(ValueError, match=r"\(it differs in model\)"):
        compare(model, make_texts(), metrics=["avg_drop"], **asked)
    assert columns_of(TextComparison.load(tmp_path / "samples.parquet")) == columns_of(first)
    other = compare(model, make_texts(), metrics=["sufficiency"], overwrite=True, note={"from": "here"}, **asked)
    assert other.metrics == ("sufficiency",)
    assert compare(model, make_texts(), metrics=["sufficiency"], note={"from": "there"}, **asked).metrics
    (tmp_path / "comparison.json").write_text("[")
    with pytest.raises(ValueError, match=r"comparison\.json is damaged"):
        compare(model, make_texts(), metrics=["sufficiency"], **asked)


def test_a_model_from_disk_is_the_same_model(judge, tokenizer, tmp_path):
    asked = {"tokenizer": tokenizer, "methods": {"wave": wave}, "metrics": ["avg_drop"], "out": tmp_path / "out"}
    model = make_model()
    first = compare(model, make_texts(), judge=judge, **asked)
    model.save_pretrained(tmp_path / "model")
    judge.save_pretrained(tmp_path / "judge")
    loaded = type(model).from_pretrained(tmp_path / "model")
    again = compare(loaded, make_texts(), judge=type(judge).from_pretrained(tmp_path / "judge"), **asked)
    assert columns_of(again) == columns_of(first)


def test_known_methods_do_not_depend_on_the_batch(model, judge, tokenizer, tmp_path):
    runs = [
        compare(
            model,
            make_texts(),
            tokenizer=tokenizer,
            judge=judge,
            methods=["mhex", "random"],
            out=tmp_path / str(size),
            batch_size=size,
        )
        for size in (1, 4)
    ]
    for method in runs[0].methods:
        for metric in runs[0].metrics:
            ours, theirs = (run.values(method, metric) for run in runs)
            np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
        assert (runs[0].values(method, "seconds") > 0).all()


def test_a_limit_takes_the_first_texts_unless_told_otherwise(model, judge, tokenizer, tmp_path):
    asked = {"tokenizer": tokenizer, "judge": judge, "methods": {"wave": wave}, "metrics": ["avg_drop"]}
    first = compare(model, make_texts(), out=tmp_path / "first", limit=3, **asked)
    assert first.places == (0, 1, 2)
    drawn = compare(model, make_texts(), out=tmp_path / "random", limit=3, choose="random", seed=1, **asked)
    assert len(drawn.places) == 3
    assert drawn.places != (0, 1, 2)
    assert drawn.places == tuple(sorted(np.random.default_rng(1).permutation(len(TEXTS))[:3].tolist()))
    whole = compare(model, make_texts(), out=tmp_path / "whole", limit=99, **asked)
    assert whole.values("wave", "avg_drop")[:3] == pytest.approx(first.values("wave", "avg_drop"), abs=1e-5)


def test_long_texts_are_cut_to_what_both_models_take(model, tokenizer, tmp_path):
    judge = make_plain(max_position_embeddings=10)
    seen = []

    def watching(network, batch, targets):
        seen.append(batch.input_ids.shape[1])
        return wave(network, batch, targets)

    asked = {"tokenizer": tokenizer, "judge": judge, "methods": {"watching": watching}, "metrics": ["avg_drop"]}
    found = compare(model, make_texts(), out=tmp_path / "10", **asked)
    assert max(seen) == 10
    assert found.settings["max_length"] == 10
    assert found.values("watching", "truncated").tolist() == [0, 0, 1, 0, 0, 0, 0]
    compare(model, make_texts(), out=tmp_path / "6", max_length=6, overwrite=True, **asked)
    assert found.settings["max_length"] == 10
    assert seen[-1] <= 6


def test_pairs_are_compared(model, judge, tokenizer, tmp_path):
    second = [*TEXTS[1:], "dull"]
    texts = make_texts(pair=second)
    asked = {"tokenizer": tokenizer, "judge": judge, "methods": {"wave": wave}, "metrics": ["avg_drop", "token_f1"]}
    found = compare(model, texts, out=tmp_path, batch_size=2, **asked)
    inputs = tokenizer(TEXTS[4], second[4], return_tensors="pt")
    with torch.no_grad():
        belief = judge(**inputs).logits.softmax(dim=1)[0, 2].item()
    assert found.values("wave", "probability")[4] == pytest.approx(belief, abs=1e-6)
    assert np.isnan(found.values("wave", "token_f1")).tolist() == [False, False, False, True, False, True, False]


def test_a_method_of_ones_own_is_named_by_its_place(model, judge, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "my_texts.py").write_text(
        "def ids(model, batch, targets):\n    return batch.input_ids.double() * batch.mask\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        found = compare(
            model,
            make_texts(),
            tokenizer=tokenizer,
            judge=judge,
            methods=["my_texts:ids", "random"],
            metrics=["avg_drop"],
            out=tmp_path / "out",
        )
    finally:
        sys.modules.pop("my_texts", None)
    assert found.methods == ("my_texts:ids", "random")
    assert found.to_markdown().splitlines()[0] == "| method | AVG Drop ↑ | s / text |"
    assert len(found.to_text().splitlines()) == 3
    record = json.loads(found.to_json())
    assert record["methods"]["random"]["scores"]["avg_drop"]["texts"] == len(TEXTS)
    assert record["methods"]["random"]["seconds_per_text"] > 0
    assert set(record["methods"]["random"]["differences from my_texts:ids"]) == {"avg_drop"}


def test_what_is_saved_is_plain_parquet(model, judge, tokenizer, tmp_path):
    asked = {"tokenizer": tokenizer, "judge": judge, "methods": {"wave": wave}, "metrics": ["avg_drop"]}
    found = compare(model, make_texts(), out=tmp_path, **asked)
    assert pq.read_table(tmp_path / "samples.parquet").num_rows == len(TEXTS)
    assert TextComparison.load(tmp_path / "samples.parquet").settings == found.settings
    whole = (tmp_path / "samples.parquet").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"PAR1"):
        (tmp_path / "damaged.parquet").write_bytes(content)
        with pytest.raises(ValueError, match="damaged, or not the samples"):
            TextComparison.load(tmp_path / "damaged.parquet")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        TextComparison.load(tmp_path / "nowhere.parquet")
    with pytest.raises(KeyError, match="there is no 'sufficiency'"):
        found.values("wave", "sufficiency")


def test_models_are_left_as_they_were_also_when_a_method_raises(tokenizer, tmp_path):
    model, judge = make_model().train(), make_plain().train()
    judge.classifier.eval()
    judge.get_input_embeddings().requires_grad_(False)
    modes = [module.training for network in (model, judge) for module in network.modules()]

    def failing(network, batch, targets):
        raise RuntimeError("no more")

    for methods, error in (({"wave": wave}, None), ({"failing": failing}, RuntimeError)):
        asked = {"tokenizer": tokenizer, "judge": judge, "methods": methods, "out": tmp_path / next(iter(methods))}
        if error is None:
            compare(model, make_texts(), **asked)
        else:
            with pytest.raises(error, match="no more"):
                compare(model, make_texts(), **asked)
        assert [module.training for network in (model, judge) for module in network.modules()] == modes
    assert not judge.get_input_embeddings().weight.requires_grad
    assert all(weight.grad is None for network in (model, judge) for weight in network.parameters())


def test_without_a_mask_token_only_rationales_can_be_compared_with(model, judge, tmp_path):
    tokenizer = make_masking_tokenizer()
    tokenizer.mask_token = None
    asked = {"tokenizer": tokenizer, "judge": judge, "methods": {"wave": wave}, "out": tmp_path}
    with pytest.raises(ValueError, match=r"must have a mask token.*tokenizer\.mask_token = tokenizer\.unk_token"):
        compare(model, make_texts(), **asked)
    assert (
        np.isfinite(compare(model, make_texts(), metrics=["token_f1"], **asked).values("wave", "token_f1")).sum() == 5
    )


def returns(value):
    return {"x": lambda network, batch, targets: value(batch)}


SHORT = {"text": ["good"], "label": [0]}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"methods": "mhex"}, TypeError, "methods must be a sequence"),
        ({"methods": ["attcatt"]}, ValueError, "name must be one of"),
        ({"metrics": "avg_drop"}, TypeError, "metrics must be a sequence"),
        ({"metrics": []}, ValueError, "metrics must be at least one"),
        ({"metrics": ["avg_drop", "avg_drop"]}, ValueError, "each once"),
        ({"limit": 0}, ValueError, "limit must be at least 1"),
        ({"choose": "last"}, ValueError, "choose must be one of 'first', 'random', got 'last'"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"seed": "1"}, TypeError, "seed must be an int"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"methods": returns(lambda batch: 3)}, TypeError, "method 'x' must give a tensor, got int"),
        ({"methods": returns(lambda batch: batch.mask[:, :1])}, ValueError, "method 'x' must give scores of shape"),
        ({"methods": returns(lambda batch: batch.mask * torch.nan)}, ValueError, "method 'x' must give finite scores"),
        ({"judge": 3}, TypeError, "judge must be a TextJudge or a model, got int"),
        ({"texts": [1]}, TypeError, "texts must be a datasets.Dataset, got list"),
        ({"columns": {"label": None}}, ValueError, "texts must have the columns text and label, got text, rationale"),
        ({"columns": {"label": [3] * 7}}, ValueError, r"labels in \[0, 2\], got 3 in row 0"),
        ({"columns": {"label": ["a"] * 7}}, TypeError, "class numbers in the column label, got 'a' in row 0"),
        ({"columns": {"text": [None] * 7}}, TypeError, "strings in the column text, got NoneType in row 0"),
        ({"columns": {"rationale": [[[3, 3]]] * 7}}, ValueError, r"0 <= start < end <= 28.*got \[3, 3\] in row 0"),
        ({"columns": {"rationale": [[[0, 99]]] * 7}}, ValueError, r"got \[0, 99\] in row 0"),
        ({"columns": {"rationale": [["ab"]] * 7}}, TypeError, r"lists of \[start, end\]"),
        (
            {"columns": {"rationale": None}, "metrics": ["token_f1"]},
            ValueError,
            "need rationales, and these texts have",
        ),
    ],
)
def test_errors_name_the_argument(model, judge, tokenizer, tmp_path, change, error, message):
    columns = change.get("columns", {})
    texts = make_texts(**{name: values for name, values in columns.items() if values is not None})
    texts = texts.remove_columns([name for name, values in columns.items() if values is None])
    rest = {name: value for name, value in change.items() if name not in ("columns", "texts")}
    asked = {"tokenizer": tokenizer, "judge": judge, "methods": {"wave": wave}, "metrics": ["avg_drop"]} | rest
    with pytest.raises(error, match=message):
        compare(model, change.get("texts", texts), out=tmp_path, **asked)


def test_a_model_judges_itself_only_where_that_is_meant(model, tokenizer, tmp_path):
    asked = {"tokenizer": tokenizer, "methods": {"wave": wave}, "metrics": ["avg_drop"], "out": tmp_path / "out"}
    for same in (model, copy.deepcopy(model), TextJudge(copy.deepcopy(model), tokenizer)):
        with pytest.raises(ValueError, match=r"judge must be another network .* got the same weights.*self_judged"):
            compare(model, make_texts(), judge=same, **asked)
    assert not (tmp_path / "out").exists()
    assert compare(model, make_texts(), judge=model, self_judged=True, **asked).settings["self_judged"] is True


def test_a_judge_of_other_tokens_or_classes_is_refused(model, judge, tokenizer, tmp_path):
    asked = {"tokenizer": tokenizer, "methods": {"wave": wave}, "out": tmp_path}
    other = make_masking_tokenizer([*WORDS[:5], *WORDS[6:], WORDS[5]])
    with pytest.raises(ValueError, match="judge must have the vocabulary of the model explained"):
        compare(model, make_texts(), judge=judge, judge_tokenizer=other, **asked)
    with pytest.raises(ValueError, match="judge must have the vocabulary"):
        compare(model, make_texts(), judge=TextJudge(judge, other), **asked)
    with pytest.raises(ValueError, match="judge_tokenizer must be None for a TextJudge"):
        compare(model, make_texts(), judge=TextJudge(judge, tokenizer), judge_tokenizer=tokenizer, **asked)
    reordered = make_plain(id2label={0: "Good", 1: "middling", 2: "bad"})
    with pytest.raises(ValueError, match=r"classes of the model \(bad, middling, good\) in their order, got good, mid"):
        compare(model, make_texts(), judge=reordered, **asked)
    with pytest.raises(ValueError, match=r"classes of the model .* got label_0, label_1"):
        compare(model, make_texts(), judge=make_plain(id2label={0: "LABEL_0", 1: "LABEL_1"}), **asked)
    assert tuple(model.config.id2label.values()) == CLASSES
    assert not (tmp_path / "comparison.json").exists()

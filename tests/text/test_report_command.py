"""`mhex-text report`: from a checkpoint and texts to a page."""

import csv
import json
import random
import re

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from mhex_text import MHEXForSequenceClassification, cli
from mhex_text.report_command import _targets, chosen_places

from .encoders import make_tokenizer
from .test_reporting import Page, check_scores

WORDS = ["[MASK]", "good", "bad", "film", "plot", "the", "a", "of", "what", "and", "it", "was", "by"]
CLASSES = ("anger", "joy", "calm", "fear")
SIZES = {
    "vocab_size": 4 + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "initializer_range": 0.2,
}


def save_tokenizer(folder):
    tokenizer = make_tokenizer(WORDS)
    tokenizer.mask_token, tokenizer.model_max_length = "[MASK]", 24
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a run"
    torch.manual_seed(0)
    model = MHEXForSequenceClassification.from_encoder(BertModel(BertConfig(**SIZES)), 4, labels=CLASSES)
    with torch.no_grad():
        for weight in model.blocks.parameters():
            weight.normal_(std=0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "plain"
    torch.manual_seed(1)
    BertForSequenceClassification(BertConfig(**SIZES, num_labels=4)).eval().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def spoken(number, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS[1:], k=draw.randint(2, 9))) for _ in range(number)]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A folder with a test file, one row of which is damaged; of all but one class."""
    folder = tmp_path_factory.mktemp("labelled") / "moods"
    folder.mkdir()
    for name, count in (("train", 12), ("test", 40)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            rows = [[text, CLASSES[number % 3]] for number, text in enumerate(spoken(count, seed=count))]
            csv.writer(file).writerows([["text", "label"], *rows, *([["damaged"]] if name == "test" else [])])
    return folder


def write(checkpoint, out, *more):
    return cli.main(["report", "--checkpoint", str(checkpoint), "--out", str(out), *map(str, more)])


def test_texts_become_a_page(checkpoint, tmp_path, capsys):
    out = tmp_path / "not there" / "a page.html"
    texts = ["a good film", "what a plot by the film"]
    assert write(checkpoint, out, "--text", texts[0], "--text", texts[1], "--beta", 0.25, "--layers", "0,2") == 0
    shown = capsys.readouterr()
    size = out.stat().st_size / 1e6
    assert shown.out.splitlines() == [
        f"wrote {out} ({size:.1f} MB): 2 of 2 texts, 3.0 classes each",
        f"next: open '{out}' in a browser",
    ]
    assert shown.err == ""
    assert list(out.parent.iterdir()) == [out]
    page = Page(out.read_text(encoding="utf-8"))
    (method,) = page.methods
    assert (method["name"], method["beta"], method["layer_weights"]) == ("mhex", 0.25, [1, 0, 1])
    assert [page.texts(number) for number in range(2)] == [[text] for text in texts]
    assert page.document["about"]["checkpoint"] == str(checkpoint)
    model = MHEXForSequenceClassification.from_pretrained(checkpoint)
    for number, sample in enumerate(page.samples):
        targets = [evidence["target"] for evidence in sample["evidence"]]
        assert targets == [index for index, _ in sample["probabilities"]][:3]
        for place, target in enumerate(targets):
            item = model.explain(texts[number], target, beta=0.25, layers=[0, 2])[0]
            check_scores(page, number, item, place)


def test_labelled_texts_by_several_methods(checkpoint, labelled, tmp_path, capsys):
    out = tmp_path / "report.html"
    options = [
        "--data",
        labelled,
        "--samples",
        15,
        "--seed",
        3,
        "--targets",
        2,
        "--methods",
        "mhex,gmar,cdam:mode=smooth",
    ]
    assert write(checkpoint, out, *options, "--title", "Moods", "--batch-size", 4) == 3
    shown = capsys.readouterr()
    assert "15 of 40 texts by 3 methods, 2.0 classes each" in shown.out
    (complaint,) = shown.err.splitlines()
    assert complaint.startswith("mhex-text: warning: ")
    assert "left out 1 of 41 rows" in complaint
    page = Page(out.read_text(encoding="utf-8"))
    assert page.document["title"] == "Moods"
    assert [method["name"] for method in page.methods] == ["mhex", "gmar", "cdam:mode=smooth"]
    assert page.document["class_names"] == list(CLASSES)
    with (labelled / "test.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:41]
    for place, sample in zip(chosen_places(40, 15, 3), page.samples, strict=True):
        assert sample["name"].startswith(f"test {place + 1}: ")
        assert sample["texts"][0]
        assert CLASSES[sample["label"]] == rows[place][1]
        wanted = [sample["prediction"]]
        if sample["label"] != sample["prediction"]:
            wanted.append(sample["label"])
        assert [each["target"] for each in sample["evidence"] if each["method"] == 0][: len(wanted)] == wanted
        assert [each["method"] for each in sample["evidence"]] == [0, 1, 2, 0, 1, 2]


def test_pairs_and_a_file_some_lines_of_which_cannot_be_read(plain, tmp_path, capsys):
    path = tmp_path / "new.jsonl"
    rows = [{"a": "a good film", "b": "what"}, {"a": "bad", "b": None}, {"a": "the \ud800", "b": "x"}]
    path.write_text("\n".join([*map(json.dumps, rows), json.dumps({"a": "it was " * 30, "b": "plot"})]))
    out = tmp_path / "report.html"
    options = ["--input", path, "--text-column", "a", "--pair-column", "b", "--methods", "occlusion", "--targets", 1]
    assert write(plain, out, *options) == 3
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert lines[0] == f"mhex-text: skipped: {path}: line 2: no pair"
    assert lines[1] == f"mhex-text: skipped: {path}: line 3: half of a surrogate pair"
    assert lines[2] == "mhex-text: 1 of 2 texts were longer than the model takes; the rest was not read"
    page = Page(out.read_text(encoding="utf-8"))
    assert [sample["name"].split(":")[0] for sample in page.samples] == ["line 1", "line 4"]
    assert page.texts(0) == ["a good film", "what"]
    assert page.samples[1]["note"]


def test_a_page_that_must_be_small_says_what_it_left_out(checkpoint, tmp_path, capsys):
    path = tmp_path / "new.txt"
    path.write_text("\n".join(spoken(30)))
    assert write(checkpoint, tmp_path / "a.html", "--input", path, "--targets", 4) == 0
    capsys.readouterr()
    limit = (tmp_path / "a.html").stat().st_size - 2000
    assert write(checkpoint, tmp_path / "b.html", "--input", path, "--targets", 4, "--max-mb", limit / 1e6) == 0
    assert re.search(r"\d+ more classes did not fit into 0\.\d+ MB; --max-mb takes more", capsys.readouterr().out)
    assert (tmp_path / "b.html").stat().st_size <= limit
    assert write(checkpoint, tmp_path / "c.html", "--input", path, "--max-mb", 0.001) == 1
    assert "--max-mb must leave room" in capsys.readouterr().err
    assert not (tmp_path / "c.html").exists()


def test_texts_are_chosen_by_chance_and_stay_in_order():
    assert chosen_places(5, 5, 0) == chosen_places(5, 9, 1) == [0, 1, 2, 3, 4]
    assert chosen_places(1000, 50, 0) == chosen_places(1000, 50, 0) == sorted(set(chosen_places(1000, 50, 0)))
    assert chosen_places(1000, 50, 0) != chosen_places(1000, 50, 1)


def test_the_true_class_comes_second(checkpoint):
    model = MHEXForSequenceClassification.from_pretrained(checkpoint)
    explanation = model.explain(spoken(3))
    ranked = [sorted(range(4), key=lambda index: -item.probabilities[index]) for item in explanation]
    assert _targets(explanation, [None] * 3, 1) == []
    assert list(zip(*_targets(explanation, [None] * 3, 9), strict=True)) == [tuple(row[1:]) for row in ranked]
    found = _targets(explanation, [ranked[0][0], ranked[1][3], ranked[2][2]], 3)
    assert [column[0] for column in found] == [ranked[0][1], ranked[0][2]]
    assert [column[1] for column in found] == [ranked[1][3], ranked[1][1]]
    assert [column[2] for column in found] == [ranked[2][2], ranked[2][1]]


ERRORS = [
    ("--out {tmp}/x.html", "give texts with --text, a file of them with --input, labelled ones with --data, or what"),
    ("{one} --data x --out {tmp}/x.html", "give texts with --text, a file"),
    ("{one} --out {tmp}", "--out must be a file, got the folder {tmp}"),
    ("{one} --out {file}/x.html", "{file}"),
    ("--input {file} --out {file}", "--out must be another file than the texts"),
    ("--input {file} --pair b --out {tmp}/x.html", "--pair goes with --text"),
    ("--data {data} --pair b --out {tmp}/x.html", "--pair goes with --text; of labelled texts"),
    ("{one} --split train --out {tmp}/x.html", "--split goes with --data"),
    ("{one} --no-download --out {tmp}/x.html", "--no-download goes with --data"),
    ("{one} --label-column a --out {tmp}/x.html", "--label-column goes with --data"),
    ("{one} --samples 0 --out {tmp}/x.html", "--samples must be at least 1, got 0"),
    ("{one} --targets 0 --out {tmp}/x.html", "--targets must be at least 1, got 0"),
    ("{one} --batch-size 0 --out {tmp}/x.html", "--batch-size must be at least 1, got 0"),
    ("{one} --max-length 0 --out {tmp}/x.html", "--max-length must be at least 1, got 0"),
    ("{one} --seed -1 --out {tmp}/x.html", "--seed must be at least 0, got -1"),
    ("{one} --max-mb 0 --out {tmp}/x.html", "--max-mb must be above 0, got 0"),
    ("{one} --max-mb nan --out {tmp}/x.html", "--max-mb must be above 0, got nan"),
    ("{one} --methods gmar --beta 0.5 --out {tmp}/x.html", "--beta must go with mhex among --methods, got gmar"),
    ("{one} --methods gmar,gmar --out {tmp}/x.html", "--methods must be at least one, each once"),
    ("{one} --methods soup --out {tmp}/x.html", "--methods must be one of mhex, random"),
    ("{one} --beta 2 --out {tmp}/x.html", "beta must be in [0, 1], got 2"),
    ("{one} --layers many --out {tmp}/x.html", "--layers must be all, or whole numbers"),
    ("--checkpoint {plain} {one} --out {tmp}/x.html", "--checkpoint must hold an MHEX classifier for --methods mhex"),
    ("--checkpoint {tmp}/none {one} --out {tmp}/x.html", "there is no folder {tmp}/none"),
    (
        "--data {others} --out {tmp}/x.html",
        "--data must have classes of the checkpoint (anger, joy, calm, fear), got 'x'",
    ),
    ("--data {alone} --out {tmp}/x.html", "--split: alone has no test texts"),
]


@pytest.mark.parametrize(("line", "expected"), ERRORS, ids=[line for line, _ in ERRORS])
def test_an_error_is_one_line_that_names_its_cause(checkpoint, plain, labelled, tmp_path, capsys, line, expected):
    file = tmp_path / "file.txt"
    file.write_text("a film\n")
    others, alone = tmp_path / "others.csv", tmp_path / "alone"
    others.write_text("text,label\n" + "a film,x\na plot,y\n" * 20)
    alone.mkdir()
    (alone / "train.csv").write_text("text,label\n" + "a film,joy\na plot,fear\n" * 20)
    places = {"tmp": tmp_path, "file": file, "data": labelled, "others": others, "plain": plain, "alone": alone}
    words = [part.format(**places) for part in line.replace("{one}", "--text film").split()]
    before = sorted(path.name for path in tmp_path.iterdir())
    assert cli.main(["report", "--checkpoint", str(checkpoint), *words]) == 1
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith("mhex-text: error: ")
    assert expected.format(**places) in complaint
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert file.read_text() == "a film\n"

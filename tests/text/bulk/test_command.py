"""`mhex-text batch` and `explain_many` from a file to files."""

import csv
import importlib
import json
import re
import sys
from dataclasses import replace

import pyarrow as pa
import pytest
from datasets import load_dataset
from pyarrow import parquet
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mhex_text import cli
from mhex_text.bulk import explain_many

from .conftest import spoken


def rows_of(out):
    """All rows, in the order of the files."""
    return pa.concat_tables([parquet.read_table(path) for path in sorted((out / "data").glob("*.parquet"))]).to_pylist()


def files_of(out):
    return {path.name: path.read_bytes() for path in sorted((out / "data").iterdir())}


@pytest.fixture
def archive(tmp_path):
    """A folder of tables, with damage."""
    folder = tmp_path / "archive"
    folder.mkdir()
    texts = spoken(150)
    for number in range(2):
        with (folder / f"{number}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in texts[75 * number : 75 * number + 75])])
    with (folder / "1.csv").open("ab") as file:
        file.write(b'"never closed\r\nna\xefve\r\n')
    (folder / "2.csv").write_bytes(b"")
    return folder, texts


def test_a_folder_is_explained(archive, checkpoint, tmp_path, capsys):
    folder, texts = archive
    out = tmp_path / "out"
    command = ["batch", "--checkpoint", str(checkpoint), "--input", str(folder), "--out", str(out), "--workers", "0"]
    command += ["--shard-size", "64", "--lanes", "2"]
    assert cli.main(command) == 3
    said = capsys.readouterr().out
    assert "explained 150 of 153 inputs" in said
    rows = rows_of(out)
    assert [row["text"] for row in rows] == texts
    assert [row["id"] for row in rows[:2]] == ["0.csv/2", "0.csv/3"]
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    wanted = model.explain(texts, tokenizer=AutoTokenizer.from_pretrained(checkpoint))
    for row, item in zip(rows, wanted, strict=True):
        assert row["prediction"] == item.prediction_name
        assert [token["score"] for token in row["tokens"]] == pytest.approx(
            [token.score for token in item.tokens], rel=1e-4, abs=1e-4
        )
    with (out / "rejected.csv").open(newline="") as file:
        rejected = {row["id"]: row["reason"] for row in csv.DictReader(file)}
    assert list(rejected) == ["1.csv/77", "1.csv/78", "2.csv"]
    assert rejected["1.csv/78"] == "not UTF-8"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["program"] == "mhex-text"
    assert manifest["about"]["class_names"] == ["no", "yes", "naïve"]
    found = load_dataset("parquet", data_dir=out / "data", split="train", cache_dir=tmp_path / "cache")
    assert found["text"][:] == texts
    before = files_of(out)
    assert cli.main(command) == 3
    assert "153 of 153 inputs are done already" in capsys.readouterr().out
    assert files_of(out) == before


def test_files_do_not_depend_on_how_they_were_made(archive, checkpoint, tmp_path):
    folder, _ = archive
    made = []
    for number, options in enumerate(
        ({"workers": 0, "lanes": 1, "batch_size": 16}, {"workers": 2, "lanes": 3, "batch_size": 40})
    ):
        summary = explain_many(checkpoint, folder, tmp_path / str(number), shard_size=100, **options)
        assert (summary.inputs, summary.rows, summary.rejected) == (153, 150, 3)
        made.append(files_of(tmp_path / str(number)))
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        (["--no-text", "--target", "naïve"], {"text": False}),
        (["--method", "cdam", "--max-length", "9"], {"text": True}),
        (["--layers", "0,2", "--beta", "0.5", "--attention"], {"text": True}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_reach_the_rows(options, columns, checkpoint, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(spoken(20)))
    command = ["batch", "--checkpoint", str(checkpoint), "--input", str(path), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--workers", "0", *options]) == 0
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 20
    assert ("text" in rows[0]) == columns["text"]
    if "--target" in options:
        assert {row["target"] for row in rows} == {"naïve"}
    assert all(len(row["tokens"]) <= 7 for row in rows) == ("--max-length" in options)


def test_pairs_and_names_come_from_columns(checkpoint, tmp_path):
    path = tmp_path / "a.jsonl"
    texts = spoken(12, most=6)
    records = [{"key": f"k{place}", "a": text, "b": text[::-1]} for place, text in enumerate(texts)]
    path.write_text("\n".join(map(json.dumps, records)))
    command = ["batch", "--checkpoint", str(checkpoint), "--input", str(path), "--out", str(tmp_path / "out")]
    command += ["--workers", "0", "--text-column", "a", "--pair-column", "b", "--id-column", "key"]
    assert cli.main(command) == 0
    rows = rows_of(tmp_path / "out")
    assert [(row["id"], row["text"], row["pair"]) for row in rows] == [tuple(record.values()) for record in records]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--workers", "-1"], "--workers must be at least 0, got -1"),
        (["--max-length", "0"], "--max-length must be at least 1, got 0"),
        (["--address", "auto", "--engine", "embedded"], "--address must come with --engine ray"),
        (["--layers", "some"], "--layers must be all, or whole numbers"),
        (["--text-column", "x"], "--text-column must be left out for text files"),
        (["--target", "maybe"], "--target must be one of the classes (no, yes, naïve)"),
        (["--method", "cdam", "--beta", "0"], "beta must go with the method 'mhex'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_said_in_one_line(options, said, checkpoint, tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_text("good\n")
    command = ["batch", "--checkpoint", str(checkpoint), "--input", str(path), "--out", str(tmp_path / "out")]
    assert cli.main([*command, *options]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_help_names_the_methods_and_every_option(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["batch", "--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    for option in ("--checkpoint", "--id-column", "--no-text", "--shard-size", "--lanes", "--address", "--overwrite"):
        assert option in text
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "mhex-text batch --checkpoint runs/news" in capsys.readouterr().out


def test_a_run_that_was_interrupted_says_so_by_its_status(checkpoint, tmp_path, monkeypatch):
    import mhex_core.bulk

    finished = mhex_core.bulk.run

    def interrupted(*arguments, **options):
        return replace(finished(*arguments, **options), interrupted=True)

    monkeypatch.setattr(mhex_core.bulk, "run", interrupted)
    path = tmp_path / "a.txt"
    path.write_text("good\n")
    command = ["batch", "--checkpoint", str(checkpoint), "--input", str(path), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--workers", "0"]) == 130


def test_a_missing_pyarrow_is_said(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("mhex_text.bulk")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ImportError, match=re.escape('explaining in bulk needs pyarrow: pip install "mhex-text[train]"')
    ):
        importlib.import_module("mhex_text.bulk")

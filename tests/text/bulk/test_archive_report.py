"""`report_archive` and `mhex-text report --archive`: what stands in the page is what the archive holds."""

import json
import shutil
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mhex_text import cli
from mhex_text.bulk import explain_many, report_archive

from ..test_reporting import Page, check_scores  # noqa: TID252
from .conftest import WORDS, save_tokenizer, spoken

NAMES = ["no", "yes", "naïve"]
# No word at all, characters without a token, spans that overlap, and what a browser would take for markup.
STRANGE = ["\u200b", "  good \u200b ", "\u200bgood", "\u00bd film", "</script><b>good</b> \u2028 &amp;"]
TEXTS = [*spoken(60), *STRANGE]


def rows_of(out):
    """All rows, in the order of the files."""
    return pa.concat_tables([parquet.read_table(path) for path in sorted((out / "data").glob("*.parquet"))]).to_pylist()


def batch(checkpoint, folder, texts, **options):
    """An archive of texts or pairs, in shards of 32; they are called t0, t1 and so on."""
    fields = [{"text": text} if isinstance(text, str) else {"text": text[0], "pair": text[1]} for text in texts]
    path = folder / "texts.parquet"
    folder.mkdir(exist_ok=True)
    parquet.write_table(pa.Table.from_pylist([{"key": f"t{place}"} | row for place, row in enumerate(fields)]), path)
    if fields and "pair" in fields[0]:
        options |= {"text": "text", "pair": "pair"}
    explain_many(checkpoint, path, folder / "out", id_column="key", shard_size=32, workers=0, lanes=1, **options)
    return folder / "out"


def changed(out, change):
    """Change what the manifest says."""
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    change(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def edited(out, number, change):
    """Change the rows of one file."""
    path = sorted((out / "data").iterdir())[number]
    table = parquet.read_table(path)
    rows = table.to_pylist()
    change(rows)
    parquet.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def explained(folder, texts, **options):
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    return model.explain(texts, tokenizer=tokenizer, **options)


def check(page, rows):
    """Samples that say what rows say."""
    assert [sample["name"] for sample in page.samples] == [row["id"] for row in rows]
    for number, (sample, row) in enumerate(zip(page.samples, rows, strict=True)):
        names = page.document["class_names"]
        assert page.texts(number) == [row["text"], *([row["pair"]] if "pair" in row else [])]
        assert names[sample["prediction"]] == row["prediction"]
        assert dict(map(tuple, sample["probabilities"])) == pytest.approx(
            dict(enumerate(row["probabilities"])), rel=1e-5
        )
        assert sample["probabilities"][0][1] == pytest.approx(row["probability"], rel=1e-5)
        (evidence,) = sample["evidence"]
        assert names[evidence["target"]] == row["target"]
        assert sample["tokens"] == [token["text"] for token in row["tokens"]]
        assert bool(sample["note"]) == bool(row["truncated"])
        scores = [token["score"] for token in row["tokens"]]
        leeway = 1e-4 * max(map(abs, scores), default=0.0)
        assert page.scores(number) == pytest.approx(scores, abs=leeway)


@pytest.fixture(scope="module")
def archive(checkpoint, tmp_path_factory):
    """An archive whose classifier is there no longer."""
    folder = tmp_path_factory.mktemp("archive")
    shutil.copytree(checkpoint, folder / "run")
    out = batch(folder / "run", folder, TEXTS)
    shutil.rmtree(folder / "run")
    (folder / "texts.parquet").unlink()
    return out


@pytest.fixture
def own(archive, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(archive, tmp_path / "own")


# ----------------------------------------------------------------------------------------------------- what is shown


def test_all_rows_stand_in_the_page(archive, checkpoint):
    made = report_archive(archive, title="A <title>")
    assert (made.samples, made.targets, made.left_out) == (len(TEXTS), len(TEXTS), 0)
    page, rows = Page(made.html), rows_of(archive)
    assert [row["text"] for row in rows] == TEXTS
    check(page, rows)
    assert any(sample["note"] for sample in page.samples)
    assert page.samples[TEXTS.index("\u200b")]["tokens"] == []
    # As if the classifier had just explained them: words, and what it did not see, are the same.
    for number, item in enumerate(explained(checkpoint, TEXTS)):
        check_scores(page, number, item)
        assert bool(page.samples[number]["note"]) == bool(item.truncated)
    (method,) = page.methods
    assert (method["name"], method["unit"], method["signed"], method["normalize"]) == ("mhex", "logits", True, False)
    assert (method["layer_names"], method["layer_weights"], method["beta"]) == (["mhex"], [1.0], 1.0)
    assert method["fixed"]
    assert page.document["title"] == "A <title>"
    assert page.document["class_names"] == NAMES
    about = page.document["about"]
    assert list(about) == ["mhex-text", "archive", "checkpoint", "explained by", "texts", "versions"]
    manifest = json.loads((archive / "manifest.json").read_text(encoding="utf-8"))
    assert (about["archive"], about["checkpoint"]) == (str(archive), manifest["about"]["checkpoint"])
    assert about["texts"] == f"all {len(TEXTS)} rows"
    assert f"torch {manifest['versions']['torch']}, " in about["versions"]
    assert report_archive(str(archive), title="A <title>").html == made.html


def test_some_rows_by_chance(archive):
    rows = {row["id"]: row for row in rows_of(archive)}
    seen = []
    for seed in (0, 0, 1):
        page = Page(report_archive(archive, samples=9, seed=seed).html)
        names = [sample["name"] for sample in page.samples]
        assert [name for name in rows if name in names] == names
        check(page, [rows[name] for name in names])
        assert page.document["about"]["texts"] == f"9 of {len(TEXTS)} rows by chance (seed {seed})"
        seen.append(names)
    assert seen[0] == seen[1] != seen[2]


def test_the_most_doubtful_rows(archive):
    rows = rows_of(archive)
    limit = sorted(row["probability"] for row in rows)[6]
    page = Page(report_archive(archive, samples=7, doubtful=True).html)
    check(page, [row for row in rows if row["probability"] <= limit])
    assert f"of {len(rows)} rows the 7 whose prediction is the least probable" in page.document["about"]["texts"]


def test_rows_predicted_to_be_of_a_class(archive):
    rows = rows_of(archive)
    name = max({row["prediction"] for row in rows}, key=[row["prediction"] for row in rows].count)
    some = [row for row in rows if row["prediction"] == name]
    assert 2 < len(some) < len(rows)
    page = Page(report_archive(archive, predicted=name).html)
    check(page, some)
    assert page.document["about"]["texts"] == f"all {len(some)} rows predicted to be {name}"
    page = Page(report_archive(archive, predicted=name, doubtful=True, samples=2).html)
    limit = sorted(row["probability"] for row in some)[1]
    check(page, [row for row in some if row["probability"] <= limit])


def test_pairs(checkpoint, tmp_path):
    pairs = list(zip([*spoken(20, most=25), *STRANGE], [*spoken(20, most=25, seed=1), *STRANGE[::-1]], strict=True))
    out = batch(checkpoint, tmp_path / "pairs", pairs)
    page, rows = Page(report_archive(out).html), rows_of(out)
    assert len(rows) == len(pairs)
    assert {token["part"] for row in rows for token in row["tokens"]} == {0, 1}
    check(page, rows)
    for number, item in enumerate(explained(checkpoint, pairs)):
        check_scores(page, number, item)


def test_classes_explained_that_are_not_those_predicted(checkpoint, tmp_path):
    out = batch(checkpoint, tmp_path / "target", spoken(12), target="naïve", beta=0.25, layers="all")
    page = Page(report_archive(out).html)
    check(page, rows_of(out))
    assert {sample["evidence"][0]["target"] for sample in page.samples} == {2}
    assert {sample["prediction"] for sample in page.samples} != {2}
    for number, item in enumerate(explained(checkpoint, spoken(12), target=2, beta=0.25, layers="all")):
        check_scores(page, number, item)


@pytest.mark.parametrize(
    ("method", "layer", "unit"),
    [
        ("mhex:layers=last,sharpness=soft", "mhex", "logits"),
        ("mhex:rectify=true", "mhex:rectify=true", ""),
        ("cdam:mode=smooth", "cdam:mode=smooth", ""),
        ("mywords:lengths", "mywords:lengths", ""),
    ],
)
def test_a_method_is_called_as_it_was_asked_for(method, layer, unit, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "mywords.py").write_text(
        "def lengths(model, batch, targets):\n"
        "    return (batch.offsets[..., 1] - batch.offsets[..., 0]).float() * batch.mask\n"
    )
    with monkeypatch.context() as path:
        path.syspath_prepend(str(tmp_path))
        out = batch(checkpoint, tmp_path / "out", spoken(6, most=6), method=method)
    # A function of one's own is asked for no more.
    sys.modules.pop("mywords", None)
    page = Page(report_archive(out).html)
    check(page, rows_of(out))
    (shown,) = page.methods
    assert (shown["name"], shown["layer_names"], shown["unit"]) == (method, [layer], unit)


def test_tokens_without_a_word_are_words_of_their_own(own):
    def change(rows):
        for place, token in enumerate(rows[0]["tokens"]):
            token["word"] = -2 - place

    edited(own, 0, change)
    page = Page(report_archive(own).html)
    check(page, rows_of(own))
    pieces = [tokens for _, tokens, _ in page.samples[0]["texts"][0] if tokens]
    assert pieces == [[place] for place in range(len(page.samples[0]["tokens"]))]


def test_classes_that_share_a_name(checkpoint, tmp_path):
    folder = tmp_path / "same"
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    model.config.id2label = {0: "other", 1: "other", 2: "other"}
    model.save_pretrained(folder)
    save_tokenizer(folder)
    page = Page(report_archive(batch(folder, tmp_path / "out", TEXTS)).html)
    assert {sample["prediction"] for sample in page.samples} > {0}
    assert all(sample["evidence"][0]["target"] == sample["prediction"] for sample in page.samples)


# ---------------------------------------------------------------------------------------------------- what is left out


@pytest.fixture(scope="module")
def broken(checkpoint, tmp_path_factory):
    """An archive of a classifier that knows no number for texts with the word "plot"."""
    folder = tmp_path_factory.mktemp("broken")
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    with torch.no_grad():
        model.get_input_embeddings().weight[4 + WORDS.index("plot")] = 3e38  # whose square is none
    model.save_pretrained(folder / "run")
    save_tokenizer(folder / "run")
    return batch(folder / "run", folder, spoken(40, most=8))


def test_rows_that_are_no_numbers_are_named(broken):
    rows = rows_of(broken)
    bad = [row["id"] for row in rows if "plot" in row["text"]]
    assert 3 < len(bad) < 37
    said = []
    page = Page(report_archive(broken, complain=said.append).html)
    assert said == [f"skipped {name}: its scores are not finite" for name in bad]
    check(page, [row for row in rows if row["id"] not in bad])
    assert page.document["about"]["texts"] == f"all 40 rows, {len(bad)} of which are left out"
    assert report_archive(broken).samples == 40 - len(bad)
    # What is no number is not doubtful.
    assert not {sample["name"] for sample in Page(report_archive(broken, samples=5, doubtful=True).html).samples} & {
        *bad
    }


def test_scores_and_probabilities_must_both_be_numbers(own):
    def change(rows):
        rows[3]["tokens"][-1]["score"] = float("-inf")
        rows[5]["probabilities"][1] = float("nan")

    edited(own, 1, change)
    said = []
    assert report_archive(own, complain=said.append).samples == len(TEXTS) - 2
    assert said == ["skipped t35: its scores are not finite", "skipped t37: its probabilities are not finite"]


def test_an_archive_of_which_nothing_is_left(own):
    def change(rows):
        for row in rows:
            row["probabilities"][0] = float("nan")

    for number in range(3):
        edited(own, number, change)
    with pytest.raises(
        ValueError, match=rf"archive must hold rows whose scores are finite, and of the 4 chosen in {own}"
    ):
        report_archive(own, samples=4)


def test_a_run_that_is_not_done_shows_what_there_is(own):
    rows = rows_of(own)
    (own / "data" / "part-000001.parquet").unlink()
    check(Page(report_archive(own).html), [*rows[:32], *rows[64:]])


# ------------------------------------------------------------------------------------------------------ what is refused


def test_an_archive_without_texts(checkpoint, tmp_path):
    out = batch(checkpoint, tmp_path / "bare", ["good"], keep_text=False)
    with pytest.raises(ValueError, match=rf"archive must hold its texts, and {out} was written without them; run"):
        report_archive(out)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"archive": 3}, TypeError, "archive must be a folder, got int"),
        ({"archive": "no such"}, FileNotFoundError, "there is no no such"),
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"samples": 2.0}, TypeError, "samples must be an int, got float"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"doubtful": 1}, TypeError, "doubtful must be a bool, got int"),
        ({"predicted": "maybe"}, ValueError, "predicted must be one of no, yes, naïve, got 'maybe'"),
        ({"predicted": 1}, TypeError, "predicted must be the name of a class or None, got int"),
        ({"title": 3}, TypeError, "title must be a str, got int"),
        ({"max_bytes": 1000}, ValueError, "max_bytes must leave room"),
        ({"max_bytes": 0}, ValueError, "max_bytes must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(archive, change, error, message):
    with pytest.raises(error, match=message):
        report_archive(**{"archive": archive, **change})


def test_folders_that_hold_something_else(own, tmp_path):
    with pytest.raises(ValueError, match=r"there is no manifest\.json in"):
        report_archive(tmp_path)
    changed(own, lambda manifest: manifest.update(program="mhex-vision"))
    with pytest.raises(ValueError, match=f"{own} was written by `mhex-vision batch`, which has a report of its own"):
        report_archive(own)


def test_rows_and_manifest_that_do_not_belong_together(own):
    changed(own, lambda manifest: manifest["about"].update(class_names=["a", "b", "c"]))
    with pytest.raises(ValueError, match=rf"{own} is damaged: t\d+ explains '.*', which is none of its classes \(a, b"):
        report_archive(own)


def test_a_damaged_file_is_named(own):
    (own / "data" / "part-000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"part-000001\.parquet is damaged: .*; the same batch command makes it anew"):
        report_archive(own)


# ----------------------------------------------------------------------------------------------------- the command line


def write(folder, out, *more):
    return cli.main(["report", "--archive", str(folder), "--out", str(out), *map(str, more)])


def test_an_archive_becomes_a_page(archive, tmp_path, capsys):
    out = tmp_path / "not there" / "a page.html"
    assert write(archive, out, "--samples", 8, "--seed", 2, "--title", "Moods") == 0
    shown = capsys.readouterr()
    size = out.stat().st_size / 1e6
    assert shown.out.splitlines() == [
        f"wrote {out} ({size:.1f} MB): 8 of {len(TEXTS)} rows",
        f"next: open '{out}' in a browser",
    ]
    assert shown.err == ""
    assert [path.name for path in out.parent.iterdir()] == ["a page.html"]
    assert out.read_text(encoding="utf-8") == report_archive(archive, samples=8, seed=2, title="Moods").html


def test_doubtful_rows_of_one_class(archive, tmp_path, capsys):
    out = tmp_path / "page.html"
    name = rows_of(archive)[0]["prediction"]
    count = sum(row["prediction"] == name for row in rows_of(archive))
    assert write(archive, out, "--doubtful", "--predicted", name, "--samples", 3) == 0
    assert f": 3 of {count} rows predicted to be {name}\n" in capsys.readouterr().out
    assert out.read_text(encoding="utf-8") == report_archive(archive, samples=3, doubtful=True, predicted=name).html


def test_rows_that_cannot_be_shown_have_a_status_of_their_own(broken, tmp_path, capsys):
    assert write(broken, tmp_path / "page.html") == 3
    shown = capsys.readouterr()
    bad = [row["id"] for row in rows_of(broken) if np.isnan(row["probability"])]
    assert shown.err.splitlines() == [f"mhex-text: skipped {name}: its scores are not finite" for name in bad]
    assert f"{40 - len(bad)} of 40 rows\n" in shown.out


def test_a_page_may_lie_beside_the_archive(own, capsys):
    before = (own / "manifest.json").read_bytes()
    for _ in range(2):
        assert write(own, own / "report.html", "--samples", 1) == 0
    assert write(own, own / "manifest.json") == 1
    assert "--out must be another file than those of the archive" in capsys.readouterr().err
    assert (own / "manifest.json").read_bytes() == before


ERRORS = [
    ("--archive {tmp}/none", "--archive must be a folder that `mhex-text batch` wrote; there is no {tmp}/none"),
    ("--archive {tmp}", "--archive must be a folder that `mhex-text batch` wrote, and there is no manifest.json in"),
    ("{it} --predicted maybe", "--predicted must be one of no, yes, naïve, got 'maybe'"),
    ("{it} --samples 0", "--samples must be at least 1, got 0"),
    ("{it} --seed -1", "--seed must be at least 0, got -1"),
    ("{it} --max-mb 0", "--max-mb must be above 0, got 0"),
    ("{it} --max-mb 0.001", "--max-mb must leave room"),
    ("{it} --text good", "give texts with --text, a file of them with --input, labelled ones with --data, or what"),
    ("{it} --input x.txt", "or what `batch` wrote with --archive"),
    ("{it} --data ag_news", "or what `batch` wrote with --archive"),
    ("{it} --checkpoint x", "--checkpoint must be left out with --archive"),
    ("{it} --methods mhex", "--methods goes with --checkpoint, and --archive is given"),
    ("{it} --targets 0", "--targets goes with --checkpoint, and --archive is given"),
    ("{it} --layers all", "--layers goes with --checkpoint"),
    ("{it} --beta 0", "--beta goes with --checkpoint"),
    ("{it} --attention", "--attention goes with --checkpoint"),
    ("{it} --max-length 9", "--max-length goes with --checkpoint"),
    ("{it} --batch-size 32", "--batch-size goes with --checkpoint"),
    ("{it} --pair good", "--pair goes with --checkpoint"),
    ("{it} --split test", "--split goes with --checkpoint"),
    ("{it} --root x", "--root goes with --checkpoint"),
    ("{it} --no-download", "--no-download goes with --checkpoint"),
    ("{it} --text-column x", "--text-column goes with --checkpoint"),
    ("{it} --pair-column x", "--pair-column goes with --checkpoint"),
    ("{it} --label-column x", "--label-column goes with --checkpoint"),
    ("{it} --rationale-column x", "--rationale-column goes with --checkpoint"),
    ("--checkpoint x --text good --doubtful", "--doubtful goes with --archive"),
    ("--checkpoint x --text good --predicted yes", "--predicted goes with --archive"),
]


@pytest.mark.parametrize(("line", "expected"), ERRORS, ids=[line for line, _ in ERRORS])
def test_an_error_is_one_line_that_names_its_cause(archive, tmp_path, capsys, line, expected):
    words = [part.format(tmp=tmp_path) for part in line.replace("{it}", f"--archive {archive}").split()]
    assert cli.main(["report", *words, "--out", str(tmp_path / "page.html")]) == 1
    (complaint,) = capsys.readouterr().err.splitlines()
    assert complaint.startswith("mhex-text: error: ")
    assert expected.format(tmp=tmp_path) in complaint
    assert list(tmp_path.iterdir()) == []


def test_without_an_archive_there_must_be_a_checkpoint(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["report", "--text", "good", "--out", "page.html"])
    assert left.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("usage: mhex-text report")
    assert "error: the following arguments are required: --checkpoint" in shown.splitlines()[-1]


def test_an_archive_without_texts_says_what_to_do(checkpoint, tmp_path, capsys):
    out = batch(checkpoint, tmp_path / "bare", ["good"], keep_text=False)
    assert write(out, tmp_path / "page.html") == 1
    assert "error: --archive must hold its texts" in (shown := capsys.readouterr().err)
    assert "without --no-text" in shown


def test_a_missing_pyarrow_is_said(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(("mhex_text.bulk", "mhex_core.bulk"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert write(tmp_path, tmp_path / "page.html") == 1
    assert 'explaining in bulk needs pyarrow: pip install "mhex-text[train]"' in capsys.readouterr().err

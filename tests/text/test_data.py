"""`load_texts`: files of each kind, columns, labels and rationales found or given, damaged rows left out, AG News."""

import importlib
import itertools
import json
import os
import sys
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from mhex_text import TextBundle, UnreadableTextWarning, load_texts
from mhex_text.data.unlabelled import read_texts

ROWS = [(f'text {index}, "quoted"\nand more é', ("dull", "bright", "odd")[index % 3]) for index in range(60)]


def write(path, rows, columns=("text", "label")):
    """A file of the kind its ending says."""
    if path.suffix == ".csv":
        cells = [columns, *rows]
        quoted = [",".join('"' + str(cell).replace('"', '""') + '"' for cell in row) for row in cells]
        path.write_text("\n".join(quoted) + "\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        parquet.write_table(pa.table(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))), path)
    else:
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    return path


def rows_of(bundle, split):
    texts = getattr(bundle, split)
    return list(zip(texts["text"], [bundle.class_names[label] for label in texts["label"]], strict=True))


@pytest.mark.parametrize("ending", ["csv", "jsonl", "json", "parquet"])
def test_a_file_is_split_class_by_class(tmp_path, ending):
    path = write(tmp_path / f"films.{ending}", ROWS)
    bundle = load_texts(path)
    assert (bundle.name, bundle.class_names, bundle.num_classes) == ("films", ("bright", "dull", "odd"), 3)
    parts = [rows_of(bundle, split) for split in ("train", "validation", "test")]
    assert sorted(itertools.chain(*parts)) == sorted(ROWS)
    for part, count in zip(parts, (16, 2, 2), strict=True):
        assert Counter(label for _, label in part) == dict.fromkeys(("dull", "bright", "odd"), count)
    again, other = load_texts(str(path)), load_texts(path, seed=1)
    assert rows_of(again, "test") == parts[2]
    assert rows_of(other, "test") != parts[2]
    whole = load_texts(path, validation=0)
    assert (len(whole.train), whole.validation, whole.test) == (60, None, None)


def test_a_folder_keeps_its_own_splits(tmp_path):
    write(tmp_path / "train.csv", ROWS[:30])
    write(tmp_path / "dev.jsonl", ROWS[30:40])
    write(tmp_path / "test.parquet", ROWS[40:])
    (tmp_path / "notes.txt").write_text("nothing")
    bundle = load_texts(tmp_path)
    assert [len(texts) for texts in bundle.splits().values()] == [30, 10, 20]
    assert rows_of(bundle, "validation") == ROWS[30:40]
    (tmp_path / "dev.jsonl").unlink()
    assert [len(texts) for texts in load_texts(tmp_path).splits().values()] == [27, 3, 20]
    write(tmp_path / "valid.csv", ROWS)
    write(tmp_path / "val.csv", ROWS)
    with pytest.raises(ValueError, match=r"one file of validation texts, got val.csv and valid.csv"):
        load_texts(tmp_path)


def test_columns_are_found_or_given(tmp_path):
    path = write(tmp_path / "a.csv", [("x", f"t{n}", n % 2) for n in range(20)], ("id", "Sentence", "CLASS"))
    assert load_texts(path, validation=0).train["text"][3] == "t3"
    assert load_texts(path, validation=0, text="id").train["text"][3] == "x"
    with pytest.raises(ValueError, match=r"text must be one of the columns id, Sentence, CLASS of a.csv, got 'words'"):
        load_texts(path, text="words")
    with pytest.raises(
        ValueError, match=r"label and rationale must be different columns, got text='CLASS', label='CLASS'"
    ):
        load_texts(path, text="CLASS")
    path = write(tmp_path / "b.csv", [("x", "y")], ("first", "second"))
    with pytest.raises(ValueError, match=r"text must be one of the columns first, second of b.csv, got None"):
        load_texts(path)


def test_pairs_of_texts(tmp_path):
    rows = [("one", f"other {n}", n % 2) for n in range(20)]
    found = load_texts(write(tmp_path / "found.jsonl", rows, ("premise", "hypothesis", "label")), validation=0)
    given = load_texts(write(tmp_path / "given.csv", rows, ("a", "b", "label")), text="a", pair="b", validation=0)
    for bundle in (found, given):
        assert bundle.pairs
        assert list(bundle.train["pair"])[:2] == ["other 0", "other 1"]
    folder = tmp_path / "mixed"
    folder.mkdir()
    write(folder / "train.csv", rows, ("sentence1", "sentence2", "label"))
    write(folder / "test.csv", [row[1:] for row in rows])
    with pytest.raises(ValueError, match="pairs of texts in all of its files or in none"):
        load_texts(folder)


@pytest.mark.parametrize(
    ("values", "given", "names", "first"),
    [
        (["b", "a"], None, ("a", "b"), [1, 0]),
        (["b", "a"], ("b", "a"), ("b", "a"), [0, 1]),
        ([1, 0], None, ("0", "1"), [1, 0]),
        ([1, 0], ("no", "yes"), ("no", "yes"), [1, 0]),
        ([10, 9], None, ("9", "10"), [1, 0]),
        ([True, False], ("no", "yes"), ("no", "yes"), [1, 0]),
        ([1.0, 0.0], None, ("0", "1"), [1, 0]),
        (["a", "b"], ("a", "b", "c"), ("a", "b", "c"), [0, 1]),
    ],
)
def test_labels_are_names_or_numbers(tmp_path, values, given, names, first):
    path = write(tmp_path / "a.jsonl", [(f"text {n}", values[n % 2]) for n in range(10)])
    bundle = load_texts(path, class_names=given, validation=0)
    assert bundle.class_names == names
    assert list(bundle.train["label"])[:2] == first


def test_labels_that_nobody_names(tmp_path):
    path = write(tmp_path / "a.csv", [("x", "a"), ("y", "b")])
    with pytest.raises(ValueError, match=r"labels of train must be among a, c, got 'b'"):
        load_texts(path, class_names=["a", "c"])
    write(tmp_path / "train.csv", [("x", "a"), ("y", "b")])
    write(tmp_path / "test.csv", [("x", "c")])
    with pytest.raises(ValueError, match=r"labels of test must be among a, b, those of train, got 'c'"):
        load_texts(tmp_path)
    with pytest.raises(ValueError, match=r"at least two classes in train, got 'a' alone"):
        load_texts(write(tmp_path / "one.csv", [("x", "a")]))


def test_damaged_rows_never_take_the_good_ones(tmp_path):
    path = tmp_path / "damaged.csv"
    lines = [
        b"\xef\xbb\xbftext,label",
        b"good 1,a",
        b"too,many,columns",
        b'"good 2\nover two lines",b',
        b"no label,",
        b" ,a",
        b"caf\xe9,a",
        b'"never closed,a',
        b"",
        b"good 3,a",
        b"alone",
        b'good 4 "inside" it,b',
    ]
    path.write_bytes(b"\n".join(lines))
    with pytest.warns(UnreadableTextWarning) as caught:
        bundle = load_texts(path, validation=0)
    assert list(bundle.train["text"]) == ["good 1", "good 2\nover two lines", "good 3", 'good 4 "inside" it']
    (warning,) = caught
    shown = "left out 6 of 10 rows (line 3: not a row of 2 columns; line 6: no label; line 7: no text; line 8: not UTF"
    assert shown in str(warning.message)
    assert str(warning.message).endswith("; line 9: not a row of 2 columns; ...)")
    assert warning.filename == __file__


def test_damaged_lines_of_json(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "x", "label": "a"}\n{"text": "y", "la\n\n[1]\n{"text": "caf\xe9", "label": "a"}\n'
        b'{"text": null, "label": "b"}\n{"text": "z", "label": "b", "more": 1}\n'
    )
    with pytest.warns(UnreadableTextWarning, match=r"left out 4 of 6 rows \(line 2: .*; line 4: .*; line 5: not UTF-8"):
        assert list(load_texts(path, validation=0).train["text"]) == ["x", "z"]


def test_a_header_may_come_after_blank_lines(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("\n\r\n\ntext,label\n\na film,x\na plot,y\n")
    bundle = load_texts(path, validation=0.0)
    assert rows_of(bundle, "train") == [("a film", "x"), ("a plot", "y")]
    found = read_texts(path)
    assert (found.texts, found.lines, found.rejected) == (("a film", "a plot"), (6, 7), ())


def test_unlabelled_pairs_must_be_whole(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"text": "a", "pair": "b"}, {"text": "c", "pair": None}, {"text": "d"}, {"text": "e", "pair": 3}]
    path.write_text("\n".join(map(json.dumps, [*rows, {"text": None, "pair": "f"}])))
    found = read_texts(path)
    assert found.texts == (("a", "b"),)
    assert found.rejected == ((2, "no pair"), (3, "no pair"), (4, "no pair"), (5, "no text"))
    table = tmp_path / "data.parquet"
    parquet.write_table(pa.table({"text": ["a", "c"], "pair": ["b", None]}), table)
    assert read_texts(table).rejected == ((2, "no pair"),)


def test_half_a_character_spoils_its_own_row_alone(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a \\ud83d"}\n{"text": "whole \\ud83d\\ude00"}\n')
    found = read_texts(path)
    assert (found.texts, found.rejected) == (("whole \U0001f600",), ((1, "half of a surrogate pair"),))


def test_a_missing_second_text_is_damage(tmp_path):
    rows = [("one", "other", "a"), ("two", None, "b"), ("three", "other", "b")]
    path = write(tmp_path / "a.jsonl", rows, ("premise", "hypothesis", "label"))
    with pytest.warns(UnreadableTextWarning, match=r"left out 1 of 3 rows \(line 2: no pair\)"):
        assert list(load_texts(path, validation=0).train["text"]) == ["one", "three"]


def test_brackets_without_end_spoil_their_own_line_alone(tmp_path):
    path = write(tmp_path / "a.jsonl", [("x", "a"), ("y", "b")])
    deep = "[" * 200_000
    path.write_text(f'{path.read_text()}{{"text": {deep}\n')
    with pytest.warns(UnreadableTextWarning, match=r"left out 1 of 3 rows \(line 3: not a row of 2 columns\)"):
        assert list(load_texts(path, validation=0).train["text"]) == ["x", "y"]


def test_a_file_without_a_usable_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n,\n")
    with pytest.raises(ValueError, match=r"at least one usable row, got none \(line 2: no text\)"):
        load_texts(path)
    for name, content in (("a.csv", ""), ("a.jsonl", "[]\n"), ("a.parquet", "no")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=name):
            load_texts(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source": 3}, TypeError, "source must be a name or a path, got int"),
        ({"source": "nowhere"}, FileNotFoundError, "source must be 'ag_news', 'synthetic-notes', a file or a folder"),
        ({"text": 3}, TypeError, "text must be the name of a column or None, got int"),
        ({"rationale": ["a"]}, TypeError, "rationale must be the name of a column or None, got list"),
        ({"validation": 0.6}, ValueError, r"validation must be in \[0, 0.4\], got 0.6"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 0.5}, TypeError, "seed must be an int, got float"),
        ({"download": 1}, TypeError, "download must be a bool, got int"),
        ({"class_names": "ab"}, TypeError, "class_names must be a sequence of names, got str"),
        ({"class_names": ["a", "a"]}, ValueError, "class_names must hold at least two different names"),
        ({"root": "here"}, ValueError, "root belongs to source='ag_news'"),
        ({"source": "ag_news", "text": "text"}, ValueError, "text must be None for 'ag_news'"),
        ({"source": "ag_news", "rationale": "why"}, ValueError, "rationale must be None for 'ag_news'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, options, error, message):
    path = write(tmp_path / "a.csv", ROWS)
    with pytest.raises(error, match=message):
        load_texts(**{"source": path, **options})
    with pytest.raises(ValueError, match=r"endings .csv, .tsv, .jsonl, .json, .parquet, .arrow, got a.txt"):
        load_texts(path.rename(tmp_path / "a.txt"))


def test_a_bundle_is_checked():
    good = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]})
    settings = {"name": "n", "train": good, "validation": None, "test": None, "class_names": ("a", "b")}
    TextBundle(**settings)
    for change, error in (
        ({"class_names": ("a",)}, ValueError),
        ({"class_names": ["a", "b"]}, TypeError),
        ({"train": None}, TypeError),
        ({"test": good.select([])}, ValueError),
        ({"test": good.rename_column("text", "words")}, ValueError),
        ({"test": good.add_column("pair", ["x", "y"])}, ValueError),
        ({"test": datasets.Dataset.from_dict({"text": ["x"], "label": [2]})}, ValueError),
        ({"test": datasets.Dataset.from_dict({"text": ["x"], "label": ["a"]})}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(change))):
            TextBundle(**{**settings, **change})


MARKED = [
    (f"{'é' * (n % 4)}\U0001f680 text {n}", [[0, 1 + n % 4], [n % 4 + 2, n % 4 + 6]] if n % 5 else [], "ab"[n % 2])
    for n in range(40)
]


def words_of(texts):
    """Text, what its spans cover, for each row of a split."""
    marked = zip(texts["text"], texts["rationale"], strict=True)
    return {text: [text[start:end] for start, end in spans] for text, spans in marked}


@pytest.mark.parametrize("name", ["rationale", "Rationales", "reasons"])
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_rationales_stay_with_their_texts(tmp_path, ending, name):
    path = write(tmp_path / f"a.{ending}", MARKED, ("text", name, "label"))
    bundle = load_texts(path, validation=0.2, **({"rationale": name} if name == "reasons" else {}))
    wanted = {text: [text[slice(*span)] for span in spans] for text, spans, _ in MARKED}
    found = {}
    for texts in bundle.splits().values():
        assert texts.features["rationale"] == datasets.List(datasets.List(datasets.Value("int64")))
        found |= words_of(texts)
    assert len(bundle.splits()) == 3
    assert found == wanted
    assert found["ééé\U0001f680 text 3"] == ["ééé\U0001f680", "text"]


def test_rationales_of_pairs_and_of_one_file_among_several(tmp_path):
    rows = [("a first text", "other", [[2, 7]], n % 2) for n in range(10)]
    write(tmp_path / "test.jsonl", rows, ("premise", "hypothesis", "rationale", "label"))
    write(tmp_path / "train.jsonl", [(row[0], row[1], row[3]) for row in rows], ("premise", "hypothesis", "label"))
    bundle = load_texts(tmp_path, validation=0)
    assert words_of(bundle.test) == {"a first text": ["first"]}
    assert bundle.train.column_names == ["text", "pair", "label"]
    with pytest.raises(ValueError, match=r"rationale must be one of the columns premise, .* got 'rationale'"):
        load_texts(tmp_path, rationale="rationale")


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_text_that_nobody_marked_has_an_empty_rationale(tmp_path, ending):
    blank = "" if ending == "csv" else None
    rows = [("x", blank, "a"), ("y", [], "b"), ("z", blank, "b")]
    path = write(tmp_path / f"a.{ending}", rows, ("text", "rationale", "label"))
    texts = load_texts(path, validation=0).train
    assert list(texts["rationale"]) == [[], [], []]
    assert texts.features["rationale"] == datasets.List(datasets.List(datasets.Value("int64")))


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ([[0, 5]], r"with 0 <= start < end <= 4, the length of the text, got \[0, 5\]"),
        ([[-1, 2]], r"got \[-1, 2\]"),
        ([[2, 2]], r"got \[2, 2\]"),
        ([[3, 1]], r"got \[3, 1\]"),
        ([[0, 2.0]], r"of whole numbers, got \[0, 2\.0\]"),
        ([[False, True]], r"of whole numbers, got \[False, True\]"),
        ([[0, 1, 2]], r"of whole numbers, got \[0, 1, 2\]"),
        ([0, 2], r"of whole numbers, got 0"),
        ("[[0, 2]", r"a list of spans \[start, end\], got '\[\[0, 2\]'"),
        ("[" * 100_000, r"a list of spans \[start, end\], got '\[\[\["),
        ({"start": 0}, r"a list of spans \[start, end\], got \{'start': 0\}"),
        (True, r"a list of spans \[start, end\], got True"),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_damaged_rationale_is_a_damaged_row(tmp_path, ending, spans, reason):
    rows = [("good", [[0, 4]], "a"), ("also", spans, "b"), ("fine", [[1, 2], [0, 4]], "b")]
    if ending == "csv":
        rows = [(text, given if isinstance(given, str) else json.dumps(given), label) for text, given, label in rows]
    path = write(tmp_path / f"a.{ending}", rows, ("text", "rationale", "label"))
    line = 3 if ending == "csv" else 2
    with pytest.warns(UnreadableTextWarning, match=rf"left out 1 of 3 rows \(line {line}: rationale must .*{reason}"):
        bundle = load_texts(path, validation=0)
    assert list(bundle.train["rationale"]) == [[[0, 4]], [[1, 2], [0, 4]]]


def test_reasons_in_words_are_left_aside_unless_asked_for(tmp_path):
    rows = [("x", "because", "a"), ("y", "[sic] it is so", "b")]
    path = write(tmp_path / "a.csv", rows, ("text", "rationale", "label"))
    assert load_texts(path, validation=0).train.column_names == ["text", "label"]
    assert list(load_texts(path, validation=0, text="rationale").train["text"]) == ["because", "[sic] it is so"]
    with pytest.raises(ValueError, match=r"got none .line 2: rationale must be a list of spans .* got 'because'"):
        load_texts(path, rationale="rationale")
    with pytest.raises(ValueError, match="must be different columns, got text='rationale'"):
        load_texts(path, text="rationale", rationale="rationale")


def test_a_bundle_checks_its_rationales():
    def bundle(rationale):
        texts = datasets.Dataset.from_dict({"text": ["four", "x"], "label": [0, 1], "rationale": rationale})
        plain = texts.remove_columns("rationale")
        return TextBundle(name="n", train=plain, validation=None, test=texts, class_names=("a", "b"))

    assert list(bundle([[[0, 4], [0, 2]], []]).test["rationale"]) == [[[0, 4], [0, 2]], []]
    for rationale, error, message in (
        ([[], [[0, 2]]], ValueError, r"test\['rationale'\]\[1\] must hold spans with 0 <= start < end <= 1"),
        ([[], None], TypeError, r"test\['rationale'\]\[1\] must be a list of spans \[start, end\], got None"),
        ([[[0.0, 1.0]], []], TypeError, r"of whole numbers, got \[0\.0, 1\.0\]"),
        (["[[0, 1]]", ""], TypeError, r"must be a list of spans"),
    ):
        with pytest.raises(error, match=message):
            bundle(rationale)


def test_without_the_extra_its_name_is_told(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("mhex_text.data")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'mhex-text\[train\]'"):
        importlib.import_module("mhex_text.data")


AG_NEWS = [(1 + n % 4, f"Title {n}", f"Description, with a \\ and {n}") for n in range(40)]


def test_ag_news_as_it_was_published(tmp_path):
    folder = tmp_path / "ag_news"
    folder.mkdir()
    write(folder / "train.csv", AG_NEWS[1:], AG_NEWS[0])
    write(folder / "test.csv", AG_NEWS[1:8], AG_NEWS[0])
    bundle = load_texts("ag_news", root=tmp_path, validation=0.2)
    assert bundle.class_names == ("World", "Sports", "Business", "Sci/Tech")
    assert [len(texts) for texts in bundle.splits().values()] == [32, 8, 8]
    assert rows_of(bundle, "test")[1] == ("Title 1 Description, with a \\ and 1", "Sports")
    # Rows gathered elsewhere: a header, one text, and what is no class.
    rows = [(1 + n % 4, f"text {n}", "here") for n in range(40)]
    write(folder / "train.csv", [*rows, (5, "text", "there")], ("label", "text", "source"))
    with pytest.warns(UnreadableTextWarning, match="line 42: class '5' is not one of 1 to 4"):
        assert len(load_texts("ag_news", root=tmp_path, validation=0).train) == 40
    (folder / "test.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"root must hold ag_news/test.csv"):
        load_texts("ag_news", root=tmp_path)


def test_ag_news_from_the_hub(monkeypatch):
    asked = []
    names = ["World", "Sports", "Business", "Sci/Tech"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})

    def load(name, *, download_config):
        asked.append((name, download_config.local_files_only))
        part = datasets.Dataset.from_dict(
            {"text": [f"text {n}" for n in range(40)], "label": [n % 4 for n in range(40)]}, features=features
        )
        return datasets.DatasetDict({"train": part, "test": part})

    monkeypatch.setattr(datasets, "load_dataset", load)
    bundle = load_texts("ag_news", download=False)
    assert asked == [("fancyzhx/ag_news", True)]
    assert [len(texts) for texts in bundle.splits().values()] == [36, 4, 40]
    assert bundle.class_names[3] == "Sci/Tech"

    def fail(name, *, download_config):
        raise ConnectionError("Couldn't reach the hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(FileNotFoundError, match=r"could not be had .*Couldn't reach the hub\); root names a folder"):
        load_texts("ag_news")


def test_the_real_ag_news():
    if "MHEX_DATA" not in os.environ:
        pytest.skip("MHEX_DATA does not name a folder with real data")
    root = Path(os.environ["MHEX_DATA"])
    if not (root / "ag_news" / "train.csv").is_file():
        pytest.skip("no ag_news under MHEX_DATA")
    bundle = load_texts("ag_news", root=root)
    assert len(bundle.test) == 7600
    part = bundle.test.select(range(200))
    assert {bundle.class_names[label] for label in part["label"]} == {"World", "Sports", "Business", "Sci/Tech"}
    assert part["text"][0].startswith("Fears for T N pension after talks Unions representing workers")
    assert bundle.class_names[part["label"][0]] == "Business"

"""`load_texts` and `read_texts` of tables and folders as people have them, whatever wrote them."""

import csv

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from mhex_text import UnreadableTextWarning, load_texts
from mhex_text.data import lines
from mhex_text.data.unlabelled import read_texts


def write(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_tables_of_any_delimiter_and_cells_of_any_length(tmp_path, delimiter, ending):
    """The library's own limit is 131,072 characters."""
    if ending == ".tsv" and delimiter != "\t":
        pytest.skip("tabs, by its name")
    long = [("word " * 30_000, "bad"), ("\n".join(f'section {i}, "item" {i}; | \t' for i in range(9000)), "good")]
    rows = [(f"a short note, number {i}; and more", ("bad", "good")[i % 2]) for i in range(40)] + long
    path = tmp_path / f"a{ending}"
    before = csv.field_size_limit()
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write("\n  \n")  # a header may come after blank lines
        csv.writer(file, delimiter=delimiter).writerows([("text", "label"), *rows])
    data = load_texts(path, validation=0)
    assert (data.train["text"], data.class_names) == ([text for text, _ in rows], ("bad", "good"))
    assert read_texts(path).texts == tuple(text for text, _ in rows)
    assert csv.field_size_limit() == before


def test_a_cell_beyond_all_measure_is_one_row_that_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MOST_BYTES", 1 << 14)
    path = write(tmp_path / "a.csv", [("x", "a"), ("line\n" * 20_000, "a"), ("y \0 z", "b")])
    with pytest.warns(UnreadableTextWarning, match=r"left out 1 of 3 rows \(line 3: it is longer than"):
        data = load_texts(path, validation=0)
    assert data.train["text"] == ["x", "y \0 z"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_said_to_be(tmp_path, encoding):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nx,a\n", encoding=encoding)
    for read in (load_texts, read_texts):
        with pytest.raises(ValueError, match=r"a.csv must be UTF-8, got UTF-16; save it as UTF-8, as with iconv"):
            read(path)


def with_names(rows=40, names=("zeta", "alpha"), **columns):
    """A data set of the datasets library, whose classes are numbered in an order that is not the alphabet's."""
    kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))}
    values = {"text": [f"note {row}" for row in range(rows)], "label": [row % len(names) for row in range(rows)]}
    kinds |= {name: datasets.Value("string") for name in columns}
    return datasets.Dataset.from_dict(values | columns, features=datasets.Features(kinds))


def test_names_of_classes_that_the_datasets_library_notes(tmp_path):
    path = tmp_path / "a.parquet"
    with_names().to_parquet(path)
    data = load_texts(path, validation=0)
    assert data.class_names == ("zeta", "alpha")
    assert data.train["label"] == [row % 2 for row in range(40)]
    assert load_texts(path, class_names=("no", "yes")).class_names == ("no", "yes")
    # Of another column they are no names of these labels; and -1 is no label.
    with_names().rename_column("label", "kind").add_column("label", ["x", "y"] * 20).to_parquet(path)
    assert load_texts(path).class_names == ("x", "y")
    hidden = with_names().map(lambda row, place: {"label": -1 if place < 3 else row["label"]}, with_indices=True)
    hidden.to_parquet(path)
    with pytest.warns(UnreadableTextWarning, match=r"left out 3 of 40 rows \(line 1: no label"):
        assert load_texts(path).class_names == ("zeta", "alpha")


@pytest.mark.parametrize("notes", [b"{", b"[]", b'{"info": null}', b'{"info": {"features": {"label": {"names": 3}}}}'])
def test_notes_of_somebody_else_are_no_names(tmp_path, notes):
    table = pa.table({"text": ["a", "b", "c"], "label": [0, 1, 0]}).replace_schema_metadata({b"huggingface": notes})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert load_texts(tmp_path / "a.parquet", validation=0).class_names == ("0", "1")


@pytest.mark.parametrize("place", ["", "data", "plain_text"])
def test_the_layout_of_the_hub(tmp_path, place):
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    rows = with_names()
    for part in range(2):
        rows.shard(2, part, contiguous=True).to_parquet(folder / f"train-0000{part}-of-00002.parquet")
    rows.select(range(6)).to_parquet(folder / "validation-00000-of-00001-0123456789abcdef.parquet")
    (folder / "README.md").write_text("about")
    data = load_texts(tmp_path)
    assert (len(data.train), len(data.validation), data.test) == (40, 6, None)
    assert data.train["text"] == rows["text"]
    assert data.class_names == ("zeta", "alpha")
    (folder / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="source must hold all parts of train, got 1 of 2"):
        load_texts(tmp_path)


def test_several_configurations_are_not_chosen_from(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with_names().to_parquet(tmp_path / name / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="got several folders that have one: name one of them"):
        load_texts(tmp_path)
    assert len(load_texts(tmp_path / "two", validation=0).train) == 40


def test_what_the_datasets_library_saved_to_disk(tmp_path):
    rows = with_names()
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one" / "cache-0123.arrow").write_bytes(b"what map leaves there")
    data = load_texts(tmp_path / "one", validation=0.1)
    assert len(data.train) + len(data.validation) + len(data.test) == 40
    assert data.class_names == ("zeta", "alpha")
    datasets.DatasetDict(train=rows, test=rows.select(range(4))).save_to_disk(tmp_path / "both")
    data = load_texts(tmp_path / "both", validation=0)
    assert (data.train["text"], len(data.test)) == (rows["text"], 4)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", "must name the files of a saved data set"),
        ('{"_data_files": null}', "must name the files of a saved data set"),
        ('{"_data_files": []}', "must name at least one file"),
        ('{"_data_files": [{"filename": "../a.arrow"}]}', "must name .arrow files beside it"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "and there is no such file"),
        ('{"_data_files": [{"filename": "bad.arrow"}]}', "must be a stream of Arrow tables"),
    ],
)
def test_a_damaged_saved_data_set_is_named(tmp_path, state, message):
    (tmp_path / "state.json").write_text(state)
    (tmp_path / "bad.arrow").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=message):
        load_texts(tmp_path)


def test_whole_numbers_with_a_point_are_whole_numbers(tmp_path):
    """What pandas makes of a column of numbers with gaps."""
    path = write(tmp_path / "a.csv", [("x", "0.0"), ("y", "1.0"), ("z", "10"), ("w", "2.00")])
    assert load_texts(path, validation=0).class_names == ("0", "1", "2", "10")
    path = write(tmp_path / "b.csv", [("x", "0.0"), ("y", "1.0")])
    assert load_texts(path, validation=0, class_names=("no", "yes")).train["label"] == [0, 1]
    assert load_texts(path, validation=0, class_names=("0.0", "1.0")).class_names == ("0.0", "1.0")
    path = write(tmp_path / "c.csv", [("x", "1.0"), ("y", "1.5")])
    assert load_texts(path, validation=0).class_names == ("1.0", "1.5")

"""Texts in files: listed in a stream, read from where they lie, and damaged ones named."""

import csv
import io
import json
import tracemalloc

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from mhex_core.bulk.job import ENTRY
from mhex_text.bulk import open_source
from mhex_text.data import lines
from mhex_text.data.unlabelled import read_texts


def listed(source):
    """The entries as dictionaries."""
    batches = list(source.entries())
    assert all(batch.schema == ENTRY for batch in batches)
    return pa.Table.from_batches(batches, ENTRY).to_pylist()


def read(source, *, step=3):
    """What is read of each entry, by its name: a tuple of texts, or a reason. A few at a time."""
    reader = source.reader()
    found = {}
    for batch in source.entries():
        for start in range(0, len(batch), step):
            part = batch.slice(start, step)
            found |= dict(zip(part["id"].to_pylist(), reader(part), strict=True))
    return found


def same_as_read_texts(path, **columns):
    source = open_source(path, **columns)
    found = read(source)
    wanted = read_texts(path, **columns)
    texts = {name: texts for name, texts in found.items() if isinstance(texts, tuple)}
    assert list(texts) == [f"{path.name}/{line}" for line in wanted.lines]
    assert list(texts.values()) == [(text,) if isinstance(text, str) else text for text in wanted.texts]
    rejected = {name: reason for name, reason in found.items() if isinstance(reason, str)}
    assert rejected == {f"{path.name}/{line}": reason for line, reason in wanted.rejected}
    return found


CASES = {
    "plain.txt": b"one\n\n  two  \n\t\nthree",
    "ends.txt": b"one\rtwo\r\n\r\nthree\n\rfour\r",
    "mark.txt": b"\xef\xbb\xbfone\nna\xefve\n\xe6\x97\xa5\xe6\x9c\xac\n\xc2\xa0\n\x1c\n",
    "plain.csv": b'text,label\none,1\n"two, ""too""",0\n',
    "mark.csv": b"\xef\xbb\xbftext\r\none\r\n\r\n\xff\r\n ,\r\n\r\n",
    "newlines.csv": b'id,text\n1,"one\nstill one\r\nand on"\n2,two\n',
    "open.csv": b'id,text\n1,"never closed\n2,two\n3,three\n4,"fo"ur\n5,five',
    "cells.csv": b'id,text\n1,one,more\n2\n3,"a\nb",x\n4,four\n',
    "two open.csv": b'id,text\n1,"a\n2,"b\n3,c\n4,"d"\n5,"e\nf"\n',
    "pairs.csv": b"premise,hypothesis\na,b\n,c\nd,\ne,f\n",
    "blank.csv": b"\n\r\n\ntext,label\n\none,1\ntwo,2\n",
    "plain.jsonl": b'{"text": "one"}\n\n{"text": "two", "more": 3}\nnot json\n[1]\n{"more": 1}\n{"text": 5}\n',
    "mark.json": b'\xef\xbb\xbf{"review": "one"}\r\n{"review": "na\xefve"}\r{"review": ""}\n{"review": "\\u00e9"}',
    "pairs.jsonl": b'{"sentence1": "a", "sentence2": "b"}\n{"sentence1": "c", "sentence2": ""}\n',
    "null.jsonl": b'{"text": "a", "pair": "b"}\n{"text": "c", "pair": null}\n{"text": null, "pair": "d"}\n',
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_is_what_read_texts_reads(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(CASES[name])
    same_as_read_texts(path)


def test_an_open_quotation_mark_costs_its_own_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(CASES["open.csv"])
    assert read(open_source(path)) == {
        "a.csv/2": "not a row of 2 columns",
        "a.csv/3": ("two",),
        "a.csv/4": ("three",),
        "a.csv/5": "not a row of 2 columns",
        "a.csv/6": ("five",),
    }
    assert [entry["problem"] is None for entry in listed(open_source(path))] == [False, True, True, False, True]


_PIECES = st.sampled_from(
    ["a", "b c", '"', '""', ",", "\n", "\r\n", "\r", " ", "é", "\\", "\x85", '{"text": "x"}', "1"]
)


@given(st.lists(_PIECES, max_size=24).map("".join), st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_csv_is_read_as_read_texts_reads_it(tmp_path_factory, text, mark):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(mark * b"\xef\xbb\xbf" + b"id,text\n" + text.encode())
    if list(open_source(path)._listed(path, set(), set())):
        same_as_read_texts(path)


@given(st.lists(_PIECES, max_size=24).map("".join), st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_text_file_is_read_as_read_texts_reads_it(tmp_path_factory, text, mark):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(mark * b"\xef\xbb\xbf" + text.encode())
    if list(open_source(path)._listed(path, set(), set())):
        same_as_read_texts(path)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_lines_do_not_depend_on_how_much_is_read_at_once(chunk, monkeypatch):
    data = b"\xef\xbb\xbfab\r\nc\rd\n\n\r\n\re"
    monkeypatch.setattr(lines, "_CHUNK", chunk)
    found = list(lines.lines(io.BytesIO(data)))
    assert [line.data for line in found] == data[3:].splitlines(keepends=True)
    assert [data[line.place : line.place + line.length] for line in found] == [line.data for line in found]
    assert [line.number for line in found] == list(range(1, len(found) + 1))


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n", b""])
def test_a_line_that_is_too_long_is_passed_over(end, monkeypatch):
    monkeypatch.setattr(lines, "_CHUNK", 4)
    data = b"ab\n" + b"x" * 21 + end + (b"cd\n" if end else b"")
    found = list(lines.lines(io.BytesIO(data), longest=8))
    assert [line.data for line in found] == [b"ab\n", None] + [b"cd\n"] * bool(end)
    assert [line.place for line in found] == [0, 3] + [24 + len(end)] * bool(end)
    assert sum(line.length for line in found) == len(data)


def test_the_end_of_a_record_is_not_looked_for_for_ever(monkeypatch, tmp_path):
    monkeypatch.setattr(lines, "MOST_LINES", 4)
    path = tmp_path / "a.csv"
    path.write_bytes(b'text\n"1\n2\n3\n4"\n"1\n2\n3\n4\n5"\nlast\n')
    found = read(open_source(path))
    assert found["a.csv/2"] == ("1\n2\n3\n4",)
    assert found["a.csv/6"].startswith("it is longer than 1 MiB")
    assert "a.csv/7" not in found
    assert found["a.csv/11"] == ("last",)
    # One that nobody closes gives up its first line alone.
    path.write_bytes(b'text\n"1\n2\n3\n4\n5\nlast\n')
    found = read(open_source(path))
    assert found["a.csv/2"] == "not a row of 1 columns"
    assert [found[f"a.csv/{number}"] for number in range(3, 8)] == [("2",), ("3",), ("4",), ("5",), ("last",)]


@pytest.mark.parametrize("name", ["long.csv", "long.txt", "long.jsonl"])
def test_listing_a_long_file_takes_little_memory(name, tmp_path):
    path = tmp_path / name
    line = {
        "csv": b"%s,1\n" % (b"text " * 40),
        "txt": b"text " * 40 + b"\n",
        "jsonl": b'{"text": "%s"}\n' % (b"text " * 40),
    }
    with path.open("wb") as file:
        file.write(b"text,label\n" * name.endswith("csv"))
        file.write(b'"never closed\n' * name.endswith("csv"))
        for _ in range(10):
            file.write(line[path.suffix[1:]] * 10_000)
    source = open_source(path)
    tracemalloc.start()
    try:
        count = sum(len(batch) for batch in source.entries())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 100_000 + name.endswith("csv")
    assert path.stat().st_size > 20_000_000
    # A record that is not closed is held up to its limit, four bytes a letter while it is read.
    assert peak < (16 * lines.MOST_BYTES if name.endswith("csv") else 4_000_000)


def write_parquet(path, rows=25, **columns):
    table = {"text": [f"text {row}" for row in range(rows)]} | columns
    parquet.write_table(pa.table(table), path, row_group_size=10)


def test_a_parquet_file_is_read_by_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"text {row}" for row in range(25)]
    texts[3], texts[12], texts[24] = None, "  ", "half \x00 way"
    write_parquet(path, text=texts, label=list(range(25)))
    found = same_as_read_texts(path)
    assert found["a.parquet/4"] == "no text"
    assert list(found) == [f"a.parquet/{row}" for row in range(1, 26)]
    (batch,) = open_source(path).entries()
    shuffled = batch.take([24, 0, 13, 3, 9, 10])
    assert [texts if isinstance(texts, str) else texts[0] for texts in open_source(path).reader()(shuffled)] == [
        "half \x00 way",
        "text 0",
        "text 13",
        "no text",
        "text 9",
        "text 10",
    ]


def test_a_parquet_text_that_is_not_utf8_is_left_out_alone(tmp_path):
    path = tmp_path / "a.parquet"
    texts = pa.array([b"one", b"na\xefve", b"three"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": texts}), path)
    assert list(read(open_source(path)).values()) == [("one",), "not UTF-8", ("three",)]


def test_a_damaged_row_group_takes_its_rows_alone(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"text {row} of some length" for row in range(30)]
    parquet.write_table(
        pa.table({"text": texts}), path, row_group_size=10, compression="gzip", use_dictionary=False,
        data_page_version="1.0", write_statistics=False,
    )  # fmt: skip
    column = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    data[start + 20 : start + column.total_compressed_size] = b"\xff" * (column.total_compressed_size - 20)
    path.write_bytes(data)
    found = list(read(open_source(path)).values())
    assert found[:10] == [(text,) for text in texts[:10]]
    assert found[20:] == [(text,) for text in texts[20:]]
    assert all(isinstance(reason, str) and reason and "\n" not in reason for reason in found[10:20])


def test_a_folder_is_read_in_order_and_bad_files_are_named(tmp_path):
    (tmp_path / "b.csv").write_text("label,Text\n1,b one\n1,b two\n")
    (tmp_path / "a.csv").write_text("text\na one\n")
    (tmp_path / "0 empty.csv").write_bytes(b"")
    (tmp_path / "c.csv").write_text("other\nx\n")
    (tmp_path / "d.csv").write_text("text\n")
    (tmp_path / ".hidden.csv").write_text("text\nhidden\n")
    (tmp_path / "README.md").write_text("left aside")
    (tmp_path / "within.csv").mkdir()
    source = open_source(tmp_path)
    assert source.files == ("0 empty.csv", "a.csv", "b.csv", "c.csv", "d.csv")
    assert source.text == "text"
    found = read(source)
    assert list(found) == ["0 empty.csv", "a.csv/2", "b.csv/2", "b.csv/3", "c.csv"]
    assert found["b.csv/3"] == ("b two",)
    assert "column names" in found["0 empty.csv"]
    assert "text must be one of the columns other of c.csv" in found["c.csv"]
    sources = {entry["id"]: entry["source"] for entry in listed(source)}
    assert sources["a.csv/2"] == str((tmp_path / "a.csv").resolve())


def test_a_folder_of_parquet_files_survives_garbage(tmp_path):
    write_parquet(tmp_path / "b.parquet", rows=2)
    (tmp_path / "a.parquet").write_bytes(b"garbage" * 40)
    found = read(open_source(tmp_path))
    assert list(found) == ["a.parquet", "b.parquet/1", "b.parquet/2"]
    assert isinstance(found["a.parquet"], str)


def test_the_folder_of_the_results_is_left_aside(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    assert open_source(tmp_path, exclude=tmp_path / "out").files == ("a.jsonl",)
    with pytest.raises(ValueError, match="input must hold files with one of the endings"):
        open_source(tmp_path, exclude=tmp_path)


def test_names_that_occur_again_are_told_apart(tmp_path):
    (tmp_path / "a.csv").write_text("key,text\nx,one\ny,two\nx,three\n,four\n")
    (tmp_path / "b.csv").write_text("key,text\nx,five\nz,six\n")
    found = read(open_source(tmp_path, id_column="key"))
    assert found == {
        "x": ("one",),
        "y": ("two",),
        "x (a.csv/4)": ("three",),
        "a.csv/5": ("four",),
        "x (b.csv/2)": ("five",),
        "z": ("six",),
    }


def test_records_have_the_names_of_a_column(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["key", "text"], ["x1", "one"], ["", "two"], ["x3", "three\nlines"], ["broken"]])
    assert list(read(open_source(tmp_path / "a.csv", id_column="KEY"))) == ["x1", "a.csv/3", "x3", "a.csv/6"]
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a", "id": 7}\n{"text": "b", "id": null}\nbroken\n{"text": "c", "id": "\\ud800"}\n'
    )
    found = read(open_source(tmp_path / "a.jsonl", id_column="id"))
    assert list(found) == ["7", "a.jsonl/2", "a.jsonl/3", "a.jsonl/4"]
    write_parquet(tmp_path / "a.parquet", rows=3, id=[5, None, 6])
    assert list(read(open_source(tmp_path / "a.parquet", id_column="id"))) == ["5", "a.parquet/2", "6"]


def test_what_no_file_can_hold_is_rejected(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud800 half"}\n{"text": "\\udcff"}\n{"text": "\\ud83d\\ude00"}\n')
    assert list(read(open_source(path)).values()) == ["half of a surrogate pair", "not UTF-8", ("😀",)]


def test_a_missing_second_text_is_rejected(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "pair": "b"}\n{"text": "c"}\n{"text": "d", "pair": null}\n')
    assert list(read(open_source(path)).values()) == [("a", "b"), "no pair", "no pair"]
    assert list(read(open_source(path, text="text")).values()) == [("a",), ("c",), ("d",)]


def test_keys_of_the_first_thousand_records_are_the_columns(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1}\n' * 999 + '{"text": "here"}\n{"late": 1, "text": "there"}\n')
    found = list(read(open_source(path)).values())
    assert found[:999] == ["no text"] * 999
    assert found[999:] == [("here",), ("there",)]
    path.write_text('{"id": 1}\n' * 1000 + '{"text": "here"}\n')
    with pytest.raises(ValueError, match="text must be one of the columns id"):
        open_source(path)


def test_a_file_that_changed_after_listing_is_rejected_not_raised(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\none,1\ntwo,2\n")
    source = open_source(path)
    (batch,) = source.entries()
    path.write_text("text,label\n")
    assert source.reader()(batch) == ["not a row of 2 columns"] * 2
    path.unlink()
    assert source.reader()(batch) == ["No such file or directory"] * 2
    write_parquet(tmp_path / "a.parquet", rows=12)
    source = open_source(tmp_path / "a.parquet")
    (batch,) = source.entries()
    write_parquet(tmp_path / "a.parquet", rows=11)
    assert source.reader()(batch)[-2:] == [("text 10",), "there is no such row"]


def test_a_source_goes_to_other_processes(tmp_path):
    import pickle

    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one"}))
    assert read(pickle.loads(pickle.dumps(open_source(path)))) == {"a.jsonl/1": ("one",)}


@pytest.mark.parametrize(
    ("name", "content", "columns", "error", "said"),
    [
        ("a.xlsx", "x", {}, ValueError, "input must have one of the endings"),
        ("a.txt", "x", {"text": "x"}, ValueError, "text must be left out for text files"),
        ("a.csv", "", {}, ValueError, "column names"),
        ("a.csv", "x\n1\n", {}, ValueError, "text must be one of the columns x of a.csv"),
        ("a.csv", "text\n1\n", {"id_column": "id"}, ValueError, "id_column must be one of the columns text"),
        ("a.csv", "text\n1\n", {"text": "text", "pair": "text"}, ValueError, "different columns"),
        ("a.csv", "text\n1\n", {"text": 3}, TypeError, "text must be the name of a column"),
        ("a.jsonl", "[1]\n", {}, ValueError, "a JSON object per line"),
        ("a.parquet", "garbage", {}, ValueError, "a file that can be read"),
        ("a.csv", "text\n1\n", {"exclude": 3}, TypeError, "exclude must be a path"),
    ],
)
def test_what_does_not_fit_is_refused(name, content, columns, error, said, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(error, match=said):
        open_source(path, **columns)


def test_folders_of_nothing_or_of_two_kinds_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no"):
        open_source(tmp_path / "nothing")
    with pytest.raises(TypeError, match="input must be a path"):
        open_source(None)
    with pytest.raises(ValueError, match="files with one of the endings"):
        open_source(tmp_path)
    (tmp_path / "a.csv").write_text("text\n1\n")
    (tmp_path / "a.txt").write_text("x\n")
    with pytest.raises(ValueError, match="files of one kind, got csv and txt"):
        open_source(tmp_path)


def test_a_file_without_texts_is_refused_when_it_is_listed(tmp_path):
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="at least one text"):
        list(open_source(tmp_path / "a.txt").entries())

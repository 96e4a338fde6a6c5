"""Images in tar and Parquet files, whole and damaged."""

import gzip
import pickle

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from mhex_vision.bulk import open_source
from mhex_vision.bulk.archives import expand
from mhex_vision.data import UnreadableImageError

# ---------------------------------------------------------------------------------------------------------------- tars


@pytest.fixture
def members(picture, encode):
    """What a WebDataset has in a shard."""

    def make(count=3, first=0):
        made = []
        for number in range(first, first + count):
            made.append((f"./dir/{number:04d}.jpg", encode(picture(number), "JPEG")))
            made.append((f"./dir/{number:04d}.json", b"{}"))
        return made

    return make


def pixels(source, entry):
    reader = source.reader()
    image = np.asarray(reader(entry.source, entry.place, entry.length))
    reader.close()
    return image


def test_members_are_listed_with_their_places_and_read_from_there(tmp_path, make_tar, members, picture, encode):
    path = make_tar(tmp_path / "a.tar", [*members(), ("long/" * 60 + "ünï.png", encode(picture(7)))])
    source = open_source(path)
    listed = list(source.listed())
    expected = [f"a.tar/dir/000{number}.jpg" for number in range(3)] + ["a.tar/" + "long/" * 60 + "ünï.png"]
    assert [entry.id for entry in listed] == expected
    assert all(entry.problem is None and entry.length > 0 for entry in listed)
    assert np.array_equal(pixels(source, listed[3]), np.asarray(picture(7)))
    data = path.read_bytes()
    assert data[listed[1].place :][: listed[1].length] == members()[2][1]


def test_a_folder_a_pattern_and_braces_name_the_same_files(tmp_path, make_tar, members):
    folder = tmp_path / "shards"
    (folder / "more").mkdir(parents=True)
    for number in range(3):
        make_tar(folder / f"s-{number:03d}.tar", members(1, number))
    make_tar(folder / "more" / "s-003.tar", members(1, 3))
    expected = [f"s-{number:03d}.tar/dir/{number:04d}.jpg" for number in range(3)]
    assert [entry.id for entry in open_source(folder).listed()] == ["more/s-003.tar/dir/0003.jpg", *expected]
    for pattern in ("s-*.tar", "s-00[012].tar", "s-{000..002}.tar", "{s-000,s-00{1..2},s-000}.tar"):
        assert [entry.id for entry in open_source(f"{folder}/{pattern}").listed()] == expected
    *_, missing = open_source(f"{folder}/s-{{000..003}}.tar").listed()
    assert (missing.id, missing.problem) == ("s-003.tar", "no such file")


def test_images_in_a_folder_go_before_archives(tmp_path, make_tar, members, picture):
    make_tar(tmp_path / "a.tar", members())
    picture().save(tmp_path / "b.png")
    assert [entry.id for entry in open_source(tmp_path).listed()] == ["b.png"]


@pytest.mark.parametrize("where", ["in the last image", "in a header"])
def test_a_tar_that_is_cut_off_gives_what_lies_before(tmp_path, make_tar, members, where):
    path = make_tar(tmp_path / "a.tar", members())
    last = list(open_source(path).listed())[2]
    end = last.place + 10 if where == "in the last image" else last.place - 300
    path.write_bytes(path.read_bytes()[:end])
    *good, bad = list(open_source(path).listed())[:3]
    assert [entry.problem for entry in good] == [None, None]
    assert bad.problem is not None
    assert "\n" not in bad.problem


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path, make_tar, members):
    path = make_tar(tmp_path / "a.tar", members())
    second = list(open_source(path).listed())[1]
    data = bytearray(path.read_bytes())
    data[second.place - 400 : second.place - 350] = b"\xff" * 50
    path.write_bytes(data)
    good, bad = open_source(path).listed()
    assert good.problem is None
    assert bad.id == "a.tar"
    assert bad.problem.startswith("damaged at byte")


def test_files_that_are_no_tars_are_one_reject_each(tmp_path, make_tar, members):
    make_tar(tmp_path / "good.tar", members(1))
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_text("text\n" * 1000)
    (tmp_path / "zipped.tar").write_bytes(gzip.compress((tmp_path / "good.tar").read_bytes()))
    problems = {entry.id: entry.problem for entry in open_source(tmp_path).listed()}
    assert problems.pop("good.tar/dir/0000.jpg") is None
    assert problems["empty.tar"] == "the file is empty"
    assert problems["zipped.tar"] == "the file is compressed; decompress it first"
    assert problems["text.tar"].startswith("not a tar file")
    with pytest.raises(ValueError, match="there is none in"):
        open_source(tmp_path / "text.tar")


def test_members_of_one_name_keep_names_apart(tmp_path, make_tar, members):
    path = make_tar(tmp_path / "a.tar", [*members(1), *members(1), ("._0000.jpg", b"resource fork")])
    first, second = open_source(path).listed()
    assert first.id == "a.tar/dir/0000.jpg"
    assert second.id == f"a.tar/dir/0000.jpg@{second.place}"


def test_damaged_members_and_lost_files_are_reasons(tmp_path, make_tar, members):
    path = make_tar(tmp_path / "a.tar", [("cut.jpg", members(1)[0][1][:200]), ("empty.png", b""), *members(1)])
    source = open_source(path)
    cut, empty, good = source.listed()
    reader = pickle.loads(pickle.dumps(source)).reader()
    for entry, reason in ((cut, "cannot be decoded"), (empty, "the file is empty")):
        with pytest.raises(UnreadableImageError, match=reason):
            reader(entry.source, entry.place, entry.length)
    pickle.dumps(reader)
    assert reader(good.source, good.place, good.length).size == (40, 36)
    with pytest.raises(UnreadableImageError, match="shorter than when it was listed"):
        reader(good.source, good.place, 1_000_000)
    reader.close()
    path.unlink()
    with pytest.raises(UnreadableImageError, match="no such file"):
        reader(good.source, good.place, good.length)


def test_compressed_tars_are_refused_with_the_reason(tmp_path, make_tar, members):
    for place in ("a.tar.gz", "a.tgz"):
        (tmp_path / place).write_bytes(b"\x1f\x8b")
        with pytest.raises(ValueError, match="decompress it first"):
            open_source(tmp_path / place)
    with pytest.raises(ValueError, match="decompress it first"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="decompress it first"):
        open_source(f"{tmp_path}/*.tar.gz")


def test_braces():
    assert list(expand("a{08..11}b")) == ["a08b", "a09b", "a10b", "a11b"]
    assert list(expand("{x,y}{1..2}")) == ["x1", "x2", "y1", "y2"]
    assert list(expand("{3..1}")) == ["3", "2", "1"]
    assert list(expand("a{b}c")) == ["a{b}c"]
    with pytest.raises(ValueError, match="at most 1,000,000 files"):
        list(expand("{0..9999999999}.tar"))


# ------------------------------------------------------------------------------------------------------------- Parquet


@pytest.fixture
def table(picture, encode):
    """A table of encoded images, one of them missing."""

    def make(count=5, kind="binary"):
        data = [encode(picture(number)) for number in range(count)]
        data[1] = None
        if kind == "struct":
            type_ = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            column = pa.array([None if one is None else {"bytes": one, "path": "x"} for one in data], type_)
        else:
            column = pa.array(data, getattr(pa, kind)())
        return pa.table({"key": [f"k{number // 2}" for number in range(count)], "image": column})

    return make


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct"])
def test_rows_are_read_in_any_order(tmp_path, table, picture, kind):
    parquet.write_table(table(150, kind), tmp_path / "a.parquet", row_group_size=100)
    source = open_source(tmp_path / "a.parquet")
    listed = list(source.listed())
    assert [entry.id for entry in listed] == [f"a.parquet/{row}" for row in range(150)]
    reader = pickle.loads(pickle.dumps(source)).reader()
    for row in (0, 2, 99, 70, 149, 100, 3, 3):
        assert np.array_equal(np.asarray(reader(listed[row].source, row, -1)), np.asarray(picture(row)))
    with pytest.raises(UnreadableImageError, match="missing"):
        reader(listed[1].source, 1, -1)
    with pytest.raises(UnreadableImageError, match="shorter than when it was listed"):
        reader(listed[1].source, 150, -1)
    pickle.dumps(reader)
    reader.close()


def test_paths_begin_at_the_files_folder(tmp_path, photos):
    parquet.write_table(pa.table({"Path": ["a.png", "none.png"]}), photos / "list.parquet")
    source = open_source(photos / "list.parquet")
    good, bad = source.listed()
    assert pixels(source, good).shape == (36, 40, 3)
    with pytest.raises(UnreadableImageError, match="no such file"):
        pixels(source, bad)


def test_a_column_names_the_rows_and_repeated_names_are_told_apart(tmp_path, table):
    whole = table(5).append_column("number", pa.array([1, None, 2, 3, 4]))
    parquet.write_table(whole, tmp_path / "a.parquet")
    parquet.write_table(whole.slice(3, 1), tmp_path / "b.parquet")
    ids = [entry.id for entry in open_source(tmp_path, id_column="key").listed()]
    assert ids == ["k0", "k0 (a.parquet/1)", "k1", "k1 (a.parquet/3)", "k2", "k1 (b.parquet/0)"]
    ids = [entry.id for entry in open_source(tmp_path, id_column="number").listed()]
    assert ids == ["1", "a.parquet/1", "2", "3", "4", "3 (b.parquet/0)"]


def test_damaged_files_and_other_tables_are_one_reject_each(tmp_path, table):
    parquet.write_table(table(2), tmp_path / "good.parquet")
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "other.parquet")
    (tmp_path / "garbage.parquet").write_bytes(b"PAR1 garbage PAR1")
    (tmp_path / "empty.parquet").write_bytes(b"")
    listed = list(open_source(tmp_path).listed())
    assert [entry.id for entry in listed] == [
        "empty.parquet",
        "garbage.parquet",
        "good.parquet/0",
        "good.parquet/1",
        "other.parquet",
    ]
    assert [entry.problem is None for entry in listed] == [False, False, True, True, False]
    assert "has no column of images, only text" in listed[-1].problem
    with pytest.raises(ValueError, match="has no column nothing"):
        open_source(tmp_path / "good.parquet", image_column="nothing")
    parquet.write_table(pa.table({"number": [1]}), tmp_path / "n.parquet")
    with pytest.raises(ValueError, match="column number must hold encoded images"):
        open_source(tmp_path / "n.parquet", image_column="number")


def test_damage_within_a_file_loses_the_rows_behind_it_and_no_others(tmp_path, table):
    path = tmp_path / "a.parquet"
    parquet.write_table(table(40), path, row_group_size=10, compression="zstd")
    with parquet.ParquetFile(path) as file:
        column = file.metadata.row_group(1).column(1)
        start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    source = open_source(path)
    reader, reasons = source.reader(), {}
    for entry in source.listed():
        try:
            reader(entry.source, entry.place, entry.length)
        except UnreadableImageError as error:
            reasons[entry.place] = str(error)
    reader.close()
    assert list(reasons) == [1, *range(10, 20)]
    assert not [reason for reason in reasons.values() if "\n" in reason]

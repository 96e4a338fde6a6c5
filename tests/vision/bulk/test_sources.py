"""What is found in folders, lists and sets: names, order, and what is left aside."""

import os
import pickle
import tracemalloc
from itertools import islice

import numpy as np
import pytest

from mhex_core.bulk import ENTRY
from mhex_vision.bulk import open_source
from mhex_vision.bulk.listing import in_batches
from mhex_vision.data import Preprocessing, UnreadableImageError


def names(source):
    return [entry.id for entry in source.listed()]


def read(source, entry):
    return source.reader()(entry.source, entry.place, entry.length)


# ------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_is_listed_by_name_depth_first(photos):
    source = open_source(photos)
    assert names(source) == ["a.png", "b/a.jpg", "b/cut.jpg", "b/deep/x.PNG", "c.gif", "empty.png", "text.png"]
    assert names(source) == names(open_source(str(photos)))
    for entry in source.listed():
        assert entry.source == str(photos / entry.id)
        assert (entry.place, entry.length, entry.problem) == (-1, -1, None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("empty.png", "the file is empty"), ("text.png", "not an image in a known format"), ("b/cut.jpg", "cannot be")],
)
def test_the_reason_of_a_damaged_file_is_one_line_without_its_name(photos, name, reason):
    source = open_source(photos)
    (entry,) = [entry for entry in source.listed() if entry.id == name]
    with pytest.raises(UnreadableImageError) as error:
        read(source, entry)
    assert str(error.value).startswith(reason)
    assert "\n" not in str(error.value)
    assert str(photos) not in str(error.value)


def test_an_image_is_read_as_everywhere(photos):
    source = open_source(photos)
    preprocessing = Preprocessing(size=24)
    for entry in list(source.listed())[:2]:
        assert preprocessing.fit(read(source, entry)).equal(preprocessing.load(photos / entry.id))


def test_what_is_excluded_is_left_aside_however_it_is_named(photos, monkeypatch):
    monkeypatch.chdir(photos)
    assert not [name for name in names(open_source(photos, exclude="b/deep")) if "deep" in name]
    with pytest.raises(ValueError, match="out must be another folder than input"):
        open_source(photos, exclude=".")


def test_links_are_followed_once_and_loops_end(photos):
    (photos / "b" / "up").symlink_to(photos)
    (photos / "b" / "itself").symlink_to(photos / "b")
    (photos / "linked").symlink_to(photos / "b" / "deep")
    (photos / "linked too").symlink_to(photos / "b" / "deep")
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    listed = {entry.id: entry.problem for entry in open_source(photos).listed()}
    assert len(listed) == 9
    assert listed["linked/x.PNG"] is None
    assert listed["gone.png"] == "a link that leads nowhere"


def test_a_pipe_called_like_an_image_is_not_waited_for(photos):
    os.mkfifo(photos / "pipe.png")
    assert "pipe.png" not in names(open_source(photos))
    (photos / "list.txt").write_text("pipe.png\nb\na.png\n")
    source = open_source(photos / "list.txt")
    pipe, folder, _ = source.listed()
    with pytest.raises(UnreadableImageError, match=r"^not a regular file$"):
        read(source, pipe)
    with pytest.raises(UnreadableImageError, match=r"^is a folder$"):
        read(source, folder)


def test_a_name_that_is_not_text_is_rejected_and_the_others_stay(photos, picture):
    try:
        (photos / os.fsdecode(b"\xff.png")).touch()
    except OSError:
        pytest.skip("this file system takes no such names")
    (strange,) = [entry for entry in open_source(photos).listed() if entry.problem]
    assert strange.id == "\\xff.png"
    assert strange.problem == "the file's name is not UTF-8 text"
    assert sum(batch.num_rows for batch in in_batches(open_source(photos).listed())) == 8


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everywhere")
def test_a_folder_that_may_not_be_read_is_one_reject(photos):
    (photos / "b").chmod(0)
    try:
        listed = list(open_source(photos).listed())
    finally:
        (photos / "b").chmod(0o700)
    assert [entry.id for entry in listed if entry.problem] == ["b/"]


def test_a_listing_is_made_as_it_is_asked_for(tmp_path):
    for folder in range(50):
        (tmp_path / f"{folder:03d}").mkdir()
        for number in range(40):
            (tmp_path / f"{folder:03d}" / f"{number:03d}.png").touch()
    entries = open_source(tmp_path).listed()
    tracemalloc.start()
    assert len(list(islice(entries, 5))) == 5
    held = tracemalloc.get_traced_memory()[0]
    for _ in entries:
        pass
    assert tracemalloc.get_traced_memory()[1] < held + 100_000
    tracemalloc.stop()


def test_entries_come_in_batches_of_the_engines_schema(photos):
    (batch,) = in_batches(open_source(photos).listed())
    assert batch.schema == ENTRY
    assert batch.column("id").to_pylist() == names(open_source(photos))
    assert [rows.num_rows for rows in in_batches(list(open_source(photos).listed()) * 1000)] == [4096, 2904]


# --------------------------------------------------------------------------------------------------------------- lists


def test_a_list_holds_paths_from_its_own_folder(photos, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(f"photos/a.png\n\n  photos/b/a.jpg \r\nphotos/a.png\n{photos / 'c.gif'}\nphotos/none.png\n")
    source = open_source(path)
    listed = list(source.listed())
    assert [entry.id for entry in listed] == [
        "photos/a.png",
        "photos/b/a.jpg",
        "photos/a.png (line 4)",
        str(photos / "c.gif"),
        "photos/none.png",
    ]
    assert [entry.problem for entry in listed] == [None, None, "listed twice (line 4)", None, None]
    assert read(source, listed[3]).size == (40, 36)
    with pytest.raises(UnreadableImageError, match=r"^no such file or directory$"):
        read(source, listed[4])


def test_a_line_that_is_not_text_is_rejected(photos):
    (photos / "list.txt").write_bytes(b"\xef\xbb\xbfa.png\n\xff.png\nnull\0.png\n")
    source = open_source(photos / "list.txt")
    good, bad, null = source.listed()
    assert (good.id, bad.problem) == ("a.png", "the line is not UTF-8 text")
    with pytest.raises(UnreadableImageError):
        read(source, null)


# ------------------------------------------------------------------------------------------------------------- MedMNIST


def medmnist(path, *, side=28, grey=False, count=7):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, more in (("train", 3), ("val", 1), ("test", 0)):
        shape = (count + more, side, side) if grey else (count + more, side, side, 3)
        arrays[f"{split}_images"] = rng.integers(0, 255, shape, dtype=np.uint8)
        arrays[f"{split}_labels"] = np.zeros((count + more, 1), np.uint8)
    np.savez_compressed(path, **arrays)
    return arrays


@pytest.mark.parametrize("grey", [False, True])
def test_a_medmnist_set_is_read_row_by_row_in_any_order(tmp_path, grey):
    arrays = medmnist(tmp_path / "bloodmnist_64.npz", side=64, grey=grey)
    source = open_source("BloodMNIST", root=tmp_path, size=64, split="validation", download=False)
    listed = list(source.listed())
    assert [entry.id for entry in listed] == [f"bloodmnist_64/validation/{row:05d}" for row in range(8)]
    reader = pickle.loads(pickle.dumps(source)).reader()
    for row in (3, 4, 0, 7, 7, 2):
        expected = arrays["val_images"][row]
        expected = np.repeat(expected[..., None], 3, 2) if grey else expected
        assert np.array_equal(np.asarray(reader(listed[row].source, row, -1)), expected)
    pickle.dumps(reader)  # open as it is
    reader.close()


def test_a_damaged_medmnist_set_gives_the_images_before_the_damage(tmp_path):
    path = tmp_path / "bloodmnist.npz"
    medmnist(path, count=200)
    data = bytearray(path.read_bytes())
    middle = data.find(b"test_images.npy") + 200 * 28 * 28 * 3 // 2
    data[middle : middle + 64] = b"\xff" * 64
    path.write_bytes(data)
    source = open_source("bloodmnist", root=tmp_path, download=False)
    reader, reasons = source.reader(), []
    for entry in source.listed():
        try:
            reader(entry.source, entry.place, entry.length)
        except UnreadableImageError as error:
            reasons.append(str(error))
    reader.close()
    assert 0 < len(reasons) < 200
    assert all("\n" not in reason for reason in reasons)


def test_what_is_no_medmnist_file_says_so(tmp_path):
    (tmp_path / "bloodmnist.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable MedMNIST file"):
        open_source("bloodmnist", root=tmp_path)
    np.savez(tmp_path / "bloodmnist.npz", test_images=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="not a readable MedMNIST file"):
        open_source("bloodmnist", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="allow the download"):
        open_source("pathmnist", root=tmp_path, download=False)
    with pytest.raises(ValueError, match="expected one of 28, 64, 128, 224"):
        open_source("pathmnist", root=tmp_path, download=False, size=30)


# -------------------------------------------------------------------------------------------------------------- inputs


def test_one_image_may_have_any_name(photos, picture):
    assert names(open_source(photos / "a.png")) == ["a.png"]
    picture().save(photos / "scan", format="PNG")
    assert names(open_source(photos / "scan")) == ["scan"]


@pytest.mark.parametrize(
    ("place", "options", "expected"),
    [
        ("none", {}, "input must be an image, a folder of images"),
        ("photos/notes.md", {}, "input must be an image, a folder of images"),
        ("empty", {}, "there is none in"),
        ("photos/*.png", {}, "a pattern must name .tar or .parquet files"),
        ("photos/*.tar", {}, "there is none in"),
        ("photos", {"size": 28}, "size must come with the name of a MedMNIST set"),
        ("photos", {"root": "."}, "root must come with"),
        ("photos", {"id_column": "x"}, "id_column must come with Parquet files"),
        ("photos", {"split": "all"}, "split must be one of"),
    ],
)
def test_what_cannot_be_taken_is_answered_with_what_can(photos, tmp_path, place, options, expected):
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        open_source(f"{tmp_path}/{place}", **options)


@pytest.mark.parametrize("options", [{"download": 1}, {"image_column": 1}, {"exclude": 1}, {"size": 2.0}, {"root": 1}])
def test_arguments_of_another_type_are_refused(photos, options):
    with pytest.raises(TypeError, match=next(iter(options))):
        open_source(photos, **options)
    with pytest.raises(TypeError, match="input"):
        open_source(1)

"""Pages of what `batch` wrote: the stored maps on the images they were made of."""

from __future__ import annotations

import base64
import io
import json
import shutil
import sys

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from mhex_vision import Preprocessing, cli
from mhex_vision.bulk import explain_many, read_saliency, report_archive

from ..test_reporting import document, maps_of  # noqa: TID252  # there is no absolute name for it

CLASSES = ("disc", "ring", "cross")
SIDE = 32
COUNT = 30


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("archives")


@pytest.fixture(scope="module")
def pictures(place, picture):
    """A folder of images, two of them damaged."""
    folder = place / "pictures"
    folder.mkdir()
    for number in range(COUNT):
        picture(number).save(folder / f"{number:02d}.png")
    for number in (4, 7):
        (folder / f"{number:02d}.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def archive(place, pictures, run_folder):
    """The archive of 28 images in three files."""
    explain_many(run_folder, pictures, place / "archive", shard_size=12, workers=0, lanes=1)
    return place / "archive"


def rows_of(folder):
    return parquet.read_table(folder / "data")


def close(found, lines, number, expected):
    shown = maps_of(found, lines, number, 0).numpy()
    np.testing.assert_allclose(shown, expected, atol=2e-3 * max(1.0, np.abs(expected).max()))


def test_rows_as_they_are_stored(archive, pictures, run_folder):
    page = report_archive(archive, title="Stored")
    assert page.samples == COUNT - 2
    found, lines = document(page)
    table = rows_of(archive)
    maps = read_saliency(table)
    assert [sample["name"] for sample in found["samples"]] == table["id"].to_pylist()
    for number, row in enumerate(table.to_pylist()):
        sample = found["samples"][number]
        assert CLASSES[sample["prediction"]] == row["prediction"]
        assert [one["target"] for one in sample["evidence"]] == [CLASSES.index(row["target"])]
        close(found, lines, number, maps[number])
    (method,) = found["methods"]
    assert (method["name"], method["layer_names"], method["beta"]) == ("mhex", ["as stored"], 1.0)
    assert (method["normalize"], method["signed"], method["fixed"]) == (True, False, True)
    assert found["title"] == "Stored"
    assert found["about"]["archive"] == str(archive)
    assert found["about"]["checkpoint"] == str(run_folder)
    assert found["about"]["images"] == f"the images in {pictures}: all 28 rows"
    assert found["about"]["explained by"] == f"method mhex, beta 0.0, resolution [{SIDE}, {SIDE}], dtype uint8"
    assert "torch" in found["about"]["versions"]


def test_the_picture_is_what_the_network_saw(archive, pictures):
    page = report_archive(archive, samples=3)
    found, lines = document(page)
    for sample, block in zip(found["samples"], lines, strict=True):
        data = base64.b64decode(block[0].partition("base64,")[2])
        shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        seen = Preprocessing(size=SIDE).load(pictures / sample["name"]).movedim(0, -1).numpy()
        assert np.array_equal(shown, seen)


def test_the_least_probable_and_one_class_alone(archive):
    table = rows_of(archive)
    rows = table.select(["id", "probability", "prediction"]).to_pylist()
    found, _ = document(report_archive(archive, samples=5, doubtful=True))
    least = sorted(rows, key=lambda row: row["probability"])[:5]
    assert [sample["name"] for sample in found["samples"]] == sorted(row["id"] for row in least)
    assert found["about"]["images"].endswith("of 28 rows the 5 whose prediction is the least probable")
    common = rows[0]["prediction"]
    found, _ = document(report_archive(archive, predicted=common))
    assert [sample["name"] for sample in found["samples"]] == [row["id"] for row in rows if row["prediction"] == common]
    with pytest.raises(ValueError, match="predicted must be one of disc, ring, cross, got 'square'"):
        report_archive(archive, predicted="square")
    absent = set(CLASSES) - {row["prediction"] for row in rows}
    for name in absent:
        with pytest.raises(ValueError, match=f"none predicted to be {name}"):
            report_archive(archive, predicted=name)


@pytest.mark.parametrize(
    "kind",
    [
        {"resolution": "native", "dtype": "float16"},
        {"method": "random", "target": "ring"},
        {"resolution": 20, "overlays": True},
    ],
    ids=["native", "random", "overlays"],
)
def test_other_archives(place, pictures, run_folder, tmp_path, kind):
    explain_many(run_folder, pictures, tmp_path / "out", workers=0, lanes=1, **kind)
    found, lines = document(report_archive(tmp_path / "out"))
    maps = read_saliency(rows_of(tmp_path / "out"))
    (method,) = found["methods"]
    assert method["normalize"] == ("method" not in kind)
    for number in range(0, 28, 9):
        evidence = found["samples"][number]["evidence"][0]
        assert evidence["shapes"] == [list(maps.shape[1:])]
        assert evidence["size"] == [SIDE, SIDE]
        if maps.shape[1:] == (SIDE, SIDE):
            close(found, lines, number, maps[number])


def test_maps_with_a_sign(place, pictures, plain_folder, tmp_path, monkeypatch):
    (tmp_path / "signs.py").write_text("def maps(model, images, targets):\n    return images.mean(dim=1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    explain_many(plain_folder, pictures, tmp_path / "out", method="signs:maps", workers=0, lanes=1)
    # Neither the method nor the network need be there any more.
    sys.modules.pop("signs")
    (tmp_path / "signs.py").unlink()
    found, lines = document(report_archive(tmp_path / "out", samples=6))
    (method,) = found["methods"]
    assert (method["name"], method["signed"], method["normalize"]) == ("signs:maps", True, False)
    assert found["class_names"] in ([], None)
    table = rows_of(tmp_path / "out")
    stored = dict(zip(table["id"].to_pylist(), read_saliency(table), strict=True))
    for number, sample in enumerate(found["samples"]):
        close(found, lines, number, stored[sample["name"]])


def test_containers(place, make_tar, picture, encode, run_folder, tmp_path):
    pictures = {f"{number}.png": encode(picture(number)) for number in range(5)}
    make_tar(tmp_path / "shard.tar", list(pictures.items()))
    column = pa.array([{"bytes": data, "path": None} for data in pictures.values()])
    parquet.write_table(pa.table({"photo": column, "n": list(range(5))}), tmp_path / "rows.parquet")
    for name, more in (("shard.tar", {}), ("rows.parquet", {"image_column": "photo"})):
        explain_many(run_folder, tmp_path / name, tmp_path / f"of {name}", workers=0, lanes=1, **more)
        found, lines = document(report_archive(tmp_path / f"of {name}"))
        maps = read_saliency(rows_of(tmp_path / f"of {name}"))
        assert len(found["samples"]) == 5
        close(found, lines, 4, maps[4])


def test_a_medmnist_set(run_folder, tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (4, 28, 28, 3), dtype=np.uint8)
    arrays = {f"{split}_images": values for split in ("train", "val", "test")}
    labels = {f"{split}_labels": np.zeros((4, 1), np.uint8) for split in ("train", "val", "test")}
    np.savez_compressed(tmp_path / "bloodmnist.npz", **arrays, **labels)
    explain_many(
        run_folder, "bloodmnist", tmp_path / "out", root=tmp_path, size=28, split="validation", workers=0, lanes=1
    )
    found, _ = document(report_archive(tmp_path / "out"))
    assert [sample["name"] for sample in found["samples"]] == rows_of(tmp_path / "out")["id"].to_pylist()


def test_images_that_are_gone_are_named(archive, pictures, place, run_folder, tmp_path):
    copy = tmp_path / "pictures"
    shutil.copytree(pictures, copy)
    explain_many(run_folder, copy, tmp_path / "out", workers=0, lanes=1)
    (copy / "01.png").unlink()
    lines = []
    page = report_archive(tmp_path / "out", complain=lines.append)
    assert page.samples == 27
    assert len(lines) == 1
    assert lines[0].startswith("skipped: 01.png: ")
    shutil.rmtree(copy)
    with pytest.raises(ValueError, match=r"archive must have images that can still be read.*the first: 00\.png: "):
        report_archive(tmp_path / "out")


def test_archives_that_do_not_say_how_to_read(archive, tmp_path):
    shutil.copytree(archive, tmp_path / "old")
    manifest = json.loads((archive / "manifest.json").read_text())
    del manifest["about"]["reading"]
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="does not say how its images are read"):
        report_archive(tmp_path / "old")


def test_a_function_that_an_archive_names_is_not_imported(archive, tmp_path, monkeypatch):
    (tmp_path / "lurking.py").write_text("raise AssertionError('it was run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(archive, tmp_path / "crafted")
    manifest = json.loads((archive / "manifest.json").read_text())
    manifest["settings"] |= {"method": "lurking:maps", "beta": 0.0}
    (tmp_path / "crafted" / "manifest.json").write_text(json.dumps(manifest))
    report_archive(tmp_path / "crafted", samples=1)
    assert "lurking" not in sys.modules


def test_the_command(archive, pictures, run_folder, tmp_path, capsys):
    out = tmp_path / "page.html"
    asked = ["report", "--archive", str(archive), "--out", str(out)]
    assert cli.main([*asked, "--samples", "6", "--doubtful", "--title", "Doubts"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.splitlines()[0].startswith(f"wrote {out} (")
    assert "6 of 6 images" in said.out
    found, _ = document(out.read_text(encoding="utf-8"))
    assert (found["title"], len(found["samples"])) == ("Doubts", 6)
    for flags in (
        ("--methods", "random"),
        ("--checkpoint", str(run_folder)),
        ("--batch-size", "4"),
        ("--beta", "0"),
        ("--targets", "0"),
        ("--no-download",),
    ):
        assert cli.main([*asked, *flags]) == 1
        expected = f"mhex-vision: error: {flags[0]} goes with --checkpoint, and --archive is given\n"
        assert capsys.readouterr().err == expected
    with pytest.raises(SystemExit, match="2"):
        cli.main(["report", "--input", str(pictures), "--out", str(out)])
    assert "the following arguments are required: --checkpoint" in capsys.readouterr().err
    explaining = ["report", "--checkpoint", str(run_folder), "--input", str(pictures), "--out", str(out)]
    assert cli.main([*explaining, "--doubtful"]) == 1
    assert "--doubtful goes with --archive, and --checkpoint is given" in capsys.readouterr().err
    assert cli.main([*asked, "--predicted", "square"]) == 1
    assert capsys.readouterr().err == (
        "mhex-vision: error: --predicted must be one of disc, ring, cross, got 'square'\n"
    )
    manifest = archive / "manifest.json"
    assert cli.main(["report", "--archive", str(archive), "--out", str(manifest)]) == 1
    assert "--out must be another file than those of the archive" in capsys.readouterr().err
    assert cli.main([*asked, "--max-mb", "0.001"]) == 1
    assert "--max-mb" in capsys.readouterr().err
    (pictures / "03.png").rename(tmp_path / "03.png")
    try:
        assert cli.main(asked) == 3
        said = capsys.readouterr()
        assert said.err.startswith("mhex-vision: ")
        assert "skipped: 03.png: " in said.err
        assert "27 of 28 images" in said.out
    finally:
        (tmp_path / "03.png").rename(pictures / "03.png")

"""`mhex-vision batch` and `explain_many`, from images to Parquet files."""

import csv
import hashlib
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from mhex_vision import cli
from mhex_vision.bulk import explain_many, read_saliency
from mhex_vision.plain import load_classifier

GOOD = ["a.png", "b/a.jpg", "b/deep/x.PNG", "c.gif"]
BAD = ["b/cut.jpg", "empty.png", "text.png"]
QUICK = ("--workers", "0", "--lanes", "1")


def batch(*arguments):
    return cli.main(["batch", *map(str, arguments), *QUICK])


def table(out):
    return parquet.read_table(out / "data")


def digests(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (out / "data").iterdir()}


def test_a_folder_becomes_a_table_of_maps_and_a_table_of_rejects(run_folder, photos, capsys):
    out = photos / "explained"
    options = ("--checkpoint", run_folder, "--input", photos, "--out", out, "--overlays", "--beta", 0.5)
    assert batch(*options) == 3
    rows = table(out)
    assert rows.column("id").to_pylist() == GOOD
    assert rows.column("index").to_pylist() == [0, 1, 3, 4]
    assert rows.column("source").to_pylist() == [str(photos / name) for name in GOOD]
    model = load_classifier(run_folder)
    preprocessing = model.config.preprocessing
    for row, name in enumerate(GOOD):
        own = model.explain(preprocessing.normalize(preprocessing.load(photos / name).unsqueeze(0)), beta=0.5)
        assert np.abs(read_saliency(rows.slice(row, 1)) - own.saliency.numpy()).max() <= 0.5 / 255 + 1e-4
        assert rows.column("prediction")[row].as_py() == model.config.class_names[int(own.prediction)]
    with (out / "rejected.csv").open(newline="") as file:
        rejected = list(csv.DictReader(file))
    assert [reject["id"] for reject in rejected] == BAD
    assert all(reject["reason"] for reject in rejected)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["program"], manifest["settings"]["beta"]) == ("mhex-vision", 0.5)
    assert "explained 4 of 7 inputs, 3 could not be read" in capsys.readouterr().out
    # Once more: nothing of what was written is an input.
    before = digests(out)
    assert batch(*options) == 3
    assert digests(out) == before


def test_bytes_do_not_depend_on_how_a_run_is_carried_out(run_folder, tmp_path, picture):
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(40):
        picture(seed).save(folder / f"{seed:02d}.png")
    found = []
    for number, (size, lanes) in enumerate(((16, 1), (40, 2), (7, 1))):
        options = {"batch_size": size, "lanes": lanes, "workers": 0, "shard_size": 24}
        summary = explain_many(run_folder, folder, tmp_path / f"out{number}", resolution="native", **options)
        assert (summary.inputs, summary.rows, summary.rejected) == (40, 40, 0)
        found.append(digests(summary.out))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 2


@pytest.mark.parametrize("kind", ["tar", "parquet", "list"])
def test_the_same_images_in_another_container_have_the_same_maps(
    run_folder, photos, tmp_path, picture, make_tar, encode, kind
):
    names = [f"{number}.png" for number in range(3)]
    data = [encode(picture(number)) for number in range(3)]
    for name, one in zip(names, data, strict=True):
        (tmp_path / name).write_bytes(one)
    if kind == "tar":
        place = make_tar(tmp_path / "a.tar", list(zip(names, data, strict=True)))
    elif kind == "parquet":
        place = tmp_path / "a.parquet"
        parquet.write_table(pa.table({"image": data, "name": names}), place)
    else:
        place = tmp_path / "list.txt"
        place.write_text("\n".join(names))
    assert batch("--checkpoint", run_folder, "--input", place, "--out", tmp_path / "one") == 0
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in names:
        shutil.copy(tmp_path / name, folder)
    assert batch("--checkpoint", run_folder, "--input", folder, "--out", tmp_path / "two") == 0
    first, second = table(tmp_path / "one"), table(tmp_path / "two")
    assert first.drop_columns(["id", "source"]).equals(second.drop_columns(["id", "source"]))
    assert not [name for name in first.column("id").to_pylist() if name.startswith("/")]


def test_a_medmnist_set_is_read_at_the_networks_size(run_folder, tmp_path, capsys):
    rng = np.random.default_rng(0)
    images = {f"{split}_images": rng.integers(0, 255, (4, 64, 64, 3), np.uint8) for split in ("train", "val", "test")}
    np.savez_compressed(tmp_path / "bloodmnist_64.npz", **images)
    options = ("--checkpoint", run_folder, "--input", "bloodmnist", "--root", tmp_path, "--no-download")
    assert batch(*options, "--split", "validation", "--target", "ring", "--out", tmp_path / "out") == 0
    assert table(tmp_path / "out").column("target").to_pylist() == ["ring"] * 4
    assert batch(*options, "--size", 128, "--out", tmp_path / "other") == 1
    assert "bloodmnist_128.npz" in capsys.readouterr().err


def test_an_interrupted_run_says_so_by_its_status(run_folder, photos, tmp_path, monkeypatch):
    from mhex_vision.bulk import command

    def interrupted(*arguments, **options):
        summary = explain_many(*arguments, **options)
        return type(summary)(**(vars(summary) | {"interrupted": True}))

    monkeypatch.setattr(command, "explain_many", interrupted)
    assert batch("--checkpoint", run_folder, "--input", photos, "--out", tmp_path / "out") == 130


def test_options_reach_the_engine(run_folder, photos, tmp_path, monkeypatch):
    from mhex_core import bulk

    seen = {}

    def record(job, out, *, options, say, complain):
        seen.update(job=job, out=out, options=options)
        raise RuntimeError("enough seen")

    monkeypatch.setattr(bulk, "run", record)
    monkeypatch.delenv("MKL_CBWR")
    line = "--autocast bfloat16 --compile --dtype float16 --resolution 20 --batch-size 8 --shard-size 64 --overwrite "
    line += "--address auto"
    place = ("--checkpoint", run_folder, "--input", photos, "--out", tmp_path / "out")
    assert batch(*place, *line.split()) == 1
    assert os.environ["MKL_CBWR"] == "AUTO"
    options, job = seen["options"], seen["job"]
    assert (options.batch_size, options.shard_size, options.workers, options.lanes) == (8, 64, 0, 1)
    assert (options.engine, options.address, options.overwrite) == ("ray", "auto", True)
    assert (job.autocast, job.compile, job.dtype, job.resolution) == ("bfloat16", True, "float16", 20)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("--shard-size 0", "--shard-size must be at least 1, got 0"),
        ("--resolution tiny", "--resolution must be full, native or a side in pixels, got 'tiny'"),
        ("--resolution 0", "--resolution must be full, native or a side in pixels, got '0'"),
        ("--address auto --engine embedded", "--address must come with --engine ray, got --engine embedded"),
        ("--target square", "--target must be one of the classes (disc, ring, cross) or its number, got 'square'"),
        ("--beta 2", "beta"),
        ("--image-column x", "--image-column must come with Parquet files"),
        ("--input nowhere", "there is no nowhere"),
        ("--checkpoint nowhere", "there is no folder nowhere"),
    ],
)
def test_an_error_is_one_line_and_leaves_no_folder(run_folder, photos, tmp_path, capsys, line, expected):
    place = ("--checkpoint", run_folder, "--input", photos, "--out", tmp_path / "out")
    assert batch(*place, *line.split()) == 1
    (complaint,) = capsys.readouterr().err.splitlines()
    assert complaint.startswith("mhex-vision: error: ")
    assert expected in complaint
    assert not (tmp_path / "out").exists()


def test_another_run_is_not_mixed_in(run_folder, photos, tmp_path, capsys):
    place = ("--checkpoint", run_folder, "--input", photos, "--out", tmp_path / "out")
    assert batch(*place) == 3
    assert batch(*place, "--dtype", "float16") == 1
    assert "another dtype" in capsys.readouterr().err
    assert batch(*place, "--dtype", "float16", "--overwrite") == 3

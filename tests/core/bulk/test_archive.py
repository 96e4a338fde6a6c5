"""Rows chosen out of what a run wrote."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from mhex_core.bulk import Archive, BulkOptions, RowChoice, run

from .jobs import NumberJob, write_inputs

COUNT = 330
BAD = (0, 5, 64, 65, 66, 329)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The archive of 324 numbers in four files."""
    inputs = write_inputs(tmp_path_factory.mktemp("numbers") / "in", COUNT, damaged=BAD)
    out = tmp_path_factory.mktemp("archive") / "out"
    run(NumberJob(inputs), out, options=BulkOptions(workers=0, shard_size=100, lanes=1))
    return out


def chosen(folder, **choice):
    return Archive.open(folder, program="numbers").choose(RowChoice(**choice))


def indices(rows):
    return [index for table in rows.tables() for index in table["index"].to_pylist()]


def test_a_choice_by_chance_is_fair_and_repeats(folder):
    rows = chosen(folder, samples=40, seed=3)
    assert (len(rows), rows.among) == (40, COUNT - len(BAD))
    assert rows.description == "40 of 324 rows by chance (seed 3)"
    found = indices(rows)
    assert found == sorted(set(found))
    assert not set(found) & set(BAD)
    assert indices(chosen(folder, samples=40, seed=3)) == found
    assert indices(chosen(folder, samples=40, seed=4)) != found
    # Every file and every place in a file is chosen about as often: 400 choices of 40 rows of 324.
    hits = np.zeros(COUNT)
    for seed in range(400):
        hits[[100 * file + row for file, row in chosen(folder, samples=40, seed=seed).places]] += 1
    per_file = [hits[low : low + 100].sum() for low in (0, 100, 200, 300)]
    expected = 400 * 40 * np.array([95, 100, 100, 29]) / 324
    np.testing.assert_allclose(per_file, expected, rtol=0.06)


def test_all_rows_where_there_are_no_more(folder):
    rows = chosen(folder, samples=1000)
    assert indices(rows) == [index for index in range(COUNT) if index not in BAD]
    assert rows.description == "all 324 rows"


def test_where_inputs_lie(folder):
    archive = Archive.open(folder, program="numbers")
    for table in archive.choose(RowChoice(samples=25)).tables():
        entries = archive.entries(table)
        for name in ("id", "source"):
            assert entries.column(name).to_pylist() == table[name].to_pylist()
        other = table.set_column(table.schema.get_field_index("id"), "id", pa.array(["x"] * table.num_rows))
        with pytest.raises(ValueError, match="is not the list of the inputs"):
            archive.entries(other)


def test_what_is_no_archive(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no"):
        Archive.open(tmp_path / "none", program="numbers")
    with pytest.raises(ValueError, match=r"there is no manifest\.json"):
        Archive.open(tmp_path, program="numbers")
    with pytest.raises(ValueError, match="was written by `numbers batch`, which has a report of its own"):
        Archive.open(folder, program="mhex-vision")
    with pytest.raises(TypeError, match="archive must be a folder, got int"):
        Archive.open(3, program="numbers")


def test_damaged_files_and_archives_without_rows(folder, tmp_path):
    (tmp_path / "data").mkdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="archive must hold rows, and there is none in"):
        chosen(tmp_path)
    (tmp_path / "data" / "part-000000.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"part-000000\.parquet is damaged: .*; the same batch command makes it anew"):
        chosen(tmp_path)


@pytest.mark.parametrize(
    ("choice", "kind", "message"),
    [
        ({"samples": 0}, ValueError, "samples must be"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": True}, TypeError, "seed must be an int, got bool"),
        ({"doubtful": 1}, TypeError, "doubtful must be a bool, got int"),
        ({"predicted": 3}, TypeError, "predicted must be the name of a class or None, got int"),
    ],
)
def test_what_is_no_choice(choice, kind, message):
    with pytest.raises(kind, match=message):
        RowChoice(**choice)

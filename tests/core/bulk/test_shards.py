from __future__ import annotations

import errno

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from mhex_core.bulk import shards
from mhex_core.bulk.job import ENTRY
from mhex_core.bulk.plan import LISTING_FILE, RunPlan, write_listing
from mhex_core.bulk.shards import ShardWriter, committed, rejects, rows_of_group

SCHEMA = pa.schema([pa.field("name", pa.string()), pa.field("maps", pa.list_(pa.uint8()))], metadata={"k": "v"})
WIDTH = 300


def rows(numbers):
    values = np.repeat(np.asarray(list(numbers), np.uint8), WIDTH)
    maps = pa.ListArray.from_arrays(pa.array(range(0, len(values) + 1, WIDTH), pa.int32()), pa.array(values))
    return pa.RecordBatch.from_arrays([pa.array([f"n{number}" for number in numbers]), maps], schema=SCHEMA)


@pytest.fixture
def plan(tmp_path):
    entries = [{"id": f"i{n}", "source": f"s{n}", "place": n, "length": -1, "problem": None} for n in range(250)]
    write_listing(tmp_path / LISTING_FILE, iter([pa.RecordBatch.from_pylist(entries, ENTRY)]), lambda _: None)
    (tmp_path / "data").mkdir()
    return RunPlan(out=tmp_path, inputs=250, shard_size=100, digest="this run")


def writer(plan, number=1):
    return ShardWriter(plan, number, plan.entries(number), SCHEMA, WIDTH)


def write(plan, cuts, *, number=1, bad=(3, 50), in_order=True):
    good = [place for place in range(100) if place not in bad]
    with writer(plan, number) as shard:
        for start, stop in zip([0, *cuts], [*cuts, len(good)], strict=True):
            shard.add(good[start:stop], rows(good[start:stop]), in_order=in_order)
        for place in bad:
            shard.reject(place, f"bad\n {place}")
        return shard.commit(model_seconds=2.0)


def test_a_shard_holds_its_rows_and_what_could_not_be_read(plan):
    record = write(plan, [10, 60])
    assert (record.number, record.rows, record.rejected, record.model_seconds) == (1, 98, 2, 2.0)
    assert record.bytes == plan.path(1).stat().st_size
    table = parquet.read_table(plan.path(1))
    assert table.column_names == ["index", "id", "source", "name", "maps"]
    assert table["index"].to_pylist() == [n for n in range(100, 200) if n not in (103, 150)]
    assert table["id"].to_pylist()[3:5] == ["i104", "i105"]
    assert table["maps"][97].as_py() == [99] * WIDTH
    assert table.schema.metadata[b"k"] == b"v"
    found, damaged = committed(plan)
    assert damaged == []
    assert found == {1: shards.ShardRecord(number=1, rows=98, rejected=2, bytes=record.bytes)}
    assert [(r.index, r.id, r.source, r.reason) for r in rejects(plan, [1])] == [
        (103, "i103", "s103", "bad 3"),
        (150, "i150", "s150", "bad 50"),
    ]


def test_the_bytes_do_not_depend_on_how_rows_came(plan):
    write(plan, [])
    once = plan.path(1).read_bytes()
    for cuts in ([1, 2, 90], [33], list(range(1, 98))):
        write(plan, cuts)
        assert plan.path(1).read_bytes() == once
    write(plan, [17, 40], in_order=False)
    assert plan.path(1).read_bytes() == once
    good = [place for place in range(100) if place not in (3, 50)]
    with writer(plan) as shard:
        for part in (good[1::2], good[::2]):
            shard.add(part, rows(part), in_order=False)
        shard.reject(50, "bad 50")
        shard.reject(3, "bad 3")
        shard.commit()
    assert plan.path(1).read_bytes() == once


def test_row_groups_are_of_one_size(plan, monkeypatch):
    monkeypatch.setattr(shards, "_GROUP_BYTES", WIDTH * 40)
    assert rows_of_group(WIDTH) == 40
    write(plan, [39, 41, 45], bad=())
    groups = parquet.ParquetFile(plan.path(1)).metadata
    assert [groups.row_group(number).num_rows for number in range(groups.num_row_groups)] == [40, 40, 20]


def test_a_shard_without_rows_is_a_shard(plan):
    with writer(plan, 2) as shard:
        for place in range(50):
            shard.reject(place, "no")
        assert shard.commit().rows == 0
    assert committed(plan)[0][2].rejected == 50
    assert parquet.read_table(plan.path(2)).num_rows == 0


def test_what_is_not_committed_leaves_nothing(plan):
    def interrupted():
        with writer(plan) as shard:
            shard.add([0, 1], rows([0, 1]))
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    with writer(plan) as shard:
        shard.add([0], rows([0]))
        with pytest.raises(RuntimeError, match="a row or a reason for each of 100 inputs, got 1 rows and 0"):
            shard.commit()
    assert list((plan.out / "data").iterdir()) == []


def test_a_full_disk_leaves_nothing(plan, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(plan, [])
    assert list((plan.out / "data").iterdir()) == []


def test_a_shard_of_another_run_is_refused_and_a_damaged_one_found(plan):
    write(plan, [])
    write(plan, [], number=0)
    for text in (b"", b"PAR1", plan.path(1).read_bytes()[:-20]):
        plan.path(1).write_bytes(text)
        found, damaged = committed(plan)
        assert (sorted(found), damaged) == ([0], [plan.path(1)])
    plan.path(1).unlink()
    other = RunPlan(out=plan.out, inputs=250, shard_size=100, digest="another")
    with pytest.raises(ValueError, match=r"part-000000\.parquet belongs to another run"):
        committed(other)


def test_a_shard_is_written_once(plan):
    with writer(plan) as shard:
        shard.add(range(100), rows(range(100)))
        shard.commit()
        with pytest.raises(RuntimeError, match="written already"):
            shard.commit()


def test_numbers_in_lists_are_laid_out_for_their_kind(plan):
    word = pa.struct([("text", pa.string()), ("start", pa.int32()), ("score", pa.float32())])
    schema = pa.schema([("maps", pa.list_(pa.list_(pa.uint8()))), ("words", pa.list_(word)), ("one", pa.float32())])
    assert dict(shards.encodings(schema)) == {
        "maps.list.element.list.element": "DELTA_BINARY_PACKED",
        "words.list.element.start": "DELTA_BINARY_PACKED",
        "words.list.element.score": "BYTE_STREAM_SPLIT",
    }
    write(plan, [])
    group = parquet.ParquetFile(plan.path(1)).metadata.row_group(0)
    columns = {group.column(place).path_in_schema: group.column(place).encodings for place in range(group.num_columns)}
    assert "DELTA_BINARY_PACKED" in columns["maps.list.element"]

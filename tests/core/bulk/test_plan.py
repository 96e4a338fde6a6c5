from __future__ import annotations

import pickle

import pyarrow as pa
import pytest

from mhex_core.bulk.job import ENTRY
from mhex_core.bulk.plan import RunPlan, count_listed, default_shard_size, digest_of, read_listing, write_listing


def batches(*sizes):
    start = 0
    for size in sizes:
        rows = [
            {"id": f"i{number}", "source": "file", "place": number, "length": -1, "problem": None}
            for number in range(start, start + size)
        ]
        yield pa.RecordBatch.from_pylist(rows, ENTRY)
        start += size


def places(path, start, stop):
    return read_listing(path, start, stop).column("place").to_pylist()


@pytest.mark.parametrize("sizes", [(), (0,), (1,), (4096,), (4095, 1, 1), (3, 0, 9000), (100,) * 90])
def test_entries_are_found_wherever_they_lie(tmp_path, sizes):
    path, told = tmp_path / "list", []
    count = write_listing(path, batches(*sizes), told.append)
    assert count == sum(sizes) == count_listed(path)
    assert told == sorted(told)
    assert not told or told[-1] == count
    for start, stop in [(0, count), (0, 1), (4095, 4097), (4090, 8200), (count - 1, count)]:
        start, stop = max(0, start), min(stop, count)
        if start < stop:
            assert places(path, start, stop) == list(range(start, stop))


def test_a_listing_that_fails_leaves_nothing(tmp_path):
    def failing():
        yield from batches(5000)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_listing(tmp_path / "list", failing(), lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_listing_is_named(tmp_path):
    path = tmp_path / "list"
    write_listing(path, batches(5000), lambda _: None)
    path.write_bytes(path.read_bytes()[:-50])
    for read in (count_listed, lambda file: read_listing(file, 0, 5)):
        with pytest.raises(ValueError, match=r"list is damaged: .*overwrite"):
            read(path)


def test_shards_cover_all_inputs_once(tmp_path):
    plan = RunPlan(out=tmp_path, inputs=1001, shard_size=100, digest="x")
    assert plan.shards() == 11
    covered = [number for shard in range(11) for number in range(*plan.bounds(shard))]
    assert covered == list(range(1001))
    assert plan.path(7) == tmp_path / "data" / "part-000007.parquet"
    with pytest.raises(ValueError, match=r"number must lie in \[0, 10\], got 11"):
        plan.bounds(11)
    assert pickle.loads(pickle.dumps(plan)) == plan


@pytest.mark.parametrize(("input_bytes", "size"), [(1, 4096), (3 * 28 * 28, 4096), (3 * 224 * 224, 512), (10**9, 64)])
def test_a_shard_fits_into_memory(input_bytes, size):
    assert default_shard_size(input_bytes) == size


def test_the_digest_knows_settings_list_and_shard_size(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    write_listing(one, batches(10), lambda _: None)
    write_listing(two, batches(11), lambda _: None)
    known = digest_of({"a": 1, "b": [2]}, one, 8)
    assert known == digest_of({"b": [2], "a": 1}, one, 8)
    assert len({known, digest_of({"a": 2}, one, 8), digest_of({"a": 1, "b": [2]}, two, 8), digest_of({}, one, 9)}) == 4

from __future__ import annotations

import io
import sys

import pytest

from mhex_core.bulk import progress as module
from mhex_core.bulk.progress import Progress, duration, size
from mhex_core.bulk.shards import ShardRecord


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_there_is_a_line_a_minute(clock):
    lines = []
    with Progress(10_000, lines.append, lambda _: None) as progress:
        for _ in range(10):
            clock[0] += 12
            progress.advance(240)
    assert lines == ["1,200 of 10,000, 20.0 a second, 7:20 min left", "2,400 of 10,000, 20.0 a second, 6:20 min left"]


def test_in_a_terminal_there_is_a_bar_and_no_line(monkeypatch):
    lines = []
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(500, lines.append, lambda _: None) as progress:
        progress.advance(500)
        assert "| 0/500" in sys.stderr.getvalue()
    assert sys.stderr.getvalue().split("\r")[-2].strip() == "", "the bar is gone when all is done"
    assert lines == []


def test_whoever_says_nothing_shows_nothing(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(500, None, lambda _: None) as progress:
        clock[0] += 500
        progress.advance(500)
    assert sys.stderr.getvalue() == ""


def test_shards_are_added_up_and_handed_on():
    seen = []
    with Progress(10, None, seen.append) as progress:
        for number in range(3):
            progress.shard_done(ShardRecord(number=number, rows=3, rejected=1, bytes=10, model_seconds=0.5))
    assert (progress.rows, progress.rejected, progress.bytes, progress.model_seconds) == (9, 3, 30, 1.5)
    assert [record.number for record in seen] == [0, 1, 2]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (60, "1:00 min"), (3599, "59:59 min"), (7260, "2:01 h")]
)
def test_seconds_for_people(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1000, "1.0 kB"), (2.5e6, "2.5 MB"), (3e9, "3.0 GB"), (4.2e15, "4200.0 TB")]
)
def test_bytes_for_people(count, text):
    assert size(count) == text

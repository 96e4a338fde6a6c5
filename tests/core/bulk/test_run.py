from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pytest
import torch
from torch.utils.data import DataLoader

from mhex_core.bulk import Archive, BulkOptions, RowChoice, embedded, run, told
from mhex_core.bulk import pipeline as pipelines
from mhex_core.bulk.job import BATCH_STEP, join, pad, padded_rows, pick
from mhex_core.bulk.progress import Progress
from mhex_core.files import from_cell, partial_of

from .jobs import NumberJob, write_inputs

COUNT = 330
BAD = (0, 5, 64, 65, 66, 329)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("numbers") / "in", COUNT, damaged=BAD)


@pytest.fixture
def job(inputs):
    return NumberJob(inputs)


def options(**changes):
    return BulkOptions(**{"workers": 0, "shard_size": 100, "lanes": 2} | changes)


# A process that is killed may leave half a connection in multiprocessing's hands.
half_a_connection = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


def fingerprint(out):
    """Every visible file of a run, to the byte."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    run(NumberJob(inputs), out, options=options())
    return fingerprint(out)


def test_every_input_has_a_row_or_a_reason(job, tmp_path):
    lines = []
    summary = run(job, tmp_path / "out", options=options(), say=lines.append)
    assert (summary.inputs, summary.rows, summary.rejected) == (COUNT, COUNT - len(BAD), len(BAD))
    assert (summary.done_before, summary.interrupted) == (0, False)
    assert summary.rate > 0
    table = pyarrow.dataset.dataset(tmp_path / "out" / "data").to_table()
    assert table["index"].to_pylist() == [n for n in range(COUNT) if n not in BAD]
    assert table["id"].to_pylist()[0] == "00001"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["complete"]
    assert (manifest["rows"], manifest["rejected"], manifest["shard_size"]) == (summary.rows, len(BAD), 100)
    assert [shard["rows"] for shard in manifest["shards"]] == [95, 100, 100, 29]
    rejected = (tmp_path / "out" / "rejected.csv").read_text().splitlines()
    assert rejected[0] == "index,id,source,reason"
    assert [line.split(",")[0] for line in rejected[1:]] == [str(n) for n in BAD]
    assert rejected[1].endswith("not a number: seven")
    assert lines[0] == "330 inputs"
    assert told(summary, "numbers")[0].startswith("explained 324 of 330 inputs, 6 could not be read; ")


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 1},
        {"batch_size": 7},
        {"batch_size": 300},
        {"workers": 1},
        {"workers": 3, "lanes": 4},
        {"lanes": 1},
    ],
    ids=str,
)
def test_the_files_do_not_depend_on_how_it_is_done(job, tmp_path, whole, changes):
    out = tmp_path / "out"
    run(job, out, options=options(**changes))
    assert fingerprint(out) == whole


def test_groups_change_who_meets_whom_and_nothing_else(job, tmp_path, whole):
    out, again = tmp_path / "out", tmp_path / "again"
    run(replace(job, as_text=True), out, options=options(batch_size=32))
    run(replace(job, as_text=True), again, options=options(batch_size=5, workers=1))
    assert fingerprint(out) == fingerprint(again)
    tables = [pyarrow.dataset.dataset(folder / "data").to_table() for folder in (out, again)]
    assert tables[0]["index"].to_pylist() == [n for n in range(COUNT) if n not in BAD]
    assert tables[0].equals(tables[1])


def test_a_run_that_is_done_does_nothing(job, tmp_path, whole):
    out = tmp_path / "out"
    run(job, out, options=options())
    summary = run(replace(job, fail_at=1), out, options=options(shard_size=None))
    assert (summary.done_before, summary.rows, summary.rate) == (COUNT, 324, 0.0)
    assert fingerprint(out) == whole


def test_what_is_missing_or_damaged_is_made_again(job, tmp_path, whole):
    out, lines = tmp_path / "out", []
    run(job, out, options=options())
    (out / "data" / "part-000001.parquet").unlink()
    (out / "data" / "part-000003.parquet").write_bytes(b"PAR1")
    partial_of(out / "data" / "part-000001.parquet").touch()
    partial_of(out / "manifest.json").touch()
    (out / "rejected.csv").unlink()
    summary = run(job, out, options=options(), complain=lines.append)
    assert summary.done_before == 200
    assert fingerprint(out) == whole
    assert lines == [f"{out}/data/part-000003.parquet is damaged and is made anew"]


def test_what_others_put_there_stays(job, tmp_path, whole):
    """Whatever it is called; an exact name of its own is what a run knows its files by."""
    out = tmp_path / "out"
    run(job, out, options=options())
    theirs = [
        ".notes.important123",
        ".part-000001.parquet.0123456789ab",
        ".letter.0123456789ab.mhex-partial",
        ".ray-keep",
    ]
    for name in theirs:
        (out / name).write_text("mine")
        (out / "data" / name).write_text("mine")
    (out / "data" / "part-000001.parquet").unlink()
    run(job, out, options=options())
    run(job, out, options=options(overwrite=True))
    assert {path.read_text() for name in theirs for path in (out / name, out / "data" / name)} == {"mine"}
    assert {name: value for name, value in fingerprint(out).items() if Path(name).name not in theirs} == whole
    # What looks like a shard and is none is nobody's to remove, and would be read with the others.
    (out / "data" / "part-of-my-own.parquet").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"part-of-my-own.parquet is no shard of this run.*move it elsewhere"):
        run(job, out, options=options())
    with pytest.raises(ValueError, match="must be empty or hold a run of this kind, got data in it"):
        run(job, out, options=options(overwrite=True))
    assert (out / "data" / "part-of-my-own.parquet").read_bytes() == b"mine"


def test_a_run_over_other_inputs_is_another_run(job, inputs, tmp_path, whole, monkeypatch):
    out = tmp_path / "out"
    begun = replace(job, about={"input": str(inputs)})
    run(begun, out, options=options())
    with pytest.raises(ValueError, match=rf"holds a run over {re.escape(str(inputs))}, not elsewhere; choose another"):
        run(replace(job, about={"input": "elsewhere"}), out, options=options())
    monkeypatch.chdir(inputs.parent)
    assert run(replace(job, about={"input": inputs.name}), out, options=options()).done_before == COUNT


def test_threads_are_as_many_as_before(job, tmp_path):
    """Of a thread that begins after a run, too, and of one that failed."""

    def of_a_new_thread():
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(torch.get_num_threads).result()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert of_a_new_thread() == 3
        run(job, tmp_path / "out", options=options())
        assert (torch.get_num_threads(), of_a_new_thread()) == (3, 3)
        with pytest.raises(ArithmeticError):
            run(replace(job, fail_at=150), tmp_path / "other", options=options())
        assert (torch.get_num_threads(), of_a_new_thread()) == (3, 3)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.rename_columns(["line"]),
        lambda rows: rows.set_column(0, "row", rows.column(0).cast(pa.list_(pa.float64()))),
        lambda rows: rows.append_column("more", pa.nulls(rows.num_rows)),
    ],
    ids=["name", "type", "number"],
)
def test_columns_are_those_of_the_schema(job, tmp_path, change, monkeypatch):
    kind = type(job.model(torch.device("cpu"), batch_size=16))
    right = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, values: change(right(self, values)))
    with pytest.raises(ValueError, match=r"the model must give the columns of the job's schema \(row: list<.*\), got"):
        run(job, tmp_path / "out", options=options())


def test_two_threads_do_not_write_to_one_folder(job, tmp_path, whole):
    out = tmp_path / "out"
    with ThreadPoolExecutor(2) as threads:
        tries = [threads.submit(run, replace(job, think=0.02), out, options=options()) for _ in range(2)]
        failed = [error for one in tries if (error := one.exception()) is not None]
    (error,) = failed
    assert "is being written to by another thread of this process" in str(error)
    assert fingerprint(out) == whole
    assert run(job, out, options=options()).done_before == COUNT


def test_inputs_that_come_later_do_not_move_the_others(job, inputs, tmp_path, whole):
    out, own = tmp_path / "out", tmp_path / "in"
    shutil.copytree(inputs, own)
    run(replace(job, folder=own), out, options=options())
    first = fingerprint(out)
    (own / "00000a.txt").write_text("5")
    (out / "data" / "part-000002.parquet").unlink()
    run(replace(job, folder=own), out, options=options())
    assert fingerprint(out) == first


def test_a_model_that_raises_ends_the_run_and_loses_nothing(job, tmp_path, whole):
    out = tmp_path / "out"
    with pytest.raises(ArithmeticError, match="cannot explain 150"):
        run(replace(job, fail_at=150), out, options=options())
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    assert not [path for path in (out / "data").iterdir() if path.name.startswith(".")]
    summary = run(job, out, options=options())
    assert 0 < summary.done_before < COUNT
    assert fingerprint(out) == whole
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mhex")]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reader_that_raises_ends_the_run_with_its_own_words(job, tmp_path, workers, monkeypatch):
    def raising(self, entries):
        raise kind("the list lies")

    class OfALibraryError(Exception):
        """That no other process knows."""

    monkeypatch.setattr(type(job.reader()), "__call__", raising)
    for kind in (ValueError, ZeroDivisionError, AssertionError):
        with pytest.raises(kind, match=r"^the list lies$"):
            run(job, tmp_path / "out", options=options(workers=workers))
    kind = OfALibraryError
    with pytest.raises(RuntimeError, match=r"^OfALibraryError: the list lies$"):
        run(job, tmp_path / "out", options=options(workers=workers))


@half_a_connection
def test_a_process_that_reads_may_die(job, tmp_path, whole):
    out = tmp_path / "out"
    run(replace(job, die_at=250, die_once=tmp_path), out, options=options(workers=1))
    assert (tmp_path / "died").exists()
    assert fingerprint(out) == whole


@half_a_connection
@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="the death of a child is no signal here")
def test_and_be_found_dead_while_handing_over(job, tmp_path, whole, monkeypatch):
    # For a moment a killed process is neither gone nor there: the socket that its tensors come through notices first.
    # Here the moment lasts: the system's news of the death is kept back.
    assert list(DataLoader([0], batch_size=None, num_workers=1)) == [0]  # torch's handler is there now
    handler = signal.signal(signal.SIGCHLD, lambda *_: None)
    alive, received = BaseProcess.is_alive, embedded._received
    causes = []

    def watched(stream, heard):
        try:
            yield from received(stream, heard)
        except RuntimeError as error:
            causes.append(error.__cause__)
            raise

    monkeypatch.setattr(BaseProcess, "is_alive", lambda process: not causes or alive(process))
    monkeypatch.setattr(embedded, "_received", watched)
    out = tmp_path / "out"
    slow = replace(job, die_at=250, die_once=tmp_path, think=0.1)
    try:
        run(slow, out, options=options(workers=1, lanes=1, batch_size=16))
    finally:
        signal.signal(signal.SIGCHLD, handler)
    assert fingerprint(out) == whole
    assert len(causes) == 1
    assert isinstance(causes[0], OSError)


@half_a_connection
@pytest.mark.parametrize("die_at", [250, (1, 7, 250, 251)])
def test_what_kills_every_process_that_reads_it_is_left_out_by_name(job, tmp_path, die_at):
    out = tmp_path / "out"
    summary = run(replace(job, die_at=die_at), out, options=options(workers=1))
    names = {f"{number:05d}" for number in (die_at if isinstance(die_at, tuple) else (die_at,))}
    with (out / "rejected.csv").open() as file:
        reasons = {row["id"]: row["reason"] for row in csv.DictReader(file)}
    assert {name for name, reason in reasons.items() if "was killed, twice" in reason} == names
    assert (summary.rows, summary.rejected) == (COUNT - len(BAD) - len(names), len(BAD) + len(names))


@half_a_connection
def test_but_not_for_ever(job, tmp_path, monkeypatch):
    """A reader that does not leave out what it is told to."""
    monkeypatch.setattr(embedded, "_DEADLY", None)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        run(replace(job, die_at=250), tmp_path / "out", options=options(workers=1))
    assert sorted(path.name for path in (tmp_path / "out" / "data").glob("part*"))[:1] == ["part-000000.parquet"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_finishes_the_shard_in_hand(job, tmp_path, whole, number, monkeypatch):
    out, lines = tmp_path / "out", []
    take = Progress.shard_done

    def taken(self, record):
        take(self, record)
        if not self.stopping:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Progress, "shard_done", taken)
    before = signal.getsignal(number)
    slow = replace(job, nap=0.003)
    summary = run(slow, out, options=options(workers=1, batch_size=16), complain=lines.append)
    monkeypatch.undo()
    assert summary.interrupted
    assert 0 < summary.rows + summary.rejected < COUNT
    assert lines == ["stopping once the shards in hand are written; again to stop at once"]
    assert told(summary, "numbers")[-1] == "the same numbers command goes on with what is left"
    assert signal.getsignal(number) is before
    run(job, out, options=options())
    assert fingerprint(out) == whole


def test_asked_twice_it_stops_at_once(job, tmp_path, whole):
    out = tmp_path / "out"

    def ask():
        os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()

    threading.Timer(0.3, ask).start()
    with pytest.raises(KeyboardInterrupt):
        run(replace(job, nap=0.02), out, options=options())
    assert not [path for path in (out / "data").iterdir() if path.name.startswith(".")]
    run(job, out, options=options())
    assert fingerprint(out) == whole


# ------------------------------------------------------------------------------------------------------- the folder


def test_another_run_is_not_overwritten_unless_asked(job, tmp_path, whole):
    out = tmp_path / "out"
    run(replace(job, as_text=True), out, options=options())
    with pytest.raises(ValueError, match=r"holds a run with another as_text \(True, not False\)"):
        run(job, out, options=options())
    run(job, out, options=options(overwrite=True))
    assert fingerprint(out) == whole


def test_other_versions_are_told_and_those_at_the_beginning_kept(job, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(job, out, options=options())
    begun = json.loads((out / "manifest.json").read_text())["versions"]
    assert torch.__version__.startswith(begun["torch"])
    assert begun["saliency"] in ("native", "reference")
    other = dict(begun) | {"saliency": "abacus"}
    for module in ("driver", "manifest"):
        monkeypatch.setattr(f"mhex_core.bulk.{module}.versions", lambda: other)
    complaints = []
    run(job, out, options=options(), complain=complaints.append)
    assert complaints == [f"{out} was begun with saliency {begun['saliency']}; with abacus last digits may differ"]
    assert json.loads((out / "manifest.json").read_text())["versions"] == begun


def test_the_shard_size_stays(job, tmp_path):
    run(job, tmp_path / "out", options=options())
    with pytest.raises(ValueError, match=r"shard_size must be 100, with which the run in .* began, got 50"):
        run(job, tmp_path / "out", options=options(shard_size=50))


def test_a_folder_with_something_else_is_left_alone(job, tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"must be empty or hold a run of this kind, got thesis\.tex in it"):
            run(job, tmp_path, options=options(overwrite=overwrite))
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="is no manifest of such a run"):
        run(job, tmp_path, options=options(overwrite=True))
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_a_list_that_was_changed_is_noticed(job, tmp_path):
    run(job, tmp_path / "out", options=options())
    other = tmp_path / "other"
    run(replace(job, folder=write_inputs(tmp_path / "in", 10)), other, options=options())
    shutil.copy(other / "inputs.arrow", tmp_path / "out" / "inputs.arrow")
    with pytest.raises(ValueError, match="was changed since the run"):
        run(job, tmp_path / "out", options=options())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"about": None}, "about must be dict, got 'None'"),
        ({"about": {"class_names": "abc"}}, r"about\.class_names must be a list of texts, got 'abc'"),
        ({"about": {"class_names": [1]}}, r"about\.class_names must be a list of texts"),
        ({"settings": []}, r"settings must be dict, got '\[\]'"),
        ({"versions": "1"}, "versions must be dict"),
        ({"shard_size": 0}, "shard_size must be at least 1, got 0"),
        ({"shard_size": 1e9}, "shard_size must be int"),
        ({"inputs": -5}, "inputs must be at least 1, got -5"),
        ({"inputs": 10**400}, "inputs must be at least 1, got 1000"),
        ({"inputs": True}, "inputs must be"),
        ({"digest": 5}, "digest must be"),
        ({"columns": {"row": 3}}, "columns must name types"),
        ({"shards": None}, "shards must be list"),
        ({"program": ...}, "'program' is missing"),
        ({"version": 2}, "format 'mhex-bulk', version 2"),
    ],
)
def test_a_damaged_manifest_is_named(job, tmp_path, change, message):
    out = tmp_path / "out"
    run(job, out, options=options())
    path = out / "manifest.json"
    held = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in held.items() if value is not ...}))
    for call in (lambda: run(job, out, options=options()), lambda: Archive.open(out, program="numbers")):
        with pytest.raises(ValueError, match=rf"manifest\.json is no manifest of such a run \(.*{message}"):
            call()


def test_a_manifest_that_is_no_text(job, tmp_path):
    (tmp_path / "out").mkdir()
    for content in (b"\xff\xfe", b"[" * 10**5, b"null", b"[]", b'"format"'):
        (tmp_path / "out" / "manifest.json").write_bytes(content)
        with pytest.raises(ValueError, match="is no manifest of such a run"):
            run(job, tmp_path / "out", options=options())


def test_a_spreadsheet_sees_no_formula(job, inputs, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    names = ["=1+1", "+5", "-5", "@SUM", "'quoted", "plain", "\ttab"]
    for name in names:
        (folder / f"{name}.txt").write_text("word")
    run(replace(job, folder=folder), tmp_path / "out", options=options())
    with (tmp_path / "out" / "rejected.csv").open(newline="") as file:
        cells = [row["id"] for row in csv.DictReader(file)]
    assert [cell for cell in cells if not cell.startswith("'")] == ["plain"]
    assert sorted(map(from_cell, cells)) == sorted(names)


def test_a_flipped_bit_in_a_shard_is_noticed(job, inputs, tmp_path):
    """Where rows are, checksums tell; the footer has none."""
    out = tmp_path / "out"
    run(job, out, options=options())
    (path,) = (out / "data").glob("part-000000.parquet")
    data = path.read_bytes()
    right = pa.parquet.ParquetFile(path, page_checksum_verification=True).read()
    archive = Archive.open(out, program="numbers")
    places = range(4, len(data) - int.from_bytes(data[-8:-4], "little") - 8, 97)
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        problem = ""
        try:
            read = pa.concat_tables(archive.choose(RowChoice(samples=10**4)).tables())
        except ValueError as error:
            problem = str(error)
        assert "is damaged" in problem or read.slice(0, right.num_rows).equals(right), place


def test_nothing_to_explain_is_said(job, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="nothing to explain"):
        run(replace(job, folder=tmp_path / "empty"), tmp_path / "out", options=options())


def test_a_place_that_cannot_be_written_to_is_said_at_once(job, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to .*file/out"):
        run(job, tmp_path / "file" / "out", options=options())


def test_two_processes_do_not_write_to_one_folder(job, tmp_path, python):
    out = tmp_path / "out"
    run(job, out, options=options())
    script = (
        "import sys\nfrom mhex_core.bulk.driver import _held\nfrom pathlib import Path\n"
        f"try:\n    with _held(Path({str(out)!r})): pass\nexcept OSError as error: print(error)"
    )
    from mhex_core.bulk.driver import _held

    with _held(out):
        done = python.run("-c", script)
    assert done.stdout.strip() == f"{out} is being written to by another process"
    assert python.run("-c", script).stdout == ""


def test_too_little_space_is_said_after_the_first_shard(job, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=2000)
    monkeypatch.setattr("mhex_core.bulk.driver.shutil.disk_usage", lambda _: free)
    with pytest.raises(OSError, match=r"has 2\.0 kB free, and the 230 inputs left will take about .* kB; make room"):
        run(job, tmp_path / "out", options=options(lanes=1))
    free = free._replace(free=10)
    with pytest.raises(OSError, match=r"has 10 B free, and a shard of 100 rows will take about"):
        run(job, tmp_path / "other", options=options())
    assert not list((tmp_path / "other" / "data").iterdir())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"workers": -1}, ValueError, "workers must be at least 0, got -1"),
        ({"workers": 1.5}, TypeError, "workers must be an int or None, got float"),
        ({"workers": 10**5}, ValueError, r"workers must be at most \d+, 4 for each processor, got 100000"),
        ({"lanes": 10**5}, ValueError, r"lanes must be at most \d+, 4 for each processor, got 100000"),
        ({"lanes": True}, TypeError, "lanes must be an int, got bool"),
        ({"engine": "spark"}, ValueError, "engine must be one of 'embedded', 'ray', got 'spark'"),
        ({"address": "auto"}, ValueError, "address must come with the engine 'ray', got 'embedded'"),
        ({"overwrite": 1}, TypeError, "overwrite must be a bool, got int"),
    ],
)
def test_wrong_options_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        BulkOptions(**changes)


# ----------------------------------------------------------------------------------------------------------- batches


def test_values_are_filled_up_joined_and_picked():
    values = torch.arange(6).reshape(3, 2)
    assert pad(values, 5).tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]]
    assert pad(["a", "b"], 3) == ["a", "b", "b"]
    assert pad(values, 3) is values
    assert join([values, values]).shape == (6, 2)
    assert join([["a"], ["b"]]) == ["a", "b"]
    assert pick(values, [0, 2]).tolist() == [[0, 1], [4, 5]]
    assert pick(values, [1, 2]).data_ptr() == values[1:].data_ptr()
    assert pick(["a", "b", "c"], [2, 0]) == ["c", "a"]
    assert [padded_rows(rows, 40, fixed=False) for rows in (1, BATCH_STEP, 17, 40)] == [16, 16, 32, 48]
    assert [padded_rows(rows, 40, fixed=True) for rows in (1, 40)] == [48, 48]


def test_a_model_that_cannot_be_shared_is_made_for_every_lane(job, tmp_path, monkeypatch):
    made = []
    plain = type(job).model

    def model(self, device, *, batch_size):
        one = plain(self, device, batch_size=batch_size)
        one.shared = False
        made.append((one, batch_size, torch.get_num_threads()))
        return one

    monkeypatch.setattr(type(job), "model", model)
    run(job, tmp_path / "out", options=options(lanes=3, batch_size=20))
    assert len(made) == len({id(one) for one, _, _ in made}) == 3
    assert {size for _, size, _ in made} == {32}
    assert {threads for _, _, threads in made} == {1}


def test_batches_wait_while_lanes_are_busy(job, tmp_path, monkeypatch):
    """What is read and not yet explained, or explained and not yet written, is bounded."""
    most = 0
    under_way = 0
    lock = threading.Lock()
    explain = pipelines._Lanes.explain
    add = pipelines.ShardWriter.add

    def counted(self, values):
        nonlocal most, under_way
        with lock:
            under_way += 1
            most = max(most, under_way)
        return explain(self, values)

    def written(self, *arguments, **named):
        nonlocal under_way
        with lock:
            under_way -= 1
        return add(self, *arguments, **named)

    monkeypatch.setattr(pipelines._Lanes, "explain", counted)
    monkeypatch.setattr(pipelines.ShardWriter, "add", written)
    run(replace(job, think=0.01), tmp_path / "out", options=options(batch_size=4, lanes=2))
    assert most <= 2 * 2 + 2 + 1  # a slot is given back just before its rows are added

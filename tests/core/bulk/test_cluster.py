"""The Ray engine, on a cluster of one machine: the same files whatever happens to its processes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("ray")

import ray

from mhex_core.bulk import BulkOptions, run
from mhex_core.bulk.cluster import layout_of, run_on_ray
from mhex_core.bulk.cluster_stages import Layout, Marks
from mhex_core.bulk.job import sendable
from mhex_core.bulk.plan import RunPlan

# Ray leaves files and processes to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

HERE = Path(__file__).parent
INPUTS, SHARD = 200, 16
SHARDS = -(-INPUTS // SHARD)
DAMAGED = (7, 150)


@pytest.fixture(scope="module")
def jobs():
    """The jobs' module under a name of its own, by which Ray's processes find it too."""
    sys.path.insert(0, str(HERE))
    import jobs

    yield jobs
    sys.path.remove(str(HERE))
    del sys.modules["jobs"]


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster that was started as users start one, and the environment of its processes."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets must have short names
    environment = os.environ | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
    }
    command = "-m ray.scripts.scripts start --head --port=0 --num-cpus=2 --include-dashboard=false"
    try:
        done = subprocess.run(
            [sys.executable, *command.split(), f"--temp-dir={folder}", "--node-ip-address=127.0.0.1"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        yield re.search(r"--address='([^']+)'", done.stdout)[1], environment
    finally:
        for pid in started_in(folder):
            os.kill(pid, signal.SIGKILL)
        until(lambda: not started_in(folder))
        shutil.rmtree(folder, ignore_errors=True)


def started_in(folder):
    """Processes whose command line names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def connected(cluster, jobs):
    """This process as a driver, so that runs share its workers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    mode = os.environ.get("RAY_AUTH_MODE")
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address=cluster[0], log_to_driver=False)
    yield
    ray.shutdown()
    del os.environ["RAY_AUTH_MODE"]
    if mode is not None:
        os.environ["RAY_AUTH_MODE"] = mode
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def inputs(jobs, tmp_path_factory):
    return jobs.write_inputs(tmp_path_factory.mktemp("inputs") / "numbers", INPUTS, damaged=DAMAGED)


@pytest.fixture(scope="module")
def expected(jobs, inputs, tmp_path_factory):
    """What the embedded engine makes of tensors and of texts."""
    outs = {}
    for as_text in (False, True):
        outs[as_text] = tmp_path_factory.mktemp("expected") / "out"
        run(jobs.NumberJob(inputs, as_text=as_text), outs[as_text], options=options("embedded", workers=0))
    return outs


def options(engine="ray", **rest):
    return BulkOptions(batch_size=16, shard_size=SHARD, engine=engine, **rest)


def files(out):
    return {path.name: path.read_bytes() for path in sorted((out / "data").iterdir())}


def logged(path, kind):
    """Processes that said they made a reader or a model, in order."""
    if not path.exists():
        return []
    return [int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[0] == kind]


def until(true, seconds=300):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def leftovers(out):
    return [path.name for path in out.iterdir() if path.name.startswith(".ray")]


# --------------------------------------------------------------------------------------------------- without a cluster


@pytest.mark.parametrize(
    ("nodes", "given", "wanted"),
    [
        ([{"CPU": 1}], {}, Layout(actors=1, lanes=1, on_gpu=False, readers=1)),
        ([{"CPU": 2}], {}, Layout(actors=1, lanes=2, on_gpu=False, readers=1)),
        ([{"CPU": 4}, {"CPU": 4}], {}, Layout(actors=2, lanes=4, on_gpu=False, readers=2)),
        ([{"CPU": 64}], {}, Layout(actors=8, lanes=8, on_gpu=False, readers=16)),
        ([{"CPU": 4}, {"CPU": 8}], {}, Layout(actors=3, lanes=4, on_gpu=False, readers=3)),
        ([{"CPU": 16}], {"lanes": 2, "workers": 5}, Layout(actors=1, lanes=2, on_gpu=False, readers=5)),
        ([{"CPU": 16, "GPU": 2}, {"CPU": 8}], {}, Layout(actors=2, lanes=1, on_gpu=True, readers=22)),
        ([{"CPU": 1, "GPU": 1}], {"workers": 0}, Layout(actors=1, lanes=1, on_gpu=True, readers=1)),
    ],
)
def test_how_a_run_is_spread(nodes, given, wanted):
    assert layout_of(nodes, options(**given)) == wanted


def test_a_cluster_without_processors_is_refused():
    with pytest.raises(ValueError, match="nodes with processors, got none"):
        layout_of([{"CPU": 0, "GPU": 1}], options())


def test_marks(tmp_path):
    (tmp_path / ".ray-0123456789ab").mkdir()
    (tmp_path / ".ray-older").mkdir()  # somebody else's
    marks = Marks(tmp_path / ".ray-0")
    assert marks.stopping()
    marks.make()
    assert sorted(leftovers(tmp_path)) == [".ray-0", ".ray-older"]
    assert not marks.stopping()
    assert [marks.begin("read", 3) for _ in range(2)] == [1, 2]
    assert marks.any("read")
    assert not marks.any("explain")
    marks.end("read", 3)
    assert not marks.any("read")
    assert marks.begin("read", 3) == 1
    marks.stop()
    assert marks.stopping()
    marks.remove()
    assert marks.stopping()
    marks.end("read", 3)
    assert marks.begin("read", 3) == 1


def test_what_cannot_be_sent_is_said():
    class LocalError(Exception):
        pass

    assert isinstance(sendable(ValueError("as it is")), ValueError)
    assert str(sendable(LocalError("first\nsecond"))) == "LocalError: first"


def test_without_ray_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    plan = RunPlan(out=tmp_path, inputs=1, shard_size=1, digest="")
    with pytest.raises(ImportError, match=r'pip install "mhex-vision\[cluster\]" or "mhex-text\[cluster\]"'):
        run_on_ray(None, plan, [0], options=options(), progress=None)


def test_an_address_where_nothing_is_ends_with_one_line(jobs, inputs, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConnectionError, match=f"^Ray cannot be reached or started at '{address}': .*refused"):
        run(jobs.NumberJob(inputs), tmp_path / "out", options=options(address=address))
    assert leftovers(tmp_path / "out") == []


# --------------------------------------------------------------------------------------------------------- on a cluster


@pytest.mark.usefixtures("connected")
def test_the_files_are_those_of_the_embedded_engine(jobs, inputs, expected, tmp_path):
    log = tmp_path / "log"
    job = jobs.NumberJob(inputs, log=log)
    summary = run(job, tmp_path / "out", options=options())
    assert files(tmp_path / "out") == files(expected[False])
    assert (summary.inputs, summary.rows, summary.rejected) == (INPUTS, INPUTS - 2, 2)
    assert not summary.interrupted
    assert leftovers(tmp_path / "out") == []
    # Ray Data made no single step of the two.
    assert logged(log, "model")
    assert not set(logged(log, "reader")) & set(logged(log, "model"))
    assert ray.is_initialized()  # it was when the run began


@pytest.mark.slow
@pytest.mark.usefixtures("connected")
def test_killed_processes_are_replaced(jobs, inputs, expected, tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    job = jobs.NumberJob(inputs, think=0.1, log=log, die_at=40, die_once=tmp_path)

    def kill_the_actor():
        until(lambda: out.exists() and (out / "data").exists() and len(list((out / "data").glob("part*"))) > 2)
        os.kill(logged(log, "model")[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_the_actor)
    killer.start()
    summary = run(job, out, options=options(lanes=1))
    killer.join()
    assert files(out) == files(expected[False])
    assert (summary.rows, summary.rejected) == (INPUTS - 2, 2)
    assert (tmp_path / "died").exists()
    assert len(set(logged(log, "model"))) == 2
    assert leftovers(out) == []


@pytest.mark.slow
@pytest.mark.usefixtures("connected")
def test_what_the_model_raises_ends_the_run(jobs, inputs, expected, tmp_path):
    job = jobs.NumberJob(inputs, fail_at=100)
    with pytest.raises(ArithmeticError, match=r"^cannot explain 100$"):
        run(job, tmp_path / "out", options=options())
    assert leftovers(tmp_path / "out") == []
    # The same run goes on once that is mended, with the other engine if need be.
    run(replace(job, fail_at=-1), tmp_path / "out", options=options("embedded", workers=0))
    assert files(tmp_path / "out") == files(expected[False])


@pytest.mark.slow
@pytest.mark.usefixtures("connected")
def test_an_input_that_kills_every_process_ends_the_run(jobs, inputs, tmp_path):
    job = jobs.NumberJob(inputs, die_at=100, log=tmp_path / "log")
    with pytest.raises(RuntimeError, match=r"^reading shard 6 \(inputs 96 to 111\) ended 3 processes"):
        run(job, tmp_path / "out", options=options())
    assert leftovers(tmp_path / "out") == []


@pytest.mark.usefixtures("connected")
def test_a_stopped_run_finishes_what_it_began_and_goes_on(jobs, inputs, expected, tmp_path):
    out = tmp_path / "out"
    job = jobs.NumberJob(inputs, as_text=True, think=0.3)

    def stop():
        until(lambda: (out / "data").exists() and len(list((out / "data").glob("part*"))) > 1)
        os.kill(os.getpid(), signal.SIGINT)

    asker = threading.Thread(target=stop)
    asker.start()
    summary = run(job, out, options=options(lanes=1))
    asker.join()
    assert summary.interrupted
    done = files(out)
    assert 2 <= len(done) < SHARDS
    assert summary.rows + summary.rejected == sum(
        min(SHARD, INPUTS - SHARD * int(name[5:11])) for name in done
    )  # every file was reported
    assert all(content == files(expected[True])[name] for name, content in done.items())
    assert leftovers(out) == []
    run(replace(job, think=0.0), out, options=options("embedded", workers=0))
    assert files(out) == files(expected[True])


SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import jobs, ray  # importing Ray sets a variable
from mhex_core.bulk import BulkOptions, run
before = dict(os.environ), sys.stdout, [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
job = jobs.NumberJob(Path(sys.argv[2]), think=0.05, die_at=40, die_once=Path(sys.argv[3]).parent)
address = sys.argv[4] if len(sys.argv) > 4 else None
options = BulkOptions(batch_size=16, shard_size=16, engine="ray", address=address)
summary = run(job, sys.argv[3], options=options)
after = dict(os.environ), sys.stdout, [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
assert after == before, (set(after[0].items()) ^ set(before[0].items()), after[1:], before[1:])
assert not ray.is_initialized()
print(summary.rows, summary.rejected)
"""


def script(*arguments, environment=None):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_a_cluster_of_its_own_is_started_quietly_and_ended(inputs, expected, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    before = set(started_in("/ray/core/src/ray/"))
    done = script(HERE, inputs, tmp_path / "out", environment=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{INPUTS - 2} 2\n", "")
    assert (tmp_path / "died").exists()
    assert files(tmp_path / "out") == files(expected[False])
    until(lambda: set(started_in("/ray/core/src/ray/")) <= before)


LISTENING = """
import sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import jobs
from mhex_core.bulk import BulkOptions, run
found = set()
def ports():
    held = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if sys.argv[3] in (process / "environ").read_text(errors="replace"):
                held |= {link.readlink().name for link in (process / "fd").iterdir() if link.is_symlink()}
        except OSError:
            pass
    return held
def watch():
    while True:
        held = ports()
        for table in ("tcp", "tcp6"):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                cells = line.split()
                if cells[3] == "0A" and f"socket:[{cells[9]}]" in held:
                    found.add(cells[1].split(":")[0])
        time.sleep(0.5)
threading.Thread(target=watch, daemon=True).start()
run(jobs.NumberJob(Path(sys.argv[2]), nap=0.02), sys.argv[3], options=BulkOptions(shard_size=16, engine="ray"))
print(*sorted(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="looks for sockets in /proc")
def test_a_cluster_of_its_own_listens_on_the_loopback_address(inputs, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", LISTENING, HERE, inputs, tmp_path / "out"],
        env=environment | {"MHEX_TEST_OUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert set(done.stdout.split())
    assert set(done.stdout.split()) <= loopback


@pytest.mark.slow
def test_a_cluster_that_was_there_goes_on(cluster, inputs, expected, tmp_path):
    address, environment = cluster
    done = script(HERE, inputs, tmp_path / "out", address, environment=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{INPUTS - 2} 2\n", "")
    assert files(tmp_path / "out") == files(expected[False])
    with socket.create_connection(address.rsplit(":", 1), timeout=5):
        pass

"""The job scripts: their syntax, and the whole of one on a single machine that plays two nodes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("**/*.sbatch"))

# Slurm's commands, as far as the scripts use them. A step is its command, run here.
STUBS = {
    "scontrol": """
        case $1 in
            show) printf '%s\\n' first second ;;
            requeue) echo "$2" > "$STUBS/requeued" ;;
        esac""",
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        exec "$@" """,
    # What a name on a real network leads to.
    "getent": """echo "127.0.1.1 STREAM first"; echo "$STUB_ADDRESS STREAM first" """,
    # The program under test is the script: this one joins the cluster, and says what it was called with.
    "program": """
        printf '%s\\n' "$@" > "$STUBS/arguments"
        exec "$PYTHON" "$STUBS/program.py" "$3" """,
    "torchrun": """
        trap 'exit 143' TERM
        printf '%s\\n' "$@" > "$STUBS/arguments"
        sleep "${STUB_SLEEP:-0}" & wait $!""",
    "python": """exec "$PYTHON" "$@" """,
    "ray": """exec "$PYTHON" -m ray.scripts.scripts "$@" """,
}
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
Path(os.environ["STUBS"], "nodes").write_text(" ".join(str(int(node["CPU"])) for node in alive))
end = time.monotonic() + 60
while os.environ["STUB_WAITS"] and not stopped and time.monotonic() < end:
    time.sleep(0.1)
ray.shutdown()
sys.exit(130 if stopped else 0)
"""


def test_there_are_scripts():
    assert [path.name for path in SCRIPTS] == ["ray-batch.sbatch", "train.sbatch"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_syntax(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    # Slurm reads its options up to the first command.
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") or not line for line in lines[: last + 1])


@pytest.fixture
def slurm(tmp_path):
    """Starts a job's script on this machine."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{text}\n")
        (stubs / name).chmod(0o755)
    (stubs / "program.py").write_text(PROGRAM)
    jobs = []

    def start(script, *arguments, **environment):
        job = str(os.getpid() * 10 + len(jobs))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
            address = probe.getsockname()[0]
        given = {
            "PATH": f"{stubs}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "STUBS": str(stubs),
            "STUB_ADDRESS": address,
            "STUB_WAITS": "",
            "MHEX_PROGRAM": "program",
            "SLURM_JOB_ID": job,
            "SLURM_JOB_NODELIST": "nodes[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "1",
        }
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
        output = (tmp_path / f"{job}.log").open("w+")
        process = subprocess.Popen(
            ["bash", EXAMPLES / "slurm" / script, *arguments],
            env=clean | given | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        jobs.append((process, output, Path(tempfile.gettempdir(), f"ray-{job}")))
        return process, stubs, output, Path(tempfile.gettempdir(), f"ray-{job}")

    yield start
    for process, output, folder in jobs:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        output.close()
        for pid in processes_of(folder):
            os.kill(pid, signal.SIGKILL)


def processes_of(folder):
    """Processes of a cluster that keeps its files there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"{folder}/".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def until(true, what, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_cluster_for_the_length_of_a_job(slurm):
    pytest.importorskip("ray")
    process, stubs, output, folder = slurm("ray-batch.sbatch", "--input", "a b", STUB_WAITS="yes")

    def told():
        output.seek(0)
        return output.read()

    until(lambda: (stubs / "nodes").exists() or process.poll() is not None, told)
    assert (stubs / "nodes").exists(), told()
    assert (stubs / "nodes").read_text() == "1 1"  # two nodes, with what the job was given
    command, option, address, *rest = (stubs / "arguments").read_text().splitlines()
    assert (command, option, rest) == ("batch", "--address", ["--input", "a b"])
    assert not address.startswith("127.")
    # Shortly before the end of its time.
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, told()
    assert (stubs / "requeued").read_text().strip() == folder.name.removeprefix("ray-")
    until(lambda: not processes_of(folder), told, seconds=30)
    assert not folder.exists()


def test_training_goes_to_torchrun(slurm):
    process, stubs, _, _ = slurm("train.sbatch", "--out", "a b", SLURM_GPUS_ON_NODE="4", SLURM_CPUS_PER_TASK="8")
    assert process.wait(30) == 0
    *words, no_python, program, command, option, out = (stubs / "arguments").read_text().splitlines()
    assert (no_python, program, command, option, out) == ("--no-python", "program", "train", "--out", "a b")
    assert "--nnodes=2" in words
    assert "--nproc-per-node=4" in words
    assert not (stubs / "requeued").exists()


def test_training_is_queued_again_before_the_end(slurm):
    process, stubs, _, folder = slurm("train.sbatch", STUB_SLEEP="30")
    until((stubs / "arguments").exists, lambda: "did not start", seconds=30)
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 143
    assert (stubs / "requeued").read_text().strip() == folder.name.removeprefix("ray-")

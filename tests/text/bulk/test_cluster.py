"""`mhex-text batch --engine ray`: the files of the embedded engine, byte for byte."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("ray")

from .conftest import spoken

# Four texts of a shard and as many shards: several processes have something to do.
COMMAND = ["--shard-size", "16", "--batch-size", "4", "--lanes", "2"]


def batch(checkpoint, source, out, *more):
    """The command as a process of its own, as Ray's processes are handed what it imported."""
    arguments = ["batch", "--checkpoint", checkpoint, "--input", source, "--out", out, *COMMAND, *more]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-m", "mhex_text.cli", *map(str, arguments)],
        env=environment | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_both_engines_write_the_same_bytes(checkpoint, tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text("\n".join(['"text"', *(f'"{text}"' for text in spoken(60)), '"never closed', '"the film"']) + "\n")
    outs = {}
    for name, more in (("embedded", ["--workers", "0"]), ("ray", ["--engine", "ray", "--workers", "1"])):
        out = tmp_path / name
        done = batch(checkpoint, path, out, *more)
        assert done.returncode == 3, done.stderr
        assert done.stderr == ""
        assert "explained 61 of 62 inputs, 1 could not be read" in done.stdout
        outs[name] = {file.name: file.read_bytes() for file in sorted((out / "data").iterdir())}
        outs[name]["rejected.csv"] = (out / "rejected.csv").read_bytes()
    assert len(outs["embedded"]) == 5
    assert outs["ray"] == outs["embedded"]

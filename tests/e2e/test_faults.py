"""The fault campaign in small: the script is the one whose results docs/scale.md shows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")
@pytest.mark.timeout(900)
def test_a_batch_loses_and_doubles_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--work", tmp_path, "--small"],
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("COV_")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = [line.split(":")[0].removeprefix("ok  ") for line in done.stdout.splitlines() if line.startswith("ok")]
    assert {"undisturbed", "kill -9 of the driver", "kill -9 of a reader", "SIGINT"} <= set(seen)

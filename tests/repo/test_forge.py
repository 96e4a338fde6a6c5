"""What a forge starts is what `python` with the same command line starts."""

import os
import signal
import subprocess
import sys
import time

import pytest

CODE = """
import atexit, sys, os, threading
atexit.register(print, "left")
threading.Timer(0.2, lambda: print("thread")).start()
print(sys.argv, sys.path[0], os.getcwd(), os.environ.get("COLOUR"), __name__)
print("grave", file=sys.stderr)
{}
"""


@pytest.mark.parametrize("end", ["pass", "sys.exit(3)", "sys.exit('no')", "1 / 0", "os._exit(4)"])
def test_it_ends_as_python_does(python, tmp_path, end):
    environment = os.environ | {"COLOUR": "blue"}
    command = ["-c", CODE.format(end), "one", "two"]
    forged = python.run(*command, environment=environment, folder=tmp_path)
    real = subprocess.run(
        [sys.executable, *command], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (forged.returncode, forged.stdout) == (real.returncode, real.stdout)
    assert forged.stderr.splitlines()[::-1][:1] == real.stderr.splitlines()[::-1][:1]


def test_files_and_modules_run_as_main(python, tmp_path):
    (tmp_path / "own.py").write_text("import sys\nprint(__name__, sys.argv[1:], sys.path[0])\n")
    for command in ((tmp_path / "own.py", "x"), ("-m", "own", "x")):
        done = python.run(*command, folder=tmp_path)
        assert (done.returncode, done.stdout) == (0, f"__main__ ['x'] {tmp_path}\n")


def test_signals_reach_it_and_several_run_at_once(python):
    code = "import time\nprint('up', flush=True)\ntime.sleep(60)"
    children = [python.start("-c", code) for _ in range(2)]
    for child, number in zip(children, (signal.SIGKILL, signal.SIGINT), strict=True):
        while "up" not in child.output():
            time.sleep(0.01)
        assert child.poll() is None
        child.send_signal(number)
        assert child.wait().returncode == -number
    assert "KeyboardInterrupt" in children[1].output("stderr")


def test_what_takes_too_long_is_killed(python):
    child = python.start("-c", "import time; print(1, flush=True); time.sleep(60)")
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(timeout=0.2)
    assert child.wait().returncode == -signal.SIGKILL


def test_torch_is_there_and_nothing_of_ours(python):
    done = python.run("-c", "import sys; print('torch' in sys.modules, [m for m in sys.modules if 'mhex' in m])")
    assert done.stdout == "True []\n"

"""Processes of their own in milliseconds.

Importing torch takes seconds, and on a busy machine ten times that; many tests want an interpreter that nobody has
used. A `Forge` is a process that imports libraries once, nothing of ours among them, and forks at request: each child
is handed a command line, and is from then on what `python` with that command line would be. It exits, fails, is
interrupted and killed as any other process.

Run as a script, this file is the forge: a line of JSON per request on stdin, a line of JSON per answer on stdout.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PAUSE = 0.02  # seconds between two looks at a child


class Child:
    """A process that was forked; its output goes to files."""

    def __init__(self, forge: Forge, arguments: list[str], pid: int, folder: Path) -> None:
        self._forge, self._folder, self._code = forge, folder, None
        self.args, self.pid = arguments, pid

    def poll(self) -> int | None:
        """Its status, or None while it runs; minus a signal's number if that ended it."""
        if self._code is None:
            self._code = self._forge.ask({"poll": self.pid})
        return self._code

    def output(self, name: str = "stdout") -> str:
        """What it has written by now."""
        return (self._folder / name).read_text(encoding="utf-8")

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """The finished process; it is killed if it takes longer than `timeout` seconds."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.args, timeout, self.output(), self.output("stderr"))
            time.sleep(PAUSE)
        return subprocess.CompletedProcess(self.args, self.poll(), self.output(), self.output("stderr"))


class Forge:
    """Forks interpreters that have imported `libraries`."""

    def __init__(self, *libraries: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forge-")
        self._process = subprocess.Popen(
            [sys.executable, __file__, *libraries],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # a process with threads must not be forked
        )

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, *arguments: object, environment: dict[str, str] | None = None, folder: Path | None = None) -> Child:
        """`python` with these arguments: -c CODE, -m MODULE or a file, and what they are given.

        Args:
            arguments: Without options for the interpreter itself.
            environment: All of it; by default that of this process.
            folder: Where the child runs; by default where this process does.
        """
        words = [str(argument) for argument in arguments]
        output = Path(tempfile.mkdtemp(dir=self._folder.name))
        for name in ("stdout", "stderr"):
            (output / name).touch()
        pid = self.ask(
            {
                "arguments": words,
                "environment": dict(os.environ if environment is None else environment),
                "folder": str(folder or Path.cwd()),
                "output": str(output),
            }
        )
        return Child(self, words, pid, output)

    def run(self, *arguments: object, timeout: float = 120, **settings: Any) -> subprocess.CompletedProcess[str]:
        """`start` and `wait`."""
        return self.start(*arguments, **settings).wait(timeout)

    def close(self) -> None:
        self._process.communicate()
        self._folder.cleanup()


# ---------------------------------------------------------------------------------------------------------- the forge


def _serve() -> list[str]:
    """Answer requests; returns in children alone, with their command line."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _become(request)
                return request["arguments"]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    sys.exit()


def _become(request: dict[str, Any]) -> None:
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(request["output"]) / name, os.O_WRONLY)
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    os.chdir(request["folder"])
    # Whoever runs the tests in the background has it ignored, which children inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(arguments: list[str]) -> None:
    kind, *rest = arguments
    if kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv, sys.path[0] = rest, str(Path.cwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(kind).parent)
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    for library in sys.argv[1:]:
        importlib.import_module(library)
    _run(_serve())

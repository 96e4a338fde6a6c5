"""The packages' commands for the pages, without the seconds that each would spend on importing libraries.

A server imports the libraries, nothing of ours among them, and forks: each child becomes the command that was asked
for, with the arguments, folder, environment and files of whoever asked. The commands on the PATH of a page are clients
of it; what they run is the entry point that the installed command runs.

Run as a script: `commands.py SOCKET LIBRARY ...` serves; `commands.py SOCKET --ask NAME ARGUMENT ...` asks.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

_FILES = 3  # standard input, output and error
_PAUSE = 0.02  # seconds between two looks at a child


def serve(path: str, libraries: list[str]) -> None:
    """Answer until the process is ended. The socket is there once the libraries are."""
    for library in libraries:
        import_module(library)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.new")
        listener.listen(64)
        Path(f"{path}.new").rename(path)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _answer(connection)
            connection.close()


def ask(path: str, words: list[str]) -> int:
    """Have a command run, and wait for its status."""
    request = json.dumps({"words": words, "folder": str(Path.cwd()), "environment": dict(os.environ)}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [struct.pack("!I", len(request))], list(range(_FILES)))
        connection.sendall(request)
        status = connection.recv(4)
    return struct.unpack("!i", status)[0] if status else 1


def client(path: Path, name: str) -> str:
    """The text of a command that asks."""
    return f'#!/bin/sh\nexec {sys.executable} -IS {Path(__file__).resolve()} {path} --ask {name} "$@"\n'


def _answer(connection: socket.socket) -> None:
    head, files, _, _ = socket.recv_fds(connection, 4, _FILES)
    (length,) = struct.unpack("!I", head)
    data = b""
    while len(data) < length:
        data += connection.recv(length - len(data))
    request = json.loads(data)
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        _become(request)
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            connection.sendall(struct.pack("!i", os.waitstatus_to_exitcode(status)))
            os._exit(0)
        gone, _, _ = select.select([connection], [], [], _PAUSE)
        if gone:  # whoever asked says no more: it was ended, and the command ends with it
            os.kill(pid, signal.SIGKILL)
            os._exit(1)


def _become(request: dict[str, object]) -> None:
    """From here on this is the command. It ends as an interpreter does, exit handlers and all."""
    words, folder, environment = request["words"], request["folder"], request["environment"]
    assert isinstance(words, list)
    assert isinstance(environment, dict)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(str(folder))
    name, *arguments = words
    # Processes that the command starts look for what was run in here, and must not find the server.
    sys.modules["__main__"] = ModuleType("__main__")
    sys.argv, sys.path[0] = [name, *arguments], str(Path(sys.executable).parent)
    if name.endswith(".py"):
        sys.argv, sys.path[0] = [name, *arguments], str(Path(name).parent)
        runpy.run_path(name, run_name="__main__")
    else:
        import_module(f"{name.replace('-', '_')}.cli").entry_point()
    sys.exit(0)


if __name__ == "__main__":
    if sys.argv[2:3] == ["--ask"]:
        sys.exit(ask(sys.argv[1], sys.argv[3:]))
    serve(sys.argv[1], sys.argv[2:])

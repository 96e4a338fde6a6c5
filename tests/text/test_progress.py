"""Bars in a terminal, and not one byte of them where the output is piped."""

import fcntl
import io
import os
import pty
import struct
import sys
import termios
import threading

import pytest

from mhex_text import cli
from mhex_text.data import notes_bundle
from mhex_text.demo import run_demo
from mhex_text.progress import bar

from .test_report_command import checkpoint, spoken  # noqa: F401 - fixtures


class Stream:
    """A real terminal of 100 columns, or a real pipe, in the place of the standard error.

    Attributes:
        shown: What came out at the other end, once it is closed.
    """

    def __init__(self, patch, *, terminal):
        self.shown, self._patch = "", patch
        self._read, self._write = pty.openpty() if terminal else os.pipe()
        if terminal:
            fcntl.ioctl(self._write, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self._reader = threading.Thread(target=self._take)

    def _take(self):
        held = b""
        while True:
            try:
                found = os.read(self._read, 65536)
            except OSError:  # how a terminal says that the other end is closed
                break
            if not found:
                break
            held += found
        self.shown = held.decode()

    def __enter__(self):
        self._reader.start()
        self._file = os.fdopen(self._write, "w")
        self._patch.setattr(sys, "stderr", self._file)
        return self

    def __exit__(self, *_):
        self._patch.undo()
        self._file.close()
        self._reader.join()
        os.close(self._read)


@pytest.fixture
def stderr(monkeypatch):
    # Every step is drawn, or a fast machine would show none.
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    return lambda *, terminal: Stream(pytest.MonkeyPatch(), terminal=terminal)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "new.txt"
    path.write_text("\n".join(spoken(60)))
    return path


def left_on_screen(shown):
    """What a terminal still shows: of each line what stands behind the last carriage return."""
    lines = [line.rsplit("\r", 1)[-1] for line in shown.replace("\r\n", "\n").split("\n")]
    return [line for line in lines if line.strip()]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("command", ["report", "explain"])
def test_many_texts_are_told_of_in_a_terminal_alone(
    checkpoint,  # noqa: F811
    texts,
    tmp_path,
    capsys,
    stderr,
    command,
    terminal,
):
    out = tmp_path / "out"
    options = ["--checkpoint", checkpoint, "--input", texts, "--batch-size", 2, "--out", out]
    options += ["--methods", "mhex,gmar"] if command == "report" else ["--method", "gmar"]
    with stderr(terminal=terminal) as stream:
        assert cli.main([command, *map(str, options)]) == 0
    output = capsys.readouterr().out
    assert "\r" not in output
    assert output.splitlines()[-1].startswith("next: open ")
    if not terminal:
        assert stream.shown == ""
        return
    assert ("mhex: " in stream.shown) == (command == "report")
    assert "gmar: " in stream.shown
    assert "/60 [" in stream.shown
    assert left_on_screen(stream.shown) == []


def test_one_batch_is_not_worth_a_bar(checkpoint, tmp_path, stderr):  # noqa: F811
    with stderr(terminal=True) as stream:
        options = ["--text", "a film", "--methods", "mhex,gmar", "--out", str(tmp_path / "x.html")]
        assert cli.main(["report", "--checkpoint", str(checkpoint), *options]) == 0
    assert stream.shown == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_training_and_the_demo_are_told_of_in_a_terminal_alone(tmp_path, stderr, terminal):
    said = []
    with stderr(terminal=terminal) as stream:
        run_demo(tmp_path / "demo", bundle=notes_bundle(train=48, validation=8, test=36), epochs=1, say=said.append)
    assert not any("\r" in line for line in said)
    if not terminal:
        assert stream.shown == ""
        return
    for name in ("reading train: ", "epoch 1/1: ", "validation: ", "test: ", "mhex: "):
        assert name in stream.shown
    assert left_on_screen(stream.shown) == []


def test_a_bar_is_gone_when_something_raises(stderr):
    def fail(shown):
        shown.update()
        shown.refresh()
        raise RuntimeError("no more")

    for terminal in (True, False):
        with stderr(terminal=terminal) as stream, pytest.raises(RuntimeError, match="no more"), bar(3) as shown:
            fail(shown)
        assert ("1/3" in stream.shown) == terminal
        assert left_on_screen(stream.shown) == []


def test_a_bar_that_is_not_wanted_is_none(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    with bar(3, shown=False) as shown:
        shown.update()
    assert stream.getvalue() == ""

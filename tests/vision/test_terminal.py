"""Bars in a terminal, and nothing of the kind in a pipe."""

import fcntl
import os
import struct
import sys
import termios
import threading

import pytest

from mhex_vision import cli
from mhex_vision.progress import aside, bar, counter

from .test_cli import picture

COMMANDS = {
    "train": ("train --data {photos} --size 32 --epochs 1 --batch-size 8 --out {tmp}/net", ["epoch 1/1", "validation"]),
    "explain": ("explain --checkpoint {net} --input {photos} --out {tmp}/out", ["explaining"]),
    "report": ("report --checkpoint {net} --data {photos} --methods mhex,random --out {tmp}/page.html", ["random"]),
    "evaluate": (
        "evaluate --checkpoint {net} --judge {judge} --data {photos} --methods random --metrics sad --out {tmp}/out",
        ["random", "examples"],
    ),
}


class Terminal:
    """A terminal of 100 columns in place of standard error."""

    def __init__(self):
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.file = os.fdopen(slave, "w", buffering=1)
        self.written = b""
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        while True:
            try:
                part = os.read(self.master, 65536)
            except OSError:  # the other end is closed
                return
            if not part:
                return
            self.written += part

    def close(self):
        """What was written, and what can be seen in the end."""
        self.file.close()
        self.reader.join()
        os.close(self.master)
        text = self.written.decode()
        lines, column = [[]], 0
        for letter in text:
            if letter == "\r":
                column = 0
            elif letter == "\n":
                lines.append([])
                column = 0
            else:
                lines[-1][column : column + 1] = [letter]
                column += 1
        return text, [line for line in ("".join(line).rstrip() for line in lines) if line]


@pytest.fixture
def terminal(monkeypatch):
    """Opens one; called in the test, as pytest puts standard error back before it."""
    opened = []

    def open_():
        opened.append(Terminal())
        monkeypatch.setattr(sys, "stderr", opened[-1].file)
        return opened[-1]

    yield open_
    for one in opened:
        if not one.file.closed:
            one.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal")
    for label, shade in (("dark", 60), ("light", 190)):
        for number in range(20):
            picture(folder / "photos" / label / f"{number:02d}.png", shade=shade, seed=number)
    for name, more in (("net", []), ("judge", ["--plain"])):
        line = f"train --data {folder}/photos --size 32 --epochs 1 --batch-size 8 --out {folder}/{name}"
        assert cli.main([*line.split(), *more]) == 0
    return {"photos": folder / "photos", "net": folder / "net", "judge": folder / "judge"}


@pytest.mark.parametrize(("line", "named"), COMMANDS.values(), ids=COMMANDS)
def test_a_terminal_shows_a_bar_and_no_trace_of_it_in_the_end(place, tmp_path, terminal, capsys, line, named):
    screen = terminal()
    assert cli.main(line.format(**place, tmp=tmp_path).split()) == 0
    text, seen = screen.close()
    for name in named:
        assert f"\r{name}" in text or f", {name}" in text
    assert "it/s" in text or "image/s" in text or "batch/s" in text
    assert seen == []
    assert "\r" not in capsys.readouterr().out


@pytest.mark.parametrize(("line", "named"), COMMANDS.values(), ids=COMMANDS)
def test_a_pipe_gets_plain_lines_and_the_last_says_what_to_do_next(place, tmp_path, capfd, line, named):
    assert cli.main(line.format(**place, tmp=tmp_path).split()) == 0
    said = capfd.readouterr()
    assert said.err == ""
    assert "\r" not in said.out
    last = said.out.splitlines()[-1]
    assert "next" in last
    assert "mhex-vision " in last or "in a browser" in last


def test_a_complaint_does_not_run_into_the_bar(place, tmp_path, terminal, capsys):
    (tmp_path / "in").mkdir()
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_bytes(b"")
    picture(tmp_path / "in" / "c.png")
    line = f"explain --checkpoint {place['net']} --input {tmp_path}/in --out {tmp_path}/out --batch-size 1"
    screen = terminal()
    assert cli.main(line.split()) == 3
    _, seen = screen.close()
    assert seen == [f"mhex-vision: skipped: {tmp_path}/in/b.png: the file is empty"]


@pytest.mark.parametrize(
    "make", [lambda: bar([1, 2, 3], desc="going"), lambda: counter(desc="going", total=3, unit="x")]
)
def test_a_bar_goes_when_its_work_fails(terminal, make):
    screen = terminal()

    def work():
        with make() as items:
            items.refresh()
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        work()
    text, seen = screen.close()
    assert "going" in text
    assert seen == []


def test_a_bar_that_nobody_wants_is_not_shown(terminal):
    screen = terminal()
    with bar([1, 2], desc="going", shown=False) as items:
        assert list(items) == [1, 2]
    assert screen.close() == ("", [])


def test_lines_beside_a_bar_stand_by_themselves(terminal):
    screen = terminal()
    with bar(range(3), desc="going") as items:
        for number in items:
            items.refresh()
            with aside():
                screen.file.write(f"line {number}\n")
    assert screen.close()[1] == ["line 0", "line 1", "line 2"]

"""What somebody else put beside the images, or in a checkpoint: it is read and never run, by both command lines."""

import importlib
import runpy
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("package", ["mhex_vision", "mhex_text"])
def test_a_command_run_as_a_module_forgets_the_current_folder(tmp_path, package, monkeypatch, capsys):
    (tmp_path / "timm.py").write_text("raise AssertionError('it was run')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [package, "--help"])
    command = importlib.import_module(f"{package}.cli")
    for first, stays in ((str(Path.cwd()), False), (str(Path(sys.executable).parent), True)):  # `python -m`; the script
        monkeypatch.setattr(sys, "path", [first, *sys.path])
        with pytest.raises(SystemExit):
            runpy.run_path(str(command.__file__), run_name="__main__")
        assert (first in sys.path) == stays
    assert "usage" in capsys.readouterr().out

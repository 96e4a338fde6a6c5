"""The files of a training run: whose folder it is, which checkpoints are whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mhex_core.files import remove_partials, write_atomically
from mhex_text.history import TextEpoch, TextTrainingResult, best_epoch, epoch_from, result_from

CHECKPOINTS = ".checkpoints"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
LOG_FILE = "log.csv"
RUN_FILE = "run.json"
HISTORY_FILE = "history.json"


@dataclass
class Checkpoints:
    """The checkpoints of a run: of its last epoch, and of its best."""

    folder: Path
    whole: dict[int, Path] = field(default_factory=dict)
    history: tuple[TextEpoch, ...] = ()

    def scan(self) -> None:
        """Find those that are whole."""
        self.whole, self.history = {}, ()
        for path in self.folder.glob("checkpoint-*"):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                values = json.loads((path / HISTORY_FILE).read_text(encoding="utf-8"))
                history = tuple(map(epoch_from, values))
                self.whole[len(history)] = path
                if len(history) > len(self.history):
                    self.history = history

    def tidy(self) -> None:
        """Remove what is no longer needed, and what was cut short."""
        kept = {self.whole.get(len(self.history)), self.whole.get(best_epoch(self.history))}
        for path in self.folder.glob("checkpoint-*"):
            if path not in kept:
                shutil.rmtree(path)
        self.whole = {epoch: path for epoch, path in self.whole.items() if path in kept}


def claim(out: Path, settings: Mapping[str, Any], *, overwrite: bool) -> TextTrainingResult | None:
    """Make the folder this run's, or find out that it is already, or refuse. The result, if it is finished."""
    path = out / RUN_FILE
    # The others meet this process after it, when the library sets up their exchange.
    main = int(os.environ.get("RANK", "0")) == 0
    if main:
        remove_partials(out, (RUN_FILE, LOG_FILE))
    if overwrite:
        if main:
            for name in (RUN_FILE, WEIGHTS_FILE, CONFIG_FILE, LOG_FILE):
                (out / name).unlink(missing_ok=True)
            shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
        return None
    if path.is_file():
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            past, result = written["settings"], written["result"]
            finished = None if result is None else result_from(result)
            if not isinstance(past, dict):
                raise TypeError("settings are no dictionary")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged or something else; choose another folder") from error
        there, here = _flat(past), _flat(dict(settings))
        differing = [
            f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
            for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name)
        ]
        if differing:
            raise ValueError(
                f"out must be a folder of this run, got {out} with another one ({'; '.join(differing)}); "
                "choose another folder, or allow to overwrite it"
            )
        return finished
    other = [name for name in (WEIGHTS_FILE, CONFIG_FILE, LOG_FILE) if (out / name).exists()]
    # The library makes the folder of checkpoints, empty, a moment before the first record is written.
    other += [CHECKPOINTS] if any((out / CHECKPOINTS).glob("*")) else []
    if other:
        raise ValueError(
            f"out must be empty or a folder of this run, got {out} with {', '.join(other)}; "
            "choose another folder, or allow to overwrite it"
        )
    return None


def write_text(path: Path, text: str) -> None:
    """Write a file in one step."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings within settings as `outer.inner`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found

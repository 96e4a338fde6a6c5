"""A job of numbers in text files, for tests: it reads and explains in microseconds, and misbehaves on request.

The module imports nothing of the tests, so that processes elsewhere can import it by its name alone.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from mhex_core.bulk.job import ENTRY, Decoded, Values

WIDTH = 8


def write_inputs(folder: Path, count: int, *, damaged: tuple[int, ...] = ()) -> Path:
    """A file per input, with one number in it, or a word."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:05d}.txt").write_text("seven" if number in damaged else str(number))
    return folder


@dataclass(frozen=True)
class NumberJob:
    """Explains a number by a row of numbers.

    Attributes:
        folder: Where the files lie.
        as_text: Whether values are texts, in groups by their length, and not a tensor.
        nap: Seconds that reading an input takes.
        think: Seconds that explaining a batch takes.
        fail_at: The input at which the model raises; no input if negative.
        die_at: The input, or inputs, at which the process that reads it is killed.
        die_once: A folder where a process leaves a note that it died, and does not die again; None dies each time.
        log: A file to which every process that makes a reader or a model adds a line with its number.
    """

    folder: Path
    as_text: bool = False
    nap: float = 0.0
    think: float = 0.0
    fail_at: int = -1
    die_at: int | tuple[int, ...] = -1
    die_once: Path | None = None
    log: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    program = "numbers"
    row_bytes = 4 * WIDTH
    input_bytes = 4 * WIDTH

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([pa.field("row", pa.list_(pa.float32()), nullable=False)], metadata={"kind": "numbers"})

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"as_text": self.as_text}

    def entries(self) -> Iterator[pa.RecordBatch]:
        paths = sorted(self.folder.iterdir())
        for start in range(0, len(paths), 100):
            rows = [
                {"id": path.stem, "source": str(path), "place": -1, "length": -1, "problem": None}
                for path in paths[start : start + 100]
            ]
            yield pa.RecordBatch.from_pylist(rows, ENTRY)

    def reader(self) -> NumberReader:
        self.note("reader")
        return NumberReader(self)

    def model(self, device: torch.device, *, batch_size: int) -> NumberModel:
        self.note("model")
        return NumberModel(self, device)

    def note(self, kind: str) -> None:
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{kind} {os.getpid()}\n")


class NumberReader:
    def __init__(self, job: NumberJob) -> None:
        self.job = job

    def __call__(self, entries: pa.RecordBatch) -> Decoded:
        kept, numbers, rejected = [], [], []
        columns = (entries.column(name).to_pylist() for name in ("source", "problem"))
        for place, (source, problem) in enumerate(zip(*columns, strict=True)):
            if problem is not None:
                rejected.append((place, problem))
                continue
            time.sleep(self.job.nap)
            word = Path(source).read_text()
            if not word.isdigit():
                rejected.append((place, f"not a number: {word}"))
                continue
            self.maybe_die(int(word))
            kept.append(place)
            numbers.append(int(word))
        if self.job.as_text:
            return Decoded(
                kept=kept,
                values=[str(number) for number in numbers],
                rejected=rejected,
                groups=[len(str(number)) for number in numbers],
            )
        values = torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, WIDTH)
        return Decoded(kept=kept, values=values, rejected=rejected)

    def maybe_die(self, number: int) -> None:
        if number not in ((self.job.die_at,) if isinstance(self.job.die_at, int) else self.job.die_at):
            return
        if self.job.die_once is not None:
            note = self.job.die_once / "died"
            if note.exists():
                return
            note.touch()
        os.kill(os.getpid(), signal.SIGKILL)


class NumberModel:
    shared = True
    fixed = False

    def __init__(self, job: NumberJob, device: torch.device) -> None:
        self.job = job
        self.weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)).to(device)

    def __call__(self, values: Values) -> pa.RecordBatch:
        time.sleep(self.job.think)
        if not isinstance(values, torch.Tensor):
            values = torch.tensor([[float(text)] * WIDTH for text in values])
        if self.job.fail_at in values[:, 0].tolist():
            raise ArithmeticError(f"cannot explain {self.job.fail_at}")
        rows = (values.to(self.weight.device) @ self.weight).tanh().cpu().numpy()
        offsets = pa.array(range(0, rows.size + 1, WIDTH), pa.int32())
        column = pa.ListArray.from_arrays(offsets, pa.array(rows.reshape(-1)))
        return pa.RecordBatch.from_arrays([column], ["row"])

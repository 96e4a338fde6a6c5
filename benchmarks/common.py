"""What the measurements share: where they ran, and results that are either whole or absent."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The machine's shape and the versions that matter."""
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def command() -> str:
    """The command that is running, as it can be typed from the repository's root (folders of data left out)."""
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}"]
    hidden = False
    for word in sys.argv[1:]:
        words.append("DIR" if hidden else word)
        hidden = word in ("--root", "--work")
    return " ".join(words)


def write(name: str, record: dict[str, Any]) -> Path:
    """Write a result as JSON under benchmarks/results/, in one step."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        json.dumps({"command": command(), "machine": machine(), **record}, indent=1) + "\n", encoding="utf-8"
    )
    temporary.replace(path)
    return path


def result(name: str) -> dict[str, Any]:
    """A result that was written."""
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return record


def shape(record: dict[str, Any]) -> str:
    """The machine of a result in a few words."""
    machine = record["machine"]
    return f"{machine['cores']} cores, {machine['vector_instructions']}, torch {machine['torch']}"


def run_step(program: str, command: str, folders: dict[str, str]) -> None:
    """Run `mhex-vision` or `mhex-text` with a command in which folders are named {so}, and stop where it fails."""
    print(f"{program} {command}", flush=True)
    words = [sys.executable, "-m", f"{program.replace('-', '_')}.cli", *shlex.split(command.format(**folders))]
    if subprocess.run(words, check=False).returncode:
        raise SystemExit("a step failed; what is finished is kept")


def keep(name: str, shown: str, record: dict[str, Any]) -> None:
    """`write`, with another command than the one that is running."""
    path = write(name, record)
    kept = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**kept, "command": shown}, indent=1) + "\n", encoding="utf-8")


def spread(values: Sequence[float], *, scale: float = 1.0, digits: int = 2) -> str:
    """Mean and sample standard deviation as text."""
    scaled = [scale * value for value in values]
    if len(scaled) == 1:
        return f"{scaled[0]:.{digits}f}"
    return f"{statistics.mean(scaled):.{digits}f} ± {statistics.stdev(scaled):.{digits}f}"

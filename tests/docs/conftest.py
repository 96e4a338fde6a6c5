"""What runs the pages: a server of commands, the stand-ins, and a folder for each page."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from . import commands, world
from .pages import ROOT, Block, blocks_of

HERE = Path(__file__).parent
LIBRARIES = (
    *("torchvision", "torchmetrics", "accelerate", "safetensors.torch", "matplotlib.figure", "PIL.Image"),
    *("transformers.models.distilbert.modeling_distilbert", "transformers.trainer", "datasets"),
)
COMMANDS = ("mhex-vision", "mhex-text")

# Runs that pages begin with where they do not train them themselves.
RUNS = {
    "runs/blood": "mhex-vision train --data bloodmnist --epochs 2 --out runs/blood",
    "runs/photos": "mhex-vision train --data photos --epochs 1 --out runs/photos",
    "runs/reviews": "mhex-text train --data reviews.csv --encoder distilbert-base-uncased --epochs 1 "
    "--out runs/reviews",
}


@dataclass(frozen=True)
class Runner:
    """Runs pages and commands amid the stand-ins."""

    socket: Path
    folder: Path
    environment: dict[str, str]

    def run(self, *words: object, folder: Path, timeout: float = 560) -> subprocess.CompletedProcess[str]:
        """A command, or a script by its path."""
        client = [sys.executable, "-IS", str(HERE / "commands.py"), str(self.socket), "--ask", *map(str, words)]
        return subprocess.run(
            client,
            cwd=folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def run_page(self, path: Path, folder: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """All blocks of a page that run, in a folder with the stand-ins and the runs that the page begins with."""
        shutil.copytree(self.folder / "files", folder, dirs_exist_ok=True)
        blocks = [block for block in blocks_of(path, root) if block.runs]
        for run in sorted(wanted(blocks)):
            shutil.copytree(self.trained(run), folder / run, dirs_exist_ok=True)
        listed = folder.parent / f"{folder.name}-blocks.json"
        listed.write_text(
            json.dumps([{"place": b.place, "language": b.language, "text": b.script} for b in blocks]),
            encoding="utf-8",
        )
        return self.run(HERE / "running.py", listed, folder=folder)

    def trained(self, run: str) -> Path:
        """A run on the stand-ins, trained when first asked for."""
        files = self.folder / "files-to-train-on"
        if not files.exists():
            shutil.copytree(self.folder / "files", files)
        if not (files / run).exists():
            done = self.run(*RUNS[run].split(), folder=files)
            assert done.returncode == 0, done.stderr
        return files / run


def wanted(blocks: list[Block]) -> set[str]:
    """The runs that blocks read before any of them has written there."""
    found, made = set(), set()
    for block in blocks:
        for line in block.text.splitlines():
            for run in RUNS:
                if not re.search(rf"{run}\b(?!-)", line):
                    continue
                if re.search(rf"""(--out |out=["']){run}\b""", line):
                    made.add(run)
                elif run not in made:
                    found.add(run)
    return found


@pytest.fixture(scope="session")
def runner(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    path = folder / "commands"
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for name in COMMANDS:
        (bin_folder / name).write_text(commands.client(path, name))
        (bin_folder / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MHEX_", "HF_", "PYTEST_"))}
    environment = kept | world.environment(folder)
    environment["PATH"] = os.pathsep.join((str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]))
    log = (folder / "server.log").open("w+")
    server = subprocess.Popen(
        [sys.executable, HERE / "commands.py", path, *LIBRARIES], env=environment, stdout=log, stderr=log
    )
    try:
        end = time.monotonic() + 180
        while not path.exists():
            if server.poll() is not None or time.monotonic() > end:
                log.seek(0)
                raise RuntimeError(f"the server of commands did not start: {log.read()}")
            time.sleep(0.05)
        runner = Runner(path, folder, environment)
        done = runner.run(HERE / "world.py", folder, folder=ROOT)
        assert done.returncode == 0, done.stderr
        yield runner
    finally:
        server.kill()
        server.wait()
        log.close()

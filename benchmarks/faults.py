"""Does a batch lose or double anything, whatever happens to it? Kills, damage, full disks; every byte compared.

    python benchmarks/faults.py --work DIR            the campaign; writes results/faults.json
    python benchmarks/faults.py --work DIR --small    a minute of it, as the tests run it

Every scenario ends with the same command run to its end, and the folder must then be, file by file, what a run without
any mishap wrote. Linux only: it looks for processes in /proc, and full disks are small tmpfs mounts, which only root
can make.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pyarrow import parquet

import common
from mhex_vision import MHEXClassifier, Preprocessing

SIDE = 64
DAMAGED = 0.05
SOME_REJECTED = 3
INTERRUPTED = 130
PATIENCE = 300.0  # seconds until something that must happen has happened
NOT_COMPARED = ".lock"


@dataclass
class Campaign:
    """An archive, a classifier, and what a run without mishaps makes of them.

    Attributes:
        work: Where everything lies.
        images: How many files the archive has.
        damaged: Their names and what is wrong with each.
        shard_size: Images of a shard.
        wanted: Every file of the undisturbed run, with its digest.
        first: Seconds from its start to its first shard.
        each: Seconds from shard to shard.
        results: A line per scenario.
    """

    work: Path
    images: int
    shard_size: int
    damaged: dict[str, str] = field(default_factory=dict)
    wanted: dict[str, str] = field(default_factory=dict)
    first: float = 0.0
    each: float = 0.0
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.images // self.shard_size)

    def command(self, out: Path, *more: str) -> list[str]:
        """The command that explains the archive into a folder."""
        return [
            *(sys.executable, "-m", "mhex_vision.cli", "batch", "--checkpoint", str(self.work / "run")),
            *("--input", str(self.work / "archive"), "--out", str(out), "--shard-size", str(self.shard_size), *more),
        ]

    def start(self, out: Path, *more: str) -> subprocess.Popen[str]:
        """Start it, in a process group of its own."""
        return subprocess.Popen(
            self.command(out, *more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, out: Path, *more: str) -> None:
        """Run the command to its end, and compare."""
        process = self.start(out, *more)
        said, complained = process.communicate(timeout=PATIENCE * 4)
        check(process.returncode == SOME_REJECTED, f"exit status {process.returncode}: {said}{complained}")
        self.compare(out)

    def compare(self, out: Path) -> None:
        """Whether a folder is what the undisturbed run left."""
        found = fingerprint(out)
        other = sorted(name for name in {*found, *self.wanted} if found.get(name) != self.wanted.get(name))
        check(not other, f"{out}: other than without mishaps: {', '.join(other[:5])}")

    def note(self, scenario: str, **seen: Any) -> None:
        """A scenario went as it should."""
        self.results.append({"scenario": scenario, **seen})
        print(f"ok  {scenario}: {', '.join(f'{key} {value}' for key, value in seen.items())}", flush=True)


def check(condition: bool, otherwise: str) -> None:
    """Reads like assert, and is not optimised away."""
    if not condition:
        raise SystemExit(f"FAILED: {otherwise}")


def fingerprint(out: Path) -> dict[str, str]:
    """Every file of a run, to the byte; what is left over from a kill would show, too."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != NOT_COMPARED
    }


def parts(out: Path) -> int:
    """How many shards are there."""
    return len(list((out / "data").glob("part-*.parquet")))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Wait until something is the case; False if the process ended before."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None:
            return condition()
        check(time.monotonic() < end, f"nothing happened for {PATIENCE:.0f} s")
        time.sleep(0.01)
    return True


def first_shard(out: Path, process: subprocess.Popen[str]) -> bool:
    """Wait for the first shard; False if there is none."""
    return wait_for(lambda: parts(out) > 0, process)


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9."""
    process.kill()
    process.communicate()


# ---------------------------------------------------------------------------------------------------------- the parties


def make_archive(campaign: Campaign, generator: random.Random) -> None:
    """Noise with a bright spot, as PNG and JPEG; some files cut short, some empty, some no images."""
    folder = campaign.work / "archive"
    values = np.random.default_rng(0)
    bad = set(generator.sample(range(campaign.images), round(DAMAGED * campaign.images)))
    for number in range(campaign.images):
        place = folder / f"{number // 100:03d}"
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"{number:05d}.{'png' if number % 2 else 'jpg'}"
        pixels = values.integers(0, 90, (SIDE, SIDE, 3), np.uint8)
        row, column = values.integers(0, SIDE - 12, 2)
        pixels[row : row + 12, column : column + 12] += 120
        Image.fromarray(pixels).save(path)
        if number not in bad:
            continue
        kind = ("zero bytes", "cut short", "no image")[number % 3]
        whole = path.read_bytes()
        damage = {"zero bytes": b"", "cut short": whole[: len(whole) // 2], "no image": b"text\n" * 40}
        path.write_bytes(damage[kind])
        campaign.damaged[str(path.relative_to(folder))] = kind


def make_classifier(folder: Path) -> None:
    """Fresh weights will do: what is looked at is whether values stay the same."""
    torch.manual_seed(0)
    model = MHEXClassifier.from_backbone("resnet18", 4, image_size=SIDE)
    model.with_metadata(preprocessing=Preprocessing(size=SIDE), class_names=("a", "b", "c", "d"))
    model.save_pretrained(folder)


def undisturbed(campaign: Campaign) -> None:
    """What is right: each good image once, each bad one in the table, and the values of the classifier itself."""
    out = campaign.work / "undisturbed"
    begun = time.monotonic()
    process = campaign.start(out)
    check(first_shard(out, process), "no shard was written")
    campaign.first = time.monotonic() - begun
    _, complained = process.communicate(timeout=PATIENCE * 4)
    check(process.returncode == SOME_REJECTED, complained)
    campaign.each = (time.monotonic() - begun - campaign.first) / max(1, campaign.shards - 1)
    names = sorted(str(p.relative_to(campaign.work / "archive")) for p in (campaign.work / "archive").rglob("*.*"))
    table = parquet.read_table(out / "data")
    good = [name for name in names if name not in campaign.damaged]
    check(table["id"].to_pylist() == good, "the rows are not the good images, each once and in order")
    with (out / "rejected.csv").open() as file:
        rejected = {row["id"]: row["reason"] for row in csv.DictReader(file)}
    check(sorted(rejected) == sorted(campaign.damaged), "the table of rejects is not that of the damaged images")
    check(all(rejected.values()), "a reject has no reason")
    check_values(campaign, table, good)
    campaign.wanted = fingerprint(out)
    campaign.note("undisturbed", rows=len(good), rejected=len(rejected), shards=campaign.shards)


def check_values(campaign: Campaign, table: Any, good: list[str]) -> None:
    """A few rows against the classifier called by hand, each image alone."""
    model = MHEXClassifier.from_pretrained(campaign.work / "run")
    preprocessing = model.config.preprocessing
    for row in range(0, len(good), max(1, len(good) // 8)):
        image = preprocessing.load(campaign.work / "archive" / good[row])
        found = model.explain(preprocessing.normalize(image[None]))
        stored = np.asarray(table["saliency"][row].as_py(), np.float64) * table["saliency_scale"][row].as_py()
        worst = float(np.abs(stored - found.saliency[0].numpy()).max())
        check(worst <= 0.5 / 255 + 1e-4, f"{good[row]}: a map is {worst:.4f} off")


# ------------------------------------------------------------------------------------------------------------ scenarios


def other_ways(campaign: Campaign) -> None:
    """The same bytes, however it is done."""
    ways = (("--batch-size", "5"), ("--batch-size", "100", "--workers", "0"), ("--lanes", "1", "--workers", "3"))
    for number, way in enumerate(ways):
        out = campaign.work / f"way-{number}"
        campaign.finish(out, *way)
        shutil.rmtree(out)
    campaign.note("other batch sizes, lanes, workers", ways=len(ways))


def killed_drivers(campaign: Campaign, kills: int, generator: random.Random, *more: str) -> None:
    """kill -9 of the whole command at any moment, again and again over the same folder."""
    out = campaign.work / "killed"
    done: list[int] = []
    while len(done) < kills:
        process = campaign.start(out, *more)
        before = parts(out)
        if generator.random() < 0.3:
            time.sleep(generator.uniform(0, campaign.first))
        elif wait_for(lambda before=before: parts(out) > before, process):  # type: ignore[misc]
            time.sleep(generator.uniform(0, 1.5 * campaign.each))
        check(process.poll() is None, "it finished before it could be killed; more images are needed")
        kill(process)
        done.append(parts(out))
    campaign.finish(out, *more)
    shutil.rmtree(out)
    kind = " on Ray" if more else ""
    campaign.note(f"kill -9 of the driver{kind}", kills=kills, shards_there_after_each=" ".join(map(str, done)))


def killed_reader(campaign: Campaign) -> None:
    """kill -9 of a process that reads: the command survives it."""
    out = campaign.work / "reader"
    process = campaign.start(out, "--workers", "1")
    check(first_shard(out, process), "no shard was written")
    readers = [pid for pid in descendants(process.pid) if b"mhex_vision.cli" in command_line(pid)]
    check(bool(readers), "no process that reads was found")
    os.kill(readers[0], signal.SIGKILL)
    _, complained = process.communicate(timeout=PATIENCE * 4)
    check(process.returncode == SOME_REJECTED, f"exit status {process.returncode}: {complained}")
    campaign.compare(out)
    shutil.rmtree(out)
    campaign.note("kill -9 of a reader", survived="yes")


def stopped(campaign: Campaign, numbers: Sequence[signal.Signals]) -> None:
    """Ctrl-C: the shard in hand is finished, status 130, and the same command goes on."""
    for number in numbers:
        out = campaign.work / "stopped"
        process = campaign.start(out)
        check(first_shard(out, process), "no shard was written")
        os.kill(process.pid, number)
        _, complained = process.communicate(timeout=PATIENCE)
        check(process.returncode == INTERRUPTED, f"exit status {process.returncode}: {complained}")
        left = parts(out)
        check(0 < left < campaign.shards, f"{left} of {campaign.shards} shards after it was stopped")
        manifest = json.loads((out / "manifest.json").read_text())
        check(len(manifest["shards"]) == left and not manifest["complete"], "the manifest says something else")
        campaign.finish(out)
        shutil.rmtree(out)
        campaign.note(f"{number.name}", shards=left)


def full_disk(campaign: Campaign) -> None:
    """A disk too small is told of after the first shard; one that others fill up, when it is full."""
    size = sum((campaign.work / "undisturbed" / name).stat().st_size for name in campaign.wanted)
    mount = campaign.work / "small-disk"
    mount.mkdir()
    try:
        with tmpfs(mount, size // 2):
            out = mount / "out"
            process = campaign.start(out)
            _, complained = process.communicate(timeout=PATIENCE)
            check((process.returncode, "free, and the" in complained) == (1, True), complained)
            early = parts(out)
            check(early <= campaign.shards // 3, f"it noticed after {early} of {campaign.shards} shards")
            remount(mount, 3 * size)
            campaign.finish(out)
        with tmpfs(mount, 3 * size):
            out = mount / "out"
            process = campaign.start(out, "--workers", "1")
            # The space is judged by the first shard while the next two are made; filled before, it is told otherwise.
            check(wait_for(lambda: parts(out) > 3, process), "fewer than four shards were written")
            fill(mount / "somebody-else")
            _, complained = process.communicate(timeout=PATIENCE)
            check((process.returncode, "no space is left" in complained) == (1, True), complained)
            late = parts(out)
            check(late < campaign.shards, "it was done before the disk was full")
            halves = [path.name for path in (out / "data").glob(".part*")]
            check(not halves, f"half a shard was left: {halves}")
            (mount / "somebody-else").unlink()
            campaign.finish(out)
    finally:
        mount.rmdir()
    campaign.note("full disk", told_after=early, filled_after=late)


def on_ray(campaign: Campaign, generator: random.Random, kinds: Sequence[str], kills: int) -> None:
    """The same bytes from Ray, also when its workers are killed."""
    out = campaign.work / "ray"
    for kind in kinds:
        process = campaign.start(out, "--engine", "ray")
        check(first_shard(out, process), "no shard was written")
        victims = busy_with(kind, process)
        victim, name = generator.choice(victims)
        os.kill(victim, signal.SIGKILL)
        _, complained = process.communicate(timeout=PATIENCE * 4)
        check(process.returncode == SOME_REJECTED, f"exit status {process.returncode}: {complained}")
        campaign.compare(out)
        shutil.rmtree(out)
        campaign.note(f"kill -9 of {name}", survived="yes")
    if kills:
        killed_drivers(campaign, kills, generator, "--engine", "ray")


# ---------------------------------------------------------------------------------------------------------------- tools


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that they did."""
    parents: dict[int, int] = {}
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            try:
                status = (place / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(place.name)] = int(status[1])
    found, frontier = [], {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier}
        found += sorted(frontier)
    return found


def busy_with(kind: str, process: subprocess.Popen[str]) -> list[tuple[int, str]]:
    """Ray's processes that run just such a task: they are called after it only then."""
    found: list[tuple[int, str]] = []

    def seen() -> bool:
        found[:] = [one for one in ray_processes(process.pid) if kind in one[1]]
        return bool(found)

    check(wait_for(seen, process), f"no process of Ray's was called {kind}")
    return found


def ray_processes(pid: int) -> list[tuple[int, str]]:
    """Those that Ray started below a process, with what each is called just now."""
    named = [(child, command_line(child).split(b"\0")[0].decode()) for child in descendants(pid)]
    return [(child, name) for child, name in named if name.startswith("ray::")]


def command_line(pid: int) -> bytes:
    """Of a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@contextmanager
def tmpfs(mount: Path, size: int) -> Iterator[None]:
    """A file system of so many bytes."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def remount(mount: Path, size: int) -> None:
    """Give it another size."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(mount)], check=True)


def fill(path: Path) -> None:
    """Take all the space that is left."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            return


def can_mount(work: Path) -> bool:
    """Whether small file systems can be made here."""
    probe = work / "probe"
    probe.mkdir()
    try:
        with tmpfs(probe, 1 << 16):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        probe.rmdir()


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="an empty folder for everything")
    parser.add_argument("--images", type=int, default=3000, metavar="N")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="of the driver, in a row")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments")
    parser.add_argument("--small", action="store_true", help="a minute of it; no result is written")
    options = parser.parse_args()
    if options.small:
        options.images, options.kills = 480, 2
    options.work.mkdir(parents=True, exist_ok=True)
    generator = random.Random(options.seed)
    campaign = Campaign(options.work.absolute(), options.images, 32)
    make_archive(campaign, generator)
    make_classifier(campaign.work / "run")
    undisturbed(campaign)
    if not options.small:
        other_ways(campaign)
    killed_drivers(campaign, options.kills, generator)
    killed_reader(campaign)
    stopped(campaign, (signal.SIGINT,) if options.small else (signal.SIGINT, signal.SIGTERM))
    if can_mount(campaign.work):
        full_disk(campaign)
    else:
        print("--  full disk: no small file system can be made here", flush=True)
    if importlib.util.find_spec("ray") is not None:
        kinds = ("ExplainShards",) if options.small else ("ReadShards", "ExplainShards", "Conductor")
        on_ray(campaign, generator, kinds, 0 if options.small else 3)
    else:
        print("--  Ray: not installed", flush=True)
    if not options.small:
        record = {"images": options.images, "seed": options.seed, "scenarios": campaign.results}
        print(f"wrote {common.write('faults', record)}")


if __name__ == "__main__":
    main()

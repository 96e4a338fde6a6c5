"""How fast is a batch beside the bare model, and beside the loop that users write today? Does its memory stay flat?

    python benchmarks/batch.py --root DIR --work DIR [--steps throughput,memory,rival,cost]

`--root` holds medmnist/bloodmnist.npz and blood224/. Every contender runs in a process of its own, in turns, on the
same files, without any OMP_* variable set. A batch is timed as the command tells it: from the first input to the last
file, loading the model and starting processes included, importing Python packages and listing the inputs not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from pyarrow import parquet

import common
from mhex_core.bulk import shards
from mhex_vision import load_classifier
from mhex_vision.bulk import ImageJob, open_source

BATCH = {28: 256, 224: 32}
STEPS = ("throughput", "memory", "rival", "cost")
SAMPLE_SECONDS = 0.2


def main() -> None:
    """Measure what is asked for, and write a result for each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, metavar="DIR", help="the data")
    parser.add_argument("--work", type=Path, metavar="DIR", help="for archives, runs and output")
    parser.add_argument("--steps", default=",".join(STEPS), metavar="A,B")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--contender", nargs=2, metavar=("NAME", "PX"), help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, metavar="N", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender is not None:
        name, side = options.contender
        if name == "cost":
            print(json.dumps(costs(options.work, int(side))))
        else:
            print(f"rate {CONTENDERS[name](options.work, int(side)):.3f}")
        return
    bench = Bench(options.root.absolute(), options.work.absolute(), options.rounds)
    bench.prepare()
    for step in options.steps.split(","):
        record = getattr(bench, step)()
        print(f"wrote {common.write(f'batch-{step}', record)}", flush=True)


class Bench:
    """The archives, and what is measured on them."""

    def __init__(self, root: Path, work: Path, rounds: int) -> None:
        self._root, self._work, self._rounds = root, work, rounds
        self.under_way: dict[str, list[float]] = {}

    def prepare(self) -> None:
        """Runs of one epoch (speed does not ask for more), and the cells as files."""
        for side, data in ((28, "bloodmnist"), (224, str(self._root / "blood224"))):
            if not (self._work / f"run-{side}").exists():
                common.run_step(
                    "mhex-vision",
                    f"train --data {data} --root {{root}} --no-download --size {side} --epochs 1 --out {{run}}",
                    {"root": str(self._root / "medmnist"), "run": str(self._work / f"run-{side}")},
                )
        cells = self._work / "cells-28"
        if not cells.exists():
            scratch = self._work / ".cells-28"
            scratch.mkdir(parents=True, exist_ok=True)
            with np.load(self._root / "medmnist" / "bloodmnist.npz") as archive:
                images = np.concatenate([archive[f"{split}_images"] for split in ("train", "val", "test")])
            for number, image in enumerate(images):
                Image.fromarray(image).save(scratch / f"{number:05d}.png")
            scratch.rename(cells)

    def archive(self, side: int, count: int) -> Path:
        """So many files, the cells over and over: links, which are opened and decoded like any file."""
        folder = self._work / f"archive-{side}-{count}"
        if folder.exists():
            return folder
        source = self._work / "cells-28" if side == 28 else self._root / "blood224"
        cells = sorted(path for path in source.rglob("*") if path.suffix in (".png", ".jpg"))
        scratch = folder.with_name(f".{folder.name}")
        for number in range(count):
            cell = cells[number % len(cells)]
            link = scratch / f"{number // 1000:03d}" / f"{number:06d}{cell.suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(cell)
        scratch.rename(folder)
        return folder

    def throughput(self) -> dict[str, Any]:
        """The bare model three ways, and a batch by either engine."""
        found: dict[str, Any] = {}
        for side, count in ((224, 10_000), (28, 50_000)):
            archive = self.archive(side, count)
            turns: dict[str, Callable[[], float]] = {
                **{name: self._own(name, side) for name in CONTENDERS if name.startswith("bare")},
                "batch": lambda archive=archive, side=side: self.batch(archive, side),
                "batch on a local Ray": lambda archive=archive, side=side: self.batch(archive, side, "--engine", "ray"),
            }
            self.under_way = {}
            rates = in_turns(turns, self._rounds) | self.under_way
            best = max(statistics.median(rates[name]) for name in rates if name.startswith("bare"))
            found[str(side)] = {
                "images": count,
                "batch_size": BATCH[side],
                "rates": rates,
                "ratios": {name: statistics.median(rates[name]) / best for name in rates},
            }
            print(side, {name: round(ratio, 3) for name, ratio in found[str(side)]["ratios"].items()}, flush=True)
        return {"sides": found}

    def memory(self) -> dict[str, Any]:
        """The most that the command and all its processes held at once, shared pages counted once."""
        found: dict[str, Any] = {}
        for side, counts in ((28, (1000, 10_000, 100_000)), (224, (1000, 5000))):
            for count in counts:
                watched = Watched()
                rate = self.batch(self.archive(side, count), side, watched=watched)
                found[f"{side} px, {count}"] = {"peak_bytes": watched.peak, "rate": rate}
                print(side, count, f"{watched.peak / 1e6:.0f} MB, {rate:.0f} a second", flush=True)
        return {"archives": found}

    def rival(self) -> dict[str, Any]:
        """The loop that users write: pytorch-grad-cam over a DataLoader, one .npy for each image."""
        found: dict[str, Any] = {}
        for side, count in ((224, 600), (28, 10_000)):
            archive = self.archive(side, count)
            turns: dict[str, Callable[[], float]] = {
                "pytorch-grad-cam, DataLoader, .npy": self._own("loop", side, count),
                "batch": lambda archive=archive, side=side: self.batch(archive, side),
            }
            rates = in_turns(turns, self._rounds)
            medians = [statistics.median(values) for values in rates.values()]
            found[str(side)] = {"images": count, "rates": rates, "ratio": medians[1] / medians[0]}
            print(side, f"{medians[1] / medians[0]:.2f} times as fast", flush=True)
        return {"sides": found}

    def cost(self) -> dict[str, Any]:
        """What an image costs, part by part, on one thread, and what it takes on the disk."""
        found: dict[str, Any] = {}
        for side in (224, 28):
            words = [sys.executable, __file__, "--work", str(self._work), "--contender", "cost", str(side)]
            environment = {"MHEX_BENCH_ARCHIVE": str(self.archive(side, 1200))}
            found[str(side)] = json.loads(finished(words, None, environment).splitlines()[-1])
            print(side, found[str(side)], flush=True)
        return {"sides": found}

    def batch(self, archive: Path, side: int, *more: str, watched: Watched | None = None) -> float:
        """Images a second of the command."""
        out = self._work / "out"
        words = [
            *(sys.executable, "-m", "mhex_vision.cli", "batch", "--checkpoint", str(self._work / f"run-{side}")),
            *("--input", str(archive), "--out", str(out), "--batch-size", str(BATCH[side]), "--overwrite", *more),
        ]
        text = finished(words, watched)
        times = sorted(path.stat().st_mtime for path in (out / "data").glob("part-*"))
        sizes = json.loads((out / "manifest.json").read_text())
        # Shards may end in another order than they begin; all but the last are of one size.
        steady = sizes["shard_size"] * (len(times) - 2) / max(1e-9, times[-2] - times[0]) if len(times) > 3 else 0.0
        name = "batch on a local Ray" if more else "batch"
        self.under_way.setdefault(f"{name}, once under way", []).append(steady)
        return float(re.search(r"; ([\d.]+) a second", text).group(1))  # type: ignore[union-attr]

    def _own(self, name: str, side: int, count: int = 0) -> Callable[[], float]:
        words = [sys.executable, __file__, "--work", str(self._work), "--contender", name, str(side)]
        environment = {"MHEX_BENCH_ARCHIVE": str(self.archive(side, count))} if count else {}
        return lambda: float(finished(words, None, environment).split()[-1])


class Watched:
    """The most memory that a process and its descendants held."""

    def __init__(self) -> None:
        self.peak = 0

    def follow(self, process: subprocess.Popen[str]) -> None:
        """Look until the process ends."""
        while process.poll() is None:
            self.peak = max(self.peak, sum(proportional(pid) for pid in [process.pid, *descendants(process.pid)]))
            time.sleep(SAMPLE_SECONDS)


def proportional(pid: int) -> int:
    """Bytes of a process, pages that n processes share counted as an n-th."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return 0 if found is None else 1024 * int(found.group(1))


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that they did."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [one for child in children for one in (int(child), *descendants(int(child)))]


def finished(words: Sequence[str], watched: Watched | None, environment: dict[str, str] | None = None) -> str:
    """What a process says; it must succeed."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=plain | (environment or {})
    )
    if watched is not None:
        follower = threading.Thread(target=watched.follow, args=(process,))
        follower.start()
    said, complained = process.communicate()
    if watched is not None:
        follower.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(words)}: {complained}")
    return said


def in_turns(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each once, then each again: what slows the machine down for a while slows all of them."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, measure in contenders.items():
            rates[name].append(measure())
            print(f"  {name}: {rates[name][-1]:.1f}", flush=True)
    return rates


# ------------------------------------------------------------------------------ contenders, in processes of their own


def bare(work: Path, side: int, *, channels_last: bool, lanes: int) -> float:
    """Images a second of `model(images)`, with tensors that are there already."""
    model = load_classifier(work / f"run-{side}")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.to(memory_format=layout)
    images = torch.randn(BATCH[side], 3, side, side).contiguous(memory_format=layout)
    seconds, done = 15.0, [0] * lanes
    begun = time.perf_counter()

    def work_on(lane: int) -> None:
        if lanes > 1:
            torch.set_num_threads(1)
        with torch.inference_mode():
            while time.perf_counter() - begun < seconds:
                model(images)
                done[lane] += len(images)

    with torch.inference_mode():
        model(images)
    begun = time.perf_counter()
    threads = [threading.Thread(target=work_on, args=(lane,)) for lane in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - begun)


def loop(work: Path, side: int) -> float:
    """What one finds in tutorials: every choice as the library's examples have it."""
    from pytorch_grad_cam import GradCAM
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms
    from torchvision.models import resnet18

    class Files(Dataset):  # type: ignore[type-arg]
        def __init__(self, folder: Path) -> None:
            self.paths = sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".jpg"))
            self.transform = transforms.Compose(
                [transforms.Resize((side, side)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
            )

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
            return self.transform(Image.open(self.paths[index]).convert("RGB")), self.paths[index].stem

    out = work / "npy"
    out.mkdir(exist_ok=True)
    begun = time.perf_counter()
    model = resnet18(num_classes=8).eval()
    files = Files(Path(os.environ["MHEX_BENCH_ARCHIVE"]))
    with GradCAM(model=model, target_layers=[model.layer4[-1]]) as cam:
        for images, names in DataLoader(files, batch_size=BATCH[side], num_workers=1):
            for name, saliency in zip(names, cam(input_tensor=images, targets=None), strict=True):
                np.save(out / f"{name}.npy", saliency)
    return len(files) / (time.perf_counter() - begun)


def costs(work: Path, side: int) -> dict[str, Any]:
    """Milliseconds of each part for one image, medians over batches, and bytes."""
    torch.set_num_threads(1)
    archive, size = Path(os.environ["MHEX_BENCH_ARCHIVE"]), BATCH[side]
    times: dict[str, float] = {}

    def timed(name: str, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        taken, results = [], []
        for call in calls:
            begun = time.perf_counter()
            results.append(call())
            taken.append(1000 * (time.perf_counter() - begun))
        times[name] = statistics.median(taken[len(taken) > 2 :]) / size
        return results

    source = open_source(archive)
    job = ImageJob(str(work / f"run-{side}"), source)
    list(job.entries())  # Pillow loads its formats when first asked for them
    begun = time.perf_counter()
    entries = pa.Table.from_batches(job.entries()).combine_chunks().to_batches()[0]
    times["list"] = 1000 * (time.perf_counter() - begun) / len(entries)
    parts = [entries.slice(start, size) for start in range(0, len(entries) - size + 1, size)]
    reader, model = job.reader(), job.model(torch.device("cpu"), batch_size=size)
    decoded = timed("read and decode", [lambda part=part: reader(part) for part in parts])
    few = decoded[: max(3, 512 // size)]
    timed("explain", [lambda one=one: model(one.values) for one in few])
    sizes: dict[str, float] = {}
    for resolution, dtype in itertools.product(("full", "native"), ("uint8", "float16")):
        other = ImageJob(str(work / f"run-{side}"), source, resolution=resolution, dtype=dtype)  # type: ignore[arg-type]
        rows = [other.model(torch.device("cpu"), batch_size=size)(one.values) for one in few]
        path = work / "one.parquet"
        with parquet.ParquetWriter(path, other.schema, **as_shards_are(other)) as writer:
            timed(
                f"write, {resolution} {dtype}", [lambda row=row, writer=writer: writer.write_batch(row) for row in rows]
            )
        sizes[f"{resolution} {dtype}"] = path.stat().st_size / sum(len(row) for row in rows)
    files = [Path(name).stat().st_size for name in entries.column("source").to_pylist()]
    return {"milliseconds": times, "bytes": sizes, "input_bytes": statistics.mean(files), "batch_size": size}


def as_shards_are(job: ImageJob) -> dict[str, Any]:
    """How a shard's file is written."""
    layout = dict(shards.encodings(job.schema))
    texts = [field.name for field in job.schema if pa.types.is_string(field.type)]
    return {"column_encoding": layout, "use_dictionary": texts, "compression": "zstd", "compression_level": 1}


CONTENDERS: dict[str, Callable[[Path, int], float]] = {
    "bare model": lambda work, side: bare(work, side, channels_last=False, lanes=1),
    "bare model, channels_last": lambda work, side: bare(work, side, channels_last=True, lanes=1),
    "bare model, channels_last, a thread per batch": lambda work, side: bare(
        work, side, channels_last=True, lanes=os.cpu_count() or 1
    ),
    "loop": loop,
}


if __name__ == "__main__":
    main()

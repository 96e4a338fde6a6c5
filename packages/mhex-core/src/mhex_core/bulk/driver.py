"""A bulk run from beginning to end: prepare the folder, list, see what is done, explain the rest, sum up."""

from __future__ import annotations

import errno
import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Protocol

from mhex_core.bulk.embedded import run_embedded
from mhex_core.bulk.job import BulkJob
from mhex_core.bulk.manifest import read_manifest, versions, write_manifest, write_rejected
from mhex_core.bulk.options import BulkOptions, BulkSummary, cores
from mhex_core.bulk.plan import (
    DATA_FOLDER,
    LISTING_FILE,
    MANIFEST_FILE,
    REJECTED_FILE,
    RunPlan,
    count_listed,
    default_shard_size,
    digest_of,
    write_listing,
)
from mhex_core.bulk.progress import Interrupts, Progress, Say, size
from mhex_core.bulk.shards import ShardRecord, committed, rejects
from mhex_core.files import remove_partials

try:
    import fcntl
except ImportError:  # Windows has none; there nobody keeps two runs apart
    fcntl = None  # type: ignore[assignment]

_LOCK_FILE = ".lock"
_OURS = (LISTING_FILE, REJECTED_FILE, MANIFEST_FILE)
_HELD: set[Path] = set()  # folders that runs of this process write to: a lock tells processes apart, and no threads
_HELD_LOCK = Lock()
_SPARE = 0.02  # of the space needed, for what file systems keep to themselves


def run(
    job: BulkJob,
    out: str | Path,
    *,
    options: BulkOptions | None = None,
    say: Say | None = None,
    complain: Say | None = None,
) -> BulkSummary:
    """Explain all inputs of a job into a folder; what is there already of the same run is left as it is.

    Args:
        job: What is explained, and by what.
        out: The folder. It is made if it is not there.
        options: How; None means `BulkOptions()`.
        say: Takes lines about progress. In a terminal a bar is shown besides, unless this is None.
        complain: Takes warnings.

    Returns:
        What came of it, also when it was asked to stop (Ctrl-C or SIGTERM) and did.

    Raises:
        ValueError: The folder holds something else, or a run with other settings.
        OSError: The folder cannot be written to, is too small for what is to come, or another process writes to it.
        KeyboardInterrupt: It was asked to stop twice.
    """
    options = BulkOptions() if options is None else options
    if not isinstance(options, BulkOptions):
        raise TypeError(f"options must be BulkOptions, got {type(options).__name__}")
    folder = Path(out).absolute()
    with _held(folder):
        if options.overwrite:
            _remove(folder)
        plan = _prepared(job, folder, options, say, complain)
        done, damaged = committed(plan)
        _sweep(plan, damaged, complain)
        before = sum(stop - start for start, stop in map(plan.bounds, done))
        todo = [number for number in range(plan.shards()) if number not in done]
        if before and say is not None:
            say(f"{before:,} of {plan.inputs:,} inputs are done already")
        space = _Space(job, plan, todo)
        with Progress(plan.inputs - before, say, _both(done, space)) as progress:
            with Interrupts(progress, complain), _fullness(folder, done, plan):
                if todo:
                    _engine(options)(job, plan, todo, options=options, progress=progress)
            seconds = progress.seconds
        with _fullness(folder, done, plan):
            write_rejected(folder, rejects(plan, sorted(done)))
            write_manifest(job, folder, plan.shard_size, plan, done)
        now = progress.rows + progress.rejected
        lanes = options.lanes or cores()
        return BulkSummary(
            out=folder,
            inputs=plan.inputs,
            rows=sum(record.rows for record in done.values()),
            rejected=sum(record.rejected for record in done.values()),
            done_before=before,
            bytes=sum(record.bytes for record in done.values()),
            seconds=seconds,
            rate=now / seconds if now and seconds else 0.0,
            model_share=min(1.0, progress.model_seconds / (lanes * seconds)) if now and seconds else 0.0,
            interrupted=progress.stopping and len(done) < plan.shards(),
        )


def told(summary: BulkSummary, program: str) -> list[str]:
    """A summary in lines."""
    missing = summary.inputs - summary.rows - summary.rejected
    lines = [
        f"explained {summary.rows:,} of {summary.inputs:,} inputs"
        + (f", {summary.rejected:,} could not be read" if summary.rejected else "")
        + (f", {missing:,} are left" if missing else "")
        + (f"; {summary.rate:.1f} a second" if summary.rate else "")
        + (f", {100 * summary.model_share:.0f} % of it in the model" if summary.model_share else "")
    ]
    lines.append(f"wrote {summary.out / DATA_FOLDER} ({size(summary.bytes)}) and {MANIFEST_FILE}")
    if summary.rejected:
        lines.append(f"what could not be read, and why: {summary.out / REJECTED_FILE}")
    if missing:
        lines.append(f"the same {program} command goes on with what is left")
    else:
        name = program.removesuffix(" batch")
        lines.append(
            f"next: {name} report --archive {shlex.quote(str(summary.out))} --out report.html shows some of it"
        )
        lines.append(
            f'all of it: datasets.load_dataset("parquet", data_dir="{summary.out / DATA_FOLDER}", split="train")'
        )
    return lines


def _engine(options: BulkOptions) -> _Engine:
    if options.engine == "embedded":
        return run_embedded
    from mhex_core.bulk.cluster import run_on_ray

    return run_on_ray


class _Engine(Protocol):
    def __call__(
        self, job: BulkJob, plan: RunPlan, todo: Sequence[int], *, options: BulkOptions, progress: Progress
    ) -> None: ...


def _both(done: dict[int, ShardRecord], space: _Space) -> Callable[[ShardRecord], None]:
    def take(record: ShardRecord) -> None:
        done[record.number] = record
        space.look(record)

    return take


# -------------------------------------------------------------------------------------------------------- the folder


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The folder, made if need be, for this process alone."""
    place = folder.resolve()
    with _HELD_LOCK:
        # Before the file is opened: closing it would end the lock that another thread has on it.
        if place in _HELD:
            raise OSError(f"{folder} is being written to by another thread of this process")
        _HELD.add(place)
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / _LOCK_FILE).open("a")
        except OSError as error:
            raise OSError(f"cannot write to {folder}: {error.strerror or error}") from error
        with lock:
            try:
                if fcntl is not None:
                    # A lock of this process, which those it starts do not inherit and keep when it is killed.
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise OSError(f"{folder} is being written to by another process") from error
            yield
    finally:
        _HELD.discard(place)


@contextmanager
def _fullness(folder: Path, done: dict[int, ShardRecord], plan: RunPlan) -> Iterator[None]:
    """A disk that fills up is told of in words that help."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"no space is left for {folder}; {len(done)} of {plan.shards()} shards are whole: make room, and the same "
            "command goes on"
        ) from error


def _remove(folder: Path) -> None:
    """Remove what a run left, and nothing else."""
    found = read_manifest(folder)
    if found is None:
        return
    # The manifest last: until then the folder is known as ours.
    if found["inputs"] is not None:
        begun = RunPlan(out=folder, inputs=found["inputs"], shard_size=found["shard_size"], digest="")
        for number in range(begun.shards()):
            begun.path(number).unlink(missing_ok=True)
    for name in _OURS:
        (folder / name).unlink(missing_ok=True)


def _prepared(job: BulkJob, folder: Path, options: BulkOptions, say: Say | None, complain: Say | None) -> RunPlan:
    """The plan of a run that is there, or of a new one."""
    found = read_manifest(folder)
    settings = json.loads(json.dumps(dict(job.settings)))
    listing = folder / LISTING_FILE
    if found is None:
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        data = folder / DATA_FOLDER
        if others == [DATA_FOLDER] and data.is_dir() and all(path.name.startswith(".") for path in data.iterdir()):
            others = []  # what was begun to be removed, and no more
        if others:
            raise ValueError(f"{folder} must be empty or hold a run of this kind, got {others[0]} in it")
        shard_size = options.shard_size or default_shard_size(job.input_bytes)
        write_manifest(job, folder, shard_size, None, {})
    else:
        if found["program"] != job.program:
            raise ValueError(f"{folder} holds a run of {found['program']}, not of {job.program}")
        other = [
            name
            for name in sorted({*settings, *found["settings"]})
            if settings.get(name) != found["settings"].get(name) or (name in settings) != (name in found["settings"])
        ]
        if other:
            held, asked = found["settings"].get(other[0]), settings.get(other[0])
            raise ValueError(
                f"{folder} holds a run with another {other[0]} ({held!r}, not {asked!r}); choose another folder, or "
                "overwrite"
            )
        began, now = (about.get("input") for about in (found["about"], job.about))
        if not _is_same_input(began, now):
            raise ValueError(f"{folder} holds a run over {began}, not {now}; choose another folder, or overwrite")
        _compare(found["versions"], folder, complain)
        shard_size = int(found["shard_size"])
        if options.shard_size not in (None, shard_size):
            raise ValueError(
                f"shard_size must be {shard_size}, with which the run in {folder} began, got {options.shard_size}"
            )
    (folder / DATA_FOLDER).mkdir(exist_ok=True)
    if listing.is_file():
        inputs = count_listed(listing)
    else:
        inputs = write_listing(listing, job.entries(), lambda _: None)
        if say is not None:
            say(f"{inputs:,} inputs")
    if not inputs:
        listing.unlink(missing_ok=True)
        raise ValueError("there is nothing to explain among the inputs")
    plan = RunPlan(out=folder, inputs=inputs, shard_size=shard_size, digest=digest_of(settings, listing, shard_size))
    if found is None or found["digest"] is None:
        write_manifest(job, folder, shard_size, plan, {})
    elif found["digest"] != plan.digest:
        raise ValueError(f"{listing} was changed since the run in {folder} began; choose another folder, or overwrite")
    return plan


def _is_same_input(began: object, now: object) -> bool:
    """Whether two runs read the same, by name or by the place that a name leads to."""
    if began == now or not isinstance(began, str) or not isinstance(now, str):
        return began == now
    return Path(began).exists() and Path(began).resolve() == Path(now).resolve()


def _compare(begun: Mapping[str, str], folder: Path, complain: Say | None) -> None:
    """Say so if what is missing will be made by other libraries than what is there."""
    for name, now in versions().items():
        if begun.get(name) != now and complain is not None:
            complain(f"{folder} was begun with {name} {begun.get(name)}; with {now} last digits may differ")


def _sweep(plan: RunPlan, damaged: list[Path], complain: Say | None) -> None:
    """Remove what a killed process left half-written, and shards that cannot be read."""
    remove_partials(plan.out, _OURS)
    remove_partials(plan.out / DATA_FOLDER, {plan.path(number).name for number in range(plan.shards())})
    for path in damaged:
        if complain is not None:
            complain(f"{path} is damaged and is made anew")
        path.unlink()


class _Space:
    """Whether the disk will do: for one shard before anything is computed, for all as soon as one is written."""

    def __init__(self, job: BulkJob, plan: RunPlan, todo: list[int]) -> None:
        self._plan, self._left = plan, sum(stop - start for start, stop in map(plan.bounds, todo))
        self._looked = False
        if todo:
            rows = min(self._left, plan.shard_size)
            self._check(job.row_bytes * rows * 0.2, f"a shard of {rows} rows")

    def look(self, record: ShardRecord) -> None:
        """Judge by the first shard that has rows."""
        self._left -= record.rows + record.rejected
        if self._looked or not record.rows:
            return
        self._looked = True
        per_input = record.bytes / (record.rows + record.rejected)
        self._check(per_input * self._left, f"the {self._left:,} inputs left")

    def _check(self, needed: float, what: str) -> None:
        try:
            free = shutil.disk_usage(self._plan.out).free
        except OSError:
            return
        if needed * (1 + _SPARE) > free:
            raise OSError(
                f"{self._plan.out} has {size(free)} free, and {what} will take about {size(needed)}; make room, or "
                "choose another folder, maps of fewer bytes or of lower resolution"
            )

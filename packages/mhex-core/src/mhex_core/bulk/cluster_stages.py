"""What runs inside a Ray cluster: tasks that read shards, actors that explain and write them, and who leads them.

A shard travels as one row, which Ray never splits. Nothing raised by a job reaches Ray as an exception: it is passed on
as a value, so that it arrives as it was raised. What is left for Ray to report is processes that died.
"""

from __future__ import annotations

import inspect
import os
import pickle  # between processes of one run; no file of a user's
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mhex_core.bulk.flags import SAME_BITS
from mhex_core.bulk.job import BulkJob, Decoded, Reader, first_line, sendable
from mhex_core.bulk.manifest import versions
from mhex_core.bulk.pipeline import ShardPipeline
from mhex_core.bulk.plan import RunPlan
from mhex_core.bulk.shards import ShardRecord
from mhex_core.files import remove_partials

READ, EXPLAIN, START = "read", "explain", "start"

_DEATHS = 3  # of processes over one shard; then it is the shard, not chance
_CALLS = 2  # of an actor at once: one shard is written while the next is explained
_WAITING = 2  # shards read ahead for an actor, beyond those
_BUFFERED = 3  # shards a reading task holds: the one in hand, and what Ray keeps of its output
_MARKS = re.compile(r"\.ray-[0-9a-f]{12}")  # folders of marks
_PATIENCE = 100  # tries to remove a folder
_TASKS = 512  # Ray takes milliseconds for each, most of them before the first one starts

Outcome: TypeAlias = ShardRecord | Exception | None
"""What became of a shard: its record, why it failed, or None where the run was asked to stop before it."""


@dataclass(frozen=True)
class Layout:
    """How a run is spread over a cluster.

    Attributes:
        actors: Processes that hold a model.
        lanes: Of each, on a CPU.
        on_gpu: Whether each has a GPU of its own.
        readers: Tasks that read at once.
    """

    actors: int
    lanes: int
    on_gpu: bool
    readers: int


class Carried:
    """A job on its way to other processes, which look for its modules where this one does."""

    def __init__(self, job: BulkJob) -> None:
        self.job = job

    def __reduce__(self) -> tuple[Any, ...]:
        paths = [str(Path(path).resolve()) for path in sys.path]
        return _arrived, (paths, os.environ.get(SAME_BITS), import_module("ray.cloudpickle").dumps(self.job))


def _arrived(paths: list[str], same_bits: str | None, job: bytes) -> Carried:
    if same_bits is not None:
        os.environ.setdefault(SAME_BITS, same_bits)
    sys.path.extend(path for path in paths if path not in sys.path)
    return Carried(pickle.loads(job))  # noqa: S301 - see above


@dataclass(frozen=True)
class Marks:
    """Files in the run's folder by which the processes of a run know of each other.

    The folder is there on every node anyway, and a file that is opened anew is up to date on a network file system
    too. A mark per shard under way counts how often it was begun: Ray restarts what dies without end.

    Attributes:
        folder: Where they lie.
    """

    folder: Path

    @property
    def state(self) -> Path:
        """Says whether the run goes on."""
        return self.folder / "state"

    def make(self) -> None:
        """Begin; what a killed run left is removed."""
        for old in self.folder.parent.iterdir():
            if _MARKS.fullmatch(old.name) and old.is_dir() and not old.is_symlink():
                shutil.rmtree(old, ignore_errors=True)
        self.folder.mkdir()
        self.state.write_text("go")

    def stop(self) -> None:
        """Let no further shard begin."""
        self.state.write_text("stop")

    def remove(self) -> None:
        """End. Processes that are left over stop by themselves, though one may be adding a mark just now."""
        for _ in range(_PATIENCE):
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                return
            time.sleep(0.05)

    def stopping(self) -> bool:
        """Whether no further shard may begin."""
        try:
            return self.state.read_text() != "go"
        except OSError:
            return True

    def begin(self, kind: str, number: int = 0) -> int:
        """Mark something as under way; returns how often that was done without an end."""
        path = self.folder / f"{kind}-{number}"
        with suppress(FileNotFoundError), path.open("ab") as file:
            file.write(b".")
            return file.tell()
        return 1

    def end(self, kind: str, number: int = 0) -> None:
        """It is under way no more."""
        (self.folder / f"{kind}-{number}").unlink(missing_ok=True)

    def any(self, kind: str) -> bool:
        """Whether something of the kind is under way."""
        return next(self.folder.glob(f"{kind}-*"), None) is not None


class ReadShards:
    """What reading tasks call: shard numbers in, what was read out, one row each."""

    def __init__(self, carried: Carried, plan: RunPlan, marks: Marks) -> None:
        self._carried, self._plan, self._marks = carried, plan, marks
        self._reader: Reader | None = None

    def __call__(self, numbers: pa.Table) -> pa.Table:
        """One number, one row."""
        (number,) = numbers.column("item").to_pylist()
        head, body = self._read(number)
        rows = pa.Array.from_buffers(
            pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, body.nbytes], np.int64)), pa.py_buffer(body)]
        )
        return pa.table({"number": pa.array([number], pa.int64()), "head": [pickle.dumps(head)], "body": rows})

    def _read(self, number: int) -> tuple[Any, np.ndarray[Any, Any]]:
        nothing = np.empty(0, np.uint8)
        if self._marks.stopping():
            return None, nothing
        if self._marks.begin(READ, number) > _DEATHS:
            return _deadly("reading", number, self._plan), nothing
        try:
            if self._reader is None:
                torch.set_num_threads(1)
                self._reader = self._carried.job.reader()
            read = _pack(self._reader(self._plan.entries(number)))
        except Exception as error:  # noqa: BLE001 - raised again where the run was begun
            read = sendable(error), nothing
        self._marks.end(READ, number)
        return read


class ExplainShards:
    """The actor: holds the model, explains shards and writes them."""

    def __init__(self, carried: Carried, plan: RunPlan, marks: Marks, layout: Layout, batch_size: int) -> None:
        self._plan, self._marks = plan, marks
        self._turn = threading.Lock()
        self._open = ExitStack()
        self._problem: Exception | None = None
        if marks.begin(START) > (_DEATHS + 1) * layout.actors:
            self._problem = RuntimeError("processes died again and again while they made the model")
            return
        try:
            self._pipeline = self._open.enter_context(
                ShardPipeline(
                    carried.job,
                    plan,
                    batch_size=batch_size,
                    lanes=layout.lanes,
                    # Ray shows each actor the one GPU it has.
                    device=torch.device("cuda", 0) if layout.on_gpu else torch.device("cpu"),
                )
            )
        except Exception as error:  # noqa: BLE001 - raised again where the run was begun
            self._problem = sendable(error)
        marks.end(START)

    def __call__(self, shards: pa.Table) -> pa.Table:
        """One shard in, its outcome out."""
        number = shards.column("number")[0].as_py()
        # Marked first and asked then: whoever says stop and sees no mark afterwards knows that none will follow.
        begun = self._marks.begin(EXPLAIN, number)
        outcome = None if self._marks.stopping() else self._explain(number, begun, shards)
        if not isinstance(outcome, ShardRecord):
            self._marks.end(EXPLAIN, number)
        return pa.table({"outcome": [pickle.dumps(outcome)]})

    def _explain(self, number: int, begun: int, shards: pa.Table) -> Outcome:
        if self._problem is not None:
            return self._problem
        if begun > _DEATHS:
            return _deadly("explaining", number, self._plan)
        if begun > 1:
            path = self._plan.path(number)
            remove_partials(path.parent, {path.name})
        head = pickle.loads(shards.column("head")[0].as_py())  # noqa: S301 - ours, see above
        if head is None or isinstance(head, Exception):
            return head
        try:
            decoded = _unpack(head, shards.column("body")[0].as_buffer())
            with self._turn:  # shards one after another; only their ends and beginnings overlap
                record = self._pipeline.submit(number, self._plan.entries(number), [decoded])
            return record.result()
        except Exception as error:  # noqa: BLE001 - raised again where the run was begun
            return sendable(error)


class Conductor:
    """The actor that leads: runs Ray Data, in a process of its own, so that what Ray prints goes to Ray's logs."""

    def __init__(
        self, carried: Carried, plan: RunPlan, todo: Sequence[int], layout: Layout, batch_size: int, marks: Marks
    ) -> None:
        self._marks = marks
        self._arguments = (carried, plan, todo, layout, batch_size)
        self._outcomes = self._run()

    def take(self) -> list[Outcome]:
        """The next outcomes, as soon as there is one; none at the end."""
        try:
            return next(self._outcomes, [])
        except Exception as error:  # noqa: BLE001 - raised again where the run was begun
            if isinstance(error, import_module("ray").exceptions.RayError):
                return [RuntimeError(f"the Ray cluster failed: {first_line(error)}")]
            return [sendable(error)]

    def _run(self) -> Iterator[list[Outcome]]:
        data: Any = import_module("ray.data")
        carried, plan, todo, layout, batch_size = self._arguments
        _settle(layout, plan.shard_size * carried.job.input_bytes)
        tasks = -(-len(todo) // -(-len(todo) // _TASKS))
        shards = (
            data.from_items(list(todo), override_num_blocks=tasks)
            .map_batches(
                ReadShards(carried, plan, self._marks),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=_READER_CPUS,
                compute=data.TaskPoolStrategy(size=layout.readers),
            )
            .map_batches(
                ExplainShards,
                fn_constructor_args=(carried, plan, self._marks, layout, batch_size),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=_MODEL_CPUS + _LANE_CPUS * layout.lanes,
                num_gpus=1 if layout.on_gpu else None,
                **_actor_pool(layout.actors),
            )
        )
        for rows in shards.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
            outcomes: list[Outcome] = [pickle.loads(row.as_py()) for row in rows.column("outcome")]  # noqa: S301
            for outcome in outcomes:
                if isinstance(outcome, ShardRecord):
                    self._marks.end(EXPLAIN, outcome.number)
            outcomes = [outcome for outcome in outcomes if outcome is not None]
            if outcomes:
                yield outcomes
            if self._marks.stopping() and not self._marks.any(EXPLAIN):
                return


# Claims on a node's logical CPUs. How many readers and lanes there are is set by their numbers; the claims spread them
# over the nodes, and are small so that readers and lanes run side by side on a single processor, and that the actors of
# a node that is lost find room on another.
_READER_CPUS = 0.5
_LANE_CPUS = 0.25
_MODEL_CPUS = 0.1  # besides its lanes: Ray Data would make one step of two whose claims are equal


def _settle(layout: Layout, shard_bytes: int) -> None:
    """Ray Data's options, for the conductor's own process."""
    data: Any = import_module("ray.data")
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Every row is a block: the smallest thing that is handed to an actor.
    context.target_max_block_size = 1
    in_flight = layout.actors * (_CALLS + _WAITING) + layout.readers * _BUFFERED
    context.execution_options.resource_limits = data.ExecutionResources.for_limits(
        object_store_memory=in_flight * max(2**20, shard_bytes)
    )


def _actor_pool(size: int) -> dict[str, Any]:
    """Arguments for a pool whose actors take two calls at once."""
    strategy: Any = import_module("ray.data").ActorPoolStrategy
    pool: dict[str, Any] = {
        "size": size,
        "max_tasks_in_flight_per_actor": _CALLS + _WAITING,
        "enable_true_multi_threading": True,
    }
    if "max_concurrent_calls_per_actor" in inspect.signature(strategy).parameters:
        return {"compute": strategy(**pool, max_concurrent_calls_per_actor=_CALLS)}
    return {"compute": strategy(**pool), "max_concurrency": _CALLS}  # until Ray 2.55 or so


def _pack(read: Decoded) -> tuple[Any, np.ndarray[Any, Any]]:
    """What was read as a head to pickle and the bytes of a tensor, which are not copied into it."""
    values: Any = read.values
    body = np.empty(0, np.uint8)
    if isinstance(values, Tensor):
        body = values.contiguous().reshape(-1).view(torch.uint8).numpy()
        values = (values.dtype, tuple(values.shape))
    return (read.kept, read.rejected, read.groups, isinstance(read.values, Tensor), values), body


def _unpack(head: Any, body: pa.Buffer) -> Decoded:
    kept, rejected, groups, is_tensor, values = head
    if is_tensor:
        dtype, shape = values
        values = torch.empty(shape, dtype=dtype)
        # A copy: Ray's memory is read-only, and goes back to Ray sooner.
        values.reshape(-1).view(torch.uint8).numpy()[:] = np.frombuffer(body, np.uint8)
    return Decoded(kept=kept, values=values, rejected=rejected, groups=groups)


def _deadly(doing: str, number: int, plan: RunPlan) -> RuntimeError:
    start, stop = plan.bounds(number)
    return RuntimeError(
        f"{doing} shard {number} (inputs {start} to {stop - 1}) ended {_DEATHS} processes; they were killed, or ran "
        "out of memory"
    )


def look(state: Path, sources: list[str], wanted: Mapping[str, str]) -> str | None:
    """What is wrong with the node this runs on."""
    import_module("ray.data")  # this process will go on to read, or to explain
    here = socket.gethostname()
    for path, meant in [(str(state), str(state.parent.parent)), *zip(sources, sources, strict=True)]:
        if not Path(path).exists():
            return f"node {here} does not see {meant}; every node must have it at this path"
    for name, version in versions().items():
        if version != wanted[name]:
            return f"node {here} must have {name} {wanted[name]} as this machine has, got {version}"
    return None

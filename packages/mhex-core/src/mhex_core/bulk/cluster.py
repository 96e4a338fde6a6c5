"""The engine for many machines: Ray Data reads, balances and retries; shards are explained as everywhere.

Numbers of shards go to tasks that read, what was read to actors that hold the model and write the shard's file, and
only records come back. Ray's object store lies between, spills to disk and slows down readers that are too fast.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from mhex_core.bulk.cluster_stages import Carried, Conductor, Layout, Marks, look
from mhex_core.bulk.job import BulkJob, first_line
from mhex_core.bulk.manifest import versions
from mhex_core.bulk.options import BulkOptions, cores
from mhex_core.bulk.plan import RunPlan
from mhex_core.bulk.progress import Progress
from mhex_core.bulk.shards import ShardRecord

_TELLER = "ray_listen_error_messages"  # Ray's thread that prints whenever a process died
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_LOOK_SECONDS = 0.2  # between two looks whether to stop
_KNOCK_SECONDS = 10.0
_LANES_OF_A_PROCESS = 8  # more threads would wait for one another's Python
_CONDUCTORS = 3  # of a run, one after the other
_SAMPLED = 8  # shards whose files every node is asked for


def run_on_ray(job: BulkJob, plan: RunPlan, todo: Sequence[int], *, options: BulkOptions, progress: Progress) -> None:
    """Explain shards on a Ray cluster: the one at `options.address`, or one that is started here and ended again.

    `options.workers` counts the reading tasks of the whole cluster, at least one; `options.lanes` those of a machine.

    Args:
        job: What is explained, and by what. Its files must be at the same absolute paths on every node.
        plan: The run.
        todo: Numbers of the shards to do.
        options: How.
        progress: Is told, and asked whether to stop.

    Raises:
        ImportError: Ray is not installed.
        OSError: There is no cluster at the address, or a node does not see the run's folder or the inputs.
        RuntimeError: Processes died too often. What the job raises is raised as it is.
        ValueError: The cluster has no processors.
    """
    with _listening_here(options.address):
        _run(_ray(), job, plan, todo, options=options, progress=progress)


def _run(
    ray: Any, job: BulkJob, plan: RunPlan, todo: Sequence[int], *, options: BulkOptions, progress: Progress
) -> None:
    if not todo:
        return
    plan = replace(plan, out=plan.out.resolve())  # processes elsewhere start in other folders
    marks = Marks(plan.out / f".ray-{secrets.token_hex(6)}")
    marks.make()
    try:
        with _connected(ray, options):
            nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
            layout = layout_of([node["Resources"] for node in nodes], options)
            missing = set(todo)
            for more in reversed(range(_CONDUCTORS)):
                conductor = ray.remote(num_cpus=0)(Conductor).remote(
                    Carried(job), plan, sorted(missing), layout, options.batch_size, marks
                )
                try:
                    # While the conductor imports what it needs, so do processes that will read and explain.
                    _check_nodes(ray, nodes, marks, _sources(plan, sorted(missing)))
                    _follow(ray, conductor, missing, marks, progress)
                except ray.exceptions.RayActorError as error:
                    # It was killed, and what it led ended with it. A shard that was written may be written again,
                    # and comes out the same.
                    if not more:
                        raise RuntimeError(f"the Ray cluster failed: {first_line(error)}") from error
                else:
                    return
                finally:
                    ray.kill(conductor)  # and with it what it started
    finally:
        marks.remove()


def layout_of(nodes: Sequence[Mapping[str, float]], options: BulkOptions) -> Layout:
    """How a run is spread over nodes: a process per GPU; without GPUs, one per node with a lane per processor.

    Args:
        nodes: Each one's resources, "CPU" and "GPU".
        options: The run's.

    Raises:
        ValueError: There are no processors.
    """
    cpus = [int(node.get("CPU", 0)) for node in nodes if int(node.get("CPU", 0)) > 0]
    if not cpus:
        raise ValueError("the Ray cluster must have nodes with processors, got none")
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if gpus:
        readers = max(1, sum(cpus) - gpus)
        actors, lanes = gpus, 1
    else:
        lanes = min(_LANES_OF_A_PROCESS, min(cpus) if options.lanes is None else options.lanes)
        actors = sum(max(1, (options.lanes or count) // lanes) for count in cpus)
        readers = sum(max(1, count // 4) for count in cpus)
    if options.workers is not None:
        readers = max(1, options.workers)
    return Layout(actors=actors, lanes=lanes, on_gpu=gpus > 0, readers=readers)


@contextmanager
def _listening_here(address: str | None) -> Iterator[None]:
    """Let a cluster of this machine alone listen on the loopback address, and not on all that the machine has.

    Ray reads the setting when it is imported: whoever has imported it before has decided.
    """
    mine = address is None and "ray" not in sys.modules and _LOOPBACK not in os.environ
    if mine:
        os.environ[_LOOPBACK] = "0"
    try:
        yield
    finally:
        if mine:
            del os.environ[_LOOPBACK]


def _ray() -> ModuleType:
    try:
        return import_module("ray")
    except ImportError as error:
        raise ImportError(
            'the engine "ray" needs Ray Data: pip install "mhex-vision[cluster]" or "mhex-text[cluster]"'
        ) from error


def _follow(ray: Any, conductor: Any, missing: set[int], marks: Marks, progress: Progress) -> None:
    """Hand on the records as they come, and the request to stop; what is done is missing no more."""
    told = False
    waiting = conductor.take.remote()
    while True:
        if progress.stopping and not told:
            marks.stop()
            told = True
        if not ray.wait([waiting], timeout=_LOOK_SECONDS)[0]:
            continue
        try:
            outcomes = ray.get(waiting)
        except ray.exceptions.RayActorError:
            raise
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"the Ray cluster failed: {first_line(error)}") from error
        if not outcomes:
            break
        waiting = conductor.take.remote()
        for outcome in outcomes:
            if not isinstance(outcome, ShardRecord):
                raise outcome
            missing.discard(outcome.number)
            progress.advance(outcome.rows + outcome.rejected)
            progress.shard_done(outcome)
    if missing and not told:
        raise RuntimeError(f"the Ray cluster lost {len(missing)} shards, such as {min(missing)}; run again to go on")


# ------------------------------------------------------------------------------------------------------- the cluster


@contextmanager
def _connected(ray: Any, options: BulkOptions) -> Iterator[None]:
    """A connection to a cluster. One that was there goes on afterwards, and so does a connection."""
    if ray.is_initialized():
        yield
        return
    handlers = _handlers()
    try:
        with _quiet(ray), _environment():
            try:
                if options.address is None:
                    # "local", or it would join any cluster it can find.
                    ray.init(address="local", num_cpus=cores(), include_dashboard=False, log_to_driver=False)
                else:
                    _knock(options.address)
                    ray.init(address=options.address, log_to_driver=False)
            except Exception as error:  # Ray raises just that, too
                where = "this machine" if options.address is None else repr(options.address)
                raise ConnectionError(f"Ray cannot be reached or started at {where}: {first_line(error)}") from error
            finally:
                _restore(handlers)  # Ray takes over SIGTERM
        with _stdout_without(_TELLER):
            yield
    finally:
        with _quiet(ray):
            ray.shutdown()
        _restore(handlers)


def _knock(address: str) -> None:
    """See whether anything listens there: Ray itself goes on trying for many minutes."""
    host, found, port = address.removeprefix("ray://").rpartition(":")
    if found and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()


@contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """Without Ray's lines on the terminal; they are in its logs."""
    loggers = [logging.getLogger(name) for name in sorted(logging.root.manager.loggerDict) if _is_of(name, ray)]
    before = [(logger, logger.level, logger.disabled) for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, level, disabled in before:
            logger.setLevel(level)
            logger.disabled = disabled


def _is_of(name: str, module: Any) -> bool:
    return name == module.__name__ or name.startswith(f"{module.__name__}.")


@contextmanager
def _stdout_without(thread: str) -> Iterator[None]:
    """Standard output, except for what one thread prints."""
    before = sys.stdout
    within: Any = _Sieve(before, thread)
    sys.stdout = within
    try:
        yield
    finally:
        if sys.stdout is within:
            sys.stdout = before


class _Sieve:
    """A stream that takes nothing from one thread."""

    def __init__(self, stream: Any, thread: str) -> None:
        self._stream, self._thread = stream, thread

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or do not."""
        if threading.current_thread().name == self._thread:
            return len(text)
        return int(self._stream.write(text))


@contextmanager
def _environment() -> Iterator[None]:
    """Ray changes the environment; it is as before afterwards."""

    def touched() -> dict[str, str]:
        return {
            name: value for name, value in os.environ.items() if name.startswith("RAY_") or name == "PYTHONBREAKPOINT"
        }

    before = touched()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        yield
    finally:
        for name in touched():
            del os.environ[name]
        os.environ.update(before)


def _handlers() -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------------------- the nodes


def _sources(plan: RunPlan, todo: Sequence[int]) -> list[str]:
    """Some files of the inputs that are there, by absolute paths."""
    step = -(-len(todo) // _SAMPLED)
    sources = {plan.entries(number).column("source")[0].as_py() for number in todo[::step]}
    return sorted(source for source in sources if Path(source).is_absolute() and Path(source).exists())


def _check_nodes(ray: Any, nodes: Sequence[Mapping[str, Any]], marks: Marks, sources: list[str]) -> None:
    """Every node must see the folder and the inputs: a node that did not would reject all it is given."""
    on_node = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    seen = ray.remote(num_cpus=0)(look)
    for node, answer in [
        (
            node,
            seen.options(scheduling_strategy=on_node(node_id=node["NodeID"], soft=False)).remote(
                marks.state, sources, versions()
            ),
        )
        for node in nodes
    ]:
        try:
            problem = ray.get(answer)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            problem = f"node {node['NodeManagerHostname']} cannot take part: {first_line(cause)}"
        if problem is not None:
            raise OSError(problem)

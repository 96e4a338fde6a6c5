"""What `mhex-vision batch` does once it is understood."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mhex_vision.bulk import explain_many
from mhex_vision.bulk.job import Resolution

if TYPE_CHECKING:
    from mhex_core.bulk import BulkSummary, Engine

Say = Callable[[str], None]

_NAMED: dict[str, Resolution] = {"full": "full", "native": "native"}


def batch(options: argparse.Namespace, say: Say, complain: Say) -> BulkSummary:
    """Explain many images into Parquet files, and say what came of it."""
    from mhex_core.bulk import told

    for name, least in (("batch_size", 1), ("shard_size", 1), ("lanes", 1), ("workers", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    engine: Engine = options.engine or ("embedded" if options.address is None else "ray")
    if options.address is not None and engine != "ray":
        raise ValueError(f"--address must come with --engine ray, got --engine {engine}")
    # Whoever names a function of their own means the one in the folder they are in.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    summary = explain_many(
        options.checkpoint,
        options.input,
        options.out,
        split=options.split,
        root=options.root,
        size=options.size,
        download=not options.no_download,
        image_column=options.image_column,
        id_column=options.id_column,
        target=options.target,
        method=options.method,
        beta=options.beta,
        resolution=_resolution(options.resolution),
        dtype=options.dtype,
        overlays=options.overlays,
        autocast=options.autocast,
        compile=options.compile,
        batch_size=options.batch_size,
        shard_size=options.shard_size,
        workers=options.workers,
        lanes=options.lanes,
        engine=engine,
        address=options.address,
        overwrite=options.overwrite,
        say=say,
        complain=complain,
    )
    for line in told(summary, "mhex-vision batch"):
        say(line)
    return summary


def _resolution(text: str) -> Resolution:
    if text in _NAMED:
        return _NAMED[text]
    if not text.isdecimal() or not int(text):
        raise ValueError(f"--resolution must be full, native or a side in pixels, got {text!r}")
    return int(text)

"""What `mhex-vision batch` does once it is understood."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from mhex_vision.bulk import explain_many
from mhex_vision.bulk.job import Resolution

if TYPE_CHECKING:
    from mhex_core.bulk import BulkSummary

Say = Callable[[str], None]

_NAMED: dict[str, Resolution] = {"full": "full", "native": "native"}


def batch(options: argparse.Namespace, say: Say, complain: Say) -> BulkSummary:
    """Explain many images into Parquet files, and say what came of it."""
    from mhex_core.bulk import told
    from mhex_core.bulk.flags import running

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
        **running(options),
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

"""What `mhex-text batch` does once it is understood."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from mhex_text.bulk import explain_many
from mhex_text.commands import layers_of

if TYPE_CHECKING:
    from mhex_core.bulk import BulkSummary

Say = Callable[[str], None]


def batch(options: argparse.Namespace, say: Say, complain: Say) -> BulkSummary:
    """Explain many texts into Parquet files, and say what came of it."""
    from mhex_core.bulk import told
    from mhex_core.bulk.flags import running

    summary = explain_many(
        options.checkpoint,
        options.input,
        options.out,
        text=options.text_column,
        pair=options.pair_column,
        id_column=options.id_column,
        target=options.target,
        method=options.method,
        layers=layers_of("--layers", options.layers),
        beta=options.beta,
        attention=options.attention,
        max_length=options.max_length,
        keep_text=not options.no_text,
        **running(options),
        say=say,
        complain=complain,
    )
    for line in told(summary, "mhex-text batch"):
        say(line)
    return summary

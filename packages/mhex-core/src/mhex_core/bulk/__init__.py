"""Explaining archives of millions of inputs: listed once, cut into shards, each written whole or not at all.

It needs pyarrow and tqdm, which mhex-vision and mhex-text[train] bring along; `import mhex_core` does not import it.
"""

from mhex_core.bulk.archive import Archive, ChosenRows, RowChoice
from mhex_core.bulk.driver import run, told
from mhex_core.bulk.job import BATCH_STEP, ENTRY, BulkJob, Decoded, Model, Reader, Values
from mhex_core.bulk.options import BulkOptions, BulkSummary, Engine
from mhex_core.bulk.shards import Reject, ShardRecord

__all__ = [
    "BATCH_STEP",
    "ENTRY",
    "Archive",
    "BulkJob",
    "BulkOptions",
    "BulkSummary",
    "ChosenRows",
    "Decoded",
    "Engine",
    "Model",
    "Reader",
    "Reject",
    "RowChoice",
    "ShardRecord",
    "Values",
    "run",
    "told",
]

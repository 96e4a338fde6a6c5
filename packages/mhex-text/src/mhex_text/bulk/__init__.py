"""Explaining archives of texts: Parquet files with one row per text, whatever happens on the way; and pages of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

try:
    import pyarrow as pa  # noqa: F401 - what all of it stands on
except ImportError as error:
    raise ImportError('explaining in bulk needs pyarrow: pip install "mhex-text[train]"') from error

from mhex_text.bulk.archive_report import report_archive
from mhex_text.bulk.job import TextJob
from mhex_text.bulk.sources import TextSource, open_source

if TYPE_CHECKING:
    from mhex_core.bulk import BulkSummary

__all__ = ["TextJob", "TextSource", "explain_many", "open_source", "report_archive"]


def explain_many(
    checkpoint: str | Path,
    input: str | Path,  # noqa: A002 - what the command line calls it
    out: str | Path,
    *,
    text: str | None = None,
    pair: str | None = None,
    id_column: str | None = None,
    target: str | int | None = None,
    method: str = "mhex",
    layers: int | Sequence[int] | Literal["all"] = 3,
    beta: float = 1.0,
    attention: bool = False,
    max_length: int | None = None,
    keep_text: bool = True,
    autocast: Literal["bfloat16", "float16"] | None = None,
    compile: bool = False,  # noqa: A002 - as in torch
    batch_size: int = 32,
    shard_size: int | None = None,
    workers: int | None = None,
    lanes: int | None = None,
    engine: Literal["embedded", "ray"] = "embedded",
    address: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] | None = None,
    complain: Callable[[str], None] | None = None,
) -> BulkSummary:
    """Explain all texts of a file or a folder into `out`, or go on where that was stopped.

    `out` then holds data/*.parquet with one row per text (`datasets.load_dataset("parquet", data_dir=out / "data")`
    reads them), manifest.json and rejected.csv. What is written depends neither on the number of processes and lanes
    nor on the batch size or the engine.

    Args:
        checkpoint: See `TextJob`, as all up to `compile` but the next five.
        input: See `open_source`.
        out: A folder, new or of the same run.
        text: The column of the texts, see `open_source`.
        pair: The column of second texts.
        id_column: The column of the records' names.
        target: The class to explain.
        method: What explains.
        layers: Of the method "mhex".
        beta: Of the method "mhex".
        attention: Of the method "mhex".
        max_length: The most tokens of a text.
        keep_text: Whether texts are written.
        autocast: The type of the forward pass.
        compile: Whether the classifier is compiled.
        batch_size: See `mhex_core.bulk.BulkOptions`, as the next six.
        shard_size: Texts of one file.
        workers: Processes that read.
        lanes: Batches at once on a CPU.
        engine: "embedded" or "ray".
        address: Of a Ray cluster.
        overwrite: Whether what is in `out` goes first.
        say: Takes lines on how far it is.
        complain: Takes lines on what is wrong.

    Returns:
        What came of it.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument does not fit, or `out` holds something else.
        OSError: A file or folder is not there or cannot be written.
    """
    from mhex_core.bulk import BulkOptions, run

    options = BulkOptions(
        batch_size=batch_size,
        shard_size=shard_size,
        workers=workers,
        lanes=lanes,
        engine=engine,
        address=address,
        overwrite=overwrite,
    )
    job = TextJob(
        checkpoint=checkpoint,
        source=open_source(input, text=text, pair=pair, id_column=id_column, exclude=out),
        target=target,
        method=method,
        layers=layers,
        beta=beta,
        attention=attention,
        max_length=max_length,
        keep_text=keep_text,
        autocast=autocast,
        compile=compile,
    )
    return run(job, out, options=options, say=say, complain=complain)

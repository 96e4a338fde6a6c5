"""Explaining archives of millions of images: what `mhex-vision batch` does, from Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mhex_vision.bulk.archive_report import report_archive
from mhex_vision.bulk.job import ImageJob, Resolution
from mhex_vision.bulk.listing import ImageSource
from mhex_vision.bulk.model import Autocast
from mhex_vision.bulk.reading import read_saliency
from mhex_vision.bulk.sources import open_source
from mhex_vision.bulk.storing import Storage
from mhex_vision.data.medmnist import MEDMNIST_SIZES, is_medmnist

if TYPE_CHECKING:
    from mhex_core.bulk import BulkSummary, Engine

__all__ = ["ImageJob", "ImageSource", "explain_many", "open_source", "read_saliency", "report_archive"]


def explain_many(
    checkpoint: str | Path,
    input: str | Path,  # noqa: A002 - what the command line calls it
    out: str | Path,
    *,
    split: str = "test",
    root: str | Path | None = None,
    size: int | None = None,
    download: bool = True,
    image_column: str | None = None,
    id_column: str | None = None,
    target: str | int | None = None,
    method: str = "mhex",
    beta: float | None = None,
    resolution: Resolution = "full",
    dtype: Storage = "uint8",
    overlays: bool = False,
    autocast: Autocast | None = None,
    compile: bool = False,  # noqa: A002
    batch_size: int = 32,
    shard_size: int | None = None,
    workers: int | None = None,
    lanes: int | None = None,
    engine: Engine = "embedded",
    address: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] | None = None,
    complain: Callable[[str], None] | None = None,
) -> BulkSummary:
    """Explain many images into Parquet files. A run that was stopped goes on when repeated.

    Args:
        checkpoint: A run of `mhex-vision train`, or a repository on the Hugging Face hub.
        input: What holds the images, see `open_source`.
        out: The folder; what lies there is no input.
        split: Of a MedMNIST set: "train", "validation" or "test".
        root: Where MedMNIST files lie or are downloaded to.
        size: Of the images of a MedMNIST set; None means the smallest that is not below the network's, else 224.
        download: Whether a MedMNIST file that is absent may be fetched.
        image_column: Of Parquet files; None finds it by its name.
        id_column: Of Parquet files: what names the images; None numbers them.
        target: The class to explain, by name or number; None for the predicted one.
        method: "mhex", or another method with its options after a colon.
        beta: Weight of negative evidence in the classifier's own maps.
        resolution: Of the maps: "full", "native" or a side in pixels, see `ImageJob`.
        dtype: Of the maps: "uint8" or "float16".
        overlays: Whether each row carries its overlay on the image.
        autocast: "bfloat16" or "float16" for mixed precision.
        compile: Whether the network goes through torch.compile.
        batch_size: Images that go through the network together; it changes no value.
        shard_size: Images of one output file; None chooses by their size.
        workers: Processes that read images; None chooses by the machine.
        lanes: Batches explained at once on a CPU; None means one per processor.
        engine: "embedded", in this process, or "ray".
        address: Of a Ray cluster that is there; None starts one on this machine.
        overwrite: Whether what another run left in the folder is removed first.
        say: Takes lines about progress.
        complain: Takes warnings.

    Returns:
        What came of it, also when it was interrupted.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument does not fit, there is no image, or the folder holds something else.
        OSError: A file or folder is missing, or cannot be written to.
        ImportError: A library that an argument asks for is not installed.
    """
    from mhex_core import bulk

    options = bulk.BulkOptions(
        batch_size=batch_size,
        shard_size=shard_size,
        workers=workers,
        lanes=lanes,
        engine=engine,
        address=address,
        overwrite=overwrite,
    )
    if size is None and isinstance(input, str) and is_medmnist(input):
        size = _fitting_size(str(checkpoint))
    source = open_source(
        input,
        split=split,
        root=root,
        size=size,
        download=download,
        image_column=image_column,
        id_column=id_column,
        exclude=out,
    )
    job = ImageJob(
        str(checkpoint),
        source,
        target=target,
        method=method,
        beta=beta,
        resolution=resolution,
        dtype=dtype,
        overlays=overlays,
        autocast=autocast,
        compile=compile,
    )
    return bulk.run(job, out, options=options, say=say, complain=complain)


def _fitting_size(checkpoint: str) -> int | None:
    """The size of a MedMNIST set that a network sees with no detail lost; None where it is not known."""
    from mhex_vision.plain import load_classifier

    preprocessing = load_classifier(checkpoint).config.preprocessing
    if preprocessing is None:
        return None
    return next((size for size in MEDMNIST_SIZES if size >= preprocessing.size), MEDMNIST_SIZES[-1])

"""A page of some rows of an archive that `mhex-vision batch` wrote, as they are stored; the network is not needed.

Letters: N rows, h x w stored map, S side of the images as the network saw them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mhex_core.bulk.archive import Archive, ChosenRows, RowChoice
from mhex_core.explorer import Evidence, ExplorerPage, Method, Sample, explorer_page
from mhex_vision.bulk.job import JobReader
from mhex_vision.bulk.reading import read_saliency
from mhex_vision.bulk.sources import reader_of
from mhex_vision.data import Preprocessing
from mhex_vision.explainers import EXPLAINERS, parse
from mhex_vision.explainers.own import OwnSaliency
from mhex_vision.progress import counter
from mhex_vision.reporting import picture_of

Complain = Callable[[str], None]


def report_archive(
    archive: str | Path,
    *,
    samples: int = 200,
    seed: int = 0,
    doubtful: bool = False,
    predicted: str | None = None,
    title: str = "Explanations",
    max_bytes: int | None = None,
    complain: Complain | None = None,
) -> ExplorerPage:
    """Make a page of rows of an archive, with the maps that it holds.

    The images are read from where the archive says they lie. A map that is smaller than its image is shown enlarged
    bilinearly; layers cannot be weighed anew, because an archive holds their sum.

    Args:
        archive: The folder, finished or not.
        samples: How many rows at most.
        seed: Of the choice among them.
        doubtful: Take the rows whose prediction is the least probable, instead of a choice by chance.
        predicted: Take only rows that were predicted to be of this class.
        title: Of the page.
        max_bytes: What the page may have.
        complain: Takes a line about each row that cannot be shown, because its image is gone, say.

    Returns:
        The page; `.save("report.html")` writes it.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The folder holds no such archive, no row is left, an argument does not fit, or the page does not fit
            into `max_bytes`.
        FileNotFoundError: There is no such folder.
    """
    held = Archive.open(archive, program="mhex-vision")
    choice = RowChoice(samples=samples, seed=seed, doubtful=doubtful, predicted=predicted)
    return page_of(held, held.choose(choice), title=title, max_bytes=max_bytes, complain=complain)


def page_of(
    archive: Archive,
    chosen: ChosenRows,
    *,
    title: str,
    max_bytes: int | None = None,
    complain: Complain | None = None,
) -> ExplorerPage:
    """What `report_archive` does with the rows it chose; the arguments are those."""
    rows = _Rows(archive, complain or (lambda _: None))
    found: list[Sample] = []
    with counter(desc="reading", total=len(chosen), unit="row") as shown:
        for table in chosen.tables():
            found += rows.samples(table)
            shown.update(table.num_rows)
    if not found:
        raise ValueError(
            f"archive must have images that can still be read, and of {len(chosen)} rows of {archive.folder} there is "
            f"none; the first: {rows.first_fault}"
        )
    about = archive.manifest["about"]
    return explorer_page(
        found,
        methods=(rows.method(),),
        class_names=tuple(about["class_names"]),
        title=title,
        about={
            "archive": str(archive.folder),
            "checkpoint": str(about["checkpoint"]),
            "explained by": archive.settings,
            "images": f"{about['input']}: {chosen.description}",
            "versions": ", ".join(f"{name} {version}" for name, version in archive.manifest["versions"].items()),
        },
        max_bytes=max_bytes,
    )


@dataclass
class _Rows:
    """Rows as samples of a page."""

    archive: Archive
    complain: Complain
    first_fault: str = field(default="", init=False)
    _signed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        about = self.archive.manifest["about"]
        if "reading" not in about:
            raise ValueError(f"{self.archive.folder} does not say how its images are read; make it anew with overwrite")
        self._preprocessing = Preprocessing.from_dict(about["preprocessing"])
        self._reader = JobReader(reader_of(about["reading"]), self._preprocessing)
        self._names: Sequence[str] = about["class_names"]

    def method(self) -> Method:
        """The method that the maps are of; known to have a sign once rows have been read."""
        settings: Mapping[str, Any] = self.archive.manifest["settings"]
        # Only the classifier's own saliency has such settings. A function of somebody else need not be here, and is
        # not imported because an archive names it.
        known = "beta" in settings and settings["method"].partition(":")[0] in EXPLAINERS
        explainer = parse(settings["method"]) if known else None
        spans = isinstance(explainer, OwnSaliency) and bool(explainer.options.get("normalize", True))
        # The sum of the layers as it is stored: what is for and what is against a class count alike.
        return Method(
            name=settings["method"],
            layer_names=("as stored",),
            layer_weights=(1.0,),
            beta=1.0,
            normalize=spans,
            signed=self._signed,
            fixed=True,
        )

    def samples(self, table: pa.Table) -> list[Sample]:
        """Those rows of a table that can be shown."""
        read = self._reader(self.archive.entries(table))
        names = table.column("id").to_pylist()
        for place, reason in read.rejected:
            self._fault(f"{names[place]}: {reason}")
        images = dict(zip(read.kept, read.values, strict=True))
        maps = read_saliency(table)
        side = self._preprocessing.size
        found = []
        for place, row in enumerate(table.select(["id", "target", "probabilities"]).to_pylist()):
            if place not in images:
                continue
            one = torch.from_numpy(maps[place].astype(np.float64))
            if not bool(torch.isfinite(one).all()):
                self._fault(f"{row['id']}: its map has values that are no finite numbers")
                continue
            self._signed |= bool((one < 0).any())
            target = self._names.index(row["target"]) if self._names else int(row["target"])
            evidence = Evidence.of_layers(
                [one.clamp(min=0)], [one.clamp(max=0)], method=0, target=target, size=(side, side)
            )
            found.append(
                Sample(
                    name=row["id"],
                    probabilities=tuple(row["probabilities"]),
                    evidence=(evidence,),
                    picture=picture_of(torch.as_tensor(images[place])),
                )
            )
        return found

    def _fault(self, line: str) -> None:
        self.first_fault = self.first_fault or line
        self.complain(f"skipped: {line}")

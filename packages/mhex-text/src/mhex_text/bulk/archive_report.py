"""A page of some rows of an archive that `mhex-text batch` wrote, as they are stored; the classifier is not needed.

Letters: K classes, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mhex_core.bulk import Archive, ChosenRows, RowChoice
from mhex_core.explorer import ExplorerPage
from mhex_text import explainers
from mhex_text.explainers.own import OwnScores
from mhex_text.explanation import Explanation, ExplanationSettings, TextExplanation
from mhex_text.explanation.evidence import explained_text
from mhex_text.reporting import report
from mhex_text.side_by_side import OWN

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
    """Make a page of rows of an archive, with the scores that it holds.

    A score is shown as one layer: above 0 it is evidence for the class explained, below 0 against it. Layers cannot be
    weighed anew, because an archive holds their sum.

    Args:
        archive: The folder, finished or not. It must hold its texts.
        samples: How many rows at most.
        seed: Of the choice among them.
        doubtful: Take the rows whose prediction is the least probable, instead of a choice by chance.
        predicted: Take only rows that were predicted to be of this class.
        title: Of the page.
        max_bytes: What the page may have.
        complain: Takes a line about each row that is left out because its scores are not finite.

    Returns:
        The page; `.save("report.html")` writes it. The texts are called by their ids, in the archive's order.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The folder holds no such archive or no texts, no row is left, an argument does not fit, or the page
            does not fit into `max_bytes`.
        FileNotFoundError: There is no such folder.
    """
    held, chosen = choose(archive, samples=samples, seed=seed, doubtful=doubtful, predicted=predicted)
    return page_of(held, chosen, title=title, max_bytes=max_bytes, complain=complain)


def choose(
    archive: str | Path, *, samples: int, seed: int, doubtful: bool, predicted: str | None
) -> tuple[Archive, ChosenRows]:
    """The archive and the rows that `report_archive` shows; the arguments are those."""
    choice = RowChoice(samples=samples, seed=seed, doubtful=doubtful, predicted=predicted)
    held = Archive.open(archive, program="mhex-text")
    if not held.manifest["settings"]["keep_text"]:
        raise ValueError(
            f"archive must hold its texts, and {held.folder} was written without them; run `mhex-text batch` "
            "without --no-text (keep_text=True) into another folder"
        )
    return held, held.choose(choice)


def page_of(
    archive: Archive,
    chosen: ChosenRows,
    *,
    title: str,
    max_bytes: int | None = None,
    complain: Complain | None = None,
) -> ExplorerPage:
    """What `report_archive` does with the rows it chose; the arguments are those."""
    settings = _settings(archive.manifest)
    names: list[str] = []
    items: list[TextExplanation] = []
    for table in chosen.tables():
        for row in table.to_pylist():
            fault = _fault(row)
            if fault is None:
                names.append(row["id"])
                items.append(_explained(row, settings, archive.folder))
            elif complain is not None:
                complain(f"skipped {row['id']}: {fault}")
    if not items:
        raise ValueError(
            f"archive must hold rows whose scores are finite, and of the {len(chosen)} chosen in {archive.folder} "
            "there is none; choose others, or more samples"
        )
    skipped = len(chosen) - len(items)
    return report(
        {archive.manifest["settings"]["method"]: Explanation(tuple(items), settings)},
        names=names,
        title=title,
        about={
            "archive": str(archive.folder),
            "checkpoint": str(archive.manifest["about"]["checkpoint"]),
            "explained by": archive.settings,
            "texts": chosen.description + (f", {skipped} of which are left out" if skipped else ""),
            "versions": ", ".join(f"{name} {version}" for name, version in archive.manifest["versions"].items()),
        },
        max_bytes=max_bytes,
        fixed=True,
    )


def _settings(manifest: Mapping[str, Any]) -> ExplanationSettings:
    """What all rows share: one layer, of which what is for a class and what is against it count alike."""
    return ExplanationSettings(
        layer_names=(_layer(manifest["settings"]["method"]),),
        layer_weights=(1.0,),
        beta=1.0,
        class_names=tuple(manifest["about"]["class_names"]),
    )


def _layer(method: str) -> str:
    """What the one layer is called: as the method, and of the classifier's own evidence without its options."""
    # Only methods of that name are looked up: a function of somebody's own need not be where the archive is read.
    if method.partition(":")[0] != OWN:
        return method
    chosen = explainers.parse(method)
    # As in `explain_by`, what is rectified is another method, and its scores are no logits.
    return method if isinstance(chosen, OwnScores) and chosen.rectify else OWN


def _fault(row: Mapping[str, Any]) -> str | None:
    """Why a row cannot be shown, or None."""
    parts: dict[str, Sequence[float]] = {
        "scores": [token["score"] for token in row["tokens"]],
        "probabilities": row["probabilities"],
    }
    return next(
        (f"its {name} are not finite" for name, part in parts.items() if not all(map(math.isfinite, part))), None
    )


def _explained(row: Mapping[str, Any], settings: ExplanationSettings, folder: Path) -> TextExplanation:
    """A row as an explanation."""
    tokens = (
        (
            (token["start"], token["end"]),
            token["word"],
            token["part"],
            (max(token["score"], 0.0),),
            (min(token["score"], 0.0),),
            (token["score"],),
        )
        for token in row["tokens"]
    )
    return explained_text(
        tuple(row[name] for name in ("text", "pair") if name in row),
        tokens,
        probabilities=row["probabilities"],
        target=_target(row, settings.class_names, folder),
        settings=settings,
    )


def _target(row: Mapping[str, Any], names: Sequence[str], folder: Path) -> int:
    """The number of the class explained."""
    # Classes may share a name; then the probability says which of them it is.
    for number, (name, probability) in enumerate(zip(names, row["probabilities"], strict=True)):
        if name == row["target"] and probability == row["target_probability"]:
            return number
    raise ValueError(
        f"{folder} is damaged: {row['id']} explains {row['target']!r}, which is none of its classes "
        f"({', '.join(names)}) with that probability"
    )

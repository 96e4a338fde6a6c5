"""What `mhex-vision report` does once it is understood."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import mhex_vision
from mhex_core.explorer import ExplorerPage
from mhex_core.specs import listed, look_here, methods_by_name
from mhex_vision.classifier import MHEXClassifier
from mhex_vision.commands import check_classes, image_files, quoted, readable_batches
from mhex_vision.data import Preprocessing, load_data
from mhex_vision.explainers import Explainer, parse
from mhex_vision.explainers.own import OwnSaliency
from mhex_vision.exploring import NamedBatch, batches_of, chosen_places, explore
from mhex_vision.plain import PlainClassifier, load_classifier

Say = Callable[[str], None]

_MEGABYTE = 1_000_000


# What belongs to explaining, and not to what is explained already; with what it is by default.
_OF_EXPLAINING = {
    "checkpoint": None,
    "methods": "mhex",
    "targets": 3,
    "beta": None,
    "batch_size": 32,
    "split": None,
    "root": None,
    "no_download": False,
}
_OF_ARCHIVES = ("doubtful", "predicted")


def report(options: argparse.Namespace, say: Say, complain: Say) -> int:
    """`mhex-vision report`; returns how many images could not be read."""
    _settle(options)
    for name in ("samples", "targets", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {options.seed}")
    if not options.max_mb > 0:
        raise ValueError(f"--max-mb must be above 0, got {options.max_mb:g}")
    if options.out.is_dir():
        raise ValueError(f"--out must be a file, got the folder {options.out}")
    if options.archive is not None:
        return _of_archive(options, say, complain)
    methods = _methods(options)
    model = load_classifier(options.checkpoint)
    own = [name for name, method in methods.items() if isinstance(method, OwnSaliency)]
    if own and isinstance(model, PlainClassifier):
        raise ValueError(f"{options.checkpoint} is a plain network; choose other --methods than {', '.join(own)}")
    preprocessing = model.config.preprocessing
    if preprocessing is None:
        raise ValueError(f"{options.checkpoint} does not say how images are prepared; use mhex_vision.report instead")
    source = _of_files if options.input is not None else _of_set
    batches, wanted, there, what = source(options, model, preprocessing, complain)
    about = {
        "checkpoint": str(options.checkpoint),
        "images": what + (f", {wanted} of {there} by chance (seed {options.seed})" if wanted < there else ""),
        "versions": f"mhex-vision {mhex_vision.__version__}, torch {torch.__version__}",
    }
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    page = _page(options, model, batches, methods, about=about, count=-(-wanted // options.batch_size))
    _write(page, options, say, asked=wanted, methods=len(methods))
    return wanted - page.samples


def _settle(options: argparse.Namespace) -> None:
    """Refuse what does not go together, and fill in what was not said."""
    given = [name for name in _OF_EXPLAINING if not (getattr(options, name) is None or getattr(options, name) is False)]
    if options.archive is not None and given:
        raise ValueError(f"--{given[0].replace('_', '-')} goes with --checkpoint, and --archive is given")
    if options.archive is None:
        if options.checkpoint is None:
            options.refuse("the following arguments are required: --checkpoint")
        apart = [name for name in _OF_ARCHIVES if getattr(options, name)]
        if apart:
            raise ValueError(f"--{apart[0]} goes with --archive, and --checkpoint is given")
    for name, value in _OF_EXPLAINING.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def _of_archive(options: argparse.Namespace, say: Say, complain: Say) -> int:
    from mhex_core.bulk import Archive, RowChoice
    from mhex_vision.bulk.archive_report import page_of

    # A page may lie beside what `batch` wrote, but not in its place.
    inside = options.out.resolve().is_relative_to(options.archive.resolve())
    if inside and options.out.exists() and options.out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out must be another file than those of the archive, got {options.out}")
    archive = Archive.open(options.archive, program="mhex-vision")
    chosen = archive.choose(
        RowChoice(samples=options.samples, seed=options.seed, doubtful=options.doubtful, predicted=options.predicted)
    )
    page = page_of(archive, chosen, title=options.title, max_bytes=int(options.max_mb * _MEGABYTE), complain=complain)
    _write(page, options, say, asked=len(chosen), methods=1)
    return len(chosen) - page.samples


def told(page: ExplorerPage, path: Path, methods: int, *, asked: int, max_mb: float | None = None) -> list[str]:
    """What was written, in lines."""
    each = page.targets / (page.samples * methods)
    by = f" by {methods} methods" if methods > 1 else ""
    size = f"{page.size / _MEGABYTE:.1f} MB"
    lines = [f"wrote {path} ({size}): {page.samples} of {asked} images{by}, {each:.1f} classes each"]
    if page.left_out:
        lines.append(f"{page.left_out} more maps did not fit into {max_mb:g} MB; --max-mb takes more")
    return [*lines, f"next: open {quoted(path)} in a browser"]


def _methods(options: argparse.Namespace) -> dict[str, Explainer]:
    names = listed(options.methods)
    look_here(names)
    methods = methods_by_name(names, parse)
    if options.beta is None:
        return methods
    if not any(isinstance(method, OwnSaliency) for method in methods.values()):
        raise ValueError(f"--beta belongs to the classifier's own saliency, and --methods is {options.methods}")
    return {
        # One that names its own beta keeps it.
        name: OwnSaliency({"beta": options.beta, **method.options}) if isinstance(method, OwnSaliency) else method
        for name, method in methods.items()
    }


def _page(
    options: argparse.Namespace,
    model: MHEXClassifier | PlainClassifier,
    batches: Iterator[NamedBatch],
    methods: dict[str, Explainer],
    *,
    about: dict[str, str],
    count: int,
) -> ExplorerPage:
    return explore(
        model,
        batches,
        methods,
        count=count,
        targets=options.targets,
        title=options.title,
        about=about,
        max_bytes=int(options.max_mb * _MEGABYTE),
    )


def _write(page: ExplorerPage, options: argparse.Namespace, say: Say, *, asked: int, methods: int) -> None:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    page.save(options.out)
    for line in told(page, options.out, methods, asked=asked, max_mb=options.max_mb):
        say(line)


_Source = tuple[Iterator[NamedBatch], int, int, str]


def _of_files(
    options: argparse.Namespace,
    model: MHEXClassifier | PlainClassifier,  # noqa: ARG001 - as of a set
    preprocessing: Preprocessing,
    complain: Say,
) -> _Source:
    """Image files; those that cannot be read are named and skipped."""
    asked = [flag for flag in ("split", "root") if getattr(options, flag) is not None]
    asked += ["no-download"] if options.no_download else []
    if asked:
        raise ValueError(f"--{asked[0]} goes with --data, and --input is given")
    files = image_files(options.input, options.out)
    if options.out.resolve() in [file.resolve() for file in files]:
        raise ValueError(f"--out must be another file than the images, got {options.out}")
    chosen = [files[place] for place in chosen_places(len(files), options.samples, options.seed)]
    base = options.input if options.input.is_dir() else options.input.parent

    def batches() -> Iterator[NamedBatch]:
        def reject(_: Path, reason: str) -> None:
            complain(f"skipped: {reason}")

        for paths, images in readable_batches(chosen, preprocessing, options.batch_size, reject):
            yield NamedBatch([path.relative_to(base).as_posix() for path in paths], images)

    return batches(), len(chosen), len(files), str(options.input)


def _of_set(
    options: argparse.Namespace,
    model: MHEXClassifier | PlainClassifier,
    preprocessing: Preprocessing,
    complain: Say,  # noqa: ARG001 - a set warns
) -> _Source:
    """A split of a data set, with labels."""
    data = load_data(
        options.data, root=options.root, size=preprocessing.size, download=not options.no_download, seed=options.seed
    )
    split = options.split or "test"
    images = getattr(data, split)
    if images is None:
        raise ValueError(f"--split: {data.name} has no {split} images")
    check_classes("--checkpoint", model, data)
    places = chosen_places(len(images), options.samples, options.seed)
    batches = batches_of(images, places, data, model, size=options.batch_size)
    return batches, len(places), len(images), f"{data.name}, {split}"

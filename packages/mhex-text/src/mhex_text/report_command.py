"""What `mhex-text report` does once it is understood."""

from __future__ import annotations

import argparse
import random
import shlex
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import transformers

from mhex_core.explorer import ExplorerPage
from mhex_core.specs import listed, look_here
from mhex_text import explainers
from mhex_text.by_method import explain_by
from mhex_text.commands import (
    bundle_of,
    check_own,
    given_texts,
    layers_of,
)
from mhex_text.data import TextBundle, UnreadableTextWarning
from mhex_text.explaining import class_names
from mhex_text.explanation import Explanation
from mhex_text.loading import load_classifier, load_tokenizer
from mhex_text.reporting import first_words, report

Say = Callable[[str], None]

_MEGABYTE = 1_000_000

# What belongs to explaining texts, and not to rows that are explained already; with what it is by default.
_OF_EXPLAINING = {
    "checkpoint": None,
    "methods": "mhex",
    "targets": 3,
    "layers": None,
    "beta": None,
    "attention": False,
    "max_length": None,
    "batch_size": 32,
    "pair": None,
    "split": None,
    "root": None,
    "no_download": False,
    "text_column": None,
    "pair_column": None,
    "label_column": None,
    "rationale_column": None,
}
_OF_ARCHIVES = ("doubtful", "predicted")


class Shown(NamedTuple):
    """N texts that are shown.

    Attributes:
        texts: The texts, or pairs of them.
        names: What each is called.
        labels: Of each the name of its true class, or None.
        there: How many they were chosen from.
        what: Where they come from, in words.
        unreadable: How many could not be read.
    """

    texts: list[Any]
    names: list[str] | None
    labels: list[str | None]
    there: int
    what: str
    unreadable: int


def write_report(options: argparse.Namespace, say: Say, complain: Say) -> int:
    """`mhex-text report`; returns how many texts could not be read."""
    _settle(options)
    _check(options)
    if options.archive is not None:
        return _of_archive(options, say, complain)
    methods = _methods(options)
    shown = (_labelled if options.data is not None else _unlabelled)(options, complain)
    model, tokenizer = load_classifier(options.checkpoint), load_tokenizer(options.checkpoint)
    for spec in methods:
        check_own(options.checkpoint, model, spec, "--methods")
    known = class_names(model)
    unknown = sorted({label for label in shown.labels if label is not None} - set(known))
    if unknown:
        raise ValueError(f"--data must have classes of the checkpoint ({', '.join(known)}), got {unknown[0]!r}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    labels = [None if label is None else known.index(label) for label in shown.labels]
    how = {"tokenizer": tokenizer, "max_length": options.max_length, "batch_size": options.batch_size, "progress": True}
    # The first look says which classes are worth explaining.
    spec, settings = next(iter(methods.items()))
    first = explain_by(model, shown.texts, spec, **how, **settings)
    others = _targets(first, labels, options.targets)
    explained: dict[str, list[Explanation]] = {}
    for name, settings in methods.items():
        predicted = first if name == spec else explain_by(model, shown.texts, name, **how, **settings)
        explained[name] = [predicted]
        explained[name] += [explain_by(model, shown.texts, name, target, **how, **settings) for target in others]
    names = shown.names
    if names is not None:
        names = [f"{name}: {first_words(item)}" for name, item in zip(names, first, strict=True)]
    page = _page(options, explained, names=names, labels=labels, what=shown.what)
    page.save(options.out)
    cut = sum(bool(item.truncated) for item in first)
    if cut:
        complain(f"{cut} of {len(first)} texts were longer than the model takes; the rest was not read")
    _tell(page, options, len(methods), shown, say)
    return shown.unreadable


def _settle(options: argparse.Namespace) -> None:
    """Refuse what does not go together, and fill in what was not said."""
    if options.archive is None and options.checkpoint is None:
        options.refuse("the following arguments are required: --checkpoint (only --archive needs none)")
    if sum(given is not None for given in (options.text, options.input, options.data, options.archive)) != 1:
        raise ValueError(
            "give texts with --text, a file of them with --input, labelled ones with --data, or what `batch` wrote "
            "with --archive"
        )
    apart = _OF_ARCHIVES if options.archive is None else tuple(_OF_EXPLAINING)
    # By identity: 0 is a value that was given.
    given = [name for name in apart if getattr(options, name) is not None and getattr(options, name) is not False]
    if given and options.archive is None:
        raise ValueError(f"--{given[0]} goes with --archive")
    if given and given[0] == "checkpoint":
        raise ValueError("--checkpoint must be left out with --archive, whose rows are shown as they are stored")
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} goes with --checkpoint, and --archive is given")
    for name, value in _OF_EXPLAINING.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def _check(options: argparse.Namespace) -> None:
    for name in ("samples", "targets", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.max_length is not None and options.max_length < 1:
        raise ValueError(f"--max-length must be at least 1, got {options.max_length}")
    if options.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {options.seed}")
    if not 0 < options.max_mb < float("inf"):
        raise ValueError(f"--max-mb must be above 0, got {options.max_mb:g}")
    if options.out.is_dir():
        raise ValueError(f"--out must be a file, got the folder {options.out}")
    if options.archive is not None:
        # A page may lie beside what `batch` wrote, but not in its place.
        inside = options.out.resolve().is_relative_to(options.archive.resolve())
        if inside and options.out.exists() and options.out.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"--out must be another file than those of the archive, got {options.out}")
        return
    if options.data is not None:
        if options.pair is not None:
            raise ValueError("--pair goes with --text; of labelled texts, --pair-column names the second texts")
        return
    asked = [name for name in ("split", "root", "label_column", "rationale_column") if getattr(options, name)]
    asked += ["no_download"] if options.no_download else []
    if asked:
        raise ValueError(f"--{asked[0].replace('_', '-')} goes with --data")
    if options.input is not None and options.input.resolve() == options.out.resolve():
        raise ValueError(f"--out must be another file than the texts, got {options.out}")


def _of_archive(options: argparse.Namespace, say: Say, complain: Say) -> int:
    """A page of rows as they are stored; returns how many could not be shown."""
    # Whoever explains texts needs no pyarrow.
    from mhex_text.bulk.archive_report import choose, page_of

    archive, chosen = choose(
        options.archive,
        samples=options.samples,
        seed=options.seed,
        doubtful=options.doubtful,
        predicted=options.predicted,
    )
    page = page_of(archive, chosen, title=options.title, max_bytes=int(options.max_mb * _MEGABYTE), complain=complain)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    page.save(options.out)
    kind = "" if options.predicted is None else f" predicted to be {options.predicted}"
    _tell_written(page, options, f"{page.samples} of {chosen.among} rows{kind}", say)
    return len(chosen) - page.samples


def _methods(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The methods, each with what flags say about it."""
    names = listed(options.methods)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"--methods must be at least one, each once, got {options.methods!r}")
    look_here(names)
    flags = {"layers": options.layers, "beta": options.beta, "attention": options.attention or None}
    given = {name: value for name, value in flags.items() if value is not None}
    if given and "mhex" not in names:
        raise ValueError(
            f"{', '.join(f'--{name}' for name in given)} must go with mhex among --methods, got {options.methods}"
        )
    if "layers" in given:
        given["layers"] = layers_of("--layers", options.layers)
    found = {name: given if name == "mhex" else {} for name in names}
    for name, settings in found.items():
        # What is wrong shows before anything is loaded.
        if settings:
            explainers.explainer(name, **settings)
        else:
            explainers.parse(name)
    return found


def _unlabelled(options: argparse.Namespace, complain: Say) -> Shown:
    given = given_texts(options)
    for line, reason in given.rejected:
        complain(f"skipped: {options.input}: line {line}: {reason}")
    places = chosen_places(len(given.texts), options.samples, options.seed)
    file = options.input is not None
    return Shown(
        texts=[given.texts[place] for place in places],
        names=[f"line {given.lines[place]}" for place in places] if file else None,
        labels=[None] * len(places),
        there=len(given.texts),
        what=str(options.input) if file else "--text",
        unreadable=len(given.rejected),
    )


def _labelled(options: argparse.Namespace, complain: Say) -> Shown:
    split = options.split or "test"
    bundle, damaged = _read(options, complain)
    texts = getattr(bundle, split)
    if texts is None:
        raise ValueError(f"--split: {bundle.name} has no {split} texts")
    places = chosen_places(len(texts), options.samples, options.seed)
    rows = texts.select(places)
    found: list[Any] = list(rows["text"])
    if "pair" in rows.column_names:
        found = list(zip(found, rows["pair"], strict=True))
    return Shown(
        texts=found,
        names=[f"{split} {place + 1}" for place in places],
        labels=[bundle.class_names[label] for label in rows["label"]],
        there=len(texts),
        what=f"{bundle.name}, {split}",
        unreadable=damaged,
    )


def _read(options: argparse.Namespace, complain: Say) -> tuple[TextBundle, int]:
    """The bundle, and of how many files rows were left out, which is told."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnreadableTextWarning)
        bundle = bundle_of(options)
    for warning in caught:
        complain(f"warning: {' '.join(str(warning.message).split())}")
    return bundle, sum(issubclass(warning.category, UnreadableTextWarning) for warning in caught)


def chosen_places(count: int, wanted: int, seed: int) -> list[int]:
    """Which of so many texts are shown: all, or some by chance, in their order."""
    if wanted >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), wanted))  # noqa: S311 - no secret


def _targets(first: Explanation, labels: Sequence[int | None], count: int) -> list[list[int]]:
    """The classes to explain after the predicted one: the true one where it is another, then by probability."""
    rows = []
    for item, label in zip(first, labels, strict=True):
        ranked = sorted(range(len(item.probabilities)), key=lambda index: -item.probabilities[index])
        leading = [item.prediction, *([label] if label is not None and label != item.prediction else [])]
        rows.append([*leading, *(index for index in ranked if index not in leading)])
    return [list(column) for column in list(zip(*rows, strict=True))[1:count]]


def _page(
    options: argparse.Namespace,
    explained: dict[str, list[Explanation]],
    *,
    names: list[str] | None,
    labels: list[int | None],
    what: str,
) -> ExplorerPage:
    about = {
        "checkpoint": str(options.checkpoint),
        "texts": what,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    return report(
        cast("dict[str, Any]", explained),
        names=names,
        labels=labels,
        title=options.title,
        about=about,
        max_bytes=int(options.max_mb * _MEGABYTE),
    )


def _tell(page: ExplorerPage, options: argparse.Namespace, methods: int, shown: Shown, say: Say) -> None:
    each = page.targets / (page.samples * methods)
    by = f" by {methods} methods" if methods > 1 else ""
    _tell_written(page, options, f"{page.samples} of {shown.there} texts{by}, {each:.1f} classes each", say)


def _tell_written(page: ExplorerPage, options: argparse.Namespace, what: str, say: Say) -> None:
    say(f"wrote {options.out} ({page.size / _MEGABYTE:.1f} MB): {what}")
    if page.left_out:
        say(f"{page.left_out} more classes did not fit into {options.max_mb:g} MB; --max-mb takes more")
    say(f"next: open {shlex.quote(str(options.out))} in a browser")

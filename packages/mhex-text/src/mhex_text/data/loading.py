"""From a name, a file or a folder to a bundle: classes are numbered, and a share of the texts is split off."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from mhex_core import _checks
from mhex_text.data.ag_news import AG_NEWS, ag_news_files, ag_news_from_hub, read_ag_news
from mhex_text.data.bundle import TextBundle
from mhex_text.data.folders import STATE, files_of
from mhex_text.data.notes import SYNTHETIC_NOTES, notes_bundle
from mhex_text.data.rows import Columns, Row, label_names, read_rows

_WHOLE = re.compile(r"-?\d+\.0+")


def load_texts(
    source: str | Path,
    *,
    root: str | Path | None = None,
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    rationale: str | None = None,
    validation: float = 0.1,
    seed: int = 0,
    download: bool = True,
    class_names: Sequence[str] | None = None,
) -> TextBundle:
    """Read labelled texts.

    Labels are names, whose sorted order numbers the classes, or whole numbers. Damaged rows (of another number of
    columns, without a text or label, with a rationale that does not fit the text, not UTF-8) are left out, of which an
    `UnreadableTextWarning` tells.

    Args:
        source: "ag_news"; or "synthetic-notes", made up by `notes_bundle`; or a CSV file with a header, a JSON Lines or
            a Parquet file; or a folder of such files called train and, if there are any, validation (valid, val, dev)
            and test, also in parts, as on the Hugging Face hub (data/train-00000-of-00002.parquet); or what the
            datasets library saved to disk.
        root: For "ag_news": a folder in which `ag_news/train.csv` and `ag_news/test.csv` lie, as first published
            (class from 1, title, description; no header) or with a header and the columns label and text. None takes
            it from the Hugging Face hub.
        text: The column of the texts. None finds text, sentence, content, review or document.
        pair: The column of second texts. None finds sentence1 and sentence2, premise and hypothesis, text and
            text_pair or pair, unless `text` is given.
        label: The column of the labels. None finds label, labels, class, category or target.
        rationale: The column of what people marked, which every file must then have: of each text a list of spans
            [start, end], see `TextBundle`; in a CSV file as JSON. A row without one has an empty list. None finds
            rationale or rationales where there is one, file by file, unless it holds words in place of spans.
        validation: Where there are no validation texts, the share of the others that becomes them, class by class;
            from a single file as many again become the test texts. 0 splits nothing off.
        seed: Of that split; of what is made up.
        download: Whether texts may be fetched from the hub; without, only what is in its cache is found.
        class_names: The names of the classes in their order: of the numbers 0 to K - 1, or the names in the file. None
            takes those that the datasets library has noted in the file, or else the labels.

    Raises:
        TypeError: An argument is of another type.
        ValueError: A value does not fit, a column is not to be found, or no row is usable.
        FileNotFoundError: There is no such file, folder or download.
    """
    if not isinstance(source, str | Path):
        raise TypeError(f"source must be a name or a path, got {type(source).__name__}")
    if root is not None and not isinstance(root, str | Path):
        raise TypeError(f"root must be a path or None, got {type(root).__name__}")
    columns = Columns(text=text, pair=pair, label=label, rationale=rationale)
    for argument, value in columns.given().items():
        if not isinstance(value, str):
            raise TypeError(f"{argument} must be the name of a column or None, got {type(value).__name__}")
    share = _checks.number("validation", validation, low=0, high=0.4)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    _checks.flag("download", download)
    names = _checked_names(class_names)
    if source in (AG_NEWS, SYNTHETIC_NOTES):
        given = columns.given()
        if given:
            argument, value = next(iter(given.items()))
            raise ValueError(f"{argument} must be None for {source!r}, whose columns are known, got {value!r}")
    if source == SYNTHETIC_NOTES and root is None:
        made = notes_bundle(seed=seed)
        return made if names is None else replace(made, class_names=names)
    splits: dict[str, list[Row]] = {}
    if source == AG_NEWS:
        if root is None:
            splits, found = ag_news_from_hub(download=download)
        else:
            files, found = ag_news_files(Path(root) / AG_NEWS)
            for name, file in files.items():
                splits[name] = read_ag_news(file, len(found))
        return _bundle(AG_NEWS, splits, names or found, share, seed, single=False)
    if root is not None:
        raise ValueError(f"root belongs to source='ag_news', got it with {str(source)!r}")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"source must be 'ag_news', 'synthetic-notes', a file or a folder, and there is no {path}"
        )
    parts_of = files_of(path) if path.is_dir() else {"train": [path]}
    for name, parts in parts_of.items():
        splits[name] = []
        for file in parts:
            splits[name] += read_rows(file, columns)
    names = names or label_names(parts_of["train"][0], columns)
    if len({rows[0].pair is None for rows in splits.values()}) > 1:
        raise ValueError(f"source must hold pairs of texts in all of its files or in none, got both in {path}")
    return _bundle(path.stem, splits, names, share, seed, single=not path.is_dir() or (path / STATE).is_file())


def _checked_names(class_names: object) -> tuple[str, ...] | None:
    if class_names is None:
        return None
    if isinstance(class_names, str) or not isinstance(class_names, Sequence):
        raise TypeError(f"class_names must be a sequence of names, got {type(class_names).__name__}")
    other = next((name for name in class_names if not isinstance(name, str)), None)
    if other is not None:
        raise TypeError(f"class_names must be a sequence of names, got {other!r} among them")
    if len(class_names) < 2 or len(set(class_names)) != len(class_names):
        raise ValueError(f"class_names must hold at least two different names, got {tuple(class_names)!r}")
    return tuple(class_names)


def _bundle(
    name: str,
    splits: dict[str, list[Row]],
    class_names: tuple[str, ...] | None,
    share: float,
    seed: int,
    *,
    single: bool,
) -> TextBundle:
    numbers, names = _numbered({split: [row.label for row in rows] for split, rows in splits.items()}, class_names)
    parts: dict[str, tuple[list[Row], list[int]]] = {split: (rows, numbers[split]) for split, rows in splits.items()}
    wanted = [split for split in ("test", "validation") if split not in parts and (single or split == "validation")]
    if share and wanted:
        parts |= _split_off(*parts["train"], wanted, share, seed)
    made = {split: _dataset(*part) for split, part in parts.items()}
    return TextBundle(
        name=name,
        train=made["train"],
        validation=made.get("validation"),
        test=made.get("test"),
        class_names=names,
    )


def _numbered(
    labels: dict[str, list[str | int]], class_names: tuple[str, ...] | None
) -> tuple[dict[str, list[int]], tuple[str, ...]]:
    """Class numbers in place of labels, and the names of the classes."""
    distinct = {split: set(map(str, values)) for split, values in labels.items()}
    everything = set().union(*distinct.values())
    if not everything <= set(class_names or ()) and all(_WHOLE.fullmatch(one) or one.isdecimal() for one in everything):
        # What tables make of whole numbers: "1.0" is class 1.
        labels = {split: [str(value).partition(".")[0] for value in values] for split, values in labels.items()}
        distinct = {split: set(map(str, values)) for split, values in labels.items()}
        everything = set().union(*distinct.values())
    whole = all(value.removeprefix("-").isdecimal() for value in everything)
    if class_names is None:
        # Numbers in their own order: "10" comes after "9".
        ordered = sorted(distinct["train"], key=int) if whole else sorted(distinct["train"])
        if len(ordered) < 2:
            raise ValueError(f"the label column must hold at least two classes in train, got {ordered[0]!r} alone")
        numbers = {value: number for number, value in enumerate(ordered)}
        names = tuple(ordered)
    elif everything <= set(class_names) or not whole:
        names, numbers = class_names, {value: number for number, value in enumerate(class_names)}
    else:
        names, numbers = class_names, {str(number): number for number in range(len(class_names))}
    for split, values in distinct.items():
        unknown = sorted(values - numbers.keys())
        if unknown:
            raise ValueError(
                f"the labels of {split} must be among {', '.join(list(numbers)[:20])}"
                f"{'' if class_names else ', those of train'}, got {unknown[0]!r}"
            )
    return {split: [numbers[str(value)] for value in values] for split, values in labels.items()}, names


def _split_off(
    rows: list[Row], numbers: list[int], wanted: list[str], share: float, seed: int
) -> dict[str, tuple[list[Row], list[int]]]:
    """Take a share of every class away for each wanted split; the rest is what train keeps. Order stays as it was."""
    generator = np.random.default_rng(seed)
    chosen: dict[str, list[int]] = {split: [] for split in (*wanted, "train")}
    labels = np.asarray(numbers)
    for number in np.unique(labels):
        places = generator.permutation(np.flatnonzero(labels == number)).tolist()
        # Of a class with enough texts each split sees one; of one with a single text, train does.
        count = max(round(share * len(places)), int(len(places) > len(wanted)))
        for split in wanted:
            chosen[split] += places[:count]
            places = places[count:]
        chosen["train"] += places
    parts = {}
    for split, places in chosen.items():
        places.sort()
        if places:
            parts[split] = ([rows[place] for place in places], [numbers[place] for place in places])
    return parts


def _dataset(rows: list[Row], numbers: list[int]) -> datasets.Dataset:
    columns: dict[str, list[Any]] = {"text": [row.text for row in rows]}
    if rows[0].pair is not None:
        columns["pair"] = [row.pair for row in rows]
    columns["label"] = numbers
    if rows[0].rationale is None:
        return datasets.Dataset.from_dict(columns)
    # The type is given, as nothing could be told from lists that are all empty.
    spans = pa.array([row.rationale for row in rows], pa.list_(pa.list_(pa.int64())))
    return datasets.Dataset.from_dict({**columns, "rationale": spans})

"""Labelled texts from files, folders and AG News, and the bundle of splits a training run takes.

Letters: K classes.
"""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

try:
    import datasets
except ImportError as error:  # the extra is not there
    raise ImportError("reading texts takes the library datasets: pip install 'mhex-text[train]'") from error

from mhex_core import _checks

AG_NEWS = "ag_news"
AG_NEWS_REPOSITORY = "fancyzhx/ag_news"
AG_NEWS_CLASSES = ("World", "Sports", "Business", "Sci/Tech")

_TEXT_NAMES = ("text", "sentence", "content", "review", "document")
_PAIR_NAMES = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("text", "text_pair"), ("text", "pair"))
_LABEL_NAMES = ("label", "labels", "class", "category", "target")
_ENDINGS = (".csv", ".jsonl", ".json", ".parquet")
_SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
_SHOWN = 5  # damaged rows a warning tells of


class UnreadableTextWarning(UserWarning):
    """Rows of a file were left out because they are damaged."""


@dataclass(frozen=True, kw_only=True)
class TextBundle:
    """The splits of a data set with what there is to know about them.

    Each split has the columns "text" and "label" (class numbers from 0), and "pair" where it holds pairs of texts.

    Attributes:
        name: What the data is called.
        train: Texts to learn from.
        validation: Texts to choose by, or None.
        test: Texts to judge by, or None.
        class_names: Name of each class, by class number.
    """

    name: str
    train: datasets.Dataset
    validation: datasets.Dataset | None
    test: datasets.Dataset | None
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        names = self.class_names
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"class_names must be a tuple of names, got {names!r}")
        if len(names) < 2 or len(set(names)) != len(names):
            raise ValueError(f"class_names must hold at least two different names, got {names!r}")
        for split, texts in self.splits().items():
            if not isinstance(texts, datasets.Dataset):
                raise TypeError(f"{split} must be a datasets.Dataset, got {type(texts).__name__}")
            there = set(texts.column_names)
            if not {"text", "label"} <= there or ("pair" in there) != self.pairs:
                wanted = "text, pair, label" if self.pairs else "text, label"
                raise ValueError(f"{split} must have the columns {wanted}, got {', '.join(texts.column_names)}")
            if not len(texts):
                raise ValueError(f"{split} must hold at least one text, got none")
            labels = list(texts["label"])
            other = next((label for label in labels if isinstance(label, bool) or not isinstance(label, int)), None)
            if other is not None or None in labels:
                raise TypeError(f"{split} must hold labels that are class numbers, got {other!r}")
            if not 0 <= min(labels) <= max(labels) < len(names):
                raise ValueError(
                    f"{split} must hold labels in [0, {len(names) - 1}], got {min(labels)} to {max(labels)}"
                )

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def pairs(self) -> bool:
        """Whether an example is a pair of texts."""
        return "pair" in self.train.column_names

    def splits(self) -> dict[str, datasets.Dataset]:
        """The splits there are, by name."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: texts for name, texts in found.items() if texts is not None or name == "train"}


class _Row(NamedTuple):
    """One usable row of a file."""

    text: str
    pair: str | None
    label: str | int


def load_texts(
    source: str | Path,
    *,
    root: str | Path | None = None,
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    validation: float = 0.1,
    seed: int = 0,
    download: bool = True,
    class_names: Sequence[str] | None = None,
) -> TextBundle:
    """Read labelled texts.

    Labels are names, whose sorted order numbers the classes, or whole numbers. Damaged rows (of another number of
    columns, without a text or label, not UTF-8) are left out, of which an `UnreadableTextWarning` tells.

    Args:
        source: "ag_news"; or a CSV file with a header, a JSON Lines file or a Parquet file; or a folder of such files
            called train and, if there are any, validation (valid, val, dev) and test.
        root: For "ag_news": a folder in which `ag_news/train.csv` and `ag_news/test.csv` lie, as first published
            (class from 1, title, description; no header) or with a header and the columns label and text. None takes
            it from the Hugging Face hub.
        text: The column of the texts. None finds text, sentence, content, review or document.
        pair: The column of second texts. None finds sentence1 and sentence2, premise and hypothesis, text and
            text_pair or pair, unless `text` is given.
        label: The column of the labels. None finds label, labels, class, category or target.
        validation: Where there are no validation texts, the share of the others that becomes them, class by class;
            from a single file as many again become the test texts. 0 splits nothing off.
        seed: Of that split.
        download: Whether texts may be fetched from the hub; without, only what is in its cache is found.
        class_names: The names of the classes in their order: of the numbers 0 to K - 1, or the names in the file.

    Raises:
        TypeError: An argument is of another type.
        ValueError: A value does not fit, a column is not to be found, or no row is usable.
        FileNotFoundError: There is no such file, folder or download.
    """
    if not isinstance(source, str | Path):
        raise TypeError(f"source must be a name or a path, got {type(source).__name__}")
    if root is not None and not isinstance(root, str | Path):
        raise TypeError(f"root must be a path or None, got {type(root).__name__}")
    for argument, value in (("text", text), ("pair", pair), ("label", label)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{argument} must be the name of a column or None, got {type(value).__name__}")
    share = _checks.number("validation", validation, low=0, high=0.4)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    _checks.flag("download", download)
    names = _checked_names(class_names)
    if source == AG_NEWS:
        for argument, value in (("text", text), ("pair", pair), ("label", label)):
            if value is not None:
                raise ValueError(f"{argument} must be None for 'ag_news', whose columns are known, got {value!r}")
        if root is None:
            splits, found = _ag_news_from_hub(download=download)
        else:
            files, found = _ag_news_files(Path(root) / AG_NEWS)
            splits = {}
            for name, file in files.items():
                splits[name] = _read_ag_news(file, len(found))
        return _bundle(AG_NEWS, splits, names or found, share, seed, single=False)
    if root is not None:
        raise ValueError(f"root belongs to source='ag_news', got it with {str(source)!r}")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"source must be 'ag_news', a file or a folder, and there is no {path}")
    files = _files_of(path) if path.is_dir() else {"train": path}
    splits = {}
    for name, file in files.items():
        splits[name] = _read(file, text, pair, label)
    if len({rows[0].pair is None for rows in splits.values()}) > 1:
        raise ValueError(f"source must hold pairs of texts in all of its files or in none, got both in {path}")
    return _bundle(path.stem, splits, names, share, seed, single=not path.is_dir())


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


# ------------------------------------------------------------------------------------------------------------- AG News


def _ag_news_from_hub(*, download: bool) -> tuple[dict[str, list[_Row]], tuple[str, ...]]:
    settings = datasets.DownloadConfig(local_files_only=not download)
    try:
        found = datasets.load_dataset(AG_NEWS_REPOSITORY, download_config=settings)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{AG_NEWS_REPOSITORY} could not be had from the Hugging Face hub ({reason}); "
            "root names a folder with ag_news/train.csv and ag_news/test.csv"
        ) from error
    names = getattr(found["train"].features["label"], "names", AG_NEWS_CLASSES)
    splits = {
        split: [
            _Row(text, None, label) for text, label in zip(found[split]["text"], found[split]["label"], strict=True)
        ]
        for split in ("train", "test")
    }
    return splits, tuple(names)


def _ag_news_files(folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    names: tuple[str, ...] = AG_NEWS_CLASSES
    if (folder / "classes.txt").is_file():
        lines = (folder / "classes.txt").read_text(encoding="utf-8").splitlines()
        names = tuple(line.strip() for line in lines if line.strip())
    files = {split: folder / f"{split}.csv" for split in ("train", "test")}
    for path in files.values():
        if not path.is_file():
            raise FileNotFoundError(f"root must hold {AG_NEWS}/{path.name}, and there is no {path}")
    return files, names


def _read_ag_news(path: Path, classes: int) -> list[_Row]:
    lines = _lines(path)
    _, first = next(_csv_records(lines), (0, None))
    if first is None:
        raise ValueError(f"{path} must be a CSV file, and its first row is damaged or missing")
    headed = not first[0].strip().isdigit()
    columns = first if headed else ["label", "title", "description"]
    place, words = _column("label", None, columns, _LABEL_NAMES, path), [1, 2]
    if headed:
        words = [_column("text", None, columns, _TEXT_NAMES, path)]
    rows, damage = [], _Damage(path)
    for line, cells in _csv_records(lines, skip=headed, width=len(columns)):
        number = cells[place].strip() if cells is not None else ""
        # Title and description as one text, as the hub has them.
        text = " ".join(cells[word] for word in words) if cells is not None else ""
        reason = _reason(cells, text, None, number, len(columns))
        if reason is None and not (number.isdecimal() and 1 <= int(number) <= classes):
            reason = f"class {number!r} is not one of 1 to {classes}"
        if reason is not None:
            damage.add(line, reason)
        else:
            rows.append(_Row(text, None, int(number) - 1))
    return damage.report(rows)


# --------------------------------------------------------------------------------------------------------------- files


def _files_of(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        split = next((split for split, names in _SPLIT_NAMES.items() if path.stem.lower() in names), None)
        if split is None or path.suffix.lower() not in _ENDINGS:
            continue
        if split in found:
            raise ValueError(f"source must hold one file of {split} texts, got {found[split].name} and {path.name}")
        found[split] = path
    if "train" not in found:
        raise ValueError(f"source must hold a file called train with the ending {', '.join(_ENDINGS)}, got {folder}")
    return found


def _read(path: Path, text: str | None, pair: str | None, label: str | None) -> list[_Row]:
    """The usable rows of one file."""
    kind = path.suffix.lower()
    if kind not in _ENDINGS:
        raise ValueError(f"source must have one of the endings {', '.join(_ENDINGS)}, got {path.name}")
    columns, records = {".csv": _csv_table, ".parquet": _parquet_table}.get(kind, _json_table)(path)
    if text is None and pair is None:
        lower = {name.lower() for name in columns}
        text, pair = next((names for names in _PAIR_NAMES if lower.issuperset(names)), (None, None))
    places = (
        _column("text", text, columns, _TEXT_NAMES, path),
        None if pair is None else _column("pair", pair, columns, (), path),
        _column("label", label, columns, _LABEL_NAMES, path),
    )
    if len(set(places)) != len(places):
        raise ValueError(f"text, pair and label must be different columns, got {text!r}, {pair!r} and {label!r}")
    rows, damage = [], _Damage(path)
    for line, cells in records:
        first, second, found = ("" if cells is None or place is None else cells[place] for place in places)
        if isinstance(found, str):
            found = found.strip()
        elif isinstance(found, bool) or (isinstance(found, float) and found.is_integer()):
            found = int(found)  # what tables make of whole numbers with gaps between them
        reason = _reason(cells, first, None if pair is None else second, found, len(columns))
        if reason is not None:
            damage.add(line, reason)
        else:
            rows.append(_Row(first, None if pair is None else second, found))
    return damage.report(rows)


def _column(argument: str, wanted: str | None, columns: Sequence[str], names: Sequence[str], path: Path) -> int:
    """The place of a column that is given, or has one of these names, in capitals or not."""
    if wanted is not None and wanted in columns:
        return list(columns).index(wanted)
    lower = [column.lower() for column in columns]
    for name in names if wanted is None else (wanted.lower(),):
        if name in lower:
            return lower.index(name)
    raise ValueError(f"{argument} must be one of the columns {', '.join(columns)} of {path.name}, got {wanted!r}")


def _reason(cells: Sequence[Any] | None, text: Any, pair: Any, label: Any, width: int) -> str | None:
    """Why a row cannot be used, or None."""
    if cells is None:
        return f"not a row of {width} columns"
    values = [value for value in (text, pair, label) if isinstance(value, str)]
    if any("\udc80" <= letter <= "\udcff" for value in values for letter in value if letter > "\ud7ff"):
        return "not UTF-8"
    for name, value in (("text", text), ("pair", pair)):
        if (name == "text" or value is not None) and not (isinstance(value, str) and value.strip()):
            return f"no {name}"
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        return "no label"
    return None


class _Damage:
    """The rows of a file that are left out."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self.shown: list[str] = []

    def add(self, line: int, reason: str) -> None:
        """Leave a row out."""
        self.count += 1
        if len(self.shown) < _SHOWN:
            self.shown.append(f"line {line}: {reason}")

    def report(self, rows: list[_Row]) -> list[_Row]:
        """The rows that are left, with a warning of the others."""
        shown = "; ".join(self.shown) + ("; ..." if self.count > len(self.shown) else "")
        if not rows:
            raise ValueError(f"{self.path} must hold at least one usable row, got none ({shown or 'it is empty'})")
        if self.count:
            what = f"{self.path}: left out {self.count} of {self.count + len(rows)} rows ({shown})"
            warnings.warn(what, UnreadableTextWarning, stacklevel=4)  # where load_texts was called
        return rows


def _lines(path: Path) -> list[str]:
    # What is not UTF-8 becomes lone surrogates, so that it spoils its own row alone.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        return list(file)


def _csv_records(
    lines: list[str], *, skip: bool = False, width: int | None = None
) -> Iterator[tuple[int, list[str] | None]]:
    """Number of its first line and cells of each record; None for the cells of a damaged one.

    A quotation mark that is never closed would swallow all rows to the end. So only the first line of a damaged record
    is given up, and reading goes on with the second.
    """
    start = 0
    while start < len(lines):
        reader = csv.reader((lines[index] for index in range(start, len(lines))), strict=True)
        begin = first = start
        while True:
            try:
                cells = next(reader, None)
            except csv.Error:
                cells = []
                damaged = True
            else:
                if cells is None:
                    return
                damaged = bool(cells) and width is not None and len(cells) != width
            end = begin + reader.line_num
            if damaged:
                yield first + 1, None
                start = first + 1
                break
            if cells and not (skip and first == 0):
                yield first + 1, cells
            first = end


def _csv_table(path: Path) -> tuple[list[str], Iterator[tuple[int, Sequence[Any] | None]]]:
    lines = _lines(path)
    _, header = next(_csv_records(lines), (0, None))
    if header is None:
        raise ValueError(f"{path} must begin with a row of column names, and that is damaged or missing")
    columns = [name.strip() for name in header]
    return columns, _csv_records(lines, skip=True, width=len(columns))


def _json_table(path: Path) -> tuple[list[str], Iterator[tuple[int, Sequence[Any] | None]]]:
    objects: list[tuple[int, dict[str, Any] | None]] = []
    columns: dict[str, None] = {}
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line.decode("utf-8", errors="surrogateescape"))
        except ValueError:
            found = None
        objects.append((number, found if isinstance(found, dict) else None))
        if isinstance(found, dict):
            columns |= dict.fromkeys(found)
    if not columns:
        raise ValueError(f"{path} must hold a JSON object per line, got none")
    names = list(columns)
    return names, (
        (number, None if found is None else [found.get(name) for name in names]) for number, found in objects
    )


def _parquet_table(path: Path) -> tuple[list[str], Iterator[tuple[int, Sequence[Any] | None]]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} must be a Parquet file: {str(error).splitlines()[0]}") from error
    values = [column.to_pylist() for column in table.columns]
    return list(table.column_names), ((number, cells) for number, cells in enumerate(zip(*values, strict=True), 1))


# -------------------------------------------------------------------------------------------------------------- splits


def _bundle(
    name: str,
    splits: dict[str, list[_Row]],
    class_names: tuple[str, ...] | None,
    share: float,
    seed: int,
    *,
    single: bool,
) -> TextBundle:
    numbers, names = _numbered({split: [row.label for row in rows] for split, rows in splits.items()}, class_names)
    parts: dict[str, tuple[list[_Row], list[int]]] = {split: (rows, numbers[split]) for split, rows in splits.items()}
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
    rows: list[_Row], numbers: list[int], wanted: list[str], share: float, seed: int
) -> dict[str, tuple[list[_Row], list[int]]]:
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


def _dataset(rows: list[_Row], numbers: list[int]) -> datasets.Dataset:
    columns: dict[str, list[Any]] = {"text": [row.text for row in rows]}
    if rows[0].pair is not None:
        columns["pair"] = [row.pair for row in rows]
    return datasets.Dataset.from_dict({**columns, "label": numbers})

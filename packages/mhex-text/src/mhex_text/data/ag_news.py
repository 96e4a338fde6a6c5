"""AG News: news stories of four classes, from the Hugging Face hub or from files.

Source: Zhang, Zhao and LeCun 2015, "Character-level Convolutional Networks for Text Classification" (arXiv 1509.01626).
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import datasets

from mhex_text.data.rows import LABEL_NAMES, TEXT_NAMES, Damage, Row, find_column, why_unusable
from mhex_text.data.tables import csv_table

AG_NEWS = "ag_news"
AG_NEWS_REPOSITORY = "fancyzhx/ag_news"
AG_NEWS_CLASSES = ("World", "Sports", "Business", "Sci/Tech")


def ag_news_from_hub(*, download: bool) -> tuple[dict[str, list[Row]], tuple[str, ...]]:
    """The rows of train and test, and the names of the classes.

    Args:
        download: Whether they may be fetched; without, only what is in the hub's cache is found.

    Raises:
        FileNotFoundError: They cannot be had.
    """
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
        split: [Row(text, None, label) for text, label in zip(found[split]["text"], found[split]["label"], strict=True)]
        for split in ("train", "test")
    }
    return splits, tuple(names)


def ag_news_files(folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The files of train and test, and the names of the classes.

    Raises:
        FileNotFoundError: A file is not there.
    """
    names: tuple[str, ...] = AG_NEWS_CLASSES
    if (folder / "classes.txt").is_file():
        lines = (folder / "classes.txt").read_text(encoding="utf-8").splitlines()
        names = tuple(line.strip() for line in lines if line.strip())
    files = {split: folder / f"{split}.csv" for split in ("train", "test")}
    for path in files.values():
        if not path.is_file():
            raise FileNotFoundError(f"root must hold {AG_NEWS}/{path.name}, and there is no {path}")
    return files, names


def read_ag_news(path: Path, classes: int) -> list[Row]:
    """The usable rows of a file as first published, or with a header, with a warning of the others.

    Raises:
        ValueError: It is no CSV file, a column is not to be found, or no row is usable.
    """
    records = csv_table(path, delimiter=",")
    start, first = next(records, (0, ""))
    if isinstance(first, str):
        raise ValueError(  # noqa: TRY004 - the reason stands in the place of the cells
            f"{path} must be a CSV file, and its first row is damaged or missing"
        )
    headed = not first[0].strip().isdigit()
    columns = first if headed else ["label", "title", "description"]
    place, words = find_column("label", None, columns, LABEL_NAMES, path), [1, 2]
    if headed:
        words = [find_column("text", None, columns, TEXT_NAMES, path)]
    rows, damage = [], Damage(path)
    for line, cells in records if headed else chain([(start, first)], records):
        if isinstance(cells, str):
            damage.add(line, cells)
            continue
        number = cells[place].strip()
        # Title and description as one text, as the hub has them.
        text = " ".join(cells[word] for word in words)
        reason = why_unusable(text, None, number)
        if reason is None and not (number.isdecimal() and 1 <= int(number) <= classes):
            reason = f"class {number!r} is not one of 1 to {classes}"
        if reason is not None:
            damage.add(line, reason)
        else:
            rows.append(Row(text, None, int(number) - 1))
    return damage.report(rows)

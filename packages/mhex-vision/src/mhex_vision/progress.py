"""Bars on a terminal, and lines beside them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def bar(items: Iterable[T], *, desc: str, unit: str = "batch", shown: bool = True) -> tqdm[T]:
    """Go through items with a bar on standard error, which leaves nothing behind; none where that is no terminal.

    Args:
        items: Of a known length.
        desc: What is going on.
        unit: What they are.
        shown: False never shows one.
    """
    return tqdm(items, desc=desc, unit=unit, leave=False, disable=_hidden(shown), dynamic_ncols=True)


def counter(*, desc: str, total: int, unit: str) -> tqdm[Any]:
    """The same bar for what is counted by its `update`."""
    return tqdm(desc=desc, total=total, unit=unit, leave=False, disable=_hidden(True), dynamic_ncols=True)


def aside() -> AbstractContextManager[None]:
    """Takes the bars of this process away while something else is printed."""
    return tqdm.external_write_mode(file=sys.stdout)


def _hidden(shown: bool) -> bool | None:
    # For tqdm None means: hidden unless this is a terminal.
    return None if shown else True

"""Bars that tell how far something is: in a terminal, and nowhere else."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def bar(total: int, *, description: str = "mhex", unit: str = "text", shown: bool = True) -> tqdm[Any]:
    """A bar on the standard error, gone when it is closed. Nothing at all where that is no terminal.

    Args:
        total: Of what is to be done.
        description: What is being done.
        unit: Of what.
        shown: Whether a terminal shows it.
    """
    # None: a bar on a terminal, nothing where the output is piped.
    return tqdm(total=total, desc=description, unit=unit, leave=False, disable=None if shown else True)

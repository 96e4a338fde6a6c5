"""Names that inputs bear: each once in a run."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np


def repeated(strings: Iterable[str]) -> set[int]:
    """The hashes (in this process) of strings that occur more than once, at eight bytes a string.

    Two different strings may share a hash: the answer says which strings to look at, and not which are repeated.
    """
    hashes = np.frombuffer(array("q", map(hash, strings)), dtype=np.int64)
    ordered = np.sort(hashes)
    return set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())

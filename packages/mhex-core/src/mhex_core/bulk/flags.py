"""What the `batch` commands of images and of texts have in common."""

from __future__ import annotations

import argparse
import os
from typing import Any

from mhex_core.specs import look_here

SAME_BITS = "MKL_CBWR"
"""The setting of MKL, which multiplies torch's matrices on x86, that is read once, before the first product. Without it
small products on some processors (attention over an odd number of tokens on an AMD Zen 3) depend on where they lie."""

_LEAST = {"batch_size": 1, "max_length": 1, "shard_size": 1, "lanes": 1, "workers": 0}


def running(options: argparse.Namespace) -> dict[str, Any]:
    """How a batch runs, as its flags say.

    The process becomes one for such runs: a method of the user's own is looked for in the current folder, and matrix
    products have the same bits wherever in memory their factors lie.

    Args:
        options: With the flags of a batch's running, from `batch_size` to `overwrite`.

    Returns:
        Keyword arguments of `explain_many`.

    Raises:
        ValueError: A flag's value does not fit, or not beside another flag.
    """
    for name, least in _LEAST.items():
        value = getattr(options, name, None)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    engine = options.engine or ("embedded" if options.address is None else "ray")
    if options.address is not None and engine != "ray":
        raise ValueError(f"--address must come with --engine ray, got --engine {engine}")
    os.environ.setdefault(SAME_BITS, "AUTO")
    look_here([options.method])
    same = ("batch_size", "shard_size", "workers", "lanes", "address", "overwrite", "autocast", "compile")
    return {"engine": engine, **{name: getattr(options, name) for name in same}}

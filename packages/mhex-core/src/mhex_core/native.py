"""Which implementation runs, and why.

`MHEX_NATIVE` chooses for the whole process: "auto" (the default) takes compiled kernels where there are any, "0" never,
"1" insists on them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from mhex_core import _checks

Backend = Literal["auto", "reference", "native"]


@dataclass(frozen=True)
class Status:
    """What runs.

    Attributes:
        backend: What `backend="auto"` means in this process.
        reason: Why, in one sentence.
    """

    backend: Literal["reference", "native"]
    reason: str


def status() -> Status:
    """Say which implementation `backend="auto"` runs here, and why.

    Raises:
        ValueError: The environment variable MHEX_NATIVE is none of "0", "1", "auto".
        RuntimeError: MHEX_NATIVE is "1" and there is nothing compiled to run.
    """
    wish = os.environ.get("MHEX_NATIVE", "auto")
    if wish not in ("0", "1", "auto"):
        raise ValueError(f"MHEX_NATIVE must be '0', '1' or 'auto', got {wish!r}")
    if wish == "1":
        raise RuntimeError("MHEX_NATIVE=1 asks for compiled kernels, and this version of mhex-core has none; unset it")
    if wish == "0":
        return Status("reference", "MHEX_NATIVE=0 asks for the plain torch implementation")
    return Status("reference", "this version of mhex-core comes without compiled kernels")


def resolve(backend: Backend) -> Literal["reference", "native"]:
    """Turn a `backend` argument into the implementation to run.

    Raises:
        RuntimeError: "native" was asked for by name and cannot run; `status().reason` is part of the message.
    """
    _checks.choice("backend", backend, ("auto", "reference", "native"))
    if backend == "reference":
        return "reference"
    current = status()
    if backend == "native" and current.backend != "native":
        raise RuntimeError(f"backend='native' cannot run: {current.reason}; use backend='auto'")
    return current.backend

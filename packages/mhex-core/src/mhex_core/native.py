"""Which implementation runs, and why.

`MHEX_NATIVE` chooses for the whole process: "auto" (the default) takes compiled kernels where there are any, "0" never,
"1" insists on them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mhex_core import _checks, registration

Backend = Literal["auto", "reference", "native"]
MAX_LAYERS = 128  # kMaxLayers of csrc/params.h
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
_LOADING = threading.Lock()


@dataclass(frozen=True)
class Status:
    """What runs.

    Attributes:
        backend: What `backend="auto"` means in this process.
        reason: Why, in one sentence.
        devices: The kinds of device that have kernels here: "cpu", "cuda".
        build: What the kernels were built with, and the instruction set that runs on this processor.
    """

    backend: Literal["reference", "native"]
    reason: str
    devices: tuple[str, ...] = ()
    build: Mapping[str, str] = field(default_factory=dict)


def status() -> Status:
    """Say which implementation `backend="auto"` runs here, and why.

    Raises:
        ValueError: The environment variable MHEX_NATIVE is none of "0", "1", "auto", or MHEX_CPU, which caps the vector
            instructions of the CPU kernels, is none of "baseline", "avx2", "avx512".
        RuntimeError: MHEX_NATIVE is "1" and there is nothing compiled to run.
    """
    wish = os.environ.get("MHEX_NATIVE", "auto")
    if wish not in ("0", "1", "auto"):
        raise ValueError(f"MHEX_NATIVE must be '0', '1' or 'auto', got {wish!r}")
    instructions = os.environ.get("MHEX_CPU", "")
    if instructions not in ("", *INSTRUCTION_SETS):
        raise ValueError(f"MHEX_CPU must be one of {', '.join(map(repr, INSTRUCTION_SETS))}, got {instructions!r}")
    if wish == "0":
        return Status("reference", "MHEX_NATIVE=0 asks for the plain torch implementation")
    found = _load()
    if wish == "1" and found.backend != "native":
        raise RuntimeError(f"MHEX_NATIVE=1 asks for compiled kernels, but {found.reason}; install them, or unset it")
    return found


def resolve(
    backend: Backend, tensors: Sequence[Tensor] = (), *, beside: Sequence[Tensor] = (), half: bool = True
) -> Literal["reference", "native"]:
    """Turn a `backend` argument into the implementation to run on `tensors`, the activations or maps of each layer.

    `beside`: what else is calculated with, looked at for transforms only. `half`: whether kernels take half precision
    here.

    Raises:
        RuntimeError: "native" was asked for by name and cannot run; the message says why.
    """
    _checks.choice("backend", backend, ("auto", "reference", "native"))
    if backend == "reference":
        return "reference"
    chosen, reason, devices = _choice()
    if chosen == "native":
        obstacle = _obstacle(tensors, devices, half=half)
        # Plain torch knows every transform; kernels know vmap and gradients that go backward.
        looked_at = () if torch.compiler.is_compiling() else (*tensors, *beside)
        transformed = any(map(_checks.is_transformed, looked_at))
        if obstacle is None and any(map(_checks.has_tangent, looked_at)):
            obstacle = "kernels know no gradients that go forward"
        if obstacle is None and torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
            obstacle = "torch.jit.trace cannot follow lists of tensors into kernels"
        if obstacle is None and not (transformed and backend == "auto"):
            return "native"
        if obstacle is None:
            return "reference"
        reason = obstacle
    if backend == "native":
        raise RuntimeError(f"backend='native' cannot run: {reason}; use backend='auto'")
    return "reference"


def _choice() -> tuple[Literal["reference", "native"], str, tuple[str, ...]]:
    current = status()
    return current.backend, current.reason, current.devices


# A compiled graph is made once: what the environment says then holds for it. This is all that the decorator
# torch.compiler.assume_constant_result does, but for importing the compiler, which takes longer than importing torch.
_choice._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _obstacle(tensors: Sequence[Tensor], devices: tuple[str, ...], *, half: bool) -> str | None:
    """What keeps kernels from running on these tensors, or None."""
    if len(tensors) > MAX_LAYERS:
        return f"kernels take up to {MAX_LAYERS} layers, got {len(tensors)}"
    kinds = {tensor.device for tensor in tensors}
    if len(kinds) > 1:
        return f"the layers are on several devices ({', '.join(sorted(map(str, kinds)))})"
    for device in kinds:
        if device.type not in devices and device.type != "meta":
            return f"there are no kernels for {device.type} here"
    wide = sum(tensor.dtype == torch.float64 for tensor in tensors)
    if wide not in (0, len(tensors)):
        return "some layers are float64 and some are not"
    known = (torch.float64, torch.float32, *((torch.float16, torch.bfloat16) if half else ()))
    for tensor in tensors:
        if tensor.dtype not in known:
            return f"there are no kernels for {tensor.dtype}"
    return None


def _load() -> Status:
    """Load what was compiled, once."""
    # The cache alone would let a second thread begin while the first is at it, and operators register but once.
    with _LOADING:
        return _load_once()


@functools.cache
def _load_once() -> Status:
    """Load what was compiled. Importing it registers its operators with torch's dispatcher."""
    if importlib.util.find_spec("mhex_core._C") is None:
        return Status("reference", "this installation of mhex-core was built without compiled kernels")
    try:
        module = importlib.import_module("mhex_core._C")
    except (ImportError, OSError) as error:
        return Status("reference", f"the compiled kernels could not be loaded ({error})")
    build = {str(key): str(value) for key, value in module.build_info().items()}
    registration.register()
    devices: tuple[str, ...] = ("cpu",)
    library = _cuda_library()
    if library is None:
        remark = "; CPU only, no CUDA kernels were built"
    elif torch.version.cuda is None:
        remark = "; CPU only, this torch has no CUDA"
    else:
        try:
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
        except OSError as error:
            remark = f"; CPU only, the CUDA kernels could not be loaded ({error})"
        else:
            devices, remark = ("cpu", "cuda"), " for CPU and CUDA"
    return Status("native", f"compiled kernels were found ({build['instruction_set']}){remark}", devices, build)


def _cuda_library() -> Path | None:
    found = sorted(Path(__file__).parent.glob("_cuda*.so"))
    return found[0] if found else None

"""setuptools as the build backend, with what the kernels need asked for only when kernels are built.

MHEX_NATIVE: "auto" (the default) builds the CPU kernels where there is a C++ compiler, "1" insists, "0" makes a pure
wheel.
MHEX_CUDA: "auto" builds the CUDA kernels too where there is an nvcc, "1" insists, "0" leaves them out.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401 part of a backend's interface
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

# The oldest torch whose stable ABI has all that is used; headers of any newer one do.
NATIVE_REQUIRES = ["torch>=2.10", "ninja", "pybind11>=2.13"]


def wish(name: str) -> str:
    """The environment variable `name`: "0", "1" or "auto"."""
    value = os.environ.get(name, "auto")
    if value not in ("0", "1", "auto"):
        raise SystemExit(f"{name} must be '0', '1' or 'auto', got {value!r}")
    return value


def compiler() -> str | None:
    """The C++ compiler, or None."""
    names = (os.environ["CXX"],) if os.environ.get("CXX") else ("c++", "g++", "clang++")
    return next((found for name in names if (found := shutil.which(name.split()[0]))), None)


def nvcc() -> str | None:
    """The CUDA compiler, or None."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for home in (*homes, Path("/usr/local/cuda")):
        if (home / "bin" / "nvcc").is_file():
            return str(home / "bin" / "nvcc")
    return shutil.which("nvcc")


def wants_native() -> bool:
    """Whether the CPU kernels are to be built."""
    chosen = wish("MHEX_NATIVE")
    if chosen == "1" and compiler() is None:
        raise SystemExit(
            "MHEX_NATIVE=1 asks for compiled kernels, but no C++ compiler was found; install one or unset it"
        )
    # The kernels are written for GCC and Clang.
    return chosen == "1" or (chosen == "auto" and compiler() is not None and sys.platform != "win32")


def wants_cuda() -> bool:
    """Whether the CUDA kernels are to be built."""
    chosen = wish("MHEX_CUDA")
    if chosen == "1" and nvcc() is None:
        raise SystemExit("MHEX_CUDA=1 asks for CUDA kernels, but no nvcc was found; set CUDA_HOME or unset it")
    return wants_native() and (chosen == "1" or (chosen == "auto" and nvcc() is not None))


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:  # noqa: ARG001
    """What kernels are built with. setuptools would run setup.py to answer, which needs just that."""
    return NATIVE_REQUIRES if wants_native() else []


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:  # noqa: ARG001
    """Nothing: a source distribution is not built."""
    return []


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    """A source distribution, with the kernels' sources in it; packing them needs no compiler and no torch."""
    before = os.environ.get("MHEX_NATIVE")
    os.environ["MHEX_NATIVE"] = "0"
    try:
        return build_meta.build_sdist(sdist_directory, config_settings)
    finally:
        if before is None:
            del os.environ["MHEX_NATIVE"]
        else:
            os.environ["MHEX_NATIVE"] = before


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """A wheel of what is here now: setuptools would add kernels that an earlier build left behind."""
    for leftover in Path("build").glob("lib*"):
        shutil.rmtree(leftover)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """An editable install; kernels lie beside the sources, and older ones go."""
    for leftover in Path("src", "mhex_core").glob("_*.so"):
        leftover.unlink()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)

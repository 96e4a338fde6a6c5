"""The compiled parts of mhex-core; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent / "build_backend"))
import mhex_build

# The version whose stable ABI the libraries keep to: 2.10, one byte each for major and minor, from the top.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"
FLAGS = ["-std=c++17", "-O3", "-g0", "-Wall", "-Wextra", "-fvisibility=hidden", STABLE_ABI]
ARCHITECTURES = ("80", "90", "100")


def arguments() -> dict[str, Any]:
    """What `setup` is told: nothing where no kernels are built."""
    if not mhex_build.wants_native():
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths, library_paths

    # Else the text of every error begins with a path of the machine that built it.
    places = {str(Path(__file__).parent.absolute()): ".", **dict.fromkeys(map(str, include_paths()), "torch")}
    maps = [f"-ffile-prefix-map={place}={name}" for place, name in places.items()] if sys.platform != "win32" else []

    class Build(BuildExtension):
        """BuildExtension for the CPU library, and nvcc itself for the CUDA one.

        torch's CUDAExtension insists on an nvcc of torch's own CUDA version; behind the stable ABI any will do.
        """

        def run(self) -> None:
            super().run()
            if mhex_build.wants_cuda():
                self.build_cuda()

        def build_cuda(self) -> None:
            target = Path(self.get_ext_fullpath("mhex_core._cuda")).with_name("_cuda.so")
            target.parent.mkdir(parents=True, exist_ok=True)
            sources = [*Path("csrc/cuda").glob("*.cpp"), *Path("csrc/kernels/cuda").glob("*.cu")]
            codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
            codes.append(f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
            command = [
                *(str(mhex_build.nvcc()), "-shared", "-std=c++17", "-O3", "-cudart=static", "--threads=2"),
                *("-Xcompiler=-fPIC,-fvisibility=hidden", STABLE_ABI, "-DUSE_CUDA", *codes),
                *(f"-Xcompiler={option}" for option in maps),
                *(f"-isystem={path}" for path in include_paths()),
                *(f"-L{path}" for path in library_paths()),
                *("-ltorch_cpu", "-ltorch_cuda", "-ltorch", "-Xlinker=--allow-shlib-undefined"),
                *("-o", str(target), *map(str, sources)),
            ]
            self.announce(" ".join(command), level=2)
            subprocess.run(command, check=True)

    extension = CppExtension(  # type: ignore[no-untyped-call]
        "mhex_core._C",
        ["csrc/module.cpp", "csrc/cpu/ops.cpp", "csrc/kernels/cpu/leaves.cpp", "csrc/kernels/cpu/saliency.cpp"],
        depends=[str(path) for pattern in ("*.h", "*.inl") for path in Path("csrc").rglob(pattern)],
        extra_compile_args=[*FLAGS, *maps],
        # c10 and libtorch_python have no stable ABI, and nothing of theirs is used.
        extra_link_args=["-Wl,--as-needed"] if sys.platform == "linux" else [],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**arguments())

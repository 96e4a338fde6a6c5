"""On a machine with a GPU: build the CUDA kernels, check them over the whole grid, then time them.

    python benchmarks/gpu.py

It needs torch 2.10 or newer with CUDA, torchvision, nvcc, setuptools, ninja and pybind11, and fetches nothing. What it
prints ends with PASS or FAIL for each figure that csrc/README.md asks for; everything goes to results/gpu.json.
`--device cpu` runs the same checks and timings where there is no GPU, to try the script itself.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
GRIDS = {
    "odd sizes": ((3, 9, 7), (17, 5, 5), (64, 4, 4), (130, 1, 1)),
    "ResNet-18 at 64 px": ((64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)),
    "one large layer": ((24, 120, 90),),
}


def install() -> None:
    """Build mhex-core with CUDA kernels, and mhex-vision, into a folder of their own; put it first on the path."""
    target = Path(tempfile.mkdtemp(prefix="mhex-"))
    packages = [str(ROOT / "packages" / name) for name in ("mhex-core", "mhex-vision")]
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*command, *packages], check=True, env={**os.environ, "MHEX_NATIVE": "1", "MHEX_CUDA": "1"})
    sys.path.insert(0, str(target))
    importlib.invalidate_caches()


def check(device: torch.device) -> dict[str, Any]:
    """The largest difference to the float64 reference over the grid, in units of each result's range."""
    import mhex_core
    from mhex_core import SaliencyOptions, SignedMaps

    generator = torch.Generator().manual_seed(0)
    worst: dict[str, float] = {}
    checked = 0
    rules = (("hard", True), ("hard", False), ("soft", True))
    for (name, shapes), dtype, channels_last, batch, targets, beta, (sharpness, rectify) in itertools.product(
        GRIDS.items(), DTYPES, (False, True), (1, 5), (1, 3, "all"), (0.0, 0.5), rules
    ):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        activations = [
            torch.randn(batch, *shape, generator=generator).to(device, dtype).contiguous(memory_format=layout)
            for shape in shapes
        ]
        matrices = [torch.randn(7, shape[0], generator=generator).to(device) for shape in shapes]
        target: Any = "all"
        if isinstance(targets, int):
            target = torch.randint(7, (batch, targets), generator=generator).to(device)
        settings: dict[str, Any] = {"beta": beta, "sharpness": sharpness, "rectify": rectify}
        options = SaliencyOptions(**settings)
        exact_layers = [layer.double() for layer in activations]
        exact_matrices = [matrix.double() for matrix in matrices]
        maps = mhex_core.saliency_maps(activations, matrices, target, size=(61, 43), backend="native", **settings)
        again = mhex_core.saliency_maps(activations, matrices, target, size=(61, 43), backend="native", **settings)
        if not torch.equal(maps, again):
            raise SystemExit(f"{name}, {dtype}: two runs differ")
        exact = mhex_core.saliency_maps(
            exact_layers, exact_matrices, target, size=(61, 43), backend="reference", **settings
        )
        signed = mhex_core.signed_maps(activations, matrices, target, options=options, backend="native")
        exact_signed = mhex_core.signed_maps(exact_layers, exact_matrices, target, options=options, backend="reference")
        combined = mhex_core.combine_maps(SignedMaps(*signed), size=(61, 43), options=options, backend="native")
        tokens = [layer.flatten(2).transpose(1, 2)[:, :1] for layer in activations]
        mask = torch.ones(batch, 1, dtype=torch.bool, device=device)
        scores = mhex_core.token_saliency(tokens, matrices, target, mask=mask, beta=beta, backend="native")
        exact_scores = mhex_core.token_saliency(
            [layer.double() for layer in tokens], exact_matrices, target, mask=mask, beta=beta, backend="reference"
        )
        pairs = [
            ("saliency_maps", maps, exact),
            ("combine_maps", combined, exact),
            ("token_saliency", scores, exact_scores),
        ]
        pairs += [
            ("signed_maps", ours, theirs)
            for part, exact_part in zip(signed, exact_signed, strict=True)
            for ours, theirs in zip(part, exact_part, strict=True)
        ]
        for operator, ours, theirs in pairs:
            worst[operator] = max(worst.get(operator, 0.0), _difference(ours, theirs))
        checked += 1
    return {"cases": checked, "worst_difference": worst}


def _difference(ours: Tensor, exact: Tensor) -> float:
    if not exact.numel():
        return 0.0
    scale = max(float(exact.abs().max()), 1e-30)
    difference = float((ours.double() - exact.double()).abs().max()) / scale
    return difference if difference == difference else float("inf")


def check_graph(device: torch.device) -> bool:
    """Whether a captured CUDA graph gives the same bits when it is replayed on new activations."""
    import saliency
    from mhex_core import SaliencyPlan, saliency_maps

    case = saliency.Case(64, 8, dtype=torch.bfloat16, channels_last=True)
    activations, matrices, target = saliency.layers_of(case, device)
    plan = SaliencyPlan(matrices)

    def run() -> Tensor:
        return saliency_maps(activations, plan, target, size=64, backend="native")

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    same = True
    for seed in range(3):
        for layer in activations:
            layer.copy_(torch.randn(layer.shape, generator=torch.Generator().manual_seed(seed)).to(layer))
        graph.replay()
        torch.cuda.synchronize(device)
        same = same and torch.equal(captured, run())
    return same


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large copy on the device, bytes read and written."""
    import timing

    source = torch.empty((4 << 30) if device.type == "cuda" else (64 << 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = timing.in_turns({"copy": lambda: target.copy_(source)}, device=device, rounds=11)["copy"]
    return 2 * source.numel() / taken.median / 1e9


def main() -> None:
    """Build, check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --device cpu tries the script itself")
    if importlib.util.find_spec("mhex_core") is None:
        install()
    import common
    import explaining
    import saliency
    from mhex_core import native

    status = native.status()
    print(f"saliency: {status.reason}; {status.build}")
    if device.type not in status.devices:
        sys.exit(f"there are no kernels for {device.type}: {status.reason}")
    record: dict[str, Any] = {"native": status.reason, "check": check(device)}
    print(record["check"])
    record["graph"] = check_graph(device) if device.type == "cuda" else None
    print(f"graph replay gives the same bits: {record['graph']}")
    record["copy_GB_per_s"] = copy_bandwidth(device)
    batch = 256 if device.type == "cuda" else 8
    cases = [
        saliency.Case(224, size, dtype=dtype, channels_last=layout)
        for size, dtype, layout in (
            (batch, torch.bfloat16, True),
            (batch, torch.bfloat16, False),
            (batch, torch.float32, True),
            (batch, torch.float32, False),
            (1, torch.bfloat16, True),
            (8, torch.bfloat16, True),
        )
    ]
    record["rows"] = [saliency.measure(case, device, rounds=options.rounds) for case in cases]
    for row in record["rows"]:
        print(row["case"])
        for name, taken in row["contenders"].items():
            print(f"  {name:20s} {taken['ms']:9.3f} ms  {taken['GB_per_s']:8.1f} GB/s")
    record["users"] = explaining.measure(
        pixels=224, batch=batch, device=device, rounds=options.rounds, dtype=torch.bfloat16, channels_last=True
    )
    for name, taken in record["users"]["contenders"].items():
        print(
            f"  {name:34s} {taken['images_per_s']:9.1f} images/s  {taken['times_classifying'] or 1:.3f} x classifying"
        )
    first = record["rows"][0]["contenders"]
    cost = record["users"]["contenders"]["mhex"]["times_classifying"]
    share = first["native"]["GB_per_s"] / record["copy_GB_per_s"]
    figures = {
        "every difference below 1e-5 of the range": max(record["check"]["worst_difference"].values()) < 1e-5,
        "graph capture and replay": record["graph"],
        f"at least 80 % of the copy's bandwidth ({100 * share:.0f} %)": share >= 0.8,
        "at least 8 times the reference": first["reference"]["ms"] / first["native"]["ms"] >= 8,
        f"at most 5 % over classifying ({100 * (cost - 1):.1f} %)": cost <= 1.05,
    }
    record["figures"] = {name: bool(passed) for name, passed in figures.items()}
    for name, passed in figures.items():
        print(f"{'PASS' if passed else 'FAIL'}  {name}")
    if device.type == "cuda":
        print(common.write("gpu", record))


if __name__ == "__main__":
    main()

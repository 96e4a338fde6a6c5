"""The saliency of one batch: compiled kernels beside everything else that computes the same maps.

Each row checks its contenders against the float64 reference before it times them. Shapes are those of the eight blocks
of a ResNet-18.

Letters: B batch, K classes, C channels, h x w layer size, H x W map size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import timing
from mhex_core import SaliencyOptions, SaliencyPlan, adjusted_weights, native, saliency_maps

CHANNELS = (64, 64, 128, 128, 256, 256, 512, 512)
STRIDES = (4, 4, 8, 8, 16, 16, 32, 32)
CLASSES = 8
CLOSE = 1e-5  # relative to a map's range of 1, for float32 activations


@dataclass(frozen=True)
class Case:
    """One row: H x H images, B of them, in a dtype and a layout."""

    pixels: int
    batch: int
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    beta: float = 0.0

    @property
    def name(self) -> str:
        """For tables."""
        layout = "channels_last" if self.channels_last else "contiguous"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.pixels} px, batch {self.batch}, {dtype}, {layout}, beta {self.beta:g}"


def layers_of(case: Case, device: torch.device) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Activations after a ReLU, equivalent matrices, and a target for each sample."""
    generator = torch.Generator().manual_seed(0)
    activations, matrices = [], []
    for channels, stride in zip(CHANNELS, STRIDES, strict=True):
        cells = max(1, -(-case.pixels // stride))
        layer = torch.randn(case.batch, channels, cells, cells, generator=generator).relu()
        layer = layer.to(device, case.dtype)
        activations.append(layer.contiguous(memory_format=torch.channels_last) if case.channels_last else layer)
        matrices.append((torch.randn(CLASSES, channels, generator=generator) / channels**0.5).to(device))
    target = torch.randint(CLASSES, (case.batch,), generator=generator).to(device)
    return activations, matrices, target


# ---------------------------------------------------------------------------------------------------------- contenders


def stock(weights: Sequence[Tensor], target: Tensor, size: int) -> Callable[[Sequence[Tensor]], Tensor]:
    """The best that stock operators give when fused by hand.

    Weights are looked up once, there is one product per layer, and layers of one size are added up before they are
    resized together.
    """
    rows = [weight[target] for weight in weights]  # lambda_l is in the weights

    def run(activations: Sequence[Tensor]) -> Tensor:
        by_size: dict[torch.Size, Tensor] = {}
        for layer, row in zip(activations, rows, strict=True):
            if layer.is_contiguous(memory_format=torch.channels_last) and not layer.is_contiguous():
                cam = torch.bmm(layer.permute(0, 2, 3, 1).flatten(1, 2), row.to(layer.dtype).unsqueeze(2))
            else:
                cam = torch.bmm(row.to(layer.dtype).unsqueeze(1), layer.flatten(2))
            cam = cam.float().reshape(layer.shape[0], 1, *layer.shape[2:])
            place = cam.shape[2:]
            by_size[place] = by_size[place] + cam if place in by_size else cam
        total: Tensor | None = None
        for cam in by_size.values():
            resized = F.interpolate(cam, size=size, mode="bilinear", align_corners=False)
            total = resized if total is None else total.add_(resized)
        if total is None:
            raise ValueError("activations must hold a layer")
        low, high = torch.aminmax(total.flatten(1), dim=1, keepdim=True)
        return total.squeeze(1).sub_(low.unsqueeze(2)).div_((high - low).unsqueeze(2))

    return run


def one_by_one(weights: Sequence[Tensor], target: Tensor, size: int) -> Callable[[Sequence[Tensor]], Tensor]:
    """The way of the method's authors: one sample and one layer at a time, in numpy."""
    rows = [weight[target].cpu().numpy() for weight in weights]

    def run(activations: Sequence[Tensor]) -> Tensor:
        arrays = [layer.float().cpu().numpy() for layer in activations]
        maps = np.empty((len(target), size, size), dtype=np.float32)
        for sample in range(len(target)):
            total = np.zeros((size, size), dtype=np.float32)
            for array, row in zip(arrays, rows, strict=True):
                cam = np.tensordot(row[sample], array[sample], axes=1)
                along_y, along_x = _bilinear(cam.shape[0], size), _bilinear(cam.shape[1], size)
                total += along_y @ cam @ along_x.T
            maps[sample] = (total - total.min()) / (total.max() - total.min())
        return torch.from_numpy(maps)

    return run


_MATRICES: dict[tuple[int, int], np.ndarray[Any, Any]] = {}


def _bilinear(cells: int, size: int) -> np.ndarray[Any, Any]:
    if (cells, size) not in _MATRICES:
        place = np.clip((np.arange(size) + 0.5) * cells / size - 0.5, 0, cells - 1)
        _MATRICES[cells, size] = np.clip(1 - np.abs(place[:, None] - np.arange(cells)), 0, 1).astype(np.float32)
    return _MATRICES[cells, size]


def contenders_of(case: Case, device: torch.device) -> tuple[dict[str, Callable[[], Tensor]], Tensor, float]:
    """What computes the maps of a case, the exact maps, and the bytes of its activations.

    Nobody rectifies: that would change nothing in these activations, and cost all but the kernels a pass over them.
    """
    activations, matrices, target = layers_of(case, device)
    plan = SaliencyPlan(matrices)
    lambdas = SaliencyOptions(beta=case.beta).weights_of(len(activations))
    weights = [
        weight * adjusted_weights(matrix, beta=case.beta) for weight, matrix in zip(lambdas, matrices, strict=True)
    ]
    by_stock, by_numpy = stock(weights, target, case.pixels), one_by_one(weights, target, case.pixels)

    @torch.compile(fullgraph=True, dynamic=False)
    def compiled(layers: list[Tensor], matrices: list[Tensor], target: Tensor) -> Tensor:
        return saliency_maps(
            layers, matrices, target, size=case.pixels, beta=case.beta, rectify=False, backend="reference"
        )

    runs: dict[str, Callable[[], Tensor]] = {
        "reference": lambda: saliency_maps(
            activations, matrices, target, size=case.pixels, beta=case.beta, rectify=False, backend="reference"
        ),
        "stock": lambda: by_stock(activations),
        "compiled reference": lambda: compiled(activations, matrices, target),
        "one by one": lambda: by_numpy(activations),
        "read": lambda: torch.stack([layer.sum() for layer in activations]),
    }
    if native.status().backend == "native":
        runs["native"] = lambda: saliency_maps(
            activations, plan, target, size=case.pixels, beta=case.beta, rectify=False, backend="native"
        )
    exact = saliency_maps(
        [layer.double() for layer in activations],
        [matrix.double() for matrix in matrices],
        target,
        size=case.pixels,
        beta=case.beta,
        rectify=False,
        backend="reference",
    )
    size = sum(layer.numel() * layer.element_size() for layer in activations)
    return runs, exact, float(size)


def measure(case: Case, device: torch.device, *, rounds: int) -> dict[str, Any]:
    """One row.

    Raises:
        SystemExit: A contender computes something else.
    """
    with torch.no_grad():
        runs, exact, size = contenders_of(case, device)
        differences = {}
        for name, run in runs.items():
            if name == "read":
                continue
            differences[name] = float((run().to(exact.device) - exact).abs().max())
            # Stock products in half precision round the maps themselves; they are shown as they are.
            if not differences[name] < CLOSE and not (name == "stock" and case.dtype != torch.float32):
                raise SystemExit(f"{case.name}: {name} differs from the reference by {differences[name]:.1e}")
        slow = {name: run for name, run in runs.items() if name == "one by one"}
        fast = {name: run for name, run in runs.items() if name not in slow}
        timings = timing.in_turns(fast, device=device, rounds=rounds)
        timings |= timing.in_turns(slow, device=device, rounds=3)
    row: dict[str, Any] = {"case": case.name, "bytes": size, "contenders": {}}
    for name, taken in timings.items():
        row["contenders"][name] = {
            **taken.record(),
            "GB_per_s": size / taken.median / 1e9,
            "difference": differences.get(name),
        }
    if "native" in timings:
        row["native_is_times_faster_than"] = {
            name: timings[name].median / timings["native"].median for name in timings if name != "native"
        }
    return row

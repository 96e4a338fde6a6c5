"""Where does saliency lie, when the truth is known? Pointing game and mass inside the mask on `synthetic-lesions`.

For each objective and seed a ResNet-18 is trained with the demo's recipe. On the test images, for the true class: every
head alone, the aggregate with default settings, what one changed setting does to it, the true mask made as coarse as each
layer, and maps that need no model.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import common
from mhex_core import SaliencyOptions, SignedMaps, combine_maps, signed_maps
from mhex_vision import RECIPES, MHEXClassifier, load_data, train
from mhex_vision.data.sets import ArrayImages, DataBundle
from mhex_vision.localization import centre_gaussian, mass_inside, pointing_game, random_maps

SETTINGS: dict[str, dict[str, Any]] = {
    "aggregate (default)": {},
    "beta = 1": {"beta": 1.0},
    "tau_pos = 0": {"tau_pos": 0.0},
    "soft sharpness": {"sharpness": "soft"},
    "decay = 0.5": {"decay": 0.5},
    "decay = 1": {"decay": 1.0},
}


def main() -> None:
    """Train, measure, and write benchmarks/results/lesions.json after every run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", default=["layerwise", "joint"])
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        for objective in arguments.objectives:
            data = load_data("synthetic-lesions", seed=seed)
            test = data.test
            if not isinstance(test, ArrayImages) or test.masks is None:
                raise SystemExit("the lesions have no masks")
            torch.manual_seed(seed)
            model = MHEXClassifier.from_backbone("resnet18", data.num_classes, objective=objective)
            result = train(model, data, RECIPES["lesions"], out=Path(arguments.work) / f"{objective}-{seed}", seed=seed)
            if result.test is None:
                raise SystemExit("the lesions have no test images")
            scores = {name: _score(maps, test.masks) for name, maps in _maps(model, data, test)}
            runs.append(
                {
                    "objective": objective,
                    "seed": seed,
                    "test": asdict(result.test),
                    "minutes": sum(epoch.seconds for epoch in result.history) / 60,
                    "localization": scores,
                }
            )
            print(objective, seed, f"accuracy {result.test.accuracy:.4f}", flush=True)
            for name, score in scores.items():
                print(f"  {name:22s} pointing {score['pointing']:.3f}  mass {score['mass']:.3f}", flush=True)
            common.write(
                "lesions",
                {
                    "recipe": asdict(RECIPES["lesions"]),
                    "images": len(test),
                    "mask_share": float(test.masks.float().mean()),
                    "runs": runs,
                },
            )
    _summary(runs)


def _maps(model: MHEXClassifier, data: DataBundle, test: ArrayImages) -> Iterator[tuple[str, Tensor]]:
    """Names and maps (N, H, W) for the true class of every test image."""
    size = data.preprocessing.size
    matrices = model.equivalent_matrices()
    activations: list[list[Tensor]] = []
    with torch.inference_mode():
        for part in torch.split(test.images, 128):
            output = model(data.preprocessing.normalize(part))
            activations.append(list(output.activations))
        layers = [torch.cat(parts) for parts in zip(*activations, strict=True)]
        for name, changes in SETTINGS.items():
            options = SaliencyOptions(**changes)
            evidence = signed_maps(layers, matrices, test.labels, options=options)
            yield name, combine_maps(evidence, size=size, options=options)
        evidence = signed_maps(layers, matrices, test.labels)
        for index, name in enumerate(model.layer_names):
            alone = SignedMaps((evidence.positive[index],), (evidence.negative[index],))
            yield f"head {index + 1} ({name})", combine_maps(alone, size=size)
    if test.masks is None:
        raise SystemExit("the lesions have no masks")
    # What the truth itself scores once it is as coarse as a layer: no head of that size can be expected to do better.
    for cells in sorted({layer.shape[-1] for layer in layers}, reverse=True):
        coarse = F.adaptive_avg_pool2d(test.masks.float().unsqueeze(1), cells)
        resized = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
        yield f"the true mask at {cells} x {cells}", resized.squeeze(1)
    yield "random", random_maps(len(test), size)
    yield "centre Gaussian", centre_gaussian(len(test), size)


def _score(maps: Tensor, masks: Tensor) -> dict[str, float]:
    return {
        "pointing": float(pointing_game(maps, masks).double().mean()),
        "mass": float(mass_inside(maps, masks).double().mean()),
    }


def _summary(runs: list[dict[str, Any]]) -> None:
    """Means over seeds, as lines of a Markdown table."""
    for objective in dict.fromkeys(run["objective"] for run in runs):
        chosen = [run for run in runs if run["objective"] == objective]
        accuracy = statistics.mean(run["test"]["accuracy"] for run in chosen)
        print(f"\n{objective}, accuracy {100 * accuracy:.1f} %\n\n| map | pointing % | mass inside % |\n|---|---|---|")
        for name in chosen[0]["localization"]:
            columns = [
                common.spread([run["localization"][name][key] for run in chosen], scale=100, digits=1)
                for key in ("pointing", "mass")
            ]
            print(f"| {name} | {columns[0]} | {columns[1]} |")


if __name__ == "__main__":
    main()

"""Where does saliency lie, when the truth is known? Pointing game and mass inside the mask on `synthetic-lesions`.

For each objective and seed a ResNet-18 is trained with the demo's recipe. On the test images, for the true class: every
head alone, the aggregate with default settings, what one changed setting does to it, the true mask made as coarse as
each layer, and maps that need no model. A plain ResNet-18 on the same recipe says what the accuracies are worth.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import common
from mhex_core import SaliencyOptions, SignedMaps, combine_maps, signed_maps
from mhex_vision import RECIPES, MHEXClassifier, load_data, train
from mhex_vision.data.sets import ArrayImages, DataBundle
from mhex_vision.explainers import explainer
from mhex_vision.metrics.localization import mass_inside, pointing_game

# One change at a time from the paper's method.
SETTINGS: dict[str, dict[str, Any]] = {
    "aggregate (the paper's)": {},
    "rectified (the default)": {"rectify": True},
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
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    plain: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        data = load_data("synthetic-lesions", seed=seed)
        test = data.test
        if not isinstance(test, ArrayImages) or test.masks is None:
            raise SystemExit("the lesions have no masks")
        for objective in ("layerwise", "joint", "plain"):
            torch.manual_seed(seed)
            model: nn.Module = (
                torchvision.models.resnet18(num_classes=data.num_classes)
                if objective == "plain"
                else MHEXClassifier.from_backbone("resnet18", data.num_classes, objective=objective)
            )
            result = train(model, data, RECIPES["lesions"], out=Path(arguments.work) / f"{objective}-{seed}", seed=seed)
            if result.test is None:
                raise SystemExit("the lesions have no test images")
            print(objective, seed, f"accuracy {result.test.accuracy:.4f}", flush=True)
            run = {
                "seed": seed,
                "test": asdict(result.test),
                "epoch_seconds": [round(epoch.seconds, 2) for epoch in result.history],
            }
            if not isinstance(model, MHEXClassifier):
                plain.append(run)
                continue
            scores = {name: _score(maps, test.masks) for name, maps in _maps(model, data, test)}
            runs.append({"objective": objective, **run, "localization": scores})
        record = {"recipe": asdict(RECIPES["lesions"]), "images": len(test), "runs": runs, "plain": plain}
        common.write("lesions", {"mask_share": float(test.masks.float().mean()), **record})


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
            options = SaliencyOptions(**{"rectify": False, **changes})
            evidence = signed_maps(layers, matrices, test.labels, options=options)
            yield name, combine_maps(evidence, size=size, options=options)
        evidence = signed_maps(layers, matrices, test.labels, options=SaliencyOptions(rectify=False))
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
    inputs = data.preprocessing.normalize(test.images)
    yield "random", explainer("random")(model, inputs, test.labels)
    yield "centre Gaussian", explainer("centre-gaussian")(model, inputs, test.labels)


def _score(maps: Tensor, masks: Tensor) -> dict[str, float]:
    return {
        "pointing": float(pointing_game(maps, masks).double().mean()),
        "mass": float(mass_inside(maps, masks).double().mean()),
    }


if __name__ == "__main__":
    main()

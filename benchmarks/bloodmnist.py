"""BloodMNIST: does a network that explains itself classify as well as a plain one, and what does it cost?

A plain ResNet-18, MHEX `layerwise` and MHEX `joint` on the same recipe and seeds; then heads alone on the frozen plain
network. Every run goes through `mhex_vision.train`.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import common
from mhex_vision import RECIPES, MHEXClassifier, load_data, train

KINDS = ("plain", "layerwise", "joint")


def build(kind: str, seed: int, classes: int) -> nn.Module:
    """A fresh network of one kind."""
    torch.manual_seed(seed)
    if kind == "plain":
        network: nn.Module = torchvision.models.resnet18(num_classes=classes)
        return network
    return MHEXClassifier.from_backbone("resnet18", classes, objective=kind)  # type: ignore[arg-type]


def main() -> None:
    """Train, and write benchmarks/results/bloodmnist.json after every run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True, help="folder with bloodmnist.npz")
    parser.add_argument("--work", required=True, help="folder for the runs")
    parser.add_argument("--epochs", type=int, default=RECIPES["medmnist"].epochs)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    data = load_data("bloodmnist", root=arguments.root, download=False)
    recipe = replace(RECIPES["medmnist"], epochs=arguments.epochs)
    runs: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        for kind in KINDS:
            network = build(kind, seed, data.num_classes)
            result = train(network, data, recipe, out=Path(arguments.work) / f"{kind}-{seed}", seed=seed)
            if result.test is None:
                raise SystemExit("the data has no test images")
            runs.append(
                {
                    "kind": kind,
                    "seed": seed,
                    "test": asdict(result.test),
                    "best_epoch": result.best_epoch,
                    "epoch_seconds": [epoch.seconds for epoch in result.history],
                }
            )
            print(runs[-1], flush=True)
            if kind == "plain":
                runs.append(frozen(network, data, seed, Path(arguments.work)))
                print(runs[-1], flush=True)
            common.write("bloodmnist", {"recipe": asdict(recipe), "images": len(data.train), "runs": runs})


def frozen(plain: nn.Module, data: Any, seed: int, work: Path) -> dict[str, Any]:
    """Heads on the frozen plain network: trained how fast, and are its predictions the same to the bit?"""
    torch.manual_seed(seed)
    model = MHEXClassifier.from_backbone(plain, data.num_classes, freeze_backbone=True, gate=False, classifier="keep")
    result = train(model, data, RECIPES["heads"], out=work / f"frozen-{seed}", seed=seed)
    images = data.preprocessing.normalize(data.test.images)
    plain.eval()
    with torch.inference_mode():
        same = all(torch.equal(plain(part), model(part).logits) for part in images.split(256))
    if result.test is None:
        raise SystemExit("the data has no test images")
    return {
        "kind": "frozen",
        "seed": seed,
        "test": asdict(result.test),
        "epoch_seconds": [epoch.seconds for epoch in result.history],
        "identical": same,
        "images_compared": len(images),
    }


if __name__ == "__main__":
    main()

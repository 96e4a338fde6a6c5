"""How good are the explanations? Every table of docs/results/explanations.md, from training on.

Each step is a command of `mhex-vision`, shown before it runs; a step that is finished is not done again, and one that
was stopped goes on. Its summary is kept under results/explanations/, from which `tables.py` writes the page.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

import common
from mhex_vision import RECIPES, load_classifier, load_data, train
from mhex_vision.classifier import MHEXClassifier
from mhex_vision.collaboration import collaboration_study
from mhex_vision.evaluation import evaluate
from mhex_vision.explainers import parse
from mhex_vision.metrics import head_completeness, label_randomization, parameter_randomization, shuffled_labels

SOFT = "mhex:sharpness=soft,exponent=2"
BLOOD = "--data bloodmnist --root {data}/medmnist --no-download"
BLOOD224 = "--data {data}/blood224"
CELLS = "--data {work}/cells/images --masks {work}/cells/masks"
LESIONS = "--data synthetic-lesions"
DROPS = "sad,avg_drop,ead,area_drop"
PLACES = "pointing,mass_inside,iou"

NETWORKS = {
    "mhex-28": f"{BLOOD} --epochs 10",
    "again-28": f"{BLOOD} --epochs 10 --seed 1",
    "nogate-28": f"{BLOOD} --epochs 10 --no-gate",
    "joint-28": f"{BLOOD} --epochs 10 --objective joint",
    "downsample-28": f"{BLOOD} --epochs 10 --at downsample",
    "stage-28": f"{BLOOD} --epochs 10 --at stage",
    "plain-28": f"{BLOOD} --epochs 10 --plain --backbone resnet18",
    "judge-28": f"{BLOOD} --epochs 10 --plain --backbone resnet34 --seed 1",
    "mhex-224": f"{BLOOD224} --epochs 15 --batch-size 32",
    "judge-224": f"{BLOOD224} --epochs 12 --batch-size 32 --plain --backbone resnet34 --seed 1",
    "mhex-lesions": f"{LESIONS} --recipe lesions",
    "nogate-lesions": f"{LESIONS} --recipe lesions --no-gate",
    "joint-lesions": f"{LESIONS} --recipe lesions --objective joint",
    "downsample-lesions": f"{LESIONS} --recipe lesions --at downsample",
    "stage-lesions": f"{LESIONS} --recipe lesions --at stage",
    # A plain network learns these images by heart; a judge has to have understood them.
    "judge-lesions": f"{LESIONS} --recipe lesions --seed 1",
}

BASELINES = ["centre-gaussian", "random"]

# One change at a time from the paper's method, then from what that led to.
SETTINGS = [
    *("mhex-paper", "mhex-authors", "mhex-paper:beta=0.5", "mhex-paper:beta=1", "mhex-paper:tau_pos=0"),
    *("mhex-paper:tau_pos=0.15", "mhex-paper:tau_pos=0.35", "mhex-paper:tau_pos=0,beta=1,tau_neg=0"),
    *("mhex-paper:sharpness=soft", "mhex-paper:sharpness=soft,exponent=2", "mhex-paper:sharpness=soft,beta=1"),
    *("mhex-paper:decay=0.5", "mhex-paper:decay=0.8", "mhex-paper:decay=1", "mhex-paper:floor=0.25"),
    *("mhex-paper:floor=0.5", "mhex-paper:floor=0.75", "mhex", "mhex:beta=1", "mhex:tau_pos=0", "mhex:decay=1", SOFT),
    *("centre-gaussian", "random"),
]
SETTINGS_224 = [
    *("mhex-paper", "mhex-authors", "mhex-paper:decay=1", "mhex", "mhex:beta=1", "mhex:decay=1", SOFT),
    *("centre-gaussian", "random"),
]
LAYERS = [
    f"{method}:layer={layer}"
    for method in ("gradcam", "gradcam++", "layercam", "eigencam")
    for layer in ("layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1")
]
RIVALS_28 = [
    *("mhex", "mhex-paper", "mhex-authors", SOFT, "mhex:floor=0.5", "gradcam:layer=layer2.1", "gradcam"),
    "layercam:layer=layer1.1",
    *("eigencam:layer=layer2.0", "integrated-gradients:steps=16", "scorecam:layer=layer2.1,batch_size=128"),
    *("shap:evaluations=100", "centre-gaussian", "random"),
]
OWN = ["mhex", "mhex-paper", "mhex-authors", "mhex:floor=0.5"]
CAMS_224 = ["gradcam", "gradcam:layer=layer3.1", "gradcam++", "layercam", "layercam:layer=layer3.1", "eigencam"]


@dataclass(frozen=True)
class Table:
    """One `mhex-vision evaluate`: the network, its judge, the data, methods, metrics and more."""

    network: str
    judge: str
    data: str
    methods: list[str]
    metrics: str
    more: str = ""

    def command(self, name: str) -> str:
        """The command, with places for the folders."""
        return (
            f"evaluate --checkpoint {{work}}/{self.network} --judge {{work}}/{self.judge} {self.data} "
            f"--methods {','.join(self.methods)} --metrics {self.metrics} {self.more} --out {{work}}/{name}"
        )


def _own_of(kind: str) -> list[str]:
    """The methods for one of several networks in one table; what looks at no network stands there once."""
    return ["mhex", "mhex-paper", *(BASELINES if kind == "stage" else ())]


TABLES = {
    "settings-28": Table("mhex-28", "judge-28", BLOOD, SETTINGS, DROPS, "--split validation --batch-size 256"),
    "layers-28": Table(
        "mhex-28",
        "judge-28",
        BLOOD,
        [*LAYERS, *BASELINES],
        "sad,area_drop",
        "--split validation --limit 400 --batch-size 200",
    ),
    "test-28": Table(
        "mhex-28", "judge-28", BLOOD, RIVALS_28, f"{DROPS},insertion:steps=8,deletion:steps=8", "--batch-size 128"
    ),
    **{
        f"{kind}-28-maps": Table(f"{kind}-28", "judge-28", BLOOD, _own_of(kind), DROPS, "--batch-size 256")
        for kind in ("nogate", "joint", "downsample", "stage")
    },
    # What a user without MHEX has: the rivals on a plain network, whose layers end in a ReLU.
    "plain-28-maps": Table(
        "plain-28",
        "judge-28",
        BLOOD,
        [
            *("gradcam:layer=backbone.layer2", "gradcam:layer=backbone.layer3", "layercam:layer=backbone.layer1"),
            *("layercam:layer=backbone.layer2", "gradcam++:layer=backbone.layer2", "eigencam:layer=backbone.layer2"),
            *BASELINES,
        ],
        DROPS,
        "--batch-size 256",
    ),
    "test-lesions": Table(
        "mhex-lesions",
        "judge-lesions",
        LESIONS,
        [
            *OWN,
            SOFT,
            *("gradcam:layer=layer1.1", "gradcam:layer=layer2.1", "gradcam", "layercam:layer=layer1.1"),
            *("layercam:layer=layer2.1", "eigencam:layer=layer2.1", "integrated-gradients:steps=16"),
            *("scorecam:layer=layer2.1,batch_size=128", "shap:evaluations=100", *BASELINES),
        ],
        f"{PLACES},sad,area_drop:area=0.1",
        "--batch-size 100",
    ),
    **{
        f"{kind}-lesions-maps": Table(f"{kind}-lesions", "judge-lesions", LESIONS, _own_of(kind), PLACES)
        for kind in ("nogate", "joint", "downsample", "stage")
    },
    "settings-224": Table("mhex-224", "judge-224", BLOOD224, SETTINGS_224, DROPS, "--split validation --batch-size 24"),
    "test-224": Table("mhex-224", "judge-224", BLOOD224, [*OWN, *CAMS_224, *BASELINES], DROPS, "--batch-size 24"),
    # Curves take 16 passes of the judge per image, Score-CAM 512 of the network: fewer images, and wider intervals.
    "slow-224": Table(
        "mhex-224",
        "judge-224",
        BLOOD224,
        [
            *("mhex", "mhex-paper", "mhex-authors", "gradcam", "layercam", "scorecam:batch_size=64"),
            *("shap:evaluations=200", "integrated-gradients:steps=16", *BASELINES),
        ],
        f"{DROPS},insertion:steps=8,deletion:steps=8",
        "--batch-size 8 --limit 40",
    ),
    "test-cells": Table(
        "mhex-224",
        "judge-224",
        CELLS,
        [*OWN, *CAMS_224, "layercam:layer=layer2.1", *BASELINES],
        PLACES,
        "--batch-size 24",
    ),
}


IMAGES = common.RESULTS.parents[1] / "docs" / "images"
FIGURES = {"test-28": ("curves", "examples")}


def main() -> None:
    """Do the steps that are asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, type=Path, help="folder with medmnist/, blood224/ and wbc_masks/")
    parser.add_argument("--work", required=True, type=Path, help="folder for networks and comparisons")
    parser.add_argument("--only", nargs="+", metavar="STEP", choices=[*NETWORKS, *TABLES, *FUNCTIONS])
    options = parser.parse_args()
    folders = {"data": str(options.data.resolve()), "work": str(options.work.resolve())}
    wanted = options.only or [*NETWORKS, *TABLES, *FUNCTIONS]
    for name in wanted:
        if name in NETWORKS:
            common.run_step("mhex-vision", f"train {NETWORKS[name]} --out {{work}}/{name}", folders)
        elif name in TABLES:
            table = TABLES[name]
            for network in (table.network, table.judge):
                common.run_step("mhex-vision", f"train {NETWORKS[network]} --out {{work}}/{network}", folders)
            if table.data == CELLS:
                _lay_out_cells(options.data, options.work / "cells")
            command = table.command(name)
            common.run_step("mhex-vision", command, folders)
            summary = json.loads((options.work / name / "summary.json").read_text(encoding="utf-8"))
            summary["settings"].pop("note")  # where the folders lay
            _keep(name, command, summary)
            for figure in FIGURES.get(name, ()):
                shutil.copy(options.work / name / f"{figure}.png", IMAGES / f"{name}-{figure}.png")
        else:
            _keep(name, None, FUNCTIONS[name](options.data, options.work))


def sanity(data: Path, work: Path) -> dict[str, Any]:
    """Parameter randomisation on 200 test images: how much of a map survives a network's loss of its weights?"""
    bundle = load_data("bloodmnist", root=data / "medmnist", download=False)
    model = load_classifier(work / "mhex-28")
    if bundle.test is None or not isinstance(model, MHEXClassifier):
        raise SystemExit("randomisation needs a classifier with heads and test images")
    batch = bundle.test.__getitems__(range(200))
    images = bundle.preprocessing.normalize(batch.images)
    found: dict[str, Any] = {}
    for method in (
        "mhex",
        "mhex-paper",
        "gradcam:layer=layer2.1",
        "layercam:layer=layer1.1",
        "integrated-gradients:steps=16",
    ):
        kinds: tuple[Literal["spearman", "ssim"], ...] = ("spearman", "ssim")
        for kind in kinds:
            steps = parameter_randomization(model, parse(method), images, batch.labels, kind=kind)
            found.setdefault(method, {})[kind] = [
                {"layer": step.layer, "similarity": float(step.similarity.nanmean())} for step in steps
            ]
    return {"images": 200, "methods": found}


def labels(data: Path, work: Path) -> dict[str, Any]:
    """Label randomisation: how much of a map does a network show that learnt labels without meaning?

    Beside it a network that learnt the true labels from another start: so alike are maps of networks that agree.
    """
    bundle = load_data("bloodmnist", root=data / "medmnist", download=False)
    trained, again = load_classifier(work / "mhex-28"), load_classifier(work / "again-28")
    if bundle.test is None or not isinstance(trained, MHEXClassifier):
        raise SystemExit("randomisation needs a classifier with heads and test images")
    torch.manual_seed(0)
    other = MHEXClassifier.from_backbone("resnet18", bundle.num_classes)
    recipe = replace(RECIPES["medmnist"], epochs=10)
    result = train(other, shuffled_labels(bundle, seed=0), recipe, out=work / "shuffled-28", seed=0)
    batch = bundle.test.__getitems__(range(200))
    images = bundle.preprocessing.normalize(batch.images)
    found: dict[str, dict[str, float]] = {}
    for method in ("mhex", "mhex-paper", "gradcam:layer=layer2.1", "layercam:layer=layer1.1"):
        for name, network in (("true labels, another start", again), ("shuffled labels", other)):
            alike = label_randomization(trained, network, parse(method), images, batch.labels)
            found.setdefault(method, {})[name] = float(alike.nanmean())
    return {"images": 200, "train_loss": result.history[-1].train_loss, "spearman": found}


def study(data: Path, work: Path) -> dict[str, Any]:
    """The collaboration of gate and supervision, and the fidelity of the heads' own maps, on the test images."""
    bundle = load_data("bloodmnist", root=data / "medmnist", download=False)
    model, judge = load_classifier(work / "mhex-28"), load_classifier(work / "judge-28")
    if bundle.test is None or not isinstance(model, MHEXClassifier):
        raise SystemExit("the study needs a classifier with heads and test images")
    result = collaboration_study(model, bundle.test, bundle, judge=judge, spatial=7, spatial_images=64)
    result.save(work / "study.npz")
    result.plot().savefig(IMAGES / "collaboration.png", dpi=90)
    correlation, information = result.pearson(), result.mutual_information()
    batch = bundle.test.__getitems__(range(len(bundle.test)))
    images = bundle.preprocessing.normalize(batch.images)
    parts = [
        head_completeness(model, some, labels)
        for some, labels in zip(torch.split(images, 256), torch.split(batch.labels, 256), strict=True)
    ]
    gaps = torch.cat([part.relative_gap for part in parts])
    evidence = torch.cat([part.evidence for part in parts])
    logits = torch.cat([part.logits for part in parts])
    return {
        "images": len(result.sad),
        "layers": list(result.layer_names),
        "mean per block": [float(value) for value in result.collaboration.mean(0)],
        "pearson": {
            name: {"r": float(getattr(correlation, name).r), "p": float(getattr(correlation, name).p)}
            for name in ("sad", "confidence")
        },
        "mutual information, nats": {name: float(getattr(information, name)) for name in ("sad", "confidence")},
        "completeness": {
            "median relative gap per head": [float(value) for value in gaps.nanmedian(dim=0).values],
            "correlation of evidence and logit per head": [
                float(torch.corrcoef(torch.stack([evidence[:, head], logits[:, head]]))[0, 1])
                for head in range(evidence.shape[1])
            ],
        },
    }


def cells(data: Path, work: Path) -> dict[str, Any]:
    """How well the networks of 224 px classify their own test images, and cells of another camera."""
    _lay_out_cells(data, work / "cells")
    sets = {"blood224": load_data(str(data / "blood224")), "cells": load_data(str(work / "cells" / "images"))}
    found: dict[str, Any] = {}
    for network in ("mhex-224", "judge-224"):
        model = load_classifier(work / network).eval()
        for name, bundle in sets.items():
            if bundle.test is None:
                raise SystemExit(f"{name} has no test images")
            metrics = evaluate(model, bundle.test, bundle, batch_size=25)
            called = torch.zeros(bundle.num_classes, dtype=torch.int64)
            for part in torch.arange(len(bundle.test)).split(25):
                images = bundle.preprocessing.normalize(bundle.test.__getitems__(part.tolist()).images)
                with torch.no_grad():
                    logits = model(images).logits if isinstance(model, MHEXClassifier) else model(images)
                called += torch.bincount(logits.argmax(dim=1), minlength=bundle.num_classes)
            found.setdefault(network, {})[name] = {
                "images": metrics.images,
                "accuracy": metrics.accuracy,
                "head_accuracy": list(metrics.head_accuracy),
                "called": dict(zip(bundle.class_names, called.tolist(), strict=True)),
            }
    return {"networks": found}


FUNCTIONS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "cells": cells,
    "sanity": sanity,
    "labels": labels,
    "study": study,
}


def _keep(name: str, command: str | None, record: dict[str, Any]) -> None:
    shown = f"python benchmarks/explanations.py --data DATA --work WORK --only {name}"
    if command is not None:
        shown = "mhex-vision " + " ".join(command.format(data="DATA", work="WORK").split())
    common.keep(f"explanations/{name}", shown, record)


def _lay_out_cells(data: Path, place: Path) -> None:
    """Cells of another camera as a folder of the classes of `blood224`, to test on, and their masks as another."""
    if place.is_dir():
        return
    source = data / "wbc_masks"
    (place / "images").mkdir(parents=True)
    (place / "images" / "train").symlink_to((data / "blood224" / "train").resolve())
    for line in (source / "labels.csv").read_text(encoding="utf-8").splitlines()[1:]:
        image, mask, label = line.split(",")
        for kind, file in (("images/test", image), ("masks", mask)):
            folder = place / kind / label
            folder.mkdir(parents=True, exist_ok=True)
            (folder / image).symlink_to((source / file).resolve())


if __name__ == "__main__":
    main()

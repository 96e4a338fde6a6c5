"""How good are explanations of vision transformers? Every table of docs/results/vits.md, from training on.

Each step is a command of `mhex-vision`, shown before it runs, or a function below; a step that is finished is not done
again, and one that was stopped goes on. Its summary is kept under results/vits/, from which `tables.py` writes the
page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

import common
from mhex_vision import RECIPES, MHEXClassifier, PlainClassifier, drawing, load_classifier, train
from mhex_vision.comparison import compare, draw_examples
from mhex_vision.concepts import concept_sensitivity
from mhex_vision.data import load_data
from mhex_vision.data.lesions import lesions_bundle
from mhex_vision.data.sets import DataBundle
from mhex_vision.explainers import parse
from timing import in_turns

PROGRAM = "mhex-vision"
IMAGES = common.RESULTS.parents[1] / "docs" / "images"
BLOOD = "--data bloodmnist --root {data}/medmnist --no-download"
VIT = "timm/vit_tiny_patch16_224:img_size=28,patch_size=4,depth=6"
NETWORKS = {
    "vit": f"{BLOOD} --plain --backbone {VIT} --epochs 30 --learning-rate 5e-4",
    "heads": f"{BLOOD} --backbone {{work}}/vit --recipe heads --freeze-backbone --no-gate --classifier keep",
    "judge": f"{BLOOD} --plain --backbone resnet34 --seed 1 --epochs 10",
}

OWN = ("mhex", "mhex:beta=1", "mhex:attention=false", "mhex:attention=false,beta=1")
CDAMS = ("cdam", "cdam:mode=smooth", "cdam:mode=integrated", "cdam:mode=integrated_complete")
GMARS = ("gmar", "gmar:norm=l2")
SHAPLEYS = (
    "attention-shapley",
    "attention-shapley:game=max_mutual",
    "attention-shapley:game=cls",
    "attention-shapley:gradient=false",
)
ATTENTION = ("attention", "attention-rollout", "attention-flow", "attention-gradcam", "generic-relevance", "grad-sam")
OTHERS = ("attcat", "gradcam", "layercam", "integrated-gradients:steps=16", "vit-cx")
BLIND = ("centre-gaussian", "random")
METHODS = (*OWN, *CDAMS, *GMARS, *SHAPLEYS, *ATTENTION, *OTHERS, *BLIND)
SPECIFIC = "compactness,class_sensitivity,class_sensitivity_least"
PLACES = "pointing,mass_inside,iou"
DROPS = ("sad", "avg_drop", "area_drop")
LESION_IMAGES = 8000


def _correctness(cells: int) -> str:
    return f"fidelity:steps=24,cells={cells},box_sensitivity:boxes=32"


@dataclass(frozen=True, kw_only=True)
class Table:
    """One `mhex-vision evaluate`."""

    network: str
    judge: str
    data: str
    metrics: str
    limit: int
    methods: tuple[str, ...] = METHODS

    def command(self, name: str) -> str:
        """The command without the program."""
        return (
            f"evaluate --checkpoint {{work}}/{self.network} --judge {{work}}/{self.judge} "
            f"{'--self-judged ' if self.network == self.judge else ''}{self.data} "
            f"--limit {self.limit} --batch-size 32 --methods {','.join(self.methods)} --metrics {self.metrics} "
            f"--out {{work}}/{name}"
        )


TABLES = {
    # Judged by the network that is explained, as the papers do; then by one that none of the methods has seen.
    "blood": Table(network="heads", judge="heads", data=BLOOD, metrics=f"{_correctness(7)},{SPECIFIC}", limit=64),
    "blood-judged": Table(network="heads", judge="judge", data=BLOOD, metrics=",".join(DROPS), limit=256),
}


def main() -> None:
    """Do the steps that are asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, type=Path, help="folder with medmnist/")
    parser.add_argument("--work", required=True, type=Path, help="folder for networks and comparisons")
    parser.add_argument("--only", nargs="+", metavar="STEP", choices=[*NETWORKS, *TABLES, *FUNCTIONS])
    options = parser.parse_args()
    folders = {"data": str(options.data.resolve()), "work": str(options.work.resolve())}
    for name in options.only or [*NETWORKS, *FUNCTIONS, *TABLES]:
        if name in NETWORKS:
            _train(name, folders)
        elif name in TABLES:
            command = TABLES[name].command(name)
            common.run_step(PROGRAM, command, folders)
            summary = json.loads((options.work / name / "summary.json").read_text(encoding="utf-8"))
            summary["settings"].pop("note")  # where the folders lay
            common.keep(f"vits/{name}", _shown(command), summary)
        else:
            shown = f"python benchmarks/vits.py --data DATA --work WORK --only {name}"
            common.keep(f"vits/{name}", shown, FUNCTIONS[name](options.data, options.work))


def accuracy(data: Path, work: Path) -> dict[str, Any]:  # noqa: ARG001
    """What the networks came to."""
    found = {}
    for name in NETWORKS:
        record = json.loads((work / name / "run.json").read_text(encoding="utf-8"))
        command = f"train {NETWORKS[name]} --out {{work}}/{name}"
        found[name] = {"command": _shown(command), "test": record["result"]["test"]}
    _, networks = _lesions(work)
    for name in ("vit-lesions", "heads-lesions", "mhex-lesions", "judge-lesions"):
        record = json.loads((work / name / "run.json").read_text(encoding="utf-8"))
        found[name] = {"command": "in benchmarks/vits.py", "test": record["result"]["test"]}
    return {"runs": found, "lesions": {"training images": LESION_IMAGES, "networks": sorted(networks)}}


def lesions(data: Path, work: Path) -> dict[str, Any]:  # noqa: ARG001
    """Where the truth is known: correctness, compactness, class sensitivity and places on synthetic lesions."""
    metrics = [*_listed(_correctness(8)), *_listed(SPECIFIC), *_listed(PLACES)]
    return _on_lesions(work, "lesions", "heads-lesions", "heads-lesions", METHODS, metrics, limit=128)


def lesions_judged(data: Path, work: Path) -> dict[str, Any]:  # noqa: ARG001
    """The same maps before a judge that none of the methods has seen."""
    return _on_lesions(work, "lesions-judged", "heads-lesions", "judge-lesions", METHODS, DROPS, limit=256)


def lesions_mhex(data: Path, work: Path) -> dict[str, Any]:  # noqa: ARG001
    """The maps of a ViT that was trained with gates and heads, and has no classifier besides."""
    methods = (*OWN, "cdam", "gmar", "attcat", "generic-relevance", "gradcam", *BLIND)
    metrics = [*DROPS, *_listed(PLACES)]
    return _on_lesions(work, "lesions-mhex", "mhex-lesions", "judge-lesions", methods, metrics, limit=256)


def examples(data: Path, work: Path) -> dict[str, Any]:  # noqa: ARG001
    """A picture: several methods on the same lesions, and where the lesions are."""
    bundle, networks = _lesions(work)
    methods = ("mhex", "mhex:beta=1", "mhex:attention=false", "cdam", "gmar", "generic-relevance", "attcat")
    figure = draw_examples(networks["heads-lesions"], bundle.test, bundle, methods, samples=4)
    drawing.save_figure(figure, IMAGES / "vits.png", dpi=110)
    return {"methods": methods}


def _on_lesions(
    work: Path, name: str, network: str, judge: str, methods: Sequence[str], metrics: Sequence[str], *, limit: int
) -> dict[str, Any]:
    bundle, networks = _lesions(work)
    found = compare(
        networks[network],
        bundle.test,
        bundle,
        judge=networks[judge],
        methods=methods,
        metrics=metrics,
        out=work / name,
        batch_size=32,
        limit=limit,
    )
    return dict(json.loads(found.to_json(found.summary())))


def concepts(data: Path, work: Path) -> dict[str, Any]:
    """T-TCAV of the ViT on blood cells: two classes, other classes' training images as concepts."""
    bundle = load_data("bloodmnist", root=data / "medmnist", download=False)
    model = load_classifier(work / "vit")
    reports = {}
    for target in ("neutrophil", "platelet"):
        number = next(index for index, name in enumerate(bundle.class_names) if target in name)
        shown = {name: _of_class(bundle, index, 30, split="train") for index, name in enumerate(bundle.class_names)}
        chosen = {
            name: images
            for name, images in shown.items()
            if any(word in name for word in ("neutrophil", "platelet", "eosinophil", "lymphocyte"))
        }
        others = torch.cat([images[:8] for name, images in shown.items() if name not in chosen])
        report = concept_sensitivity(
            model,
            chosen,
            _of_class(bundle, number, 64, split="test"),
            number,
            random=torch.cat([others, *(images[:8] for images in chosen.values())]),
            runs=10,
        )
        print(report.to_markdown(), flush=True)
        reports[target] = report.to_record()
    return {"reports": reports}


def speed(data: Path, work: Path) -> dict[str, Any]:  # noqa: ARG001
    """Batched explanations beside the authors' way, one image at a time, in one run."""
    torch.manual_seed(0)
    model = PlainClassifier.from_name("timm/vit_small_patch16_224", 8).eval()
    images, targets = torch.randn(32, 3, 224, 224), torch.arange(32) % 8
    device = torch.device("cpu")
    results: dict[str, Any] = {}
    ways: dict[str, Callable[[nn.Module, Tensor, int], Tensor]] = {
        "cdam": one_cdam,
        "cdam:mode=smooth": one_smooth,
        "gmar": one_gmar,
        "attention-rollout": one_rollout,
    }
    for name, one in ways.items():
        explain = parse(f"{name},upsample=nearest" if ":" in name else f"{name}:upsample=nearest")
        if "smooth" not in name:  # whose noise differs
            batched = explain(model, images[:2], targets[:2])[:, ::16, ::16]
            alone = torch.stack([one(model.backbone, images[row : row + 1], row) for row in range(2)])
            if not torch.allclose(batched, alone, rtol=1e-3, atol=1e-4 * float(alone.abs().max())):
                raise SystemExit(f"{name} one by one gives other maps")
        timed = in_turns(
            {
                "batch": lambda explain=explain: explain(model, images, targets),
                "one by one": lambda one=one: [
                    one(model.backbone, image[None], int(target)) for image, target in zip(images, targets, strict=True)
                ],
                "classify": lambda: _classify(model, images),
            },
            device=device,
            rounds=3,
        )
        results[name] = {way: timing.record() for way, timing in timed.items()}
        print(name, {way: round(timing.median, 2) for way, timing in timed.items()}, flush=True)
    own = MHEXClassifier.from_backbone(model, 8).eval()
    watching = MHEXClassifier.from_backbone(model, 8, freeze_backbone=True, gate=False, classifier="keep").eval()
    cost = in_turns(
        {
            "plain: classify": lambda: _classify(model, images),
            "mhex: classify": lambda: _classify(own, images),
            "mhex: explain": lambda: own.explain(images, targets, keep_images=False),
            "mhex, attention=False: explain": lambda: own.explain(images, targets, keep_images=False, attention=False),
            "mhex, heads on the plain network: explain": lambda: watching.explain(images, targets, keep_images=False),
        },
        device=device,
        rounds=5,
    )
    print({way: round(timing.median, 2) for way, timing in cost.items()}, flush=True)
    return {
        "network": "timm/vit_small_patch16_224, random weights",
        "batch": 32,
        "methods": results,
        "cost": {way: timing.record() for way, timing in cost.items()},
    }


def one_cdam(model: Any, image: Tensor, target: int) -> Tensor:
    """As the authors' demonstration goes about it: a hook on the last norm, forward and backward of the network."""
    kept: list[Tensor] = []
    slopes: list[Tensor] = []

    def forward_hook(module: nn.Module, given: object, output: Tensor) -> None:
        del module, given
        kept.append(output)
        output.register_hook(slopes.append)

    handle = model.blocks[-1].norm1.register_forward_hook(forward_hook)
    try:
        model(image)[0, target].backward()
    finally:
        handle.remove()
    model.zero_grad()
    return (kept[0] * slopes[0]).sum(dim=2)[0, 1:].detach().reshape(14, 14)


def one_smooth(model: Any, image: Tensor, target: int, steps: int = 50) -> Tensor:
    """The same with noise on the last block's input, which is run again for each of the steps."""
    kept: list[Tensor] = []
    handle = model.blocks[-1].register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    try:
        with torch.no_grad():
            model(image)
    finally:
        handle.remove()
    entering = kept[0]
    spread = 0.05 * (entering.max() - entering.min())
    total = torch.zeros(entering.shape[1])
    for _ in range(steps):
        noisy = entering + spread * torch.randn_like(entering)
        block = model.blocks[-1]
        normed = block.norm1(noisy).detach().requires_grad_()
        stream = noisy + block.attn(normed)
        stream = stream + block.mlp(block.norm2(stream))
        logit = model.forward_head(model.norm(stream))[0, target]
        (slope,) = torch.autograd.grad(logit, normed)
        total += (slope * normed).sum(dim=2)[0].detach()
    return (total / steps)[1:].reshape(14, 14)


def one_gmar(model: Any, image: Tensor, target: int) -> Tensor:
    """Hooks that keep each block's attention, one backward pass, heads weighed by the size of their gradients."""
    attentions = _attended(model, image, lambda logits: logits[0, target].backward())
    rolled = torch.eye(attentions[0].shape[-1])
    for attention in attentions:
        slope = attention.grad
        if slope is None:
            raise RuntimeError("no gradient reached the attention")
        sizes = slope[0].abs().sum(dim=(1, 2))
        mixed = ((sizes / sizes.sum())[:, None, None] * attention[0]).sum(dim=0) + torch.eye(len(rolled))
        rolled = (mixed / mixed.sum(dim=1, keepdim=True)) @ rolled
    model.zero_grad()
    return rolled[0, 1:].detach().reshape(14, 14)


def one_rollout(model: Any, image: Tensor, target: int) -> Tensor:  # noqa: ARG001
    """Hooks that keep each block's attention, and the product of their means."""
    with torch.no_grad():
        attentions = _attended(model, image, lambda logits: logits)
    rolled = torch.eye(attentions[0].shape[-1])
    for attention in attentions:
        mixed = attention[0].mean(dim=0) + torch.eye(len(rolled))
        rolled = (mixed / mixed.sum(dim=1, keepdim=True)) @ rolled
    return rolled[0, 1:].reshape(14, 14)


def _attended(model: Any, image: Tensor, then: Callable[[Tensor], Any]) -> list[Tensor]:
    """Each block's attention, with its gradient where `then` goes back."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, given: object, output: Tensor) -> None:
        del module, given
        if output.requires_grad:
            output.retain_grad()
        kept.append(output)

    handles = [block.attn.attn_drop.register_forward_hook(keep) for block in model.blocks]
    fused = [block.attn.fused_attn for block in model.blocks]
    try:
        for block in model.blocks:
            block.attn.fused_attn = False
        then(model(image))
    finally:
        for handle in handles:
            handle.remove()
        for block, was in zip(model.blocks, fused, strict=True):
            block.attn.fused_attn = was
    return kept


def _classify(model: nn.Module, images: Tensor) -> object:
    with torch.inference_mode():
        return model(images)


def _lesions(work: Path) -> tuple[DataBundle, dict[str, nn.Module]]:
    """More lesions than `--data synthetic-lesions` has, and networks that learnt them.

    A ViT that sees raw patches stays at chance on them. Convolutions in front (arXiv 2106.14881) make it learn.
    """
    bundle = lesions_bundle(train=LESION_IMAGES)
    recipe = replace(RECIPES["lesions"], epochs=16)
    torch.manual_seed(0)
    vit = _vit_of_lesions(bundle.num_classes)
    train(vit, bundle, recipe, out=work / "vit-lesions", seed=0)
    torch.manual_seed(0)
    heads = MHEXClassifier.from_backbone(vit, bundle.num_classes, freeze_backbone=True, gate=False, classifier="keep")
    train(heads, bundle, RECIPES["heads"], out=work / "heads-lesions", seed=0)
    torch.manual_seed(0)
    mhex = MHEXClassifier.from_backbone(_vit_of_lesions(bundle.num_classes), bundle.num_classes)
    train(mhex, bundle, recipe, out=work / "mhex-lesions", seed=0)
    torch.manual_seed(1)
    judge = MHEXClassifier.from_backbone("resnet18", bundle.num_classes)
    train(judge, lesions_bundle(seed=1), RECIPES["lesions"], out=work / "judge-lesions", seed=1)
    networks: dict[str, nn.Module] = {
        "vit-lesions": vit,
        "heads-lesions": heads,
        "mhex-lesions": mhex,
        "judge-lesions": judge,
    }
    return bundle, {name: network.eval() for name, network in networks.items()}


def _vit_of_lesions(classes: int) -> VisionTransformer:
    stem = [ConvStemConfig(width, 3, 2) for width in (24, 48, 96)]
    return VisionTransformer(64, 8, 3, 3, 96, 192, num_classes=classes, conv_stem_configs=stem)


def _of_class(bundle: DataBundle, number: int, count: int, *, split: str) -> Tensor:
    images: Any = getattr(bundle, split)
    places = (images.labels == number).nonzero().flatten()[:count]
    return bundle.preprocessing.normalize(images.images[places])


def _listed(metrics: str) -> list[str]:
    from mhex_core.specs import listed

    return listed(metrics)


def _train(name: str, folders: dict[str, str]) -> None:
    common.run_step(PROGRAM, f"train {NETWORKS[name]} --out {{work}}/{name}", folders)


def _shown(command: str) -> str:
    return f"{PROGRAM} {command.format(data='DATA', work='WORK')}"


FUNCTIONS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "lesions": lesions,
    "lesions-judged": lesions_judged,
    "lesions-mhex": lesions_mhex,
    "accuracy": accuracy,
    "examples": examples,
    "concepts": concepts,
    "speed": speed,
}


if __name__ == "__main__":
    main()

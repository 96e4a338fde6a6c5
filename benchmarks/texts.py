"""How good are the explanations of texts? Every table and figure of docs/results/texts.md, from training on.

Each step is a command of `mhex-text`, shown before it runs, or a function below; a step that is finished is not done
again, and one that was stopped goes on. Its summary is kept under results/texts/, from which `tables.py` writes the
page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import common
from mhex_core.saliency import token_saliency
from mhex_text import MHEXForSequenceClassification, TokenBatch, load_texts
from mhex_text.explainers import parse
from timing import in_turns

NEWS = "--data ag_news --root {data}"
BUDGET = f"{NEWS} --encoder {{encoder}} --epochs 2 --learning-rate 5e-5"
NETWORKS = {
    "mhex": BUDGET,
    "plain": f"{BUDGET} --plain",
    "judge": f"{BUDGET} --plain --seed 1",
}

DROPS = "avg_drop,comprehensiveness,sufficiency"
PAPER = "mhex:beta=0"
OURS = ("mhex", PAPER, "mhex:attention=true")
RIVALS = ("occlusion", "integrated-gradients:steps=32", "attcat", "attention-rollout", "random")
LENGTH = 71
IMAGES = common.RESULTS.parents[1] / "docs" / "images"
PROGRAM = "mhex-text"


@dataclass(frozen=True, kw_only=True)
class Table:
    """One `mhex-text evaluate`."""

    methods: tuple[str, ...]
    limit: int
    split: str = "test"

    def command(self, name: str) -> str:
        """The command without the program."""
        return (
            f"evaluate --checkpoint {{work}}/mhex --judge {{work}}/judge {NEWS} --split {self.split} "
            f"--limit {self.limit} --max-length {LENGTH} --methods {','.join(self.methods)} --metrics {DROPS} "
            f"--out {{work}}/{name}"
        )


# From the paper's method on, a change at a time.
SETTINGS = (
    PAPER,
    "mhex:beta=0,layers=1",
    "mhex:beta=0,layers=all",
    "mhex:beta=0,layers=last",
    "mhex:beta=0,tau_pos=0.5",
    "mhex:beta=0,sharpness=soft",
    "mhex:beta=0,rectify=true",
    "mhex:beta=0.5",
    "mhex",
    "mhex:layers=1",
    "mhex:layers=all",
    "mhex:layers=all,decay=0.8",
    "mhex:layers=last",
    "mhex:tau_pos=0,tau_neg=0",
    "mhex:attention=true,beta=0",
    "mhex:attention=true",
    "mhex:attention=true,layers=all",
    "random",
)

TABLES = {
    "settings": Table(methods=SETTINGS, limit=256, split="validation"),
    "test": Table(methods=(*OURS, *RIVALS), limit=512),
    "slow": Table(methods=(*OURS, "shap:evaluations=500", *RIVALS), limit=64),
}


def main() -> None:
    """Do the steps that are asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, type=Path, help="folder with ag_news/")
    parser.add_argument("--encoder", required=True, help="a pretrained encoder: a folder, or a name on the hub")
    parser.add_argument("--work", required=True, type=Path, help="folder for networks and comparisons")
    parser.add_argument("--only", nargs="+", metavar="STEP", choices=[*NETWORKS, *TABLES, *FUNCTIONS])
    options = parser.parse_args()
    folders = {"data": str(options.data.resolve()), "work": str(options.work.resolve()), "encoder": options.encoder}
    wanted = options.only or [*NETWORKS, *TABLES, *FUNCTIONS]
    for name in wanted:
        if name in NETWORKS:
            _train(name, folders)
        elif name in TABLES:
            for network in ("mhex", "judge"):
                _train(network, folders)
            command = TABLES[name].command(name)
            common.run_step(PROGRAM, command, folders)
            summary = json.loads((options.work / name / "summary.json").read_text(encoding="utf-8"))
            summary["settings"].pop("note")  # where the folders lay
            _keep(name, _shown(command), summary)
        else:
            shown = f"python benchmarks/texts.py --data DATA --encoder ENCODER --work WORK --only {name}"
            _keep(name, shown, FUNCTIONS[name](options.data, options.work))


def accuracy(data: Path, work: Path) -> dict[str, Any]:  # noqa: ARG001
    """What the runs of the classifiers came to."""
    found = {}
    for name, command in NETWORKS.items():
        record = json.loads((work / name / "run.json").read_text(encoding="utf-8"))
        found[name] = {
            "command": _shown(f"train {command} --out {{work}}/{name}"),
            "test": record["result"]["test"],
            "texts": {split: record["settings"]["data"][split] for split in ("train", "validation", "test")},
            "truncated": record["result"]["truncated"],
        }
    return {"runs": found}


def cost(data: Path, work: Path) -> dict[str, Any]:
    """Texts explained per second beside texts classified per second, in one run."""
    model, tokenizer = _network(work / "mhex"), AutoTokenizer.from_pretrained(work / "mhex")
    plain = AutoModelForSequenceClassification.from_pretrained(work / "plain").eval()
    texts = list(load_texts("ag_news", root=data).test["text"][:64])  # type: ignore[index]  # there are test texts
    batch = TokenBatch.make(texts, tokenizer, max_length=LENGTH)
    target = torch.zeros(len(texts), dtype=torch.int64)
    rivals = {name: parse(name) for name in ("attcat", "attention-rollout")}
    few = TokenBatch.make(texts[:4], tokenizer, max_length=LENGTH)
    slow = {name: parse(name) for name in ("occlusion", "integrated-gradients:steps=32", "shap:evaluations=500")}

    def classify(network: Any) -> Callable[[], Any]:
        def run() -> Any:
            with torch.inference_mode():
                made = TokenBatch.make(texts, tokenizer, max_length=LENGTH)
                return network(**made.inputs()).logits.argmax(dim=1).tolist()

        return run

    def scores() -> Any:
        with torch.inference_mode():
            made = TokenBatch.make(texts, tokenizer, max_length=LENGTH)
            output = model(**made.inputs(), output_activations=True)
            return token_saliency(
                output.activations,
                model.equivalent_matrices(),
                output.logits.argmax(dim=1),
                mask=made.mask,
                beta=1.0,
            ).tolist()

    contenders: dict[str, Callable[[], Any]] = {
        "classify, plain": classify(plain),
        "classify": classify(model),
        "classify and score each token": scores,
        "explain(): words and offsets, too": lambda: model.explain(
            texts, tokenizer=tokenizer, max_length=LENGTH, batch_size=len(texts)
        ),
        "explain(attention=True)": lambda: model.explain(
            texts, tokenizer=tokenizer, max_length=LENGTH, batch_size=len(texts), attention=True
        ),
    }
    contenders |= {name: lambda method=method: method(model, batch, target) for name, method in rivals.items()}
    device = torch.device("cpu")
    timings = in_turns(contenders, device=device, rounds=11)
    rows = {name: timing.median / len(texts) for name, timing in timings.items()}
    later = {name: lambda method=method: method(model, few, target[:4]) for name, method in slow.items()}
    rows |= {name: timing.median / 4 for name, timing in in_turns(later, device=device, rounds=3).items()}
    base = rows["classify"]
    return {
        "texts": len(texts),
        "rows": {
            name: {"texts_per_s": 1 / seconds, "times_classifying": seconds / base} for name, seconds in rows.items()
        },
    }


def smoothing(data: Path, work: Path) -> dict[str, Any]:
    """How alike tokens become, layer by layer, in what saliency reads and in the scores it gives."""
    model, tokenizer = _network(work / "mhex"), AutoTokenizer.from_pretrained(work / "mhex")
    bundle = load_texts("ag_news", root=data)
    if bundle.test is None:
        raise SystemExit("there are no test texts")
    texts = list(bundle.test["text"][:512])
    # The encoder that was trained without blocks, with blocks that watch and change nothing.
    network = AutoModelForSequenceClassification.from_pretrained(work / "plain")
    plain = MHEXForSequenceClassification.from_encoder(network, bundle.num_classes, gate=False)
    matrices = [matrix.detach() for matrix in model.equivalent_matrices()]
    count = len(matrices)
    likeness, without, spread, agreement = (torch.zeros(count) for _ in range(4))
    for start in range(0, len(texts), 64):
        batch = TokenBatch.make(texts[start : start + 64], tokenizer, max_length=LENGTH)
        with torch.no_grad():
            output = model(**batch.inputs(), output_activations=True)
            other = plain(**batch.inputs(), output_activations=True)
        target, mask = output.logits.argmax(dim=1), batch.mask
        scores = [
            token_saliency([activation], [matrix], target, mask=mask, beta=1.0)
            for activation, matrix in zip(output.activations, matrices, strict=True)
        ]
        for layer, activation in enumerate(output.activations):
            for row, chosen in enumerate(mask):
                likeness[layer] += _likeness(activation[row][chosen])
                without[layer] += _likeness(other.activations[layer][row][chosen])
                values, first = scores[layer][row][chosen], scores[0][row][chosen]
                spread[layer] += values.std() / values.abs().mean().clamp(min=1e-12)
                agreement[layer] += torch.corrcoef(torch.stack([values, first]))[0, 1].nan_to_num()
    figures = {
        "likeness": (likeness / len(texts)).tolist(),
        "likeness_plain": (without / len(texts)).tolist(),
        "spread": (spread / len(texts)).tolist(),
        "agreement_with_first": (agreement / len(texts)).tolist(),
    }
    _plot(figures)
    return {"texts": len(texts), "layers": count, **figures}


def _likeness(tokens: torch.Tensor) -> torch.Tensor:
    """The mean cosine of two tokens of a text."""
    unit = F.normalize(tokens, dim=1)
    return (unit @ unit.T).fill_diagonal_(0).sum() / max(len(unit) * (len(unit) - 1), 1)


def _plot(figures: dict[str, list[float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    layers = range(1, len(figures["likeness"]) + 1)
    left.plot(layers, figures["likeness"], marker="o", color="C0", label="with gates and heads")
    left.plot(layers, figures["likeness_plain"], marker="s", color="C7", linestyle="--", label="plain")
    left.legend()
    left.set(title="likeness of a text's tokens in A_l", xlabel="block", ylabel="mean cosine", ylim=(0, 1.02))
    right.plot(layers, figures["spread"], marker="o", color="C1")
    right.set(title="how much the scores differ", xlabel="block", ylabel="deviation / mean size", ylim=(0, None))
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / "over-smoothing.png", dpi=110)


def _network(place: Path) -> MHEXForSequenceClassification:
    model: MHEXForSequenceClassification = MHEXForSequenceClassification.from_pretrained(place)
    model.train(mode=False)
    return model


def _train(name: str, folders: dict[str, str]) -> None:
    common.run_step(PROGRAM, f"train {NETWORKS[name]} --out {{work}}/{name}", folders)


def _shown(command: str) -> str:
    return f"{PROGRAM} " + " ".join(command.format(data="DATA", work="WORK", encoder="ENCODER").split())


def _keep(name: str, shown: str, record: dict[str, Any]) -> None:
    common.keep(f"texts/{name}", shown, record)


FUNCTIONS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "accuracy": accuracy,
    "cost": cost,
    "smoothing": smoothing,
}


if __name__ == "__main__":
    main()

"""Writes the tables of the README and of docs/results from benchmarks/results; `--check` says if they are those."""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attach_table
import common
import scale_tables

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
NETWORKS = ROOT / "docs" / "results" / "networks.md"
SPEED = ROOT / "docs" / "results" / "speed.md"
EXPLANATIONS = ROOT / "docs" / "results" / "explanations.md"
TEXTS = ROOT / "docs" / "results" / "texts.md"
VITS = ROOT / "docs" / "results" / "vits.md"
SCALE = ROOT / "docs" / "scale.md"
TITLES = {
    "sad": "SAD ↑",
    "avg_drop": "AVG Drop ↑",
    "ead": "EAD ↑",
    "area_drop": "area-matched drop ↑",
    "insertion": "insertion AUC ↑",
    "deletion": "deletion AUC ↓",
    "pointing": "pointing ↑",
    "mass_inside": "mass inside ↑",
    "iou": "IoU ↑",
    "comprehensiveness": "comprehensiveness ↑",
    "sufficiency": "sufficiency ↓",
    "fidelity": "MIF / LIF fidelity ↑",
    "box_sensitivity": "box sensitivity ↑",
    "compactness": "compactness ↑",
    "class_sensitivity": "likeness to the runner-up's map ↓",
    "class_sensitivity_least": "to the least likely class's ↓",
}
LESS_IS_BETTER = ("deletion", "sufficiency", "class_sensitivity")
BLIND = ("centre-gaussian", "random")  # methods that look at no network


def bloodmnist(record: dict[str, Any]) -> list[str]:
    """Accuracy and minutes of plain, layerwise and joint networks, and of heads on the frozen one."""
    lines = [
        "| network | test accuracy % | each head, shallow to deep, % | s per epoch, fastest | minutes, quietest |",
        "|---|---|---|---|---|",
    ]
    names = {
        "plain": "plain ResNet-18",
        "layerwise": "MHEX `layerwise`",
        "joint": "MHEX `joint`",
        "frozen": "heads on the frozen plain one",
    }
    for kind, name in names.items():
        runs = [run for run in record["runs"] if run["kind"] == kind]
        accuracy = common.spread([run["test"]["accuracy"] for run in runs], scale=100)
        heads = zip(*(run["test"]["head_accuracy"] for run in runs), strict=True)
        shown = " ".join(f"{100 * statistics.mean(head):.1f}" for head in heads) or "-"
        # Other work on the machine only ever adds: the fastest epoch says what an epoch costs.
        fastest = min(second for run in runs for second in run["epoch_seconds"])
        minutes = min(sum(run["epoch_seconds"]) / 60 for run in runs)
        if kind == "frozen":
            same = "identical" if all(run["identical"] for run in runs) else "NOT IDENTICAL"
            accuracy = f"{accuracy} ({same} predictions)"
        lines.append(f"| {name} | {accuracy} | {shown} | {fastest:.1f} | {minutes:.1f} |")
    return lines


def lesions(record: dict[str, Any]) -> list[str]:
    """Localisation of the aggregate, each head and the maps without a model."""
    objectives = list(dict.fromkeys(run["objective"] for run in record["runs"]))
    lines = [
        "| map | " + " | ".join(f"{name}: pointing %, mass inside %" for name in objectives) + " |",
        "|---" * (1 + len(objectives)) + "|",
    ]
    by_objective = {name: [run for run in record["runs"] if run["objective"] == name] for name in objectives}
    accuracies = [common.spread([run["test"]["accuracy"] for run in runs], scale=100) for runs in by_objective.values()]
    lines.append("| (test accuracy %) | " + " | ".join(accuracies) + " |")
    plain = common.spread([run["test"]["accuracy"] for run in record["plain"]], scale=100)
    lines.append(f"| (of a plain ResNet-18) | {plain} |" + " |" * (len(objectives) - 1))
    for name in record["runs"][0]["localization"]:
        cells = [_scores([run["localization"][name] for run in runs]) for runs in by_objective.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def saliency(record: dict[str, Any]) -> list[str]:
    """The kernels beside everything else that computes the same maps: how many times faster."""
    rivals = ("stock", "compiled reference", "reference", "one by one", "read")
    lines = [
        "| activations | kernel, ms | GB/s | hand-fused stock | torch.compile | reference | sample by sample, numpy "
        "| plain read |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        ours = row["contenders"]["native"]
        ratios = " | ".join(f"{row['native_is_times_faster_than'][name]:.1f}x" for name in rivals)
        lines.append(f"| {row['case']} | {ours['ms']:.2f} | {ours['GB_per_s']:.0f} | {ratios} |")
    return lines


def explaining(record: dict[str, Any]) -> list[str]:
    """Explaining beside classifying."""
    lines = ["| | images/s | time over classifying |", "|---|---|---|"]
    (row,) = record["rows"]
    for name, taken in row["contenders"].items():
        ratio = f"{taken['times_classifying']:.3f}" if taken["times_classifying"] else "-"
        lines.append(f"| {name} | {taken['images_per_s']:.1f} | {ratio} |")
    return lines


def _scores(scores: list[dict[str, float]]) -> str:
    return ", ".join(
        common.spread([score[key] for score in scores], scale=100, digits=1) for key in ("pointing", "mass")
    )


def comparison(*names: str, of: str = "explanations", unit: str = "image") -> Callable[[], list[str]]:
    """The summaries of one or more `evaluate`, as one table; with several, rows begin with the network."""

    def lines() -> list[str]:
        found: list[str] = []
        for name in names:
            record = common.result(f"{of}/{name}")
            metrics = record["settings"]["metrics"]
            if not found:
                titles = [_title(metric) for metric in metrics]
                found = [
                    "| " + " | ".join(["method", *titles, f"ms / {unit}"]) + " |",
                    "|---" * (len(titles) + 2) + "|",
                ]
            prefix = f"{name.split('-')[0]}: " if len(names) > 1 else ""
            first, *_ = record["methods"]
            for method, values in record["methods"].items():
                row = [f"`{method}`" if method in BLIND else f"{prefix}`{method}`"]
                for metric in metrics:
                    others = [other["scores"][metric]["mean"] for other in record["methods"].values()]
                    best = min(others) if metric.startswith(LESS_IS_BETTER) else max(others)
                    row.append(_cell(values, metric, first, best=len(names) == 1 and best))
                found.append("| " + " | ".join([*row, _milliseconds(values[f"seconds_per_{unit}"])]) + " |")
        records = [common.result(f"{of}/{name}") for name in names]
        counts = sorted({record["settings"]["compared"] for record in records})
        commands = _listed([f"`{record['command']}`" for record in records])
        return [*found, "", f"{' / '.join(map(str, counts))} {unit}s; {common.shape(records[-1])}.", "", *commands]

    return lines


def _cell(values: dict[str, Any], metric: str, first: str, *, best: object) -> str:
    """Mean and interval; an arrow where the paired difference from the first method cannot be chance."""
    score = values["scores"][metric]
    difference = values[f"differences from {first}"].get(metric)
    arrow = ""
    if difference is not None and difference["low"] is not None:
        sign = -1 if metric.startswith(LESS_IS_BETTER) else 1
        if difference["low"] > 0 or difference["high"] < 0:
            arrow = " ▲" if sign * difference["mean"] > 0 else " ▼"
    mean = f"{score['mean']:.3f}"
    mean = f"**{mean}**" if best is not False and score["mean"] == best else mean
    return f"{mean}{arrow} <sub>[{score['low']:.3f}, {score['high']:.3f}]</sub>"


def _title(metric: str) -> str:
    name, _, options = metric.partition(":")
    shown = "" if name in ("insertion", "deletion", "fidelity", "box_sensitivity") or not options else f" ({options})"
    return TITLES[name] + shown


def _listed(commands: list[str]) -> list[str]:
    return commands if len(commands) == 1 else [f"- {command}" for command in commands]


def sanity() -> list[str]:
    """What is left of a map while the network's weights go, layer by layer from the output."""
    record = common.result("explanations/sanity")
    methods = record["methods"]
    layers = [step["layer"] for step in next(iter(methods.values()))["spearman"]]
    lines = [
        "| randomised down to | " + " | ".join(f"`{method}`" for method in methods) + " |",
        "|---" * (1 + len(methods)) + "|",
    ]
    for row, layer in enumerate(layers):
        cells = [
            f"{_or_dash(kinds['spearman'][row]['similarity'])} / {_or_dash(kinds['ssim'][row]['similarity'])}"
            for kinds in methods.values()
        ]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return [*lines, "", f"{record['images']} images; {common.shape(record)}.", "", f"`{record['command']}`"]


def labels() -> list[str]:
    """How alike the maps of a network are to those of its like, and of one that learnt shuffled labels."""
    record = common.result("explanations/labels")
    kinds = list(next(iter(record["spearman"].values())))
    lines = ["| method | " + " | ".join(kinds) + " |", "|---" * (1 + len(kinds)) + "|"]
    for method, values in record["spearman"].items():
        lines.append(f"| `{method}` | " + " | ".join(f"{values[kind]:.2f}" for kind in kinds) + " |")
    loss = f"the loss of the shuffled one, the sum over eight heads, came down to {record['train_loss']:.2f}"
    return [*lines, "", f"{record['images']} images; {loss}; {common.shape(record)}.", "", f"`{record['command']}`"]


def cells() -> list[str]:
    """Accuracy on the own test images and on another camera's."""
    record = common.result("explanations/cells")
    lines = [
        "| network | test accuracy %, own camera | other camera | each head there, shallow to deep, % | called there |",
        "|---|---|---|---|---|",
    ]
    for network, sets in record["networks"].items():
        own, other = sets["blood224"], sets["cells"]
        heads = " ".join(f"{100 * value:.0f}" for value in other["head_accuracy"]) or "-"
        called = ", ".join(f"{count} {name}" for name, count in _by_count(other["called"]) if count)
        lines.append(
            f"| {network} | {100 * own['accuracy']:.1f} | {100 * other['accuracy']:.1f} | {heads} | {called} |"
        )
    return [*lines, "", f"`{record['command']}` ({common.shape(record)})"]


def _by_count(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])


def study() -> list[str]:
    """Collaboration of gate and supervision, and how much of a head's logit its map accounts for."""
    record = common.result("explanations/study")
    gaps = record["completeness"]["median relative gap per head"]
    correlations = record["completeness"]["correlation of evidence and logit per head"]
    means = [f"{value:.2f}" for value in record["mean per block"]]
    lines = [
        "| block | mean collaboration | median gap between map and logit | correlation of the two |",
        "|---|---|---|---|",
    ]
    for row, layer in enumerate([*record["layers"], "the last one"]):
        mean = means[row] if row < len(means) else "-"
        lines.append(f"| {layer} | {mean} | {gaps[row]:.3f} | {correlations[row]:.3f} |")
    lines += ["", "| collaboration of the last three blocks against | Pearson r | p | mutual information, nats |"]
    lines += ["|---|---|---|---|"]
    for name, title in (("sad", "SAD"), ("confidence", "confidence")):
        pearson = record["pearson"][name]
        lines.append(
            f"| {title} | {pearson['r']:.3f} | {pearson['p']:.1e} | {record['mutual information, nats'][name]:.3f} |"
        )
    return [*lines, "", f"{record['images']} images; {common.shape(record)}.", "", f"`{record['command']}`"]


def text_accuracy() -> list[str]:
    """Plain and with blocks, side by side."""
    record = common.result("texts/accuracy")
    found = ["| classifier | test accuracy | each head alone, shallow to deep |", "|---|---|---|"]
    for name, run in record["runs"].items():
        test = run["test"]
        heads = ", ".join(f"{100 * accuracy:.1f}" for accuracy in test["head_accuracy"]) or "-"
        found.append(f"| {name} | {100 * test['accuracy']:.2f} % | {heads} |")
    commands = [f"`{run['command']}`" for run in record["runs"].values()]
    return [*found, "", f"{common.shape(record)}.", "", *_listed(commands)]


def text_cost() -> list[str]:
    """What explaining costs."""
    record = common.result("texts/cost")
    found = ["| | texts / s | times classifying |", "|---|---|---|"]
    for name, row in record["rows"].items():
        shown = f"{row['texts_per_s']:.1f}" if row["texts_per_s"] < 10 else f"{row['texts_per_s']:.0f}"
        times = row["times_classifying"]
        found.append(f"| {name} | {shown} | {times:.2f} |" if times < 10 else f"| {name} | {shown} | {times:.0f} |")
    shape = f"{common.shape(record)}, {record['machine']['threads']} threads."
    return [*found, "", shape, "", f"`{record['command']}`"]


def text_smoothing() -> list[str]:
    """How alike tokens become."""
    record = common.result("texts/smoothing")
    found = [
        "| block | mean cosine of a text's tokens in A_l | in the plain encoder's | deviation of the scores / mean "
        "size | r with the scores of block 1 |",
        "|---|---|---|---|---|",
    ]
    names = ("likeness", "likeness_plain", "spread", "agreement_with_first")
    for number, values in enumerate(zip(*(record[name] for name in names), strict=True), 1):
        found.append(f"| {number} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return [*found, "", f"{record['texts']} texts; {common.shape(record)}.", "", f"`{record['command']}`"]


def vit_accuracy() -> list[str]:
    """The vision transformers and the judges."""
    record = common.result("vits/accuracy")
    found = ["| network | test accuracy % | each head alone, shallow to deep, % |", "|---|---|---|"]
    for name, run in record["runs"].items():
        test = run["test"]
        heads = " ".join(f"{100 * accuracy:.1f}" for accuracy in test["head_accuracy"]) or "-"
        found.append(f"| {name} | {100 * test['accuracy']:.2f} | {heads} |")
    commands = list(dict.fromkeys(f"`{run['command']}`" for run in record["runs"].values()))
    return [*found, "", f"{common.shape(record)}.", "", *_listed(commands)]


def vit_concepts() -> list[str]:
    """T-TCAV at the block where the concept is told best."""
    record = common.result("vits/concepts")
    found = [
        "| class | concept | block | T-TCAV | random concepts | held-out accuracy | random | p, Holm |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for report in record["reports"].values():
        for row in report["rows"]:
            score, control = statistics.mean(row["scores"]), statistics.mean(row["control"])
            shown = f"**{score:.2f}**" if row["adjusted"] < 0.05 else f"{score:.2f}"
            found.append(
                f"| {report['target']} | {row['concept']} | {row['layer']} | {shown} | {control:.2f} | "
                f"{row['accuracy']:.2f} | {row['control_accuracy']:.2f} | {row['adjusted']:.2g} |"
            )
    return [*found, "", f"{common.shape(record)}.", "", f"`{record['command']}`"]


def vit_speed() -> list[str]:
    """A batch beside one image at a time."""
    record = common.result("vits/speed")
    found = [
        "| method | batch of 32, s | one image at a time, s | times faster | classifying the batch, s |",
        "|---|---|---|---|---|",
    ]
    for name, ways in record["methods"].items():
        batch, single, classify = (ways[way]["ms"] / 1000 for way in ("batch", "one by one", "classify"))
        found.append(f"| `{name}` | {batch:.2f} | {single:.2f} | {single / batch:.1f} | {classify:.2f} |")
    shape = f"{common.shape(record)}, {record['machine']['threads']} threads, medians of 3 turns"
    return [*found, "", f"{record['network']}; {shape}.", "", f"`{record['command']}`"]


def vit_cost() -> list[str]:
    """Explaining beside classifying."""
    record = common.result("vits/speed")
    base = dict.fromkeys(("mhex: explain", "mhex, attention=False: explain"), "mhex: classify")
    found = ["| | s for 32 images | over classifying |", "|---|---|---|"]
    for name, taken in record["cost"].items():
        classify = record["cost"][base.get(name, "plain: classify")]["ms"]
        ratio = f"{taken['ms'] / classify:.3f}" if "explain" in name else "-"
        found.append(f"| {name} | {taken['ms'] / 1000:.2f} | {ratio} |")
    shape = f"{common.shape(record)}, {record['machine']['threads']} threads, medians of 5 turns"
    return [*found, "", f"{record['network']}; {shape}.", "", f"`{record['command']}`"]


def _or_dash(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def of_result(name: str, table: Callable[[dict[str, Any]], list[str]]) -> Callable[[], list[str]]:
    """A table with the command and the machine below it."""

    def lines() -> list[str]:
        record = common.result(name)
        shape = common.shape(record)
        if "runs" in record:
            shape += f", {len({run['seed'] for run in record['runs']})} seeds, mean ± deviation"
        else:
            shape += ", medians of one run"
        return [*table(record), "", f"`{record['command']}` ({shape})"]

    return lines


# Each at the layer that did best on validation images, where it has a choice; None where it was not measured.
_OVERVIEW = {
    "MHEX": ("mhex", "mhex", "mhex"),
    "Grad-CAM, best layer": ("gradcam:layer=layer2.1", "gradcam:layer=layer2.1", "gradcam:layer=layer3.1"),
    "Layer-CAM, best layer": ("layercam:layer=layer1.1", "layercam:layer=layer1.1", "layercam:layer=layer3.1"),
    "Eigen-CAM, best layer": ("eigencam:layer=layer2.1", "eigencam:layer=layer2.0", "eigencam"),
    "integrated gradients": ("integrated-gradients:steps=16", "integrated-gradients:steps=16", None),
    "SHAP": ("shap:evaluations=100", "shap:evaluations=100", None),
    "a Gaussian in the centre": ("centre-gaussian", "centre-gaussian", "centre-gaussian"),
    "random": ("random", "random", "random"),
}


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f}" if seconds >= 0.01 else f"{1000 * seconds:.2g}"


def overview() -> list[str]:
    """What the README shows of the results: where maps point, what they find, and what they cost."""
    inside, small, large = (
        common.result(f"explanations/{name}")["methods"] for name in ("test-lesions", "test-28", "test-224")
    )
    found = [
        "| | lesions: strongest point inside, % | cells, 28 px: area-matched drop | cells, 224 px "
        "| ms / image, 28 px |",
        "|---|---|---|---|---|",
    ]
    for title, (pointing, drop, drop_large) in _OVERVIEW.items():
        cells = [
            f"{100 * inside[pointing]['scores']['pointing']['mean']:.1f}",
            f"{small[drop]['scores']['area_drop']['mean']:.3f}",
            "-" if drop_large is None else f"{large[drop_large]['scores']['area_drop']['mean']:.3f}",
            _milliseconds(small[drop]["seconds_per_image"]),
        ]
        found.append(f"| {title} | {' | '.join(cells)} |")
    (timed,) = common.result("explaining")["rows"]
    times = {name: taken["times_classifying"] for name, taken in timed["contenders"].items()}
    own = [times["mhex"], times["mhex, heads on the plain network"]]
    batch = common.result("batch-throughput")["sides"]["224"]["ratios"]["batch"]
    sentence = (
        f"At 224 px explaining takes {min(own):.2f} to {max(own):.2f} times as long as classifying (torch-cam "
        f"{times['torch-cam']:.2f}, captum {times['captum']:.1f}, pytorch-grad-cam {times['pytorch-grad-cam']:.1f} "
        f"times), and `batch` reaches {batch:.2f} of the bare model's speed. "
        f"{common.shape(common.result('explaining'))}; commands, intervals and spreads are on the pages below."
    )
    return [*found, "", sentence]


PAGES: dict[Path, dict[str, Callable[[], list[str]]]] = {
    README: {"overview": overview},
    NETWORKS: {
        "bloodmnist": of_result("bloodmnist", bloodmnist),
        "lesions": of_result("lesions", lesions),
        "attach": attach_table.attach,
    },
    SPEED: {
        "saliency": of_result("saliency", saliency),
        "explaining": of_result("explaining", explaining),
    },
    EXPLANATIONS: {
        "test-28": comparison("test-28"),
        "settings-28": comparison("settings-28"),
        "layers-28": comparison("layers-28"),
        "plain-28": comparison("plain-28-maps"),
        "networks-28": comparison("nogate-28-maps", "joint-28-maps", "downsample-28-maps", "stage-28-maps"),
        "settings-224": comparison("settings-224"),
        "test-224": comparison("test-224"),
        "slow-224": comparison("slow-224"),
        "cells": cells,
        "test-cells": comparison("test-cells"),
        "test-lesions": comparison("test-lesions"),
        "networks-lesions": comparison(
            "nogate-lesions-maps", "joint-lesions-maps", "downsample-lesions-maps", "stage-lesions-maps"
        ),
        "sanity": sanity,
        "labels": labels,
        "study": study,
    },
    TEXTS: {
        "accuracy": text_accuracy,
        "settings": comparison("settings", of="texts", unit="text"),
        "test": comparison("test", of="texts", unit="text"),
        "slow": comparison("slow", of="texts", unit="text"),
        "cost": text_cost,
        "smoothing": text_smoothing,
    },
    VITS: {
        "accuracy": vit_accuracy,
        "blood": comparison("blood", of="vits"),
        "blood-judged": comparison("blood-judged", of="vits"),
        "lesions": comparison("lesions", of="vits"),
        "lesions-judged": comparison("lesions-judged", of="vits"),
        "lesions-mhex": comparison("lesions-mhex", of="vits"),
        "concepts": vit_concepts,
        "speed": vit_speed,
        "cost": vit_cost,
    },
    SCALE: {
        "throughput": scale_tables.throughput,
        "rival": scale_tables.rival,
        "memory": scale_tables.memory,
        "faults": scale_tables.faults,
        "cost": scale_tables.cost,
        "plan": scale_tables.plan,
    },
}


def render(text: str, tables: dict[str, Callable[[], list[str]]]) -> str:
    """A page with its tables as the results have them."""
    for name, table in tables.items():
        body = "\n".join(table())
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", flags=re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"there is no place for the table {name!r}")
        text = pattern.sub(lambda found, body=body: found[1] + body + "\n" + found[2], text)
    return text


def main() -> None:
    """Rewrite the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for page, tables in PAGES.items():
        text = page.read_text(encoding="utf-8")
        fresh = render(text, tables)
        if check and fresh != text:
            sys.exit(f"the tables of {page.name} are not those of benchmarks/results; run python benchmarks/tables.py")
        if not check:
            page.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Writes the README's tables from benchmarks/results/*.json; `--check` only says whether they are up to date."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import common

README = Path(__file__).parents[1] / "README.md"


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


TABLES = {"bloodmnist": bloodmnist, "lesions": lesions, "saliency": saliency, "explaining": explaining}


def render(text: str) -> str:
    """The README with its tables as the results have them."""
    for name, table in TABLES.items():
        record = json.loads((common.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        machine = record["machine"]
        shape = f"{machine['cores']} cores, {machine['vector_instructions']}, torch {machine['torch']}"
        if "runs" in record:
            shape += f", {len({run['seed'] for run in record['runs']})} seeds, mean ± deviation"
        else:
            shape += ", medians of one run"
        body = "\n".join([*table(record), "", f"`{record['command']}` ({shape})"])
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", flags=re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"the README has no place for the table {name!r}")
        text = pattern.sub(lambda found, body=body: found[1] + body + "\n" + found[2], text)
    return text


def main() -> None:
    """Rewrite the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    text = README.read_text(encoding="utf-8")
    fresh = render(text)
    if check and fresh != text:
        sys.exit("the README's tables are not those of benchmarks/results; run python benchmarks/tables.py")
    if not check:
        README.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()

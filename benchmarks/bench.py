"""The driver of `nox -s bench`: kernels beside their rivals, then explaining beside classifying."""

from __future__ import annotations

import argparse

import torch

import common
import explaining
import saliency
from mhex_core import native
from saliency import Case

CPU_CASES = (
    Case(224, 32),
    Case(224, 32, channels_last=True),
    Case(224, 32, beta=0.5),
    Case(224, 32, dtype=torch.bfloat16),
    Case(224, 1),
    Case(28, 256),
    Case(28, 256, channels_last=True),
    Case(28, 256, beta=0.5),
)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21, help="timings of each contender")
    parser.add_argument("--only", choices=("kernels", "users"), help="one half of it")
    options = parser.parse_args()
    device = torch.device("cpu")
    status = native.status()
    print(f"saliency runs {status.backend}: {status.reason}")
    if options.only != "users":
        rows = []
        for case in CPU_CASES:
            rows.append(saliency.measure(case, device, rounds=options.rounds))
            show(rows[-1])
        print(common.write("saliency", {"native": status.reason, "rows": rows}))
    if options.only != "kernels":
        row = explaining.measure(pixels=224, batch=32, device=device, rounds=options.rounds, channels_last=False)
        for name, taken in row["contenders"].items():
            ratio = f"{taken['times_classifying']:.3f} x classifying" if taken["times_classifying"] else ""
            print(f"  {name:34s} {taken['images_per_s']:7.1f} images/s  {ratio}")
        print(common.write("explaining", {"native": status.reason, "rows": [row]}))


def show(row: dict[str, object]) -> None:
    """One row on the terminal."""
    print(row["case"])
    contenders = row["contenders"]
    if not isinstance(contenders, dict):
        raise TypeError("contenders must be a dict")
    for name, taken in contenders.items():
        print(f"  {name:20s} {taken['ms']:9.3f} ms  {taken['GB_per_s']:7.1f} GB/s")


if __name__ == "__main__":
    main()

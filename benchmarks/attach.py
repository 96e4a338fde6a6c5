"""Which of timm's networks take blocks, and whether predictions stay: the smallest of each family, random weights."""

from __future__ import annotations

import argparse
import re
import signal
import time
import warnings
from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import nn

import common
from mhex_vision import MHEXClassifier
from mhex_vision.vit import architecture_of

CLASSES, SECONDS, CANDIDATES = 3, 45, 3
SIZES = (64, 96, 128)
SMALL = ("zepto", "atto", "femto", "pico", "nano", "mini", "tiny", "xxs", "xs", "small", "s0", "m0", "b0", "t0", "050")


def smallest(family: str) -> str | None:
    """The network of a family with the fewest parameters, among those whose names promise few."""
    names = [name for name in timm.list_models(module=family) if not name.startswith("test_")]

    def promise(name: str) -> tuple[int, int]:
        hits = [place for place, word in enumerate(SMALL) if word in name]
        digits = [int(number) for number in re.findall(r"\d+", name)]
        return (min(hits, default=len(SMALL)), sum(digits))

    counted = []
    for name in sorted(names, key=promise)[:CANDIDATES]:
        with torch.device("meta"):
            try:
                network = timm.create_model(name, num_classes=CLASSES)
            except (RuntimeError, NotImplementedError):  # some compute with their weights while they are built
                continue
        counted.append((sum(parameter.numel() for parameter in network.parameters()), name))
    return min(counted)[1] if counted else (names[0] if names else None)


def builds(name: str) -> Iterator[tuple[nn.Module, int]]:
    """The network with small sizes to try, where it can be built for them, and its own."""
    own = timm.get_pretrained_cfg(name)
    size = int((own.input_size if own is not None else (3, 224, 224))[-1])
    fixed = bool(own is not None and own.fixed_input_size)
    for side in (*SIZES, size):
        options: dict[str, Any] = {"img_size": side} if fixed and side != size else {}
        try:
            network = timm.create_model(name, num_classes=CLASSES, **options)
        except (AssertionError, RuntimeError, TypeError, ValueError):  # a size that it cannot be built for
            continue
        yield network, side


def attach(network: nn.Module, side: int) -> dict[str, Any]:
    """Blocks on every addition of a frozen network that keeps its classifier, and whether its bits stay."""
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():  # zeros, with which a classifier starts, would hide a difference
                parameter.normal_(std=0.02)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = MHEXClassifier.from_backbone(
            network, CLASSES, at="all", gate=False, freeze_backbone=True, classifier="keep", image_size=side
        ).eval()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, side, side, generator=generator)
    with torch.no_grad():
        own, ours = network.eval()(images), model(images).logits
    model.explain(images[:1])
    transformer = architecture_of(model.backbone) is not None
    last = {addition.channels_last for addition in model._additions}
    return {
        "attached": True,
        "blocks": len(model.blocks),
        "same_bits": bool(torch.equal(own, ours)),
        "off": float((own - ours).abs().max() / own.abs().max()),
        "layout": "tokens" if transformer else "both" if len(last) > 1 else "last" if last.pop() else "first",
        "said": [str(warning.message) for warning in said],
    }


def one(family: str) -> dict[str, Any]:
    """The record of a family."""
    name = smallest(family)
    record: dict[str, Any] = {"family": family, "name": name, "attached": False}
    why = "no network of it can be built"
    started = time.perf_counter()
    for network, side in builds(name) if name is not None else ():
        torch.manual_seed(0)
        record["image_size"] = side
        record["parameters"] = sum(parameter.numel() for parameter in network.parameters())
        try:
            record.update(attach(network, side))
            why = ""
            break
        except ValueError as error:
            why = str(error)
            if "does not take images" not in why:
                break
    return {**record, "why": why, "seconds": round(time.perf_counter() - started, 1)}


def late(*_: object) -> None:
    """Give a family up."""
    raise TimeoutError(f"it took longer than {SECONDS} s")


def main() -> None:
    """Try every family, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", action="append", help="only this one (may be given more than once; writes nothing)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, late)
    records = []
    for family in options.family or timm.list_modules():
        signal.alarm(SECONDS)
        try:
            record = one(family)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is that network's and goes into the table
            record = {"family": family, "name": None, "attached": False, "why": f"{type(error).__name__}: {error}"}
        finally:
            signal.alarm(0)
        records.append(record)
        print({key: value for key, value in record.items() if key != "said"}, flush=True)
    if not options.family:
        print(common.write("attach", {"timm": timm.__version__, "networks": records}))


if __name__ == "__main__":
    main()

"""Training recipes: settings that go together, frozen."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

Schedule = Literal["cosine", "constant"]
Monitor = Literal["accuracy", "loss", "auc"]
MixedPrecision = Literal["auto", "no", "bf16", "fp16"]
Augment = Literal["none", "imagenet"]
Order = Literal["shuffled", "balanced"]

_CHOICES = {
    "sampler": Order,
    "schedule": Schedule,
    "monitor": Monitor,
    "mixed_precision": MixedPrecision,
    "augment": Augment,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a classifier is trained, with AdamW.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images per step and process.
        learning_rate: At the start.
        min_learning_rate: At the end of a cosine schedule.
        weight_decay: Of AdamW.
        schedule: "cosine" over all steps, or "constant".
        augment: "none", or "imagenet": random resized crop, flip, TrivialAugmentWide (image files only).
        label_smoothing: In [0, 1).
        monitor: What the best epoch is judged by, on validation images: "accuracy" or "auc" (ties by
            loss), or "loss".
        patience: Epochs without a better one before training stops; None never stops early.
        class_weights: Of each class in the loss of training: "balanced" by the numbers of its images, or a number for
            each name; where classes are independent, of their positive entries. None weighs all alike.
        sampler: "shuffled": each image once an epoch; "balanced": as many are drawn, each class as often as any other,
            images of rare classes several times.
        mixed_precision: "auto" means bf16 on an accelerator that has it, and nothing on a CPU, where it costs time.
    """

    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 1e-3
    min_learning_rate: float = 0.0
    weight_decay: float = 0.01
    schedule: Schedule = "cosine"
    augment: Augment = "none"
    label_smoothing: float = 0.0
    monitor: Monitor = "accuracy"
    patience: int | None = None
    class_weights: Literal["balanced"] | Mapping[str, float] | tuple[tuple[str, float], ...] | None = None
    sampler: Order = "shuffled"
    mixed_precision: MixedPrecision = "auto"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            value = getattr(self, name)
            if name == "patience" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("learning_rate", "min_learning_rate", "weight_decay", "label_smoothing"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if not math.isfinite(value) or value < 0 or (name == "label_smoothing" and value >= 1):
                raise ValueError(f"{name} must be {'in [0, 1)' if name == 'label_smoothing' else '>= 0'}, got {value}")
        for name, options in _CHOICES.items():
            if getattr(self, name) not in get_args(options):
                allowed = ", ".join(repr(option) for option in get_args(options))
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")

        if self.class_weights is not None and self.class_weights != "balanced":
            object.__setattr__(self, "class_weights", _weights(self.class_weights))

    def learning_rate_at(self, step: int, steps: int) -> float:
        """The learning rate of one of `steps` steps, the first being step 0."""
        if self.schedule == "constant":
            return self.learning_rate
        share = (1 + math.cos(math.pi * step / max(steps, 1))) / 2
        return self.min_learning_rate + (self.learning_rate - self.min_learning_rate) * share

    def differences(self, other: Recipe) -> list[str]:
        """The names of the settings in which two recipes differ."""
        return [entry.name for entry in fields(self) if getattr(self, entry.name) != getattr(other, entry.name)]


def read_class_weights(path: str | Path) -> dict[str, float]:
    """Weights of classes by name, out of a JSON object or a CSV table of two columns, whose head may be left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"class_weights must be 'balanced' or a JSON or CSV file, and there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            return dict(_weights(json.loads(text, object_pairs_hook=_each_once)))
        rows = [row for row in csv.reader(text.splitlines(), strict=True) if row]
        if rows and not _is_number(rows[0][-1]):
            del rows[0]
        return dict(_weights(_each_once([(name, float(weight)) for name, weight in rows])))
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        raise ValueError(
            f"class_weights must be an object of numbers (JSON) or rows of NAME,WEIGHT (CSV), got {path}: {error}"
        ) from error


def _weights(value: Any) -> tuple[tuple[str, float], ...]:
    if not isinstance(value, Mapping | tuple) or isinstance(value, str):
        raise TypeError(f"class_weights must be 'balanced', a mapping of names to numbers or None, got {value!r:.60}")
    found = []
    for name, weight in dict(value).items():
        if not isinstance(name, str) or isinstance(weight, bool) or not isinstance(weight, int | float):
            raise TypeError(f"class_weights must map names to numbers, got {name!r:.60}: {weight!r:.60}")
        if not 0 < weight < math.inf:
            raise ValueError(f"class_weights must be above 0 and finite, got {weight!r:.60} for {name!r:.60}")
        found.append((name, float(weight)))
    return tuple(found)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is named twice")
        found[name] = value
    return found


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


RECIPES: dict[str, Recipe] = {
    # The paper's MedMNIST runs: 20 epochs, weight decay 0.01, no augmentation. It names neither batch nor rate.
    "medmnist": Recipe(),
    # The paper's ImageNet-1k runs. Its batch of 468 is the sum over all processes.
    "imagenet-finetune": Recipe(
        epochs=25, batch_size=468, learning_rate=2e-4, min_learning_rate=2e-5, augment="imagenet"
    ),
    "imagenet-scratch": Recipe(
        epochs=90, batch_size=468, learning_rate=1e-3, min_learning_rate=2e-5, augment="imagenet"
    ),
    # Heads on a frozen network: W1 and W2 alone, which settle within two epochs.
    "heads": Recipe(epochs=2, learning_rate=2e-3),
    # The demo's network on the demo's images.
    "lesions": Recipe(epochs=12, batch_size=32, learning_rate=1e-3),
}

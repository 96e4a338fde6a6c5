"""How text classifiers are trained: recipes, by name. Needs no torch, so that a command line can list them at once.

Source: Sun and Liò, "Multi-Head Explainer" (arXiv 2501.01311), the AG News runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mhex_core import _checks

Schedule = Literal["linear", "cosine", "constant"]
MixedPrecision = Literal["auto", "no", "bf16"]


@dataclass(frozen=True, kw_only=True)
class TextRecipe:
    """How a text classifier is trained, with AdamW and gradients cut to norm 1.

    Attributes:
        epochs: Passes over the training texts.
        batch_size: Texts per step and process.
        learning_rate: The highest.
        weight_decay: Of AdamW; biases and normalisations are exempt.
        max_length: Tokens of a text, beyond which it is cut. Never more than tokenizer and encoder take.
        warmup_ratio: The share of all steps in which the learning rate rises to its highest.
        schedule: From there on "linear" or "cosine" down to 0, or "constant".
        patience: Epochs without a lower validation loss before training stops; None never stops early.
        mixed_precision: "auto" means bf16 on an accelerator that has it, and nothing on a CPU.
        gradient_checkpointing: Whether layers are computed again instead of kept: less memory, more time.
    """

    epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 2e-5
    weight_decay: float = 0.01
    max_length: int = 71
    warmup_ratio: float = 0.0
    schedule: Schedule = "linear"
    patience: int | None = 2
    mixed_precision: MixedPrecision = "auto"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_length", "patience"):
            value = getattr(self, name)
            if name != "patience" or value is not None:
                _checks.positive_int(name, value)
        for name in ("learning_rate", "weight_decay"):
            _checks.number(name, getattr(self, name), low=0)
        _checks.number("warmup_ratio", self.warmup_ratio, low=0, high=1)
        _checks.choice("schedule", self.schedule, get_args(Schedule))
        _checks.choice("mixed_precision", self.mixed_precision, get_args(MixedPrecision))
        _checks.flag("gradient_checkpointing", self.gradient_checkpointing)


RECIPES: dict[str, TextRecipe] = {
    # The paper's AG News runs: bert-base-uncased, early stopping on the validation loss. It names no patience.
    "ag-news": TextRecipe(),
}

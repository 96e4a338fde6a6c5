"""What explainers share: a batch without needless padding on the model's device, and the model's answers to it.

Letters: B batch, T tokens, S tokens of the longest text, K classes, N rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mhex_core import _checks
from mhex_text.batch import TokenBatch
from mhex_text.capture import logits_of


class Aligned:
    """A batch as explainers look at it, and the way back.

    Padding lies on the right and is no longer than the longest text asks for: side and amount of the padding that came
    have no influence, also in models that count positions from the left.

    Args:
        batch: B texts.
        device: The model's.

    Attributes:
        batch: The same B texts with S tokens.
        inputs: What the model takes: tensors of S tokens that a backward pass may keep, whatever mode they came from.
    """

    def __init__(self, batch: TokenBatch, device: torch.device) -> None:
        real = batch.attention_mask != 0
        longest = max(1, int(real.sum(dim=1).max()))
        self._places = real.long().argsort(dim=1, descending=True, stable=True)[:, :longest]
        self._shape = batch.input_ids.shape
        with torch.inference_mode(mode=False):
            moved: dict[str, Any] = {
                name: self._taken(getattr(batch, name)).to(device)
                for name in ("input_ids", "attention_mask", "offsets", "sequence_ids", "word_ids")
            }
            types = None if batch.token_type_ids is None else self._taken(batch.token_type_ids).to(device)
            self.batch = replace(batch, **moved, token_type_ids=types, truncated=batch.truncated.to(device))
            self.inputs = self.batch.inputs()

    def back(self, scores: Tensor) -> Tensor:
        """(B, S) in the places of the batch that came: (B, T), 0 for padding that was left out."""
        places = self._places.to(scores.device)
        return scores.new_zeros(self._shape).scatter(1, places, scores)

    def _taken(self, values: Tensor) -> Tensor:
        rows = torch.arange(values.shape[0], device=values.device)[:, None]
        return values.clone()[rows, self._places]


def aligned(model: nn.Module, batch: TokenBatch) -> Aligned:
    """The batch as explainers look at it, on the model's device."""
    return Aligned(batch, next(model.parameters()).device)


def wanted(targets: Tensor, logits: Tensor) -> Tensor:
    """The targets on the logits' device.

    Raises:
        ValueError: One is none of the K classes.
    """
    batch, classes = logits.shape
    return _checks.class_indices("targets", targets, batch=batch, num_classes=classes, device=logits.device)


def wide(values: Tensor) -> Tensor:
    """The values in float32, or wider if they are."""
    return values if values.dtype == torch.float64 else values.float()


def probabilities(model: nn.Module, logits: Tensor) -> Tensor:
    """(N, K), each class by itself where the model's classes are independent of each other."""
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    return wide(logits).sigmoid() if kind == "multi_label_classification" else wide(logits).softmax(dim=1)


def all_logits(model: nn.Module, inputs: dict[str, Tensor], batch_size: int) -> Tensor:
    """Logits (N, K) of N rows, so many at a time, each time without padding that none of them needs."""
    found = []
    for start in range(0, inputs["input_ids"].shape[0], batch_size):
        part = slice(start, start + batch_size)
        longest = max(1, int(inputs["attention_mask"][part].sum(dim=1).max()))
        found.append(logits_of(model, {name: values[part, :longest] for name, values in inputs.items()}))
    return torch.cat(found)


def number_of(kind: str, tokenizer: Any, *, needed_by: str) -> int:
    """The number of the tokenizer's "mask" or "pad" token.

    Raises:
        ValueError: It has none.
    """
    found: int | None = getattr(tokenizer, f"{kind}_token_id", None)
    if found is None:
        raise ValueError(f"tokenizer must have a {kind} token for {needed_by}, got {type(tokenizer).__name__} without")
    return found

"""Leaving one token out.

Letters: B batch, T tokens, N tokens that carry a score, of all texts together.
Source: Li et al. 2016, "Understanding neural networks through representation erasure" (arXiv 1612.08220).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mhex_core import _checks
from mhex_text.batch import TokenBatch
from mhex_text.capture import ungraded
from mhex_text.explainers.interface import check, finished
from mhex_text.explainers.view import aligned, all_logits, number_of, probabilities, wanted


@dataclass(frozen=True, kw_only=True)
class Occlusion:
    """How much of the target's probability is gone when a mask token stands in a token's place: signed.

    Attributes:
        batch_size: Texts, with or without a token left out, put through the model at a time.
    """

    batch_size: int = 64

    def __post_init__(self) -> None:
        _checks.positive_int("batch_size", self.batch_size)

    def __call__(self, model: nn.Module, batch: TokenBatch, targets: Tensor) -> Tensor:
        """Explain."""
        check(model, batch, targets)
        filler = number_of("mask", batch.tokenizer, needed_by="occlusion")
        texts = aligned(model, batch)
        mask, inputs = texts.batch.mask, texts.inputs
        rows, places = mask.nonzero(as_tuple=True)
        with ungraded(model), torch.no_grad():
            whole = probabilities(model, all_logits(model, inputs, self.batch_size))
            classes = wanted(targets, whole)
            before = whole.gather(1, classes[:, None]).squeeze(1)
            scores = before.new_zeros(mask.shape)
            for start in range(0, len(rows), self.batch_size):
                some, left_out = rows[start : start + self.batch_size], places[start : start + self.batch_size]
                changed = {name: values[some] for name, values in inputs.items()}
                changed["input_ids"][torch.arange(len(some), device=some.device), left_out] = filler
                after = probabilities(model, all_logits(model, changed, self.batch_size))
                scores[some, left_out] = before[some] - after.gather(1, classes[some, None]).squeeze(1)
        return finished("occlusion", texts.back(scores), batch)

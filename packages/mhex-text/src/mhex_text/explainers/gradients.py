"""Integrated gradients, as captum computes them.

Letters: B batch, T tokens.
Source: Sundararajan et al. 2017 (arXiv 1703.01365).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mhex_core import _checks
from mhex_text.batch import TokenBatch
from mhex_text.capture import logits_of, ungraded
from mhex_text.explainers.interface import check, finished, load, require
from mhex_text.explainers.view import aligned, number_of, wanted, wide

LIBRARY = "captum"


@dataclass(frozen=True, kw_only=True)
class IntegratedGradients:
    """What each token adds to the target's logit on the way from a baseline to the text: signed, channels added up.

    The way leads through word embeddings. The sum of the scores is the logit of the text less the logit of the
    baseline, up to the error of the steps. Special tokens are the same at both ends.

    Attributes:
        steps: Points on the way (Gauss-Legendre).
        baseline: What stands in place of every token at the way's beginning: "mask" or "pad".
        batch_size: Points, of all texts together, put through the model at a time.
    """

    steps: int = 32
    baseline: Literal["mask", "pad"] = "mask"
    batch_size: int = 64

    def __post_init__(self) -> None:
        _checks.positive_int("steps", self.steps)
        _checks.choice("baseline", self.baseline, ("mask", "pad"))
        _checks.positive_int("batch_size", self.batch_size)
        require(LIBRARY, needed_by="integrated-gradients", distribution="captum")

    def __call__(self, model: nn.Module, batch: TokenBatch, targets: Tensor) -> Tensor:
        """Explain."""
        check(model, batch, targets)
        library = load("captum.attr", needed_by="integrated-gradients", distribution="captum")
        filler = number_of(self.baseline, batch.tokenizer, needed_by="integrated-gradients")
        texts = aligned(model, batch)
        others = [name for name in texts.inputs if name != "input_ids"]
        classes = targets.clone().to(texts.batch.input_ids.device)

        def logits(ids: Tensor, *rest: Tensor) -> Tensor:
            return wide(logits_of(model, {"input_ids": ids, **dict(zip(others, rest, strict=True))}))

        embeddings: Any = model
        with ungraded(model):
            method = library.LayerIntegratedGradients(logits, embeddings.get_input_embeddings())
            blank = torch.where(texts.batch.mask, filler, texts.batch.input_ids)
            parts = []
            for start in range(0, len(batch), self.batch_size):
                rows = slice(start, start + self.batch_size)
                with torch.no_grad():
                    wanted(classes[rows], logits(*(values[rows] for values in texts.inputs.values())))
                parts.append(
                    method.attribute(
                        texts.batch.input_ids[rows],
                        baselines=blank[rows],
                        target=classes[rows],
                        additional_forward_args=tuple(texts.inputs[name][rows] for name in others),
                        n_steps=self.steps,
                        internal_batch_size=self.batch_size,
                    )
                    .detach()
                    .sum(dim=2)
                )
        return finished("integrated-gradients", texts.back(torch.cat(parts)), batch)

"""Explainers that read attention weights.

Letters: B batch, T tokens.
Sources: attention rollout, Abnar and Zuidema 2020 (arXiv 2005.00928); AttCAT, Qiang et al., NeurIPS 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from mhex_core import _checks
from mhex_core.attention import attcat, attention_rollout
from mhex_text.batch import TokenBatch
from mhex_text.capture import capture
from mhex_text.explainers.interface import check, finished
from mhex_text.explainers.view import aligned, wanted, wide


@dataclass(frozen=True, kw_only=True)
class AttentionRollout:
    """How much of each token reaches the end, if attention were all that mixes tokens: the same for every class.

    Of an `MHEXForSequenceClassification` it follows the layers up to the deepest block.

    Attributes:
        query: Where it is read: "cls", in the first token, as classifiers do; or "max", the most that any token gets
            of it, as in the paper's evaluation.
    """

    query: Literal["cls", "max"] = "cls"

    def __post_init__(self) -> None:
        _checks.choice("query", self.query, ("cls", "max"))

    def __call__(self, model: nn.Module, batch: TokenBatch, targets: Tensor) -> Tensor:
        """Explain."""
        check(model, batch, targets)
        texts = aligned(model, batch)
        seen = capture(model, texts.inputs, graph=False)
        wanted(targets, seen.logits)
        attentions = [wide(weights) for weights in seen.attentions]
        rolled = attention_rollout(attentions, mask=texts.batch.attention_mask)
        scores = rolled[:, 0] if self.query == "cls" else rolled.amax(dim=1)
        return finished("attention-rollout", texts.back(scores), batch)


@dataclass(frozen=True, kw_only=True)
class AttCAT:
    """Input times gradient of the target's logit in every layer, weighed by the attention a token gets: signed."""

    def __call__(self, model: nn.Module, batch: TokenBatch, targets: Tensor) -> Tensor:
        """Explain."""
        check(model, batch, targets)
        texts = aligned(model, batch)
        seen = capture(model, texts.inputs)
        gradients = seen.gradients(targets, seen.hidden)
        scores = attcat(
            [wide(layer.detach()) for layer in seen.hidden],
            [wide(layer) for layer in gradients],
            [wide(weights.detach()) for weights in seen.attentions],
            mask=texts.batch.attention_mask,
        )
        return finished("attcat", texts.back(scores), batch)

"""Explainers that read attention weights.

Letters: B batch, T tokens, H heads, L layers that are run.
Sources: attention rollout and flow, Abnar and Zuidema 2020 (arXiv 2005.00928); GMAR, Jo, Jang and Park 2025 (arXiv
2504.19414); AttCAT, Qiang et al., NeurIPS 2022; Grad-SAM, Barkan et al. 2021 (arXiv 2204.11073); the generic rule and
the attention Grad-CAM, Chefer, Gur and Wolf, ICCV 2021 (arXiv 2103.15679); attention Shapley values, Eggen,
Lysnaes-Larsen and Strumke (arXiv 2508.08966).

"The row that is read" is that of the token a prediction is read from: the first, as most classifiers do; or the mean
row of all real tokens where the classifier, or the heads of an `MHEXForSequenceClassification`, average over them. Of
the latter all methods follow the layers up to the deepest block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mhex_core import _checks
from mhex_core.attention import (
    aggregated_attention,
    attcat,
    attention_flow,
    attention_gradcam,
    attention_rollout,
    generic_relevance,
    gmar,
    grad_sam,
    shapley_values,
)
from mhex_text.batch import TokenBatch
from mhex_text.capture import Captured, capture
from mhex_text.explainers.interface import check, finished, require
from mhex_text.explainers.view import Aligned, aligned, wanted, wide

_MOST = 64  # tokens between which a flow can be computed in reasonable time


@dataclass(frozen=True, kw_only=True)
class LastAttention:
    """The row that is read in the last layer, averaged over the heads: the same for every class."""

    def __call__(self, model: nn.Module, batch: TokenBatch, targets: Tensor) -> Tensor:
        """Explain."""
        texts, seen = observed(model, batch, targets, graph=False)
        scores = row_read(wide(seen.attentions[-1]).mean(dim=1), seen)
        return finished("attention", texts.back(scores), batch)


@dataclass(frozen=True, kw_only=True)
class AttentionRollout:
    """How much of each token reaches the end, if attention were all that mixes tokens: the same for every class.

    Attributes:
        query: Where it is read: "cls", in the first token, as most classifiers do; or "max", the most that any token
            gets of it, as in the paper's evaluation.
        residual: The share of the skip connection, in [0, 1].
        start: The first layer that is rolled.
    """

    query: Literal["cls", "max"] = "cls"
    residual: float = 0.5
    start: int = 0

    def __post_init__(self) -> None:
        _checks.choice("query", self.query, ("cls", "max"))
        _checks.number("residual", self.residual, low=0, high=1)
        if isinstance(self.start, bool) or not isinstance(self.start, int):
            raise TypeError(f"start must be an int, got {type(self.start).__name__}")
        if self.start < 0:
            raise ValueError(f"start must be at least 0, got {self.start}")

    def __call__(self, model: nn.Module, batch: TokenBatch, targets: Tensor) -> Tensor:
        """Explain."""
        texts, seen = observed(model, batch, targets, graph=False)
        rolled = attention_rollout(
            _wide(seen.attentions), mask=texts.batch.attention_mask, residual=self.residual, start=self.start
        )
        scores = rolled[:, 0] if self.query == "cls" else rolled.amax(dim=1)
        return finished("attention-rollout", texts.back(scores), batch)


@dataclass(frozen=True, kw_only=True)
class AttentionFlow:
    """The most that can flow from what is read to each token through attention: the same for every class. Slow.

    A maximum flow is computed for every token, and where a mean is read from every token, too.

    Attributes:
        residual: The share of the skip connection, in [0, 1].
    """

    residual: float = 0.5

    def __post_init__(self) -> None:
        _checks.number("residual", self.residual, low=0, high=1)
        require("scipy", needed_by="attention-flow", distribution="scipy")

    def __call__(self, model: nn.Module, batch: TokenBatch, targets: Tensor) -> Tensor:
        """Explain.

        Raises:
            TypeError: An argument is of another type.
            ValueError: A text has more than 64 tokens, or an argument does not fit.
        """
        check(model, batch, targets)
        most = int((batch.attention_mask != 0).sum(dim=1).max())
        if most > _MOST:
            raise ValueError(
                f"batch must hold texts of at most {_MOST} tokens for attention-flow, got {most}: cut them with "
                "max_length, or take another method, such as attention-rollout"
            )
        texts, seen = observed(model, batch, targets, graph=False)
        sources = (seen.readout != 0).any(dim=0).nonzero().flatten().tolist()
        if not sources:  # a text of no token at all
            return finished("attention-flow", seen.readout.new_zeros(batch.input_ids.shape), batch)
        flows = attention_flow(
            _wide(seen.attentions), mask=texts.batch.attention_mask, residual=self.residual, queries=sources
        )
        scores = torch.einsum("bq,bqk->bk", seen.readout[:, sources].to(flows), flows)
        return finished("attention-flow", texts.back(scores), batch)


@dataclass(frozen=True, kw_only=True)
class GMAR:
    """Attention rollout in which each head counts by the size of the gradient at its attention.

    The heads' weights are not negative and sum to one, and attention itself looks at no class: scores of two classes
    differ by these weights alone, and so not much.

    Attributes:
        norm: Of the gradients: "l1" or "l2".
        residual: The share of the skip connection, in [0, 1]; 1/2 is the paper's alpha of 1.
    """

    norm: Literal["l1", "l2"] = "l1"
    residual: float = 0.5

    def __post_init__(self) -> None:
        _checks.choice("norm", self.norm, ("l1", "l2"))
        _checks.number("residual", self.residual, low=0, high=1)

    def __call__(self, model: nn.Module, batch: TokenBatch, targets: Tensor) -> Tensor:
        """Explain."""
        texts, seen = observed(model, batch, targets)
        gradients = seen.gradients(targets, seen.attentions)
        rolled = gmar(
            _wide(seen.attentions),
            _wide(gradients),
            norm=self.norm,
            residual=self.residual,
            mask=texts.batch.attention_mask,
        )
        return finished("gmar", texts.back(row_read(rolled, seen)), batch)


@dataclass(frozen=True, kw_only=True)
class GenericRelevance:
    """The generic rule: attention times its gradient, the positive part averaged over heads, rolled over the layers."""

    def __call__(self, model: nn.Module, batch: TokenBatch, targets: Tensor) -> Tensor:
        """Explain."""
        texts, seen = observed(model, batch, targets)
        gradients = seen.gradients(targets, seen.attentions)
        relevance = generic_relevance(_wide(seen.attentions), _wide(gradients), mask=texts.batch.attention_mask)
        return finished("generic-relevance", texts.back(row_read(relevance, seen)), batch)


@dataclass(frozen=True, kw_only=True)
class GradSAM:
    """Attention times the positive part of its gradient, averaged over layers, heads and keys, of each query."""

    def __call__(self, model: nn.Module, batch: TokenBatch, targets: Tensor) -> Tensor:
        """Explain."""
        texts, seen = observed(model, batch, targets)
        gradients = seen.gradients(targets, seen.attentions)
        scores = grad_sam(_wide(seen.attentions), _wide(gradients), mask=texts.batch.attention_mask)
        return finished("grad-sam", texts.back(scores), batch)


@dataclass(frozen=True, kw_only=True)
class AttentionGradCAM:
    """The row that is read in the last layer, heads weighed by the mean of their gradients, and rectified.

    The mean runs over the tokens that carry a score.
    """

    def __call__(self, model: nn.Module, batch: TokenBatch, targets: Tensor) -> Tensor:
        """Explain."""
        texts, seen = observed(model, batch, targets)
        (gradient,) = seen.gradients(targets, seen.attentions[-1:])
        weights, slopes = wide(seen.attentions[-1].detach()), wide(gradient)
        readout = seen.readout.to(weights)
        row = torch.einsum("bq,bhqk->bhk", readout, weights)
        # Of all queries that are read, by the chain rule, the gradient with respect to a row that they share.
        slope = torch.einsum("bq,bhqk->bhk", (readout != 0).to(readout), slopes)
        scores = attention_gradcam(row, slope, mask=texts.batch.mask)
        return finished("attention-gradcam", texts.back(scores), batch)


@dataclass(frozen=True, kw_only=True)
class AttCAT:
    """Input times gradient of the target's logit in every layer, weighed by the attention a token gets: signed."""

    def __call__(self, model: nn.Module, batch: TokenBatch, targets: Tensor) -> Tensor:
        """Explain."""
        texts, seen = observed(model, batch, targets)
        gradients = seen.gradients(targets, seen.hidden)
        scores = attcat(_wide(seen.hidden), _wide(gradients), _wide(seen.attentions), mask=texts.batch.attention_mask)
        return finished("attcat", texts.back(scores), batch)


@dataclass(frozen=True, kw_only=True)
class AttentionShapley:
    """Shapley values of tokens in a game that attention defines, by the closed form: signed.

    The players are the tokens that carry a score; special tokens do not play.

    Attributes:
        game: "mutual", what members of a coalition attend to each other; "max_mutual", of each pair the larger one; or
            "cls", what the row that is read gives them.
        gradient: Whether attention is first multiplied by the positive part of its gradient, which makes the values
            class-specific.
    """

    game: Literal["cls", "mutual", "max_mutual"] = "mutual"
    gradient: bool = True

    def __post_init__(self) -> None:
        _checks.choice("game", self.game, ("cls", "mutual", "max_mutual"))
        _checks.flag("gradient", self.gradient)

    def __call__(self, model: nn.Module, batch: TokenBatch, targets: Tensor) -> Tensor:
        """Explain."""
        texts, seen = observed(model, batch, targets, graph=self.gradient)
        gradients = _wide(seen.gradients(targets, seen.attentions)) if self.gradient else None
        matrix = aggregated_attention(_wide(seen.attentions), gradients)
        if self.game == "cls":  # an additive game: each token's value is its share of the row that is read
            scores = row_read(matrix, seen)
        else:
            scores = shapley_values(matrix, game=self.game, players=texts.batch.mask)
        return finished("attention-shapley", texts.back(scores), batch)


def observed(model: nn.Module, batch: TokenBatch, targets: Tensor, *, graph: bool = True) -> tuple[Aligned, Captured]:
    """The batch as explainers look at it, and one forward pass of it, after a look at the arguments.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The model is none that can be captured, or an argument does not fit it.
    """
    check(model, batch, targets)
    texts = aligned(model, batch)
    seen = capture(model, texts.inputs, graph=graph)
    wanted(targets, seen.logits)
    return texts, seen


def row_read(matrix: Tensor, seen: Captured) -> Tensor:
    """The rows of the tokens that the prediction is read from, in their shares: (B, T, T) to (B, T)."""
    readout = seen.readout.to(matrix)
    # Rows of padding mean nothing, and need not be numbers.
    kept = torch.where(readout.unsqueeze(2) != 0, matrix, 0.0)
    return torch.einsum("bq,bqk->bk", readout, kept)


def _wide(layers: Sequence[Tensor]) -> list[Tensor]:
    return [wide(layer.detach()) for layer in layers]

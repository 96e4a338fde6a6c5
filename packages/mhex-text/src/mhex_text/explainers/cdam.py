"""Class-discriminative attention maps, of texts.

Letters: B batch, T tokens, C channels, N rows: steps times texts.
Source: CDAM, Brocki, Binda and Chung (arXiv 2312.02364), there for vision transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mhex_core import _checks
from mhex_core.attention import cdam
from mhex_text.batch import TokenBatch
from mhex_text.capture import Captured
from mhex_text.explainers.attention import observed
from mhex_text.explainers.interface import finished
from mhex_text.explainers.view import wide

_MODES = ("vanilla", "smooth", "integrated", "integrated_complete")
_PLACES = ("block_input", "attention_input")


@dataclass(frozen=True, kw_only=True, eq=False)
class CDAM:
    """How much each token, as the last layer's attention reads it, speaks for the target's logit: signed.

    S_i = sum_c T_ic dlogit/dT_ic, T what the attention of the last layer that is run reads: in an encoder that
    normalises before attention the result of that norm, else what enters the layer. The way around attention, along the
    skip connection, is not counted: it is part of the prediction where the mean token is read. Only the last layer is
    run again, all steps of all texts in one batch.

    Attributes:
        mode: "vanilla"; "smooth", averaged over noise; "integrated", averaged over scaled inputs, as the authors'
            code does, whose scores add up to nothing in particular; "integrated_complete", ours, along a path on which
            the scores of all tokens, special ones included, add up to the logit's change from T = 0 to T.
        steps: Of all modes but "vanilla".
        noise: Its standard deviation as a share of the range of what is perturbed; None means 0.05 for "smooth" and
            none for "integrated", which are the modes that take it.
        perturb_at: Whether "smooth" and "integrated" change what enters the layer, skip connection included, or what
            its attention reads.
        seed: Of the noise, which is the same for every text.
        concept: What is explained in place of the logit: the inner product of what the classifier reads with this (C,),
            such as the mean of `Captured.features` of some texts. A classifier of transformers reads the first token
            after the encoder (some ModernBERTs the mean token), and an `MHEXForSequenceClassification` the rectified
            mean token of its deepest block. The targets then count for nothing.
        batch_size: Rows of the last layer, steps times texts, at a time.
    """

    mode: Literal["vanilla", "smooth", "integrated", "integrated_complete"] = "vanilla"
    steps: int = 50
    noise: float | None = None
    perturb_at: Literal["block_input", "attention_input"] = "block_input"
    seed: int = 0
    concept: Tensor | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        _checks.choice("mode", self.mode, _MODES)
        _checks.positive_int("steps", self.steps)
        if self.mode == "integrated" and self.steps < 2:
            raise ValueError(f"steps must be at least 2 for mode 'integrated', got {self.steps}")
        _checks.choice("perturb_at", self.perturb_at, _PLACES)
        perturbed = self.mode in ("smooth", "integrated")
        if self.perturb_at != "block_input" and not perturbed:
            raise ValueError(f"perturb_at belongs to modes 'smooth' and 'integrated', got it with {self.mode!r}")
        if self.noise is not None:
            _checks.number("noise", self.noise, low=0)
            if not perturbed:
                raise ValueError(f"noise belongs to modes 'smooth' and 'integrated', got it with {self.mode!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {type(self.seed).__name__}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.concept is not None:
            _checks.tensor("concept", self.concept, ndim=1)
        _checks.positive_int("batch_size", self.batch_size)

    def __call__(self, model: nn.Module, batch: TokenBatch, targets: Tensor) -> Tensor:
        """Explain."""
        texts, seen = observed(model, batch, targets, graph=False)
        classes = targets.to(seen.logits.device).unsqueeze(1)
        classify = seen.tail.logits
        if self.concept is not None:
            latent = self._latent(seen)
            classes = torch.zeros_like(classes)

            def classify(hidden: Tensor, attention_input: Tensor, rows: Tensor) -> Tensor:
                return (wide(seen.tail.features(hidden, attention_input, rows)) @ latent).unsqueeze(1)

        scores = cdam(
            seen.hidden[-1],
            seen.tail.normalize,
            classify,
            classes,
            mode=self.mode,
            steps=self.steps,
            noise=self.noise,
            perturb_at=self.perturb_at,
            seed=self.seed,
            rows_at_a_time=self.batch_size,
            mask=texts.batch.attention_mask,
        )
        return finished("cdam", texts.back(scores[:, 0]), batch)

    def _latent(self, seen: Captured) -> Tensor:
        assert self.concept is not None  # noqa: S101  # the caller has seen to it
        expected = tuple(seen.features.shape[1:])
        if tuple(self.concept.shape) != expected:
            raise ValueError(f"concept must have shape {expected}, got {tuple(self.concept.shape)}")
        with torch.inference_mode(mode=False):
            return self.concept.detach().clone().to(wide(seen.features))

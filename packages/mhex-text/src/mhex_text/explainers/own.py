"""The classifier's own scores, noise that looks at no model, and functions of the user's own.

Letters: B batch, T tokens, L blocks.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mhex_core import SaliencyOptions, _checks, token_saliency
from mhex_core.attention import attention_received
from mhex_core.options import Sharpness
from mhex_core.specs import import_function
from mhex_text.batch import TokenBatch
from mhex_text.capture import attention_shown, ungraded
from mhex_text.explainers.interface import check, finished
from mhex_text.explainers.view import aligned, wanted, wide


@dataclass(frozen=True, kw_only=True)
class OwnScores:
    """The scores of `MHEXForSequenceClassification.explain`.

    Attributes:
        layers: How many of the first blocks are added up, or their places among the blocks, "all", or "last".
        layer_weights: lambda_l, one number for each block that is added up; None means decay^(count - place).
        decay: See `layer_weights`; 1 counts them alike.
        attention: Whether evidence is multiplied by the attention that a token receives.
        beta: How much negative evidence counts, in [0, 1].
        tau_pos: Smallest positive sharpness that is kept; None means 1/K + 0.1.
        tau_neg: Smallest negative sharpness that is kept.
        sharpness: "hard" or "soft", see `mhex_core.adjusted_weights`.
        exponent: The power of a soft sharpness.
        rectify: Whether ReLU(A_l) is read in place of A_l. `explain` reads A_l.
    """

    layers: int | Sequence[int] | Literal["all", "last"] = 3
    layer_weights: Sequence[float] | None = None
    decay: float = 1.0
    attention: bool = False
    beta: float = 1.0
    tau_pos: float | None = None
    tau_neg: float = 0.1
    sharpness: Sharpness = "hard"
    exponent: float = 1.0
    rectify: bool = False

    def __post_init__(self) -> None:
        # Say now, and not after an hour of other explainers, what is wrong.
        if isinstance(self.layers, str):
            _checks.choice("layers", self.layers, ("all", "last"))
        elif isinstance(self.layers, int):
            _checks.positive_int("layers", self.layers)
        SaliencyOptions(**self._options(), layer_weights=self.layer_weights, decay=self.decay)
        _checks.flag("attention", self.attention)
        _checks.flag("rectify", self.rectify)

    def __call__(self, model: nn.Module, batch: TokenBatch, targets: Tensor) -> Tensor:
        """Explain."""
        check(model, batch, targets)
        from mhex_text.modeling import MHEXForSequenceClassification

        if not isinstance(model, MHEXForSequenceClassification):
            raise TypeError(
                f"model must be an MHEXForSequenceClassification for its own scores, got {type(model).__name__}; "
                "attach blocks with MHEXForSequenceClassification.from_encoder and train them, or choose another "
                "explainer"
            )
        texts = aligned(model, batch)
        with ungraded(model), torch.no_grad():
            showing: AbstractContextManager[dict[int, Tensor]] = (
                attention_shown(model) if self.attention else nullcontext({})
            )
            with showing as seen:
                output: Any = model(**texts.inputs, output_activations=True, return_dict=True)
            activations = [layer.relu() if self.rectify else layer for layer in output.activations]
            scores = token_saliency(
                activations,
                model.equivalent_matrices(),
                wanted(targets, output.logits),
                mask=texts.batch.mask,
                layers=[len(activations) - 1] if self.layers == "last" else self.layers,
                layer_weights=self.layer_weights,
                decay=self.decay,
                **self._options(),
            )
            if self.attention:
                weights = [wide(seen[index]) for index in sorted(seen)]
                scores = scores * attention_received(weights, mask=texts.batch.attention_mask)
        return finished("mhex", texts.back(scores), batch)

    def _options(self) -> dict[str, Any]:
        return {
            "beta": self.beta,
            "tau_pos": self.tau_pos,
            "tau_neg": self.tau_neg,
            "sharpness": self.sharpness,
            "exponent": self.exponent,
        }


@dataclass(frozen=True, kw_only=True)
class RandomScores:
    """Uniform noise in [0, 1), the same for the same text whatever batch it comes in.

    Attributes:
        seed: Another seed, other noise.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {type(self.seed).__name__}")

    def __call__(self, model: nn.Module, batch: TokenBatch, targets: Tensor) -> Tensor:
        """Make noise."""
        check(model, batch, targets)
        mask = batch.mask.cpu()
        scores = torch.zeros(mask.shape)
        for text, row, places in zip(batch.texts, scores, mask, strict=True):
            generator = torch.Generator().manual_seed(self._seed_of(text))
            row[places] = torch.rand(int(places.sum()), generator=generator)
        return finished("random", scores, batch)

    def _seed_of(self, text: Sequence[str]) -> int:
        return zlib.crc32(repr(text).encode("utf-8", "backslashreplace"), zlib.crc32(str(self.seed).encode()))


@dataclass(frozen=True)
class UserFunction:
    """An explainer the user wrote, with its answer checked.

    Attributes:
        name: "module:function".
        function: What it names.
    """

    name: str
    function: Callable[[nn.Module, TokenBatch, Tensor], Any]

    @classmethod
    def named(cls, name: str) -> UserFunction:
        """Import "module:function".

        Raises:
            TypeError: It is no function.
            ValueError: There is no such module or function.
        """
        return cls(name, import_function(name))

    def __call__(self, model: nn.Module, batch: TokenBatch, targets: Tensor) -> Tensor:
        """Explain."""
        check(model, batch, targets)
        return finished(self.name, self.function(model, batch, targets), batch)

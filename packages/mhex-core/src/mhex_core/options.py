"""The settings of a saliency map, checked once and frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mhex_core import _checks

Sharpness = Literal["hard", "soft"]


@dataclass(frozen=True, kw_only=True)
class SaliencyOptions:
    """How equivalent matrices and activations become one map.

    Attributes:
        beta: How much negative evidence counts, in [0, 1].
        tau_pos: Smallest positive sharpness that is kept; None means 1/K + 0.1 (0 for K = 1, where every channel is as
            specific as it can be and a threshold above 1 would leave nothing).
        tau_neg: Smallest negative sharpness that is kept.
        sharpness: "hard" or "soft".
        exponent: The power of a soft sharpness, at least 0.
        layer_weights: lambda_l, one number per layer; None means decay^(L - l).
        decay: In [0, 1]; 1 weighs all layers alike. Not used when `layer_weights` is given.
        normalize: Whether each map is brought to [0, 1] by its own minimum and maximum.
        floor: A quantile of each map, in [0, 1): what lies below becomes 0, so that a map does not cover everything.
            0 leaves maps as they are. (Not in the paper; token scores have no floor.)
        rectify: Whether saliency reads ReLU(A_l), what a convolutional network hands on to its next layer. False reads
            A_l as it is, which is the paper's method; true was found to explain better. (Tokens are never rectified.)
    """

    beta: float = 0.0
    tau_pos: float | None = None
    tau_neg: float = 0.1
    sharpness: Sharpness = "hard"
    exponent: float = 1.0
    layer_weights: Sequence[float] | Tensor | None = None
    decay: float = 0.9
    normalize: bool = True
    floor: float = 0.0
    rectify: bool = True

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "beta", _checks.number("beta", self.beta, low=0, high=1))
        if self.tau_pos is not None:
            set_field(self, "tau_pos", _checks.number("tau_pos", self.tau_pos, low=0))
        set_field(self, "tau_neg", _checks.number("tau_neg", self.tau_neg, low=0))
        _checks.choice("sharpness", self.sharpness, ("hard", "soft"))
        set_field(self, "exponent", _checks.number("exponent", self.exponent, low=0))
        if self.layer_weights is not None:
            set_field(self, "layer_weights", _checks.numbers("layer_weights", self.layer_weights))
        set_field(self, "decay", _checks.number("decay", self.decay, low=0, high=1))
        _checks.flag("normalize", self.normalize)
        _checks.flag("rectify", self.rectify)
        set_field(self, "floor", _checks.number("floor", self.floor, low=0, high=1))
        if self.floor == 1:
            raise ValueError("floor must be below 1, got 1, which would leave nothing of a map")

    def positive_threshold(self, *, num_classes: int) -> float:
        """tau_pos, or what None stands for with K classes."""
        if self.tau_pos is not None:
            return self.tau_pos
        return 1 / num_classes + 0.1 if num_classes > 1 else 0.0

    def weights_of(self, layers: int) -> tuple[float, ...]:
        """lambda_1 .. lambda_L.

        Raises:
            ValueError: `layer_weights` has not one number per layer.
        """
        if self.layer_weights is None:
            return tuple(self.decay ** (layers - 1 - index) for index in range(layers))
        weights = tuple(float(weight) for weight in self.layer_weights)
        if len(weights) != layers:
            raise ValueError(f"layer_weights must hold one number per layer ({layers}), got {len(weights)}")
        return weights

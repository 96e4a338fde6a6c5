"""What explanations are made of: tokens, words, and the settings that all texts of one explanation share.

Letters: K classes, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from mhex_core import _checks
from mhex_text.tokens import WordScore

Layers = int | Sequence[int] | Literal["all"]


@dataclass(frozen=True, slots=True)
class Token:
    """One token that stands for something in a text. Tokens the tokenizer added ([CLS], [SEP], padding) are left out.

    Attributes:
        text: What it covers of the text, as it stands there. (Not the entry in the vocabulary.)
        start: The position of its first character in its text; all positions count Unicode code points.
        end: The position after its last character.
        part: Which text it is of: 0, or 1 for the second of a pair.
        word: The number of its word within its text, as the tokenizer counts.
        positive: L numbers, each layer's evidence for the target, before beta and the layer weights.
        negative: L numbers, the same for evidence against it.
        scores: L numbers, each layer's share of the score: lambda_l (positive + beta negative).
    """

    text: str
    start: int
    end: int
    part: int
    word: int
    positive: tuple[float, ...]
    negative: tuple[float, ...]
    scores: tuple[float, ...]

    @property
    def score(self) -> float:
        """The sum over the layers, in the units of the heads' logits."""
        return math.fsum(self.scores)


@dataclass(frozen=True)
class Word(WordScore):
    """The score of one word: the sum over its tokens.

    Attributes:
        part: Which text it is of: 0, or 1 for the second of a pair.
        scores: L numbers, each layer's share of the score.
    """

    part: int
    scores: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ExplanationSettings:
    """What all texts of one explanation share.

    Attributes:
        layer_names: L names, shallow to deep.
        layer_weights: lambda_l, L numbers; 0 for a layer that is not added up.
        beta: How much negative evidence counts, in [0, 1].
        class_names: K names, or empty where none are known.

    Raises:
        TypeError: A value is of another type.
        ValueError: beta is not in [0, 1], a weight is not finite, or there is not one weight per layer.
    """

    layer_names: tuple[str, ...]
    layer_weights: tuple[float, ...]
    beta: float = 0.0
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        for name in ("layer_names", "class_names"):
            set_field(self, name, as_names(name, getattr(self, name)))
        set_field(self, "layer_weights", _checks.numbers("layer_weights", self.layer_weights))
        set_field(self, "beta", _checks.number("beta", self.beta, low=0, high=1))
        if not self.layer_names:
            raise ValueError("layer_names must hold at least one name, got none")
        if len(self.layer_weights) != len(self.layer_names):
            raise ValueError(
                f"layer_weights must hold one number per layer ({len(self.layer_names)}), got {len(self.layer_weights)}"
            )

    def label(self, index: int) -> str:
        """The name of a class, or "class 3" where names are not known."""
        return self.class_names[index] if self.class_names else f"class {index}"

    def reweighted(
        self, *, beta: float | None = None, layers: Layers | None = None, layer_weights: Sequence[float] | None = None
    ) -> Self:
        """The same with another beta or other layer weights; the arguments are those of `Explanation.reweighted`."""
        count = len(self.layer_names)
        if layers is None and layer_weights is None:
            weights = self.layer_weights
        else:
            weights = spread_weights("all" if layers is None else layers, layer_weights, count=count)
        return replace(self, beta=self.beta if beta is None else beta, layer_weights=weights)


def weighed(
    positive: Sequence[float], negative: Sequence[float], weights: Sequence[float], beta: float
) -> tuple[float, ...]:
    """lambda_l (p_l + beta n_l) of one token."""
    return tuple(
        weight * (plus + beta * minus) for plus, minus, weight in zip(positive, negative, weights, strict=True)
    )


def spread_weights(
    layers: Layers, layer_weights: Sequence[float] | None, *, count: int, decay: float = 1.0
) -> tuple[float, ...]:
    """One weight for each of all layers, 0 for those that are not chosen."""
    chosen = _checks.chosen_layers(layers, count)
    if layer_weights is None:
        share = _checks.number("decay", decay, low=0, high=1)
        given = tuple(share ** (len(chosen) - 1 - place) for place in range(len(chosen)))
    else:
        given = _checks.numbers("layer_weights", layer_weights)
        if len(given) != len(chosen):
            raise ValueError(f"layer_weights must hold one number per layer ({len(chosen)}), got {len(given)}")
    weights = [0.0] * count
    for index, weight in zip(chosen, given, strict=True):
        weights[index] += weight
    return tuple(weights)


def as_tuple(name: str, value: object) -> tuple[Any, ...]:
    """Return a sequence other than a string as a tuple."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence, got {type(value).__name__}")
    return tuple(value)


def as_names(name: str, value: object) -> tuple[str, ...]:
    """Return a sequence of strings as a tuple."""
    checked: list[str] = []
    for index, item in enumerate(as_tuple(name, value)):
        if not isinstance(item, str):
            raise TypeError(f"{name}[{index}] must be a str, got {type(item).__name__}")
        # Half of a surrogate pair is no character, and no file could hold it.
        if any("\ud800" <= character <= "\udfff" for character in item):
            raise ValueError(f"{name}[{index}] must hold whole characters, got half of a surrogate pair in {item!r}")
        checked.append(item)
    return tuple(checked)


def whole_number(name: str, value: object) -> int:
    """Return `value` if it is an int."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return value

"""What a comparison of texts can measure: each metric by its name, with what it needs and which way is better.

Letters: B batch, T tokens, K classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mhex_core import _checks
from mhex_core.metrics import ERASER_FRACTIONS, aopc, tokens
from mhex_core.specs import check_options, parse_spec
from mhex_text import plausibility


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """What the metrics of one batch are computed from.

    Attributes:
        predict: The judge, (B, T) tokens to (B, K) probabilities.
        tokens: int64 (B, T).
        mask: bool (B, T), the tokens that carry a score.
        scores: float32 (B, T), as the method gives them.
        target: int64 (B,), the class explained.
        replacement: The token that stands for one that is hidden; None where no metric hides any.
        rationale: bool (B, T), the tokens people marked; None where nobody did.
    """

    predict: Callable[[Tensor], Tensor]
    tokens: Tensor
    mask: Tensor
    scores: Tensor
    target: Tensor
    replacement: int | None
    rationale: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of a comparison.

    Attributes:
        title: What tables call it.
        function: Of a `Sample`, and its options by name.
        higher_is_better: Which way is better.
        needs_rationale: Whether it compares with what people marked; the others hide tokens from a judge.
    """

    title: str
    function: Callable[..., Tensor]
    higher_is_better: bool = True
    needs_rationale: bool = False


def _avg_drop(sample: Sample, *, fraction: float = 0.1) -> Tensor:
    return tokens.token_avg_drop(*_judged(sample), **_hiding(sample), fraction=fraction)


def _comprehensiveness(sample: Sample, *, fraction: float | None = None) -> Tensor:
    shares = ERASER_FRACTIONS if fraction is None else (fraction,)
    return aopc(tokens.comprehensiveness(*_judged(sample), **_hiding(sample), fractions=shares))


def _sufficiency(sample: Sample, *, fraction: float | None = None) -> Tensor:
    shares = ERASER_FRACTIONS if fraction is None else (fraction,)
    return aopc(tokens.sufficiency(*_judged(sample), **_hiding(sample), fractions=shares))


def _token_f1(sample: Sample, *, fraction: float | None = None) -> Tensor:
    return plausibility.token_f1(sample.scores, _marked(sample), sample.mask, fraction=fraction)


def _token_iou(sample: Sample, *, fraction: float | None = None) -> Tensor:
    return plausibility.token_iou(sample.scores, _marked(sample), sample.mask, fraction=fraction)


def _token_auprc(sample: Sample) -> Tensor:
    return plausibility.token_auprc(sample.scores, _marked(sample), sample.mask)


def _judged(sample: Sample) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor, Tensor]:
    return sample.predict, sample.tokens, sample.scores, sample.target


def _hiding(sample: Sample) -> dict[str, Any]:
    return {"replacement": sample.replacement, "mask": sample.mask}


def _marked(sample: Sample) -> Tensor:
    if sample.rationale is None:
        raise ValueError("metrics token_f1, token_iou and token_auprc need rationales, and these texts have none")
    return sample.rationale


SCORES: dict[str, Score] = {
    "avg_drop": Score(title="AVG Drop", function=_avg_drop),
    "comprehensiveness": Score(title="comprehensiveness", function=_comprehensiveness),
    "sufficiency": Score(title="sufficiency", function=_sufficiency, higher_is_better=False),
    "token_f1": Score(title="token F1", function=_token_f1, needs_rationale=True),
    "token_iou": Score(title="token IoU", function=_token_iou, needs_rationale=True),
    "token_auprc": Score(title="AUPRC", function=_token_auprc, needs_rationale=True),
}
"""The known metrics. Without a fraction, comprehensiveness and sufficiency are the mean over ERASER's, and token F1 and
IoU take as many tokens as people marked."""

DEFAULT_METRICS = ("avg_drop", "comprehensiveness", "sufficiency")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A metric with its options.

    Attributes:
        name: The column it fills, the text it was asked for by: "avg_drop", "avg_drop:fraction=0.2".
        score: Which metric.
        options: Of its function.
    """

    name: str
    score: Score
    options: Mapping[str, Any]

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.score.title + (f" ({self.name.partition(':')[2]})" if self.options else "")

    def __call__(self, sample: Sample) -> Tensor:
        """(B,), one value per text; NaN where it is undefined."""
        return self.score.function(sample, **self.options)


def parse_metric(text: str) -> Measure:
    """A metric from its name and, after a colon, options: "sufficiency", "comprehensiveness:fraction=0.2".

    Raises:
        TypeError: The text is none, or an option is of another type.
        ValueError: No such metric, no such option, or an option does not fit.
    """
    if not isinstance(text, str):
        raise TypeError(f"metrics must be texts, got {type(text).__name__}")
    name, options = parse_spec(text, known=SCORES)
    if name not in SCORES:
        raise ValueError(f"metric must be one of {', '.join(SCORES)}, got {name!r}")
    score = SCORES[name]
    parameters = inspect.signature(score.function).parameters.values()
    check_options(name, options, [one.name for one in parameters if one.kind is one.KEYWORD_ONLY])
    if "fraction" in options:
        _checks.number("fraction", options["fraction"], low=0, high=1)
    return Measure(name=text, score=score, options=options)

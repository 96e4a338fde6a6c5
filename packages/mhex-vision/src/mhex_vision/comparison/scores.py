"""What a comparison can measure: each metric by its name, with what it needs and which way is better.

Letters: B batch, H x W map size, S steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from mhex_core.specs import read_value
from mhex_vision.metrics import attribution, faithfulness, localization, logits, specificity
from mhex_vision.metrics.judge import Judge

Input = Literal["saliency", "attribution", "masks", "map", "two classes"]
OtherClass = Literal["runner-up", "least"]
CURVES: tuple[Literal["insertion", "deletion"], ...] = ("insertion", "deletion")


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of a comparison.

    Attributes:
        title: What tables call it.
        function: Of (judge, images, maps, target), of (maps, masks), of (maps), or of (maps, maps of another class).
        reads: "saliency", maps in [0, 1]; "attribution", maps as the method gives them; "masks", saliency beside masks;
            "map", maps as the method gives them, without a judge; "two classes", those beside maps of another class.
        higher_is_better: Which way is better.
        knows_probability: Whether the function can be told the judge's belief in the untouched images.
        other: Which other class, if one is needed: of all but the target, that which the explained network finds most
            probable ("runner-up") or least probable ("least").
    """

    title: str
    function: Callable[..., Tensor]
    reads: Input
    higher_is_better: bool = True
    knows_probability: bool = False
    other: OtherClass | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """What the metrics of one batch are computed from.

    Attributes:
        judge: The judge.
        images: (B, 3, H, W), normalised for the judge.
        target: int64 (B,).
        probability: (B,), the judge's belief in the untouched images.
        attribution: (B, H, W), maps as the method gives them, at the size of `images`.
        saliency: (B, H, W), the same in [0, 1].
        masks: bool (B, H, W), or None.
        maps: (B, h, w), maps as the method gives them, at the size of the images it was given.
        others: The same of other classes, as far as a metric needs them.
    """

    judge: Judge
    images: Tensor
    target: Tensor
    probability: Tensor
    attribution: Tensor
    saliency: Tensor
    masks: Tensor | None
    maps: Tensor
    others: Mapping[OtherClass, Tensor]


SCORES: dict[str, Score] = {
    "avg_drop": Score(title="AVG Drop", function=faithfulness.avg_drop, reads="saliency", knows_probability=True),
    "sad": Score(title="SAD", function=faithfulness.sad, reads="saliency", knows_probability=True),
    "ead": Score(title="EAD", function=faithfulness.ead, reads="saliency", knows_probability=True),
    "area_drop": Score(
        title="area-matched drop", function=faithfulness.area_drop, reads="attribution", knows_probability=True
    ),
    "confidence_increase": Score(
        title="confidence increase",
        function=faithfulness.confidence_increase,
        reads="saliency",
        knows_probability=True,
    ),
    "insertion": Score(title="insertion AUC", function=faithfulness.insertion, reads="attribution"),
    "deletion": Score(
        title="deletion AUC", function=faithfulness.deletion, reads="attribution", higher_is_better=False
    ),
    "road": Score(title="ROAD", function=faithfulness.road, reads="attribution"),
    "infidelity": Score(
        title="infidelity", function=attribution.infidelity, reads="attribution", higher_is_better=False
    ),
    "sensitivity_n": Score(title="sensitivity-n", function=attribution.sensitivity_n, reads="attribution"),
    "completeness": Score(
        title="completeness gap", function=attribution.completeness, reads="attribution", higher_is_better=False
    ),
    "fidelity": Score(title="fidelity (LIF - MIF)", function=logits.fidelity, reads="attribution"),
    "box_sensitivity": Score(title="box sensitivity", function=logits.box_sensitivity, reads="attribution"),
    "compactness": Score(title="compactness", function=specificity.compactness, reads="map"),
    "class_sensitivity": Score(
        title="similarity to runner-up",
        function=specificity.class_sensitivity,
        reads="two classes",
        higher_is_better=False,
        other="runner-up",
    ),
    "class_sensitivity_least": Score(
        title="similarity to least likely",
        function=specificity.class_sensitivity,
        reads="two classes",
        higher_is_better=False,
        other="least",
    ),
    "pointing": Score(title="pointing game", function=localization.pointing_game, reads="masks"),
    "mass_inside": Score(title="mass inside", function=localization.mass_inside, reads="masks"),
    "iou": Score(title="IoU", function=localization.mask_iou, reads="masks"),
}

DEFAULT_METRICS = ("sad", "avg_drop", "ead", "area_drop", "insertion", "deletion")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A metric with its options.

    Attributes:
        name: The column it fills, the text it was asked for by: "sad", "area_drop:area=0.1".
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

    @property
    def curve(self) -> Literal["insertion", "deletion"] | None:
        """Which curve it is the area of, if it is one."""
        return next((kind for kind in CURVES if self.score is SCORES[kind]), None)

    def __call__(self, sample: Sample) -> tuple[Tensor, Tensor | None]:
        """(B,), one value per image; and (B, S + 1), the curve it is the area of, where it is one."""
        if self.score.reads == "masks":
            if sample.masks is None:
                raise ValueError(f"metric {self.name!r} needs masks, and these images have none")
            return self.score.function(sample.saliency, sample.masks, **self.options), None
        if self.score.reads == "map":
            return self.score.function(sample.maps, **self.options), None
        if self.score.other is not None:
            return self.score.function(sample.maps, sample.others[self.score.other], **self.options), None
        maps = sample.saliency if self.score.reads == "saliency" else sample.attribution
        if self.curve is not None:
            curve = faithfulness.perturbation_curve(
                sample.judge, sample.images, maps, sample.target, kind=self.curve, **self.options
            )
            return curve.auc, curve.probabilities
        known = {"probability": sample.probability} if self.score.knows_probability else {}
        return self.score.function(sample.judge, sample.images, maps, sample.target, **known, **self.options), None


def parse_metric(text: str) -> Measure:
    """A metric from its name and, after a colon, options: "sad", "deletion:steps=32,baseline=mean".

    Raises:
        ValueError: No such metric, or no such option.
    """
    if not isinstance(text, str):
        raise TypeError(f"metrics must be texts, got {type(text).__name__}")
    name, _, tail = text.partition(":")
    if name not in SCORES:
        raise ValueError(f"metric must be one of {', '.join(SCORES)}, got {name!r}")
    score = SCORES[name]
    known = [
        parameter.name
        for parameter in inspect.signature(score.function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "probability"
    ]
    options: dict[str, Any] = {}
    for part in tail.split(",") if tail else []:
        key, equals, value = part.partition("=")
        if key not in known or not equals:
            listed = ", ".join(known) or "none"
            raise ValueError(f"options of metric {name!r} must be NAME=VALUE with a name among: {listed}; got {part!r}")
        options[key] = read_value(value)
    return Measure(name=text, score=score, options=options)

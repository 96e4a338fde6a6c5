"""Does the judge lose the class when what an explanation points at is taken away, and see it when that is all there is?

Every function takes a batch and gives one value per image; their means over a data set are the `torchmetrics` in
`mhex_vision.metrics.modules`. The judge should be another network than the one explained, so that no method is judged
by its own model. `probability` saves a forward pass where the judge's belief in the untouched images is known.

Letters: B batch, H x W image size, S steps, F fractions.
Sources: Sun and Liò, "Multi-Head Explainer" (arXiv 2501.01311), metrics, for AVG Drop, SAD and EAD; increase in
confidence, Chattopadhay et al. 2018 (arXiv 1710.11063); insertion and deletion, Petsiuk et al. 2018 (arXiv 1806.07421);
ROAD, Rong et al. 2022 (arXiv 2202.00449).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mhex_core import _checks
from mhex_core.metrics import curve_area, relative_drop
from mhex_vision.metrics.judge import Judge, as_judge, check_maps
from mhex_vision.metrics.perturbation import Baseline, baseline_of, impute, pixel_ranks, replace_pixels, top_pixels

ROAD_FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)


def avg_drop(
    judge: Judge | nn.Module,
    images: Tensor,
    saliency: Tensor,
    target: Tensor,
    *,
    threshold: float = 0.5,
    probability: Tensor | None = None,
) -> Tensor:
    """AVG Drop: max(0, (p - p') / p), p' on the image with the pixels of saliency above the threshold set to 0.

    A wide map takes more away and so scores higher, whatever it points at; see `area_drop`.

    Args:
        judge: The network whose belief counts.
        images: (B, 3, H, W), normalised as the judge expects; 0 is in that space.
        saliency: (B, H, W) in [0, 1].
        target: int64 (B,), the true classes.
        threshold: In [0, 1].
        probability: p, (B,), where it is known already.

    Returns:
        (B,) in [0, 1], higher is better.
    """
    images, saliency = _check_unit(images, saliency)
    _checks.number("threshold", threshold, low=0, high=1)
    without = replace_pixels(images, saliency > threshold, baseline_of(images, "blank"))
    return _drop(judge, images, without, target, probability)


def sad(
    judge: Judge | nn.Module, images: Tensor, saliency: Tensor, target: Tensor, *, probability: Tensor | None = None
) -> Tensor:
    """Soft AVG Drop: the same drop on x (1 - S) + mean(x) S, the mean per image and channel.

    Args:
        judge: See `avg_drop`.
        images: See `avg_drop`.
        saliency: See `avg_drop`.
        target: See `avg_drop`.
        probability: See `avg_drop`.

    Returns:
        (B,) in [0, 1], higher is better.
    """
    images, saliency = _check_unit(images, saliency)
    soft = saliency.to(images.dtype).unsqueeze(1)
    return _drop(judge, images, torch.lerp(images, baseline_of(images, "mean"), soft), target, probability)


def ead(
    judge: Judge | nn.Module,
    images: Tensor,
    saliency: Tensor,
    target: Tensor,
    *,
    threshold: float = 0.5,
    area_threshold: float = 0.2,
    probability: Tensor | None = None,
) -> Tensor:
    """Effective AVG Drop: AVG Drop times f(a), a the share of pixels above `area_threshold`.

    f(a) = 5 a / (1 + 256 a^5) is 1 at its maximum, a = 0.25, and small for maps that cover nothing or everything.

    Args:
        judge: See `avg_drop`.
        images: See `avg_drop`.
        saliency: See `avg_drop`.
        target: See `avg_drop`.
        threshold: Of the drop.
        area_threshold: Of the area.
        probability: See `avg_drop`.

    Returns:
        (B,) in [0, 1], higher is better.
    """
    drop = avg_drop(judge, images, saliency, target, threshold=threshold, probability=probability)
    _checks.number("area_threshold", area_threshold, low=0, high=1)
    area = (saliency.to(drop.device) > area_threshold).to(drop.dtype).mean(dim=(1, 2))
    return drop * 5 * area / (1 + 256 * area**5)


def area_drop(
    judge: Judge | nn.Module,
    images: Tensor,
    saliency: Tensor,
    target: Tensor,
    *,
    area: float = 0.25,
    baseline: Baseline = "mean",
    probability: Tensor | None = None,
) -> Tensor:
    """Area-matched drop: the same share of pixels goes for every method, those of the highest saliency.

    Args:
        judge: See `avg_drop`.
        images: See `avg_drop`.
        saliency: (B, H, W); only its order counts.
        target: See `avg_drop`.
        area: The share, in [0, 1].
        baseline: What stands where pixels are gone.
        probability: See `avg_drop`.

    Returns:
        (B,) in [0, 1], higher is better.
    """
    images, saliency = check_maps(images, saliency)
    without = replace_pixels(images, top_pixels(saliency, area), baseline_of(images, baseline))
    return _drop(judge, images, without, target, probability)


def confidence_increase(
    judge: Judge | nn.Module, images: Tensor, saliency: Tensor, target: Tensor, *, probability: Tensor | None = None
) -> Tensor:
    """Increase in confidence: whether x S, the image under its own map, convinces the judge more than x.

    Args:
        judge: See `avg_drop`.
        images: See `avg_drop`.
        saliency: See `avg_drop`.
        target: See `avg_drop`.
        probability: See `avg_drop`.

    Returns:
        (B,), 1 where it does and 0 elsewhere; higher is better.
    """
    images, saliency = _check_unit(images, saliency)
    judge = as_judge(judge)
    before = _before(judge, images, target, probability)
    after = judge.probability(images * saliency.to(images.dtype).unsqueeze(1), target)
    return (after > before).to(after.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """The judge's belief while pixels go or come.

    Attributes:
        fractions: (S + 1,), the share of pixels changed, from 0 to 1.
        probabilities: (B, S + 1).
    """

    fractions: Tensor
    probabilities: Tensor

    @property
    def auc(self) -> Tensor:
        """Area under each curve: (B,) in [0, 1]."""
        return curve_area(self.probabilities, self.fractions)


def perturbation_curve(
    judge: Judge | nn.Module,
    images: Tensor,
    saliency: Tensor,
    target: Tensor,
    *,
    kind: Literal["insertion", "deletion"],
    steps: int = 16,
    baseline: Baseline | None = None,
) -> Curve:
    """The judge's belief while pixels are revealed on a baseline, or removed to it, in order of falling saliency.

    Args:
        judge: See `avg_drop`.
        images: See `avg_drop`.
        saliency: (B, H, W); only its order counts.
        target: See `avg_drop`.
        kind: "insertion" begins with the baseline and ends with the image, "deletion" the other way round.
        steps: S, into how many nearly equal parts the pixels are put.
        baseline: None means "blur" for insertion (on a blank image any first pixels are a strange sight) and "blank"
            for deletion, as in the source.
    """
    images, saliency = check_maps(images, saliency)
    _checks.choice("kind", kind, ("insertion", "deletion"))
    _checks.positive_int("steps", steps)
    judge = as_judge(judge)
    pixels = saliency.shape[1] * saliency.shape[2]
    if steps > pixels:
        raise ValueError(f"steps must be at most {pixels}, the number of pixels, got {steps}")
    chosen: Baseline = baseline if baseline is not None else ("blur" if kind == "insertion" else "blank")
    ground = baseline_of(images, chosen)
    start, end = (ground, images) if kind == "insertion" else (images, ground)
    ranks = pixel_ranks(saliency)
    counts = [round(step * pixels / steps) for step in range(steps + 1)]
    beliefs = [judge.probability(replace_pixels(start, ranks < count, end), target) for count in counts]
    fractions = torch.tensor(counts, dtype=beliefs[0].dtype, device=beliefs[0].device) / pixels
    return Curve(fractions=fractions, probabilities=torch.stack(beliefs, dim=1))


def insertion(
    judge: Judge | nn.Module,
    images: Tensor,
    saliency: Tensor,
    target: Tensor,
    *,
    steps: int = 16,
    baseline: Baseline = "blur",
) -> Tensor:
    """Area under the insertion curve, see `perturbation_curve`: (B,) in [0, 1], higher is better."""
    curve = perturbation_curve(judge, images, saliency, target, kind="insertion", steps=steps, baseline=baseline)
    return curve.auc


def deletion(
    judge: Judge | nn.Module,
    images: Tensor,
    saliency: Tensor,
    target: Tensor,
    *,
    steps: int = 16,
    baseline: Baseline = "blank",
) -> Tensor:
    """Area under the deletion curve, see `perturbation_curve`: (B,) in [0, 1], lower is better."""
    return perturbation_curve(judge, images, saliency, target, kind="deletion", steps=steps, baseline=baseline).auc


def road_curve(
    judge: Judge | nn.Module,
    images: Tensor,
    saliency: Tensor,
    target: Tensor,
    *,
    order: Literal["most", "least"] = "most",
    fractions: Sequence[float] = ROAD_FRACTIONS,
    noise: float = 0.01,
    seed: int = 0,
) -> Tensor:
    """The judge's belief once a share of the pixels was filled in from their neighbours.

    Args:
        judge: See `avg_drop`.
        images: See `avg_drop`.
        saliency: (B, H, W); only its order counts.
        target: See `avg_drop`.
        order: Whether the "most" or the "least" relevant pixels go first.
        fractions: F shares of the pixels, each in [0, 1).
        noise: See `impute`.
        seed: See `impute`.

    Returns:
        (B, F), the probability of the target.
    """
    images, saliency = check_maps(images, saliency)
    _checks.choice("order", order, ("most", "least"))
    shares = _checks.numbers("fractions", fractions, low=0)
    if not shares or max(shares) >= 1:
        raise ValueError(f"fractions must be one or more numbers in [0, 1), got {fractions!r}")
    judge = as_judge(judge)
    relevance = saliency if order == "most" else -saliency
    beliefs = []
    for share in shares:
        filled = impute(images, top_pixels(relevance, share), noise=noise, seed=seed)
        beliefs.append(judge.probability(filled, target))
    return torch.stack(beliefs, dim=1)


def road(
    judge: Judge | nn.Module,
    images: Tensor,
    saliency: Tensor,
    target: Tensor,
    *,
    fractions: Sequence[float] = ROAD_FRACTIONS,
    noise: float = 0.01,
    seed: int = 0,
) -> Tensor:
    """ROAD in one number: half the mean gap between what is left without the least and without the most relevant.

    Args:
        judge: See `avg_drop`.
        images: See `avg_drop`.
        saliency: (B, H, W); only its order counts.
        target: See `avg_drop`.
        fractions: See `road_curve`.
        noise: See `impute`.
        seed: See `impute`.

    Returns:
        (B,) in [-0.5, 0.5], higher is better; a random order gives 0 on average.
    """
    least, most = (
        road_curve(judge, images, saliency, target, order=order, fractions=fractions, noise=noise, seed=seed)
        for order in ("least", "most")
    )
    return (least - most).mean(dim=1) / 2


def _drop(
    judge: Judge | nn.Module, images: Tensor, without: Tensor, target: Tensor, probability: Tensor | None
) -> Tensor:
    judge = as_judge(judge)
    return relative_drop(_before(judge, images, target, probability), judge.probability(without, target))


def _before(judge: Judge, images: Tensor, target: Tensor, probability: Tensor | None) -> Tensor:
    if probability is None:
        return judge.probability(images, target)
    probability = _checks.tensor("probability", probability, ndim=1)
    if probability.shape[0] != images.shape[0]:
        raise ValueError(f"probability must have shape ({images.shape[0]},), got {tuple(probability.shape)}")
    return probability


def _check_unit(images: Tensor, saliency: Tensor) -> tuple[Tensor, Tensor]:
    images, saliency = check_maps(images, saliency)
    if saliency.numel():
        low, high = (float(extreme) for extreme in saliency.aminmax())
        if low < 0 or high > 1:
            raise ValueError(
                f"saliency must lie in [0, 1], got values from {low:g} to {high:g}; mhex_core.metrics.min_max brings "
                "each map there"
            )
    return images, saliency

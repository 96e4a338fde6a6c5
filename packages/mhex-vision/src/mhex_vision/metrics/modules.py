"""The metrics as `torchmetrics.Metric`s: means over a data set, right under data parallelism.

What travels between processes is a sum and a count, so that the mean is that over all images however they were shared
out. A value that is not defined (NaN: a correlation without spread) is left out and not counted.

Letters: B batch, H x W image size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from mhex_vision.metrics import attribution, faithfulness, localization, logits, specificity
from mhex_vision.metrics.judge import Judge, as_judge


class _Mean(Metric):
    """The mean of one value per image."""

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """The mean over all images seen, by all processes: float64 (); NaN where there were none."""
        return self.total / self.count

    def _add(self, values: Tensor) -> None:
        defined = ~values.isnan()
        self.total += torch.where(defined, values, 0).sum(dtype=torch.float64).to(self.total.device)
        self.count += defined.sum().to(self.count.device)


class JudgedMetric(_Mean):
    """A metric for which a network judges images with something taken away.

    Args:
        judge: The judge; a network is taken as one. It is not part of the metric's state.
        **options: Of the function of the same name.
    """

    function: ClassVar[Callable[..., Tensor]]

    def __init__(self, judge: Judge | nn.Module, **options: Any) -> None:
        super().__init__()
        # In a Judge, which is no module: a judge's weights do not belong into this metric's state_dict.
        self.judge = as_judge(judge)
        self.options = options

    def update(self, images: Tensor, saliency: Tensor, target: Tensor) -> None:
        """Take a batch: images (B, 3, H, W) as the judge expects them, saliency (B, H, W), target int64 (B,)."""
        self._add(type(self).function(self.judge, images, saliency, target, **self.options))


class LocalizationMetric(_Mean):
    """A metric that compares saliency with masks.

    Args:
        **options: Of the function of the same name.
    """

    higher_is_better = True
    function: ClassVar[Callable[..., Tensor]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def update(self, saliency: Tensor, masks: Tensor) -> None:
        """Take a batch: saliency (B, H, W), masks bool (B, H, W)."""
        self._add(type(self).function(saliency, masks, **self.options))


class MapMetric(_Mean):
    """A metric that looks at maps alone.

    Args:
        **options: Of the function of the same name.
    """

    higher_is_better = True
    function: ClassVar[Callable[..., Tensor]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def update(self, attribution: Tensor) -> None:
        """Take a batch: attribution (B, H, W), of any sign."""
        self._add(type(self).function(attribution, **self.options))


class AvgDrop(JudgedMetric):
    """Mean of `avg_drop`."""

    higher_is_better = True
    function = staticmethod(faithfulness.avg_drop)


class SAD(JudgedMetric):
    """Mean of `sad`."""

    higher_is_better = True
    function = staticmethod(faithfulness.sad)


class EAD(JudgedMetric):
    """Mean of `ead`."""

    higher_is_better = True
    function = staticmethod(faithfulness.ead)


class AreaDrop(JudgedMetric):
    """Mean of `area_drop`."""

    higher_is_better = True
    function = staticmethod(faithfulness.area_drop)


class ConfidenceIncrease(JudgedMetric):
    """Mean of `confidence_increase`: the share of images whose explanation alone convinces more."""

    higher_is_better = True
    function = staticmethod(faithfulness.confidence_increase)


class Insertion(JudgedMetric):
    """Mean of `insertion`."""

    higher_is_better = True
    function = staticmethod(faithfulness.insertion)


class Deletion(JudgedMetric):
    """Mean of `deletion`."""

    higher_is_better = False
    function = staticmethod(faithfulness.deletion)


class ROAD(JudgedMetric):
    """Mean of `road`."""

    higher_is_better = True
    function = staticmethod(faithfulness.road)


class Infidelity(JudgedMetric):
    """Mean of `infidelity`; takes attributions of any sign as saliency."""

    higher_is_better = False
    function = staticmethod(attribution.infidelity)


class SensitivityN(JudgedMetric):
    """Mean of `sensitivity_n`; takes attributions of any sign as saliency."""

    higher_is_better = True
    function = staticmethod(attribution.sensitivity_n)


class Completeness(JudgedMetric):
    """Mean of `completeness`; takes attributions of any sign as saliency."""

    higher_is_better = False
    function = staticmethod(attribution.completeness)


class Fidelity(JudgedMetric):
    """Mean of `fidelity`; takes attributions of any sign as saliency."""

    higher_is_better = True
    function = staticmethod(logits.fidelity)


class BoxSensitivity(JudgedMetric):
    """Mean of `box_sensitivity`; takes attributions of any sign as saliency."""

    higher_is_better = True
    function = staticmethod(logits.box_sensitivity)


class Compactness(MapMetric):
    """Mean of `compactness`."""

    function = staticmethod(specificity.compactness)


class PointingGame(LocalizationMetric):
    """Mean of `pointing_game`."""

    function = staticmethod(localization.pointing_game)


class MassInside(LocalizationMetric):
    """Mean of `mass_inside`."""

    function = staticmethod(localization.mass_inside)


class MaskIoU(LocalizationMetric):
    """Mean of `mask_iou`."""

    function = staticmethod(localization.mask_iou)

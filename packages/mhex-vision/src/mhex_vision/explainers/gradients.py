"""Integrated gradients, as captum computes them.

Letters: B batch, C channels, H x W image size.
Source: Sundararajan et al. 2017 (arXiv 1703.01365).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mhex_core import _checks
from mhex_vision.explainers.interface import check, load, require
from mhex_vision.explainers.view import LogitsView, prepared, wide

LIBRARY = "captum"


@dataclass(frozen=True, kw_only=True)
class IntegratedGradients:
    """What each pixel adds to the target's logit on the way from a baseline to the image: signed, channels added up.

    The sum of a map is the logit of the image less the logit of the baseline, up to the error of the steps.

    Attributes:
        steps: Points on the way (Gauss-Legendre).
        baseline: "blank", zeros, the data's mean colour as images are normalised; or "mean", each image's own.
        batch_size: Points, of all images together, put through the network at a time.
    """

    steps: int = 32
    baseline: Literal["blank", "mean"] = "blank"
    batch_size: int = 64

    def __post_init__(self) -> None:
        _checks.positive_int("steps", self.steps)
        _checks.choice("baseline", self.baseline, ("blank", "mean"))
        _checks.positive_int("batch_size", self.batch_size)
        require(LIBRARY, needed_by="integrated-gradients", distribution="captum")

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Explain."""
        check(model, images, targets)
        library = load("captum.attr", needed_by="integrated-gradients", distribution="captum")
        with prepared(model):
            view = LogitsView(model, images, targets)
            method = library.IntegratedGradients(view)
            pixels = wide(images.detach().clone())  # what was made in inference mode can have no gradient
            maps = [
                method.attribute(
                    part,
                    baselines=self._baseline(part),
                    target=wanted,
                    n_steps=self.steps,
                    internal_batch_size=self.batch_size,
                )
                for part, wanted in zip(
                    torch.split(pixels, self.batch_size),
                    torch.split(targets.clone().to(images.device), self.batch_size),
                    strict=True,
                )
            ]
        return torch.cat(maps).detach().sum(dim=1).float()

    def _baseline(self, images: Tensor) -> Tensor:
        if self.baseline == "blank":
            return torch.zeros_like(images)
        return images.mean(dim=(2, 3), keepdim=True).expand_as(images)

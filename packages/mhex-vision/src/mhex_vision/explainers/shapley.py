"""Shapley values of a hierarchy of image regions (Owen values), as shap computes them.

Letters: B batch, C channels, H x W image size, K classes.
Source: Lundberg and Lee 2017 (arXiv 1705.07874); the hierarchy is shap's `PartitionExplainer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mhex_core import _checks
from mhex_vision.explainers.interface import check, load, require
from mhex_vision.explainers.view import LogitsView, prepared, wide

LIBRARY = "shap"
BLUR_OF_SIDE = 128 / 224  # shap's examples blur images of 224 pixels by 128


@dataclass(frozen=True, kw_only=True)
class PartitionShap:
    """What each region adds to the target's logit as it comes out of a blur: signed, channels added up.

    The sum of a map is the logit of the image less the logit of the blurred image, however few evaluations there are.

    Attributes:
        evaluations: Masked images per image; the more, the smaller the regions. The last batch may exceed it.
        batch_size: Masked images at a time. Regions are split a batch at a time, so it has some effect on the map.
        blur: Side of the averaging window; None means 4/7 of the image's shorter side.
    """

    evaluations: int = 500
    batch_size: int = 50
    blur: int | None = None

    def __post_init__(self) -> None:
        _checks.positive_int("evaluations", self.evaluations)
        _checks.positive_int("batch_size", self.batch_size)
        if self.blur is not None:
            _checks.positive_int("blur", self.blur)
        require(LIBRARY, needed_by="shap", distribution="shap")
        require("cv2", needed_by="shap", distribution="opencv-python")  # for the blur; shap does not bring it along

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Explain."""
        check(model, images, targets)
        library = load(LIBRARY, needed_by="shap", distribution="shap")
        channels, height, width = images.shape[1:]
        side = self.blur if self.blur is not None else max(1, round(min(height, width) * BLUR_OF_SIDE))
        with prepared(model), torch.no_grad():
            view = LogitsView(model, images, targets)

            def logits(masked: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
                pixels = torch.from_numpy(masked).to(images.device).permute(0, 3, 1, 2).contiguous()
                values: np.ndarray[Any, Any] = view(pixels).cpu().numpy()
                return values

            masker = library.maskers.Image(f"blur({side},{side})", (height, width, channels))
            method = library.PartitionExplainer(logits, masker)
            pixels = wide(images.detach()).permute(0, 2, 3, 1).cpu().numpy()
            maps = []
            for image, target in zip(pixels, targets.tolist(), strict=True):
                # The masker knows an image it has blurred by the id of a temporary array, and ids are used again.
                masker.last_xid = None
                with _numpy_seeded():
                    explanation = method(
                        np.ascontiguousarray(image)[None],
                        max_evals=self.evaluations,
                        batch_size=self.batch_size,
                        outputs=[target],
                        silent=True,
                    )
                maps.append(explanation.values.reshape(height, width, channels).sum(axis=2))
        return torch.from_numpy(np.stack(maps)).to(device=images.device, dtype=torch.float32)


@contextmanager
def _numpy_seeded() -> Iterator[None]:
    """A fixed state of numpy's own generator, by which shap breaks ties; the caller's goes on afterwards."""
    state = np.random.get_state()  # noqa: NPY002 - shap draws from it, and takes no other
    np.random.seed(0)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002

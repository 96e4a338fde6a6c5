"""Class activation maps, as pytorch-grad-cam computes them.

Letters: B batch, H x W image size.
Sources: Grad-CAM, Selvaraju et al. 2017 (arXiv 1610.02391); Grad-CAM++, Chattopadhay et al. 2018 (arXiv 1710.11063);
LayerCAM, Jiang et al. 2021; Score-CAM, Wang et al. 2020 (arXiv 1910.01279); Eigen-CAM, Muhammad and Yeasin 2020
(arXiv 2008.00299).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mhex_core import _checks
from mhex_vision.classifier import MHEXClassifier
from mhex_vision.explainers import layers
from mhex_vision.explainers.interface import check, load, require
from mhex_vision.explainers.view import TappedView, prepared, wide
from mhex_vision.vit.tapped import block_names

# Each method's class in the library, and whether it asks for gradients.
METHODS = {
    "gradcam": ("GradCAM", True),
    "gradcam++": ("GradCAMPlusPlus", True),
    "layercam": ("LayerCAM", True),
    "scorecam": ("ScoreCAM", False),
    "eigencam": ("EigenCAM", False),
}
LIBRARY = "pytorch_grad_cam"


@dataclass(frozen=True, kw_only=True)
class ClassActivationMap:
    """One of pytorch-grad-cam's methods. The library rescales every map to [0, 1] by its own extremes.

    Eigen-CAM looks at no class: its map is the same for every target. Score-CAM puts one image per channel of the layer
    through the network. Its weights are never negative, and the signed sums of a block would cancel to an empty map, so
    of a convolutional `MHEXClassifier` it sees the ReLU of them, as it does in the residual networks it was made for.

    Attributes:
        method: One of `METHODS`.
        layer: Where it looks, see `layers.chosen` and `view.TappedView`.
        batch_size: Masked images at a time; Score-CAM only.
    """

    method: str
    layer: str | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        _checks.choice("method", self.method, tuple(METHODS))
        if self.layer is not None and not isinstance(self.layer, str):
            raise TypeError(f"layer must be a name, got {type(self.layer).__name__}")
        _checks.positive_int("batch_size", self.batch_size)
        require(LIBRARY, needed_by=self.method, distribution="grad-cam")

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Explain."""
        check(model, images, targets)
        library = load(LIBRARY, needed_by=self.method, distribution="grad-cam")
        name, with_gradient = METHODS[self.method]
        with prepared(model, freeze=True), torch.set_grad_enabled(with_gradient):
            images = images.detach().clone()  # what was made in inference mode can have no gradient
            view = TappedView(model, layers.chosen(model, self.layer, images), images, targets)
            sums = isinstance(model, MHEXClassifier) and block_names(model) is None
            rectify = torch.relu if self.method == "scorecam" and sums else None
            cam = getattr(library, name)(model=view, target_layers=[view.tap], reshape_transform=rectify)
            # Not `with cam`: its exit prints an IndexError and swallows it.
            try:
                maps = self._maps(library, cam, wide(images), targets)
            finally:
                cam.activations_and_grads.release()
        return torch.from_numpy(maps).to(device=images.device, dtype=torch.float32)

    def _maps(self, library: ModuleType, cam: Any, images: Tensor, targets: Tensor) -> np.ndarray[Any, Any]:
        target = library.utils.model_targets.ClassifierOutputTarget
        wanted = [target(category) for category in targets.tolist()]
        if self.method != "scorecam":
            maps: np.ndarray[Any, Any] = cam(input_tensor=images, targets=wanted)
            return maps
        cam.batch_size = self.batch_size
        # One image after the other: the library holds a masked image per channel, and all their activations.
        with _without_progress_bar(library.score_cam):
            return np.concatenate(
                [cam(input_tensor=image.unsqueeze(0), targets=[one]) for image, one in zip(images, wanted, strict=True)]
            )


@contextmanager
def _without_progress_bar(module: Any) -> Iterator[None]:
    """The library shows one per image, and offers no way to turn it off."""
    shown = module.tqdm
    module.tqdm = SimpleNamespace(tqdm=iter)
    try:
        yield
    finally:
        module.tqdm = shown

"""The classifier's own saliency, the two maps that look at no model, and functions of the user's own.

Letters: B batch, H x W image size.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mhex_core import SaliencyOptions, _checks
from mhex_core.specs import import_function
from mhex_vision.classifier import MHEXClassifier
from mhex_vision.explainers.interface import check


@dataclass(frozen=True)
class OwnSaliency:
    """`MHEXClassifier.explain`.

    Attributes:
        options: The fields of `mhex_core.SaliencyOptions`, and `attention`, see `MHEXClassifier.explain`.
    """

    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Says now, and not after an hour of other explainers, what is wrong.
        _checks.flag("attention", self.options.get("attention", False))
        SaliencyOptions(**{name: value for name, value in self.options.items() if name != "attention"})

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Explain."""
        check(model, images, targets)
        if not isinstance(model, MHEXClassifier):
            raise TypeError(
                f"model must be an MHEXClassifier for its own saliency, got {type(model).__name__}; attach heads "
                "with MHEXClassifier.from_backbone and train them, or choose another explainer"
            )
        return model.explain(images, targets, keep_images=False, **self.options).saliency.float()


@dataclass(frozen=True, kw_only=True)
class RandomMaps:
    """Uniform noise in [0, 1), the same for the same image whatever batch it comes in.

    Attributes:
        seed: Another seed, other noise.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {type(self.seed).__name__}")

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Make noise."""
        check(model, images, targets)
        maps = [
            torch.rand(image.shape[1:], generator=torch.Generator().manual_seed(self._seed_of(image)))
            for image in images.detach().float().cpu()
        ]
        return torch.stack(maps).to(images.device)

    def _seed_of(self, image: Tensor) -> int:
        return zlib.crc32(image.contiguous().numpy().tobytes(), zlib.crc32(str(self.seed).encode()))


@dataclass(frozen=True, kw_only=True)
class CentreGaussian:
    """A Gaussian on the image's centre.

    Attributes:
        width: The standard deviation as a share of each side.
    """

    width: float = 0.25

    def __post_init__(self) -> None:
        if _checks.number("width", self.width, low=0) == 0:
            raise ValueError("width must be greater than 0, got 0")

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Draw it for every image."""
        check(model, images, targets)
        height, width = (self._bell(side) for side in images.shape[2:])
        return torch.outer(height, width).to(images.device).repeat(images.shape[0], 1, 1)

    def _bell(self, side: int) -> Tensor:
        axis = (torch.arange(side, dtype=torch.float32) + 0.5) / side - 0.5
        return torch.exp(-(axis**2) / (2 * self.width**2))


@dataclass(frozen=True)
class UserFunction:
    """An explainer the user wrote, with its answer checked.

    Attributes:
        name: "module:function".
        function: What it names.
    """

    name: str
    function: Callable[[nn.Module, Tensor, Tensor], Any]

    @classmethod
    def named(cls, name: str) -> UserFunction:
        """Import "module:function".

        Raises:
            TypeError: It is no function.
            ValueError: There is no such module or function.
        """
        return cls(name, import_function(name))

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Explain."""
        check(model, images, targets)
        maps = self.function(model, images, targets)
        if not isinstance(maps, Tensor):
            raise TypeError(f"{self.name} must give a tensor, got {type(maps).__name__}")
        expected = (images.shape[0], *images.shape[2:])
        if tuple(maps.shape) != expected:
            raise ValueError(f"{self.name} must give maps of shape {expected}, got {tuple(maps.shape)}")
        return maps.detach().to(device=images.device, dtype=torch.float32)

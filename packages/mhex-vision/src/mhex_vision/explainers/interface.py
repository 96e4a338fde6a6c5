"""What every explainer keeps to, and how one gets at a library that need not be installed.

Letters: B batch, C channels, H x W image size.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn

from mhex_core import _checks

Explainer = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, normalised images (B, C, H, W), targets int64 (B,)) -> float32 (B, H, W).

Larger where a pixel speaks more for the target; of any sign and range, on the images' device, detached. The model is
left as it was."""


def check(model: object, images: object, targets: object) -> None:
    """Check what an explainer was called with.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes do not fit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    images = _checks.tensor("images", images, ndim=4)
    if not images.numel():
        raise ValueError(f"images must hold at least one image, got shape {tuple(images.shape)}")
    targets = _checks.tensor("targets", targets, ndim=1, floating=False)
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be of dtype torch.int64, got {targets.dtype}")
    if targets.shape[0] != images.shape[0]:
        raise ValueError(f"targets must have shape ({images.shape[0]},), got {tuple(targets.shape)}")


def require(module: str, *, needed_by: str, distribution: str) -> None:
    """Say early, without importing it, that a library is missing.

    Raises:
        ImportError: It is.
    """
    if importlib.util.find_spec(module) is None:
        raise ImportError(_missing(needed_by, distribution))


@cache
def load(module: str, *, needed_by: str, distribution: str) -> ModuleType:
    """Import a library that is not a dependency.

    Raises:
        ImportError: It is missing.
    """
    try:
        with warnings.catch_warnings():
            # What a library's own imports are going to lose some day: shap's colour maps, for one.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", PendingDeprecationWarning)
            return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(_missing(needed_by, distribution)) from error


def _missing(needed_by: str, distribution: str) -> str:
    return f'{needed_by} needs {distribution}: pip install "mhex-vision[bench]"'

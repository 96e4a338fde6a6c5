"""What every explainer of texts keeps to, and how one gets at a library that need not be installed.

Letters: B batch, T tokens, K classes.
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
from mhex_text.batch import TokenBatch

TextExplainer = Callable[[nn.Module, TokenBatch, Tensor], Tensor]
"""(model, batch of B texts, targets int64 (B,)) -> float32 (B, T).

The model is an `MHEXForSequenceClassification` or any sequence classifier of transformers; both give `.logits` (B, K).
Scores are larger where a token speaks more for the target, of any sign and range, finite, zero outside `batch.mask`,
on the batch's device, detached. The model is left as it was."""


def check(model: object, batch: object, targets: object) -> None:
    """Check what an explainer was called with.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes do not fit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(batch, TokenBatch):
        raise TypeError(f"batch must be a TokenBatch, got {type(batch).__name__}")
    if not batch.input_ids.numel():
        raise ValueError(f"batch must hold at least one token, got shape {tuple(batch.input_ids.shape)}")
    targets = _checks.tensor("targets", targets, ndim=1, floating=False)
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be of dtype torch.int64, got {targets.dtype}")
    if targets.shape[0] != len(batch):
        raise ValueError(f"targets must have shape ({len(batch)},), got {tuple(targets.shape)}")


def finished(name: str, scores: object, batch: TokenBatch) -> Tensor:
    """An explainer's answer in the form all explainers give it.

    Args:
        name: Of the explainer, for messages.
        scores: (B, T).
        batch: What was explained.

    Returns:
        float32 (B, T), zero outside `batch.mask`, on the batch's device, detached.

    Raises:
        TypeError: The scores are no tensor.
        ValueError: They are of another shape, or one that counts is not finite.
    """
    if not isinstance(scores, Tensor):
        raise TypeError(f"{name} must give a tensor, got {type(scores).__name__}")
    expected = tuple(batch.input_ids.shape)
    if tuple(scores.shape) != expected:
        raise ValueError(f"{name} must give scores of shape {expected}, got {tuple(scores.shape)}")
    result = scores.detach().to(device=batch.input_ids.device, dtype=torch.float32)
    result = torch.where(batch.mask, result, 0.0)
    if not bool(result.isfinite().all()):
        raise ValueError(f"{name} must give finite scores, got {result[~result.isfinite()][0].item()} among them")
    return result


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
    return f'{needed_by} needs {distribution}: pip install "mhex-text[bench]"'

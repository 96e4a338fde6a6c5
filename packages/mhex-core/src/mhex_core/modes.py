"""Evaluation mode for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while. A model that is in it already is not touched, so threads may share one."""
    training = [module for module in model.modules() if module.training]
    # One by one: `train` and `eval` of a model may do more than set the mode.
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True

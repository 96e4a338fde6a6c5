"""What a training run came to: metrics, epochs, the result.

Letters: N texts, L heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TextMetrics:
    """How a classifier does on N texts.

    Attributes:
        loss: What training minimises, the mean over texts.
        accuracy: Of the prediction.
        head_accuracy: Of each of the L heads alone, shallow to deep.
    """

    loss: float
    accuracy: float
    head_accuracy: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TextEpoch:
    """One line of the log.

    Attributes:
        epoch: From 1.
        learning_rate: At its last step.
        train_loss: Mean over its steps.
        validation: None where there are no validation texts.
        seconds: Training and validation.
    """

    epoch: int
    learning_rate: float
    train_loss: float
    validation: TextMetrics | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class TextTrainingResult:
    """A finished run.

    Attributes:
        history: All epochs.
        best_epoch: The epoch whose weights were kept: that of the lowest validation loss; the last without validation.
        test: How those do on the test texts, or None where there are none.
        max_length: The most tokens a text had, by the recipe and by what tokenizer and encoder take.
        truncated: The share of texts that were cut, by split.
    """

    history: tuple[TextEpoch, ...]
    best_epoch: int
    test: TextMetrics | None
    max_length: int
    truncated: dict[str, float]


def best_epoch(history: tuple[TextEpoch, ...]) -> int:
    """The number of the epoch with the lowest validation loss, the first of equals; the last without validation."""
    judged = [(epoch.validation.loss, epoch.epoch) for epoch in history if epoch.validation is not None]
    return min(judged)[1] if judged else len(history)


def metrics_from(values: dict[str, Any] | None) -> TextMetrics | None:
    """The metrics of a dictionary of their fields, as JSON gives it back."""
    return None if values is None else TextMetrics(**{**values, "head_accuracy": tuple(values["head_accuracy"])})


def epoch_from(values: dict[str, Any]) -> TextEpoch:
    """The same of an epoch."""
    return replace(TextEpoch(**values), validation=metrics_from(values["validation"]))


def result_from(values: dict[str, Any]) -> TextTrainingResult:
    """The same of a result."""
    return TextTrainingResult(
        **{**values, "history": tuple(map(epoch_from, values["history"])), "test": metrics_from(values["test"])}
    )

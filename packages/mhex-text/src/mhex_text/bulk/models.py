"""Classifiers that explain batches of tokenized texts.

Letters: B batch, T tokens, K classes, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from mhex_core import SaliencyOptions
from mhex_core.bulk.job import Values
from mhex_text.batch import TokenBatch
from mhex_text.bulk.checkpoint import Checkpoint
from mhex_text.bulk.reading import LENGTH_STEP, Tokenized, padded_length
from mhex_text.by_method import scored
from mhex_text.explainers import TextExplainer
from mhex_text.explainers.own import OwnScores
from mhex_text.explaining import evidence, padding_id
from mhex_text.explanation.records import spread_weights

Rows = Callable[..., pa.RecordBatch]
"""`columns.rows` with all that is known beforehand."""


class OwnModel:
    """The classifier's own evidence: one forward pass.

    A text is padded to `padded_length` whatever texts are beside it, so that nothing but itself decides on its bits.

    Args:
        checkpoint: The classifier.
        settings: How its evidence is read.
        rows: Makes the rows.
        target: The class to explain, or None for the predicted ones.
        device: Where it runs.
        autocast: The type that it computes in where that is safe, or None.
        compiled: For how many rows it is compiled, or None.

    Attributes:
        shared: Whether several threads may call it at once.
        fixed: Whether every batch must have the same number of rows.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: OwnScores,
        rows: Rows,
        *,
        target: int | None,
        device: torch.device,
        autocast: torch.dtype | None,
        compiled: int | None,
    ) -> None:
        # Showing attention switches the encoder to another kind of it for the call.
        self.shared = not settings.attention
        self.fixed = compiled is not None or device.type != "cpu"
        self._rows, self._target, self._device, self._autocast = rows, target, device, autocast
        self._limit = checkpoint.limit
        self._attention = settings.attention
        self._model = checkpoint.model().to(device)
        self._padding = padding_id(self._model)
        with torch.inference_mode():
            self._matrices = self._model.equivalent_matrices()
        count = len(self._matrices)
        layers = [count - 1] if settings.layers == "last" else settings.layers
        self._weights = spread_weights(layers, settings.layer_weights, count=count, decay=settings.decay)
        self._beta = settings.beta
        self._options = SaliencyOptions(
            beta=settings.beta,
            tau_pos=settings.tau_pos,
            tau_neg=settings.tau_neg,
            sharpness=settings.sharpness,
            exponent=settings.exponent,
            rectify=False,
        )
        if compiled is not None:
            # One program for all lengths: which length came first must not decide on anyone's bits.
            self._model.compile(dynamic=True)
            length = padded_length(2 * LENGTH_STEP, self._limit)
            given = self._padded(compiled, length)
            given[1] = 1
            self._explained(given)

    def __call__(self, values: Values) -> pa.RecordBatch:
        """Explain texts of one padded length."""
        texts: list[Tokenized] = list(values)
        longest = max(text.tokens.shape[1] for text in texts)
        given = self._padded(len(texts), padded_length(longest, self._limit))
        for row, value in enumerate(texts):
            count = value.tokens.shape[1]
            given[0, row, :count], given[1, row, :count], given[2, row, :count] = value.tokens[0], 1, value.tokens[1]
        return self._rows(texts, **self._explained(given))

    def _padded(self, batch: int, length: int) -> npt.NDArray[np.int64]:
        """Numbers in the vocabulary, mask and segments of nothing but padding, (3, B, T)."""
        given = np.zeros((3, batch, length), dtype=np.int64)
        given[0] = self._padding
        return given

    def _explained(self, given: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        """Probabilities, targets and scores, of what `_padded` makes room for."""
        held = torch.from_numpy(given)
        if self._device.type == "cuda":
            held = held.pin_memory()
        inputs = dict(
            zip(
                ("input_ids", "attention_mask", "token_type_ids"), held.to(self._device, non_blocking=True), strict=True
            )
        )
        batch = given.shape[1]
        target = None if self._target is None else torch.full((batch,), self._target, device=self._device)
        with torch.inference_mode():
            found = evidence(
                self._model,
                self._matrices,
                inputs,
                target,
                self._options,
                attention=self._attention,
                autocast=self._autocast,
            )
            total = torch.zeros(inputs["input_ids"].shape, dtype=_widest(self._device), device=self._device)
            for plus, minus, weight in zip(found.positive, found.negative, self._weights, strict=True):
                if weight:
                    total += weight * (plus.to(total.dtype) + self._beta * minus.to(total.dtype))
            # As one tensor: every copy from an accelerator waits for it.
            together = torch.cat([found.probabilities, found.target[:, None].float(), total.float()], dim=1).cpu()
        classes = found.probabilities.shape[1]
        return {
            "probabilities": together[:, :classes].numpy(),
            "targets": together[:, classes].long().numpy(),
            "scores": together[:, classes + 1 :].numpy(),
        }


class OtherModel:
    """Any explainer: batches hold texts of one number of tokens, and so no padding.

    Args:
        checkpoint: The classifier.
        method: The explainer.
        name: What it is called.
        rows: Makes the rows.
        target: The class to explain, or None for the predicted ones.
        device: Where it runs.
        autocast: The type that it computes in where that is safe, or None.

    Attributes:
        shared: False: explainers set hooks and modes while they run.
        fixed: Whether every batch must have the same number of rows.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        method: TextExplainer,
        name: str,
        rows: Rows,
        *,
        target: int | None,
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> None:
        self.shared = False
        self.fixed = device.type != "cpu"
        self._method, self._name, self._rows, self._target = method, name, rows, target
        self._device, self._autocast = device, autocast
        self._tokenizer = checkpoint.tokenizer()
        self._types = checkpoint.own_types
        self._model = checkpoint.model().to(device)

    def __call__(self, values: Values) -> pa.RecordBatch:
        """Explain texts of one number of tokens."""
        texts: list[Tokenized] = list(values)
        batch = self._batch(texts)
        target = None if self._target is None else torch.full((len(texts),), self._target)
        casting = nullcontext() if self._autocast is None else torch.autocast(self._device.type, dtype=self._autocast)
        with casting:
            probabilities, targets, scores = scored(self._model, batch, self._method, self._name, target)
        return self._rows(
            texts,
            probabilities=probabilities.float().cpu().numpy(),
            targets=targets.cpu().numpy(),
            scores=scores.cpu().numpy(),
        )

    def _batch(self, values: Sequence[Tokenized]) -> TokenBatch:
        ids, types, starts, ends, parts, words = np.stack([value.tokens for value in values], axis=1).astype(np.int64)
        texts: Any = tuple(value.texts[0] if len(value.texts) == 1 else value.texts for value in values)
        return TokenBatch(
            texts=texts,
            tokenizer=self._tokenizer,
            input_ids=_tensor(ids),
            attention_mask=torch.ones(ids.shape, dtype=torch.int64),
            token_type_ids=_tensor(types) if self._types else None,
            offsets=_tensor(np.stack([starts, ends], axis=2)),
            sequence_ids=_tensor(parts),
            word_ids=_tensor(words),
            truncated=torch.tensor([value.cut for value in values]),
        )


def _tensor(values: npt.NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _widest(device: torch.device) -> torch.dtype:
    """As `Token.score` is added up, where the device can."""
    return torch.float32 if device.type == "mps" else torch.float64

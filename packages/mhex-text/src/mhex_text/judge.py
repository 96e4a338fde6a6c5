"""The text classifier that judges: what it believes of tokens, and no more.

Letters: B batch, T tokens, K classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from mhex_core import _checks
from mhex_core.modes import in_evaluation_mode
from mhex_text.batch import TokenBatch


class TextJudge:
    """How probable a text classifier finds its classes. It should be another one than the one explained.

    Token ids are what is hidden from a judge, so it has to read those of the model explained: `check_vocabulary` and
    `reader` refuse what differs.

    Args:
        model: An `MHEXForSequenceClassification` or any sequence classifier of transformers. It is in evaluation mode
            for each call, and in its own mode again afterwards. Where its configuration says that classes are
            independent of each other, probabilities are sigmoids, and else a softmax.
        tokenizer: The model's own.
        batch_size: Texts at a time, however many are asked about.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The model does not tell classes apart.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, batch_size: int = 64) -> None:
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise TypeError(f"model must be a sequence classifier of transformers, got {type(model).__name__}")
        if not callable(getattr(tokenizer, "get_vocab", None)):
            raise TypeError(f"tokenizer must be a tokenizer of transformers, got {type(tokenizer).__name__}")
        self.model = cast("Any", model)
        self.tokenizer = tokenizer
        self.batch_size = _checks.positive_int("batch_size", batch_size)
        classes = len(self.model.config.id2label or ())
        if classes < 2 and not self.multi_label:
            raise ValueError(f"model must tell at least 2 classes apart, got one with {classes}")

    @property
    def multi_label(self) -> bool:
        """Whether classes are independent of each other."""
        return bool(getattr(self.model.config, "problem_type", None) == "multi_label_classification")

    @property
    def device(self) -> torch.device:
        """Where the model is, and probabilities will be."""
        found: torch.device = next(self.model.parameters()).device
        return found

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Probabilities, without gradients, in float32 or wider.

        Args:
            input_ids: int64 (B, T), on any device.
            attention_mask: (B, T), 1 for real tokens and 0 for padding; None means that all are real.
            token_type_ids: (B, T). Models without segments leave them aside.

        Returns:
            (B, K).

        Raises:
            TypeError: The tokens are no integers.
            ValueError: The model has no embedding of a token, or a shape does not fit.
        """
        input_ids = _checks.tensor("input_ids", input_ids, ndim=2, floating=False)
        if input_ids.dtype != torch.int64:
            raise TypeError(f"input_ids must be of dtype torch.int64, got {input_ids.dtype}")
        if not input_ids.numel():
            raise ValueError(f"input_ids must hold at least one token, got shape {tuple(input_ids.shape)}")
        self._check_embedded(input_ids)
        given = {"input_ids": input_ids}
        for name, value in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if value is None or (name == "token_type_ids" and not self._takes(name)):
                continue
            if value.shape != input_ids.shape:
                raise ValueError(
                    f"{name} must have the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(value.shape)}"
                )
            given[name] = value
        parts = []
        with in_evaluation_mode(self.model), torch.no_grad():
            for start in range(0, len(input_ids), self.batch_size):
                some = {name: value[start : start + self.batch_size].to(self.device) for name, value in given.items()}
                parts.append(self._logits(some))
        logits = torch.cat(parts)
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=1)

    def reader(self, batch: TokenBatch) -> Callable[[Tensor], Tensor]:
        """What the metrics of `mhex_core.metrics` call `predict`: the judge of a batch some tokens of which change.

        Args:
            batch: The texts. What is padding, and which part of a pair a token is of, stays as it is there.

        Returns:
            A function of int64 (B, T) that gives (B, K).

        Raises:
            ValueError: The judge's tokenizer makes other tokens of these texts.
        """
        types = batch.token_type_ids if self.tokenizer is batch.tokenizer else self._own_types(batch)
        return lambda tokens: self(tokens, batch.attention_mask, types)

    def check_vocabulary(self, tokenizer: Any) -> None:
        """Check that the judge reads the tokens of another model.

        Args:
            tokenizer: That model's.

        Raises:
            ValueError: A token has another id here than there, or none.
        """
        if tokenizer is self.tokenizer:
            return
        ours, theirs = self.tokenizer.get_vocab(), tokenizer.get_vocab()
        differing = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
        if differing:
            raise ValueError(
                "judge must have the vocabulary of the model explained, since token ids are what is hidden from it; "
                f"got tokenizers that differ in {len(differing)} of {len(ours.keys() | theirs.keys())} tokens, such as "
                f"{min(differing)!r}; choose a judge of the same vocabulary"
            )

    def _own_types(self, batch: TokenBatch) -> Tensor | None:
        """The segments as the judge's tokenizer tells them, in the batch's places."""
        longest = batch.input_ids.shape[1]
        own = TokenBatch.make(batch.texts, self.tokenizer, max_length=longest).to(batch.input_ids.device)
        here, there = own.attention_mask != 0, batch.attention_mask != 0
        same = torch.equal(here.sum(dim=1), there.sum(dim=1))
        if not same or not torch.equal(own.input_ids[here], batch.input_ids[there]):
            raise ValueError(
                "judge must read texts as the model explained does, and its tokenizer makes other tokens of the same "
                "texts; choose a judge whose tokenizer has the same vocabulary and settings"
            )
        if own.token_type_ids is None:
            return None
        types = torch.zeros_like(batch.input_ids)
        types[there] = own.token_type_ids[here]
        return types

    def _takes(self, name: str) -> bool:
        parameters = inspect.signature(self.model.forward).parameters
        if name in parameters:
            return True
        # A wrapper hands on whatever it is given; what is wrapped may know no segments.
        config = getattr(self.model.config, "encoder", self.model.config)
        wrapped = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
        return wrapped and getattr(config, "type_vocab_size", 0) > 1

    def _check_embedded(self, input_ids: Tensor) -> None:
        # An index out of range would be a device-side assertion on an accelerator, which ends the process's use of it.
        embeddings = self.model.get_input_embeddings().weight.shape[0]
        low, high = (int(extreme) for extreme in input_ids.aminmax())
        if low < 0 or high >= embeddings:
            raise ValueError(
                f"input_ids must lie in [0, {embeddings - 1}], which the judge has embeddings of, got {low} to {high}"
            )

    def _logits(self, inputs: dict[str, Tensor]) -> Tensor:
        logits = self.model(**inputs, return_dict=True).logits
        batch = len(inputs["input_ids"])
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != batch:
            came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model must give logits of shape ({batch}, K), got {came}")
        return logits if logits.dtype == torch.float64 else logits.float()

"""The last layer of a text classifier that is run, and what follows it: to be run again on something else.

Letters: B batch, T tokens, C channels, K classes, N rows of a repeated last layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mhex_core import BlockOutput
from mhex_text.running import (
    Arguments,
    Place,
    attending_eagerly,
    encoder_of,
    handed_on,
    logits_of,
    of_rows,
    places,
    reading,
    ungraded,
)

if TYPE_CHECKING:
    from mhex_text.adapters import Context
    from mhex_text.modeling import MHEXForSequenceClassification

# DeBERTa's relative positions are of no text, and its table of them may have as many rows as there are texts.
_SHARED = ("relative_pos", "rel_embeddings")


@dataclass(frozen=True, kw_only=True, eq=False)
class Tail(ABC):
    """The last layer that is run, and what follows: evaluation mode, eager attention, no gradients for parameters.

    It runs under the caller's gradient mode. What attention reads is handed over apart from what enters the layer, so
    that one can be changed without the other, and gradients be asked for one alone. With what was captured itself, and
    each text once, the logits are the captured ones. As in `capture`, no other thread may use the model meanwhile.

    Attributes:
        place: The last layer that is run.
    """

    place: Place

    @property
    @abstractmethod
    def _network(self) -> nn.Module:
        """The classifier."""

    @abstractmethod
    def _logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """The logits (N, K)."""

    @abstractmethod
    def _features(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """What the classifier reads (N, C)."""

    def normalize(self, hidden: Tensor) -> Tensor:
        """From what enters the layer to what its attention reads, (N, T, C): the same where no norm comes before."""
        if self.place.norm is None:
            return hidden
        with self._running():
            normed: Tensor = self.place.norm(hidden)
            return normed

    def logits(self, hidden: Tensor, attention_input: Tensor, rows: Tensor) -> Tensor:
        """The prediction.

        Args:
            hidden: (N, T, C), what enters the layer.
            attention_input: (N, T, C), what its attention reads.
            rows: int64 (N,), the text each row belongs to: masks, positions and segments are taken from there, and so
                is what the earlier heads of an `MHEXForSequenceClassification` say, which the joint prediction adds.

        Returns:
            (N, K).
        """
        with self._running(), reading(self.place.attention, lambda _: attention_input):
            return self._logits(hidden, rows)

    def features(self, hidden: Tensor, attention_input: Tensor, rows: Tensor) -> Tensor:
        """What the classifier reads, see `Captured.features`: (N, C). The arguments are those of `logits`."""
        with self._running(), reading(self.place.attention, lambda _: attention_input):
            return self._features(hidden, rows)

    @contextmanager
    def _running(self) -> Iterator[None]:
        graph, network = torch.is_grad_enabled(), self._network
        eager = attending_eagerly(encoder_of(network), [self.place.attention])
        with ungraded(network), eager, torch.set_grad_enabled(graph):
            yield


@dataclass(frozen=True, kw_only=True, eq=False)
class PlainTail(Tail):
    """That of a sequence classifier of transformers.

    Attributes:
        model: The classifier.
        inputs: What it was called with.
        called: What the last layer was called with besides its first argument.
        readout: (B, T), see `Captured.readout`.
    """

    model: nn.Module
    inputs: Mapping[str, Tensor]
    called: Arguments
    readout: Tensor

    @property
    def _network(self) -> nn.Module:
        return self.model

    def _logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        encoder, final = encoder_of(self.model), self._final(hidden, rows)
        pooler = getattr(encoder, "pooler", None)
        done = _Done(final, None if pooler is None else pooler(final))
        with _in_place_of_the_encoder(self.model, done):
            return logits_of(self.model, {name: value[rows] for name, value in self.inputs.items()})

    def _features(self, hidden: Tensor, rows: Tensor) -> Tensor:
        return read_out(self._final(hidden, rows), self.readout[rows])

    def _final(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """What the encoder gives: (N, T, C)."""
        encoder: Any = encoder_of(self.model)
        args, kwargs = self.called
        by_name = {name: value if name in _SHARED else of_rows(value, rows) for name, value in kwargs.items()}
        final: Tensor = handed_on(encoder, self.place.layer(hidden, *of_rows(args, rows), **by_name))
        convolution = only_layers_convolution(encoder)
        if convolution is not None:
            mask = self.inputs.get("attention_mask")
            real = hidden.new_ones(hidden.shape[:2]) if mask is None else mask[rows]
            final = convolution(hidden, final, real)
        return final if self.place.norm is None else encoder.final_norm(final)


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockTail(Tail):
    """That of an `MHEXForSequenceClassification`: its deepest block and the layer around it.

    Attributes:
        model: The classifier.
        context: What every layer needs besides its input.
        mask: (B, T), the tokens that blocks average over, or None for all.
        heads: The logits (B, K) of the earlier heads.
    """

    model: MHEXForSequenceClassification
    context: Context
    mask: Tensor | None
    heads: tuple[Tensor, ...]

    @property
    def _network(self) -> nn.Module:
        return self.model

    def _logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        earlier = tuple(head[rows] for head in self.heads)
        return self.model.objective.prediction((*earlier, self._run(hidden, rows).logits))

    def _features(self, hidden: Tensor, rows: Tensor) -> Tensor:
        with reads_of_the_last_head(self.model) as found:
            self._run(hidden, rows)
        return found[-1]

    def _run(self, hidden: Tensor, rows: Tensor) -> BlockOutput:
        model, adapter = self.model, self.model._adapter
        block: Any = model.blocks[-1]
        mask = None if self.mask is None else self.mask[rows]
        context = adapter.rows_of(self.context, rows)
        _, output = adapter.run_layer(model.encoder, model.layer_indices[-1], hidden, context, block, mask)
        if output is None:
            raise ValueError(f"the adapter must hand out what the block of its layer gives, got none of {adapter}")
        return output


def read_out(values: Tensor, readout: Tensor) -> Tensor:
    """The mean of the tokens' values (B, T, C) in the shares (B, T) with which they are read: (B, C)."""
    # What no share falls on is left out, and not multiplied by 0: padding may hold anything.
    kept = torch.where(readout.unsqueeze(2) != 0, values, 0.0)
    return torch.einsum("bt,btc->bc", readout.to(values), kept)


def only_layers_convolution(encoder: Any) -> Any:
    """DeBERTa's convolution behind its first layer, where that is the last one as well; else None."""
    return getattr(encoder.encoder, "conv", None) if hasattr(encoder, "encoder") and len(places(encoder)) == 1 else None


@contextmanager
def reads_of_the_last_head(model: MHEXForSequenceClassification) -> Iterator[list[Tensor]]:
    """Inside, each pass leaves what the deepest block's head reads of its layer: the rectified mean token (B, C)."""
    found: list[Tensor] = []
    block: Any = model.blocks[-1]
    handle = block.gate.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def _in_place_of_the_encoder(model: Any, done: nn.Module) -> Iterator[None]:
    name = model.base_model_prefix
    encoder = getattr(model, name)
    try:
        setattr(model, name, done)
        yield
    finally:
        setattr(model, name, encoder)


class _Done(nn.Module):
    """An encoder that has run already: it gives what it is told, whatever it is asked."""

    def __init__(self, final: Tensor, pooled: Tensor | None) -> None:
        super().__init__()
        self._given = BaseModelOutputWithPooling(last_hidden_state=final, pooler_output=pooled)

    def forward(self, *args: object, **kwargs: object) -> Any:
        del args, kwargs
        return self._given

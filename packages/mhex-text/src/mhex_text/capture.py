"""One forward pass of a text classifier, with what enters its layers and what they attend to.

Letters: B batch, T tokens, C channels, K classes, H heads, L layers that are run.

It works for the encoders that `mhex_text` has adapters for, in an `MHEXForSequenceClassification`, whose layers run
through an adapter up to the deepest block, and in any sequence classifier of transformers. While it runs, hooks sit on
the encoder's modules and its configuration says "eager", since no other attention shows its weights: no other thread
may use the same model meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhex_core import _checks
from mhex_core.attention import target_gradients
from mhex_text.adapters import EncoderInputs
from mhex_text.running import (
    SUPPORTED,
    Arguments,
    Place,
    attending_eagerly,
    encoder_of,
    first_of,
    handed_on,
    logits_of,
    places,
    reading,
    ungraded,
    without_first,
)
from mhex_text.tail import (
    BlockTail,
    PlainTail,
    Tail,
    only_layers_convolution,
    read_out,
    reads_of_the_last_head,
)

if TYPE_CHECKING:
    from mhex_text.modeling import MHEXForSequenceClassification

__all__ = ["SUPPORTED", "Captured", "Tail", "attention_shown", "capture", "encoder_of", "logits_of", "ungraded"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Captured:
    """What one forward pass gave: one graph, so that `torch.autograd.grad` finds its way from logits to the rest.

    Attributes:
        logits: (B, K).
        features: (B, C), what the classifier reads. Of a classifier of transformers: the encoder's last hidden state,
            after its final norm if it has one, at the token that is read, or its mean where all are. Of an
            `MHEXForSequenceClassification`: the rectified mean token that the deepest block's head reads.
        hidden: L tensors (B, T, C), what enters each layer, shallow to deep.
        attention_inputs: L tensors (B, T, C), what the attention of each layer reads: `hidden`, or its norm where one
            comes before attention. Gradients with respect to it count the ways through this attention alone, and not
            those along the skip connection.
        attentions: L tensors (B, H, T, T), weights after the softmax: row query, column key. Those of padded queries
            mean nothing.
        outputs: L tensors (B, T, C), what each layer hands on. A head reads beside it: the logits of an
            `MHEXForSequenceClassification` do not depend on the last one, where the norm follows the addition.
        readout: (B, T), the shares with which the tokens at the end enter the prediction, sum 1: all of the first
            token, or equal shares of the real ones, where the classifier or MHEX heads average.
        tail: The last layer and what follows, to be run again on something else.
    """

    logits: Tensor
    features: Tensor
    hidden: tuple[Tensor, ...]
    attention_inputs: tuple[Tensor, ...]
    attentions: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    readout: Tensor
    tail: Tail

    def gradients(self, targets: Tensor, of: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of each text's target logit, by one backward pass; the graph is kept.

        Args:
            targets: int64 (B,).
            of: Tensors of this object. One that no target depends on has the gradient 0.

        Raises:
            TypeError: The targets are of another type.
            ValueError: They do not fit, or nothing was kept to go back through (`graph=False`).
        """
        return target_gradients(self.logits, targets, of)


def capture(model: nn.Module, inputs: Mapping[str, Tensor], *, graph: bool = True) -> Captured:
    """Run the model once, in evaluation mode; gradients can be asked for also where the caller has turned them off.

    Parameters take no part in the graph, and so get no `.grad`, also by `backward`. Modes, `requires_grad`, the
    attention that runs and the hooks are afterwards as they were before, also when something raises.

    Args:
        model: An `MHEXForSequenceClassification` or another sequence classifier of transformers.
        inputs: What its forward takes, such as `TokenBatch.inputs()`, on its device.
        graph: Whether gradients will be asked for; without, less is kept in memory.

    Raises:
        TypeError: The model is no module, or its forward does not take such inputs.
        ValueError: The encoder is of a family that is not supported, or did not run as its family does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    graph = _checks.flag("graph", graph)
    from mhex_text.modeling import MHEXForSequenceClassification

    encoder = encoder_of(model)
    layers = places(encoder)
    seen = _Seen()
    attentions = [place.attention for place in layers]
    with ungraded(model), attending_eagerly(encoder, attentions), torch.set_grad_enabled(graph), ExitStack() as hooks:
        hooks.callback(encoder.get_input_embeddings().register_forward_hook(_leaf).remove)
        for index, place in enumerate(layers):
            _watch(index, place, seen, hooks)
            hooks.enter_context(reading(place.attention, seen.reader(index)))
        # What was made in inference mode cannot be saved for a backward pass.
        given = {name: value.clone() for name, value in inputs.items()}
        if isinstance(model, MHEXForSequenceClassification):
            return _of_blocks(model, given, layers, seen)
        return _of_the_library(model, given, layers, seen)


@contextmanager
def attention_shown(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Inside, each forward pass leaves its attention weights (B, H, T, T) by the layer's index.

    What is switched for that is switched back afterwards, also when something raises; see `capture`.

    Raises:
        TypeError: The model is no module.
        ValueError: The encoder is of a family that is not supported.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    encoder = encoder_of(model)
    layers = places(encoder)
    seen = _Seen()
    with attending_eagerly(encoder, [place.attention for place in layers]), ExitStack() as hooks:
        for index, place in enumerate(layers):
            _watch(index, place, seen, hooks)
        yield seen.weights


@dataclass(frozen=True)
class _Seen:
    """What one forward pass showed, by the layer's index."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)

    def reader(self, index: int) -> Any:
        """What gives a layer's attention a tensor of its own to read, the same one in value."""

        def read(given: Tensor) -> Tensor:
            self.inputs[index] = given.view_as(given)
            return self.inputs[index]

        return read

    def in_order(self, values: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
        """Shallow to deep, after a look at whether all of them are there."""
        run = sorted(self.hidden)
        if not run or run != sorted(self.weights) or run != list(range(len(run))):
            raise ValueError(
                f"model must run the layers of its encoder in order and show their attention, got the inputs of "
                f"layers {run} and the attention of layers {sorted(self.weights)}"
            )
        return tuple(values[index] for index in run)


def _of_the_library(model: nn.Module, inputs: dict[str, Tensor], layers: Sequence[Place], seen: _Seen) -> Captured:
    """A sequence classifier of transformers, called as it is."""
    encoder, last = encoder_of(model), layers[-1].layer
    called: list[Arguments] = []
    ended: list[Tensor] = []
    final: list[Tensor] = []

    def calling(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        called.append(without_first(args, kwargs))

    def ending(module: nn.Module, args: object, output: Any) -> None:
        del module, args
        ended.append(handed_on(encoder, output))

    def closing(module: nn.Module, args: object, output: Any) -> None:
        del module, args
        final.append(output[0])

    with ExitStack() as hooks:
        hooks.callback(last.register_forward_pre_hook(calling, with_kwargs=True).remove)
        end = only_layers_convolution(encoder)
        hooks.callback((last if end is None else end).register_forward_hook(ending).remove)
        hooks.callback(encoder.register_forward_hook(closing).remove)
        logits = logits_of(model, inputs)
    hidden = seen.in_order(seen.hidden)
    if not (len(hidden) == len(layers) and len(called) == len(ended) == len(final) == 1):
        raise ValueError(f"model must run all {len(layers)} layers of its encoder once, got {len(hidden)} that ran")
    averaged = getattr(encoder.config, "classifier_pooling", "cls") == "mean"
    readout = _readout(inputs, logits, averaged=averaged)
    return Captured(
        logits=logits,
        features=read_out(final[0], readout),
        hidden=hidden,
        attention_inputs=seen.in_order(seen.inputs),
        attentions=seen.in_order(seen.weights),
        outputs=(*hidden[1:], ended[0]),
        readout=readout,
        tail=PlainTail(place=layers[-1], model=model, inputs=inputs, called=called[0], readout=readout),
    )


def _of_blocks(
    model: MHEXForSequenceClassification, inputs: dict[str, Tensor], layers: Sequence[Place], seen: _Seen
) -> Captured:
    """A classifier with blocks, layer by layer as its forward runs them."""
    unknown = [name for name in inputs if name not in EncoderInputs.__annotations__]
    if unknown:
        raise TypeError(f"inputs must be among {', '.join(EncoderInputs.__annotations__)}, got {', '.join(unknown)}")
    adapter, encoder, mask = model._adapter, model.encoder, inputs.get("attention_mask")
    blocks: dict[int, Any] = dict(zip(model.layer_indices, model.blocks, strict=True))
    empty: Any = dict.fromkeys(EncoderInputs.__annotations__)
    hidden, context = adapter.embed(encoder, **empty | inputs)
    outputs, heads = [], []
    with reads_of_the_last_head(model) as read:
        for index in range(model.layer_indices[-1] + 1):
            hidden, output = adapter.run_layer(encoder, index, hidden, context, blocks.get(index), mask)
            outputs.append(hidden)
            if output is not None:
                heads.append(output.logits)
    logits = model.objective.prediction(heads)
    return Captured(
        logits=logits,
        features=read[-1],
        hidden=seen.in_order(seen.hidden),
        attention_inputs=seen.in_order(seen.inputs),
        attentions=seen.in_order(seen.weights),
        outputs=tuple(outputs),
        readout=_readout(inputs, logits, averaged=True),
        tail=BlockTail(
            place=layers[model.layer_indices[-1]],
            model=model,
            context=tuple(None if value is None else value.detach() for value in context),
            mask=mask,
            heads=tuple(head.detach() for head in heads[:-1]),
        ),
    )


def _readout(inputs: Mapping[str, Tensor], logits: Tensor, *, averaged: bool) -> Tensor:
    """The shares (B, T) with which tokens are read, float32 or wider."""
    ids = inputs["input_ids"]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if not averaged:
        return (torch.arange(ids.shape[1], device=ids.device) == 0).to(dtype).repeat(len(ids), 1)
    mask = inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=dtype) if mask is None else (mask != 0).to(dtype)
    return real / real.sum(dim=1, keepdim=True).clamp(min=1)


def _watch(index: int, place: Place, seen: _Seen, hooks: ExitStack) -> None:
    def reads(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        _note("input", seen.hidden, first_of(args, kwargs))

    def attended(module: nn.Module, args: object, output: Any) -> None:
        del module, args
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor):
            seen.weights[index] = output[1]

    def dropped(module: nn.Module, args: object, output: Tensor) -> None:
        del module, args
        _note("attention", seen.weights, output)

    def _note(what: str, found: dict[int, Tensor], value: Any) -> None:
        if not isinstance(value, Tensor) or index in found:
            raise ValueError(f"model must run each layer once, on a tensor, got another {what} of layer {index}")
        found[index] = value

    hooks.callback(place.reads.register_forward_pre_hook(reads, with_kwargs=True).remove)
    hooks.callback(place.attention.register_forward_hook(attended).remove)
    dropout = getattr(place.attention, "dropout", None)
    if isinstance(dropout, nn.Module):
        # DeBERTa, and DistilBERT in transformers 4, hand their weights out on demand only; they pass through here.
        hooks.callback(dropout.register_forward_hook(dropped).remove)
    elif "output_attentions" in signature(place.attention.forward).parameters:  # ModernBERT in transformers 4
        hooks.callback(place.attention.register_forward_pre_hook(_demanded, with_kwargs=True).remove)


def _demanded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    del module
    return args, kwargs | {"output_attentions": True}


def _leaf(module: nn.Module, args: object, output: Tensor) -> Tensor:
    """Word embeddings as the leaf where the graph begins, whether or not parameters want gradients."""
    del module, args
    return output.detach().requires_grad_()

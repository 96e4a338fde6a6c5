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
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mhex_core import _checks
from mhex_core.modes import in_evaluation_mode

_BERT_LIKE = ("bert", "camembert", "electra", "roberta", "xlm-roberta", "deberta-v2")
SUPPORTED = tuple(sorted((*_BERT_LIKE, "distilbert", "modernbert")))
"""The `model_type` of every encoder whose layers can be captured."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Captured:
    """What one forward pass gave: one graph, so that `torch.autograd.grad` finds its way from logits to the rest.

    Attributes:
        logits: (B, K).
        hidden: L tensors (B, T, C), what enters each layer, shallow to deep.
        attentions: L tensors (B, H, T, T), weights after the softmax: row query, column key. Those of padded queries
            mean nothing.
    """

    logits: Tensor
    hidden: tuple[Tensor, ...]
    attentions: tuple[Tensor, ...]

    def gradients(self, targets: Tensor, of: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of each text's target logit, by one backward pass; the graph is kept.

        Args:
            targets: int64 (B,).
            of: Tensors of this object. One that no target depends on has the gradient 0.

        Raises:
            TypeError: The targets are of another type.
            ValueError: They do not fit.
        """
        batch, classes = self.logits.shape
        wanted = _checks.class_indices(
            "targets", targets, batch=batch, num_classes=classes, device=self.logits.device
        ).reshape(batch, -1)
        # One text's logit does not depend on another's tokens: the sum's gradient is that of each.
        with torch.inference_mode(mode=False), torch.enable_grad():
            total = self.logits.gather(1, wanted.clone()).sum()
        return torch.autograd.grad(total, list(of), retain_graph=True, materialize_grads=True)


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
    encoder = encoder_of(model)
    places = _places(encoder)
    hidden: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}
    attentions = [place.attention for place in places]
    with ungraded(model), attending_eagerly(encoder, attentions), torch.set_grad_enabled(graph), ExitStack() as hooks:
        embeddings = encoder.get_input_embeddings()
        hooks.callback(embeddings.register_forward_hook(_leaf).remove)
        for index, place in enumerate(places):
            _watch(index, place, hidden, weights, hooks)
        # What was made in inference mode cannot be saved for a backward pass.
        logits = logits_of(model, {name: value.clone() for name, value in inputs.items()})
    run = sorted(hidden)
    if not run or run != sorted(weights) or run != list(range(len(run))):
        raise ValueError(
            f"model must run the layers of its encoder in order and show their attention, got the inputs of layers "
            f"{run} and the attention of layers {sorted(weights)}"
        )
    return Captured(
        logits=logits,
        hidden=tuple(hidden[index] for index in run),
        attentions=tuple(weights[index] for index in run),
    )


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
    places = _places(encoder)
    hidden: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}
    with attending_eagerly(encoder, [place.attention for place in places]), ExitStack() as hooks:
        for index, place in enumerate(places):
            _watch(index, place, hidden, weights, hooks)
        yield weights


def encoder_of(model: nn.Module) -> Any:
    """The encoder inside a text classifier.

    Raises:
        ValueError: There is none of a supported family.
    """
    encoder = getattr(model, "base_model", None)
    family = getattr(getattr(encoder, "config", None), "model_type", None)
    if family not in SUPPORTED:
        raise ValueError(
            f"model must be a sequence classifier with an encoder of the families {', '.join(SUPPORTED)}, "
            f"got {type(model).__name__}" + ("" if family is None else f" with {family!r}")
        )
    return encoder


def logits_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's logits (B, K).

    Raises:
        ValueError: It gives no such logits.
    """
    output = model(**inputs)
    logits = getattr(output, "logits", None)
    batch = inputs["input_ids"].shape[0]
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != batch:
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ValueError(f"model must give logits of shape ({batch}, K), got {came}")
    return logits


@contextmanager
def ungraded(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, gradients on, and none for parameters; all as it was afterwards."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.inference_mode(mode=False), torch.enable_grad(), in_evaluation_mode(model):
        try:
            for parameter in wanting:
                parameter.requires_grad = False
            yield
        finally:
            for parameter in wanting:
                parameter.requires_grad = True


@contextmanager
def attending_eagerly(encoder: Any, attentions: Sequence[nn.Module]) -> Iterator[None]:
    """The attention that shows its weights, for a while.

    Args:
        encoder: The encoder.
        attentions: Its self-attention modules.
    """
    configs = {id(module.config): module.config for module in encoder.modules() if hasattr(module, "config")}
    forms = [(config, config._attn_implementation) for config in configs.values()]
    # In transformers 4 most families chose when they were built: by a class for each attention, and a word beside it.
    kinds = [(module, type(module)) for module in attentions if _by_class(type(module))]
    worded = [(module, module.attn_implementation) for module in encoder.modules() if _has_word(module)]
    try:
        for config, _ in forms:
            config._attn_implementation = "eager"
        for module, kind in kinds:
            module.__class__ = kind.__mro__[kind.__mro__.index(nn.Module) - 1]
        for module, _ in worded:
            module.attn_implementation = "eager"
        yield
    finally:
        for config, form in forms:
            config._attn_implementation = form
        for module, kind in kinds:
            module.__class__ = kind
        for module, word in worded:
            module.attn_implementation = word


class _Place(NamedTuple):
    """Where one layer shows what it is given, and what it attends to."""

    reads: nn.Module  # its first argument is what enters the layer
    attention: nn.Module


def _places(encoder: Any) -> list[_Place]:
    family = encoder.config.model_type
    if family == "distilbert":
        return [_Place(layer.attention, layer.attention) for layer in encoder.transformer.layer]
    if family == "modernbert":
        return [_Place(layer.attn_norm, layer.attn) for layer in encoder.layers]
    return [_Place(layer.attention, layer.attention.self) for layer in encoder.encoder.layer]


def _watch(index: int, place: _Place, hidden: dict[int, Tensor], weights: dict[int, Tensor], hooks: ExitStack) -> None:
    def reads(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        _note("input", hidden, args[0] if args else kwargs.get("hidden_states", kwargs.get("query")))

    def attended(module: nn.Module, args: object, output: Any) -> None:
        del module, args
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor):
            weights[index] = output[1]

    def dropped(module: nn.Module, args: object, output: Tensor) -> None:
        del module, args
        _note("attention", weights, output)

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


def _demanded(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    del module
    return args, kwargs | {"output_attentions": True}


def _leaf(module: nn.Module, args: object, output: Tensor) -> Tensor:
    """Word embeddings as the leaf where the graph begins, whether or not parameters want gradients."""
    del module, args
    return output.detach().requires_grad_()


def _by_class(kind: type) -> bool:
    return "Sdpa" in kind.__name__ or "Flash" in kind.__name__


def _has_word(module: nn.Module) -> bool:
    return isinstance(getattr(module, "attn_implementation", None), str)

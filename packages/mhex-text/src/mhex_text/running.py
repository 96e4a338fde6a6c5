"""Running the encoder of a text classifier so that its layers can be looked at: where they are, and in which mode.

Letters: B batch, T tokens, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mhex_core.modes import in_evaluation_mode

_BERT_LIKE = ("bert", "camembert", "electra", "roberta", "xlm-roberta", "deberta-v2")
SUPPORTED = tuple(sorted((*_BERT_LIKE, "distilbert", "modernbert")))
"""The `model_type` of every encoder whose layers can be captured."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is called with: by place, and by name."""


class Place(NamedTuple):
    """Where one layer shows what it is given, and what it attends to.

    Attributes:
        layer: The whole layer, as the encoder calls it.
        reads: Its first argument is what enters the layer.
        attention: Its first argument is what attention reads, and nothing else: no shortcut leads through it.
        norm: The normalisation between the two, where there is one before attention.
    """

    layer: nn.Module
    reads: nn.Module
    attention: nn.Module
    norm: nn.Module | None


def places(encoder: Any) -> list[Place]:
    """The layers of a supported encoder, shallow to deep."""
    family = encoder.config.model_type
    if family == "distilbert":
        return [Place(layer, layer.attention, layer.attention, None) for layer in encoder.transformer.layer]
    if family == "modernbert":
        return [Place(layer, layer.attn_norm, layer.attn, layer.attn_norm) for layer in encoder.layers]
    return [Place(layer, layer.attention, layer.attention.self, None) for layer in encoder.encoder.layer]


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


@contextmanager
def reading(attention: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, self-attention reads something else than it is given.

    Args:
        attention: As in `Place`.
        change: Takes what it is given (B, T, C), and gives what it reads instead.
    """

    def changed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        del module
        return _with_first(args, kwargs, change(first_of(args, kwargs)))

    handle = attention.register_forward_pre_hook(changed, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def first_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a layer or its attention is called with in the first place, or None."""
    return args[0] if args else kwargs.get("hidden_states", kwargs.get("query"))


def without_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments that a layer has besides the first."""
    return args[1:], {name: value for name, value in kwargs.items() if args or name != "hidden_states"}


def handed_on(encoder: Any, output: Any) -> Any:
    """What a layer hands on, out of what its call returns: in transformers 4 beside its attention."""
    if isinstance(output, tuple):
        return output[-1] if encoder.config.model_type == "distilbert" else output[0]
    return output


def of_rows(value: Any, rows: Tensor) -> Any:
    """What belongs to B texts for N rows, each of some text: tensors (B, ...) as (N, ...), also in tuples.

    Args:
        value: A tensor, a tuple of such, or something else, which stays as it is. What has a first dimension of 1 is
            shared by all texts.
        rows: int64 (N,), the text of each row.
    """
    if isinstance(value, Tensor) and value.ndim:
        return value.expand(len(rows), *value.shape[1:]) if value.shape[0] == 1 else value[rows]
    if isinstance(value, tuple):
        return tuple(of_rows(part, rows) for part in value)
    return value


def _with_first(args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor) -> Arguments:
    if args:
        return (value, *args[1:]), kwargs
    # DistilBERT's attention of transformers 4 takes the same tensor three times.
    names = ("query", "key", "value") if "query" in kwargs else ("hidden_states",)
    return args, kwargs | dict.fromkeys(names, value)


def _by_class(kind: type) -> bool:
    return "Sdpa" in kind.__name__ or "Flash" in kind.__name__


def _has_word(module: nn.Module) -> bool:
    return isinstance(getattr(module, "attn_implementation", None), str)

"""How a vision transformer is run block by block.

Letters: B batch, P patches, r prefix tokens (class, distillation, registers), n = r + P tokens, C channels, H heads,
D = C / H, E features, K classes, h x w patch grid.

An architecture knows one family of models. It calls the model's own sub-modules in the model's own order and hands
every intermediate result back: no hooks, nothing written on modules. One that normalises before its sub-layers, as all
of these do, is

    X, grid = embed(images)
    for each block:  T = normalize(X);  X = X + attend(T);  X = X + feed_forward(X)
    logits = classify(features(X))

and gives the model's own logits bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Grid = tuple[int, int]
"""h and w: rows and columns of patches."""

# Where a family's classes are defined -> the modules here that know them. A library that a model does not stem from is
# never imported.
_FAMILIES = {"torchvision": ("torchvision",), "timm": ("timm", "timm_places"), "transformers": ("huggingface",)}


class Architecture(ABC):
    """One family of vision transformers. Architectures hold no state: one object serves all models of its family."""

    @abstractmethod
    def check(self, model: Any) -> None:
        """Refuse a model that would be run differently from how it runs itself.

        Raises:
            ValueError: A forward was overridden, or a part is of a kind that is not supported.
        """

    @abstractmethod
    def block_names(self, model: Any) -> tuple[str, ...]:
        """The qualified names of the transformer blocks, shallow to deep."""

    @abstractmethod
    def prefix(self, model: Any) -> int:
        """r, the number of tokens before the patches."""

    @abstractmethod
    def image_size(self, model: Any) -> tuple[int, int]:
        """Height and width in pixels of the images the model was made for."""

    @abstractmethod
    def grid(self, model: Any, size: tuple[int, int]) -> Grid:
        """(h, w) for images of `size` pixels."""

    @abstractmethod
    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, Grid]:
        """What the first block reads, (B, n, C), and the patch grid."""

    @abstractmethod
    def normalize(self, block: Any, hidden: Tensor) -> Tensor:
        """The block's first normalisation: what its attention reads, (B, n, C)."""

    @abstractmethod
    def attend(
        self, block: Any, normed: Tensor, *, weights: bool = False, queries: int | None = None, places: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """The block's attention.

        Args:
            block: One of `blocks`.
            normed: (B, n, C), what `normalize` gave.
            weights: Whether to hand the weights out. They are then a step of the computation, so that gradients with
                respect to them can be asked for, and no fused kernel is used.
            queries: How many of the first tokens look at the others; None means that all do. With `weights` only.
            places: Of `places`, what belongs to this block.

        Returns:
            (B, n, C), what is added to the stream, after projection, layer scale, dropout and stochastic depth; and
            (B, H, n, n), the weights after the softmax and before their dropout (row query, column key), or None. With
            `queries` (B, queries, C) and (B, H, queries, n).
        """

    @abstractmethod
    def feed_forward(self, block: Any, hidden: Tensor) -> Tensor:
        """What the block's feed-forward part adds to the stream `hidden`, its own normalisation included: (B, n, C)."""

    @abstractmethod
    def features(self, model: Any, hidden: Tensor) -> Tensor:
        """What the classifier reads of the last block's output: (B, E), after the last normalisation and the pooling.

        Where two classifiers read a token each, both tokens side by side.
        """

    @abstractmethod
    def classify(self, model: Any, features: Tensor) -> Tensor:
        """Logits (B, K)."""

    @abstractmethod
    def readout(self, model: Any, tokens: int) -> Tensor:
        """The shares with which the last block's n tokens enter the prediction: (n,), sum 1.

        A class token has share 1, tokens that are averaged have equal ones. Of parts that are concatenated or that are
        averaged after their own classifiers, each has the same share.

        Raises:
            ValueError: How much a token counts depends on the image.
        """

    @abstractmethod
    def classifiers(self, model: Any) -> tuple[str, ...]:
        """The names of the linear layers that give the logits."""

    @abstractmethod
    def after_blocks(self, model: Any) -> tuple[str, ...]:
        """The names of the modules that only what follows the last block needs."""

    def idle(self, model: Any) -> tuple[str, ...]:  # noqa: ARG002
        """The names of parameters that no classification computes with; none, as a rule."""
        return ()

    def places(self, model: Any, grid: Grid) -> tuple[Any, ...]:  # noqa: ARG002
        """What the attention of each block is told of places, besides what the tokens hold; nothing, as a rule."""
        return (None,) * len(self.blocks(model))

    def blocks(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """The transformer blocks, shallow to deep."""
        return tuple(model.get_submodule(name) for name in self.block_names(model))

    def width(self, model: nn.Module) -> int:
        """C."""
        first = next(self.blocks(model)[0].parameters())  # of the first normalisation, or of what reads the stream
        return int(first.shape[-1])

    def num_classes(self, model: nn.Module) -> int | None:
        """K, or None where the model has no classifier."""
        layers = [model.get_submodule(name) for name in self.classifiers(model)]
        counts = {layer.out_features for layer in layers if isinstance(layer, nn.Linear)}
        return counts.pop() if len(counts) == 1 and all(isinstance(layer, nn.Linear) for layer in layers) else None

    def set_num_classes(self, model: nn.Module, num_classes: int) -> bool:
        """Give the model fresh classifiers with `num_classes` outputs; say whether they had to be replaced.

        Raises:
            ValueError: The model does not end in an `nn.Linear`.
        """
        present = self.num_classes(model)
        if present is None:
            raise ValueError(
                f"classifier='keep' needs a backbone whose last layer is an nn.Linear, and that of "
                f"{type(model).__name__} is none; use classifier='drop'"
            )
        if present == num_classes:
            return False
        for name in self.classifiers(model):
            parent, _, child = name.rpartition(".")
            last: Any = model.get_submodule(name)
            fresh = nn.Linear(last.in_features, num_classes, bias=last.bias is not None)
            setattr(model.get_submodule(parent), child, fresh.to(device=last.weight.device, dtype=last.weight.dtype))
        self.note_num_classes(model, num_classes)
        return True

    def note_num_classes(self, model: Any, num_classes: int) -> None:
        """Write K wherever else the model keeps it."""
        model.num_classes = num_classes


def architecture_of(model: nn.Module) -> Architecture | None:
    """The architecture of a vision transformer of torchvision, timm or transformers; None for any other network.

    Raises:
        ValueError: The model is one, and cannot be run as its family runs: its forward was overridden, or a part is of
            a kind that is not supported.
    """
    for base in type(model).__mro__:
        family = _FAMILIES.get(base.__module__.partition(".")[0])
        if family is None:
            continue
        for module in family:
            known: dict[tuple[str, str], Architecture] = import_module(f"mhex_vision.vit.{module}").ARCHITECTURES
            architecture = known.get((base.__module__, base.__name__))
            if architecture is not None:
                architecture.check(model)
                return architecture
    return None


def refuse_overridden(part: nn.Module, kind: tuple[str, str], methods: Sequence[str] = ("forward",)) -> None:
    """Refuse a module that is not of the class it should be, or that does something else than that class.

    Args:
        part: The module.
        kind: Where the class is defined, and its name.
        methods: What must be the class's own.

    Raises:
        ValueError: The module is of another class, or overrides one of the methods.
    """
    of = type(part)
    base = next((base for base in of.__mro__ if (base.__module__, base.__name__) == kind), None)
    if base is None:
        raise ValueError(f"model must be made of {kind[1]} modules of {kind[0]}, got {of.__module__}.{of.__name__}")
    for method in methods:
        if getattr(of, method) is not getattr(base, method) or method in vars(part):
            raise ValueError(f"model must run as its family runs, and {of.__name__} overrides {method} of {kind[1]}")


def softmax_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale), (B, H, n, n), of queries and keys (B, H, n, D)."""
    return ((query * scale) @ key.transpose(-2, -1)).softmax(dim=-1)


def project(normed: Tensor, weight: Tensor, bias: Tensor | None, queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the first tokens (None: of all), keys and values, by one matrix (3 H D, C) that holds all three."""
    if queries is None:
        query, key, value = F.linear(normed, weight, bias).chunk(3, dim=-1)
        return query, key, value
    size = weight.shape[0] // 3
    query = F.linear(normed[:, :queries], weight[:size], None if bias is None else bias[:size])
    key, value = F.linear(normed, weight[size:], None if bias is None else bias[size:]).chunk(2, dim=-1)
    return query, key, value


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(B, n, H D) -> (B, H, n, D)."""
    batch, count, width = tokens.shape
    return tokens.reshape(batch, count, heads, width // heads).transpose(1, 2)


def join_heads(tokens: Tensor) -> Tensor:
    """(B, H, n, D) -> (B, n, H D)."""
    return tokens.transpose(1, 2).flatten(2)


def one_hot(tokens: int, *places: int) -> Tensor:
    """Equal shares of some tokens, none of the others: (n,)."""
    shares = torch.zeros(tokens)
    shares[list(places)] = 1 / len(places)
    return shares


def evenly(tokens: int, start: int) -> Tensor:
    """Equal shares of all tokens from `start` on: (n,)."""
    shares = torch.zeros(tokens)
    shares[start:] = 1 / (tokens - start)
    return shares

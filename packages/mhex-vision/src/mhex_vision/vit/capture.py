"""One forward pass of a vision transformer, with what enters its blocks and what they attend to.

Letters: B batch, P patches, r prefix tokens, n = r + P tokens, C channels, H heads, E features, K classes, L blocks,
h x w patch grid, N rows of a repeated last block, m maps.

It works for the families that `architecture_of` knows, alone, in a `PlainClassifier` and in an `MHEXClassifier`. The
model itself is not touched: a second view of it is run, with the same values and without gradients for parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhex_core import BlockOutput, DeepSupervisionLoss, _checks
from mhex_core.attention import target_gradients
from mhex_vision.surgery import Block
from mhex_vision.vit.architecture import Architecture, Grid, architecture_of
from mhex_vision.vit.running import BlockRun, run_block
from mhex_vision.vit.ungraded import ungraded


@dataclass(frozen=True, kw_only=True, eq=False)
class Captured:
    """What one forward pass gave: one graph, so that `torch.autograd.grad` finds its way from logits to the rest.

    Attributes:
        logits: (B, K), the prediction.
        features: (B, E), what the model's own classifier reads; None for an `MHEXClassifier` without one.
        inputs: L tensors (B, n, C), what enters each block, shallow to deep. The first is where the graph begins.
        normed: L tensors (B, n, C), the output of each block's first normalisation, which its attention reads.
        attentions: L tensors (B, H, n, n), weights after the softmax: row query, column key.
        outputs: L tensors (B, n, C), what leaves each block.
        grid: (h, w).
        prefix: r.
        readout: (n,), the shares with which the tokens of the last block's output enter the prediction, sum 1. For an
            `MHEXClassifier` without a classifier of its own these are equal shares of the patches, over which the last
            head averages.
        blocks: What the MHEX blocks handed out, shallow to deep, with activations of all tokens (B, n, C); empty where
            there are none.
        block_names: L names, such as "blocks.3".
        tail: The last block and what follows, to be run again on something else.
    """

    logits: Tensor
    features: Tensor | None
    inputs: tuple[Tensor, ...]
    normed: tuple[Tensor, ...]
    attentions: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    grid: Grid
    prefix: int
    readout: Tensor
    blocks: tuple[BlockOutput, ...]
    block_names: tuple[str, ...]
    tail: Tail

    def gradients(self, targets: Tensor, of: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of each image's target logit, by one backward pass; the graph is kept.

        Args:
            targets: int64 (B,).
            of: Tensors of this object. One that no target depends on has the gradient 0.

        Raises:
            TypeError: The targets are of another type.
            ValueError: They do not fit, or nothing was kept to go back through (`graph=False`).
        """
        return target_gradients(self.logits, targets, of)

    def maps(self, scores: Tensor) -> Tensor:
        """Scores of tokens as maps: prefix tokens are dropped, patches put in their places.

        Args:
            scores: (B, n) or (B, m, n).

        Returns:
            (B, h, w) or (B, m, h, w), a view.

        Raises:
            ValueError: There are scores for another number of tokens.
        """
        tokens = self.prefix + self.grid[0] * self.grid[1]
        scores = _checks.tensor("scores", scores, ndim=(2, 3), floating=False)
        if scores.shape[-1] != tokens:
            raise ValueError(f"scores must hold {tokens} tokens in the last dimension, got shape {tuple(scores.shape)}")
        return scores[..., self.prefix :].view(*scores.shape[:-1], *self.grid)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tail:
    """The last block and what follows, as they were captured: evaluation mode, no gradients for parameters.

    It runs under the caller's gradient mode. `normed` is handed over apart from `hidden`, so that one can be changed
    without the other; `normalize` is what makes the first of the second. With what was captured itself, the logits
    are the captured ones, up to rounding: of the last block's output no more is computed than the prediction reads,
    which for a class token is a sixth of the block.
    """

    _parts: Parts
    _heads: tuple[Tensor, ...]
    _grid: Grid

    def normalize(self, hidden: Tensor) -> Tensor:
        """The last block's first normalisation: (N, n, C) to (N, n, C)."""
        return self._parts.normalize(-1, hidden)

    def logits(self, hidden: Tensor, normed: Tensor, rows: Tensor) -> Tensor:
        """The prediction.

        Args:
            hidden: (N, n, C), what enters the last block.
            normed: (N, n, C), what its attention reads.
            rows: int64 (N,), the image each row belongs to. The joint prediction of an `MHEXClassifier` needs to know:
                its earlier heads say what they said of that image.

        Returns:
            (N, K).
        """
        run = self._parts.run(-1, hidden, normed, self._grid, queries=self._parts.tokens_read(hidden.shape[1]))
        heads = tuple(head.to(hidden.device)[rows] for head in self._heads)
        return self._parts.predict(run, heads)

    def features(self, hidden: Tensor, normed: Tensor) -> Tensor:
        """What the model's own classifier reads: (N, E).

        Raises:
            ValueError: The model is an `MHEXClassifier` without one.
        """
        network = self._parts
        if not network.keeps:
            raise ValueError("features need the model's own classifier, got an MHEXClassifier with classifier='drop'")
        run = network.run(-1, hidden, normed, self._grid, queries=network.tokens_read(hidden.shape[1]))
        return network.architecture.features(network.model, run.output)


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """A model in parts, to be run block by block with its attention shown; see `take_apart`.

    Attributes:
        architecture: How it is run.
        model: The vision transformer, without gradients.
        layers: Its L blocks.
        blocks: L MHEX blocks, or None where there is none.
        keeps: Whether the vision transformer's own classifier predicts, alone or with the heads.
        loss: How the prediction is made of the heads' logits; None where there are no heads.
    """

    architecture: Architecture
    model: nn.Module
    layers: tuple[nn.Module, ...]
    blocks: tuple[Block | None, ...]
    keeps: bool
    loss: DeepSupervisionLoss | None

    def normalize(self, index: int, hidden: Tensor) -> Tensor:
        """The first normalisation of block `index`: (B, n, C)."""
        return self.architecture.normalize(self.layers[index], hidden)

    def run(self, index: int, hidden: Tensor, normed: Tensor, grid: Grid, *, queries: int | None = None) -> BlockRun:
        """Block `index` on what enters it and what its attention reads, both (B, n, C), of patches in this grid.

        With `queries`, the output of the first so many tokens alone, and nothing of the MHEX block.
        """
        prefix = self.architecture.prefix(self.model)
        layer = self.layers[index]
        block = self.blocks[index] if queries is None else None
        places = self.architecture.places(self.model, grid)[index]
        return run_block(
            self.architecture, layer, hidden, normed, block, prefix, weights=True, queries=queries, places=places
        )

    def tokens_read(self, tokens: int) -> int | None:
        """How many of the first tokens of the last output the prediction is made of; None means all."""
        last = self.blocks[-1]
        watched_only = last is None or (
            not getattr(last, "gated", True) and self.loss is not None and self.loss.mode == "layerwise"
        )
        if not self.keeps or not watched_only:
            return None
        read = int(self.architecture.readout(self.model, tokens).nonzero().max()) + 1
        return read if read <= self.architecture.prefix(self.model) else None

    def predict(self, last: BlockRun, earlier: tuple[Tensor, ...], features: Tensor | None = None) -> Tensor:
        """The prediction, from the last block, the logits of the heads before it, and the features where they exist."""
        supervised = earlier if last.mhex is None else (*earlier, last.mhex.logits)
        if self.keeps:
            read = self.architecture.features(self.model, last.output) if features is None else features
            own = self.architecture.classify(self.model, read)
            supervised = (*supervised, own)
        return supervised[-1] if self.loss is None else self.loss.prediction(supervised)


def capture(model: nn.Module, images: Tensor, *, graph: bool = True) -> Captured:
    """Run a vision transformer once, in evaluation mode, and hold on to what explanations read.

    Gradients can be asked for also where the caller has turned them off. Parameters take no part in the graph, and the
    model is neither changed nor switched: other threads may use it meanwhile.

    Args:
        model: A vision transformer that `architecture_of` knows, alone, in a `PlainClassifier` or in an
            `MHEXClassifier`.
        images: (B, 3, H, W), normalised as the model expects, on its device.
        graph: Whether gradients will be asked for; without, less is kept in memory.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The model is no such vision transformer, or the images do not fit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    images = _checks.tensor("images", images, ndim=4)
    graph = _checks.flag("graph", graph)
    with torch.inference_mode(mode=False), torch.no_grad():
        network = take_apart(model)
        architecture = network.architecture
        # What was made in inference mode cannot be saved for a backward pass.
        hidden, grid = architecture.embed(network.model, images.clone())
    prefix = architecture.prefix(network.model)
    tokens = prefix + grid[0] * grid[1]
    if hidden.shape[1] != tokens:
        raise ValueError(f"model must read {prefix} tokens and a grid of {grid} patches, got {hidden.shape[1]} tokens")
    readout = _readout(network, tokens)
    inputs, normed, runs = [], [], []
    with torch.inference_mode(mode=False), torch.set_grad_enabled(graph):
        hidden = hidden.detach().requires_grad_(graph)
        for index in range(len(network.layers)):
            inputs.append(hidden)
            normed.append(network.normalize(index, hidden))
            runs.append(network.run(index, hidden, normed[-1], grid))
            hidden = runs[-1].output
        heads = tuple(run.mhex.logits for run in runs[:-1] if run.mhex is not None)
        features = architecture.features(network.model, hidden) if network.keeps else None
        logits = network.predict(runs[-1], heads, features)
    return Captured(
        logits=logits,
        features=features,
        inputs=tuple(inputs),
        normed=tuple(normed),
        attentions=tuple(run.attention for run in runs if run.attention is not None),
        outputs=tuple(run.output for run in runs),
        grid=grid,
        prefix=prefix,
        readout=readout.to(logits),
        blocks=tuple(run.mhex for run in runs if run.mhex is not None),
        block_names=architecture.block_names(network.model),
        tail=Tail(_parts=network, _heads=tuple(head.detach() for head in heads), _grid=grid),
    )


def take_apart(model: nn.Module) -> Parts:
    """A second view of a model, in evaluation mode and without gradients for parameters.

    Raises:
        ValueError: It is no vision transformer that `architecture_of` knows, alone or in a classifier.
    """
    from mhex_vision.classifier import MHEXClassifier
    from mhex_vision.plain import PlainClassifier

    classifier = model if isinstance(model, MHEXClassifier) else None
    inner: Any = model.backbone if isinstance(model, (MHEXClassifier, PlainClassifier)) else model
    architecture = architecture_of(inner)
    if architecture is None:
        raise ValueError(
            "model must be a vision transformer of torchvision, timm or transformers, alone or in a classifier of "
            f"mhex_vision, got {type(inner).__name__}"
        )
    network = ungraded(inner)
    blocks: dict[str, Block] = {}
    if classifier is not None:
        views: Any = ungraded(classifier.blocks)
        blocks = dict(zip(classifier.layer_names, views, strict=True))
    return Parts(
        architecture=architecture,
        model=network,
        layers=architecture.blocks(network),
        blocks=tuple(blocks.get(name) for name in architecture.block_names(network)),
        keeps=classifier is None or classifier.config.classifier == "keep",
        loss=None if classifier is None else classifier.loss(),
    )


def _readout(network: Parts, tokens: int) -> Tensor:
    if network.keeps:
        return network.architecture.readout(network.model, tokens)
    prefix = network.architecture.prefix(network.model)
    shares = torch.ones(tokens)
    shares[:prefix] = 0
    return shares / shares.sum()

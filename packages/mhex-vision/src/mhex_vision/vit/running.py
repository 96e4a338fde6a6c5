"""A vision transformer run with MHEX blocks on its feed-forward connections.

Letters: B batch, n tokens of which the first r are no patches, C channels, h x w patch grid.
Source: Sun and Liò, "Multi-Head Explainer" (arXiv 2501.01311), with the gate of blocks that normalise first: the
shortcut is the stream after the attention, the branch the feed-forward part, and the gate multiplies the shortcut of
all tokens. Averages are over patches only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mhex_core import BlockOutput
from mhex_vision.surgery import Block, CompiledForward, call_block
from mhex_vision.vit.architecture import Architecture, Grid


class BlockRun(NamedTuple):
    """What one transformer block gave.

    Attributes:
        output: (B, n, C), what the next block reads.
        mhex: What its MHEX block handed out, with the activation of all tokens (B, n, C); None where there is none.
        attention: (B, H, n, n), or None where it was not asked for.
    """

    output: Tensor
    mhex: BlockOutput | None
    attention: Tensor | None


def compile_forward(architecture: Architecture, places: Mapping[int, int], *, keep_output: bool) -> CompiledForward:
    """A function that runs a vision transformer with MHEX blocks.

    Args:
        architecture: How it is run.
        places: The index of a transformer block -> that of its MHEX block.
        keep_output: Whether the model's own logits are wanted. If not, what follows the last MHEX block is left out.

    Returns:
        A function (backbone, images, blocks) -> (logits or None, block outputs), whose activations are feature maps
        (B, C, h, w) of the patches, views of the stream.
    """
    last = max(places, default=-1)

    def forward(
        backbone: nn.Module, images: Tensor, blocks: Sequence[Block]
    ) -> tuple[Any, tuple[BlockOutput | None, ...]]:
        hidden, grid = architecture.embed(backbone, images)
        prefix, places_told = architecture.prefix(backbone), architecture.places(backbone, grid)
        outputs: list[BlockOutput | None] = [None] * len(places)
        for index, layer in enumerate(architecture.blocks(backbone)):
            if index > last and not keep_output:
                break
            normed = architecture.normalize(layer, hidden)
            block = blocks[places[index]] if index in places else None
            run = run_block(architecture, layer, hidden, normed, block, prefix, places=places_told[index])
            hidden = run.output
            if run.mhex is not None:
                activation = patch_maps(run.mhex.activation, prefix, grid)
                outputs[places[index]] = run.mhex._replace(activation=activation)
        own = architecture.classify(backbone, architecture.features(backbone, hidden)) if keep_output else None
        return own, tuple(outputs)

    return forward


def run_block(
    architecture: Architecture,
    layer: nn.Module,
    hidden: Tensor,
    normed: Tensor,
    block: Block | None,
    prefix: int,
    *,
    weights: bool = False,
    queries: int | None = None,
    places: Any = None,
) -> BlockRun:
    """One transformer block, with or without an MHEX block.

    Args:
        architecture: How it is run.
        layer: The transformer block.
        hidden: (B, n, C), what enters it.
        normed: (B, n, C), what its attention reads.
        block: Its MHEX block, or None.
        prefix: r, how many of the first tokens the MHEX block does not average over.
        weights: Whether the attention is wanted.
        queries: How many of the first tokens the output is wanted of; None means all. With `weights` and without an
            MHEX block only.
        places: What the attention is told of places.
    """
    added, attention = architecture.attend(layer, normed, weights=weights, queries=queries, places=places)
    shortcut = hidden[:, :queries] + added
    branch = architecture.feed_forward(layer, shortcut)
    if block is None:
        return BlockRun(shortcut + branch, None, attention)
    output, mhex = call_block(block, shortcut, branch, prefix=prefix, channels_last=True)
    if not getattr(block, "gated", False) and output.stride() != shortcut.stride():
        # Without prefix tokens the stream may lie in memory channel by channel. How it lies decides how later sums are
        # split, and so their last bits, which a block that only watches must leave alone.
        output = torch.empty_like(shortcut).copy_(output)
    return BlockRun(output, mhex, attention)


def patch_maps(tokens: Tensor, prefix: int, grid: Grid) -> Tensor:
    """The patches among tokens (B, n, C) as a feature map (B, C, h, w), without a copy."""
    batch, _, channels = tokens.shape
    return tokens[:, prefix:].transpose(1, 2).view(batch, channels, *grid)

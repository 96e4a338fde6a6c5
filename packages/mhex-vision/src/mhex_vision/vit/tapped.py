"""A vision transformer whose one feature map passes through somebody else's hands.

Letters: B batch, r prefix tokens, n tokens, C channels, K classes, h x w patch grid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mhex_vision.vit.architecture import architecture_of
from mhex_vision.vit.capture import take_apart
from mhex_vision.vit.running import patch_maps


def block_names(model: nn.Module) -> tuple[str, ...] | None:
    """The names of the blocks of a vision transformer that can be captured, shallow to deep; None for other networks.

    Raises:
        ValueError: It is a vision transformer that cannot be run block by block.
    """
    from mhex_vision.classifier import MHEXClassifier
    from mhex_vision.plain import PlainClassifier

    inner = model.backbone if isinstance(model, MHEXClassifier | PlainClassifier) else model
    architecture = architecture_of(inner)
    return None if architecture is None else architecture.block_names(inner)


def logits_through(model: nn.Module, images: Tensor, block: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Run a model, and let something stand between a block's first normalisation and its attention.

    With a class token, that is the last place whose patches have a gradient in the last block: what leaves it has none.

    Args:
        model: As for `capture`. Parameters take no part in the graph.
        images: (B, 3, H, W), normalised, on the model's device.
        block: The block's name.
        change: Takes the normalised patches as a feature map (B, C, h, w), gives what attention is to read instead.
            What enters the block along the skip connection stays as it is, and the way up to here has no gradients.

    Returns:
        (B, K).

    Raises:
        ValueError: The model is no vision transformer that is known, or `change` gives another shape.
    """
    network = take_apart(model)
    names = network.architecture.block_names(network.model)
    chosen = names.index(block)
    with torch.no_grad():
        hidden, grid = network.architecture.embed(network.model, images)
    prefix = network.architecture.prefix(network.model)
    heads: list[Tensor] = []
    for index in range(len(names)):
        with torch.set_grad_enabled(torch.is_grad_enabled() and index >= chosen):
            normed = network.normalize(index, hidden)
            if index == chosen:
                maps = patch_maps(normed, prefix, grid)
                changed = change(maps)
                if changed.shape != maps.shape:
                    raise ValueError(f"change must give shape {tuple(maps.shape)}, got {tuple(changed.shape)}")
                normed = torch.cat([normed[:, :prefix], changed.flatten(2).transpose(1, 2).to(normed)], dim=1)
            run = network.run(index, hidden, normed, grid)
        hidden = run.output
        if run.mhex is not None and index + 1 < len(names):
            heads.append(run.mhex.logits)
    return network.predict(run, tuple(heads))

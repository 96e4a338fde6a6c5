"""Which layer a class activation map looks at.

Letters: B batch, C channels, h x w size of a feature map, H x W image size.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mhex_vision.classifier import MHEXClassifier
from mhex_vision.layouts import axis_of_output
from mhex_vision.vit.tapped import block_names

# The deepest layer, by image size: asking costs a forward pass, which no comparison of times should find in there.
_deepest: WeakKeyDictionary[nn.Module, dict[tuple[int, int], str]] = WeakKeyDictionary()


def names(model: nn.Module) -> tuple[str, ...]:
    """What `layer` may be.

    The transformer blocks of a vision transformer, an `MHEXClassifier`'s `layer_names`, or the sub-modules of any other
    network.
    """
    blocks = block_names(model)
    if blocks is not None:
        return blocks
    if isinstance(model, MHEXClassifier):
        return model.layer_names
    return tuple(name for name, _ in model.named_modules() if name)


def chosen(model: nn.Module, layer: str | None, images: Tensor) -> str:
    """The layer's name.

    Args:
        model: The network, in evaluation mode.
        layer: A name, or None for the deepest layer with a feature map of more than one position. Of several that give
            the same map it is the outermost, such as the stage and not its last activation function. A sub-module that
            is run more than once in a forward pass is left out.
        images: (B, C, H, W), what the size of feature maps depends on; one image is put through the network.

    Raises:
        ValueError: There is no layer of that name, or no feature map has more than one position.
    """
    known = names(model)
    if layer is not None:
        if layer not in known:
            raise ValueError(f"layer must be one of {', '.join(known)}, got {layer!r}")
        return layer
    if block_names(model) is not None:
        return known[-1]
    size = (images.shape[2], images.shape[3])
    found = _deepest.get(model, {}).get(size)
    if found not in known:
        found = _find_deepest(model, images[:1])
        _deepest.setdefault(model, {})[size] = found
    return found


def _find_deepest(model: nn.Module, image: Tensor) -> str:
    runs: Counter[str] = Counter()
    spatial: list[str] = []
    own = isinstance(model, MHEXClassifier)  # whose blocks are handed (B, C, h, w) by every network

    def note(name: str, features: object) -> None:
        runs[name] += 1
        if not isinstance(features, Tensor) or features.ndim != 4:
            return
        axis = 1 if own else axis_of_output(model.get_submodule(name), features, (image.shape[2], image.shape[3]))
        if features.numel() > features.shape[0] * features.shape[axis]:
            spatial.append(name)

    def before(name: str, module: nn.Module, inputs: tuple[object, ...]) -> None:
        del module
        note(name, inputs[0])

    def after(name: str, module: nn.Module, inputs: object, output: object) -> None:
        del module, inputs
        note(name, output)

    with ExitStack() as hooks, torch.no_grad():
        if isinstance(model, MHEXClassifier):
            for name, block in zip(model.layer_names, model.blocks, strict=True):
                hooks.callback(block.register_forward_pre_hook(partial(before, name)).remove)
        else:
            for name in names(model):
                hooks.callback(model.get_submodule(name).register_forward_hook(partial(after, name)).remove)
        model(image)
    once = [name for name in spatial if runs[name] == 1]
    if not once:
        height, width = image.shape[2:]
        raise ValueError(
            f"model must have a layer with a feature map of more than one position, and {type(model).__name__} has "
            f"none for images of {height} x {width}; use larger images, or name a layer"
        )
    return once[-1]

"""Which axis of a feature map holds its channels.

Letters: B batch, C channels, H x W size of a feature map.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from mhex_vision.tracing import grown_axes, shape_of

_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
_FUNCTIONS: dict[Any, int] = {F.conv2d: 1, F.batch_norm: 1, F.linear: 3, F.layer_norm: 3}


def channel_axes(backbone: nn.Module, graph: fx.Graph) -> dict[fx.Node, int]:
    """Which axis of each tensor of four holds its channels: 1 in (B, C, H, W), 3 in (B, H, W, C), 0 where it is no map.

    Two images of another size tell (see `record_other_shapes`): the two axes that grow with them are rows and columns.
    In windows of a map others do, and they are no map.

    Of a network that takes one size only, layers know: convolutions and batch statistics read axis 1, linear layers and
    layer norms the last. What changes no shape passes it on, from its source or to its reader, and a permutation moves
    it. Maps are then as square as the image. A tensor of which nothing tells is left out.
    """
    maps = [node for node in graph.nodes if len(shape_of(node) or ()) == 4]
    axes: dict[fx.Node, int] = {}
    for node in (*maps, *reversed(maps), *maps):
        sources = [one for one in node.all_input_nodes if len(shape_of(one) or ()) == 4]
        source = next(iter(sources), None)
        layer = _axis_of_layer(backbone, node)
        if layer is not None:
            axes.setdefault(node, layer)
            if source is not None:
                axes.setdefault(source, layer)
            continue
        order = _permutation(backbone, node)
        if source is None:
            continue
        if order is not None:
            if source in axes:
                axes.setdefault(node, order.index(axes[source]))
            elif node in axes:
                axes.setdefault(source, order[axes[node]])
        elif not _rearranges(node):
            alike = [node, *(one for one in sources if shape_of(one) == shape_of(node))]
            known = next((axes[one] for one in alike if one in axes), None)
            if known is not None:
                axes.update({one: axes.get(one, known) for one in alike})
    for node in maps:
        shape, grown = shape_of(node) or (), grown_axes(node)
        if grown[:1] != [0] and "other shape" in node.meta:  # the same for every image
            axes[node] = 0
        if len(grown) > 1:
            axes[node] = 1 if grown == [0, 2, 3] else 3 if grown == [0, 1, 2] else 0
            continue
        readings = {3: shape[1] == shape[2], 1: shape[2] == shape[3]}
        if shape[0] != 1 or not readings.get(axes.get(node, 0), any(readings.values())):
            axes[node] = 0
    return axes


def is_of_windows(backbone: nn.Module, node: fx.Node) -> bool:
    """Whether a tensor of shape (B, m, m, C) is a map cut into m windows of m positions, rather than a map."""
    while True:
        sources = [one for one in node.all_input_nodes if shape_of(one)]
        same = [one for one in sources if shape_of(one) == shape_of(node)]
        if not same:
            break
        node = same[0]
    if any(len(shape_of(one) or ()) > 4 for one in sources):
        return True
    shape = shape_of(sources[0]) if node.all_input_nodes == sources[:1] and node.op == "call_module" else None
    if shape is None or sorted(shape) != sorted(shape_of(node) or ()):
        return False
    module = backbone.get_submodule(str(node.target))
    if any(True for _ in module.parameters()):
        return False
    images = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    given, named = fx.map_arg((node.args, node.kwargs), lambda _: images)
    return not torch.equal(module(*given, **named), images.permute(0, 2, 3, 1))


def axis_of_output(module: nn.Module, features: Tensor, image_size: tuple[int, int]) -> int:
    """Which axis of what a module gives, of four, holds its channels: 1 or 3.

    Rows and columns of a map are to each other as those of the image. Where that holds of both pairs of axes, or of
    neither, the module's last layer tells, see `channel_axes`.
    """
    shape = tuple(features.shape)
    fitting = [axis for axis, (h, w) in ((1, shape[2:]), (3, shape[1:3])) if _is_scaled(h, w, image_size)]
    if len(fitting) == 1:
        return fitting[0]
    for layer in reversed(list(module.modules())):
        if isinstance(layer, _FIRST):
            return 1
        if type(layer) in (nn.Linear, nn.LayerNorm):
            return 3
    return 1


def _is_scaled(height: int, width: int, image_size: tuple[int, int]) -> bool:
    rows, columns = image_size
    within = height <= rows and width <= columns
    return within and abs(height / rows - width / columns) <= max(1 / rows, 1 / columns)


def _axis_of_layer(backbone: nn.Module, node: fx.Node) -> int | None:
    """The axis that a layer takes for channels, judged by its kind and, for layer norms, by their width."""
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target)
    if node.op != "call_module":
        return None
    module = backbone.get_submodule(str(node.target))
    if isinstance(module, _FIRST):
        return 1
    if type(module) in (nn.Linear, nn.LayerNorm):
        return 3
    if isinstance(module, nn.LayerNorm):  # of timm or torchvision, which have one for either layout
        shape = shape_of(node) or ()
        fitting = [axis for axis in (1, 3) if (shape[axis],) == tuple(module.normalized_shape)]
        return fitting[0] if len(fitting) == 1 else None
    return None


def _permutation(backbone: nn.Module, node: fx.Node) -> tuple[int, ...] | None:
    """Where each axis comes from, if the node moves the axes of one map."""
    given: Any = None
    if node.op == "call_module":
        given = getattr(backbone.get_submodule(str(node.target)), "dims", None)
    elif node.target in ("permute", torch.permute):
        given = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
    elif node.target in ("transpose", torch.transpose) and len(node.args) == 3:
        order = list(range(4))
        first, second = (int(axis) % 4 for axis in node.args[1:])  # type: ignore[arg-type]
        order[first], order[second] = second, first
        given = order
    if not isinstance(given, list | tuple) or len(given) != 4 or not all(isinstance(axis, int) for axis in given):
        return None
    return tuple(axis % 4 for axis in given)


def _rearranges(node: fx.Node) -> bool:
    """Whether a node may put other axes into the places that its source had."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in ("reshape", "view", "flatten", "unflatten", "einsum", "matmul", "movedim", "swapaxes")

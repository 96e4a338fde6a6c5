"""Which axis of a feature map holds its channels.

Letters: B batch, C channels, H x W size of a feature map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from mhex_vision.tracing import modes_kept, probe_of, record_shapes, shape_of

_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
_FUNCTIONS: dict[Any, int] = {F.conv2d: 1, F.batch_norm: 1, F.linear: 3, F.layer_norm: 3}


def channel_axes(backbone: nn.Module, graph: fx.Graph, image_size: int) -> dict[fx.Node, int]:
    """Which axis of each feature map of four holds its channels: 1 in (B, C, H, W), 3 in (B, H, W, C).

    Layers know: convolutions and batch statistics read axis 1, linear layers and layer norms the last. What changes no
    shape passes it on, from its source or to its reader, and a permutation moves it. Where no layer tells, images half
    as wide again do: the axis that grows is the width. A map of which neither tells is left out.
    """
    maps = [node for node in graph.nodes if len(shape_of(node) or ()) == 4]
    axes: dict[fx.Node, int] = {}
    for node in (*maps, *reversed(maps), *maps):
        source = next((one for one in node.all_input_nodes if len(shape_of(one) or ()) == 4), None)
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
        elif shape_of(source) == shape_of(node) and not _rearranges(node):
            if source in axes:
                axes.setdefault(node, axes[source])
            elif node in axes:
                axes.setdefault(source, axes[node])
    unknown = [node for node in maps if node not in axes]
    if unknown:
        axes.update(_axes_by_width(backbone, graph, unknown, image_size))
    return axes


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


def _axes_by_width(backbone: nn.Module, graph: fx.Graph, nodes: list[fx.Node], image_size: int) -> dict[fx.Node, int]:
    before = {node: shape_of(node) for node in graph.nodes}
    probe = probe_of(backbone, image_size, image_size + max(32, image_size // 2))
    try:
        with modes_kept(backbone), torch.no_grad():
            record_shapes(backbone.eval(), graph, probe)
        wider = {node: shape_of(node) for node in nodes}
    except Exception:  # noqa: BLE001 - a network that insists on its size tells nothing, in whatever words
        return {}
    finally:
        for node, shape in before.items():
            node.meta["shape"] = shape
    found = {}
    for node in nodes:
        grown = [
            axis for axis in range(4) if (before[node] or ())[axis : axis + 1] != (wider[node] or ())[axis : axis + 1]
        ]
        if grown in ([2], [3]):
            found[node] = {3: 1, 2: 3}[grown[0]]
    return found

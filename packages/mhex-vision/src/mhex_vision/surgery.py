"""Finding the residual additions of a network, and compiling a forward pass that hands them to MHEX blocks.

Letters: B batch, C channels, H x W size of a feature map.

A network is traced once with torch.fx. An addition counts as residual when both operands are feature maps that stem
from one earlier node, and one way from there (the branch) passes more parametrised modules than the other (the
shortcut). The traced graph is rewritten so that each chosen addition calls its block, and the rewritten graph becomes a
plain function of (backbone, images, blocks): the backbone stays the module it was, and nothing is stored on it.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from mhex_core import BlockOutput
from mhex_core.blocks import residual_sum

Placement = Literal["all", "downsample", "stage"]
Block = Callable[..., tuple[Tensor, BlockOutput | None]]
CompiledForward = Callable[[nn.Module, Tensor, Sequence[Block]], tuple[Any, tuple[BlockOutput | None, ...]]]

FRESH = (nn.Conv2d, nn.BatchNorm2d)  # layers whose result shares no memory, and whose backward pass does not read it
ADDITIONS = {operator.add, torch.add, "add"}  # in-place forms have been rewritten to these
LOOKED_FOR = (
    "looked for `a + b`, `a += b`, torch.add and Tensor.add of two (B, C, H, W) feature maps that stem from one "
    "earlier feature map, one of them through more layers than the other"
)


@dataclass(frozen=True)
class ResidualAddition:
    """One residual addition of a traced network.

    Attributes:
        name: The module it happens in, such as "layer1.0".
        ordinal: Its place among all additions of the graph, residual or not.
        shortcut_first: Whether the shortcut is the first operand.
        channels: C.
        size: (H, W) at the size the network was probed with.
        changes_shape: Whether channels or size differ from the previous residual addition (for the first one: from
            where its two ways part).
    """

    name: str
    ordinal: int
    shortcut_first: bool
    channels: int
    size: tuple[int, int]
    changes_shape: bool


@dataclass(frozen=True)
class TracedNetwork:
    """A network's graphs in evaluation and training mode, its residual additions, and what it returns."""

    evaluation: fx.Graph
    training: fx.Graph
    additions: tuple[ResidualAddition, ...]
    output_shape: tuple[int, ...] | None
    last_layer: str | None


class _Tracer(fx.Tracer):
    """Looks into containers only.

    A module without children is called, not traced: dropout and stochastic depth then ask `self.training` at run time
    instead of leaving its value of today in the graph.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return next(m.children(), None) is None or super().is_leaf_module(m, module_qualified_name)


def trace(backbone: nn.Module, *, image_size: int = 224) -> TracedNetwork:
    """Trace a network and find its residual additions.

    Args:
        backbone: A network that maps (B, C, H, W) images to anything.
        image_size: Side of the images it is probed with.

    Raises:
        ValueError: torch.fx cannot trace the network, it does not take such images, or it adds nothing residually.
    """
    evaluation, training = trace_graphs(backbone)
    _propagate_shapes(backbone, evaluation, image_size)
    additions = _residual_additions(backbone, evaluation)
    if not additions:
        raise ValueError(
            f"backbone {type(backbone).__name__} has no residual addition that a block could be attached to; "
            f"{LOOKED_FOR}"
        )
    if len(_addition_nodes(evaluation)) != len(_addition_nodes(training)):
        raise ValueError(f"backbone {type(backbone).__name__} adds at other places in training than in evaluation")
    result = _output_node(evaluation).args[0]
    shape = _shape(result) if isinstance(result, fx.Node) else None
    return TracedNetwork(evaluation, training, additions, shape, _last_parametrised(backbone, evaluation))


def trace_graphs(backbone: nn.Module) -> tuple[fx.Graph, fx.Graph]:
    """The graphs of evaluation and of training mode; a network may decide by its mode what it computes.

    Raises:
        ValueError: torch.fx cannot trace the network.
    """
    modes = [(module, module.training) for module in backbone.modules()]
    try:
        return _symbolic_trace(backbone.eval()), _symbolic_trace(backbone.train())
    finally:
        for module, mode in modes:
            module.training = mode


def choose(additions: Sequence[ResidualAddition], at: Placement, *, with_last: bool) -> tuple[ResidualAddition, ...]:
    """The additions that get a block.

    Args:
        additions: All of them, shallow to deep.
        at: "all"; "downsample", those that change channels or size; "stage", the last one at each size.
        with_last: Whether the last addition is always among them, because its head makes the prediction.

    Raises:
        ValueError: None is left.
    """
    if at == "all":
        chosen = list(additions)
    elif at == "downsample":
        chosen = [addition for addition in additions if addition.changes_shape]
    else:
        following = [*additions[1:], None]
        chosen = [a for a, after in zip(additions, following, strict=True) if after is None or after.size != a.size]
    if with_last and additions[-1] not in chosen:
        chosen.append(additions[-1])
    if not chosen:
        raise ValueError(f"at={at!r} matches none of the {len(additions)} residual additions; use at='all'")
    return tuple(chosen)


def compile_forward(
    backbone: nn.Module, graph: fx.Graph, chosen: Sequence[ResidualAddition], *, keep_output: bool
) -> tuple[CompiledForward, set[str]]:
    """Turn a traced graph into a function that calls a block at each chosen addition.

    Args:
        backbone: The traced network.
        graph: One of its graphs; it is copied, not changed.
        chosen: Where blocks go; block i belongs to `chosen[i]`.
        keep_output: Whether the network's own output is wanted. If not, what follows the last block is left out.

    Returns:
        A function (backbone, images, blocks) -> (output or None, block outputs), and the names of the modules and
        parameters of the backbone it uses.
    """
    graph = _copy(graph)
    images = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(images):
        blocks = graph.placeholder("mhex_blocks")
    additions = _addition_nodes(graph)
    outputs = []
    for index, addition in enumerate(chosen):
        node = additions[addition.ordinal]
        first, second = node.args[:2]
        shortcut, branch = (first, second) if addition.shortcut_first else (second, first)
        with graph.inserting_before(node):
            reuse_branch = _is_fresh(backbone, branch, reader=node)
            called = graph.call_function(_call_numbered_block, (blocks, index, shortcut, branch, reuse_branch))
            total = graph.call_function(operator.getitem, (called, 0))
            outputs.append(graph.call_function(operator.getitem, (called, 1)))
        node.replace_all_uses_with(total)
        graph.erase_node(node)
    end = _output_node(graph)
    end.args = ((end.args[0] if keep_output else None, tuple(outputs)),)
    # Whatever no block depends on may go, dropout and batch statistics included.
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    _reuse_buffers(backbone, graph)
    graph.lint()
    used = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    # Only the generated function is wanted; the GraphModule around it would own a second view of the backbone.
    forward: CompiledForward = type(fx.GraphModule(backbone, graph)).forward
    return forward, used


def _reuse_buffers(backbone: nn.Module, graph: fx.Graph) -> None:
    """Let a ReLU write into its input where that is a layer's fresh result that nobody else reads.

    No block reads there, and no backward pass of these layers needs its result: it saves a tensor's memory and the time
    to fetch it.
    """
    for node in list(graph.nodes):
        if node.op != "call_module" or type(_module(backbone, node)) is not nn.ReLU:
            continue
        source = node.args[0]
        if not _is_fresh(backbone, source, reader=node) or _has_hooks(_module(backbone, node)):
            continue
        with graph.inserting_before(node):
            replacement = graph.call_function(torch.relu_, (source,))
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)


def _is_fresh(backbone: nn.Module, node: object, *, reader: fx.Node) -> bool:
    """Whether a node's result is a layer's own, seen by no hook and by nobody but `reader`."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or set(node.users) != {reader}:
        return False
    module = _module(backbone, node)
    return isinstance(module, FRESH) and not _has_hooks(module)


def _module(backbone: nn.Module, node: fx.Node) -> nn.Module:
    return backbone.get_submodule(str(node.target))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def forbid_in_place(backbone: nn.Module) -> None:
    """Let no activation module write into its input: saliency reads the sums that would be overwritten."""
    for module in backbone.modules():
        if getattr(module, "inplace", False) is True:
            setattr(module, "inplace", False)  # noqa: B010 - not an attribute every module declares


def drop_unused(backbone: nn.Module, used: set[str]) -> None:
    """Take away the parameters and buffers that no compiled forward pass reaches; modules stay where they are.

    The network can so be traced again, when a copy is compiled, and nothing idle is trained, saved or sent around. What
    the forward of a container computes with must be there when it is traced, so that is only excluded from training.
    """
    for prefix, module in backbone.named_modules():
        container = next(module.children(), None) is not None
        for entries in (module._parameters, module._buffers):
            for name, value in entries.items():
                path = f"{prefix}.{name}" if prefix else name
                if value is None or any(path == other or path.startswith(f"{other}.") for other in used):
                    continue
                if container:
                    value.requires_grad_(requires_grad=False)
                else:
                    entries[name] = None


def call_block(
    block: Block, shortcut: Tensor, branch: Tensor, *, prefix: int = 0, reuse_branch: bool = False
) -> tuple[Tensor, BlockOutput | None]:
    """The sum that the addition would have given, and the block's output.

    Args:
        block: The block.
        shortcut: One side of the addition.
        branch: The other.
        prefix: How many of the first tokens the block does not average over.
        reuse_branch: Whether the sum may be written over `branch`.
    """
    leading = {"prefix": prefix} if prefix else {}
    gated, output = block(shortcut, branch, reuse_branch=reuse_branch, **leading)
    # A block whose activation is the sum has computed it already.
    if output is not None and getattr(block, "activation", None) == "sum":
        return output.activation, output
    return residual_sum(branch, gated, reuse_branch=reuse_branch), output


def _call_numbered_block(
    blocks: Sequence[Block], index: int, shortcut: Tensor, branch: Tensor, reuse_branch: bool
) -> tuple[Tensor, BlockOutput | None]:
    return call_block(blocks[index], shortcut, branch, reuse_branch=reuse_branch)


def _symbolic_trace(backbone: nn.Module) -> fx.Graph:
    try:
        graph = _Tracer().trace(backbone)
    except Exception as error:
        raise ValueError(
            f"backbone {type(backbone).__name__} cannot be traced by torch.fx: {type(error).__name__}: {error}"
        ) from error
    _rewrite_in_place(backbone, graph)
    return graph


def _rewrite_in_place(backbone: nn.Module, graph: fx.Graph) -> None:
    """Take every in-place operation's value instead of its effect: it would overwrite what saliency reads.

    Whoever reads the overwritten tensor later reads the operation's result in its place, so nothing else changes.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not node.args or not isinstance(node.args[0], fx.Node):
            continue
        overwritten = node.args[0]
        later = [user for user in overwritten.users if order[user] > order[node]]
        if node.op == "call_module" and getattr(backbone.get_submodule(str(node.target)), "inplace", False) is True:
            # A copy of the classifier is traced without the flag, so the graph cannot be what remembers this.
            if later:
                raise ValueError(
                    f"backbone {type(backbone).__name__} reads the input of {node.target} again after it was "
                    "overwritten in place; build that module with inplace=False"
                )
        elif _out_of_place(node):
            for user in later:
                user.replace_input_with(overwritten, node)


def _out_of_place(node: fx.Node) -> bool:
    """Make a function or method that overwrites its first argument one that does not; say whether it was such."""
    if node.op == "call_method":
        name = str(node.target)
        if not _marked_in_place(name) or not hasattr(Tensor, name[:-1]):
            return False
        node.target = name[:-1]
        return True
    if node.op != "call_function" or not callable(node.target):
        return False
    name = getattr(node.target, "__name__", "")
    if getattr(operator, name, None) is node.target and name.startswith("i") and hasattr(operator, name[1:]):
        # operator.iadd and its kin; is_, invert and the like have no name of an operator after their first letter.
        node.target = getattr(operator, name[1:])
        return True
    if _marked_in_place(name):
        plain = getattr(F, name[:-1], None) or getattr(torch, name[:-1], None)
        if plain is None:
            return False
        node.target = plain
        return True
    if getattr(F, name, None) is not node.target:
        return False
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # a built-in without a signature, none of which has the flag
        return False
    if given.arguments.get("inplace") is not True:
        return False
    given.arguments["inplace"] = False
    node.args, node.kwargs = given.args, given.kwargs
    return True


def _marked_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _propagate_shapes(backbone: nn.Module, graph: fx.Graph, image_size: int) -> None:
    first = next((module for module in backbone.modules() if isinstance(module, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else 3
    parameter = next(backbone.parameters(), None)
    probe = torch.zeros(1, channels, image_size, image_size)
    if parameter is not None:
        probe = probe.to(device=parameter.device, dtype=parameter.dtype)
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.no_grad():
            ShapeProp(fx.GraphModule(backbone, graph)).propagate(probe)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"backbone {type(backbone).__name__} does not take images of shape {tuple(probe.shape)}: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode


def _residual_additions(backbone: nn.Module, graph: fx.Graph) -> tuple[ResidualAddition, ...]:
    order = {node: index for index, node in enumerate(graph.nodes)}
    images = next(node for node in graph.nodes if node.op == "placeholder")
    found: list[ResidualAddition] = []
    before: tuple[int, ...] | None = None
    for ordinal, node in enumerate(_addition_nodes(graph)):
        shape = _shape(node)
        operands = node.args[:2]
        if shape is None or len(shape) != 4:
            continue
        first, second = operands
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
            continue
        if _shape(first) != shape or _shape(second) != shape:
            continue
        ways = [_ancestors(operand) for operand in (first, second)]
        common = ways[0] & ways[1]
        if images not in common:
            continue
        fork = max(common, key=order.__getitem__)
        lengths = [
            sum(_is_parametrised(backbone, step) for step in way if order[step] > order[fork] and step not in common)
            for way in ways
        ]
        if lengths[0] == lengths[1]:
            continue
        reference = before or (_shape(fork) or shape)[1:]
        found.append(
            ResidualAddition(
                name=_scope(node),
                ordinal=ordinal,
                shortcut_first=lengths[0] < lengths[1],
                channels=shape[1],
                size=(shape[2], shape[3]),
                changes_shape=shape[1:] != reference,
            )
        )
        before = shape[1:]
    return tuple(_with_unique_names(found))


def _with_unique_names(additions: list[ResidualAddition]) -> list[ResidualAddition]:
    """Two additions in one module become "name#1" and "name#2"."""
    totals = Counter(addition.name for addition in additions)
    seen: Counter[str] = Counter()
    unique = []
    for addition in additions:
        seen[addition.name] += 1
        suffix = f"#{seen[addition.name]}" if totals[addition.name] > 1 else ""
        unique.append(ResidualAddition(**{**addition.__dict__, "name": addition.name + suffix}))
    return unique


def _addition_nodes(graph: fx.Graph) -> list[fx.Node]:
    return [
        node
        for node in graph.nodes
        if node.op in ("call_function", "call_method")
        and node.target in ADDITIONS
        and len(node.args) == 2
        and not node.kwargs
    ]


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and everything it is computed from."""
    seen = {node}
    waiting = [node]
    while waiting:
        for parent in waiting.pop().all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                waiting.append(parent)
    return seen


def _is_parametrised(backbone: nn.Module, node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    return node.op == "call_module" and any(True for _ in backbone.get_submodule(str(node.target)).parameters())


def _last_parametrised(backbone: nn.Module, graph: fx.Graph) -> str | None:
    names = [str(node.target) for node in graph.nodes if node.op == "call_module" and _is_parametrised(backbone, node)]
    return names[-1] if names else None


def _output_node(graph: fx.Graph) -> fx.Node:
    end: fx.Node = next(node for node in reversed(list(graph.nodes)) if node.op == "output")
    return end


def _shape(node: Any) -> tuple[int, ...] | None:
    meta = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return None if meta is None or not hasattr(meta, "shape") else tuple(meta.shape)


def _scope(node: fx.Node) -> str:
    """The qualified name of the innermost module the node was traced in."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(list(stack)), "") or node.name


def _copy(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph(tracer_cls=_Tracer)
    copy.output(copy.graph_copy(graph, {}))
    return copy

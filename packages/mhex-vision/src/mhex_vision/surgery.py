"""Finding the residual additions of a network, and compiling a forward pass that hands them to MHEX blocks.

Letters: B batch, C channels, H x W size of a feature map.

A network is traced once with torch.fx. An addition counts as residual when both operands are feature maps that stem
from one earlier node, and one way from there (the branch) passes more parametrised modules than the other (the
shortcut). The traced graph is rewritten so that each chosen addition calls its block, and the rewritten graph becomes a
plain function of (backbone, images, blocks): the backbone stays the module it was, and nothing is stored on it.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from mhex_core import BlockOutput
from mhex_core.blocks import residual_sum
from mhex_vision import tracing
from mhex_vision.layouts import channel_axes, is_of_windows
from mhex_vision.outputs import Ending, ending_of_graph
from mhex_vision.tracing import ancestors, grown_axes, shape_of, shapes_of

Placement = Literal["all", "downsample", "stage"]
Block = Callable[..., tuple[Tensor, BlockOutput | None]]
CompiledForward = Callable[[nn.Module, Tensor, Sequence[Block]], tuple[Any, tuple[BlockOutput | None, ...]]]

FRESH = (nn.Conv2d, nn.BatchNorm2d)  # layers whose result shares no memory, and whose backward pass does not read it
_UNNAMED = re.compile(r"^add(_\d+)?$")
MANY = 12  # additions; more blocks than that are slow, and most of them say the same
ADDITIONS = {operator.add, torch.add, "add"}  # in-place forms have been rewritten to these
LOOKED_FOR = (
    "looked for `a + b`, `a += b`, torch.add and Tensor.add of two (B, C, H, W) or (B, H, W, C) feature maps that stem "
    "from one earlier feature map, one of them through more layers than the other"
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
        channels_last: Whether the feature maps are (B, H, W, C), as in Swin and MambaOut.
        ordinal_in_training: Its place among all additions of training mode's graph; None means the same.
    """

    name: str
    ordinal: int
    shortcut_first: bool
    channels: int
    size: tuple[int, int]
    changes_shape: bool
    channels_last: bool = False
    ordinal_in_training: int | None = None


@dataclass(frozen=True)
class TracedNetwork:
    """A network's graphs in evaluation and training mode, its residual additions, and what it returns."""

    evaluation: fx.Graph
    training: fx.Graph
    additions: tuple[ResidualAddition, ...]
    output_shape: tuple[int, ...] | None
    last_layer: str | None
    ending: Ending


def trace(backbone: nn.Module, *, image_size: int = 224, frozen: bool = False) -> TracedNetwork:
    """Trace a network and find its residual additions.

    Args:
        backbone: A network that maps (B, C, H, W) images to anything.
        image_size: Side of the images it is probed with.
        frozen: Whether it is never run in training mode, so that what it does there is of no interest.

    Raises:
        ValueError: torch.fx cannot trace the network, it does not take such images, or it adds nothing residually.
    """
    name = type(backbone).__name__
    evaluation, training = tracing.trace_graphs(backbone, image_size=image_size, frozen=frozen)
    tracing.propagate_shapes(backbone, evaluation, image_size)
    additions, of_tokens = _residual_additions(backbone, evaluation, image_size)
    if not additions:
        tokens = (
            f"; its {of_tokens} residual additions are of tokens or windows, which blocks read only in vision "
            "transformers that mhex_vision.vit knows"
        )
        raise ValueError(
            f"backbone {name} has no residual addition that a block could be attached to; {LOOKED_FOR}"
            f"{tokens if of_tokens else ''}; explain_by(network, images, METHOD) explains it without blocks"
        )
    here, there = (Counter(_scope(node) for node in _addition_nodes(graph)) for graph in (evaluation, training))
    matched = _with_training(backbone, training, image_size, additions) if here != there else additions
    if matched is None:
        places = ", ".join(sorted(map(str, (here - there) + (there - here)))[:3])
        raise ValueError(
            f"backbone {name} adds at other places in training than in evaluation ({places}); switch off what it does "
            "in training only, such as drop connect, or freeze it: freeze_backbone=True"
        )
    result = _output_node(evaluation).args[0]
    shape = shape_of(result) if isinstance(result, fx.Node) else None
    ending = ending_of_graph(backbone, evaluation)
    return TracedNetwork(evaluation, training, matched, shape, _last_parametrised(backbone, evaluation), ending)


def _with_training(
    backbone: nn.Module, training: fx.Graph, image_size: int, additions: tuple[ResidualAddition, ...]
) -> tuple[ResidualAddition, ...] | None:
    """The additions with their places in training mode's graph, which has others beside; None if they are others."""
    with tracing.modes_kept(backbone), torch.no_grad(), torch.random.fork_rng(devices=[]):
        tracing.record_shapes(backbone.eval(), training, tracing.probe_of(backbone, image_size))
    others, _ = _residual_additions(backbone, training, image_size)
    if len(others) != len(additions):
        return None
    matched = tuple(
        replace(one, ordinal_in_training=other.ordinal) for one, other in zip(additions, others, strict=True)
    )
    # What is added outside of all modules is named by its number among all additions.
    alike = (replace(other, name=_UNNAMED.sub("", other.name), ordinal=0) for other in others)
    wanted = (replace(one, name=_UNNAMED.sub("", one.name), ordinal=0) for one in additions)
    return matched if all(one == other for one, other in zip(wanted, alike, strict=True)) else None


def placement_for(additions: Sequence[ResidualAddition]) -> Placement:
    """Where blocks go when nobody says: at every addition of one size or of few, else at the last of each size."""
    return "stage" if len(additions) > MANY and len({addition.size for addition in additions}) > 1 else "all"


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
    backbone: nn.Module,
    graph: fx.Graph,
    chosen: Sequence[ResidualAddition],
    *,
    keep_output: bool,
    training: bool = False,
) -> tuple[CompiledForward, set[str]]:
    """Turn a traced graph into a function that calls a block at each chosen addition.

    Args:
        backbone: The traced network.
        graph: One of its graphs; it is copied, not changed.
        chosen: Where blocks go; block i belongs to `chosen[i]`.
        keep_output: Whether the network's own output is wanted. If not, what follows the last block is left out.
        training: Whether the graph is that of training mode.

    Returns:
        A function (backbone, images, blocks) -> (output or None, block outputs), and the names of the modules and
        parameters of the backbone it uses.
    """
    graph = tracing.copy_of(graph)
    images = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(images):
        blocks = graph.placeholder("mhex_blocks")
    additions = _addition_nodes(graph)
    outputs = []
    for index, addition in enumerate(chosen):
        other = addition.ordinal_in_training if training else None
        node = additions[addition.ordinal if other is None else other]
        first, second, alpha = _operands(node)
        with graph.inserting_before(node):
            scaled = second if alpha == 1 else graph.call_function(operator.mul, (second, alpha))
            shortcut, branch = (first, scaled) if addition.shortcut_first else (scaled, first)
            options: dict[str, fx.node.Argument] = {
                "reuse_branch": alpha == 1 and _is_fresh(backbone, branch, reader=node),
                "shortcut_first": addition.shortcut_first,
                "channels_last": addition.channels_last,
            }
            called = graph.call_function(_call_numbered_block, (blocks, index, shortcut, branch), options)
            total = graph.call_function(operator.getitem, (called, 0))
            if alpha != 1:
                total = graph.call_function(_rounded_once, (blocks, index, total, first, second, alpha))
            outputs.append(graph.call_function(operator.getitem, (called, 1)))
        node.replace_all_uses_with(total)
        graph.erase_node(node)
    end = _output_node(graph)
    end.args = ((end.args[0] if keep_output else None, tuple(outputs)),)
    # Whatever no block depends on may go, dropout and batch statistics included.
    graph.eliminate_dead_code(is_impure_node=tracing.is_wanted_without_users)
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
    block: Block,
    shortcut: Tensor,
    branch: Tensor,
    *,
    prefix: int = 0,
    reuse_branch: bool = False,
    shortcut_first: bool = False,
    channels_last: bool = False,
) -> tuple[Tensor, BlockOutput | None]:
    """The sum that the addition would have given, and the block's output.

    Args:
        block: The block.
        shortcut: One side of the addition.
        branch: The other.
        prefix: How many of the first tokens the block does not average over.
        reuse_branch: Whether the sum may be written over `branch`.
        shortcut_first: Whether the network wrote shortcut + branch. Where the two lie differently in memory, the sum
            lies as the first does, and what reads it rounds by that.
        channels_last: Whether both are (B, H, W, C), which the block is handed as (B, C, H, W), or tokens (B, n, C).
    """
    if channels_last and shortcut.ndim == 4:
        total, output = call_block(
            block,
            shortcut.permute(0, 3, 1, 2),
            branch.permute(0, 3, 1, 2),
            reuse_branch=reuse_branch,
            shortcut_first=shortcut_first,
        )
        return total.permute(0, 2, 3, 1), output
    options: dict[str, Any] = {"reuse_branch": reuse_branch}
    layout: dict[str, Any] = {"channels_last": True, "prefix": prefix} if channels_last else {}
    if shortcut_first and shortcut.stride() != branch.stride():
        options = {**options, "reuse_branch": False, "shortcut_first": True}
    gated, output = block(shortcut, branch, **layout, **options)
    # A block whose activation is the sum has computed it already.
    if output is not None and getattr(block, "activation", None) == "sum":
        return output.activation, output
    return residual_sum(branch, gated, **options), output


def _call_numbered_block(
    blocks: Sequence[Block], index: int, shortcut: Tensor, branch: Tensor, **options: bool
) -> tuple[Tensor, BlockOutput | None]:
    return call_block(blocks[index], shortcut, branch, **options)


def _rounded_once(
    blocks: Sequence[Block], index: int, total: Tensor, first: Tensor, second: Tensor, alpha: float
) -> Tensor:
    """first + alpha second as the network rounds it, where the block changes nothing; else the block's sum."""
    return total if getattr(blocks[index], "gated", False) else torch.add(first, second, alpha=alpha)


def _residual_additions(
    backbone: nn.Module, graph: fx.Graph, image_size: int
) -> tuple[tuple[ResidualAddition, ...], int]:
    """The residual additions of feature maps, and how many there are of token sequences (B, T, C)."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    images = next(node for node in graph.nodes if node.op == "placeholder")
    tracing.record_other_shapes(backbone, graph, image_size)
    axes = channel_axes(backbone, graph)
    found: list[ResidualAddition] = []
    of_tokens = 0
    before: tuple[int, ...] | None = None
    for ordinal, node in enumerate(_addition_nodes(graph)):
        shape = shape_of(node)
        first, second, _ = _operands(node)
        if shape is None or len(shape) not in (3, 4):
            continue
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
            continue
        if any(shapes_of(operand) != shapes_of(node) for operand in (first, second)):
            continue
        ways = [ancestors(operand) for operand in (first, second)]
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
        axis = axes.get(node)
        shortcut = first if lengths[0] < lengths[1] else second
        windows = axis == 3 and len(grown_axes(node)) < 2 and is_of_windows(backbone, shortcut)
        if len(shape) == 3 or axis == 0 or windows:
            of_tokens += 1  # or windows of them
            continue
        if axis is None:
            raise ValueError(
                f"backbone {type(backbone).__name__} adds feature maps of shape {shape} in {_scope(node)}, and nothing "
                "tells which axis holds their channels; explain_by(network, images, METHOD) explains it without blocks"
            )
        height, width = shape[1:3] if axis == 3 else shape[2:]
        reference = before or (shape_of(fork) or shape)[1:]
        found.append(
            ResidualAddition(
                name=_scope(node),
                ordinal=ordinal,
                shortcut_first=lengths[0] < lengths[1],
                channels=shape[axis],
                size=(height, width),
                changes_shape=shape[1:] != reference,
                channels_last=axis == 3,
            )
        )
        before = shape[1:]
    return tuple(_with_unique_names(found)), of_tokens


def _with_unique_names(additions: list[ResidualAddition]) -> list[ResidualAddition]:
    """Two additions in one module become "name#1" and "name#2"."""
    totals = Counter(addition.name for addition in additions)
    seen: Counter[str] = Counter()
    unique = []
    for addition in additions:
        seen[addition.name] += 1
        suffix = f"#{seen[addition.name]}" if totals[addition.name] > 1 else ""
        unique.append(replace(addition, name=addition.name + suffix))
    return unique


def _addition_nodes(graph: fx.Graph) -> list[fx.Node]:
    return [
        node
        for node in graph.nodes
        if node.op in ("call_function", "call_method")
        and node.target in ADDITIONS
        and len(node.args) + len(node.kwargs.keys() - {"alpha", "out"}) == 2
        and "out" not in node.kwargs
        and all(isinstance(operand, fx.Node) for operand in _operands(node)[:2])
    ]


def _operands(node: fx.Node) -> tuple[Any, Any, Any]:
    """What is added, and by what the second is multiplied."""
    named = {**dict(zip(("input", "other"), node.args, strict=False)), **node.kwargs}
    return named["input"], named["other"], named.get("alpha", 1)


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


def _scope(node: fx.Node) -> str:
    """The qualified name of the innermost module the node was traced in."""
    stack = node.meta.get("nn_module_stack") or {}
    return tracing.name_without_wrapper(next(reversed(list(stack)), "")) or node.name

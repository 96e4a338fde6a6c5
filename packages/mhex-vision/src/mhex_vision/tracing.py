"""Tracing a network with torch.fx: what it computes for images alone, in evaluation and in training mode.

A network is traced as its users call it, `network(images)`: hooks on it and on its containers take part, and further
arguments keep their defaults. Where it decides by the shape of what it reads, the way that images of the probed size
take is traced, and the compiled function refuses images that would take the other.

Letters: B batch, C channels, H x W size of a feature map.
"""

from __future__ import annotations

import copy
import inspect
import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, TraceError
from torch.nn import functional as F

from mhex_vision.outputs import logits_in

ROUNDING = 1e-4  # of the largest value: what rounding in another order may change
_NETWORK = "network"  # the attribute of `_Called`, and so the first part of the names that fx gives


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside wrappers that only run it elsewhere or faster; a warning says that one was taken off.

    Raises:
        ValueError: It is TorchScript, which holds no modules that could be traced.
    """
    from torch._dynamo import OptimizedModule
    from torch.optim.swa_utils import AveragedModel

    taken_off: list[str] = []
    while True:
        if isinstance(network, torch.jit.ScriptModule):
            raise ValueError(  # noqa: TRY004 - it is a module, of a kind that cannot be read
                f"backbone must be an nn.Module in Python, got TorchScript ({type(network).__name__}): pass the "
                "network that was scripted, with its weights loaded"
            )
        if isinstance(network, OptimizedModule):
            inner = network._orig_mod
        elif isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
            inner = network.module
        else:
            break
        taken_off.append(type(network).__name__)
        network = inner
    if taken_off:
        warnings.warn(
            f"blocks go onto the {type(network).__name__} inside {' of '.join(taken_off)}; wrap the classifier again "
            "if you need to",
            stacklevel=3,
        )
    return network


def copied(network: nn.Module) -> nn.Module:
    """A copy that shares nothing with the network.

    Raises:
        ValueError: It holds tensors that were computed from others, as pruning and the old weight_norm leave them, or
            something else that cannot be copied.
    """
    try:
        return copy.deepcopy(network)
    except Exception as error:
        computed = [
            f"{prefix}.{name}" if prefix else name
            for prefix, module in network.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor) and value.grad_fn is not None
        ]
        held = (
            f"it holds computed tensors: {', '.join(computed[:3])}" if computed else f"{type(error).__name__}: {error}"
        )
        advice = (
            "; torch.nn.utils.prune.remove(module, 'weight') or remove_weight_norm(module) makes them parameters again"
            if computed
            else ""
        )
        hooked = hooks_of(network)
        hooks = f"; it carries hooks: {', '.join(hooked)}" if hooked and not computed else ""
        raise ValueError(
            f"backbone {type(network).__name__} cannot be copied: {_first_line(held)}{hooks}{advice}"
        ) from error


def hooks_of(network: nn.Module) -> list[str]:
    """Where forward hooks sit, and whose: "layer4 (ActivationsAndGradients.save_activation)"."""
    return [
        f"{name or 'the network itself'} ({getattr(hook, '__qualname__', type(hook).__name__)})"
        for name, module in network.named_modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ]


class _Called(nn.Module):
    """Calls a network as its users do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        return logits_in(self.network(images))


def _require(value: Any, expected: bool | float) -> None:
    """What stands in a graph where the network decided by a shape, or counted by one."""
    if type(expected)(value) != expected:
        raise ValueError(
            "images must have a size for which the network takes the way that was traced; pass image_size= to "
            "from_backbone for another"
        )


def is_wanted_without_users(node: fx.Node) -> bool:
    """Whether a node must stay although nobody reads its result."""
    return node.op in ("placeholder", "output") or node.target is _require


class _Proxy(fx.Proxy):
    """What stands for a result while a network is traced; `len` is a question about its shape."""

    tracer: _Tracer

    def __getattr__(self, name: str) -> Any:
        return _AttributeProxy(self, name)

    # No __index__: torch asks for it before it sees whether a size is one of these, and every size would be fixed.
    def __int__(self) -> int:
        return int(self.tracer.answer(self, int))

    def __float__(self) -> float:
        return float(self.tracer.answer(self, float))

    def __len__(self) -> int:
        return int(self.tracer.answer(self.tracer.create_proxy("call_function", len, (self,), {}), int))


class _AttributeProxy(_Proxy, Attribute):
    """An attribute of one, of which it is not known yet whether it will be called."""


class _Tracer(fx.Tracer):
    """Looks into containers only, and answers questions about shapes.

    A module without children is called, not traced: dropout and stochastic depth then ask `self.training` at run time
    instead of leaving its value of today in the graph.
    """

    proxy_buffer_attributes = True  # what is computed from buffers is computed where they are

    def __init__(self, probe: Tensor | None = None) -> None:
        super().__init__()
        self._probe = None if probe is None else probe.to("meta")
        self._device = None if probe is None else probe.device
        self._shapes: nn.Module | None = None
        self._values: dict[fx.Node, Any] = {}
        self._answering = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return next(m.children(), None) is None or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # fx listens to every call of a module, those that answer a question included.
        return forward(*args, **kwargs) if self._answering else super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> _Proxy:
        return _Proxy(node, self)

    def iter(self, obj: Any) -> Iterator[Any]:
        return iter([obj[index] for index in range(len(obj))])

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.answer(obj, bool))

    def answer(self, obj: fx.Proxy, kind: type[bool | float]) -> bool | float:
        """What a question about shapes gives for the probed images; the graph then requires the same of others."""
        self._answering = True
        try:
            value = None if self._probe is None else self._value(obj.node)
        finally:
            self._answering = False
        if not isinstance(value, int | float | torch.Size):
            return super().to_bool(obj)  # which raises: it depends on what the images show
        answer = kind(len(value) if isinstance(value, torch.Size) else value)
        self.create_node("call_function", _require, (obj.node, answer), {})
        return answer

    def _value(self, node: fx.Node) -> Any:
        """What a node gives for the probed images, computed on shapes alone."""
        needed = ancestors(node)
        for step in node.graph.nodes:
            if step in needed and step not in self._values:
                self._values[step] = self._computed(step)
        return self._values[node]

    def _computed(self, node: fx.Node) -> Any:
        if self._shapes is None:
            self._shapes = copied(self.root).to("meta")
        target: Any = node.target
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._values.__getitem__)
        if node.op == "placeholder":
            return self._probe
        if node.op == "get_attr":
            made = vars(self.root).get(target)  # while tracing, and so not in the copy
            return operator.attrgetter(target)(self._shapes) if made is None else made.to("meta")
        if node.op == "call_module":
            return self._shapes.get_submodule(target)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if target is getattr and args[1] == "device":
            return self._device
        return target(*args, **kwargs)


def ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and everything it is computed from."""
    seen, waiting = {node}, [node]
    while waiting:
        for parent in waiting.pop().all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                waiting.append(parent)
    return seen


def trace_graphs(backbone: nn.Module, *, image_size: int, frozen: bool) -> tuple[fx.Graph, fx.Graph]:
    """The graphs of evaluation and of training mode; a network may decide by its mode what it computes.

    Args:
        backbone: The network.
        image_size: Side of the images for which questions about shapes are answered.
        frozen: Whether the network is never run in training mode; both graphs are then that of evaluation.

    Raises:
        ValueError: torch.fx cannot trace the network.
    """
    with modes_kept(backbone):
        evaluation = _symbolic_trace(backbone.eval(), image_size)
        return evaluation, evaluation if frozen else _symbolic_trace(backbone.train(), image_size)


@contextmanager
def modes_kept(network: nn.Module) -> Iterator[None]:
    """Give every module its mode back."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _symbolic_trace(backbone: nn.Module, image_size: int) -> fx.Graph:
    called = _Called(backbone)
    called.training = backbone.training
    name = type(backbone).__name__
    chance = torch.get_rng_state()
    try:
        graph = _Tracer(probe_of(backbone, image_size)).trace(called)
        if not torch.equal(chance, torch.get_rng_state()):
            raise TraceError(
                "it draws random numbers that the graph would hold for ever; use nn.Dropout or another module, or "
                "switch off what it does in training only, such as drop connect, or freeze it: freeze_backbone=True"
            )
    except Exception as error:
        hooks = hooks_of(backbone)
        hooked = f"; it carries hooks, remove them first: {', '.join(hooks[:3])}" if hooks else ""
        raise ValueError(
            f"backbone {name} cannot be traced by torch.fx: {type(error).__name__}: {_first_line(str(error))}{hooked}; "
            "explain_by(network, images, METHOD) explains it without blocks"
        ) from error
    for node in list(graph.nodes):
        if node.op == "get_attr" and node.target in vars(called):
            _give_along(node, getattr(called, str(node.target)))
        elif node.op in ("call_module", "get_attr"):
            node.target = name_without_wrapper(str(node.target))
    _rewrite_in_place(backbone, graph)
    return graph


def name_without_wrapper(name: str) -> str:
    """A module's name as fx gives it, seen from the network: "" for the network itself."""
    return "" if name == _NETWORK else name.removeprefix(f"{_NETWORK}.")


def _give_along(node: fx.Node, tensor: Tensor) -> None:
    """Let the graph hold a tensor that the network made while it was traced, on the device that the images are on."""

    def constant(images: Tensor) -> Tensor:
        return tensor.to(images.device)

    images = next(step for step in node.graph.nodes if step.op == "placeholder")
    with node.graph.inserting_before(node):
        node.replace_all_uses_with(node.graph.call_function(constant, (images,)))
    node.graph.erase_node(node)


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


def copy_of(graph: fx.Graph) -> fx.Graph:
    """The same graph again."""
    copy = fx.Graph(tracer_cls=_Tracer)
    copy.output(copy.graph_copy(graph, {}))
    return copy


def probe_of(backbone: nn.Module, height: int, width: int | None = None, *, batch: int = 1) -> Tensor:
    """Images as the network takes them: noise (B, C, H, W), the same each time."""
    first = next((module for module in backbone.modules() if isinstance(module, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else 3
    parameter = next(backbone.parameters(), None)
    noise = torch.randn(batch, channels, height, width or height, generator=torch.Generator().manual_seed(0))
    return noise if parameter is None else noise.to(device=parameter.device, dtype=parameter.dtype)


def propagate_shapes(backbone: nn.Module, graph: fx.Graph, image_size: int) -> None:
    """Note every node's shape, and see that the graph computes what the network does.

    Raises:
        ValueError: The network does not take such images, or it computes something that the graph does not.
    """
    probe = probe_of(backbone, image_size)
    name = type(backbone).__name__
    with modes_kept(backbone), torch.no_grad(), torch.random.fork_rng(devices=[]):
        backbone.eval()
        try:
            torch.manual_seed(0)
            traced = record_shapes(backbone, graph, probe)
            torch.manual_seed(0)
            own = logits_in(backbone(probe))
        except Exception as error:
            raise ValueError(
                f"backbone {name} does not take images of shape {tuple(probe.shape)}: "
                f"{_first_line(str(error)) or type(error).__name__}"
            ) from error
    off = difference(own, traced)
    if not off <= ROUNDING:
        hooks = hooks_of(backbone)
        hooked = f"; it carries hooks: {', '.join(hooks[:3])}" if hooks else ""
        raise ValueError(
            f"backbone {name} computes something that torch.fx does not see: its output and that of its graph differ "
            f"by {off:.2g} of the largest value{hooked}; explain_by(network, images, METHOD) explains it without blocks"
        )


def difference(first: Any, second: Any) -> float:
    """The largest difference between two outputs, as a part of the largest value; 0 for what is no tensor."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape != second.shape:
            return float("inf")
        if first.device.type == "meta" or torch.equal(first, second) or first.numel() == 0:
            return 0.0
        same = (first == second) | (first.isnan() & second.isnan())
        off = (first - second).abs().masked_fill(same, 0).max() / first.abs().max().clamp(min=1e-30)
        return float(off.nan_to_num(nan=float("inf")))
    if isinstance(first, dict) and isinstance(second, dict):
        first, second = tuple(first.values()), tuple(second.values())
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        return max((difference(*pair) for pair in zip(first, second, strict=True)), default=0.0)
    return 0.0


def record_shapes(backbone: nn.Module, graph: fx.Graph, probe: Tensor, *, key: str = "shape") -> Any:
    """Run a graph, note the shape of every node's tensor in its `meta`, and return the output."""
    return _Recorder(fx.GraphModule(backbone, graph), key).run(probe)


class _Recorder(fx.Interpreter):
    """As torch's own ShapeProp, which prints a traceback where a network does not take the images."""

    def __init__(self, module: fx.GraphModule, key: str) -> None:
        super().__init__(module)
        self._key = key

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta[self._key] = tuple(result.shape) if isinstance(result, Tensor) else None
        return result


def record_other_shapes(backbone: nn.Module, graph: fx.Graph, image_size: int) -> None:
    """Note the shapes for two images of another size, higher than wide, or of the same one if it must be."""
    other = image_size - 64 if image_size >= 160 else image_size + 64
    for size in ((other, (other + image_size) // 2), (3 * image_size, 2 * image_size), (image_size, image_size)):
        try:
            with modes_kept(backbone), torch.no_grad(), torch.random.fork_rng(devices=[]):
                record_shapes(backbone.eval(), graph, probe_of(backbone, *size, batch=2), key="other shape")
        except Exception:  # noqa: BLE001 - a network that insists on its size tells nothing, in whatever words
            for node in graph.nodes:
                node.meta.pop("other shape", None)
        else:
            return


def shape_of(node: Any) -> tuple[int, ...] | None:
    """The shape of a node's tensor at the probed size."""
    return node.meta.get("shape") if isinstance(node, fx.Node) else None


def shapes_of(node: fx.Node) -> tuple[tuple[int, ...] | None, ...]:
    """The shapes of a node's tensor for one image at the probed size, and for two as far as it is known."""
    return shape_of(node), node.meta.get("other shape")


def grown_axes(node: fx.Node) -> list[int]:
    """The axes whose length depends on the number and the size of the images; none where that is not known."""
    shape, other = shape_of(node), node.meta.get("other shape")
    if shape is None or other is None or len(shape) != len(other):
        return []
    return [axis for axis, (here, there) in enumerate(zip(shape, other, strict=True)) if here != there]


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")

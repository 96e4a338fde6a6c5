"""How MHEX blocks get onto a network: its traced graph is rewritten, or its transformer blocks are run one by one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import fx, nn

from mhex_vision import backbones, surgery, tracing
from mhex_vision.outputs import Ending, logits_in
from mhex_vision.surgery import CompiledForward, ResidualAddition, TracedNetwork
from mhex_vision.vit.architecture import Architecture, architecture_of
from mhex_vision.vit.running import compile_forward


class Compiled(NamedTuple):
    """A network that calls blocks.

    Attributes:
        evaluate: The forward pass of evaluation mode, a function of (backbone, images, blocks).
        train: That of training mode.
        used: The names of the modules, parameters and buffers of the backbone that either reads.
    """

    evaluate: CompiledForward
    train: CompiledForward
    used: set[str]


class Examined(Protocol):
    """A network whose residual connections are known."""

    @property
    def additions(self) -> tuple[ResidualAddition, ...]:
        """Its residual additions, shallow to deep."""

    @property
    def ending(self) -> Ending:
        """What the network's own classifier ends in."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images for which the additions' sizes are."""

    def set_num_classes(self, backbone: nn.Module, num_classes: int) -> bool:
        """Give the network `num_classes` outputs; say whether its last layer had to be replaced.

        Raises:
            ValueError: Its output is not (B, K), or does not come from an `nn.Linear`.
        """

    def compile(self, backbone: nn.Module, chosen: Sequence[ResidualAddition], *, keep_output: bool) -> Compiled:
        """Functions that run the network with a block at each chosen addition."""


def examine(backbone: nn.Module, *, image_size: int = 224, frozen: bool = False) -> Examined:
    """Find a network's residual connections, and take away forward hooks that only observe.

    Args:
        backbone: A vision transformer that `mhex_vision.vit` knows, or a network that torch.fx can trace.
        image_size: Side of the images that a traced network is probed with. A vision transformer without hooks is not
            probed.
        frozen: Whether the network is never run in training mode.

    Raises:
        ValueError: It is neither, it does not take such images, or it adds nothing residually.
    """
    architecture = architecture_of(backbone)
    if architecture is not None:
        network = _Transformer.of(architecture, backbone)
        _leave_observers(backbone, network.image_size)
        if tracing.hooks_of(backbone):
            network.check_hooks(backbone)
        return network
    _leave_observers(backbone, (image_size, image_size))
    return _Traced(surgery.trace(backbone, image_size=image_size, frozen=frozen), (image_size, image_size))


def _leave_observers(backbone: nn.Module, image_size: tuple[int, int]) -> None:
    """Take away forward hooks without which the network computes the same; those that change its output stay.

    A hook that only looks, as other libraries' do, would be handed what stands for tensors while torch.fx traces, and
    would collect what nobody fetches. Hooks before a layer stay, since they may prepare its weights.
    """
    looking = [
        (hooks, key)
        for module in backbone.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        if hooks is module._forward_hooks or next(module.children(), None) is not None
        for key in hooks
    ]
    if not looking or any(value.is_meta for value in backbone.parameters()):
        return
    try:
        expected = output_of(backbone, image_size)
    except Exception:  # noqa: BLE001 - whoever runs the network next says what it does not take
        return
    for group in (looking, *([place] for place in looking)):  # all of them, and if that matters, each alone
        before = [(hooks, dict(hooks)) for hooks, _ in group]
        same = False
        try:
            for hooks, key in group:
                hooks.pop(key, None)
            same = tracing.difference(expected, output_of(backbone, image_size)) == 0
        finally:
            if not same:
                for hooks, earlier in before:
                    hooks.clear()
                    hooks.update(earlier)
        if same and group is looking:
            return


def output_of(backbone: nn.Module, image_size: tuple[int, int]) -> Any:
    """What a network gives in evaluation mode for the images it is probed with."""
    with tracing.modes_kept(backbone), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return logits_in(backbone.eval()(tracing.probe_of(backbone, *image_size)))


def check_unchanged(expected: object, model: nn.Module, backbone: nn.Module, image_size: tuple[int, int]) -> None:
    """See that a classifier whose blocks only watch predicts what its network did.

    Args:
        expected: What the network gave before it got blocks.
        model: The classifier.
        backbone: The network in it.
        image_size: Of the images to try.

    Raises:
        ValueError: It predicts something else.
    """
    with tracing.modes_kept(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits = model.eval()(tracing.probe_of(backbone, *image_size)).logits
    off = tracing.difference(expected, logits)
    if off > 0:
        name = type(backbone).__name__
        if off > tracing.ROUNDING:
            raise ValueError(
                f"backbone {name} with blocks that only watch must predict what it does without, and is off by "
                f"{off:.2g} of the largest logit; explain_by(network, images, METHOD) explains it without blocks"
            )
        warnings.warn(f"{name} with blocks predicts the same but for rounding, up to {off:.1g}", stacklevel=4)


def compile_copy(
    backbone: nn.Module, chosen: Sequence[ResidualAddition], *, image_size: int, frozen: bool, keep_output: bool
) -> Compiled:
    """Compile the copy of a network that was examined once."""
    architecture = architecture_of(backbone)
    if architecture is not None:
        return _compile_transformer(architecture, backbone, chosen, keep_output=keep_output)
    graphs = tracing.trace_graphs(backbone, image_size=image_size, frozen=frozen)
    return _compile_traced(backbone, graphs, chosen, keep_output=keep_output)


@dataclass(frozen=True)
class _Traced:
    network: TracedNetwork
    image_size: tuple[int, int]

    @property
    def additions(self) -> tuple[ResidualAddition, ...]:
        return self.network.additions

    @property
    def ending(self) -> Ending:
        return self.network.ending

    def set_num_classes(self, backbone: nn.Module, num_classes: int) -> bool:
        return backbones.set_num_classes(backbone, self.network, num_classes)

    def compile(self, backbone: nn.Module, chosen: Sequence[ResidualAddition], *, keep_output: bool) -> Compiled:
        graphs = self.network.evaluation, self.network.training
        return _compile_traced(backbone, graphs, chosen, keep_output=keep_output)


def _compile_traced(
    backbone: nn.Module,
    graphs: tuple[fx.Graph, fx.Graph],
    chosen: Sequence[ResidualAddition],
    *,
    keep_output: bool,
) -> Compiled:
    (evaluate, used), (train, used_in_training) = (
        surgery.compile_forward(backbone, graph, chosen, keep_output=keep_output, training=graph is not graphs[0])
        for graph in graphs
    )
    return Compiled(evaluate, train, used | used_in_training)


@dataclass(frozen=True)
class _Transformer:
    architecture: Architecture
    additions: tuple[ResidualAddition, ...]
    image_size: tuple[int, int]
    ending: Ending = "logits"

    @classmethod
    def of(cls, architecture: Architecture, backbone: nn.Module) -> _Transformer:
        size = architecture.image_size(backbone)
        additions = tuple(
            ResidualAddition(
                name=name,
                ordinal=ordinal,
                shortcut_first=True,
                channels=architecture.width(backbone),
                size=architecture.grid(backbone, size),
                changes_shape=False,
            )
            for ordinal, name in enumerate(architecture.block_names(backbone))
        )
        return cls(architecture, additions, size)

    def check_hooks(self, backbone: nn.Module) -> None:
        """Refuse hooks that change what the model computes, and that running it block by block would leave out."""
        own = output_of(backbone, self.image_size)
        forward = compile_forward(self.architecture, {}, keep_output=True)
        with tracing.modes_kept(backbone), torch.no_grad():
            ours, _ = forward(backbone.eval(), tracing.probe_of(backbone, *self.image_size), ())
        if tracing.difference(getattr(own, "logits", own), ours) > tracing.ROUNDING:
            raise ValueError(
                f"backbone {type(backbone).__name__} is run block by block, without its hooks on "
                f"{', '.join(tracing.hooks_of(backbone)[:3])}; remove them first"
            )

    def set_num_classes(self, backbone: nn.Module, num_classes: int) -> bool:
        return self.architecture.set_num_classes(backbone, num_classes)

    def compile(self, backbone: nn.Module, chosen: Sequence[ResidualAddition], *, keep_output: bool) -> Compiled:
        return _compile_transformer(self.architecture, backbone, chosen, keep_output=keep_output)


def _compile_transformer(
    architecture: Architecture, backbone: nn.Module, chosen: Sequence[ResidualAddition], *, keep_output: bool
) -> Compiled:
    places = {addition.ordinal: index for index, addition in enumerate(chosen)}
    forward = compile_forward(architecture, places, keep_output=keep_output)
    unread = (*(() if keep_output else architecture.after_blocks(backbone)), *architecture.idle(backbone))
    values = chain(backbone.named_parameters(remove_duplicate=False), backbone.named_buffers(remove_duplicate=False))
    used = {name for name, _ in values if not any(name == other or name.startswith(f"{other}.") for other in unread)}
    return Compiled(forward, forward, used)

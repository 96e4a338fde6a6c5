"""A network as other people's methods want it: images in, logits out, and one layer to look at.

Letters: B batch, K classes, C channels, h x w size of the layer's feature map, x a block's shortcut, r its branch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mhex_core import BlockOutput
from mhex_core.modes import in_evaluation_mode
from mhex_vision.classifier import MHEXClassifier
from mhex_vision.layouts import axis_of_output
from mhex_vision.outputs import class_logits, is_multi_label
from mhex_vision.vit.tapped import block_names, logits_through


@contextmanager
def prepared(model: nn.Module, *, freeze: bool = False) -> Iterator[None]:
    """Evaluation mode, and gradients even where the caller has turned them off; all as it was afterwards.

    Args:
        model: The network.
        freeze: Whether parameters need no gradient for the while, so that `backward` leaves their `.grad` alone.
    """
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad] if freeze else []
    with torch.inference_mode(mode=False), torch.enable_grad(), in_evaluation_mode(model):
        try:
            for parameter in frozen:
                parameter.requires_grad = False
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad = True


def wide(values: Tensor) -> Tensor:
    """The values in float32, or wider if they are: numpy knows no bfloat16, and OpenCV no half precision at all."""
    return values if values.dtype == torch.float64 else values.float()


class LogitsView(nn.Module):
    """A network as a module that takes (B, 3, H, W) of at least float32 and gives (B, K) of at least float32.

    The network is no sub-module: a library that sets its model's mode or clears its gradients does not reach it.

    Args:
        model: The network; it gives logits, or an output with an attribute `logits`.
        images: (B, 3, H, W), for their device and dtype.
        targets: int64 (B,), all of which must be classes of the network.
    """

    def __init__(self, model: nn.Module, images: Tensor, targets: Tensor) -> None:
        super().__init__()
        self._network = (model,)
        self._dtype = images.dtype
        self._lowest, self._highest = (int(extreme) for extreme in targets.aminmax())
        # Where libraries look for the device.
        self.place = nn.Parameter(torch.empty(0, device=images.device), requires_grad=False)
        self.eval()

    @property
    def network(self) -> nn.Module:
        """The network looked at."""
        return self._network[0]

    def forward(self, images: Tensor) -> Tensor:
        """Classify.

        Raises:
            ValueError: The network gives no logits (B, K), or a target is none of its K classes.
        """
        return wide(self._checked(self.network(images.to(self._dtype)), images))

    def _checked(self, output: object, images: Tensor) -> Tensor:
        logits = class_logits(output, images.shape[0], multi_label=is_multi_label(self.network))
        for extreme in (self._lowest, self._highest):
            if not 0 <= extreme < logits.shape[1]:
                raise ValueError(f"targets must lie in [0, {logits.shape[1] - 1}], got {extreme}")
        return logits


class TappedView(LogitsView):
    """The same, with a feature map that passes through `tap`, a module to hook.

    In an `MHEXClassifier`, the layer is a block, and the map is S = x + r, the sum before the gate: it is what the head
    pools, whereas the logits of the last head have no gradient at the gated sum. All that the block does (head, gate,
    the sum it hands on) is computed from x and S - x, x being held. So the gradient at S is that of the logit with
    respect to r: through the block's own head where the objective counts it, and through everything deeper. Without a
    gate it is the usual gradient at the block's sum.

    In a vision transformer, with or without MHEX blocks, the layer is a transformer block, and the map its normalised
    patches on their way to its attention. Where a class token is read, what the last block gives out has no gradient at
    patches, and its input has none that counts.

    In any other network the layer is a sub-module, and the map its output, which may be (B, h, w, C); the tap is handed
    (B, C, h, w) in any case.

    What comes before the tap takes part without gradients. The tapped tensor belongs to nobody else: no activation
    function further on that works in place writes over it.

    Args:
        model: The network.
        layer: One of `layers.names`.
        images: As for `LogitsView`.
        targets: As for `LogitsView`.
    """

    def __init__(self, model: nn.Module, layer: str, images: Tensor, targets: Tensor) -> None:
        super().__init__(model, images, targets)
        self.layer = layer
        self._image_size = (images.shape[2], images.shape[3])
        self.tap = nn.Identity()
        self._passes = 0

    def forward(self, images: Tensor) -> Tensor:
        """Classify, through the tap.

        Raises:
            ValueError: The layer is not run, or more than once, gives no feature map, or has no part in the logits
                (asked only where gradients are wanted).
        """
        self._passes = 0
        network = self.network
        if block_names(network) is not None:
            logits = logits_through(network, images.to(self._dtype), self.layer, self._tapped)
            return wide(self._checked(logits, images))
        if isinstance(network, MHEXClassifier):
            block = network.blocks[network.layer_names.index(self.layer)]
            handles = self._hook_block(block, sums=network.config.activation == "sum")
        else:
            handles = [network.get_submodule(self.layer).register_forward_hook(self._through_layer)]
        try:
            logits = super().forward(images)
        finally:
            for handle in handles:
                handle.remove()
        if self._passes != 1:
            raise ValueError(f"layer must be run in every forward pass, got {self.layer!r}, which is not")
        if torch.is_grad_enabled() and not logits.requires_grad:
            raise ValueError(f"layer must lie on the way to the logits, got {self.layer!r}, which does not")
        return logits

    def _hook_block(self, block: nn.Module, *, sums: bool) -> list[RemovableHandle]:
        nothing: list[Tensor] = []

        def before(module: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            del module
            shortcut, branch = inputs
            total = self._tapped(wide(shortcut) + wide(branch))
            again = (total - wide(shortcut)).to(branch.dtype)
            nothing.append(again - branch)
            return shortcut, again

        def after(module: nn.Module, inputs: object, output: tuple[Tensor, BlockOutput]) -> tuple[Tensor, BlockOutput]:
            del module, inputs
            gated, rest = output
            return gated + nothing.pop(), rest

        if sums:
            return [block.register_forward_pre_hook(before)]
        # A block that only gates leaves the sum to its caller, who holds the branch as it was: what the tap adds to it
        # (nothing, but with a gradient) comes along with the shortcut.
        return [block.register_forward_pre_hook(before), block.register_forward_hook(after)]

    def _through_layer(self, module: nn.Module, inputs: object, output: object) -> Tensor:
        del inputs
        if not isinstance(output, Tensor) or output.ndim != 4:
            came = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"layer must give a feature map (B, C, h, w) or (B, h, w, C), got {self.layer!r}, which gives {came}"
            )
        if axis_of_output(module, output, self._image_size) == 3:
            tapped = self._tapped(wide(output).permute(0, 3, 1, 2).clone()).permute(0, 2, 3, 1)
        else:
            tapped = self._tapped(wide(output).clone())
        return tapped.to(output.dtype, copy=True)

    def _tapped(self, features: Tensor) -> Tensor:
        self._passes += 1
        if self._passes > 1:
            raise ValueError(f"layer must be run once in a forward pass, got {self.layer!r}, which is run more often")
        tapped: Tensor = self.tap(wide(features).detach().requires_grad_())
        return tapped

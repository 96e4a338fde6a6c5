"""The network without what only training and explanation need."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from mhex_core import BlockOutput, DeepSupervisionLoss, MHEXBlock
from mhex_core.blocks import as_positions, mean_over_positions
from mhex_vision import surgery

if TYPE_CHECKING:
    from mhex_vision.classifier import MHEXClassifier


class _PlainAddition(nn.Module):
    """What is left of a block that neither gates nor predicts."""

    gated = False

    def forward(self, shortcut: Tensor, branch: Tensor, **layout: bool | int) -> tuple[Tensor, None]:
        del branch, layout
        return shortcut, None


class _GateOnly(nn.Module):
    """What is left of a block whose head went: W1 and the gate."""

    gated = True

    def __init__(self, block: MHEXBlock) -> None:
        super().__init__()
        self.gate = block.gate

    def forward(
        self, shortcut: Tensor, branch: Tensor, *, prefix: int = 0, channels_last: bool = False, **layout: bool
    ) -> tuple[Tensor, None]:
        del layout
        # The same operations in the same order as in MHEXBlock, so that predictions do not change by one bit.
        pooled = torch.relu(
            mean_over_positions(shortcut, prefix=prefix, channels_last=channels_last)
            + mean_over_positions(branch, prefix=prefix, channels_last=channels_last)
        )
        gate = as_positions(torch.sigmoid(self.gate(pooled)), shortcut, channels_last=channels_last)
        return shortcut * gate, None


class DeployedClassifier(nn.Module):
    """A classifier stripped by `MHEXClassifier.strip_heads`: images in, (B, K) logits out."""

    def __init__(
        self, backbone: nn.Module, blocks: nn.ModuleList, forward: surgery.CompiledForward, loss: DeepSupervisionLoss
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.blocks = blocks
        self.objective = loss
        self._forward = forward
        self.eval()

    @classmethod
    def of(cls, model: MHEXClassifier) -> Self:
        """Copy what the prediction of `model` needs; `model` stays as it is."""
        config = model.config
        model = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
        blocks: list[nn.Module] = list(model.blocks)
        predicting = set(range(len(blocks)))
        if config.objective == "layerwise":
            predicting = set() if config.classifier == "keep" else {len(blocks) - 1}
        remaining = [
            block if index in predicting else _GateOnly(block) if config.gate else _PlainAddition()
            for index, block in enumerate(blocks)
            if isinstance(block, MHEXBlock)
        ]
        return cls(
            model.backbone,
            nn.ModuleList(remaining),
            model.evaluation_forward,
            DeepSupervisionLoss(config.objective, config.decay),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Classify normalised images (B, 3, H, W): (B, K) logits."""
        own, outputs = self._forward(self.backbone, images, self.blocks)  # type: ignore[arg-type]
        heads: tuple[Tensor, ...] = tuple(output.logits for output in outputs if isinstance(output, BlockOutput))
        return self.objective.prediction(heads if own is None else (*heads, own))

    def train(self, mode: bool = True) -> Self:
        """A deployed classifier is not trained; `train(True)` raises."""
        if mode:
            raise RuntimeError("a deployed classifier cannot be trained; train the MHEXClassifier it came from")
        return super().train(mode)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a deployed classifier cannot be pickled; save its state_dict, or the classifier it came from")

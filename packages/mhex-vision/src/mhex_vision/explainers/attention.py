"""What the attention of a vision transformer says about its patches.

Letters: B batch, n tokens, r prefix tokens (class, distillation, registers), P patches, n = r + P, H heads, L blocks,
C channels, h x w patch grid, H x W image size.
Sources: attention rollout and flow, Abnar and Zuidema 2020 (arXiv 2005.00928); GMAR, Jo, Jang and Park 2025 (arXiv
2504.19414); AttCAT, Qiang et al., NeurIPS 2022; Grad-SAM, Barkan et al. 2021 (arXiv 2204.11073); the generic rule,
Chefer, Gur and Wolf, ICCV 2021 (arXiv 2103.15679); attention Shapley values, Eggen, Lysnaes-Larsen and Strumke (arXiv
2508.08966), here with patches as players.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhex_core import _checks
from mhex_core.attention import (
    aggregated_attention,
    attcat,
    attention_flow,
    attention_gradcam,
    attention_rollout,
    generic_relevance,
    gmar,
    grad_sam,
    shapley_values,
)
from mhex_vision.explainers.interface import check
from mhex_vision.explainers.view import wide
from mhex_vision.vit import Captured, capture

Upsampling = Literal["bilinear", "nearest"]
UPSAMPLING = ("bilinear", "nearest")
Game = Literal["cls", "mutual", "max_mutual"]


@dataclass(frozen=True, kw_only=True)
class _OfAttention:
    """What these explainers share.

    Attributes:
        upsample: How the patches' scores become pixels: "bilinear", or "nearest", every pixel of a patch alike.
    """

    upsample: Upsampling = "bilinear"

    def __post_init__(self) -> None:
        _checks.choice("upsample", self.upsample, UPSAMPLING)

    def _pixels(self, scores: Tensor, seen: Captured, images: Tensor) -> Tensor:
        return to_pixels(seen.maps(scores), images, upsample=self.upsample)


@dataclass(frozen=True, kw_only=True)
class LastAttention(_OfAttention):
    """What the token that the prediction is read from takes of each patch in the last block, mean over heads."""

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Explain."""
        seen = observed(model, images, targets, graph=False)
        return self._pixels(read_out(wide(seen.attentions[-1]).mean(dim=1), seen), seen, images)


@dataclass(frozen=True, kw_only=True)
class AttentionRollout(_OfAttention):
    """How much of each patch reaches the prediction if attention were all that mixes tokens: the same for every class.

    Attributes:
        residual: The share of the skip connection, in [0, 1].
        start: The first block that is rolled.
    """

    residual: float = 0.5
    start: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.number("residual", self.residual, low=0, high=1)
        _check_start(self.start)

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Explain."""
        seen = observed(model, images, targets, graph=False)
        rolled = attention_rollout(_wide(seen.attentions), residual=self.residual, start=self.start)
        return self._pixels(read_out(rolled, seen), seen, images)


@dataclass(frozen=True, kw_only=True)
class GMAR(_OfAttention):
    """Attention rollout in which each head counts by the size of the gradient at its attention.

    The heads' weights are not negative and sum to one, and attention itself looks at no class: maps of two classes
    differ by these weights alone, and so not much.

    Attributes:
        norm: Of the gradients: "l1" or "l2".
        residual: The share of the skip connection, in [0, 1]; 1/2 is the paper's alpha of 1.
    """

    norm: Literal["l1", "l2"] = "l1"
    residual: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.choice("norm", self.norm, ("l1", "l2"))
        _checks.number("residual", self.residual, low=0, high=1)

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Explain."""
        seen = observed(model, images, targets)
        gradients = seen.gradients(targets, seen.attentions)
        rolled = gmar(_wide(seen.attentions), _wide(gradients), norm=self.norm, residual=self.residual)
        return self._pixels(read_out(rolled, seen), seen, images)


@dataclass(frozen=True, kw_only=True)
class AttentionFlow(_OfAttention):
    """The most that can flow from the prediction to each patch through attention: the same for every class. Slow.

    A maximum flow is computed for every patch, so patches are first put together to a coarser grid: attention to a
    group is the sum over its members, attention by a group their mean.

    Attributes:
        grid: Groups along the longer side of the patch grid, at most 7.
        residual: The share of the skip connection, in [0, 1].
    """

    grid: int = 7
    residual: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if _checks.positive_int("grid", self.grid) > 7:
            raise ValueError(f"grid must be at most 7, for flow on more groups takes minutes, got {self.grid}")
        _checks.number("residual", self.residual, low=0, high=1)

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Explain."""
        seen = observed(model, images, targets, graph=False)
        groups, coarse = self._groups(seen)
        shares = groups / groups.sum(dim=1, keepdim=True)
        pooled = [shares @ wide(weights) @ groups.T for weights in seen.attentions]
        sources = seen.readout.nonzero().flatten().tolist()
        of_groups = (groups[:, sources] > 0).any(dim=1).nonzero().flatten().tolist()
        flow = attention_flow(pooled, residual=self.residual, queries=of_groups)
        weight = (groups @ seen.readout.to(groups))[of_groups]
        scores = torch.einsum("q,bqg->bg", weight, flow.to(weight))
        maps = scores[:, seen.prefix :].reshape(len(images), *coarse)
        return to_pixels(maps, images, upsample=self.upsample)

    def _groups(self, seen: Captured) -> tuple[Tensor, tuple[int, int]]:
        """Which tokens a group holds, (groups, n) of zeros and ones; prefix tokens stay by themselves."""
        sides = [min(side, -(-side * self.grid // max(seen.grid))) for side in seen.grid]
        rows, columns = (torch.arange(side) * coarse // side for side, coarse in zip(seen.grid, sides, strict=True))
        of_patch = (rows[:, None] * sides[1] + columns[None, :]).flatten() + seen.prefix
        of_token = torch.cat([torch.arange(seen.prefix), of_patch])
        groups = F.one_hot(of_token, seen.prefix + sides[0] * sides[1]).T
        return groups.to(wide(seen.attentions[0])), (sides[0], sides[1])


@dataclass(frozen=True, kw_only=True)
class GenericRelevance(_OfAttention):
    """The generic rule: attention times its gradient, the positive part averaged over heads, rolled over the blocks."""

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Explain."""
        seen = observed(model, images, targets)
        gradients = seen.gradients(targets, seen.attentions)
        relevance = generic_relevance(_wide(seen.attentions), _wide(gradients))
        return self._pixels(read_out(relevance, seen), seen, images)


@dataclass(frozen=True, kw_only=True)
class GradSAM(_OfAttention):
    """Attention times the positive part of its gradient, averaged over blocks, heads and keys, of each query."""

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Explain."""
        seen = observed(model, images, targets)
        gradients = seen.gradients(targets, seen.attentions)
        return self._pixels(grad_sam(_wide(seen.attentions), _wide(gradients)), seen, images)


@dataclass(frozen=True, kw_only=True)
class AttentionGradCAM(_OfAttention):
    """The last block's attention to each patch, heads weighed by the mean of their gradients, and rectified."""

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Explain."""
        seen = observed(model, images, targets)
        last = seen.attentions[-1]
        (gradient,) = seen.gradients(targets, [last])
        readout = seen.readout.to(wide(last))
        attention = torch.einsum("q,bhqk->bhk", readout, wide(last).detach())
        slope = torch.einsum("q,bhqk->bhk", (readout != 0).to(readout), wide(gradient))
        return self._pixels(attention_gradcam(attention, slope, mask=patches(seen)), seen, images)


@dataclass(frozen=True, kw_only=True)
class AttCAT(_OfAttention):
    """Input times gradient in every block, weighed by the attention a patch gets: signed.

    Read behind the first norm of each block. What enters a block of such a network has no such product in the last one:
    a norm makes its result the same whatever the scale of its input.
    """

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Explain."""
        seen = observed(model, images, targets)
        gradients = seen.gradients(targets, seen.normed)
        scores = attcat(_wide(seen.normed), _wide(gradients), _wide(seen.attentions))
        return self._pixels(scores, seen, images)


@dataclass(frozen=True, kw_only=True)
class AttentionShapley(_OfAttention):
    """Shapley values of patches in a game that attention defines, by the closed form: signed.

    Attributes:
        game: "mutual", what members of a coalition attend to each other; "max_mutual", of each pair the larger one; or
            "cls", what the token that the prediction is read from attends to them.
        gradient: Whether attention is first multiplied by the positive part of its gradient, which makes the values
            class-specific.
    """

    game: Game = "mutual"
    gradient: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.choice("game", self.game, ("cls", "mutual", "max_mutual"))
        _checks.flag("gradient", self.gradient)

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Explain."""
        seen = observed(model, images, targets, graph=self.gradient)
        gradients = _wide(seen.gradients(targets, seen.attentions)) if self.gradient else None
        matrix = aggregated_attention(_wide(seen.attentions), gradients)
        if self.game == "cls":  # an additive game: each patch's value is its share of the row that is read
            return self._pixels(read_out(matrix, seen), seen, images)
        values = shapley_values(matrix, game=self.game, players=patches(seen))
        return self._pixels(values, seen, images)


def observed(model: nn.Module, images: Tensor, targets: Tensor, *, graph: bool = True) -> Captured:
    """One forward pass, after a look at the arguments.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The model is no vision transformer that is known, or a target none of its classes.
    """
    check(model, images, targets)
    seen = capture(model, images, graph=graph)
    batch, classes = seen.logits.shape
    _checks.class_indices("targets", targets, batch=batch, num_classes=classes, device=seen.logits.device)
    return seen


def read_out(matrix: Tensor, seen: Captured) -> Tensor:
    """The rows of the tokens that the prediction is read from, in their shares: (B, n, n) to (B, n)."""
    return torch.einsum("q,bqk->bk", seen.readout.to(matrix), matrix)


def patches(seen: Captured) -> Tensor:
    """Which tokens are patches: bool (B, n)."""
    batch, tokens = seen.inputs[0].shape[:2]
    return (torch.arange(tokens, device=seen.logits.device) >= seen.prefix).expand(batch, tokens)


def to_pixels(maps: Tensor, images: Tensor, *, upsample: Upsampling) -> Tensor:
    """Maps (B, h, w) or (B, m, h, w) at the images' size, float32, detached, on their device."""
    size = (images.shape[2], images.shape[3])
    flat = maps.detach().float().reshape(-1, 1, *maps.shape[-2:])
    if upsample == "bilinear":
        resized = F.interpolate(flat, size=size, mode="bilinear", align_corners=False)
    else:
        resized = F.interpolate(flat, size=size, mode="nearest-exact")
    return resized.reshape(*maps.shape[:-2], *size).to(images.device)


def _wide(layers: tuple[Tensor, ...]) -> list[Tensor]:
    return [wide(layer.detach()) for layer in layers]


def _check_start(start: object) -> None:
    if isinstance(start, bool) or not isinstance(start, int):
        raise TypeError(f"start must be an int, got {type(start).__name__}")
    if start < 0:
        raise ValueError(f"start must be at least 0, got {start}")

"""Explanations of images: overlays and figures on top of what every explanation holds.

Letters: B batch, n targets per sample, L layers, H x W map size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

import mhex_core
from mhex_vision import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation(mhex_core.Explanation):
    """An explanation of images, as `MHEXClassifier.explain` returns it.

    Attributes:
        images: (B, 3, H, W) uint8 as they were shown to the network, or None where they were not kept.
    """

    images: Tensor | None = None

    def overlay(self, *, opacity: float = 0.6, colormap: str | None = None) -> Tensor:
        """The saliency laid over the images; where it is zero, the image shows unchanged.

        Maps that are not in [0, 1] are brought there by their own extremes, and signed ones to [-1, 1] by their largest
        absolute value.

        Args:
            opacity: Of the strongest saliency, in [0, 1].
            colormap: A matplotlib colour map; None means `drawing.COLORMAP`, or for signed maps `drawing.DIVERGING`.

        Returns:
            uint8 (B, 3, H, W) at the images' size, or (B, n, 3, H, W) with several targets.

        Raises:
            ValueError: The explanation carries no images.
        """
        images = self._images()
        shown = self._fitted(self._drawable(self.saliency))
        return drawing.overlay(images, shown, opacity=opacity, colormap=colormap, signed=self.signed)

    def plot(
        self,
        *,
        samples: int = 4,
        extra: Sequence[tuple[str, Tensor]] = (),
        colormap: str | None = None,
    ) -> Figure:
        """A matplotlib figure: one row per sample with image, overlay, and the map of each layer, shallow to deep.

        Args:
            samples: How many samples to show, from the first.
            extra: Titles and maps (B, H, W) in [0, 1] to show beside the aggregate, of another beta, say.
            colormap: A matplotlib colour map; None means `drawing.COLORMAP`, or for signed maps `drawing.DIVERGING`.

        Raises:
            ValueError: The explanation carries no images, has several targets per sample, or is empty.
        """
        images = self._images()
        if self.target.ndim != 1:
            raise ValueError("plot shows one target per sample; explain with target=None or a (B,) tensor")
        shown = min(len(self), samples)
        if shown < 1:
            raise ValueError(f"samples must be at least 1 and the explanation not empty, got {samples} of {len(self)}")
        saliency = self._drawable(self.saliency)
        # Of another method there are no layers to show.
        own = bool(len(self.head_logits))
        layers = self._drawable(self.layer_saliency()) if own else saliency[None, :0]
        layer_names = self.layer_names if own else ()
        aggregate = f"beta = {self.options.beta:g}" if own else self.method
        rows = []
        for row in range(shown):
            title = f"{self.label(int(self.target[row]))}\np = {float(self.probabilities[row, self.target[row]]):.2f}"
            maps = [(aggregate, saliency[row])]
            maps += [(name, other[row]) for name, other in extra]
            maps += [(name, layers[index, row]) for index, name in enumerate(layer_names)]
            rows.append(drawing.Row(images[row], title, maps, self._fitted(saliency)[row]))
        return drawing.figure(rows, colormap=colormap)

    def label(self, index: int) -> str:
        """The name of a class, or "class 3" where names are not known."""
        return self.class_names[index] if self.class_names else f"class {index}"

    def _images(self) -> Tensor:
        if self.images is None:
            raise ValueError(
                "this explanation carries no images; explain with keep_images=True a model whose preprocessing is known"
            )
        return self.images

    def _drawable(self, saliency: Tensor) -> Tensor:
        """Maps in [0, 1], or in [-1, 1] where evidence against the target shows."""
        return saliency if self.options.normalize else drawing.drawable(saliency, signed=self.signed)

    def _fitted(self, saliency: Tensor) -> Tensor:
        """Maps at the images' size."""
        height, width = self._images().shape[-2:]
        if tuple(saliency.shape[-2:]) == (height, width):
            return saliency
        flat = saliency.reshape(-1, 1, *saliency.shape[-2:])
        resized = F.interpolate(flat, size=(height, width), mode="bilinear", align_corners=False)
        return torch.clamp(resized, -1, 1).reshape(*saliency.shape[:-2], height, width)

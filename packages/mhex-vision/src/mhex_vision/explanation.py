"""Explanations of images: overlays, figures and pages on top of what every explanation holds.

Letters: B batch, n targets per sample, L layers, H x W map size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

import mhex_core
from mhex_core import _checks
from mhex_vision import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mhex_core.explorer import ExplorerPage


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation(mhex_core.Explanation):
    """An explanation of images, as `MHEXClassifier.explain` returns it.

    Attributes:
        images: (B, 3, H, W) uint8 as they were shown to the network, or None where they were not kept.
    """

    images: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images is None:
            return
        images = _checks.tensor("images", self.images, ndim=4, floating=False)
        if images.dtype != torch.uint8 or images.shape[:2] != (len(self), 3) or 0 in images.shape[2:]:
            raise ValueError(
                f"images must be uint8 of shape ({len(self)}, 3, H, W), got {images.dtype} of {tuple(images.shape)}"
            )

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
        width: float | None = None,
    ) -> Figure:
        """A matplotlib figure: for each sample image, overlay, and the map of each layer, shallow to deep.

        Its text stays text when it is saved as PDF or SVG. pyplot knows nothing of it, so there is nothing to close.

        Args:
            samples: How many samples to show, from the first.
            extra: Titles and maps (B, H, W) in [0, 1], or in [-1, 1] if signed, to show beside the aggregate: of
                another beta, say.
            colormap: A matplotlib colour map; None means `drawing.COLORMAP`, or for signed maps `drawing.DIVERGING`.
            width: Of the figure in inches, such as 3.3 for a column of a paper, at least 1.2: a sample then takes as
                many lines as it needs. None means one line per sample, as wide as it gets.

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
            title = f"{self.label(int(self.target[row]))}, p = {float(self.probabilities[row, self.target[row]]):.2f}"
            maps = [(aggregate, saliency[row])]
            maps += [(name, other[row]) for name, other in extra]
            maps += [(name, layers[index, row]) for index, name in enumerate(layer_names)]
            rows.append(drawing.Row(images[row], title, maps, self._fitted(saliency)[row]))
        return drawing.figure(rows, colormap=colormap, width=width, signed=self.signed or None)

    def to_html(
        self,
        *,
        names: Sequence[str] | None = None,
        labels: Sequence[int] | Tensor | None = None,
        title: str = "Explanations",
        max_bytes: int | None = None,
    ) -> str:
        """One HTML page, without network or server, in which beta and each layer's weight can be moved.

        Args:
            names: B names of the images; None numbers them from 1.
            labels: (B,) true classes, or (B, K) zeros and ones; None where they are not known.
            title: Of the page.
            max_bytes: What the page may have; classes explained beyond each image's first are left out until it fits.

        Raises:
            TypeError: An argument is of another type.
            ValueError: The explanation carries no images or is empty, or an argument does not fit it.
        """
        return self._page(names=names, labels=labels, title=title, max_bytes=max_bytes).html

    def save_html(
        self,
        path: str | Path,
        *,
        names: Sequence[str] | None = None,
        labels: Sequence[int] | Tensor | None = None,
        title: str = "Explanations",
        max_bytes: int | None = None,
    ) -> Path:
        """Write the page that `to_html` gives; an interrupted write leaves nothing behind.

        Returns:
            The path written.
        """
        return self._page(names=names, labels=labels, title=title, max_bytes=max_bytes).save(path)

    def __repr__(self) -> str:
        # Tensors as text would be pages of it, and a notebook keeps this text beside what it shows.
        shown = "no images" if self.images is None else "with images"
        return (
            f"<{type(self).__name__} by {self.method}: target {tuple(self.target.shape)} of "
            f"{self.probabilities.shape[-1]} classes, saliency {tuple(self.saliency.shape)}, "
            f"{len(self.layer_names)} layers, {shown}>"
        )

    def _repr_html_(self) -> str | None:
        """What a notebook shows: the first few images. None, which stands for plain text, where there is no image."""
        from mhex_vision.reporting import in_notebook

        return in_notebook(self)

    def _page(self, **options: Any) -> ExplorerPage:
        from mhex_vision.reporting import report

        return report(self, **options)

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

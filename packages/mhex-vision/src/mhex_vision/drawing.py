"""Turning saliency into colours and figures. matplotlib is imported here and only when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mhex_core.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORMAP = "inferno"
"""Monotone in lightness and readable with any kind of colour vision."""

DIVERGING = "RdBu_r"
"""For signed maps: red for, blue against, white for neither; told apart with any kind of colour vision."""


class Row(NamedTuple):
    """One sample in a figure: its image (3, H, W) uint8, a title, named maps, and the map to lay over the image.

    Maps lie in [0, 1], or where evidence against a class shows in [-1, 1].
    """

    image: Tensor
    title: str
    maps: Sequence[tuple[str, Tensor]]
    overlay: Tensor


def drawable(maps: Tensor, *, signed: bool) -> Tensor:
    """Maps of any range as maps that can be drawn: zero stays zero in signed ones, the extremes fill the scale.

    Args:
        maps: (*, H, W).
        signed: Whether the sign is to show.

    Returns:
        Maps in [-1, 1], each divided by its largest absolute value, or in [0, 1], between each map's own extremes. A
        constant map becomes zeros (a signed one keeps its sign).
    """
    flat = maps.detach().float().flatten(-2)
    if signed:
        scale = flat.abs().amax(dim=-1, keepdim=True)
    else:
        lowest = flat.amin(dim=-1, keepdim=True)
        flat, scale = flat - lowest, flat.amax(dim=-1, keepdim=True) - lowest
    return (flat / torch.where(scale > 0, scale, 1.0)).reshape(maps.shape)


def colorize(saliency: Tensor, *, colormap: str = COLORMAP) -> Tensor:
    """Values in [0, 1] of shape (*, H, W) as float colours in [0, 1] of shape (*, 3, H, W)."""
    import matplotlib as mpl

    if colormap not in mpl.colormaps:
        raise ValueError(f"colormap must be the name of a matplotlib colour map, got {colormap!r}")
    colors = mpl.colormaps[colormap](saliency.detach().float().cpu().clamp(0, 1).numpy())[..., :3]
    return torch.from_numpy(np.ascontiguousarray(colors)).float().movedim(-1, -3)


def overlay(
    images: Tensor, saliency: Tensor, *, opacity: float = 0.6, colormap: str | None = None, signed: bool = False
) -> Tensor:
    """Lay saliency over images.

    Args:
        images: uint8 (B, 3, H, W).
        saliency: (B, H, W) or (B, n, H, W) in [0, 1]; in [-1, 1] if it is signed.
        opacity: Of the strongest saliency, of either sign, in [0, 1].
        colormap: A matplotlib colour map; None means `COLORMAP`, or `DIVERGING` for signed saliency.
        signed: Whether negative values are evidence against, and not nothing.

    Returns:
        uint8 (B, 3, H, W) or (B, n, 3, H, W), on the CPU.
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must be in [0, 1], got {opacity!r}")
    below = images.detach().cpu().float() / 255
    if saliency.ndim == 4:
        below = below.unsqueeze(1)
    values = saliency.detach().cpu().float()
    if signed:
        cover, colors = values.abs(), colorize((values + 1) / 2, colormap=colormap or DIVERGING)
    else:
        cover, colors = values, colorize(values, colormap=colormap or COLORMAP)
    cover = opacity * cover.clamp(0, 1).unsqueeze(-3)
    mixed = below * (1 - cover) + colors * cover
    return (mixed * 255).round().to(torch.uint8)


def save_png(image: Tensor, path: Path) -> None:
    """Write a uint8 (3, H, W) image as a PNG."""
    picture = Image.fromarray(image.movedim(0, -1).contiguous().numpy())
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def save_figure(figure: Figure, path: Path, *, dpi: int = 150) -> None:
    """Write a matplotlib figure in one step: as PDF or SVG if the name ends so, else as PNG."""
    kind = path.suffix.lower().removeprefix(".")
    chosen = kind if kind in ("pdf", "svg") else "png"
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=chosen, dpi=dpi))


def figure(
    rows: Sequence[Row], *, colormap: str | None = None, width: float | None = None, signed: bool | None = None
) -> Figure:
    """Image, overlay and maps of each sample, see `figures.draw`. Not registered with pyplot: nothing to close."""
    from mhex_vision.figures import draw

    return draw(rows, colormap=colormap, width=width, signed=signed)

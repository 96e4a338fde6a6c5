"""How much of an image does a map single out, and how much of the map is about its class? No network is asked.

Letters: B batch, H x W map size.
Sources: the published code of the authors of class-discriminative attention maps (Brocki, Binda and Chung, arXiv
2312.02364) for compactness; class sensitivity, too, is a family of theirs, but its code is not published.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mhex_core import _checks
from mhex_vision.metrics import _attributions
from mhex_vision.metrics.sanity import similarity


def compactness(attribution: Tensor, *, threshold: float = 0.05) -> Tensor:
    """The share of a map that is next to nothing: of entries with |s| <= threshold max |s|.

    A map of patches has the compactness of the same map brought to the pixels by their nearest value; interpolating it
    smoothly does change it.

    Args:
        attribution: (B, H, W), of any sign and in any unit.
        threshold: In [0, 1].

    Returns:
        (B,) in [0, 1], higher is more compact. A map of zeros gets 0, as any other even map does: taken to the letter,
        the formula would call what points at nothing perfectly compact.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument's shape or value does not fit.
    """
    maps = _attributions.check_attribution(attribution)
    share = _checks.number("threshold", threshold, low=0, high=1)
    if 0 in maps.shape[1:]:
        raise ValueError(f"attribution must have at least one entry in each map, got shape {tuple(maps.shape)}")
    # Half precision could not count the pixels.
    sizes = maps.abs() if maps.dtype == torch.float64 else maps.float().abs()
    if not maps.shape[0]:
        return sizes.new_zeros(0)
    largest = sizes.amax(dim=(1, 2), keepdim=True)
    nothing = (sizes <= share * largest) & (largest > 0)
    return nothing.to(sizes.dtype).mean(dim=(1, 2))


def class_sensitivity(first: Tensor, second: Tensor, *, kind: Literal["pearson", "spearman"] = "pearson") -> Tensor:
    """How alike the maps of two classes of one image are; what depends on the class is not.

    The correlation is our reading, and so are the classes: a comparison takes the explained one,
    and the most probable or the least probable of the others.

    Args:
        first: (B, H, W), the maps of one class, of any sign.
        second: (B, H, W), those of another.
        kind: Pearson's correlation of the values, or Spearman's of their ranks, see `similarity`.

    Returns:
        (B,) in [-1, 1], lower is more class-sensitive. Two constant maps do not depend on the class: 1. A constant map
        and one that is not have nothing in common: 0.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes differ, or a value is not finite.
    """
    _checks.choice("kind", kind, ("pearson", "spearman"))
    found = similarity(first, second, kind=kind)
    if 0 in first.shape[1:]:
        raise ValueError(f"first must have at least one entry in each map, got shape {tuple(first.shape)}")
    constant = [(maps == maps[:, :1, :1]).flatten(1).all(dim=1).to(found.device) for maps in (first, second)]
    found = torch.where(constant[0] | constant[1], 0, found)
    return torch.where(constant[0] & constant[1], 1, found)

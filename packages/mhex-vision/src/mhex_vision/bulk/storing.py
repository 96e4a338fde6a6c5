"""Maps as they are kept in Parquet files: small integers or half precision, with a scale and an offset for each map.

Letters: N maps, H x W map size.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

Storage = Literal["uint8", "float16"]
STORAGES: dict[Storage, pa.DataType] = {"uint8": pa.uint8(), "float16": pa.float16()}

_LEVELS = 255
_SMALLEST = 2.0**-10  # half precision loses digits of maps that are smaller throughout


def pack(maps: Tensor, storage: Storage, *, unit: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Store each map by itself; value = scale * stored + offset.

    Args:
        maps: (N, H, W) float32.
        storage: "uint8" keeps 256 levels: of [0, 1], or between each map's own extremes. "float16" keeps values as they
            are, divided by their largest magnitude where that is above 1 or below 2^-10.
        unit: Whether the maps are in [0, 1] by themselves.

    Returns:
        The stored maps (N, H, W) of that dtype, and scale and offset, float32 (N,). What is no finite number counts as
        0 in uint8; in float16 it stays what it is.
    """
    flat = maps.flatten(1)
    scale, offset = flat.new_ones(len(flat)), flat.new_zeros(len(flat))
    finite = torch.nan_to_num(flat, nan=0.0, posinf=0.0, neginf=0.0)
    if storage == "uint8":
        if unit:
            return (finite * _LEVELS).round().clamp(0, _LEVELS).to(torch.uint8).view_as(maps), scale / _LEVELS, offset
        lowest, highest = finite.aminmax(dim=1)
        # In double precision, because the span of large values of both signs may be no float32.
        scale = _usable(((highest.double() - lowest.double()) / _LEVELS).float())
        levels = ((finite - lowest.unsqueeze(1)) / scale.unsqueeze(1)).round().clamp(0, _LEVELS)
        return levels.to(torch.uint8).view_as(maps), scale, lowest
    if not unit:
        largest = finite.abs().amax(dim=1)
        scale = torch.where((largest > 1) | (largest < _SMALLEST), _usable(largest), scale)
        flat = flat / scale.unsqueeze(1)
    return flat.to(torch.float16).view_as(maps), scale, offset


def _usable(scale: Tensor) -> Tensor:
    """A constant map needs no scale."""
    return torch.where(scale > 0, scale, 1.0)


def unpack(stored: NDArray[Any], scale: NDArray[Any], offset: NDArray[Any]) -> NDArray[np.float32]:
    """The values of stored maps, float32 (N, H, W)."""
    values = stored.astype(np.float32)
    values *= scale.astype(np.float32)[:, None, None]
    values += offset.astype(np.float32)[:, None, None]
    return values


def as_lists(maps: NDArray[Any]) -> pa.ListArray:
    """Stored maps (N, H, W) as one list of H lists of W values for each; no value is copied."""
    count, height, width = maps.shape
    lines = pa.ListArray.from_arrays(
        pa.array(np.arange(count * height + 1, dtype=np.int32) * width), pa.array(maps.reshape(-1))
    )
    return pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * height), lines)

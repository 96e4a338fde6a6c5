"""Evidence as few bytes, which a browser unpacks by itself.

Letters: L layers, h_l x w_l layer size, T tokens.

A packed array is what zlib makes of, one after the other: for each of the 2 L parts (the L positive ones, then the L
negative ones) the float32 numbers low and step; then the high bytes of all values, then the low bytes. A value is
low + step q, q being 16 bits, and what is stored of q is by how much it differs from the q before it (modulo 2^16; the
first of each part from 0): maps are smooth, so the differences are small and compress well.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_LEVELS = 65535
_MOST = float(np.finfo(np.float32).max)


def packed(positive: Sequence[Tensor], negative: Sequence[Tensor]) -> bytes:
    """Each layer's evidence for and against a class, to 1/131070 of the range of each part.

    Args:
        positive: L tensors (h_l, w_l) or (T,).
        negative: The same, in the same shapes.

    Raises:
        ValueError: A value is not finite, or beyond float32.
    """
    heads, values = [], []
    for part in (*positive, *negative):
        numbers = part.detach().to("cpu", torch.float64).reshape(-1).numpy()
        low, high = (float(numbers.min()), float(numbers.max())) if numbers.size else (0.0, 0.0)
        # Written so that NaN does not pass.
        if not (-_MOST <= low <= high <= _MOST):
            raise ValueError(f"evidence must be finite, and within float32, to be shown, got {low:g} to {high:g}")
        head = np.array([low, (high - low) / _LEVELS], "<f4")
        heads.append(head)
        values.append(_levels(numbers, float(head[0]), float(head[1])))
    whole = np.concatenate([np.diff(part, prepend=part.dtype.type(0)) for part in values] or [np.empty(0, "<u2")])
    planes = whole.astype("<u2").view(np.uint8).reshape(-1, 2)
    raw = b"".join([*(head.tobytes() for head in heads), planes[:, 1].tobytes(), planes[:, 0].tobytes()])
    return zlib.compress(raw, 9)


def unpacked(data: bytes, shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What `packed` packed, float64: L positive and L negative parts.

    Args:
        data: The bytes.
        shapes: L shapes, (h_l, w_l) or (T,).

    Raises:
        ValueError: The bytes are not those of such parts.
    """
    try:
        raw = zlib.decompress(data)
    except zlib.error as error:
        raise ValueError(f"data must be packed evidence, got something else ({error})") from error
    both = [*shapes, *shapes]
    sizes = [int(np.prod(shape)) for shape in both]
    start, count = 8 * len(both), sum(sizes)
    if len(raw) != start + 2 * count:
        raise ValueError(f"data must hold {count} values for these shapes, got {len(raw)} bytes")
    heads = np.frombuffer(raw, "<f4", 2 * len(both)).astype(np.float64).reshape(-1, 2)
    planes = np.frombuffer(raw, np.uint8, 2 * count, start).reshape(2, count).astype(np.int64)
    levels = np.split(256 * planes[0] + planes[1], np.cumsum(sizes)[:-1])
    parts = [
        torch.from_numpy(low + step * (level.cumsum() % (_LEVELS + 1))).reshape(shape)
        for (low, step), level, shape in zip(heads, levels, both, strict=True)
    ]
    return tuple(parts[: len(shapes)]), tuple(parts[len(shapes) :])


def _levels(numbers: npt.NDArray[np.float64], low: float, step: float) -> npt.NDArray[np.uint16]:
    # `low` and `step` as they are stored, so that what rounding them did is made up for.
    scaled = np.zeros_like(numbers) if step == 0 else (numbers - low) / step
    return np.clip(np.rint(scaled), 0, _LEVELS).astype("<u2")

"""Made-up tissue images with one lesion each, whose class is its texture and whose place is known.

They are for trying out and testing saliency maps: the class can be told only from inside the lesion, so a map that is
right about the evidence overlaps the mask. Colour and contrast do not give the class away, and the lesion may lie
anywhere, partly cut off by the border too.
"""

from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from mhex_vision.data._checks import check_int
from mhex_vision.data.preprocessing import Preprocessing
from mhex_vision.data.sets import ArrayImages, DataBundle

__all__ = ["LESION_CLASSES", "lesions_bundle", "synthetic_lesions"]

LESION_CLASSES = ("stripes", "spots", "rings", "mesh")

_Field: TypeAlias = NDArray[np.float32]

# How strongly the two stains of a section absorb red, green and blue: haematoxylin (nuclei, purple), eosin (pink).
_HAEMATOXYLIN = np.array([0.65, 0.72, 0.30], dtype=np.float32)
_EOSIN = np.array([0.12, 0.92, 0.40], dtype=np.float32)

# Lengths in pixels are meant at this side and scale with the image.
_REFERENCE_SIZE = 64
_ANGLES = np.linspace(-np.pi, np.pi, 181)
_HARMONICS = np.arange(2, 6)


def synthetic_lesions(count: int, *, size: int = 64, seed: int = 0) -> ArrayImages:
    """Make tissue-like images with one lesion each.

    Image ``i`` has class ``i % 4`` (see `LESION_CLASSES`) and depends on ``seed``, ``i`` and ``size`` alone, so a
    larger set begins with the smaller one.

    Args:
        count: How many images.
        size: Side of the images in pixels, at least 32.
        seed: Not negative; another seed gives other images.

    Returns:
        Images with labels and with the lesions as masks.
    """
    check_int("count", count, minimum=1)
    check_int("size", size, minimum=32)
    check_int("seed", seed, minimum=0)
    images = np.empty((count, 3, size, size), dtype=np.uint8)
    masks = np.empty((count, size, size), dtype=np.bool_)
    labels = np.arange(count, dtype=np.int64) % len(LESION_CLASSES)
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        images[index], masks[index] = _draw(rng, size, LESION_CLASSES[labels[index]])
    return ArrayImages(torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(masks))


def lesions_bundle(
    *, size: int = 64, seed: int = 0, train: int = 1600, validation: int = 200, test: int = 400
) -> DataBundle:
    """Make a data set of synthetic lesions.

    Args:
        size: Side of the images in pixels, at least 32.
        seed: Not negative; no two seeds, and no two splits, share an image.
        train: How many images to learn from.
        validation: How many images to choose by.
        test: How many images to judge by.
    """
    check_int("seed", seed, minimum=0)
    counts = {"train": train, "validation": validation, "test": test}
    splits = {}
    for offset, (split, count) in enumerate(counts.items()):
        check_int(split, count, minimum=1)
        splits[split] = synthetic_lesions(count, size=size, seed=len(counts) * seed + offset)
    return DataBundle(
        name="synthetic-lesions",
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        class_names=LESION_CLASSES,
        multi_label=False,
        preprocessing=Preprocessing(size=size),
    )


def _draw(rng: np.random.Generator, size: int, kind: str) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    scale = size / _REFERENCE_SIZE
    broad = _noise(rng, size, (5, 9))
    fine = _noise(rng, size, (15, 27))
    eosin = 0.46 + 0.14 * broad + 0.05 * fine
    haematoxylin = 0.20 + 0.09 * _noise(rng, size, (6, 11)) + 0.05 * fine
    tissue = np.maximum(haematoxylin, 0.03)  # before the nuclei: what the lesion's own ground is made of
    haematoxylin = tissue + 0.85 * _nuclei(rng, size)

    rows, columns, depth, radius = _blob(rng, size)
    softness = 2.5 * scale
    alpha = _smoothstep(0.5 + depth / softness)
    inside = depth >= 0.0
    pattern = _pattern(rng, kind, rows, columns, radius, scale)
    # Every class gets the same values inside its lesion, only in another order: the pattern's ranks, put through one
    # curve. So neither colour nor contrast can tell the classes apart.
    ranks = np.searchsorted(np.sort(pattern[inside]), pattern) / np.count_nonzero(inside)
    strength = rng.uniform(0.60, 0.80)
    ground = rng.uniform(0.02, 0.14)
    lesion = 0.6 * tissue[rows, columns] + ground + strength * _smoothstep((ranks - 0.54) / 0.22)
    haematoxylin[rows, columns] += alpha * (lesion - haematoxylin[rows, columns])

    # Staining and lamp differ between sections, here between images.
    stains = np.stack([_HAEMATOXYLIN, _EOSIN]) * rng.uniform(0.88, 1.12, (2, 3)) * rng.uniform(0.85, 1.15, (2, 1))
    amounts = np.stack([haematoxylin, np.maximum(eosin, 0.05)]).reshape(2, -1)
    density = (stains.astype(np.float32).T @ amounts).reshape(3, size, size)
    lamp = rng.uniform(0.94, 1.0, (3, 1, 1)).astype(np.float32)
    grain = 2.5 * rng.standard_normal((size, size), dtype=np.float32)
    image = 255.0 * lamp * np.exp(-density) + grain

    mask = np.zeros((size, size), dtype=np.bool_)
    mask[rows, columns] = inside
    return np.clip(image, 0.0, 255.0).astype(np.uint8), mask


@lru_cache(maxsize=64)
def _upsampler(size: int, cells: int) -> _Field:
    """Matrix (size, cells) that interpolates ``cells`` knots with a cubic B-spline."""
    position = (np.arange(size) + 0.5) / size * (cells - 3)
    first = np.minimum(position.astype(np.int64), cells - 4)
    t = position - first
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1) / 6
    matrix = np.zeros((size, cells))
    np.put_along_axis(matrix, first[:, None] + np.arange(4), weights, axis=1)
    # The mean of a field's variance over the positions becomes one.
    matrix /= np.sqrt(np.mean(np.sum(weights**2, axis=1)))
    return matrix.astype(np.float32)


def _noise(rng: np.random.Generator, size: int, octaves: tuple[int, ...]) -> _Field:
    """Smooth noise (size, size) of mean 0 and variance about 1; ``octaves`` are knots a side, coarse to fine."""
    field = np.zeros((size, size), dtype=np.float32)
    weight, total = 1.0, 0.0
    for cells in octaves:
        upsampler = _upsampler(size, cells)
        field += weight * (upsampler @ rng.standard_normal((cells, cells), dtype=np.float32) @ upsampler.T)
        total += weight**2
        weight *= 0.65
    return field / np.float32(np.sqrt(total))


def _nuclei(rng: np.random.Generator, size: int) -> _Field:
    """Scattered elongated nuclei (size, size), 0 to 1.

    A nucleus is two round bumps side by side; bumps factor into rows and columns, so all are one product of matrices.
    """
    count = int(rng.integers(16, 34))
    centres = rng.uniform(0.0, size, (2, count))
    angle = rng.uniform(0.0, 2 * np.pi, count)
    width = rng.uniform(0.017, 0.027, count) * size
    shift = 0.75 * width * rng.uniform(0.4, 1.0, count) * np.stack([np.sin(angle), np.cos(angle)])
    bumps = np.concatenate([centres - shift, centres + shift], axis=1)
    distance = (np.arange(size) + 0.5 - bumps[..., None]) / np.tile(width, 2)[:, None]
    profile = np.exp(-0.5 * distance.astype(np.float32) ** 2)
    return _smoothstep((profile[0].T @ profile[1] - 0.45) / 0.5)


def _blob(rng: np.random.Generator, size: int) -> tuple[slice, slice, _Field, float]:
    """A smooth irregular outline placed at random, most of it inside the image.

    Returns:
        Rows and columns of the window around it, how deep each pixel of the window lies inside the outline along its
        radius (in pixels, negative outside), and the mean radius.
    """
    radius = float(rng.uniform(0.12, 0.24) * size)
    amplitude = rng.uniform(-1.0, 1.0, _HARMONICS.size) * 0.36 / _HARMONICS
    phase = rng.uniform(0.0, 2 * np.pi, (_HARMONICS.size, 1))
    outline = radius * (1.0 + amplitude @ np.cos(_HARMONICS[:, None] * _ANGLES + phase))
    extents = []
    for reach in (outline * np.sin(_ANGLES), outline * np.cos(_ANGLES)):
        # Half of its reach may be cut off. Kept wholly inside, lesions would crowd the middle, and a map that always
        # points there would look good (area under its curve 0.79 instead of 0.64).
        low, high = -0.5 * reach.min(), size - 0.5 * reach.max()
        extents.append((rng.uniform(low, high), reach.min(), reach.max()))
    margin = 2.0 * size / _REFERENCE_SIZE
    windows = [
        slice(max(0, int(centre + low - margin)), min(size, int(centre + high + margin) + 1))
        for centre, low, high in extents
    ]
    y, x = (
        np.arange(window.start, window.stop, dtype=np.float32) + np.float32(0.5 - centre)
        for window, (centre, _, _) in zip(windows, extents, strict=True)
    )
    angles = np.arctan2(y[:, None], x[None, :])
    depth = np.interp(angles, _ANGLES, outline) - np.hypot(y[:, None], x[None, :])
    return windows[0], windows[1], depth.astype(np.float32), radius


def _pattern(
    rng: np.random.Generator, kind: str, rows: slice, columns: slice, radius: float, scale: float
) -> NDArray[np.float64]:
    """The texture in the window of a lesion; only the order of its values counts."""
    # In small images the period shrinks less than the image: a line must not become thinner than a pixel.
    # Neither may a lesion hold so little of its texture that its class cannot be seen.
    period = min(rng.uniform(6.0, 8.0) * max(scale, 0.6), 0.85 * radius)
    turn = rng.uniform(0.0, 2 * np.pi)
    phase = rng.uniform(0.0, 2 * np.pi, 3)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    # A slight bend, so that no texture is ruler-straight.
    bend = 0.5 * scale * np.stack([_warp(rng, height, width), _warp(rng, height, width)])
    y = np.arange(height)[:, None] - height / 2 + bend[0]
    x = np.arange(width)[None, :] - width / 2 + bend[1]

    def wave(angle: float, shift: float, stretch: float = 1.0) -> NDArray[np.float64]:
        values: NDArray[np.float64] = np.cos(
            2 * np.pi / (stretch * period) * (np.cos(angle) * x + np.sin(angle) * y) + shift
        )
        return values

    if kind == "stripes":
        return wave(turn, phase[0])
    if kind == "rings":
        off = rng.uniform(-0.25, 0.25, 2) * radius
        rings: NDArray[np.float64] = np.cos(2 * np.pi / period * np.hypot(y - off[0], x - off[1]) + phase[0])
        return rings
    if kind == "mesh":
        return np.maximum(wave(turn, phase[0]), wave(turn + np.pi / 2, phase[1]))
    # Three waves whose phases add up to nothing peak together, on a lattice of triangles.
    third = 2 * np.pi / 3
    return wave(turn, phase[0]) + wave(turn + third, phase[1]) + wave(turn + 2 * third, -phase[0] - phase[1])


def _warp(rng: np.random.Generator, height: int, width: int) -> NDArray[Any]:
    return _upsampler(height, 5) @ rng.standard_normal((5, 5), dtype=np.float32) @ _upsampler(width, 5).T


def _smoothstep(values: NDArray[Any]) -> _Field:
    t = np.clip(values, 0.0, 1.0).astype(np.float32)
    smooth: _Field = t * t * (3.0 - 2.0 * t)
    return smooth

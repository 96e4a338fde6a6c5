"""What is done where some classes have far fewer images than others: weights in the loss, and how images are drawn.

Letters: N images, K classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mhex_vision.data.sets import DataBundle
from mhex_vision.recipes import Recipe


def class_weights(data: DataBundle, recipe: Recipe) -> dict[str, float] | None:
    """The weight of each class in the loss, by its name; of its positive entries where classes are independent.

    "balanced" is N / (K n_k) of a class with n_k images, and (N - n_k) / n_k where classes are independent; 1 for a
    class that no image has, or every one.

    Raises:
        ValueError: The recipe names a class that the data do not have, or leaves one out.
    """
    if recipe.class_weights is None:
        return None
    if recipe.class_weights != "balanced":
        given = dict(recipe.class_weights)
        unknown, missing = sorted(given.keys() - set(data.class_names)), sorted(set(data.class_names) - given.keys())
        if unknown or missing:
            which = [f"{name!r} is none" for name in unknown] + [f"{name!r} is missing" for name in missing]
            raise ValueError(f"class_weights must name every class of {data.name}, got others: {', '.join(which[:5])}")
        return {name: given[name] for name in data.class_names}
    counts, images = _counts(data.train.labels, data.num_classes), len(data.train)
    present = int((counts > 0).sum())
    found = (images - counts) / counts.clip(1) if data.multi_label else images / (present * counts.clip(1))
    found[(counts == 0) | (data.multi_label & (counts == images))] = 1
    return dict(zip(data.class_names, found.tolist(), strict=True))


def chances(labels: Tensor, num_classes: int) -> NDArray[np.float64]:
    """How often each image is drawn, (N,), so that every class is drawn as often as any other.

    An image of several independent classes is drawn as one of the rarest of them; those of none are a class as well.

    Args:
        labels: (N,) class numbers, or (N, K) zeros and ones.
        num_classes: K.
    """
    rarity = 1 / _counts(labels, num_classes).clip(1)
    if labels.ndim == 1:
        drawn = rarity[labels.numpy()]
    else:
        positive = labels.numpy() > 0.5
        empty = ~positive.any(axis=1)
        drawn = np.where(empty, 1 / max(int(empty.sum()), 1), (positive * rarity).max(axis=1))
    chosen: NDArray[np.float64] = drawn / drawn.sum()
    return chosen


def _counts(labels: Tensor, num_classes: int) -> NDArray[np.float64]:
    found = np.bincount(labels.numpy(), minlength=num_classes) if labels.ndim == 1 else labels.sum(dim=0).numpy()
    return found.astype(np.float64)

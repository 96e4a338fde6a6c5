"""A picture of what several methods say about the same images.

Letters: B batch, H x W image size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from mhex_vision import drawing
from mhex_vision.comparison.run import explainers_of, preprocessing_of, read_images, resized
from mhex_vision.data.sets import DataBundle, ImageSet
from mhex_vision.explainers import Explainer
from mhex_vision.progress import bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_examples(
    model: nn.Module,
    images: ImageSet,
    data: DataBundle,
    methods: Sequence[str] | Mapping[str, Explainer],
    *,
    samples: int = 6,
) -> Figure:
    """One row per image (the first readable one of each class, then of the next), one column per method.

    Args:
        model: The network to explain.
        images: Where to take images from.
        data: The bundle they belong to.
        methods: As in `compare`; the first one's map is laid over the image.
        samples: How many images at most.

    Raises:
        ValueError: No image can be read.
    """
    explainers = explainers_of(methods)
    labels = images.labels if images.labels.ndim == 1 else images.labels.argmax(dim=1)
    first = [int((labels == label).nonzero()[0]) for label in sorted(set(labels.tolist()))]
    kept, batch = read_images(images, first[:samples])
    if not kept:
        raise ValueError("images must hold at least one that can be read, got none")
    preprocessing = preprocessing_of(model, data)
    shown = resized(batch.images, preprocessing.size)
    device = next(model.parameters()).device
    target = labels[torch.tensor(kept)].to(device)
    inputs = preprocessing.normalize(shown.to(device))
    maps = {}
    with bar(explainers.items(), desc="examples", unit="method") as shown_methods:
        for name, explainer in shown_methods:
            raw = explainer(model, inputs, target).cpu()
            maps[name] = drawing.drawable(raw, signed=bool((raw < 0).any()))
    overlay = next(iter(maps.values()))
    rows = [
        drawing.Row(
            shown[row],
            data.class_names[int(target[row])],
            [(name, saliency[row]) for name, saliency in maps.items()],
            overlay[row],
        )
        for row in range(len(kept))
    ]
    return drawing.figure(rows)

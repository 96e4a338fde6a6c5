"""A page of many images, explained and packed a batch at a time, so that no more than one batch's maps are in memory.

Letters: B batch, K classes, m targets per sample, H x W image size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mhex_core import _checks
from mhex_core.explorer import ExplorerPage, Method, Sample, explorer_page
from mhex_vision.classifier import MHEXClassifier
from mhex_vision.comparison.run import preprocessing_of, read_images, resized
from mhex_vision.data.sets import DataBundle, FolderImages, ImageSet
from mhex_vision.explainers import Explainer
from mhex_vision.explaining import explain_by, predicted
from mhex_vision.plain import PlainClassifier
from mhex_vision.progress import counter
from mhex_vision.reporting import methods_of, samples_of


class NamedBatch(NamedTuple):
    """Images that could be read.

    Attributes:
        names: B names.
        images: (B, 3, H, W) uint8, as the network sees them before normalisation.
        labels: (B,) true classes, (B, K) zeros and ones where an image may have several, or None if nobody knows.
    """

    names: Sequence[str]
    images: Tensor
    labels: Tensor | None = None


def explore(
    model: MHEXClassifier | PlainClassifier,
    batches: Iterable[NamedBatch],
    methods: Mapping[str, Explainer],
    *,
    count: int,
    targets: int = 3,
    title: str = "Explanations",
    about: Mapping[str, str] | None = None,
    max_bytes: int | None = None,
) -> ExplorerPage:
    """Explain images by every method, and make a page of them.

    Of each image the `targets` most probable classes are explained, and the true one: the predicted class first, then
    the true one if that is another, then the others.

    Args:
        model: The network, whose preprocessing is known.
        batches: The images.
        methods: Explainers by name.
        count: How many batches there are about, for the bar in a terminal.
        targets: At least 1.
        title: Of the page.
        about: As for `mhex_vision.report`.
        max_bytes: As for `mhex_vision.report`.

    Raises:
        ValueError: No image could be read, the network does not say how images are prepared, or the page does not fit.
    """
    preprocessing = model.config.preprocessing
    if preprocessing is None:
        raise ValueError("model must say how images are prepared, and this one does not")
    _checks.positive_int("targets", targets)
    device = next(model.parameters()).device
    samples: list[Sample] = []
    kinds: tuple[Method, ...] = ()
    with counter(desc="explaining", total=count * len(methods), unit="batch") as shown:
        for batch in batches:
            inputs = preprocessing.normalize(batch.images.to(device))
            probabilities = predicted(model, inputs)
            wanted = classes_to_explain(probabilities, batch.labels, targets=targets)
            explanations = []
            for name, method in methods.items():
                shown.set_description(name)
                found = explain_by(model, inputs, method, wanted, keep_images=False, name=name)
                # What the classifier's own method is called is what it was asked for, options and all.
                explanations.append(replace(found, method=name, images=batch.images))
                shown.update()
            samples += samples_of(explanations, names=batch.names, labels=batch.labels)
            kinds = _either(kinds, methods_of(explanations))
    if not samples:
        raise ValueError("there must be at least one image that can be read, got none")
    return explorer_page(
        samples,
        methods=kinds,
        class_names=model.config.class_names,
        title=title,
        about=about,
        max_bytes=max_bytes,
    )


def batches_of(
    images: ImageSet, places: Sequence[int], data: DataBundle, model: MHEXClassifier | PlainClassifier, *, size: int
) -> Iterator[NamedBatch]:
    """Some images of a data set, as a network sees them; those that cannot be read are left out, with a warning.

    Args:
        images: One split of the data.
        places: Which images.
        data: What they belong to.
        model: The network.
        size: Images at a time.
    """
    side = preprocessing_of(model, data).size
    for start in range(0, len(places), size):
        kept, batch = read_images(images, places[start : start + size])
        if kept:
            names = [_name(images, place, data) for place in kept]
            yield NamedBatch(names, resized(batch.images, side), batch.labels)


def chosen_places(count: int, samples: int, seed: int) -> list[int]:
    """A random choice of `samples` out of `count`, in the order in which they stand."""
    if samples >= count:
        return list(range(count))
    found: list[int] = np.sort(np.random.default_rng(seed).permutation(count)[:samples]).tolist()
    return found


def classes_to_explain(probabilities: Tensor, labels: Tensor | None, *, targets: int) -> Tensor:
    """The most probable classes of each sample and its true one, in the order of `explore`.

    Args:
        probabilities: (B, K).
        labels: As in `NamedBatch`; of several the most probable is meant.
        targets: How many at least, as far as there are so many classes.

    Returns:
        (B, m) int64, with the first class once more where a sample has fewer than m.
    """
    ranked = probabilities.argsort(dim=1, descending=True, stable=True)[:, :targets].tolist()
    rows = []
    for row, true in zip(ranked, _true(probabilities, labels), strict=True):
        rows.append(row if true is None else list(dict.fromkeys([row[0], true, *row])))
    most = max(map(len, rows), default=0)
    wanted = [row + row[:1] * (most - len(row)) for row in rows]
    return torch.tensor(wanted, dtype=torch.int64, device=probabilities.device).reshape(len(rows), most)


def _true(probabilities: Tensor, labels: Tensor | None) -> list[int | None]:
    if labels is None:
        return [None] * len(probabilities)
    if labels.ndim == 1:
        return [int(label) for label in labels]
    known = labels.to(probabilities.device) > 0
    best = torch.where(known, probabilities, -1).argmax(dim=1)
    return [int(label) if has else None for label, has in zip(best, known.any(dim=1), strict=True)]


def _either(before: tuple[Method, ...], now: tuple[Method, ...]) -> tuple[Method, ...]:
    """Methods of all batches: signed if any is."""
    if not before:
        return now
    return tuple(replace(old, signed=old.signed or new.signed) for old, new in zip(before, now, strict=True))


def _name(images: ImageSet, place: int, data: DataBundle) -> str:
    if isinstance(images, FolderImages):
        # CLASS/FILE, which is how the folder is laid out.
        return "/".join(Path(images.paths[place]).parts[-2:])
    split = next(name for name in ("train", "validation", "test") if getattr(data, name) is images)
    return f"{split} {place}"

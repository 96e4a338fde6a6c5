"""Explanations of images as one HTML page, in which a reader weighs them anew.

Letters: B batch, n targets per sample, K classes, L layers, H x W image size.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from mhex_core import _checks
from mhex_core.explorer import Evidence, ExplorerPage, Method, Picture, Sample, explorer_page, notebook_frame
from mhex_vision.explanation import Explanation

LARGEST_PNG = 64
"""Side in pixels up to which every pixel of an image is kept; larger ones become JPEG."""

_QUALITY = 90
_NOTEBOOK_SAMPLES = 8
_NOTEBOOK_TARGETS = 10
_LEVELS = 65535  # of packed evidence
# Of these levels every so many is used: the last bits are noise, and would be most of the page. A page agrees with
# Python to 1/4096 of a map's range where a method gives one map, of the size of the image, and more closely where
# several layers add up.
_STEP = 4
_STEP_OF_ONE_MAP = 32
_SAME_PROBABILITY = 1e-3
# Of exclusive classes they add up to 1, but for rounding in half precision.
_WHOLE = 1e-2


def report(
    explanations: Explanation | Sequence[Explanation],
    *,
    names: Sequence[str] | None = None,
    labels: Sequence[int] | Tensor | None = None,
    title: str = "Explanations",
    about: Mapping[str, str] | None = None,
    max_bytes: int | None = None,
    compact: bool = False,
) -> ExplorerPage:
    """Make a page that needs neither a network nor a server: a gallery, and sliders for beta and each layer's weight.

    Args:
        explanations: One explanation with its images, or several of the same images by several methods. Each class that
            is explained can be looked at; the first of each image is shown first, and of all classes the most probable.
        names: B names of the images; None numbers them from 1.
        labels: (B,) true classes; or (B, K) zeros and ones, where an image may have several: then the most probable of
            them counts as its class and all are named beside it. None where they are not known.
        title: Of the page.
        about: What is known of how the explanations came to be, by name.
        max_bytes: What the page may have; classes explained beyond each image's first are left out until it fits.
        compact: The small page of a notebook.

    Returns:
        The page; `.save("report.html")` writes it.

    Raises:
        TypeError: An argument is of another type.
        ValueError: There is nothing to show, explanations are of different images or classes or bear the same name, an
            argument does not fit them, or the page does not fit into `max_bytes`.
    """
    several = _of_same_images(explanations)
    if not isinstance(title, str):
        raise TypeError(f"title must be a string, got {type(title).__name__}")
    return explorer_page(
        samples_of(several, names=names, labels=labels),
        methods=methods_of(several),
        class_names=several[0].class_names,
        title=title,
        about=about,
        max_bytes=max_bytes,
        compact=compact,
    )


def in_notebook(explanation: Explanation) -> str | None:
    """A compact page of the first few samples in a frame, or None where there is no image to show."""
    if explanation.images is None or not len(explanation):
        return None
    shown = explanation[:_NOTEBOOK_SAMPLES]
    page = explorer_page(
        samples_of([shown], most=_NOTEBOOK_TARGETS),
        methods=methods_of([shown]),
        class_names=shown.class_names,
        compact=True,
    )
    classes = explanation.target[0].numel()
    left_out = []
    if len(shown) < len(explanation):
        left_out.append(f"{len(shown)} of {len(explanation)} samples")
    if classes > _NOTEBOOK_TARGETS:
        left_out.append(f"{_NOTEBOOK_TARGETS} of {classes} classes")
    note = f"<p>Shown are {' and '.join(left_out)}; <code>save_html</code> writes all.</p>" if left_out else ""
    return notebook_frame(page) + note


def methods_of(explanations: Sequence[Explanation]) -> tuple[Method, ...]:
    """How the layers of each explanation are weighed."""
    return tuple(
        Method(
            name=explanation.method,
            layer_names=explanation.layer_names,
            layer_weights=explanation.layer_weights,
            beta=explanation.options.beta,
            normalize=explanation.options.normalize,
            floor=explanation.options.floor,
            signed=explanation.signed,
        )
        for explanation in explanations
    )


def samples_of(
    explanations: Sequence[Explanation],
    *,
    names: Sequence[str] | None = None,
    labels: Sequence[int] | Tensor | None = None,
    most: int | None = None,
) -> list[Sample]:
    """The images of explanations that share them, with every method's evidence.

    Args:
        explanations: At least one; one of them carries the images.
        names: As for `report`.
        labels: As for `report`.
        most: How many classes of each sample and method at most; None means all.
    """
    held = [explanation.to("cpu") for explanation in explanations]
    first = held[0]
    images = next(explanation.images for explanation in held if explanation.images is not None)
    called = _names(names, len(first))
    truths = _truths(labels, first)
    probabilities = first.probabilities.double()
    heads = _head_predictions(next((one for one in held if len(one.head_logits)), first))
    return [
        Sample(
            name=called[row],
            probabilities=tuple(probabilities[row].tolist()),
            evidence=_evidence(held, row, most),
            label=truths[row][0],
            heads=heads[row],
            picture=picture_of(images[row]),
            note=truths[row][1],
        )
        for row in range(len(first))
    ]


def picture_of(image: Tensor) -> Picture:
    """An image (3, H, W) uint8 as a file: PNG up to `LARGEST_PNG` pixels, JPEG above."""
    height, width = image.shape[1:]
    picture = Image.fromarray(image.movedim(0, -1).contiguous().cpu().numpy())
    file = io.BytesIO()
    if max(height, width) <= LARGEST_PNG:
        picture.save(file, format="PNG", optimize=True)
        return Picture(file.getvalue(), "image/png", width, height)
    picture.save(file, format="JPEG", quality=_QUALITY, optimize=True)
    return Picture(file.getvalue(), "image/jpeg", width, height)


def _of_same_images(explanations: object) -> tuple[Explanation, ...]:
    given = [explanations] if isinstance(explanations, Explanation) else explanations
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"explanations must be an Explanation or a sequence of them, got {type(given).__name__}")
    for index, one in enumerate(given):
        if not isinstance(one, Explanation):
            raise TypeError(f"explanations[{index}] must be an Explanation of images, got {type(one).__name__}")
    several = tuple(given)
    if not several or not len(several[0]):
        raise ValueError("explanations must hold at least one sample, got none")
    images = next((one.images for one in several if one.images is not None), None)
    if images is None:
        raise ValueError(
            "explanations must carry their images; explain with keep_images=True a model whose preprocessing is known"
        )
    first = several[0]
    for index, one in enumerate(several):
        if one.images is not None and not (
            one.images.shape == images.shape and torch.equal(one.images.cpu(), images.cpu())
        ):
            raise ValueError(f"explanations must be of the same images, and explanations[{index}] shows others")
        if one.probabilities.shape != first.probabilities.shape or one.class_names != first.class_names:
            raise ValueError(f"explanations must be of the same samples and classes, and explanations[{index}] is not")
        if not torch.allclose(
            one.probabilities.cpu().double(), first.probabilities.cpu().double(), rtol=0, atol=_SAME_PROBABILITY
        ):
            raise ValueError(
                f"explanations must be of one model's predictions, and those of explanations[{index}] differ"
            )
    names = [one.method for one in several]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(
            f"explanations must each have a method's name of their own, got {twice!r} twice; "
            "dataclasses.replace(explanation, method=...) gives one another"
        )
    return several


def _names(names: Sequence[str] | None, count: int) -> list[str]:
    if names is None:
        return [str(number + 1) for number in range(count)]
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(one, str) for one in names):
        raise TypeError(f"names must be a sequence of strings, got {names!r}")
    if len(names) != count:
        raise ValueError(f"names must be {count}, one per sample, got {len(names)}")
    return list(names)


def _truths(labels: Sequence[int] | Tensor | None, explanation: Explanation) -> list[tuple[int | None, str]]:
    """Each sample's class, and where it may have several what they are."""
    count, classes = explanation.probabilities.shape
    if labels is None:
        return [(None, "")] * count
    if isinstance(labels, Tensor) and labels.ndim == 2:
        return [_of_several(true, explanation, row) for row, true in enumerate(_true_classes(labels, count, classes))]
    values = labels if isinstance(labels, Tensor) else _numbers(labels)
    found = _checks.class_indices("labels", values, batch=count, num_classes=classes, device=torch.device("cpu"))
    return [(label, "") for label in found.tolist()]


def _numbers(labels: object) -> Tensor:
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise TypeError(f"labels must be a sequence of ints or a tensor, got {type(labels).__name__}")
    for index, label in enumerate(labels):
        if isinstance(label, bool) or not isinstance(label, int):
            raise TypeError(f"labels[{index}] must be an int, got {type(label).__name__}")
    return torch.tensor(list(labels), dtype=torch.int64)


def _true_classes(labels: Tensor, count: int, classes: int) -> list[list[int]]:
    """The true classes of each sample."""
    if labels.shape != (count, classes) or not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError(
            f"labels must be ({count},) classes or ({count}, {classes}) zeros and ones, got {tuple(labels.shape)}"
        )
    return [row.nonzero().flatten().tolist() for row in labels]


def _of_several(true: list[int], explanation: Explanation, row: int) -> tuple[int | None, str]:
    if not true:
        return None, "no class is true"
    label = max(true, key=lambda one: float(explanation.probabilities[row, one]))
    if len(true) == 1:
        return label, ""
    return label, f"true: {', '.join(explanation.label(one) for one in true)}"


def _head_predictions(explanation: Explanation) -> list[tuple[tuple[int, float], ...]]:
    """For each sample each head's class and its probability, by sigmoid where classes are independent of each other."""
    logits = explanation.head_logits.double()
    if not len(logits):
        return [()] * len(explanation)
    exclusive = bool(((explanation.probabilities.double().sum(dim=1) - 1).abs() < _WHOLE).all())
    values, classes = (logits.softmax(dim=-1) if exclusive else logits.sigmoid()).max(dim=-1)
    return [
        tuple(zip(classes[:, row].tolist(), values[:, row].tolist(), strict=True)) for row in range(len(explanation))
    ]


def _evidence(explanations: Sequence[Explanation], row: int, most: int | None) -> tuple[Evidence, ...]:
    """All methods' first class, then their second: what a page without room leaves out comes last."""
    found: dict[tuple[int, int], Evidence] = {}
    for method, explanation in enumerate(explanations):
        targets = explanation.target[row].reshape(-1).tolist()
        columns = [column for column, target in enumerate(targets) if target not in targets[:column]]
        if targets == list(range(explanation.probabilities.shape[1])):
            # Nobody chose the order in which all classes come.
            columns = explanation.probabilities[row].argsort(descending=True, stable=True).tolist()
        for rank, column in enumerate(columns[:most]):
            found[rank, method] = _packed(explanation, row, column, method=method, target=targets[column])
    return tuple(found[key] for key in sorted(found))


def _packed(explanation: Explanation, row: int, column: int, *, method: int, target: int) -> Evidence:
    place = (row,) if explanation.target.ndim == 1 else (row, column)
    step = _STEP if len(explanation.head_logits) else _STEP_OF_ONE_MAP
    positive, negative = (
        [_coarse(layer[place], step) for layer in part] for part in (explanation.positive, explanation.negative)
    )
    return Evidence.of_layers(positive, negative, method=method, target=target, size=explanation.size)


def _coarse(part: Tensor, step: int) -> Tensor:
    """Values on every `step`-th level of their range; the extremes stay what they are."""
    values = part.double()
    low, high = values.aminmax()
    level = (high - low) / _LEVELS
    if not bool(level > 0) or not bool(torch.isfinite(level)):
        return values
    levels = ((values - low) / (step * level)).round() * step
    return low + level * levels.clamp(max=_LEVELS)

"""The same explanation by any method, of any classifier.

Letters: B batch, K classes, m targets per sample, H x W image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mhex_core import _checks
from mhex_core.modes import in_evaluation_mode
from mhex_vision import outputs
from mhex_vision.classifier import MHEXClassifier, Target
from mhex_vision.explainers import Explainer, explainer, parse
from mhex_vision.explainers.own import OwnSaliency
from mhex_vision.explainers.view import wide
from mhex_vision.explanation import Explanation
from mhex_vision.plain import PlainClassifier


def explain_by(
    model: nn.Module,
    images: Tensor,
    method: str | Explainer,
    target: Target = None,
    *,
    keep_images: bool = True,
    name: str | None = None,
    **options: Any,
) -> Explanation:
    """Predict, and explain by a method of one's choice.

    Maps keep the sign and the scale that the method gives them; `overlay` and `plot` draw signed ones on a diverging
    scale. What "mhex" and its kin give is `MHEXClassifier.explain`'s, with its layers.

    Args:
        model: An `MHEXClassifier`, a `PlainClassifier`, or another network that gives (B, K) logits.
        images: (B, C, H, W), normalised as in training.
        method: A name out of `explainers.EXPLAINERS`, with its options after a colon if there are none in `options`:
            "cdam", "cdam:mode=smooth"; or an explainer.
        target: The classes to explain: None for the predicted ones; one for all images, or one for each, by number
            or, of a classifier that knows them, by name; an int tensor (B,) or (B, m); or "all".
        keep_images: Whether the explanation carries the images, where it is known how they were normalised.
        name: What the explanation calls the method; None means as it was asked for.
        **options: The method's.

    Raises:
        TypeError: An argument is of another type, or options come with an explainer that is made already.
        ValueError: The method or an option is unknown, or an argument does not fit the model.
        ImportError: The library that the method needs is not installed.
    """
    known_as, chosen = _chosen(method, options)
    keep_images = _checks.flag("keep_images", keep_images)
    if isinstance(chosen, OwnSaliency) and isinstance(model, MHEXClassifier):
        return model.explain(images, target, keep_images=keep_images, **chosen.options)
    images = _checks.tensor("images", images, ndim=4)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    probabilities = predicted(model, images)
    config = model.config if isinstance(model, MHEXClassifier | PlainClassifier) else None
    class_names = () if config is None else config.class_names
    targets = _targets(target, probabilities, class_names)
    preprocessing = None if config is None else config.preprocessing
    shown = keep_images and preprocessing is not None and images.shape[1] == 3
    return Explanation.of_maps(
        _maps(chosen, model, images, targets),
        targets,
        probabilities,
        method=known_as if name is None else name,
        class_names=class_names,
        images=preprocessing.denormalize(images) if shown and preprocessing is not None else None,
    )


def predicted(model: nn.Module, images: Tensor) -> Tensor:
    """What a network in evaluation mode predicts: (B, K) probabilities, of independent classes where it says so.

    Args:
        model: As for `explain_by`.
        images: (B, C, H, W), normalised as in training.

    Raises:
        ValueError: The model does not give (B, K) logits.
    """
    with torch.no_grad(), in_evaluation_mode(model):
        output, multi_label = model(images), outputs.is_multi_label(model)
        logits = outputs.class_logits(output, len(images), multi_label=multi_label)
    if not multi_label:
        outputs.say_what_looks_like_probabilities(model, outputs.logits_in(output))
    return wide(logits).sigmoid() if multi_label else wide(logits).softmax(dim=1)


def _chosen(method: str | Explainer, options: dict[str, Any]) -> tuple[str, Explainer]:
    if isinstance(method, str):
        return method, explainer(method, **options) if options else parse(method)
    if not callable(method):
        raise TypeError(f"method must be a name or an explainer, got {type(method).__name__}")
    if options:
        raise TypeError(f"options must be given to the explainer when it is made, got {', '.join(options)}")
    return getattr(method, "__name__", type(method).__name__), method


def _maps(method: Explainer, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    if targets.ndim == 1:
        return method(model, images, targets)
    several = getattr(method, "several", None)
    if several is not None:
        maps: Tensor = several(model, images, targets)
        return maps
    return torch.stack([method(model, images, column) for column in targets.unbind(dim=1)], dim=1)


def _targets(target: Target, probabilities: Tensor, class_names: Sequence[str]) -> Tensor:
    batch, classes = probabilities.shape
    if target is None:
        return probabilities.argmax(dim=1)
    if isinstance(target, str) and target == "all":
        return torch.arange(classes, device=probabilities.device).expand(batch, classes).contiguous()
    return _checks.class_indices(
        "target", target, batch=batch, num_classes=classes, device=probabilities.device, class_names=class_names
    )

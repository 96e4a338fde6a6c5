"""Explainers by name, and by the text of a command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

from mhex_core import SaliencyOptions
from mhex_core.specs import check_options, parse_spec
from mhex_vision.explainers.attention import (
    GMAR,
    AttCAT,
    AttentionFlow,
    AttentionGradCAM,
    AttentionRollout,
    AttentionShapley,
    GenericRelevance,
    GradSAM,
    LastAttention,
)
from mhex_vision.explainers.cams import ClassActivationMap
from mhex_vision.explainers.cdam import CDAM
from mhex_vision.explainers.gradients import IntegratedGradients
from mhex_vision.explainers.interface import Explainer
from mhex_vision.explainers.own import CentreGaussian, OwnSaliency, RandomMaps, UserFunction
from mhex_vision.explainers.shapley import PartitionShap
from mhex_vision.explainers.vitcx import ViTCX

TEXT = ("layer", "concept")  # what is never read as a number: a layer may be called 4, or 1.10


class _Known(NamedTuple):
    """An explainer that has a name: what it is, how it is made, and what it can be told."""

    description: str
    make: Callable[..., Explainer]
    options: tuple[str, ...]


def _names(settings: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(settings) if field.init)


OWN = (*_names(SaliencyOptions), "attention")


def _own(defaults: dict[str, Any], **options: Any) -> OwnSaliency:
    return OwnSaliency(defaults | options)


def _plain(description: str, kind: Any) -> _Known:
    return _Known(description, kind, _names(kind))


def _cam(method: str, description: str, *more: str) -> _Known:
    return _Known(description, partial(ClassActivationMap, method=method), ("layer", *more))


_KNOWN = {
    "mhex": _Known("the classifier's own saliency", partial(_own, {}), OWN),
    "mhex-paper": _Known(
        "the same from A_l as it is, not rectified, as in the paper",
        partial(_own, {"rectify": False, "attention": False}),
        OWN,
    ),
    "mhex-authors": _Known(
        "the paper's with beta 1 and tau_neg 0.1, as in the authors' table",
        partial(_own, {"rectify": False, "beta": 1.0, "tau_neg": 0.1, "attention": False}),
        OWN,
    ),
    "random": _Known("uniform noise", RandomMaps, _names(RandomMaps)),
    "centre-gaussian": _Known("a Gaussian on the image's centre", CentreGaussian, _names(CentreGaussian)),
    "gradcam": _cam("gradcam", "Grad-CAM (grad-cam)"),
    "gradcam++": _cam("gradcam++", "Grad-CAM++ (grad-cam)"),
    "layercam": _cam("layercam", "LayerCAM (grad-cam)"),
    "scorecam": _cam("scorecam", "Score-CAM (grad-cam), slow: a forward pass per channel", "batch_size"),
    "eigencam": _cam("eigencam", "Eigen-CAM (grad-cam), the same for every class"),
    "integrated-gradients": _Known("integrated gradients (captum)", IntegratedGradients, _names(IntegratedGradients)),
    "shap": _Known("Owen values of image regions (shap), slow", PartitionShap, _names(PartitionShap)),
    # Of vision transformers only.
    "cdam": _plain("class-discriminative attention map (CDAM)", CDAM),
    "gmar": _plain("attention rollout with heads weighed by their gradients (GMAR)", GMAR),
    "attention": _plain("the last block's attention, the same for every class", LastAttention),
    "attention-rollout": _plain("attention rolled out over the blocks, the same for every class", AttentionRollout),
    "attention-flow": _plain("maximum flow through attention, the same for every class, slow", AttentionFlow),
    "attention-gradcam": _plain("Grad-CAM on the last block's attention", AttentionGradCAM),
    "attention-shapley": _plain("Shapley values of a game that attention defines", AttentionShapley),
    "attcat": _plain("input times gradient in every block, weighed by attention (AttCAT)", AttCAT),
    "generic-relevance": _plain("attention times gradient, rolled out (Chefer's generic rule)", GenericRelevance),
    "grad-sam": _plain("attention times the positive part of its gradient (Grad-SAM)", GradSAM),
    "vit-cx": _plain("effects of masks that the last block's features draw (ViT-CX), slow", ViTCX),
}

EXPLAINERS: dict[str, str] = {name: known.description for name, known in _KNOWN.items()}
"""The known names, each with one line on what it is."""


def explainer(name: str, **options: Any) -> Explainer:
    """Make an explainer.

    Args:
        name: One of `EXPLAINERS`, or "module:function" for a function of your own, which takes
            (model, images, targets), gives (B, H, W), and takes no options here.
        **options: What this explainer can be told; an unknown one is answered with the list.

    Raises:
        TypeError: The name is no text, or an option of another type.
        ValueError: The name or an option is unknown, or an option's value does not fit.
        ImportError: The library that it needs is not installed.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    if name in _KNOWN:
        known = _KNOWN[name]
        check_options(name, options, known.options)
        return known.make(**options)
    if ":" in name:
        check_options(name, options, ())
        return UserFunction.named(name)
    raise ValueError(f"name must be one of {', '.join(EXPLAINERS)}, or 'module:function', got {name!r}")


def parse(spec: str) -> Explainer:
    """Make an explainer from one text: "gradcam", "gradcam:layer=layer3.1", "shap:evaluations=200,blur=8".

    Values are read as int, float, true or false, and else as text. What follows the colon without an equals sign is a
    function of your own: "module:function".

    Args:
        spec: The text.

    Raises:
        TypeError: The text is none.
        ValueError: It cannot be read, or `explainer` does not know what it says.
        ImportError: The library that it needs is not installed.
    """
    name, options = parse_spec(spec, known=_KNOWN, textual=TEXT)
    return explainer(name, **options)

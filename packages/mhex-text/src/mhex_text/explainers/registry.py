"""Explainers of texts by name, and by the text of a command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

from mhex_core.specs import check_options, parse_spec
from mhex_text.explainers.attention import (
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
from mhex_text.explainers.cdam import CDAM
from mhex_text.explainers.gradients import IntegratedGradients
from mhex_text.explainers.interface import TextExplainer
from mhex_text.explainers.occlusion import Occlusion
from mhex_text.explainers.own import OwnScores, RandomScores, UserFunction
from mhex_text.explainers.shapley import PartitionShap


class _Known(NamedTuple):
    """An explainer that has a name: what it is, how it is made, and what it can be told."""

    description: str
    make: Callable[..., TextExplainer]
    options: tuple[str, ...]


def _known(description: str, kind: Any) -> _Known:
    return _Known(description, kind, tuple(field.name for field in fields(kind)))


_KNOWN = {
    "mhex": _known("the classifier's own scores", OwnScores),
    "random": _known("uniform noise", RandomScores),
    "cdam": _known("class-discriminative attention map (CDAM)", CDAM),
    "gmar": _known("attention rollout with heads weighed by their gradients (GMAR)", GMAR),
    "attention": _known("the last layer's attention, the same for every class", LastAttention),
    "attention-rollout": _known("attention rolled out over the layers, the same for every class", AttentionRollout),
    "attention-flow": _known("maximum flow through attention, the same for every class, slow", AttentionFlow),
    "attention-gradcam": _known("Grad-CAM on the last layer's attention", AttentionGradCAM),
    "attention-shapley": _known("Shapley values of a game that attention defines", AttentionShapley),
    "attcat": _known("input times gradient in every layer, weighed by attention (AttCAT)", AttCAT),
    "generic-relevance": _known(
        "attention times gradient, rolled out (the generic rule of Chefer et al.)", GenericRelevance
    ),
    "grad-sam": _known("attention times the positive part of its gradient (Grad-SAM)", GradSAM),
    "integrated-gradients": _known("integrated gradients (captum)", IntegratedGradients),
    "shap": _known("Owen values of groups of tokens (shap), slow", PartitionShap),
    "occlusion": _known("what leaving one token out takes from the probability", Occlusion),
}

EXPLAINERS: dict[str, str] = {name: known.description for name, known in _KNOWN.items()}
"""The known names, each with one line on what it is."""


def explainer(name: str, **options: Any) -> TextExplainer:
    """Make an explainer.

    Args:
        name: One of `EXPLAINERS`, or "module:function" for a function of your own, which takes
            (model, batch, targets), gives (B, T), and takes no options here.
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


def parse(spec: str) -> TextExplainer:
    """Make an explainer from one text: "attcat", "mhex:layers=last,beta=0.5", "shap:evaluations=200".

    Values are read as int, float, true or false, and else as text. What follows the colon without an equals sign is a
    function of your own: "module:function".

    Args:
        spec: The text.

    Raises:
        TypeError: The text is none.
        ValueError: It cannot be read, or `explainer` does not know what it says.
        ImportError: The library that it needs is not installed.
    """
    name, options = parse_spec(spec, known=_KNOWN)
    return explainer(name, **options)

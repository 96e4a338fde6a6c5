"""Explainers of one interface: the classifier's own saliency, maps that know nothing, and other people's methods.

An explainer is called with (model, images, targets) and gives one map per image. Captum, grad-cam and shap are not
dependencies: each is imported when an explainer that needs it is first made to explain.
"""

from __future__ import annotations

from mhex_vision.explainers.interface import Explainer
from mhex_vision.explainers.registry import EXPLAINERS, explainer, parse

__all__ = ["EXPLAINERS", "Explainer", "explainer", "parse"]

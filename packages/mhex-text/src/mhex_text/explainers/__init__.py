"""Explainers of texts behind one interface: the classifier's own scores, baselines, and other people's methods.

An explainer is called with (model, batch, targets) and gives one score per token. Captum and shap are not dependencies:
each is imported when an explainer that needs it is first made to explain.
"""

from __future__ import annotations

from mhex_text.explainers.interface import TextExplainer
from mhex_text.explainers.registry import EXPLAINERS, explainer, parse

__all__ = ["EXPLAINERS", "TextExplainer", "explainer", "parse"]

"""What an explanation of texts holds, how it is weighed anew, and how it is kept in a file.

Everything is computed from the evidence of each layer, in double precision: the score of a token is
sum_l lambda_l (p_l + beta n_l), p_l the evidence for the class and n_l the evidence against it, which carries its sign.
So another beta or other layer weights need no model.

Letters: B batch, K classes, L layers, T tokens.
Source: Sun and Liò, "Multi-Head Explainer" (arXiv 2501.01311), saliency equations.
"""

from __future__ import annotations

from mhex_text.explanation.batch import Explanation
from mhex_text.explanation.document import FORMAT, FORMAT_VERSION
from mhex_text.explanation.records import ExplanationSettings, Layers, Token, Word
from mhex_text.explanation.text import TextExplanation

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "Explanation",
    "ExplanationSettings",
    "Layers",
    "TextExplanation",
    "Token",
    "Word",
]

"""Text classifiers that explain themselves: MHEX blocks in Hugging Face encoders, token and word scores."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from mhex_text.adapters import (
    Adapter,
    PostNormAdapter,
    PreNormAdapter,
    key_mask,
    register_adapter,
    supported_encoders,
)
from mhex_text.configuration import MHEXTextConfig
from mhex_text.explanation import Explanation, TextExplanation, Token, Word
from mhex_text.history import TextEpoch, TextMetrics, TextTrainingResult
from mhex_text.plausibility import token_auprc, token_f1, token_iou
from mhex_text.recipes import RECIPES, TextRecipe
from mhex_text.tokens import WordScore, score_mask, word_scores

if TYPE_CHECKING:
    from mhex_text.batch import TokenBatch
    from mhex_text.by_method import explain_by
    from mhex_text.comparison import TextComparison, compare
    from mhex_text.data import TextBundle, UnreadableTextWarning, load_texts
    from mhex_text.judge import TextJudge
    from mhex_text.modeling import MHEXForSequenceClassification, MHEXTextOutput
    from mhex_text.reporting import report
    from mhex_text.training import train

__version__ = version("mhex-text")

__all__ = [
    "RECIPES",
    "Adapter",
    "Explanation",
    "MHEXForSequenceClassification",
    "MHEXTextConfig",
    "MHEXTextOutput",
    "PostNormAdapter",
    "PreNormAdapter",
    "TextBundle",
    "TextComparison",
    "TextEpoch",
    "TextExplanation",
    "TextJudge",
    "TextMetrics",
    "TextRecipe",
    "TextTrainingResult",
    "Token",
    "TokenBatch",
    "UnreadableTextWarning",
    "Word",
    "WordScore",
    "compare",
    "explain_by",
    "key_mask",
    "load_texts",
    "register_adapter",
    "report",
    "score_mask",
    "supported_encoders",
    "token_auprc",
    "token_f1",
    "token_iou",
    "train",
    "word_scores",
]

# transformers' modelling code takes seconds to import and brings torchvision along where that is installed; reading
# texts and training take libraries of an extra.
_LAZY = {
    "MHEXForSequenceClassification": "modeling",
    "MHEXTextOutput": "modeling",
    "TextBundle": "data",
    "TextComparison": "comparison",
    "TextJudge": "judge",
    "TokenBatch": "batch",
    "UnreadableTextWarning": "data",
    "compare": "comparison",
    "explain_by": "by_method",
    "load_texts": "data",
    "report": "reporting",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"mhex_text.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

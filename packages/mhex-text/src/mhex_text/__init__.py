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
from mhex_text.plausibility import token_auprc, token_f1, token_iou
from mhex_text.tokens import WordScore, score_mask, word_scores

if TYPE_CHECKING:
    from mhex_text.modeling import MHEXForSequenceClassification, MHEXTextOutput

__version__ = version("mhex-text")

__all__ = [
    "Adapter",
    "Explanation",
    "MHEXForSequenceClassification",
    "MHEXTextConfig",
    "MHEXTextOutput",
    "PostNormAdapter",
    "PreNormAdapter",
    "TextExplanation",
    "Token",
    "Word",
    "WordScore",
    "key_mask",
    "register_adapter",
    "score_mask",
    "supported_encoders",
    "token_auprc",
    "token_f1",
    "token_iou",
    "word_scores",
]

# transformers' modelling code takes seconds to import and brings torchvision along where that is installed.
_LAZY = ("MHEXForSequenceClassification", "MHEXTextOutput")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module("mhex_text.modeling"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

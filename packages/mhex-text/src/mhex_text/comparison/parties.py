"""Who takes part in a comparison of texts: the model explained, the judge, and what they must agree on."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from mhex_core.pieces import weights_checksum
from mhex_text.explaining import most_tokens
from mhex_text.judge import TextJudge

# What a configuration says of where a model came from, and not of what it computes.
_ORIGIN = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache"}


def judge_of(judge: nn.Module | TextJudge, judge_tokenizer: Any, tokenizer: Any) -> TextJudge:
    """The judge, which reads the tokens of the model explained.

    Raises:
        TypeError: The judge is no model.
        ValueError: Its vocabulary is another, or it is given two tokenizers.
    """
    if isinstance(judge, TextJudge):
        if judge_tokenizer is not None:
            raise ValueError("judge_tokenizer must be None for a TextJudge, which has its own, got one beside it")
        found = judge
    elif isinstance(judge, nn.Module):
        found = TextJudge(judge, tokenizer if judge_tokenizer is None else judge_tokenizer)
    else:
        raise TypeError(f"judge must be a TextJudge or a model, got {type(judge).__name__}")
    found.check_vocabulary(tokenizer)
    return found


def count_classes(model: Any, judge: TextJudge) -> int:
    """K, which model and judge must agree on: one of other classes would judge something else without a word.

    Raises:
        TypeError: The model is none of transformers.
        ValueError: The judge knows other classes, as far as their number and names tell.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"model must be a sequence classifier of transformers, got {type(model).__name__}")
    ours, theirs = _class_names(model), _class_names(judge.model)
    reordered = ours != theirs and sorted(ours) == sorted(theirs)
    if len(ours) != len(theirs) or reordered:
        raise ValueError(
            f"judge must know the classes of the model ({', '.join(ours)}) in their order, got {', '.join(theirs)}"
        )
    return len(ours)


def _class_names(model: Any) -> tuple[str, ...]:
    named = {int(index): str(name).lower() for index, name in (model.config.id2label or {}).items()}
    return tuple(named[index] for index in sorted(named))


def mask_token(tokenizer: Any) -> int:
    """The token that stands for one that is hidden.

    Raises:
        ValueError: The tokenizer has none.
    """
    token = getattr(tokenizer, "mask_token_id", None)
    if token is None:
        raise ValueError(
            "tokenizer must have a mask token, which stands for tokens that are hidden, and this one has none; say "
            "which of its tokens is to stand for them, as by tokenizer.mask_token = tokenizer.unk_token"
        )
    return int(token)


def most_tokens_of_both(model: Any, tokenizer: Any, judge: TextJudge, max_length: int | None) -> int | None:
    """How many tokens a text may have: what was asked for, within what both models take."""
    limits = [most_tokens(model, tokenizer, max_length), most_tokens(judge.model, judge.tokenizer, max_length)]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def identity(network: Any) -> dict[str, Any]:
    """Enough to notice that a call is repeated with another model: kind, and checksums of settings and weights."""
    settings = json.dumps(_computing(network.config.to_dict()), sort_keys=True, default=str)
    return {
        "kind": type(network).__name__,
        "settings": f"{zlib.crc32(settings.encode()):08x}",
        "weights": weights_checksum(network),
    }


def _computing(settings: Any) -> Any:
    if isinstance(settings, Mapping):
        return {str(name): _computing(value) for name, value in settings.items() if name not in _ORIGIN}
    return list(settings) if isinstance(settings, tuple) else settings


def tokenizer_checksum(tokenizer: Any) -> str:
    """Enough to notice another vocabulary or mask token: eight hexadecimal digits."""
    known = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.mask_token_id])
    return f"{zlib.crc32(known.encode()):08x}"

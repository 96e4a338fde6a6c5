"""Classifiers of every family, a tokenizer with a mask token, and all of a model that an explainer might change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from mhex_text import MHEXForSequenceClassification

from ..encoders import CASES, make_config, make_encoder, make_tokenizer  # noqa: TID252

WORDS = ["[MASK]", "un", "##believ", "##able", "good", "bad", "film", "##s", "plot", ",", ".", "not", "a", "the"]
WORDS += ["what", "why", "because", "of", "love", "hate", "dull", "bright", "?"]
TEXTS = [
    "Unbelievable  film, not bad.",
    "good",
    "What a dull plot, the films of the film because the plot.",
    "not good",
]
PAIRS = [("good film", "why not?"), ("the plot of a film because of love", "dull"), ("bad", "unbelievable films")]
# What takes the segments of a pair; the others' forward passes, or embeddings, know nothing of them.
SEGMENTS = ("bert", "electra", "deberta-v2 with both projections")
FAMILIES = tuple(case for case in CASES if case != "xlm-roberta")  # which is RoBERTa under another name
KINDS = ("mhex", "plain")


def make_masking(case="bert", *, side="right", truncation_side="right"):
    """A tokenizer with a mask token, which makes segments where the case's model takes them."""
    tokenizer = make_tokenizer(WORDS)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.model_input_names = names if case in SEGMENTS else [name for name in names if "type" not in name]
    tokenizer.padding_side, tokenizer.truncation_side = side, truncation_side
    return tokenizer


def make_model(kind="mhex", case="bert", *, attention=None, seed=0, classes=3, **options):
    """A classifier in evaluation mode, with weights large enough for every part to be felt."""
    if kind == "mhex":
        encoder = make_encoder(case, attention=attention, seed=seed, pad_token_id=0)
        model = MHEXForSequenceClassification.from_encoder(encoder, classes, **options)
        made = model.blocks
    else:
        torch.manual_seed(seed)
        config = make_config(case, pad_token_id=0, num_labels=classes)
        chosen = {} if attention is None else {"attn_implementation": attention}
        model = AutoModelForSequenceClassification.from_config(config, **chosen).eval()
        made = model
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3, generator=generator)
    return model


@dataclass
class State:
    """All of a model that an explainer might leave changed."""

    hooks: list
    modes: list
    kinds: list
    attention: list
    gradients: list
    values: dict

    @classmethod
    def of(cls, model):
        modules = list(model.modules())
        return cls(
            [[len(getattr(module, name)) for name in vars(module) if name.endswith("_hooks")] for module in modules],
            [module.training for module in modules],
            [type(module) for module in modules],
            [module.config._attn_implementation for module in modules if hasattr(module, "config")]
            + [getattr(module, "attn_implementation", None) for module in modules],
            [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
            {name: value.clone() for name, value in model.state_dict().items()},
        )

    def same_as(self, other):
        return (
            (self.hooks, self.modes, self.kinds, self.attention)
            == (other.hooks, other.modes, other.kinds, other.attention)
            and all(a == b and g is h for (a, g), (b, h) in zip(self.gradients, other.gradients, strict=True))
            and all(torch.equal(value, other.values[name]) for name, value in self.values.items())
        )


class BrokenError(RuntimeError):
    """What a broken module raises."""


def breaking(model):
    """A hook that lets the encoder's last linear layer fail after it has run; to be removed."""
    module = [part for part in model.base_model.modules() if isinstance(part, nn.Linear)][-1]

    def fail(module, args, output):
        raise BrokenError

    return module.register_forward_hook(fail)

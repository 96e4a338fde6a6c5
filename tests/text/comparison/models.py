"""Small models, a tokenizer with a mask token, and labelled texts to compare explanations on."""

from __future__ import annotations

import datasets
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from mhex_text import MHEXForSequenceClassification

from ..encoders import CASES, make_encoder, make_tokenizer  # noqa: TID252  # there is no absolute name for it

WORDS = ["[MASK]", "un", "##believ", "##able", "good", "bad", "film", "plot", ",", ".", "not", "a", "the", "what"]
WORDS += ["why", "because", "of", "love", "hate", "dull", "bright", "!"]
TEXTS = [
    "Unbelievable  film, not bad.",
    "good",
    "What a dull plot, the film of the film because the plot, love the film. Not bad, not good!",
    "",
    "the\tbright\nplot of a film",
    "hate the plot, love a film!",
    "why not a good plot",
]
LABELS = [2, 0, 1, 0, 2, 1, 0]
RATIONALES = [[[0, 12], [20, 28]], [[0, 4]], [[5, 16]], [], [[4, 10]], None, [[8, 9]]]
CLASSES = ("bad", "middling", "good")


def make_masking_tokenizer(words=WORDS):
    tokenizer = make_tokenizer(words)
    tokenizer.mask_token = "[MASK]"
    return tokenizer


def make_texts(**columns):
    return datasets.Dataset.from_dict({"text": TEXTS, "label": LABELS, "rationale": RATIONALES} | columns)


def make_model(case="bert", *, seed=0, **settings):
    """A model to explain, with weights that make gates and heads felt."""
    torch.manual_seed(seed)
    model = MHEXForSequenceClassification.from_encoder(
        make_encoder(case, seed=seed), 3, **{"labels": CLASSES} | settings
    )
    with torch.no_grad():
        for block in model.blocks:
            block.gate.weight.normal_(std=0.3)
            block.head.weight.normal_(std=0.3)
    return model


def make_plain(case="bert", *, seed=5, **changes):
    """A plain classifier of the library that believes different things of different texts."""
    torch.manual_seed(seed)
    model_type, settings = CASES[case]
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(model_type, **settings | names | changes)
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.25)
            elif "norm" not in name.lower():
                weight.normal_(std=0.1)
    return model.eval()


def wave(model, batch, targets):
    """A method of one's own: scores without ties that depend on token, place in the text and target alone."""
    place = batch.attention_mask.cumsum(dim=1)
    return torch.sin(batch.input_ids * 1.7 + place * 2.3 + targets.unsqueeze(1)).masked_fill(~batch.mask, 0)

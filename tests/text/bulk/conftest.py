"""Small classifiers with their tokenizers, saved as `train` leaves them."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from mhex_text import MHEXForSequenceClassification

from ..encoders import make_tokenizer  # noqa: TID252

WORDS = ["[MASK]", "un", "##believ", "##able", "good", "bad", "film", "##s", "plot", "the", "of", "what", ","]
SPOKEN = ["Unbelievable", "good", "bad", "films", "plot", "the", "of", "what", "élan", ","]
LIMIT = 40
SIZES = {
    "vocab_size": 4 + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": LIMIT,
    "initializer_range": 0.2,
}


def spoken(number, *, most=LIMIT + 5, seed=0):
    """So many texts, some of which are cut."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(SPOKEN, k=draw.randint(1, most))) for _ in range(number)]


def save_tokenizer(folder, limit=LIMIT):
    tokenizer = make_tokenizer(WORDS)
    tokenizer.mask_token = "[MASK]"
    tokenizer.model_max_length = limit
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A classifier with blocks."""
    folder = tmp_path_factory.mktemp("runs") / "mhex"
    torch.manual_seed(0)
    model = MHEXForSequenceClassification.from_encoder(BertModel(BertConfig(**SIZES)), 3, labels=["no", "yes", "naïve"])
    with torch.no_grad():
        for weight in model.blocks.parameters():
            weight.normal_(std=0.2)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """A classifier without blocks."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    torch.manual_seed(1)
    BertForSequenceClassification(BertConfig(**SIZES, num_labels=2)).eval().save_pretrained(folder)
    save_tokenizer(folder)
    return folder

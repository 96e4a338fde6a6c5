"""Explanations of a few texts, put together from random evidence."""

import pytest
import torch

from mhex_core import reference, token_saliency
from mhex_core.options import SaliencyOptions
from mhex_text.explanation import Explanation

from .encoders import make_tokenizer

WORDS = ["un", "##believ", "##able", "good", "film", ",", "not", "bad"]
LAYERS, CHANNELS, CLASSES = 5, 6, 3
LAYER_NAMES = tuple(f"block {index}" for index in range(LAYERS))
CLASS_NAMES = ("bad", "middling", "good")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(WORDS)


class Case:
    """What a model would have at hand for some texts."""

    def __init__(self, tokenizer, texts, **kwargs):
        first = [text if isinstance(text, str) else text[0] for text in texts]
        second = [text[1] for text in texts if not isinstance(text, str)] or None
        self.batch = tokenizer(
            first, second, padding=True, return_tensors="pt", return_offsets_mapping=True, truncation=True, **kwargs
        )
        generator = torch.Generator().manual_seed(1)
        count, length = self.batch["input_ids"].shape
        self.activations = [torch.randn(count, length, CHANNELS, generator=generator) for _ in range(LAYERS)]
        self.matrices = [torch.randn(CLASSES, CHANNELS, generator=generator) for _ in range(LAYERS)]
        self.target = torch.arange(count) % CLASSES
        maps = reference.signed_maps(
            [layer.double() for layer in self.activations],
            [matrix.double() for matrix in self.matrices],
            self.target.unsqueeze(1),
            SaliencyOptions(rectify=False),
        )
        self.positive, self.negative = ([layer.squeeze(1) for layer in part] for part in maps)
        self.arguments = {
            "texts": texts,
            "offsets": self.batch["offset_mapping"],
            "word_ids": [self.batch.word_ids(i) for i in range(count)],
            "sequence_ids": [self.batch.sequence_ids(i) for i in range(count)],
            "positive": self.positive,
            "negative": self.negative,
            "probabilities": torch.tensor([[0.1, 0.2, 0.7]] * count),
            "target": self.target,
            "layer_names": LAYER_NAMES,
            "class_names": CLASS_NAMES,
        }

    def explain(self, **changes):
        return Explanation.from_evidence(**{**self.arguments, **changes})

    def reference(self, **options):
        return token_saliency(
            [a.double() for a in self.activations], [m.double() for m in self.matrices], self.target, **options
        )


@pytest.fixture(scope="module")
def case(tokenizer):
    return Case(tokenizer, ["Unbelievable  film, not bad", "good", ""])


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return Case(tokenizer, [("good film", "not unbelievable"), ("bad", "good , film")])

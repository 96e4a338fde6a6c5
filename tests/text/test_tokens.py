"""Word scores with a real tokenizer: a WordPiece vocabulary small enough to read."""

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mhex_core import token_saliency
from mhex_text import score_mask, word_scores

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##believ", "##able", "good", "film", ",", "not", "bad"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordPiece({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def encode(tokenizer, texts):
    return tokenizer(
        texts, padding=True, return_tensors="pt", return_special_tokens_mask=True, return_offsets_mapping=True
    )


def test_special_and_padding_tokens_carry_no_score(tokenizer):
    batch = encode(tokenizer, ["Unbelievable film, not bad", "good"])
    mask = score_mask(batch["attention_mask"], batch["special_tokens_mask"])
    assert mask.sum(dim=1).tolist() == [7, 1]
    activations = [torch.randn(*mask.shape, 5) for _ in range(3)]
    matrices = [torch.randn(2, 5) for _ in range(3)]
    scores = token_saliency(activations, matrices, 1, mask=mask, tau_pos=0.0, beta=1.0, tau_neg=0.0)
    assert (scores[~mask] == 0).all()
    assert (scores[mask] != 0).all()


def test_sub_words_add_up_to_the_words_of_the_text(tokenizer):
    text = "Unbelievable  film, not bad"
    batch = encode(tokenizer, [text, "good"])
    scores = torch.arange(batch["input_ids"].shape[1], dtype=torch.float32)
    words = word_scores(scores, batch.word_ids(0), batch["offset_mapping"][0], text)
    assert [word.text for word in words] == ["Unbelievable", "film", ",", "not", "bad"]
    assert [word.score for word in words] == [1 + 2 + 3, 4, 5, 6, 7]
    assert all(text[word.start : word.end] == word.text for word in words)
    assert sum(word.score for word in words) == float(scores[1:8].sum())


def test_a_truncated_word_keeps_the_tokens_that_were_left(tokenizer):
    text = "good unbelievable"
    batch = tokenizer([text], truncation=True, max_length=4, return_offsets_mapping=True)
    words = word_scores([0.0, 1.0, 2.0, 0.0], batch.word_ids(0), batch["offset_mapping"][0], text)
    assert [(word.text, word.score) for word in words] == [("good", 1.0), ("un", 2.0)]


@pytest.mark.parametrize(
    ("attention", "special", "error", "named"),
    [
        ([[1, 1]], torch.zeros(1, 2), TypeError, "attention_mask"),
        (torch.ones(1, 2), torch.zeros(1, 3), ValueError, "special_tokens_mask"),
        (torch.ones(2), torch.zeros(2), ValueError, "attention_mask"),
        (torch.tensor([[0.0, -1e4]]), torch.zeros(1, 2), ValueError, "attention_mask"),
    ],
)
def test_a_mask_that_is_none_is_refused(attention, special, error, named):
    with pytest.raises(error, match=named):
        score_mask(attention, special)


@pytest.mark.parametrize(
    ("scores", "ids", "offsets"),
    [([1.0], [0, 1], [(0, 1), (1, 2)]), ([1.0, 2.0], [0, 1], [(0, 1)]), ([1.0], [0], [(0, 9)])],
)
def test_word_scores_refuse_what_does_not_fit(scores, ids, offsets):
    with pytest.raises(ValueError, match="offsets"):
        word_scores(scores, ids, offsets, "ab")

"""`TokenBatch`: tokens, and which part of which text each stands for."""

from dataclasses import fields, replace

import pytest
import torch

from mhex_text.batch import TokenBatch

from .explainers.models import PAIRS, TEXTS, make_masking


@pytest.fixture(scope="module")
def tokenizer():
    return make_masking()


def tokens_of(batch, row):
    """What each token that carries a score covers, as it stands in its text."""
    written = batch.texts[row]
    parts = (written,) if isinstance(written, str) else written
    return [
        parts[int(batch.sequence_ids[row, place])][slice(*batch.offsets[row, place].tolist())]
        for place in batch.mask[row].nonzero().flatten()
    ]


@pytest.mark.parametrize("side", ["right", "left"])
def test_tokens_know_where_they_come_from(side):
    batch = TokenBatch.make(TEXTS, make_masking(side=side))
    assert len(batch) == 4
    assert batch.texts == tuple(TEXTS)
    assert not batch.pairs
    assert tokens_of(batch, 0) == ["Un", "believ", "able", "film", ",", "not", "bad", "."]
    assert tokens_of(batch, 1) == ["good"]
    assert batch.word_ids[0][batch.mask[0]].tolist() == [0, 0, 0, 1, 2, 3, 4, 5]
    padded = batch.attention_mask[1] == 0
    assert padded[-1 if side == "right" else 0]
    for name in ("sequence_ids", "word_ids"):
        assert (getattr(batch, name)[1][~batch.mask[1]] == -1).all()
    assert (batch.input_ids[1][padded] == 0).all()


def test_dtypes_and_shapes(tokenizer):
    batch = TokenBatch.make(TEXTS, tokenizer)
    shape = batch.input_ids.shape
    for name in ("input_ids", "attention_mask", "token_type_ids", "sequence_ids", "word_ids"):
        assert getattr(batch, name).dtype == torch.int64
        assert getattr(batch, name).shape == shape
    assert batch.offsets.shape == (*shape, 2)
    assert batch.mask.dtype == batch.truncated.dtype == torch.bool


def test_pairs(tokenizer):
    batch = TokenBatch.make(PAIRS, tokenizer)
    assert batch.pairs
    assert batch.texts == tuple(PAIRS)
    assert tokens_of(batch, 0) == ["good", "film", "why", "not", "?"]
    assert batch.sequence_ids[0][batch.mask[0]].tolist() == [0, 0, 1, 1, 1]
    assert batch.token_type_ids[0].max() == 1


def test_inputs_are_what_a_model_takes(tokenizer):
    assert list(TokenBatch.make(TEXTS, tokenizer).inputs()) == ["input_ids", "attention_mask", "token_type_ids"]
    batch = TokenBatch.make(TEXTS, make_masking("roberta"))
    assert batch.token_type_ids is None
    assert list(batch.inputs()) == ["input_ids", "attention_mask"]
    assert all(torch.equal(value, getattr(batch, name)) for name, value in batch.inputs().items())


def test_what_is_cut_is_told(tokenizer):
    batch = TokenBatch.make(TEXTS, tokenizer, max_length=6)
    assert batch.truncated.tolist() == [True, False, True, False]
    assert batch.input_ids.shape == (4, 6)
    assert tokens_of(batch, 0) == ["Un", "believ", "able", "film"]
    assert not TokenBatch.make(TEXTS, tokenizer).truncated.any()


def test_the_tokenizers_own_limit_holds():
    tokenizer = make_masking()
    tokenizer.model_max_length = 5
    assert TokenBatch.make(TEXTS, tokenizer).input_ids.shape == (4, 5)
    assert TokenBatch.make(TEXTS, tokenizer, max_length=9).input_ids.shape == (4, 5)
    assert TokenBatch.make(TEXTS, tokenizer, max_length=4).input_ids.shape == (4, 4)


def test_a_text_alone_and_an_empty_one(tokenizer):
    assert TokenBatch.make("good", tokenizer).texts == ("good",)
    empty = TokenBatch.make("", tokenizer)
    assert empty.input_ids.shape == (1, 2)
    assert not empty.mask.any()


def test_moving_moves_every_tensor(tokenizer):
    batch = TokenBatch.make(TEXTS, tokenizer).to("meta")
    found = [getattr(batch, field.name) for field in fields(batch)]
    assert {value.device.type for value in found if isinstance(value, torch.Tensor)} == {"meta"}
    assert batch.texts == tuple(TEXTS)
    bare = TokenBatch.make(TEXTS, make_masking("roberta")).to(torch.device("cpu"))
    assert bare.token_type_ids is None


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ([], ValueError, "texts must hold at least one text, got none"),
        (3, TypeError, "texts must be a text, or a sequence .* got int"),
        (["good", ("a", "b")], TypeError, "texts must hold texts alone or pairs"),
        ([("a", "b", "c")], TypeError, "texts must hold texts alone or pairs"),
    ],
)
def test_other_texts_are_refused(tokenizer, texts, error, message):
    with pytest.raises(error, match=message):
        TokenBatch.make(texts, tokenizer)


def test_other_arguments_are_refused(tokenizer):
    with pytest.raises(TypeError, match=r"tokenizer must be a fast tokenizer, .* got str"):
        TokenBatch.make(TEXTS, "bert")
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        TokenBatch.make(TEXTS, tokenizer, max_length=0)
    unpadded = make_masking()
    unpadded.pad_token = None
    with pytest.raises(ValueError, match="tokenizer must have a padding token for more than one text, got 4 texts"):
        TokenBatch.make(TEXTS, unpadded)
    assert len(TokenBatch.make("good", unpadded)) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"texts": ()}, ValueError, "texts must be a tuple of at least one"),
        ({"texts": ("a",)}, ValueError, r"input_ids must have shape \(1, "),
        ({"input_ids": [[1]]}, TypeError, "input_ids must be a torch.Tensor, got list"),
        ({"word_ids": None}, TypeError, "word_ids must be a torch.Tensor, got NoneType"),
        ({"attention_mask": torch.ones(4, 2).long()}, ValueError, "attention_mask must have shape"),
        ({"truncated": torch.zeros(4).long()}, TypeError, "truncated must be of dtype torch.bool, got torch.int64"),
        ({"offsets": torch.zeros(4, 17).long()}, ValueError, "offsets must have shape"),
    ],
)
def test_fields_that_do_not_fit_are_refused(tokenizer, change, error, message):
    with pytest.raises(error, match=message):
        replace(TokenBatch.make(TEXTS, tokenizer), **change)

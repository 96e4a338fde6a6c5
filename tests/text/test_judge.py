"""The judge of texts: its probabilities, that it reads the same tokens, and that it is left as it was."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from mhex_text import MHEXForSequenceClassification
from mhex_text.batch import TokenBatch
from mhex_text.judge import TextJudge

from .encoders import CASES, make_config, make_encoder, make_tokenizer

WORDS = ["good", "bad", "film", "plot", "not", "a", "the", ",", "un", "##able"]
TEXTS = ["good film", "", "not a bad plot, not a good film", "the plot"]


def make_segmenting(words=WORDS):
    """A tokenizer that tells the parts of a pair apart, which not every version of the library does unasked."""
    tokenizer = make_tokenizer(words)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_segmenting()


def make_plain(case="bert", **changes):
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(make_config(case, num_labels=3, **changes))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3)
    return model.eval()


def one_by_one(model, batch, activation):
    """Each text without its padding."""
    rows = []
    for row in range(len(batch)):
        real = batch.attention_mask[row].bool()
        with torch.no_grad():
            rows.append(activation(model(input_ids=batch.input_ids[row, real][None]).logits.double()))
    return torch.cat(rows)


@pytest.mark.parametrize("case", CASES)
def test_probabilities_are_those_of_each_text_alone(case, tokenizer):
    batch = TokenBatch.make(TEXTS, tokenizer)
    for model in (make_plain(case), MHEXForSequenceClassification.from_encoder(make_encoder(case), 3)):
        found = TextJudge(model, tokenizer, batch_size=3)(batch.input_ids, batch.attention_mask)
        assert_close(found.double(), one_by_one(model, batch, lambda logits: logits.softmax(dim=1)), atol=1e-5, rtol=0)
        assert not found.requires_grad


@pytest.mark.parametrize("own", [True, False])
def test_independent_classes_have_sigmoids(tokenizer, own):
    if own:
        model = MHEXForSequenceClassification.from_encoder(make_encoder(), 3, multi_label=True)
    else:
        model = make_plain(problem_type="multi_label_classification")
    batch = TokenBatch.make(TEXTS, tokenizer)
    judge = TextJudge(model, tokenizer)
    assert judge.multi_label
    found = judge(batch.input_ids, batch.attention_mask)
    assert_close(found.double(), one_by_one(model, batch, torch.sigmoid), atol=1e-5, rtol=0)


def test_half_precision_is_judged_in_single(tokenizer):
    model = make_plain().to(torch.bfloat16)
    batch = TokenBatch.make(TEXTS, tokenizer)
    found = TextJudge(model, tokenizer)(batch.input_ids, batch.attention_mask)
    assert found.dtype == torch.float32
    assert_close(found.sum(dim=1), torch.ones(len(TEXTS)))
    assert TextJudge(model.double(), tokenizer)(batch.input_ids).dtype == torch.float64


def test_a_reader_hides_tokens_and_keeps_padding_and_parts(tokenizer):
    model = make_plain()
    pairs = [("good film", "bad plot"), ("the", "not a film")]
    batch = TokenBatch.make(pairs, tokenizer)
    hidden = batch.input_ids.clone()
    hidden[:, 1] = tokenizer.unk_token_id
    types = (batch.sequence_ids == 1).long()
    types[0, 6] = types[1, 6] = 1  # the closing token is of the second part
    found = TextJudge(model, tokenizer).reader(batch)(hidden)
    with torch.no_grad():
        expected = model(hidden, attention_mask=batch.attention_mask, token_type_ids=types).logits.softmax(dim=1)
    assert_close(found, expected)


def test_a_judge_reads_parts_as_its_own_tokenizer_tells_them(tokenizer):
    batch = TokenBatch.make([("good film", "bad plot"), ("the", "not a film")], tokenizer)
    without = TokenBatch(**{**vars(batch), "token_type_ids": None})
    left = make_segmenting()
    left.padding_side = "left"
    judge = TextJudge(make_plain(), left)
    judge.check_vocabulary(tokenizer)
    assert_close(
        judge.reader(without)(batch.input_ids), TextJudge(make_plain(), tokenizer).reader(batch)(batch.input_ids)
    )
    # A model without segments leaves them aside.
    plain = make_plain("distilbert")
    assert_close(
        TextJudge(plain, tokenizer)(batch.input_ids, batch.attention_mask, batch.token_type_ids),
        TextJudge(plain, tokenizer)(batch.input_ids, batch.attention_mask),
    )


def test_a_wrapped_model_is_told_the_parts_too(tokenizer):
    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.config = inner, inner.config
            self.get_input_embeddings = inner.get_input_embeddings

        def forward(self, **inputs):
            return self.inner(**inputs)

    batch = TokenBatch.make([("good film", "bad plot")], tokenizer)
    for case in ("bert", "distilbert"):
        model = make_plain(case)
        assert_close(
            TextJudge(Wrapped(model), tokenizer).reader(batch)(batch.input_ids),
            TextJudge(model, tokenizer).reader(batch)(batch.input_ids),
        )


def test_other_tokens_are_refused(tokenizer):
    model = make_plain()
    other = make_segmenting([*WORDS, "love"])
    with pytest.raises(ValueError, match=r"judge must have the vocabulary .*differ in 1 of 15 tokens, such as 'love'"):
        TextJudge(model, other).check_vocabulary(tokenizer)
    other = make_segmenting()
    other.backend_tokenizer.normalizer = None
    judge = TextJudge(model, other)
    judge.check_vocabulary(tokenizer)
    batch = TokenBatch.make(["Good film"], tokenizer)
    with pytest.raises(ValueError, match="makes other tokens of the same texts"):
        judge.reader(batch)


def test_modes_and_gradients_come_back_also_when_the_model_raises(tokenizer):
    model = make_plain().train()
    model.classifier.eval()
    modes = [module.training for module in model.modules()]
    seen = []

    def fail(module, arguments):
        seen.append((torch.is_grad_enabled(), any(part.training for part in model.modules())))
        raise RuntimeError("out of memory")

    handle = model.classifier.register_forward_pre_hook(fail)
    judge = TextJudge(model, tokenizer)
    with pytest.raises(RuntimeError, match="out of memory"):
        judge(torch.tensor([[2, 4, 3]]))
    assert seen == [(False, False)]
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    handle.remove()
    first = judge(torch.tensor([[2, 4, 3]]))
    assert_close(judge(torch.tensor([[2, 4, 3]])), first, rtol=0, atol=0)  # no dropout
    assert [module.training for module in model.modules()] == modes


def test_errors_name_the_argument(tokenizer):
    model = make_plain()
    judge = TextJudge(model, tokenizer)
    ids = torch.tensor([[2, 4, 3]])
    for make, error, message in (
        (lambda: TextJudge(lambda ids: ids, tokenizer), TypeError, "model must be a sequence classifier"),
        (lambda: TextJudge(torch.nn.Linear(2, 2), tokenizer), TypeError, "model must be a sequence classifier"),
        (lambda: TextJudge(model, "bert"), TypeError, "tokenizer must be a tokenizer of transformers, got str"),
        (lambda: TextJudge(model, tokenizer, batch_size=0), ValueError, "batch_size must be at least 1"),
        (lambda: TextJudge(make_encoder("bert", num_labels=1), tokenizer), ValueError, "at least 2 classes"),
        (lambda: judge([1]), TypeError, "input_ids must be a torch.Tensor, got list"),
        (lambda: judge(ids[0]), ValueError, "input_ids must have 2 dimensions"),
        (lambda: judge(ids.int()), TypeError, "input_ids must be of dtype torch.int64"),
        (lambda: judge(ids[:0]), ValueError, "input_ids must hold at least one token"),
        (lambda: judge(ids + 60), ValueError, r"input_ids must lie in \[0, 59\], .* got 62 to 64"),
        (lambda: judge(ids, ids[:, :1]), ValueError, r"attention_mask must have the shape of input_ids, \(1, 3\)"),
        (lambda: TextJudge(make_encoder(), tokenizer)(ids), AttributeError, "logits"),
    ):
        with pytest.raises(error, match=message):
            make()

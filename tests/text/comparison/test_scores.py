"""Every value of a comparison against a second implementation: one text at a time, lists, sets and sums."""

import math

import numpy as np
import pytest
import torch

from mhex_text.batch import TokenBatch
from mhex_text.comparison import SCORES, compare, parse_metric
from mhex_text.comparison.texts import rationale_tokens

from .models import LABELS, RATIONALES, TEXTS, make_masking_tokenizer, make_model, make_plain, make_texts, wave

METRICS = (
    "avg_drop",
    "avg_drop:fraction=0.4",
    "comprehensiveness",
    "comprehensiveness:fraction=0.3",
    "sufficiency",
    "token_f1",
    "token_f1:fraction=0.25",
    "token_iou",
    "token_auprc",
)
ERASER = (0.01, 0.05, 0.1, 0.2, 0.5)


def count(share, of):
    return min(of, max(1, math.floor(share * of + 0.5 + 1e-9)))


class OneText:
    """One text as a person would go about it."""

    def __init__(self, place, tokenizer, judge):
        self.text, self.label, self.judge = TEXTS[place], LABELS[place], judge
        encoded = tokenizer(self.text, return_offsets_mapping=True, return_special_tokens_mask=True)
        self.ids, self.mask_token = encoded["input_ids"], tokenizer.mask_token_id
        self.scored = [at for at, special in enumerate(encoded["special_tokens_mask"]) if not special]
        score = {at: math.sin(self.ids[at] * 1.7 + (at + 1) * 2.3 + self.label) for at in self.scored}
        self.falling = sorted(self.scored, key=lambda at: -score[at])
        marked = {character for start, end in RATIONALES[place] or [] for character in range(start, end)}
        self.rationale = {at for at in self.scored if marked & set(range(*encoded["offset_mapping"][at]))}

        self.beliefs = {}

    def belief(self, hidden=()):
        key = frozenset(hidden)
        if key not in self.beliefs:
            self.beliefs[key] = self.ask(key)
        return self.beliefs[key]

    def ask(self, hidden):
        ids = [self.mask_token if at in hidden else token for at, token in enumerate(self.ids)]
        with torch.no_grad():
            logits = self.judge(input_ids=torch.tensor([ids])).logits[0].tolist()
        exponentials = [math.exp(logit - max(logits)) for logit in logits]
        return exponentials[self.label] / sum(exponentials)

    def top(self, share):
        return self.falling[: count(share, len(self.scored))]

    def drop(self, share):
        before, after = self.belief(), self.belief(self.top(share))
        return max(0.0, (before - after) / before)

    def lost(self, shares):
        return sum(self.belief() - self.belief(self.top(share)) for share in shares) / len(shares)

    def missed(self, shares):
        rest = [set(self.scored) - set(self.top(share)) for share in shares]
        return sum(self.belief() - self.belief(hidden) for hidden in rest) / len(shares)

    def overlap(self, share=None):
        chosen = set(self.falling[: len(self.rationale)] if share is None else self.top(share))
        return len(chosen & self.rationale), len(chosen), len(chosen | self.rationale)

    def f1(self, share=None):
        both, chosen, _ = self.overlap(share)
        return 2 * both / (chosen + len(self.rationale))

    def average_precision(self):
        found, total = 0, 0.0
        for rank, at in enumerate(self.falling, 1):
            if at in self.rationale:
                found += 1
                total += found / rank
        return total / len(self.rationale)

    def values(self):
        if not self.scored:
            return [0.0] * 5 + [math.nan] * 4
        plausible = [math.nan] * 4
        if self.rationale:
            both, _, either = self.overlap()
            plausible = [self.f1(), self.f1(0.25), both / either, self.average_precision()]
        faithful = [self.drop(0.1), self.drop(0.4), self.lost(ERASER), self.lost([0.3]), self.missed(ERASER)]
        return [*faithful, *plausible]


@pytest.fixture(scope="module")
def judge():
    return make_plain()


@pytest.fixture(scope="module")
def texts(judge):
    tokenizer = make_masking_tokenizer()
    return [OneText(place, tokenizer, judge) for place in range(len(TEXTS))]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_every_value_is_that_of_a_slow_reckoning(judge, texts, tmp_path, batch_size):
    tokenizer = make_masking_tokenizer()
    found = compare(
        make_model(),
        make_texts(),
        tokenizer=tokenizer,
        judge=judge,
        methods={"wave": wave},
        metrics=METRICS,
        out=tmp_path,
        batch_size=batch_size,
    )
    expected = np.array([text.values() for text in texts])
    ours = np.stack([found.values("wave", metric) for metric in METRICS], axis=1)
    np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)
    assert found.values("wave", "probability") == pytest.approx([text.belief() for text in texts], abs=1e-5)
    assert found.values("wave", "tokens").tolist() == [len(text.scored) for text in texts]
    assert found.values("wave", "label").tolist() == LABELS
    assert found.places == tuple(range(len(TEXTS)))
    (summary,) = found.summary(resamples=20)
    assert summary.scores["token_f1"].count == 5
    assert summary.scores["token_f1"].mean == pytest.approx(np.nanmean(expected[:, 5]), abs=1e-6)
    assert summary.scores["avg_drop"].count == len(TEXTS)


def test_a_rationale_is_the_tokens_it_touches():
    tokenizer = make_masking_tokenizer()
    batch = TokenBatch.make(["Unbelievable  film", "the plot"], tokenizer)
    touching = [((4, 5),), ((0, 0), (3, 4))]  # inside a word piece; nothing; a blank
    assert rationale_tokens(batch, touching)[0].tolist() == [False, False, True, False, False, False]
    assert not rationale_tokens(batch, touching)[1].any()
    # A tokenizer that takes the blank before a word for a part of it.
    offsets = batch.offsets.clone()
    offsets[1, 2] = torch.tensor([3, 8])
    wide = TokenBatch(**{**vars(batch), "offsets": offsets})
    assert not rationale_tokens(wide, touching)[1].any()
    assert rationale_tokens(wide, [(), ((3, 5),)])[1].tolist() == [False, False, True, False, False, False]


def test_rationales_of_pairs_are_in_the_first_part_and_truncation_cuts_them():
    tokenizer = make_masking_tokenizer()
    batch = TokenBatch.make([("good film", "good film")], tokenizer)
    assert rationale_tokens(batch, [((0, 9),)])[0].nonzero().flatten().tolist() == [1, 2]
    cut = TokenBatch.make(["good bad film"], tokenizer, max_length=4)
    assert rationale_tokens(cut, [((9, 13),)]).any().item() is False


def test_metrics_are_read_from_text():
    measure = parse_metric("comprehensiveness:fraction=0.2")
    assert measure.options == {"fraction": 0.2}
    assert measure.title == "comprehensiveness (fraction=0.2)"
    assert parse_metric("avg_drop:fraction=1").options == {"fraction": 1}
    assert all(parse_metric(name).name == name for name in SCORES)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("beauty", ValueError, "metric must be one of avg_drop, .*, got 'beauty'"),
        ("beauty:fraction=1", ValueError, "metric must be one of"),
        ("avg_drop:fractions=1", ValueError, "options of avg_drop must be among: fraction; got fractions"),
        ("token_auprc:fraction=1", ValueError, "options of token_auprc must be among: none; got fraction"),
        ("avg_drop:fraction", ValueError, "spec must be name:option=value"),
        ("avg_drop:fraction=2", ValueError, r"fraction must be in \[0, 1\]"),
        ("avg_drop:fraction=much", TypeError, "fraction must be a number, got str"),
        (3, TypeError, "metrics must be texts, got int"),
    ],
)
def test_metrics_that_are_none_are_refused(text, error, message):
    with pytest.raises(error, match=message):
        parse_metric(text)

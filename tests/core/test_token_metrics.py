"""Metrics that hide tokens: against counting token by token, and padding that must not be felt."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mhex_core.metrics import tokens as metrics

MASK_TOKEN, CLS, SEP, PAD = 1, 2, 3, 0
VOCABULARY, CLASSES = 40, 3
FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)


class Judge:
    """Probabilities from the mean embedding of what is not padding, and their order in the text."""

    def __init__(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(5)
        self.table = torch.randn(VOCABULARY, CLASSES, generator=generator, dtype=torch.float64).to(dtype) * 4
        self.calls = 0

    def __call__(self, tokens):
        self.calls += 1
        assert not torch.is_grad_enabled()
        real = (tokens != PAD).unsqueeze(2)
        return (torch.where(real, self.table[tokens], 0).sum(1) / real.sum(1).clamp(min=1)).softmax(dim=1)


def text(words, *, padding=0, left=0):
    tokens = [PAD] * left + [CLS, *words, SEP] + [PAD] * padding
    mask = [False] * (left + 1) + [True] * len(words) + [False] * (padding + 1)
    return tokens, mask


@pytest.fixture
def case():
    """Texts of 23, 9, 1 and 0 words, padded to one length; scores with many ties, and rubbish outside the mask."""
    rng = np.random.default_rng(0)
    lengths = (23, 9, 1, 0)
    rows = [text(rng.integers(4, VOCABULARY, size=n).tolist(), padding=max(lengths) - n) for n in lengths]
    tokens = torch.tensor([row[0] for row in rows])
    mask = torch.tensor([row[1] for row in rows])
    scores = torch.from_numpy(rng.normal(size=tokens.shape).round(1))
    scores[0, 5:12] = 0.3
    scores[~mask] = torch.nan
    return tokens, scores, mask, torch.tensor([2, 0, 1, 1])


def hidden_by_counting(scores, mask, share, at_least):
    """Which tokens are on top, one by one."""
    places = [i for i, member in enumerate(mask) if member]
    wanted = min(max(math.floor(round(share * len(places), 6) + 0.5), at_least), len(places))
    key = {i: (-scores[i], (number * ((math.sqrt(5) - 1) / 2)) % 1) for number, i in enumerate(places)}
    return set(sorted(places, key=key.__getitem__)[:wanted])


def curve_by_counting(judge, tokens, scores, mask, target, share, *, keep_top):
    values = []
    for row, score, member, label in zip(tokens.tolist(), scores.tolist(), mask.tolist(), target.tolist(), strict=True):
        top = hidden_by_counting(score, member, share, 1)
        gone = {i for i, m in enumerate(member) if m and i not in top} if keep_top else top
        changed = [MASK_TOKEN if i in gone else token for i, token in enumerate(row)]
        with torch.no_grad():
            p, q = (float(judge(torch.tensor([each]))[0, label]) for each in (row, changed))
        values.append((p, q))
    return values


def test_hiding_puts_the_replacement_there():
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    chosen = torch.tensor([[True, False, True], [False, False, False]])
    assert metrics.hide_tokens(tokens, chosen, 1).tolist() == [[1, 6, 1], [8, 9, 10]]
    assert tokens.tolist() == [[5, 6, 7], [8, 9, 10]]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
def test_avg_drop_equals_counting(case, fraction):
    tokens, scores, mask, target = case
    judge = Judge()
    result = metrics.token_avg_drop(judge, tokens, scores, target, replacement=MASK_TOKEN, mask=mask, fraction=fraction)
    assert judge.calls == 2
    pairs = curve_by_counting(judge, tokens, scores, mask, target, fraction, keep_top=False)
    assert_close(result, torch.tensor([max(0, (p - q) / p) for p, q in pairs], dtype=torch.float64))
    assert result[3] == 0
    assert fraction == 0.5 or result.any()


@pytest.mark.parametrize(
    ("metric", "keep_top"), [(metrics.comprehensiveness, False), (metrics.sufficiency, True)], ids=["comp", "suff"]
)
def test_curves_equal_counting(case, metric, keep_top):
    tokens, scores, mask, target = case
    judge = Judge()
    result = metric(judge, tokens, scores, target, replacement=MASK_TOKEN, mask=mask, fractions=FRACTIONS)
    assert judge.calls == len(FRACTIONS) + 1
    expected = [curve_by_counting(judge, tokens, scores, mask, target, f, keep_top=keep_top) for f in FRACTIONS]
    assert_close(result, torch.tensor([[p - q for p, q in pairs] for pairs in expected], dtype=torch.float64).T)
    assert not result[3].any()
    assert_close(metrics.aopc(result), result.mean(dim=1))


def test_a_fraction_of_nothing_and_of_all(case):
    tokens, scores, mask, target = case
    settings = {"replacement": MASK_TOKEN, "mask": mask, "fractions": (0, 1)}
    comprehensive = metrics.comprehensiveness(Judge(), tokens, scores, target, **settings)
    sufficient = metrics.sufficiency(Judge(), tokens, scores, target, **settings)
    assert not comprehensive[:, 0].any()
    assert not sufficient[:, 1].any()
    assert_close(comprehensive[:, 1], sufficient[:, 0])  # all hidden, both times


def test_no_fraction_above_zero_hides_nothing(case):
    """Every text is short enough for 1 % to be no token at all."""
    tokens, scores, mask, target = case
    curve = metrics.comprehensiveness(
        Judge(), tokens, scores, target, replacement=MASK_TOKEN, mask=mask, fractions=(0.01,)
    )
    assert curve[:3].all()


@pytest.mark.parametrize("left", [0, 4], ids=["padded right", "padded left"])
def test_padding_is_not_felt(left):
    """Ties included: every score is the same."""
    words = np.random.default_rng(1).integers(4, VOCABULARY, size=17).tolist()
    results = []
    for padding, start in ((0, 0), (30, left), (3, 3 * left)):
        tokens, mask = (torch.tensor([row]) for row in text(words, padding=padding, left=start))
        scores = torch.zeros(tokens.shape)
        judge = Judge()
        settings = {"replacement": MASK_TOKEN, "mask": mask}
        results.append(
            torch.cat(
                [
                    metrics.token_avg_drop(judge, tokens, scores, 1, fraction=0.3, **settings),
                    metrics.comprehensiveness(judge, tokens, scores, 1, **settings)[0],
                    metrics.sufficiency(judge, tokens, scores, 1, **settings)[0],
                ]
            )
        )
    assert results[0].any()
    for other in results[1:]:
        assert_close(other, results[0], rtol=1e-12, atol=1e-12)


def test_the_batch_is_not_felt(case):
    tokens, scores, mask, target = case
    judge = Judge()
    for metric in (metrics.token_avg_drop, metrics.comprehensiveness, metrics.sufficiency):
        whole = metric(judge, tokens, scores, target, replacement=MASK_TOKEN, mask=mask)
        parts = [
            metric(judge, tokens[i], scores[i], target[i], replacement=MASK_TOKEN, mask=mask[i])
            for i in (slice(0, 1), slice(1, 4))
        ]
        assert_close(torch.cat(parts), whole, rtol=0, atol=1e-14)


def test_without_a_mask_all_tokens_take_part(case):
    tokens, scores, _, target = case
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    scores = scores.nan_to_num(9.0)
    for metric in (metrics.token_avg_drop, metrics.comprehensiveness, metrics.sufficiency):
        assert_close(
            metric(Judge(), tokens, scores, target, replacement=MASK_TOKEN),
            metric(Judge(), tokens, scores, target, replacement=MASK_TOKEN, mask=everywhere),
        )


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (2, 0)], ids=str)
def test_no_text_or_no_token(shape):
    tokens, scores = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    target = torch.zeros(shape[0], dtype=torch.int64)
    assert metrics.token_avg_drop(Judge(), tokens, scores, target, replacement=1).shape == shape[:1]
    for metric in (metrics.comprehensiveness, metrics.sufficiency):
        assert metric(Judge(), tokens, scores, target, replacement=1).tolist() == [[0.0] * 5] * shape[0]
    assert metrics.aopc(torch.zeros(0, 3)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_are_float32_or_wider(case, dtype):
    tokens, scores, mask, target = case
    result = metrics.sufficiency(Judge(dtype), tokens, scores.to(dtype), target, replacement=MASK_TOKEN, mask=mask)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_infinite_scores_that_take_part_come_before_tokens_that_do_not(case):
    tokens, scores, mask, target = case
    scores = torch.full_like(scores, -torch.inf)
    drop = metrics.token_avg_drop(Judge(), tokens, scores, target, replacement=MASK_TOKEN, mask=mask, fraction=1.0)
    hidden = torch.where(mask, MASK_TOKEN, tokens)
    with torch.no_grad():
        p, q = (Judge()(each).gather(1, target[:, None])[:, 0] for each in (tokens, hidden))
    assert_close(drop, ((p - q) / p).clamp(min=0))


BAD = [
    ({"tokens": [[1]]}, TypeError, "tokens must be a torch.Tensor, got list"),
    ({"tokens": torch.zeros(2, 3)}, TypeError, "tokens must be of dtype torch.int64, got torch.float32"),
    ({"tokens": torch.zeros(3, dtype=torch.int64)}, ValueError, "tokens must have 2 dimensions"),
    ({"scores": torch.zeros(2, 4)}, ValueError, r"scores must have the shape of tokens, \(2, 3\), got \(2, 4\)"),
    ({"scores": torch.full((2, 3), torch.nan)}, ValueError, "scores must be numbers, got NaN"),
    ({"mask": torch.ones(2, 3)}, TypeError, "mask must be a bool tensor, got torch.float32"),
    ({"mask": torch.ones(2, 2, dtype=torch.bool)}, ValueError, "mask must have the shape of tokens"),
    ({"replacement": 1.0}, TypeError, "replacement must be an int, got float"),
    ({"replacement": None}, TypeError, "replacement must be an int, got NoneType"),
    ({"replacement": -1}, ValueError, "replacement must be at least 0, got -1"),
    ({"target": torch.tensor([[0], [1]])}, ValueError, r"target must have shape \(2,\), got \(2, 1\)"),
    ({"target": torch.tensor([0, 3])}, ValueError, r"target must lie in \[0, 2\], got values from 0 to 3"),
    ({"predict": lambda tokens: tokens}, ValueError, r"predict must give probabilities in \[0, 1\]"),
    ({"predict": lambda tokens: [0.5]}, ValueError, r"predict must give probabilities of shape \(2, K\), got list"),
    ({"predict": lambda tokens: torch.ones(1, 3)}, ValueError, r"of shape \(2, K\), got \(1, 3\)"),
    ({"predict": lambda tokens: torch.full((2, 3), torch.nan)}, ValueError, "got values from nan to nan"),
]


@pytest.mark.parametrize("metric", [metrics.token_avg_drop, metrics.comprehensiveness, metrics.sufficiency])
@pytest.mark.parametrize(("change", "error", "words"), BAD, ids=[words for _, _, words in BAD])
def test_bad_arguments_are_named(metric, change, error, words):
    fitting = {
        "predict": Judge(),
        "tokens": torch.full((2, 3), 7),
        "scores": torch.zeros(2, 3),
        "target": 0,
        "replacement": 1,
    }
    with pytest.raises(error, match=words):
        metric(**fitting | change)


def test_bad_fractions_are_named():
    fitting = (Judge(), torch.full((2, 3), 7), torch.zeros(2, 3), 0)
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\], got 1.5"):
        metrics.token_avg_drop(*fitting, replacement=1, fraction=1.5)
    for bad in ((), (0.5, 1.5)):
        with pytest.raises(ValueError, match=r"fractions must be one or more numbers in \[0, 1\]"):
            metrics.sufficiency(*fitting, replacement=1, fractions=bad)
    with pytest.raises(ValueError, match="curve must have at least one fraction, got none"):
        metrics.aopc(torch.zeros(2, 0))

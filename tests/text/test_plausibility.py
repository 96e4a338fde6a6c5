"""Agreement with what people marked: against scikit-learn, by counting, and padding that must not be felt."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mhex_text.plausibility import token_auprc, token_f1, token_iou


@pytest.fixture
def case():
    """Texts of 31, 12, 5 and 1 tokens; many equal scores, rubbish in the padding, and one text without rationale."""
    rng = np.random.default_rng(3)
    mask = torch.arange(31) < torch.tensor([[31], [12], [5], [1]])
    scores = torch.from_numpy(rng.normal(size=mask.shape).round(1))
    scores[~mask] = torch.nan
    rationale = torch.from_numpy(rng.random(mask.shape) < 0.4) & mask
    rationale[1] = False
    rationale[1, 4] = rationale[3, 0] = True
    rationale[2] = False
    return scores, rationale, mask


def test_average_precision_is_sklearns(case):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, rationale, mask = case
    found = token_auprc(scores, rationale, mask)
    assert found.shape == (4,)
    for row in (0, 1, 3):
        wanted = metrics.average_precision_score(rationale[row, mask[row]].numpy(), scores[row, mask[row]].numpy())
        assert float(found[row]) == pytest.approx(wanted, abs=1e-12)
    assert found[2].isnan()


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_of_ties_is_sklearns(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.integers(-2, 3, size=(8, 17)).astype(np.float32))
    rationale = torch.from_numpy(rng.random((8, 17)) < 0.5)
    rationale[:, 0] = True
    wanted = [metrics.average_precision_score(r.numpy(), s.numpy()) for s, r in zip(scores, rationale, strict=True)]
    assert_close(token_auprc(scores, rationale), torch.tensor(wanted, dtype=torch.float32))


@pytest.mark.parametrize("fraction", [None, 0.0, 0.2, 0.5, 1.0])
def test_f1_and_iou_are_those_of_sets_and_of_sklearn(case, fraction):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, rationale, mask = case
    # Without ties everyone chooses the same tokens.
    scores = scores + torch.linspace(0, 0.01, 31, dtype=torch.float64)
    f1, iou = (measure(scores, rationale, mask, fraction=fraction) for measure in (token_f1, token_iou))
    for row in (0, 1, 3):
        real = scores[row, mask[row]]
        marked = rationale[row, mask[row]]
        count = int(marked.sum()) if fraction is None else max(int(fraction * len(real) + 0.5), 1)
        top = torch.zeros_like(marked)
        top[real.argsort(descending=True)[:count]] = True
        assert float(f1[row]) == pytest.approx(metrics.f1_score(marked.numpy(), top.numpy()))
        assert float(iou[row]) == pytest.approx(metrics.jaccard_score(marked.numpy(), top.numpy()))
    assert f1[2].isnan()
    assert iou[2].isnan()


def test_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.8, -0.5]])
    rationale = torch.tensor([[True, True, False, False]])
    assert token_f1(scores, rationale).tolist() == [0.5]
    assert_close(token_iou(scores, rationale), torch.tensor([1 / 3]))
    assert_close(token_auprc(scores, rationale), torch.tensor([0.5 * 1 + 0.5 * 2 / 3]))
    assert_close(token_f1(scores, rationale, fraction=0.25), torch.tensor([2 / 3]))
    assert token_iou(scores, rationale, fraction=1.0).tolist() == [0.5]
    # A score that tells nothing apart has the share that chance has.
    assert token_auprc(torch.zeros(1, 4), rationale).tolist() == [0.5]


def test_the_best_and_the_worst():
    rationale = torch.tensor([[True, False, True, False, False]])
    for measure in (token_f1, token_iou, token_auprc):
        assert measure(rationale.float(), rationale).tolist() == [1]
    assert token_f1(-rationale.float(), rationale).tolist() == [0]
    assert token_iou(-rationale.float(), rationale).tolist() == [0]


def test_infinite_scores_keep_their_order():
    scores = torch.tensor([[-torch.inf, torch.inf, 0.0, 5.0]])
    rationale = torch.tensor([[True, False, False, False]])
    mask = torch.tensor([[True, True, True, False]])
    assert token_f1(scores, rationale, mask).tolist() == [0]
    assert_close(token_auprc(scores, rationale, mask), torch.tensor([1 / 3]))


@pytest.mark.parametrize("measure", [token_f1, token_iou, token_auprc, lambda *a: token_f1(*a, fraction=0.3)])
def test_padding_is_not_felt(case, measure):
    scores, rationale, mask = case
    together = measure(scores, rationale, mask)
    for row, length in enumerate((31, 12, 5, 1)):
        alone = measure(scores[row : row + 1, :length], rationale[row : row + 1, :length])
        assert_close(together[row : row + 1], alone, equal_nan=True)
        left = [torch.cat([torch.zeros(1, 4).to(part), part[row : row + 1]], dim=1) for part in case]
        assert_close(together[row : row + 1], measure(*left), equal_nan=True)


@pytest.mark.parametrize("measure", [token_f1, token_iou, token_auprc])
def test_precision_and_empty_batches(measure):
    rationale = torch.tensor([[True, False]])
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        assert measure(torch.ones(1, 2, dtype=dtype), rationale).dtype == wanted
    assert measure(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)).shape == (0,)
    assert measure(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)).isnan().tolist() == [True, True]


@pytest.mark.parametrize("measure", [token_f1, token_iou, token_auprc])
def test_what_does_not_fit_is_refused(measure):
    scores, rationale = torch.tensor([[1.0, 2.0]]), torch.tensor([[True, False]])
    with pytest.raises(TypeError, match=r"rationale must be a bool tensor, got torch\.int64"):
        measure(scores, rationale.long())
    with pytest.raises(TypeError, match=r"scores must be of a floating-point dtype"):
        measure(scores.long(), rationale)
    with pytest.raises(ValueError, match=r"rationale must have the shape of scores, \(1, 2\), got \(1, 1\)"):
        measure(scores, rationale[:, :1])
    with pytest.raises(TypeError, match=r"mask must be a bool tensor, got list"):
        measure(scores, rationale, [[True, True]])
    with pytest.raises(ValueError, match=r"rationale must be false where mask is false"):
        measure(scores, rationale, ~rationale)
    with pytest.raises(ValueError, match=r"scores must be numbers, got NaN"):
        measure(scores * torch.nan, rationale)


def test_a_fraction_outside_its_range_is_refused():
    scores, rationale = torch.tensor([[1.0, 2.0]]), torch.tensor([[True, False]])
    for measure in (token_f1, token_iou):
        with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\], got 1\.5"):
            measure(scores, rationale, fraction=1.5)
        with pytest.raises(TypeError, match=r"fraction must be a number, got str"):
            measure(scores, rationale, fraction="rationale size")

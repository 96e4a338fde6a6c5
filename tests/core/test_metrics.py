"""Rankings, drops and areas against the same in numpy, one sample at a time."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mhex_core.metrics import curve_area, descending, min_max, relative_drop, top_fraction


@pytest.fixture
def scores():
    """Some rows with ties, one constant."""
    values = torch.randn(6, 30, generator=torch.Generator().manual_seed(0))
    values[2:4] = (values[2:4] * 2).round()
    values[4] = 0.0
    return values


def test_a_drop_is_the_lost_share_and_never_negative():
    before = torch.tensor([0.5, 0.5, 0.0, 1.0], dtype=torch.float64)
    after = torch.tensor([0.1, 0.9, 0.3, 0.0], dtype=torch.float64)
    assert relative_drop(before, after).tolist() == [0.8, 0.0, 0.0, 1.0]


def test_the_order_falls_and_is_a_permutation(scores):
    order = descending(scores)
    assert_close(scores.gather(1, order), scores.sort(dim=1, descending=True).values)
    assert_close(order.sort(dim=1).values, torch.arange(30).expand(6, 30))


def test_ties_come_in_one_order_that_follows_no_place(scores):
    order = descending(scores)[4]
    assert not torch.equal(order, torch.arange(30))
    assert not torch.equal(order, torch.arange(29, -1, -1))
    assert abs(np.corrcoef(order.numpy(), np.arange(30))[0, 1]) < 0.5
    assert torch.equal(order, descending(torch.full((1, 30), -7.0))[0])


def test_an_order_knows_nothing_of_the_batch(scores):
    whole = descending(scores)
    assert all(torch.equal(whole[row : row + 1], descending(scores[row : row + 1])) for row in range(6))


def test_masked_positions_come_last_even_behind_minus_infinity(scores):
    mask = torch.rand(6, 30, generator=torch.Generator().manual_seed(1)) > 0.4
    scores[0, mask[0]] = -torch.inf
    order = descending(scores, mask=mask)
    for row in range(6):
        count = int(mask[row].sum())
        assert mask[row, order[row, :count]].all()
        assert not mask[row, order[row, count:]].any()
        kept = scores[row, order[row, :count]]
        assert torch.equal(kept, kept.sort(descending=True).values)


@pytest.mark.parametrize("fraction", [0, 0.1, 0.15, 0.25, 0.5, 0.999, 1])
def test_the_top_holds_the_same_number_everywhere(scores, fraction):
    chosen = top_fraction(scores, fraction)
    count = math.floor(round(fraction * 30, 6) + 0.5)
    assert chosen.sum(dim=1).tolist() == [count] * 6
    for row, picked in zip(scores, chosen, strict=True):
        if 0 < count < 30:
            assert row[picked].min() >= row[~picked].max()


def test_a_fraction_is_of_the_positions_that_take_part():
    scores = torch.arange(10.0).expand(3, 10)
    mask = torch.zeros(3, 10, dtype=torch.bool)
    mask[0, :4], mask[1, :1] = True, True
    chosen = top_fraction(scores, 0.5, mask=mask, at_least=1)
    assert [row.nonzero().flatten().tolist() for row in chosen] == [[2, 3], [0], []]


def test_the_area_is_numpys():
    generator = np.random.default_rng(0)
    values, fractions = generator.random((4, 7)), np.sort(generator.random(7))
    expected = np.trapezoid(values, fractions, axis=1) / (fractions[-1] - fractions[0])
    assert_close(curve_area(torch.tensor(values), torch.tensor(fractions)), torch.tensor(expected))


@pytest.mark.parametrize("shape", [(5, 9), (5, 3, 4), (0, 3, 4)])
def test_every_sample_is_brought_to_zero_and_one_by_itself(shape):
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100
    if len(maps):
        maps[1] = 3.0
    scaled = min_max(maps)
    for row, values in zip(scaled, maps, strict=True):
        expected = (values - values.min()) / (values.max() - values.min()) if values.std() > 0 else values * 0
        assert_close(row, expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: descending(torch.tensor([[1.0, math.nan]])), ValueError, "NaN"),
        (lambda: descending(torch.zeros(3)), ValueError, "scores must have 2 dimensions"),
        (lambda: descending(torch.zeros(1, 3), mask=torch.ones(1, 3)), TypeError, "mask must be a bool tensor"),
        (
            lambda: descending(torch.zeros(1, 3), mask=torch.ones(1, 2, dtype=torch.bool)),
            ValueError,
            "mask must have the shape of scores",
        ),
        (lambda: top_fraction(torch.zeros(1, 3), 1.5), ValueError, r"fraction must be in \[0, 1\]"),
        (lambda: top_fraction(torch.zeros(1, 3), 0.5, at_least=-1), ValueError, "at_least must be a whole number"),
        (lambda: relative_drop(torch.zeros(2), torch.zeros(3)), ValueError, "after must have the shape of before"),
        (lambda: curve_area(torch.zeros(2, 3), torch.zeros(2)), ValueError, "fractions must hold 3 numbers"),
        (lambda: curve_area(torch.zeros(2, 2), torch.tensor([1.0, 0.0])), ValueError, "ascending"),
        (lambda: min_max(torch.tensor([[math.nan, 1.0, 2.0]])), ValueError, "maps must be finite"),
        (lambda: min_max(torch.tensor([[math.inf, 1.0, 2.0]])), ValueError, "maps must be finite"),
        (lambda: min_max(torch.full((1, 2, 2), math.nan)), ValueError, "maps must be finite"),
        (lambda: relative_drop(torch.tensor([math.nan]), torch.tensor([0.1])), ValueError, "before must be finite"),
        (lambda: relative_drop(torch.tensor([0.1]), torch.tensor([math.nan])), ValueError, "after must be finite"),
        (
            lambda: curve_area(torch.tensor([[0.0, math.nan]]), torch.tensor([0.0, 1.0])),
            ValueError,
            "values must be finite",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()

"""Closed forms against all coalitions, and sampling against both."""

from itertools import combinations, permutations
from math import factorial

import pytest
import torch
from torch.testing import assert_close

from mhex_core.attention import (
    ShapleyEstimate,
    coalition_values,
    shapley_enumerated,
    shapley_sampled,
    shapley_values,
)

EXACT = {"rtol": 0, "atol": 1e-12}
MUTUAL = ["mutual", "max_mutual"]


def draw(*shape, seed=0):
    """Neither symmetric nor of one sign."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_value(a, members, game, row):
    """v(S), as the games are told."""
    if game == "cls":
        return sum(row[i] for i in members)
    if len(members) == 1:
        return a[members[0]][members[0]]
    if game == "mutual":
        return sum(a[i][j] for i, j in permutations(members, 2))
    return sum(max(a[i][j], a[j][i]) for i, j in combinations(members, 2))


def slow_shapley(a, game, row):
    players = range(len(a))
    values = []
    for player in players:
        others = [other for other in players if other != player]
        total = 0.0
        for size in range(len(others) + 1):
            share = factorial(size) * factorial(len(others) - size) / factorial(len(a))
            for members in combinations(others, size):
                joined = slow_value(a, [*members, player], game, row)
                total += share * (joined - slow_value(a, list(members), game, row))
        values.append(total)
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("game", ["cls", *MUTUAL])
def test_the_closed_form_equals_the_sum_over_all_coalitions(game):
    tokens = 10
    matrix = draw(9, tokens, tokens)
    order = torch.rand(9, tokens, generator=torch.Generator().manual_seed(1)).argsort(dim=1)
    # Sample m has m players: 0 to 8.
    players = order < torch.arange(9)[:, None]
    found = shapley_values(matrix, game=game, players=players, query=3)
    assert (found[~players] == 0).all()
    for count, own in enumerate(players):
        if not count:
            continue
        among, row = matrix[count][own][:, own], matrix[count, 3, own]

        def value(coalitions, among=among, row=row):
            return coalition_values(among, coalitions, game=game, query=row)

        enumerated = shapley_enumerated(value, count)
        assert_close(found[count, own], enumerated, **EXACT)
        if count <= 5:
            assert_close(enumerated, slow_shapley(among.tolist(), game, row.tolist()), **EXACT)
        everybody = value(torch.ones(1, count, dtype=torch.bool))
        assert_close(found[count].sum(), everybody[0], **EXACT)


@pytest.mark.parametrize("game", ["cls", *MUTUAL])
def test_coalition_values_equal_the_games_as_they_are_told(game):
    matrix = draw(4, 4)
    members = [list(chosen) for size in range(5) for chosen in combinations(range(4), size)]
    coalitions = torch.tensor([[token in chosen for token in range(4)] for chosen in members])
    expected = [slow_value(matrix.tolist(), chosen, game, matrix[2].tolist()) for chosen in members]
    found = coalition_values(matrix, coalitions, game=game, query=2)
    assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)
    assert_close(coalition_values(matrix, coalitions.long(), game=game, query=matrix[2]), found, **EXACT)


def test_the_diagonal_counts_against_the_others():
    matrix = torch.zeros(1, 3, 3)
    matrix[0, 1, 1] = 6.0
    found = shapley_values(matrix, players=torch.ones(1, 3, dtype=torch.bool))
    assert_close(found, torch.tensor([[-1.0, 2.0, -1.0]]))


@pytest.mark.parametrize("game", ["cls", *MUTUAL])
def test_those_who_do_not_play_are_not_felt(game):
    matrix, players = draw(2, 5, 5), torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]]).bool()
    spoiled = torch.where(players[:, None] & (players[:, :, None] | (torch.arange(5) == 0)[:, None]), matrix, torch.nan)
    found = shapley_values(spoiled, game=game, players=players)
    assert_close(found, shapley_values(matrix, game=game, players=players.long()), **EXACT)
    assert found.isfinite().all()


@pytest.mark.parametrize("game", MUTUAL)
def test_sampling_of_a_game_of_pairs_is_exact_up_to_its_diagonal(game):
    matrix = draw(6, 6)
    matrix.fill_diagonal_(0)
    estimate = shapley_sampled(lambda s: coalition_values(matrix, s, game=game), 6, permutations=4)
    closed = shapley_values(matrix[None], game=game, players=torch.ones(1, 6))[0]
    assert_close(estimate.values, closed, **EXACT)
    assert_close(estimate.standard_errors, torch.zeros(6).double(), **EXACT)


def test_sampling_is_unbiased_with_errors_of_the_right_size_and_efficient():
    values = draw(2**6, seed=5)

    def value(coalitions):
        return values[(coalitions.long() << torch.arange(6)).sum(dim=1)]

    exact = shapley_enumerated(value, 6)
    scores = []
    for seed in range(40):
        estimate = shapley_sampled(value, 6, permutations=60, seed=seed)
        assert isinstance(estimate, ShapleyEstimate)
        assert estimate.permutations == 60
        assert_close(estimate.values.sum(), values[-1] - values[0], **EXACT)
        scores.append((estimate.values - exact) / estimate.standard_errors)
    z = torch.stack(scores)
    # The mean of 40 independent t statistics of 29 degrees of freedom, within 4 standard errors of the mean.
    assert (z.mean(dim=0).abs() < 4 * 1.04 / 40**0.5).all()
    assert 0.85 < z.std().item() < 1.2


def test_sampling_asks_in_batches_and_repeats_itself():
    sizes = []
    matrix = draw(5, 5)

    def value(coalitions):
        assert coalitions.dtype == torch.bool
        sizes.append(len(coalitions))
        return coalition_values(matrix, coalitions, game="max_mutual")

    state = torch.get_rng_state()
    first = shapley_sampled(value, 5, permutations=10, seed=3, batch_size=7)
    assert max(sizes) == 7
    assert sum(sizes) == 10 * 4 + 2
    again = shapley_sampled(value, 5, permutations=10, seed=3)
    assert torch.equal(first.values, again.values)
    assert torch.equal(first.standard_errors, again.standard_errors)
    other = shapley_sampled(value, 5, permutations=10, seed=4)
    assert not torch.equal(first.values, other.values)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_player_takes_it_all():
    estimate = shapley_sampled(lambda s: 3.0 * s[:, 0].double() + 1, 1)
    assert estimate.values.tolist() == [3.0]
    assert estimate.standard_errors.tolist() == [0.0]
    assert shapley_enumerated(lambda s: 3.0 * s[:, 0].double() + 1, 1).tolist() == [3.0]


MATRIX = torch.ones(1, 2, 2)


def count(coalitions):
    return coalitions.sum(dim=1).double()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: shapley_values(MATRIX[0], players=torch.ones(1, 2)), ValueError, "matrix must have 3 dimensions"),
        (
            lambda: shapley_values(torch.ones(1, 2, 3), players=torch.ones(1, 2)),
            ValueError,
            r"matrix must .*\(B, T, T\)",
        ),
        (lambda: shapley_values(MATRIX, players=None), TypeError, "players must be a torch.Tensor, got NoneType"),
        (lambda: shapley_values(MATRIX, players=torch.ones(1, 3)), ValueError, r"players must have shape \(1, 2\)"),
        (lambda: shapley_values(MATRIX, players=torch.ones(1, 2), game="max"), ValueError, "game must be one of 'cls'"),
        (lambda: shapley_values(MATRIX, players=torch.ones(1, 2), query=2), ValueError, r"query must lie in \[0, 1\]"),
        (lambda: coalition_values(MATRIX, torch.ones(1, 2), game="cls"), ValueError, "matrix must have 2 dimensions"),
        (lambda: coalition_values(torch.ones(2, 3), torch.ones(1, 2), game="cls"), ValueError, r"matrix .* \(T, T\)"),
        (lambda: coalition_values(MATRIX[0], torch.ones(1, 3), game="cls"), ValueError, r"coalitions .* \(N, 2\)"),
        (lambda: coalition_values(MATRIX[0], torch.ones(1, 2), game="a"), ValueError, "game must be one of"),
        (
            lambda: coalition_values(MATRIX[0], torch.ones(1, 2), game="cls", query=torch.ones(3)),
            ValueError,
            r"query must be an int or have shape \(2,\), got \(3,\)",
        ),
        (lambda: shapley_enumerated(count, 17), ValueError, "players must be at most 16, got 17: see shapley_sampled"),
        (lambda: shapley_enumerated(count, 0), ValueError, "players must be at least 1"),
        (
            lambda: shapley_enumerated(lambda s: s.sum(dim=1), 2),
            ValueError,
            r"value must give .* \(4,\), got torch.int64",
        ),
        (lambda: shapley_sampled(lambda s: 1.0, 2), ValueError, r"value must give .* \(2,\), got float"),
        (
            lambda: shapley_sampled(count, 2, permutations=2),
            ValueError,
            "permutations must be an even number of at least",
        ),
        (
            lambda: shapley_sampled(count, 2, permutations=5),
            ValueError,
            "permutations must be an even number of at least",
        ),
        (lambda: shapley_sampled(count, 2, seed=-1), ValueError, "seed must be at least 0"),
        (lambda: shapley_sampled(count, 2, seed=0.5), TypeError, "seed must be an int"),
        (lambda: shapley_sampled(count, 2, batch_size=0), ValueError, "batch_size must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()

"""Shapley values of tokens in games that attention defines, in closed form; and of any game, exactly or by sampling.

Letters: B batch, T tokens, N coalitions, m players, a (T, T) aggregated attention (see `aggregated_attention`).

The games, v(S) of a coalition S of players:
  cls         sum_{i in S} a_qi, q one query: additive, so phi_i = a_qi.
  mutual      0 for nobody, a_ii for i alone, else the sum of a_ij over ordered pairs i != j in S.
  max_mutual  The same with max(a_ij, a_ji) over unordered pairs.
The diagonal counts only for one token alone, and so enters the value of all others with the opposite sign.

Source: Eggen, Lysnaes-Larsen and Strumke, "Integrating attention into explanation frameworks" (arXiv 2508.08966). The
closed form for both mutual games is ours, and checked against all 2^m coalitions; their sampling, which is neither
unbiased nor efficient, is replaced by permutations: Castro, Gomez and Tejada 2009; antithetic pairs, Mitchell et al.
2022 (arXiv 2104.12199).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mhex_core import _checks
from mhex_core.attention._layers import index_below, pairs_of, real_tokens, seed_of

Game = Literal["cls", "mutual", "max_mutual"]
_GAMES = ("cls", "mutual", "max_mutual")
_MAX_PLAYERS = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class ShapleyEstimate:
    """Shapley values by sampling.

    Attributes:
        values: (m,).
        standard_errors: (m,), of the mean over antithetic pairs. 0 for a player whose pairs all agree.
        permutations: How many were drawn, the reversed ones included.
    """

    values: Tensor
    standard_errors: Tensor
    permutations: int


def shapley_values(matrix: Tensor, *, game: Game = "mutual", players: Tensor, query: int = 0) -> Tensor:
    """Shapley values of the tokens that play, in O(T^2).

    With W_ij = a_ij + a_ji (mutual) or max(a_ij, a_ji) (max_mutual), over the m >= 2 players:
      phi_i = a_ii / m + 1/2 sum_{j != i} W_ij - 1/(m (m - 1)) sum_{j != i} a_jj.
    One player alone has a_ii. Their sum is v of all players.

    Args:
        matrix: a, (B, T, T), row query, column key.
        game: See the module.
        players: (B, T), true (or 1) for the tokens that play: real ones, without CLS and the like.
        query: For "cls", whose row of `matrix` is the game; it need not play.

    Returns:
        (B, T); may be negative; 0 for those who do not play.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes do not fit each other, or there is no such game or query.
    """
    matrix = _checks.tensor("matrix", matrix, ndim=3)
    batch, tokens, _ = matrix.shape
    if matrix.shape[2] != tokens:
        raise ValueError(f"matrix must have shape (B, T, T), got {tuple(matrix.shape)}")
    _checks.choice("game", game, _GAMES)
    _checks.tensor("players", players, ndim=2, floating=False)
    playing = real_tokens(players, batch, tokens, matrix, name="players")
    query = index_below("query", query, tokens)
    if game == "cls":
        return torch.where(playing, matrix[:, query], 0.0)
    among = torch.where(pairs_of(playing), matrix, 0.0)
    alone = among.diagonal(dim1=1, dim2=2)
    count = playing.sum(dim=1, keepdim=True)
    shared = 0.5 * _both_ways(among, game).sum(dim=2)
    taken = (alone.sum(dim=1, keepdim=True) - alone) / (count * (count - 1)).clamp(min=1)
    return torch.where(playing, torch.where(count > 1, alone / count.clamp(min=1) + shared - taken, alone), 0.0)


def coalition_values(matrix: Tensor, coalitions: Tensor, *, game: Game, query: int | Tensor = 0) -> Tensor:
    """v(S) of coalitions, all at once.

    Args:
        matrix: a among the players, (T, T).
        coalitions: bool (N, T), each row a coalition.
        game: See the module.
        query: For "cls", the row of `matrix` that is the game; or that row itself, (T,), where the query is no player.

    Returns:
        (N,).

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes do not fit each other, or there is no such game or query.
    """
    matrix = _checks.tensor("matrix", matrix, ndim=2)
    tokens = matrix.shape[0]
    if matrix.shape[1] != tokens:
        raise ValueError(f"matrix must have shape (T, T), got {tuple(matrix.shape)}")
    coalitions = _checks.tensor("coalitions", coalitions, ndim=2, floating=False)
    if coalitions.shape[1] != tokens:
        raise ValueError(f"coalitions must have shape (N, {tokens}), got {tuple(coalitions.shape)}")
    _checks.choice("game", game, _GAMES)
    members = coalitions.to(device=matrix.device, dtype=torch.bool).to(matrix.dtype)
    if game == "cls":
        if isinstance(query, Tensor):
            row = _checks.tensor("query", query, ndim=1).to(matrix)
            if row.shape != (tokens,):
                raise ValueError(f"query must be an int or have shape ({tokens},), got {tuple(row.shape)}")
        else:
            row = matrix[index_below("query", query, tokens)]
        return members @ row
    together = 0.5 * ((members @ _both_ways(matrix, game)) * members).sum(dim=1)
    # Pairs of a coalition of one are none: `together` is 0 there.
    return torch.where(members.sum(dim=1) == 1, members @ matrix.diagonal(), together)


def shapley_enumerated(value: Callable[[Tensor], Tensor], players: int) -> Tensor:
    """Shapley values of any game by all its 2^m coalitions.

    phi_i = sum_{S without i} |S|! (m - |S| - 1)! / m! (v(S + i) - v(S)).

    Args:
        value: v: takes coalitions, bool (N, m) on the CPU, and gives their values (N,); called once.
        players: m, at most 16.

    Returns:
        (m,).

    Raises:
        TypeError: An argument is of another type.
        ValueError: There are too many players, or `value` gives something else.
    """
    players = _checks.positive_int("players", players)
    if players > _MAX_PLAYERS:
        raise ValueError(f"players must be at most {_MAX_PLAYERS}, got {players}: see shapley_sampled")
    codes = torch.arange(2**players)
    coalitions = (codes[:, None] >> torch.arange(players)) % 2 == 1
    values = _valued(value, coalitions)
    weights = torch.tensor(
        [1 / (players * math.comb(players - 1, size)) for size in range(players)], dtype=torch.float64
    )
    sizes = coalitions.sum(dim=1)
    shares = []
    for player in range(players):
        without = codes[~coalitions[:, player]]
        gains = values[without + 2**player] - values[without]
        shares.append((weights[sizes[without]].to(gains) * gains).sum())
    return torch.stack(shares)


def shapley_sampled(
    value: Callable[[Tensor], Tensor], players: int, *, permutations: int = 100, seed: int = 0, batch_size: int = 4096
) -> ShapleyEstimate:
    """Shapley values of any game by sampling orders in which the players join: unbiased.

    A player's value is its mean gain on joining. Every order is also run backwards (an antithetic pair), which takes
    out what two players share with each other; the standard errors are those of the mean over pairs, which are
    independent. In each order the gains add up to v(all) - v(nobody), and so does the estimate.

    Args:
        value: v: takes coalitions, bool (N, m) on the CPU, and gives their values (N,).
        players: m.
        permutations: How many orders, an even number of at least 4. They take permutations * (m - 1) + 2 coalitions.
        seed: Of the orders.
        batch_size: At most so many coalitions at a time.

    Raises:
        TypeError: An argument is of another type.
        ValueError: A number does not fit, or `value` gives something else.
    """
    players = _checks.positive_int("players", players)
    permutations = _checks.positive_int("permutations", permutations)
    if permutations < 4 or permutations % 2:
        raise ValueError(f"permutations must be an even number of at least 4, got {permutations}")
    seed = seed_of(seed)
    batch_size = _checks.positive_int("batch_size", batch_size)
    orders = np.tile(np.arange(players), (permutations // 2, 1))
    forwards = torch.from_numpy(np.random.default_rng(seed).permuted(orders, axis=1))
    # When each player joins: (pairs, 2, m), then one row per order.
    joins = torch.stack([forwards, players - 1 - forwards], dim=1).reshape(permutations, players)
    ends = _valued(value, torch.stack([torch.zeros(players), torch.ones(players)]).bool())
    values = ends.new_empty(permutations, players + 1)
    values[:, 0], values[:, -1] = ends
    inner = values[:, 1:-1].numel()
    for first in range(0, inner, batch_size):
        places = torch.arange(first, min(first + batch_size, inner))
        rows, sizes = places // (players - 1), places % (players - 1) + 1
        values[rows, sizes] = _valued(value, joins[rows] < sizes[:, None])
    gains = values.diff(dim=1).gather(1, joins.to(values.device))
    pairs = gains.view(-1, 2, players).mean(dim=1)
    return ShapleyEstimate(
        values=pairs.mean(dim=0),
        standard_errors=pairs.std(dim=0) / math.sqrt(len(pairs)),
        permutations=permutations,
    )


def _both_ways(matrix: Tensor, game: Game) -> Tensor:
    """W of pairs, symmetric, with nothing on the diagonal: (..., T, T)."""
    turned = matrix.transpose(-2, -1)
    shared = matrix + turned if game == "mutual" else torch.maximum(matrix, turned)
    return shared - torch.diag_embed(shared.diagonal(dim1=-2, dim2=-1))


def _valued(value: Callable[[Tensor], Tensor], coalitions: Tensor) -> Tensor:
    """The values of coalitions, checked."""
    values: object = value(coalitions)
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.shape != (len(coalitions),):
        got = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"value must give a floating-point tensor of shape ({len(coalitions)},), got {got}")
    return values.detach()

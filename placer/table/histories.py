"""Rates of homes by past majority ranks, for every possible history.

Most histories are rare. What one of them predicts is therefore first the sum of what each
of its ranks does and, from three layers on, each pair of its ranks: effects fitted by ridge
regression (Hoerl and Kennard 1970). The histories that the profile met are shrunk
towards that sum; for all others it is the prediction.

Legend of the shapes: T tokens, N histories met, n past layers, R ranks, C columns.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np

from placer.arrays import FloatArray, IntArray
from placer.serving.layer_serving import RankArray
from placer.table.lookup import history_index

# Tokens that the penalty weighs as much as, and that a predicted rate does.
_PENALTY = 40.0
_SHRINKAGE = 20.0
# Of more columns pairs are left out.
_MOST_COLUMNS = 1024
# Histories that are looked at together.
_ROWS = 8192


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HistoryRates:
    """The predictions of one layer's histories.

    Attributes
    ----------
    num_ranks, lookback
        R and n.
    met
        ``[N]`` int64, ascending: the histories met, as numbers in base R, the oldest first.
    group
        ``[T]`` int64: which of them each token of the profile has.
    rates
        ``[N, R]`` float64: expected local activation rate of every home after them.
    effects, bias
        ``[C, R]`` and ``[R]`` float64: what predicts it after all others.
    """

    num_ranks: int
    lookback: int
    met: IntArray
    group: IntArray
    rates: FloatArray
    effects: FloatArray
    bias: FloatArray

    @classmethod
    def of(cls, history: list[RankArray], served: FloatArray, num_ranks: int) -> Self:
        """Fit the histories of a profile.

        Parameters
        ----------
        history
            The majority ranks ``[T]`` of the n past layers, the oldest first.
        served
            ``[T, R]``: the share of a token's pairs that each home could serve.
        num_ranks
            R.
        """
        lookback = len(history)
        index = history_index(history, num_ranks)
        met, group = np.unique(index, return_inverse=True)
        times = np.bincount(group)
        total = sums(group, served, np.ones(len(group)), len(met))
        effects, bias = _ridge(met, times, total, lookback, num_ranks)
        predicted = _predicted(met, effects, bias, lookback, num_ranks)
        rates = (total + _SHRINKAGE * predicted) / (times + _SHRINKAGE)[:, None]
        return cls(
            num_ranks=num_ranks,
            lookback=lookback,
            met=met,
            group=group,
            rates=rates,
            effects=effects,
            bias=bias,
        )

    def blocks(self) -> Iterator[FloatArray]:
        """Yield the rates ``[rows, R]`` of all histories, block by block in their order."""
        for begin in range(0, self.num_ranks**self.lookback, _ROWS):
            end = min(begin + _ROWS, self.num_ranks**self.lookback)
            every = np.arange(begin, end)
            rates = _predicted(
                every, self.effects, self.bias, self.lookback, self.num_ranks
            )
            inside = slice(*np.searchsorted(self.met, [begin, end]))
            rates[self.met[inside] - begin] = self.rates[inside]
            yield rates


def sums(
    group: IntArray, served: FloatArray, weight: FloatArray, num_groups: int
) -> FloatArray:
    """Return ``[groups, R]``: the weighted share of a group's tokens that each home serves.

    Tokens of a negative group are not counted.
    """
    counted = group >= 0
    group, weight = group[counted], weight[counted]
    total = np.empty((num_groups, served.shape[1]))
    for rank, share in enumerate(served.T):
        total[:, rank] = np.bincount(group, share[counted] * weight, minlength=num_groups)
    return total


def _columns(index: IntArray, lookback: int, num_ranks: int) -> tuple[IntArray, int]:
    """Return the columns of histories, ``[N, ranks and pairs of each]``, and their number.

    Every layer has a column per rank, every pair of layers one per pair of ranks. The
    pairs of two layers are their histories, for which counts do.
    """
    ranks = [
        index // num_ranks ** (lookback - 1 - place) % num_ranks
        for place in range(lookback)
    ]
    columns = [place * num_ranks + rank for place, rank in enumerate(ranks)]
    total = lookback * num_ranks
    pairs = list(itertools.combinations(ranks, 2)) if lookback > 2 else []
    if total + len(pairs) * num_ranks**2 <= _MOST_COLUMNS:
        for older, later in pairs:
            columns.append(total + older * num_ranks + later)
            total += num_ranks**2
    return np.stack(columns, axis=1), total


def _ridge(
    met: IntArray, times: IntArray, total: FloatArray, lookback: int, num_ranks: int
) -> tuple[FloatArray, FloatArray]:
    """Return effects ``[C, R]`` and bias ``[R]``; the bias is not penalised.

    ``times`` and ``total``: tokens with each history, and the sum of what homes serve.
    """
    num_columns = _columns(met[:1], lookback, num_ranks)[1]
    counted = np.zeros(num_columns**2)
    products = np.zeros((num_columns, num_ranks))
    count = np.zeros(num_columns)
    # Few columns are 1 in a row: they are counted, dense products would be mostly zeros.
    for begin in range(0, len(met), _ROWS):
        part = slice(begin, begin + _ROWS)
        columns, _ = _columns(met[part], lookback, num_ranks)
        width = columns.shape[1]
        pairs = (columns[:, :, None] * num_columns + columns[:, None, :]).ravel()
        counted += np.bincount(pairs, np.repeat(times[part], width**2), len(counted))
        ones = columns.ravel()
        count += np.bincount(ones, np.repeat(times[part], width), num_columns)
        served = np.repeat(total[part], width, axis=0)
        products += sums(ones, served, np.ones(len(ones)), num_columns)
    squares = counted.reshape(num_columns, num_columns)
    mean_served = total.sum(axis=0) / times.sum()
    squares -= np.outer(count, count) / times.sum()
    squares[np.diag_indices(num_columns)] += _PENALTY
    right = products - np.outer(count, mean_served)
    effects = np.linalg.solve(squares, right).astype(np.float64)
    bias: FloatArray = mean_served - count @ effects / times.sum()
    return effects, bias


def _predicted(
    index: IntArray,
    effects: FloatArray,
    bias: FloatArray,
    lookback: int,
    num_ranks: int,
) -> FloatArray:
    """Return ``[N, R]``: the sum of effects, within 0..1."""
    rates = np.tile(bias, (len(index), 1))
    for column in _columns(index, lookback, num_ranks)[0].T:
        rates += effects[column]
    return rates.clip(0, 1)

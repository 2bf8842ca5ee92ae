"""The proof of one layer: prices, cuts, and a search of what they leave.

Column generation solves the linear program of all columns (Gilmore and Gomory 1961). Cuts
of three experts raise it. Then every partition that prices still allow to be better is
looked at. Work is counted in steps, never in seconds, and what is known at any stop is
proved.

Legend of the shapes: see :mod:`placer.solver.partition.columns`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from placer.arrays import IntArray
from placer.solver.kernels.columns import search_partitions
from placer.solver.partition.columns import SCALE, Columns, DualPrices, Limits
from placer.solver.partition.master import Master

METHOD = "set partition of the experts over the ranks"
_MOST_ROUNDS = 400
_MOST_CUT_ROUNDS = 12
_COLUMNS_PER_ROUND = 300
_FIRST_COLUMNS = 100
# Rounding moves a reduced cost by less than this part of a copy.
_ROUNDING = SCALE // 64
_MOST_STEPS = 200_000_000
# The search looks this part of the way up to the best cost known first, then twice that.
_FIRST_PART = 1024


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerProof:
    """What is proved of a layer.

    Attributes
    ----------
    bound
        Tokens that use a rank, summed over ranks: no partition has fewer.
    cost
        What ``sets`` have.
    sets
        ``[R, C]`` int64: the best partition known.
    prices
        What proves ``bound``, or the part of it that the search did not.
    limits
        Which sets a rank may hold.
    num_columns
        Columns that there are.
    searched
        Whether the bound was raised above what prices prove, by looking at partitions.
    """

    bound: int
    cost: int
    sets: IntArray
    prices: DualPrices
    limits: Limits
    num_columns: int
    searched: bool

    @property
    def is_optimal(self) -> bool:
        """Whether ``sets`` are proved to be the best."""
        return self.cost <= self.bound


class _Layer:
    """The best partition and the best bound so far."""

    def __init__(self, columns: Columns, sets: IntArray, cost: IntArray) -> None:
        self.columns = columns
        self.sets, self.cost = sets, int(cost.sum())
        self.num_ranks = len(sets)
        self.prices = DualPrices(experts=np.zeros(columns.num_experts, dtype=np.int64))
        self.base = self._base(self.prices, columns.reduced_costs(self.prices))
        self.searched: int | None = None

    def _base(self, prices: DualPrices, reduced: IntArray) -> int:
        return prices.total + self.num_ranks * int(reduced.min())

    @property
    def bound(self) -> int:
        """The best bound, in whole tokens."""
        by_prices = -(-self.base // SCALE)
        return max(by_prices, self.searched or 0)

    def learn(self, prices: DualPrices, reduced: IntArray) -> None:
        """Keep prices that prove more."""
        base = self._base(prices, reduced)
        if base > self.base:
            self.base, self.prices = base, prices

    def take(self, sets: IntArray, cost: int) -> None:
        """Keep a partition that costs less."""
        if cost < self.cost:
            self.sets, self.cost = sets, cost

    @property
    def proof(self) -> LayerProof:
        """What is known."""
        return LayerProof(
            bound=self.bound,
            cost=self.cost,
            sets=self.sets,
            prices=self.prices,
            limits=self.columns.limits,
            num_columns=len(self.columns.cost),
            searched=self.searched is not None,
        )


def prove_layer(
    columns: Columns,
    sets: IntArray,
    cost: IntArray,
    goes_on: Callable[[], bool] = lambda: True,
) -> LayerProof:
    """Find and prove the best partition of a layer.

    Parameters
    ----------
    columns
        All sets that a rank may hold.
    sets, cost
        ``[R, C]`` int64, a partition into such sets, and ``[R]`` what they cost.
    goes_on
        Asked between steps whether to go on.
    """
    layer = _Layer(columns, sets, cost)
    if _solve_linear(layer, cost, goes_on) and layer.bound < layer.cost and goes_on():
        _search(layer, goes_on)
    return layer.proof


def _solve_linear(layer: _Layer, cost: IntArray, goes_on: Callable[[], bool]) -> bool:
    """Solve the linear program, with cuts; return whether it came to its end."""
    columns = layer.columns
    master = Master(columns.num_experts)
    master.add(layer.sets.astype(np.int16), cost)
    cheap = np.argsort(columns.cost, kind="stable")[:_FIRST_COLUMNS]
    master.add(columns.experts[cheap], columns.cost[cheap])
    cut_rounds = 0
    for _ in range(_MOST_ROUNDS):
        if not goes_on():
            return False
        solution = master.solve()
        if solution is None:
            return True
        reduced = columns.reduced_costs(solution.prices)
        layer.learn(solution.prices, reduced)
        if layer.bound >= layer.cost:
            return True
        new = _most_negative(reduced)
        if len(new):
            master.add(columns.experts[new], columns.cost[new])
            continue
        if solution.is_whole:
            layer.take(solution.experts.astype(np.int64), int(solution.cost.sum()))
            return True
        cut_rounds += 1
        if cut_rounds > _MOST_CUT_ROUNDS or not master.cut(solution):
            return True
    return True


def _most_negative(reduced: IntArray) -> IntArray:
    """Return the columns of the least reduced cost, those below 0."""
    number = min(_COLUMNS_PER_ROUND, len(reduced))
    least = np.argpartition(reduced, number - 1)[:number]
    return np.sort(least[reduced[least] < -_ROUNDING])


def _search(layer: _Layer, goes_on: Callable[[], bool]) -> None:
    """Look at all partitions that prices allow, first at those that are cheapest."""
    least = layer.bound
    reduced = layer.columns.reduced_costs(layer.prices)
    reduced -= reduced.min()
    left, part = _MOST_STEPS, _FIRST_PART
    while part >= 1 and left > 0 and goes_on():
        limit = least + -(-(layer.cost - least) // part)
        steps, found, is_done, sets = _searched(layer, reduced, limit, left)
        left -= steps
        if sets is not None:
            layer.take(sets, found)
        if not is_done:
            return
        layer.searched = found
        if layer.bound >= layer.cost:
            return
        part //= 2


def _searched(
    layer: _Layer, reduced: IntArray, limit: int, most: int
) -> tuple[int, int, bool, IntArray | None]:
    """Return steps, the least cost below ``limit``, if that is proved, and its sets."""
    columns = layer.columns
    near = np.flatnonzero(reduced <= SCALE * (limit - 1) - layer.base)
    experts = columns.experts[near]
    # Experts that are in few columns come first: they leave little to choose from.
    uses = np.bincount(experts.ravel(), minlength=columns.num_experts)
    place = np.argsort(np.argsort(uses, kind="stable"), kind="stable")
    places = place[experts]
    first = places.min(axis=1)
    order = np.lexsort((reduced[near], first))
    starts = np.searchsorted(first[order], np.arange(columns.num_experts + 1))
    chosen = np.full(layer.num_ranks, -1, dtype=np.int64)
    steps, found, is_done = search_partitions(
        places[order].astype(np.int16),
        columns.cost[near][order],
        reduced[near][order],
        starts,
        SCALE,
        layer.base,
        limit,
        most,
        chosen,
    )
    sets = experts[order[chosen]].astype(np.int64) if chosen[0] >= 0 else None
    return int(steps), int(found), bool(is_done), sets

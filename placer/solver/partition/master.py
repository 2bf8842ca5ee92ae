"""The linear program over some columns, which gives the prices that price all of them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from placer.arrays import FloatArray, Int16Array, IntArray
from placer.solver.kernels.columns import fill_triples
from placer.solver.partition.columns import SCALE, DualPrices

if TYPE_CHECKING:
    from ortools.linear_solver import pywraplp

_NOTHING = 1e-7
# Cuts that are added at once, and by how much a triple must be held too often.
_CUTS_PER_ROUND = 30
_CLEARLY = 0.02
_MOST_CUTS = 192
# Cuts need a number for every three experts.
_MOST_EXPERTS = 160


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """A solution of the linear program.

    Attributes
    ----------
    prices
        Its prices, rounded.
    experts, cost, value
        ``[K, C]`` columns that it uses, ``[K]`` their costs and how much of each.
    """

    prices: DualPrices
    experts: Int16Array
    cost: IntArray
    value: FloatArray

    @property
    def is_whole(self) -> bool:
        """Whether it uses columns whole, and so is a partition."""
        return bool((self.value > 1 - _NOTHING).all())


class Master:
    """The linear program of a set partition over the columns that were added.

    Parameters
    ----------
    num_experts
        E, of which every column has C.
    """

    def __init__(self, num_experts: int) -> None:
        # Imported where it is used: that takes as long as many solves that need no program.
        from ortools.linear_solver import pywraplp

        self._optimal = pywraplp.Solver.OPTIMAL
        self._solver = pywraplp.Solver.CreateSolver("GLOP")
        self._goal = self._solver.Objective()
        self._goal.SetMinimization()
        self._rows = [self._solver.Constraint(1, 1) for _ in range(num_experts)]
        self._variables: list[pywraplp.Variable] = []
        self._experts: list[Int16Array] = []
        self._cost: list[int] = []
        self._cuts: list[tuple[int, ...]] = []
        self._cut_rows: list[pywraplp.Constraint] = []

    def add(self, experts: Int16Array, cost: IntArray) -> None:
        """Add ``[K, C]`` columns that cost ``[K]``."""
        most = self._solver.infinity()
        for column, price in zip(experts, cost, strict=True):
            variable = self._solver.NumVar(0, most, "")
            self._goal.SetCoefficient(variable, float(price))
            for expert in column.tolist():
                self._rows[expert].SetCoefficient(variable, 1)
            for cut, row in zip(self._cuts, self._cut_rows, strict=True):
                if _holds_two(column, cut):
                    row.SetCoefficient(variable, 1)
            self._variables.append(variable)
            self._experts.append(column)
            self._cost.append(int(price))

    def solve(self) -> Solution | None:
        """Solve it; ``None`` where that fails."""
        if self._solver.Solve() != self._optimal:
            return None
        value = np.array([one.solution_value() for one in self._variables])
        used = np.flatnonzero(value > _NOTHING)
        prices = DualPrices(
            experts=_rounded(self._rows),
            cuts=np.array(self._cuts, dtype=np.int64).reshape(-1, 3),
            cut_prices=np.minimum(_rounded(self._cut_rows), 0),
        )
        experts = np.array([self._experts[n] for n in used])
        cost = np.array([self._cost[n] for n in used], dtype=np.int64)
        return Solution(prices=prices, experts=experts, cost=cost, value=value[used])

    def cut(self, solution: Solution) -> bool:
        """Add cuts that a solution breaks; return whether there are any."""
        num_experts = len(self._rows)
        room = min(_CUTS_PER_ROUND, _MOST_CUTS - len(self._cuts))
        if num_experts > _MOST_EXPERTS or room <= 0:
            return False
        held = np.empty((num_experts,) * 3)
        fill_triples(solution.experts, solution.value, held)
        worst = np.argsort(-held, axis=None, kind="stable")[:room]
        triples = np.stack(np.unravel_index(worst, held.shape), axis=1)
        broken = triples[held.ravel()[worst] > 1 + _CLEARLY]
        for triple in map(tuple, broken.tolist()):
            row = self._solver.Constraint(-self._solver.infinity(), 1)
            for variable, column in zip(self._variables, self._experts, strict=True):
                if _holds_two(column, triple):
                    row.SetCoefficient(variable, 1)
            self._cuts.append(triple)
            self._cut_rows.append(row)
        return len(broken) > 0


def _holds_two(column: Int16Array, cut: tuple[int, ...]) -> bool:
    return len(set(column.tolist()).intersection(cut)) >= 2


def _rounded(rows: "list[pywraplp.Constraint]") -> IntArray:
    values = np.array([row.dual_value() for row in rows], dtype=np.float64)
    return np.rint(SCALE * values).astype(np.int64)

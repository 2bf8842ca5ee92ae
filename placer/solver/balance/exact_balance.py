"""The most even layer, proved: numbers of replicas and their ranks as one integer program.

Two models. Of *columns*, where ranks hold one or two experts: a column is what a rank may
hold, each expert with the number of replicas that it has on all ranks, which says what load
a replica takes. The program chooses a number of replicas for every expert and a column for
every rank; bisection over the loads of columns finds the least that can be reached. Ranks
have no names in it, so no work goes into permutations of them. Of *ranks* else: which rank
holds one of how many replicas of which expert.

Legend of the shapes: E experts, R ranks, P slots, W slots per rank, C columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import TYPE_CHECKING

import numpy as np

from placer.arrays import FloatArray, IntArray
from placer.run.deadline import Deadline
from placer.solver.balance.cp_sat import repeatable_solver

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

_MOST_COLUMNS = 20_000
_MOST_VARIABLES = 2500
# Shares of loads are multiplied so that they are whole, by no more than this.
_LARGEST_SCALE = 1_000_000
_SAME = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExactBalance:
    """The best content found for the slots of one layer.

    Attributes
    ----------
    row
        ``[P]``: the expert in each slot.
    proved_max_load
        Pairs: the busiest rank of no content of these slots has less, where the replicas of
        an expert share its load evenly.
    """

    row: IntArray
    proved_max_load: float


def is_small(num_experts: int, num_ranks: int, num_slots: int) -> bool:
    """Return whether a layer is small enough for :func:`exact_balance`."""
    return _has_few_columns(num_experts, num_ranks, num_slots) or (
        num_experts * num_ranks * _most_replicas(num_experts, num_ranks, num_slots)
        <= _MOST_VARIABLES
    )


def exact_balance(
    load: FloatArray,
    best: IntArray,
    num_ranks: int,
    deterministic_time: float,
    deadline: Deadline,
) -> ExactBalance:
    """Minimise the load of the busiest rank with CP-SAT.

    Parameters
    ----------
    load
        ``[E]`` whole numbers: pairs per expert.
    best
        ``[P]``: the experts in the slots, the best content known.
    num_ranks
        R.
    deterministic_time
        Most work of CP-SAT, in its seconds that do not depend on the machine.
    deadline
        Stops it earlier.
    """
    if _has_few_columns(len(load), num_ranks, len(best)):
        return _by_columns(load, best, num_ranks, deterministic_time, deadline)
    return _by_ranks(load, best, num_ranks, deterministic_time, deadline)


def _most_replicas(num_experts: int, num_ranks: int, num_slots: int) -> int:
    """Return how many replicas an expert may have."""
    return min(num_ranks, num_slots - num_experts + 1)


def _has_few_columns(num_experts: int, num_ranks: int, num_slots: int) -> bool:
    """Return whether a rank has at most two slots, and few things to put into them."""
    width = num_slots // num_ranks
    contents = math.comb(num_experts, width)
    contents *= _most_replicas(num_experts, num_ranks, num_slots) ** width
    return width <= 2 and contents <= _MOST_COLUMNS


def _by_columns(
    load: FloatArray,
    best: IntArray,
    num_ranks: int,
    deterministic_time: float,
    deadline: Deadline,
) -> ExactBalance:
    replicas = np.bincount(best, minlength=len(load))
    reached = float((load / replicas)[best].reshape(num_ranks, -1).sum(axis=1).max())
    columns = _Columns.of(load, num_ranks, len(best))
    loads = np.unique(columns.load)
    # Of `loads`, all before `low` are proved out of reach; `high` is reached.
    low = int(np.searchsorted(loads, load.sum() / num_ranks * (1 - _SAME)))
    high = int(np.searchsorted(loads, reached * (1 - _SAME)))
    left = deterministic_time
    while low < high and left > 0 and not deadline.passed():
        middle = (low + high) // 2
        row, is_proved, used = columns.under(
            float(loads[middle]), num_ranks, left, deadline
        )
        left -= used
        if row is not None:
            best, high = row, middle
        elif is_proved:
            low = middle + 1
        else:
            break
    return ExactBalance(row=best, proved_max_load=float(loads[low]))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Columns:
    """All columns: ``[C, W]`` experts and their numbers of replicas, ``[C]`` loads."""

    num_experts: int
    experts: IntArray
    replicas: IntArray
    load: FloatArray

    @classmethod
    def of(cls, load: FloatArray, num_ranks: int, num_slots: int) -> "_Columns":
        width = num_slots // num_ranks
        numbers = range(1, _most_replicas(len(load), num_ranks, num_slots) + 1)
        choices = np.array(list(product(numbers, repeat=width)), dtype=np.int64)
        held = np.array(list(combinations(range(len(load)), width)), dtype=np.int64)
        experts = np.repeat(held, len(choices), axis=0)
        replicas = np.tile(choices, (len(held), 1))
        return cls(
            num_experts=len(load),
            experts=experts,
            replicas=replicas,
            load=(load[experts] / replicas).sum(axis=1).round(9),
        )

    def under(
        self,
        max_load: float,
        num_ranks: int,
        deterministic_time: float,
        deadline: Deadline,
    ) -> tuple[IntArray | None, bool, float]:
        """Fill the ranks with columns up to a load.

        Return the experts in the slots or ``None``, whether the answer is proved, and the
        work that it took.
        """
        from ortools.sat.python import cp_model

        model = cp_model.CpModel()
        allowed = np.flatnonzero(self.load <= max_load)
        number = [model.new_int_var(0, num_ranks, f"column_{c}") for c in allowed]
        model.add(sum(number) == num_ranks)
        having: dict[int, dict[int, list[cp_model.IntVar]]] = {}
        for variable, c in zip(number, allowed, strict=True):
            for e, replicas in zip(self.experts[c], self.replicas[c], strict=True):
                having.setdefault(int(e), {}).setdefault(int(replicas), []).append(variable)
        for e in range(self.num_experts):
            has = []
            for replicas, columns in having.get(e, {}).items():
                has.append(model.new_bool_var(f"expert_{e}_has_{replicas}"))
                model.add(sum(columns) == replicas * has[-1])
            model.add_exactly_one(has)
        solver = repeatable_solver(deterministic_time, deadline)
        status = solver.solve(model)
        used = float(solver.response_proto.deterministic_time)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None, status == cp_model.INFEASIBLE, used
        chosen = np.repeat(allowed, [solver.value(variable) for variable in number])
        return self.experts[chosen].ravel(), True, used


def _by_ranks(
    load: FloatArray,
    best: IntArray,
    num_ranks: int,
    deterministic_time: float,
    deadline: Deadline,
) -> ExactBalance:
    from ortools.sat.python import cp_model

    size, num_slots = len(load), len(best)
    numbers = range(1, _most_replicas(size, num_ranks, num_slots) + 1)
    scale = min(math.lcm(*numbers), _LARGEST_SCALE)
    # Shares that are not whole are rounded down: what is proved of them is true of loads.
    shares = [[int(value) * scale // c for c in numbers] for value in load]
    hint = np.zeros((size, num_ranks), dtype=np.bool_)
    hint[best, np.arange(num_slots) // (num_slots // num_ranks)] = True
    model = cp_model.CpModel()
    # on[e][r][c - 1]: rank r holds one of c replicas of expert e.
    on = [
        [_hinted_choice(model, f"expert_{e}_rank_{r}", numbers, here * hint[e].sum())
         for r, here in enumerate(hint[e])]
        for e in range(size)
    ]  # fmt: skip
    for e, ranks in enumerate(on):
        has = _hinted_choice(model, f"expert_{e}", numbers, int(hint[e].sum()))
        model.add_exactly_one(has)
        for n, c in enumerate(numbers):
            model.add(sum(row[n] for row in ranks) == c * has[n])
        for row in ranks:
            model.add_at_most_one(row)
    busiest = model.new_int_var(0, int(load.sum()) * scale, "busiest")
    for r in range(num_ranks):
        held = [variable for ranks in on for variable in ranks[r]]
        weights = [share for row in shares for share in row]
        model.add(sum(held) == num_slots // num_ranks)
        model.add(cp_model.LinearExpr.weighted_sum(held, weights) <= busiest)
    model.minimize(busiest)
    solver = repeatable_solver(deterministic_time, deadline)
    status = solver.solve(model)
    deadline.passed()
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        holds = [[any(map(solver.boolean_value, row)) for row in ranks] for ranks in on]
        best = np.nonzero(np.array(holds).T)[1].astype(np.int64)
    proved = math.ceil(solver.best_objective_bound - 1e-6) / scale
    return ExactBalance(row=best, proved_max_load=proved)


def _hinted_choice(
    model: "cp_model.CpModel", name: str, numbers: Sequence[int], hint: int
) -> "list[cp_model.IntVar]":
    """Return a variable for each number of replicas, of which ``hint`` is to be tried."""
    choice = [model.new_bool_var(f"{name}_of_{c}") for c in numbers]
    for variable, c in zip(choice, numbers, strict=True):
        model.add_hint(variable, c == hint)
    return choice

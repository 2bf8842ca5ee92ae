"""Exact placement by dynamic programming over the chain of layers.

Costs couple a layer only with its neighbours, so where a layer has few balanced
assignments (8 experts on 2 or 4 ranks have 70 and 2,520) the shortest path through all
of them is the optimum, proved. Load caps and pins only take assignments away.

Renaming ranks so that every distance between ranks (and every pin) stays the same changes
no cost. Values are therefore kept for one assignment of each class under such renamings,
while its predecessors run over all assignments: a factor of R! on a single node.

Legend of the shapes: A assignments of a layer, B classes of assignments, D features.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from placer.arrays import BoolArray, FloatArray, IntArray
from placer.errors import NoSolutionError
from placer.solver.problem.pairs import PlacementProblem

METHOD = "dynamic programming over all balanced assignments of every layer"
MAX_ASSIGNMENTS = 400_000
MAX_OPERATIONS = 2e11  # multiplications; about half a minute on one core
_BLOCK_ENTRIES = 1 << 22


class ChainCost(Protocol):
    """A cost over the assignments of single layers and of neighbouring layers.

    A step from assignment a of a layer to b of the next costs
    ``earlier(layer, a) @ later(layer, b)``. All values are whole numbers below 2**53 in
    float64, so that sums are exact in any order.
    """

    def single(self, layer: int, assignments: IntArray) -> FloatArray:
        """Return ``[A]``: cost inside a layer of ``assignments`` ``[A, E]``."""

    def earlier(self, layer: int, assignments: IntArray) -> FloatArray:
        """Return ``[A, D]``: features of assignments of ``layer``."""

    def later(self, layer: int, assignments: IntArray) -> FloatArray:
        """Return ``[A, D]``: features of assignments of ``layer + 1``."""

    def num_features(self, layer: int) -> int:
        """Return D of the step to the layer after ``layer``, 0 if it costs nothing."""


class ChainLimit(Protocol):
    """Which assignments, and which steps between neighbouring layers, are allowed.

    Renaming ranks changes no answer.
    """

    def allows(self, layer: int, assignments: IntArray) -> BoolArray:
        """Return ``[A]``: which of a layer's assignments ``[A, E]`` are allowed at all."""

    def steps_to(
        self, layer: int, assignments: IntArray
    ) -> Callable[[IntArray], BoolArray] | None:
        """Return a function that says which steps from the layer before are allowed.

        Its answer is ``[A, B]`` for ``assignments`` ``[B, E]`` of ``layer``; ``None``
        where all may.
        """


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairCost:
    """The pair objective of a placement problem, as a cost of the chain."""

    problem: PlacementProblem

    def single(self, layer: int, assignments: IntArray) -> FloatArray:
        """Return ``[A]``: cost of the pairs within a layer."""
        rank_cost = self.problem.topology.rank_cost()
        within = self.problem.within[layer]
        total = np.zeros(len(assignments))
        for one, two in zip(*np.nonzero(within), strict=True):
            pair_cost = rank_cost[assignments[:, one], assignments[:, two]]
            total += within[one, two] * pair_cost
        return total / 2

    def earlier(self, layer: int, assignments: IntArray) -> FloatArray:
        """Return ``[A, E * R]``: one where an expert is on a rank."""
        on_rank = assignments[:, :, None] == np.arange(self.problem.num_ranks)
        features: FloatArray = on_rank.reshape(len(assignments), -1).astype(np.float64)
        return features

    def later(self, layer: int, assignments: IntArray) -> FloatArray:
        """Return ``[A, E * R]``: cost of an earlier expert on a rank."""
        if self.problem.between is None:
            raise ValueError("this problem has no cost between layers")
        rank_cost = self.problem.topology.rank_cost()
        # [A, next E, R]: cost from every rank to the rank of a later expert.
        reach = rank_cost.T[assignments]
        cost: FloatArray = np.matmul(self.problem.between[layer], reach)
        return cost.reshape(len(assignments), -1)

    def num_features(self, layer: int) -> int:
        """Return E * R, or 0 without pairs between layers."""
        if self.problem.between is None:
            return 0
        return len(self.problem.load[layer]) * self.problem.num_ranks


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExactPlacement:
    """A proved optimum.

    Attributes
    ----------
    objective
        Its cost, the least there is.
    expert_rank
        L arrays ``[E]`` int64: the rank of every expert.
    """

    objective: float
    expert_rank: tuple[IntArray, ...]


def solve_exactly(
    problem: PlacementProblem,
    cost: ChainCost | None = None,
    allowed: Sequence[BoolArray] | None = None,
    max_operations: float = MAX_OPERATIONS,
    limit: ChainLimit | None = None,
) -> ExactPlacement | None:
    """Return a cheapest placement under the load caps, or ``None`` if there are too many.

    Parameters
    ----------
    problem
        Layers, ranks and load caps.
    cost
        What to minimise; the problem's own pair objective by default. It must not change
        when ranks are renamed without changing ``problem.topology.rank_cost()``.
    allowed
        L arrays ``[E, R]``: whether an expert may be on a rank; all may by default.
    max_operations
        Most multiplications to spend.
    limit
        What else is allowed; everything by default.

    Raises
    ------
    NoSolutionError
        If a layer has no assignment under its load cap and pins that the limit allows.
    """
    cost = PairCost(problem=problem) if cost is None else cost
    if not has_few_assignments(problem):
        return None
    counts = [num_assignments(len(load), problem.num_ranks) for load in problem.load]
    renamings = _renamings(problem.topology.rank_cost(), allowed)
    operations = _num_operations(counts, len(renamings), cost)
    # A limit's steps take as many as those of the cost.
    if operations * (1 if limit is None else 2) > max_operations:
        return None
    path = _Path(cost=cost, limit=limit)
    for layer in range(problem.num_layers):
        path.append(_states(problem, layer, renamings, allowed, limit))
    return path.cheapest()


def _num_operations(counts: Sequence[int], class_size: int, cost: ChainCost) -> float:
    """Return the multiplications that the steps between layers take."""
    return sum(
        float(count) * (after // class_size) * cost.num_features(layer)
        for layer, (count, after) in enumerate(itertools.pairwise(counts))
    )


def has_few_assignments(problem: PlacementProblem) -> bool:
    """Return whether all assignments of every layer fit in memory."""
    return (
        max(num_assignments(len(load), problem.num_ranks) for load in problem.load)
        <= MAX_ASSIGNMENTS
    )


def num_assignments(num_experts: int, num_ranks: int) -> int:
    """Return the number of ways to place experts on ranks with equal slots."""
    slots = num_experts // num_ranks
    same: int = math.factorial(slots) ** num_ranks
    return math.factorial(num_experts) // same


def balanced_assignments(
    num_experts: int, num_ranks: int, allowed: BoolArray | None = None
) -> IntArray:
    """Return ``[A, E]`` int64, all assignments with equal slots in lexicographic order."""
    slots = num_experts // num_ranks
    found = np.zeros((1, 0), dtype=np.int64)
    used = np.zeros((1, num_ranks), dtype=np.int64)
    for expert in range(num_experts):
        free = used < slots
        if allowed is not None:
            free &= allowed[expert]
        row, rank = np.nonzero(free)
        found = np.c_[found[row], rank]
        used = used[row]
        used[np.arange(len(row)), rank] += 1
    return found


def _renamings(rank_cost: FloatArray, allowed: Sequence[BoolArray] | None) -> IntArray:
    """Return ``[G, R]``: the renamings of ranks that keep every cost and every pin."""
    kept = []
    for renaming in itertools.permutations(range(len(rank_cost))):
        order = np.asarray(renaming)
        if (rank_cost[order[:, None], order] == rank_cost).all() and all(
            (mask[:, order] == mask).all() for mask in allowed or ()
        ):
            kept.append(order)
    return np.stack(kept)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _States:
    """The assignments of one layer and their classes under renaming.

    Attributes
    ----------
    assignments
        ``[A, E]``.
    class_of, renaming_of
        ``[A]``: the class of an assignment, and the renaming that makes it from the
        representative of its class.
    representative
        ``[B]``: index of the first assignment of each class.
    renamings
        ``[G, R]``.
    """

    assignments: IntArray
    class_of: IntArray
    renaming_of: IntArray
    representative: IntArray
    renamings: IntArray


def _states(
    problem: PlacementProblem,
    layer: int,
    renamings: IntArray,
    allowed: Sequence[BoolArray] | None,
    limit: ChainLimit | None,
) -> _States:
    load, num_ranks = problem.load[layer], problem.num_ranks
    found = balanced_assignments(
        len(load), num_ranks, None if allowed is None else allowed[layer]
    )
    rank_load = np.stack([(found == rank) @ load for rank in range(num_ranks)], axis=1)
    found = found[rank_load.max(axis=1) <= problem.max_load[layer]]
    if not len(found):
        raise NoSolutionError(
            f"MoE layer {layer}: no balanced assignment has at most "
            f"{problem.max_load[layer]:.0f} pairs on every rank and meets the pins",
            "relax the cap: placer solve TRACE --relax-cap --gpus-per-node M --out PLAN",
        )
    states = _classify(found, renamings)
    if limit is None:
        return states
    # Renaming changes no answer: one of each class is asked for all.
    kept = limit.allows(layer, found[states.representative])
    if not kept.any():
        raise _none_allowed(layer)
    return _classify(found[kept[states.class_of]], renamings)


def _none_allowed(layer: int) -> NoSolutionError:
    return NoSolutionError(
        f"MoE layer {layer}: no balanced assignment under the load cap keeps received "
        "copies under --max-received-copies (proved)",
        "use the best reached with --relax-cap, or raise one of the two caps",
    )


def _classify(assignments: IntArray, renamings: IntArray) -> _States:
    num_experts = assignments.shape[1]
    place = np.int64(renamings.shape[1]) ** np.arange(num_experts)[::-1]
    key = assignments @ place  # ascending, as the assignments are in lexicographic order
    class_of = np.full(len(key), -1, dtype=np.int64)
    renaming_of = np.zeros(len(key), dtype=np.int64)
    representative: list[int] = []
    for index in range(len(key)):
        if class_of[index] >= 0:
            continue
        members = np.searchsorted(key, renamings[:, assignments[index]] @ place)
        class_of[members] = len(representative)
        renaming_of[members] = np.arange(len(renamings))
        representative.append(index)
    return _States(
        assignments=assignments,
        class_of=class_of,
        renaming_of=renaming_of,
        representative=np.asarray(representative, dtype=np.int64),
        renamings=renamings,
    )


class _Path:
    """Cheapest ways to every class of the last layer, and how they came there."""

    def __init__(self, *, cost: ChainCost, limit: ChainLimit | None) -> None:
        self._cost, self._limit = cost, limit
        self._layers: list[_States] = []
        self._came_from: list[IntArray] = []  # [B] indices into the layer before
        self._value = np.zeros(0)  # [B]

    def append(self, states: _States) -> None:
        layer = len(self._layers)
        ends = states.assignments[states.representative]
        value = self._cost.single(layer, ends)
        if layer:
            step, came_from = self._step(layer - 1, ends)
            if not np.isfinite(step).any():
                raise _none_allowed(layer)
            value = value + step
            self._came_from.append(came_from)
        self._layers.append(states)
        self._value = value

    def _step(self, layer: int, ends: IntArray) -> tuple[FloatArray, IntArray]:
        """Return ``[B]`` twice: the least cost up to ``layer``, and from where."""
        states, cost = self._layers[layer], self._cost
        so_far = self._value[states.class_of]
        if not cost.num_features(layer):
            first = int(so_far.argmin())
            return np.full(len(ends), so_far[first]), np.full(len(ends), first)
        later = cost.later(layer, ends).T
        leads = None if self._limit is None else self._limit.steps_to(layer + 1, ends)
        best, came_from = np.full(len(ends), np.inf), np.zeros(len(ends), dtype=np.int64)
        size = max(1, _BLOCK_ENTRIES // max(later.shape))
        for start in range(0, len(so_far), size):
            block = states.assignments[start : start + size]
            total = cost.earlier(layer, block) @ later
            total += so_far[start : start + size, None]
            if leads is not None:
                total[~leads(block)] = np.inf
            index = total.argmin(axis=0)
            least = total[index, np.arange(len(ends))]
            better = least < best
            best[better], came_from[better] = least[better], start + index[better]
        return best, came_from

    def cheapest(self) -> ExactPlacement:
        """Trace the cheapest path back, renaming each layer's representative."""
        chosen = int(self._value.argmin())
        objective = float(self._value[chosen])
        states = self._layers[-1]
        index = int(states.representative[chosen])
        path = [states.assignments[index]]
        renaming = np.arange(states.renamings.shape[1])
        for states, came_from in zip(
            self._layers[-2::-1], self._came_from[::-1], strict=True
        ):
            index = int(came_from[chosen])
            path.append(renaming[states.assignments[index]])
            renaming = renaming[states.renamings[states.renaming_of[index]]]
            chosen = int(states.class_of[index])
        return ExactPlacement(objective=objective, expert_rank=tuple(path[::-1]))

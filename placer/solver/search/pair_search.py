"""Local search: exact layer assignments in turn, then swaps under the load cap.

With all layers but one fixed, that layer is a transportation problem (experts to ranks
with equal slots), solved exactly by min-cost flow. The load cap and the pairs within the
layer are then met by swaps, chosen by tabu search (Glover 1989) on the exact change of
cost. Layers are visited in turn until none improves; then a few layers are shaken and the
descent repeats, keeping the best (iterated local search).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

from placer.arrays import FloatArray, IntArray
from placer.run.deadline import Deadline
from placer.solver.params import SolverParams
from placer.solver.problem.pairs import PlacementProblem, rank_load


def transport(cost: FloatArray, slots_per_rank: int) -> IntArray:
    """Assign experts to ranks with equal slots at least cost.

    Parameters
    ----------
    cost
        ``[E, R]`` integers: cost of each expert on each rank.
    slots_per_rank
        E / R.

    Returns
    -------
    ndarray
        ``[E]`` int64: the rank of each expert; optimal, because the program is a
        transportation problem, whose vertices are integral.
    """
    num_experts, num_ranks = cost.shape
    expert, rank = (axis.ravel() for axis in np.indices(cost.shape))
    flow = SimpleMinCostFlow()
    arcs = flow.add_arcs_with_capacity_and_unit_cost(
        expert.astype(np.int32),
        (num_experts + rank).astype(np.int32),
        np.ones(cost.size, dtype=np.int64),
        cost.ravel().astype(np.int64),
    )
    flow.set_nodes_supplies(
        np.arange(num_experts + num_ranks, dtype=np.int32),
        np.r_[
            np.ones(num_experts, dtype=np.int64),
            np.full(num_ranks, -slots_per_rank, dtype=np.int64),
        ],
    )
    if flow.solve() != flow.OPTIMAL:
        raise RuntimeError("min-cost flow failed on a feasible transportation problem")
    used = flow.flows(arcs).reshape(cost.shape)
    rank_of_expert: IntArray = used.argmax(axis=1)
    return rank_of_expert


@dataclass(slots=True, kw_only=True)
class Search:
    """The state of a search: the rank of every expert, and the best found.

    Attributes
    ----------
    problem
        What is minimised.
    expert_rank
        L arrays ``[E]`` int64, feasible under the load cap; changed in place.
    rng
        Source of the shakes.
    params
        How long to search.
    """

    problem: PlacementProblem
    expert_rank: list[IntArray]
    rng: np.random.Generator
    params: SolverParams = field(default_factory=SolverParams)
    _rank_cost: FloatArray = field(init=False)
    _deadline: Deadline = field(init=False, default_factory=Deadline)

    def __post_init__(self) -> None:
        self._rank_cost = self.problem.topology.rank_cost()

    def run(
        self,
        progress: Callable[[int, float], None] | None = None,
        deadline: Deadline | None = None,
    ) -> float:
        """Search; ``progress`` gets round and objective. Return the best objective."""
        self._deadline = deadline = deadline or Deadline()
        best = [ranks.copy() for ranks in self.expert_rank]
        best_objective = self.problem.objective(best)
        with deadline.interruptible():
            for number in range(self.params.num_rounds + 1):
                if deadline.passed():
                    break
                self._round(number)
                objective = self.problem.objective(self.expert_rank)
                if objective < best_objective:
                    best = [ranks.copy() for ranks in self.expert_rank]
                    best_objective = objective
                else:
                    self.expert_rank[:] = [ranks.copy() for ranks in best]
                if progress is not None:
                    progress(number, best_objective)
        self.expert_rank[:] = best
        return best_objective

    def _round(self, number: int) -> None:
        """Descend everywhere; in later rounds where some layers were shaken before."""
        if number == 0:
            self._descend(set(range(self.problem.num_layers)))
            return
        num_layers = self.problem.num_layers
        shaken = self.rng.choice(num_layers, self._num_shaken(), replace=False)
        for layer in shaken:
            self._shake(int(layer))
        self._descend({n for s in shaken for n in self._with_neighbours(int(s))})

    def _num_shaken(self) -> int:
        return max(1, self.problem.num_layers // 6)

    def _with_neighbours(self, layer: int) -> list[int]:
        if self.problem.between is None:
            return [layer]
        return [
            n for n in (layer - 1, layer, layer + 1) if 0 <= n < self.problem.num_layers
        ]

    def _descend(self, dirty: set[int]) -> None:
        """Improve layers in turn until no layer whose surroundings changed improves."""
        while dirty and not self._deadline.passed():
            layer = min(dirty)
            dirty.remove(layer)
            if self._improve(layer):
                dirty |= set(self._with_neighbours(layer)) - {layer}

    def _improve(self, layer: int) -> bool:
        """Search one layer from where it is, and from its exact assignment."""
        outer = self._outer_cost(layer)
        current = self.expert_rank[layer]
        starts = [current]
        if outer.any():
            starts.append(transport(outer, self.problem.slots_per_rank(layer)))
        best, best_cost = current, self._layer_cost(layer, outer, current)
        improved = False
        for start in starts:
            found = self._tabu(layer, outer, start)
            if found is None:
                continue
            cost = self._layer_cost(layer, outer, found)
            if cost < best_cost:
                best, best_cost, improved = found, cost, True
        self.expert_rank[layer] = best
        return improved

    def _outer_cost(self, layer: int) -> FloatArray:
        """Return ``[E, R]``: cost of each expert on each rank, from other layers' pairs."""
        problem = self.problem
        cost = np.zeros((len(problem.load[layer]), problem.num_ranks))
        if problem.between is None:
            return cost
        if layer > 0:
            cost += (
                problem.between[layer - 1].T @ self._rank_cost[self.expert_rank[layer - 1]]
            )
        if layer + 1 < problem.num_layers:
            cost += problem.between[layer] @ self._rank_cost[self.expert_rank[layer + 1]]
        return cost

    def _layer_cost(self, layer: int, outer: FloatArray, ranks: IntArray) -> float:
        pair_cost = self._rank_cost[ranks[:, None], ranks]
        within = float((self.problem.within[layer] * pair_cost).sum()) / 2
        return within + float(outer[np.arange(len(ranks)), ranks].sum())

    def _tabu(self, layer: int, outer: FloatArray, start: IntArray) -> IntArray | None:
        """Walk by best swaps; return the cheapest feasible placement met, if any."""
        problem = self.problem
        walk = _SwapWalk(
            ranks=start.copy(),
            outer=outer,
            within=problem.within[layer],
            load=problem.load[layer],
            max_load=problem.max_load[layer],
            rank_cost=self._rank_cost,
        )
        return walk.best_feasible(self.params.tabu_steps, self._deadline)

    def _shake(self, layer: int) -> None:
        """Swap a few random pairs of experts of different ranks, cap or no cap."""
        ranks = self.expert_rank[layer].copy()
        for _ in range(max(2, len(ranks) // 8)):
            one, two = self.rng.choice(len(ranks), 2, replace=False)
            ranks[one], ranks[two] = ranks[two], ranks[one]
        repaired = self._tabu(layer, self._outer_cost(layer), ranks)
        if repaired is not None:
            self.expert_rank[layer] = repaired


@dataclass(slots=True, kw_only=True)
class _SwapWalk:
    """Tabu search over swaps in one layer, everything outside it fixed."""

    ranks: IntArray
    outer: FloatArray
    within: FloatArray
    load: FloatArray
    max_load: float
    rank_cost: FloatArray

    def best_feasible(self, num_steps: int, deadline: Deadline) -> IntArray | None:
        """Return the cheapest placement under the cap that the walk meets."""
        num_experts = len(self.ranks)
        tenure = max(3, num_experts // 6)
        free_from = np.zeros(num_experts, dtype=np.int64)
        price = self._initial_price()
        cost, best_cost, best = 0.0, np.inf, None
        if self._overflow() == 0:
            best_cost, best = 0.0, self.ranks.copy()
        for step in range(num_steps):
            if deadline.passed():
                break
            change = self._cost_change()
            relief = self._overflow_change()
            blocked = (free_from[:, None] > step) | (free_from > step)
            aspires = (cost + change < best_cost) & (self._overflow() + relief <= 0)
            score = change + price * relief
            score[(blocked & ~aspires) | (self.ranks[:, None] == self.ranks)] = np.inf
            one, two = divmod(int(score.argmin()), num_experts)
            if not np.isfinite(score[one, two]):
                break
            cost += float(change[one, two])
            self.ranks[one], self.ranks[two] = self.ranks[two], self.ranks[one]
            free_from[[one, two]] = step + tenure
            feasible = self._overflow() == 0
            if feasible and cost < best_cost:
                best_cost, best = cost, self.ranks.copy()
            # Strategic oscillation: costlier overload while over the cap, cheaper below it.
            price = price / 1.3 if feasible else price * 1.3
        return best

    def _initial_price(self) -> float:
        # A pair of load over the cap costs about what a remote pair costs.
        return float(self.rank_cost.max())

    def _rank_load(self) -> FloatArray:
        return rank_load(self.ranks, self.load, len(self.rank_cost))

    def _overflow(self) -> float:
        return float(np.maximum(self._rank_load() - self.max_load, 0).sum())

    def _cost_change(self) -> FloatArray:
        """Return ``[E, E]``: exact change of cost when two experts swap ranks."""
        cost = self.outer + self.within @ self.rank_cost[self.ranks]
        at = cost[:, self.ranks]
        gain = at - np.diagonal(at)[:, None]
        # A pair that swaps stays as far apart as it was, which the two gains overlook.
        apart = self.within * self.rank_cost[self.ranks[:, None], self.ranks]
        change: FloatArray = gain + gain.T + 2 * apart
        return change

    def _overflow_change(self) -> FloatArray:
        """Return ``[E, E]``: change of the load above the cap when two experts swap."""
        load = self._rank_load()[self.ranks]
        moved = self.load - self.load[:, None]
        here = np.maximum(load[:, None] + moved - self.max_load, 0)
        before = np.maximum(load - self.max_load, 0)
        rise: FloatArray = here - before[:, None]
        return rise + rise.T

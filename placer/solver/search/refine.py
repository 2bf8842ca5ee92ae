"""The last phase: moves of experts, judged by the copies of recorded tokens.

Pairs of experts, which the search before minimises, stand in for traffic; here every
proposal is priced exactly on the profile's tokens: distinct ranks and nodes, the way to the
home and from it, whichever replica serves. Simulated annealing over swaps of two experts
(and over which experts have replicas), then a descent until no move pays; where homes
follow the replicas that serve, what that left above a cap is repaired last.

Legend of the shapes: L MoE layers, T tokens, E logical experts.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from placer.arrays import BoolArray, FloatArray, Int16Array, IntArray
from placer.placement.placement import Placement
from placer.run.deadline import Deadline
from placer.solver.kernels.moves import anneal, descend
from placer.solver.params import SolverParams
from placer.solver.problem.traffic import TrafficProblem
from placer.solver.search.evaluation import SAME_OVERFLOW, is_better
from placer.solver.search.evaluator import Evaluator
from placer.solver.search.layer_state import RULES

_NUM_CORES = os.cpu_count() or 1

#: Told the sweep and the copies after it.
TellSweep = Callable[[int, int, float], None]


def refined(
    placement: Placement,
    problem: TrafficProblem,
    params: SolverParams,
    *,
    seed: int = 0,
    num_threads: int | None = None,
    progress: TellSweep | None = None,
    deadline: Deadline | None = None,
) -> Placement:
    """Return a placement that costs no more.

    Of a placement above a cap, one that is nearer to it, whatever it costs. Copies are
    priced per token and MoE layer (cheapest copy 1), without what else is priced:
    bounds are only of them.

    Parameters
    ----------
    placement
        Where to start.
    problem
        What is minimised.
    params
        How long to search, and how.
    seed
        Seed of the moves.
    num_threads
        Layers that do not touch each other are worked on at once, by default on all cores;
        the result does not depend on it.
    progress
        Told every sweep: its number from 1, how many there are, and the copies.
    deadline
        When to stop.
    """
    deadline = deadline or Deadline()
    if deadline.passed():
        return placement
    began = time.monotonic()
    search = _Refinement(
        at=Evaluator(problem, placement),
        params=params,
        seed=seed,
        num_threads=num_threads or _NUM_CORES,
    )
    best = search.snapshot()
    deadline.needs(2 * (time.monotonic() - began))  # to be priced anew at the end
    for start in range(search.num_starts()):
        if deadline.passed():
            break
        if start:
            search.at.put(placement)
        with deadline.interruptible(), deadline.keeping(search.share_of_repair()):
            search.improve(start, progress, deadline)
        best = search.better(best, search.snapshot())
    if search.share_of_repair():
        with deadline.interruptible():
            search.repair(np.ones(problem.num_layers, dtype=np.bool_), deadline)
        best = search.better(best, search.snapshot())
    return replace(placement, physical_to_logical_map=best.slots)


def repaired(
    placement: Placement,
    problem: TrafficProblem,
    params: SolverParams,
    layers: BoolArray,
    *,
    seed: int,
    deadline: Deadline,
) -> Placement:
    """Return a placement nearer to its caps in some ``[L]`` layers, the others kept."""
    search = _Refinement(at=Evaluator(problem, placement), params=params, seed=seed)
    search.repair(layers, deadline)
    rows = zip(
        layers, search.snapshot().slots, placement.physical_to_logical_map, strict=True
    )
    chosen = tuple(new if is_chosen else old for is_chosen, new, old in rows)
    return replace(placement, physical_to_logical_map=chosen)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Snapshot:
    """A state of the search: L maps, ``[L]`` prices and ``[2, L]`` what is above caps."""

    slots: tuple[IntArray, ...]
    price: FloatArray
    overflow: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class _Refinement:
    """The optimiser: it changes the states of an evaluator."""

    at: Evaluator
    params: SolverParams
    seed: int
    num_threads: int = 1

    @property
    def problem(self) -> TrafficProblem:
        return self.at.problem

    def num_starts(self) -> int:
        """Return how often to anneal: as often as all proposals fit into the limit."""
        params, layers = self.params, range(self.problem.num_layers)
        if self.problem.policy != "fixed" or not params.num_sweeps or self.at.has_replicas:
            return 1
        times = min(self._allowed_moves(n) / self._all_moves(n) for n in layers)
        return max(1, min(params.num_starts, int(times)))

    def share_of_repair(self) -> float:
        """Return the share of the time that repairs after the moves may need."""
        repairs = self.problem.policy == "follow" and self.at.has_replicas
        return self.params.share_of_repair if repairs else 0.0

    def improve(
        self,
        start: int,
        progress: TellSweep | None,
        deadline: Deadline,
    ) -> None:
        """Anneal, then descend until no move pays; each ``start`` has seeds of its own."""
        params = self.params
        num_sweeps = params.num_sweeps
        if self.problem.policy == "fixed" and self.at.has_replicas:
            # Each token stands for one home there: the best of several fits these.
            num_sweeps *= self.params.num_starts
        first = 2 * num_sweeps * start
        for sweep in range(num_sweeps):
            if deadline.passed():
                return
            cooled = params.cooling ** (sweep / max(num_sweeps - 1, 1))
            share = params.first_temperature * cooled
            self._sweep(share, first + sweep, deadline)
            if progress is not None:
                copies = self.at.per_token(sum(self.at.price_copies()))
                total = num_sweeps * self.num_starts()
                progress(num_sweeps * start + sweep + 1, total, copies)
        for number in range(first + num_sweeps, first + 2 * num_sweeps):
            if deadline.passed() or self._sweep(None, number, deadline) == 0:
                return

    def repair(self, layers: BoolArray, deadline: Deadline) -> None:
        """Descend in those of the ``[L]`` layers that are above a cap, in their order.

        Which replicas serve a layer of ``follow`` depends on earlier layers, and each sweep
        changes some of these after it has visited the layer. A search that was stopped is
        repaired all the same, in the time that is kept for it: few layers are above a cap.
        """
        homes = [self.at.first_homes()]
        first = 2 * self.params.num_sweeps
        for layer in range(self.problem.num_layers):
            for number in range(first, first + self.params.num_repairs * layers[layer]):
                if deadline.left() == 0.0:
                    return
                self.at.price_layer(self.at.tokens(layer, homes=homes), layer)
                if (self.at.overflow(layer) <= SAME_OVERFLOW).all():
                    break
                self._visit(layer, None, number, homes)
            if self.problem.policy == "follow":
                homes.append(self.at.next_homes(layer, homes[-1]))

    def better(self, one: _Snapshot, other: _Snapshot) -> _Snapshot:
        """Choose between two states, layer by layer where layers do not link."""
        if self.problem.policy == "follow":
            lost = is_better(
                one.overflow.sum(axis=1),
                one.price.sum(),
                other.overflow.sum(axis=1),
                other.price.sum(),
            )
            return one if lost else other
        lost_layers = list(
            map(is_better, one.overflow.T, one.price, other.overflow.T, other.price)
        )
        return _Snapshot(
            slots=tuple(
                old if lost else new
                for old, new, lost in zip(one.slots, other.slots, lost_layers, strict=True)
            ),
            price=np.where(lost_layers, one.price, other.price),
            overflow=np.where(lost_layers, one.overflow, other.overflow),
        )

    def _sweep(self, share: float | None, number: int, deadline: Deadline) -> float:
        """Visit every layer: at a temperature, or descending. Return the change.

        Layers that are not visited before the ``deadline`` stay as they are.
        """
        layers = range(self.problem.num_layers)
        linked = self.problem.policy == "follow"
        changed = 0.0
        with ThreadPoolExecutor(self.num_threads) as pool:
            for group in (layers[0::2], layers[1::2]) if linked else (layers,):
                homes = self.at.all_homes() if linked else None
                visits = [(layer, share, number, homes) for layer in group]
                changed += sum(
                    pool.map(
                        lambda visit: 0.0 if deadline.passed() else self._visit(*visit),
                        visits,
                    )
                )
        return changed

    def _visit(
        self, layer: int, share: float | None, number: int, homes: list[Int16Array] | None
    ) -> float:
        tokens = self.at.tokens(layer, homes=homes)
        state, prices = self.at.states[layer], self.at.prices[layer]
        cost = self.at.price_layer(tokens, layer)
        kind = self._kind(layer)
        rule = RULES[self.problem.replica_choice]
        moves = self._num_moves(layer)
        seed = np.random.SeedSequence([self.seed, number, layer]).generate_state(1, "u8")
        if share is not None:
            args = (kind, rule, share * cost, moves, seed[0] | np.uint64(1))
            return float(anneal(tokens, prices, state, *args))
        if moves < self._all_moves(layer):
            args = (kind, rule, 0.0, moves, seed[0] | np.uint64(1))
            return float(anneal(tokens, prices, state, *args))
        return float(descend(tokens, prices, state, kind, rule))

    def _num_moves(self, layer: int) -> int:
        """Return the proposals of a visit: all pairs of slots, or what the limit allows."""
        return max(1, min(self._all_moves(layer), int(self._allowed_moves(layer))))

    def _all_moves(self, layer: int) -> int:
        return int(self.at.states[layer].slots.size ** 2 // 2)

    def _allowed_moves(self, layer: int) -> float:
        params, num_experts = self.params, len(self.at.states[layer].holds)
        visited = 2 * self.at.profiles[layer].experts.size / num_experts
        num_visits = self.problem.num_layers * max(2 * params.num_sweeps, 1)
        return params.num_visited_tokens / (visited * num_visits)

    def _kind(self, layer: int) -> IntArray:
        if self.problem.kind is None:
            return np.zeros(len(self.at.states[layer].holds), dtype=np.int64)
        return self.problem.kind[layer]

    def snapshot(self) -> _Snapshot:
        """Return where the search is, experts of a rank in ascending order."""
        price = self.at.price_per_layer()
        return _Snapshot(
            slots=tuple(
                np.sort(state.slots, axis=1).ravel().astype(np.int64)
                for state in self.at.states
            ),
            price=price,
            overflow=self.at.overflow_per_layer(),
        )

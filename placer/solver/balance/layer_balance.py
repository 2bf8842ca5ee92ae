"""One balanced layer: numbers of replicas, the experts of each rank, and a bound.

Legend of the shapes: E experts, R ranks, P slots.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from placer.arrays import FloatArray, IntArray
from placer.model import ModelSpec
from placer.placement.placement import Placement, holders
from placer.run.deadline import Deadline
from placer.solver.balance.even_out import EvenOut, MoveCost
from placer.solver.balance.exact_balance import exact_balance, is_small
from placer.solver.balance.load_caps import balance_layer, least_max_load
from placer.solver.balance.packing import num_replicas, packed
from placer.solver.balance.served_load import ServedLoad
from placer.solver.options import SolveOptions
from placer.target.engine import ReplicaChoice

# CP-SAT is left out where its model would be large; greedy and swaps are close there.
_EXACT_VARIABLES = 4096
# An imbalance this close to its bound is not worth an exact search.
_CLOSE = 1.01
# Replicas are made by loads to these powers: below 1, fewer of hot experts and more of
# others, which fit in next to them.
# Who serves depends on the ranks of the replicas; so often they are all moved on by one.
_MOST_ROLLS = 16
_POWERS = (1.0, 0.85, 0.7, 0.4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Balancing:
    """The options of balancing.

    Attributes
    ----------
    num_ranks, num_nodes
        The topology.
    redundant_experts
        Slots per layer beyond one for each expert.
    max_imbalance
        What must be reached where it can be; else less than a percent above the bound is
        even enough.
    replica_choice
        Which replica serves: ``local-first``, ``sglang-static`` or ``hash``.
    layer_ids
        ``[L]``: the model's own layer number of each MoE layer, or ``None``.
    n_group, num_blocks
        Router groups that stay whole, and blocks of neighbouring ranks that share them out
        in equal numbers; 1 block where groups do not count.
    start
        What is served now, or ``None``.
    migration_cost
        Pairs of a layer's busiest rank that moving one expert from where the start has it
        is worth.
    """

    num_ranks: int
    num_nodes: int = 1
    redundant_experts: int = 0
    max_imbalance: float = np.inf
    replica_choice: ReplicaChoice = "hash"
    layer_ids: tuple[int, ...] | None = None
    n_group: int = 1
    num_blocks: int = 1
    start: Placement | None = None
    migration_cost: float = 0.0

    @classmethod
    def of(cls, options: SolveOptions, model: ModelSpec, num_blocks: int = 1) -> Self:
        """Return what the options ask of a balanced plan made anew."""
        topology, goal = options.topology, options.goal
        return cls(
            num_ranks=topology.num_ranks,
            num_nodes=topology.num_nodes,
            redundant_experts=goal.redundant_experts,
            max_imbalance=goal.caps.load_cap,
            replica_choice=goal.replica_choice or "hash",
            layer_ids=model.layer_ids,
            n_group=model.n_group if num_blocks > 1 else 1,
            num_blocks=num_blocks,
        )

    @property
    def ranks_per_block(self) -> int:
        """Ranks of a block."""
        return self.num_ranks // self.num_blocks

    @property
    def splits_evenly(self) -> bool:
        """Whether replicas share their expert's load evenly."""
        near_is_all = self.replica_choice == "local-first" and self.num_nodes == 1
        return not self.redundant_experts or near_is_all or self.replica_choice == "hash"


class LayerBalance:
    """A layer and the placements of it that are worth serving.

    Parameters
    ----------
    load
        ``[E]`` whole numbers: pairs per expert.
    asked
        The options of balancing.
    start
        ``[P]``: the experts in the slots now, or ``None``.
    deterministic_time
        Most work of CP-SAT on replicas.
    deadline
        Stops CP-SAT.

    Attributes
    ----------
    row
        ``[P]``: the most even content of the slots if replicas share evenly.
    bound
        No imbalance of these slots is below it, groups as whole as asked.
    """

    def __init__(
        self,
        load: FloatArray,
        asked: Balancing,
        start: IntArray | None,
        deterministic_time: float,
        deadline: Deadline,
    ) -> None:
        self._load, self._asked, self._start = load, asked, start
        self._num_slots = len(load) + asked.redundant_experts
        self._seconds, self._deadline = deterministic_time, deadline
        self._mean = float(load.sum()) / asked.num_ranks
        least = _least_load(load, asked.num_ranks, self._num_slots)
        self._experts, of_groups = self._blocks()
        self._least = max(least, of_groups)
        cap = asked.max_imbalance * self._mean
        self._enough = min(_CLOSE * self._least, max(cap, self._least))
        filled = [self._filled(experts) for experts in self._experts]
        self.row = np.concatenate([row for row, _ in filled])
        if asked.n_group == asked.num_blocks or asked.num_blocks == 1:
            self._least = max(self._least, *(proved for _, proved in filled))
        self.bound = self._least / self._mean if load.any() else 1.0

    def served(self, served: ServedLoad) -> IntArray:
        """Return the row ``[P]`` that is best as replicas serve in this layer."""
        best, reached = self.row, (np.inf, np.inf)
        for row in self._candidates(served):
            value = self._value(row, served)
            if value < reached:
                best, reached = row, value
            if self._start is None and value[1] <= self._enough:
                break
        return best

    def _blocks(self) -> tuple[list[IntArray], float]:
        """Return the experts of each block of ranks, and a load that some rank has."""
        asked, load = self._asked, self._load
        if asked.num_blocks == 1:
            return [np.arange(len(load))], 0.0
        groups = load.reshape(asked.n_group, -1).sum(axis=1)
        # Few groups: longest first and swaps are the best, or all but.
        found = balance_layer(groups, asked.num_blocks, np.inf)
        block = np.repeat(found.expert_rank, len(load) // asked.n_group)
        experts = [np.flatnonzero(block == one) for one in range(asked.num_blocks)]
        return experts, found.proved_max_load / asked.ranks_per_block

    def _filled(self, experts: IntArray) -> tuple[IntArray, float]:
        """Return what the slots of a block hold, and a load that one of its ranks has."""
        load, num_ranks = self._load[experts], self._asked.ranks_per_block
        num_slots = self._num_slots // self._asked.num_blocks
        if num_slots == len(load):
            is_large = len(load) * num_ranks > _EXACT_VARIABLES
            enough = np.inf if is_large else self._enough
            alone = balance_layer(load, num_ranks, enough, self._deadline)
            row = np.argsort(alone.expert_rank, kind="stable")
            return experts[row], alone.proved_max_load
        tried = []
        for power in _POWERS:
            row = packed(load**power, num_ranks, num_slots)
            tried.append(EvenOut(row, load, num_ranks).run(self._enough))
            if tried[-1].most_load <= self._enough:
                break
        best = min(tried, key=lambda one: one.most_load)
        if (
            best.most_load <= self._enough
            or not self._asked.splits_evenly
            or not is_small(len(load), num_ranks, num_slots)
            or self._deadline.passed()
        ):
            return experts[best.row], 0.0
        found = exact_balance(load, best.row, num_ranks, self._seconds, self._deadline)
        tried.append(EvenOut(found.row, load, num_ranks))
        best = min(tried, key=lambda one: one.most_load)
        return experts[best.row], found.proved_max_load

    def _candidates(self, served: ServedLoad) -> Iterator[IntArray]:
        if self._start is not None:
            cost = MoveCost(
                start=holders(self._start, len(self._load), self._asked.num_ranks),
                price=self._asked.migration_cost,
                most_load=self._asked.max_imbalance * self._mean,
            )
            held = self._start.reshape(self._asked.num_blocks, -1)
            experts = [np.unique(one) for one in held]
            yield self._start
            yield self._evened_out(self._start, experts, served, cost)
        yield self._evened_out(self.row, self._experts, served)
        if self._asked.splits_evenly or self._start is not None:
            return
        blocks = self.row.reshape(self._asked.num_blocks, self._asked.ranks_per_block, -1)
        for number in range(1, min(_MOST_ROLLS, self._asked.ranks_per_block)):
            rolled = np.roll(blocks, number, axis=1)
            yield self._evened_out(rolled.ravel(), self._experts, served)

    def _value(self, row: IntArray, served: ServedLoad) -> tuple[float, float]:
        """Return the load above the cap, and the busiest rank's with the price of moves."""
        holds = holders(row, len(self._load), self._asked.num_ranks)
        most = float((self._load @ served.shares(holds)).max())
        moved = 0
        if self._start is not None:
            start = holders(self._start, len(self._load), self._asked.num_ranks)
            moved = int((holds & ~start).sum())
        above = max(0.0, most - self._asked.max_imbalance * self._mean)
        return above, most + self._asked.migration_cost * moved

    def _evened_out(
        self,
        row: IntArray,
        experts: list[IntArray],
        served: ServedLoad,
        cost: MoveCost | None = None,
    ) -> IntArray:
        """Return a row after the moves that pay, as replicas serve, inside each block."""
        if cost is not None:
            row = self._moved(row, experts, None, cost)
        if not self._asked.splits_evenly:
            holds = holders(row, len(self._load), self._asked.num_ranks)
            served_load = self._load[:, None] * served.shares(holds)
            row = self._moved(row, experts, served_load, cost)
        return row

    def _moved(
        self,
        row: IntArray,
        experts: list[IntArray],
        served: FloatArray | None,
        cost: MoveCost | None,
    ) -> IntArray:
        width = self._asked.ranks_per_block
        # Below the mean of the fullest block nothing is gained.
        floor = max(float(self._load[one].sum()) for one in experts) / width
        moved = []
        for block, own in enumerate(experts):
            ranks = slice(block * width, (block + 1) * width)
            held = row.reshape(self._asked.num_ranks, -1)[ranks].ravel()
            even = EvenOut(
                np.searchsorted(own, held),
                self._load[own],
                width,
                None if served is None else served[own, ranks],
                cost and replace(cost, start=cost.start[own, ranks]),
            )
            moved.append(own[even.run(self._enough, floor).row])
        return np.concatenate(moved)


def _least_load(load: FloatArray, num_ranks: int, num_slots: int) -> float:
    """Return a load that the busiest rank has, whoever serves.

    One rank has at least the mean, and at least the heaviest replica. Replicas made one by
    one of whatever is heaviest make the heaviest replica as light as it can be.
    """
    if num_slots == len(load):
        return least_max_load(load, num_ranks)
    heaviest = float((load / num_replicas(load, num_ranks, num_slots)).max())
    return max(heaviest, float(load.sum()) / num_ranks)

"""The placement problem: what a placement costs, and which placements are allowed.

Traffic is approximated by pairs of experts, counted from a trace (see ``affinity``): a
pair that one token uses costs nothing where both experts share a rank, ``intra_cost``
where they share a node, ``inter_cost`` otherwise. All costs are integers, held in
float64, so every sum is exact and independent of the machine.

Legend of the shapes: L MoE layers, E logical experts of a layer, R ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from placer.affinity import Affinity
from placer.arrays import FloatArray, IntArray
from placer.errors import PlacerError
from placer.placement.imbalance import imbalance
from placer.placement.policy import Policy
from placer.placement.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacementProblem:
    """Minimise the cost of remote pairs, with equal slots and a load cap.

    Attributes
    ----------
    objective_name
        What the cost counts.
    between
        L-1 arrays ``[E_l, E_{l+1}]`` float64: weight of a pair of experts in
        neighbouring layers, or ``None``.
    within
        L arrays ``[E, E]`` float64, symmetric, zero diagonal: weight of an unordered pair
        of experts of one layer.
    load
        L arrays ``[E]`` float64: (token, expert) pairs of each expert.
    max_load
        ``[L]``: most load that a rank may carry, in pairs; whole numbers.
    topology
        The ranks.
    """

    objective_name: str
    between: tuple[FloatArray, ...] | None
    within: tuple[FloatArray, ...]
    load: tuple[FloatArray, ...]
    max_load: tuple[float, ...]
    topology: Topology

    @property
    def num_layers(self) -> int:
        """Number of MoE layers, L."""
        return len(self.load)

    @property
    def num_ranks(self) -> int:
        """Number of ranks, R."""
        return self.topology.num_ranks

    @property
    def has_pairs(self) -> bool:
        """Whether any token uses two experts, in a layer or one after the other."""
        return any(one.any() for one in (*self.within, *(self.between or ())))

    def slots_per_rank(self, layer: int) -> int:
        """Experts that each rank holds in a layer."""
        return len(self.load[layer]) // self.num_ranks

    def rank_load(self, layer: int, expert_rank: IntArray) -> FloatArray:
        """Return ``[R]``: load of each rank, in pairs."""
        return rank_load(expert_rank, self.load[layer], self.num_ranks)

    def imbalance(self, layer: int, expert_rank: IntArray) -> float:
        """Return max/mean rank load of a layer (1.0 for a layer without load)."""
        return imbalance(self.rank_load(layer, expert_rank))

    def objective(self, expert_rank: Sequence[IntArray]) -> float:
        """Return the cost of a placement: rank of every expert, L arrays ``[E]``."""
        rank_cost = self.topology.rank_cost()
        total = 0.0
        for layer, ranks in enumerate(expert_rank):
            cost = rank_cost[ranks[:, None], ranks]
            total += float((self.within[layer] * cost).sum()) / 2
            if self.between is not None and layer + 1 < self.num_layers:
                cost = rank_cost[ranks[:, None], expert_rank[layer + 1]]
                total += float((self.between[layer] * cost).sum())
        return total

    def is_feasible(self, expert_rank: Sequence[IntArray]) -> bool:
        """Return whether every rank of every layer stays under its load cap."""
        return all(
            self.rank_load(layer, ranks).max() <= self.max_load[layer]
            for layer, ranks in enumerate(expert_rank)
        )

    def admitting(self, expert_rank: Sequence[IntArray]) -> Self:
        """Return the same problem with caps raised where a placement is above them.

        Bounds of it hold for that placement too: pins, groups or a start that is served
        may keep a placement above a cap that others meet.
        """
        caps = (
            max(self.max_load[layer], float(self.rank_load(layer, ranks).max()))
            for layer, ranks in enumerate(expert_rank)
        )
        return replace(self, max_load=tuple(caps))


def rank_load(expert_rank: IntArray, load: FloatArray, num_ranks: int) -> FloatArray:
    """Return ``[R]``: load of each rank in pairs, from the rank and load of each expert."""
    return np.bincount(expert_rank, load, minlength=num_ranks).astype(np.float64)


def placement_problem(
    affinity: Affinity, policy: Policy, topology: Topology, max_load: Sequence[float]
) -> PlacementProblem:
    """Build the problem of a home policy, exchange ``per-rank``.

    ``fixed`` counts pairs within a layer: with homes that ignore content, a token costs
    one copy per distinct rank of its experts, so only same-layer co-activation matters.
    ``follow`` counts ordered pairs within a layer, which decide how many ranks a token
    visits, and pairs of neighbouring layers, which decide how many of those it is already
    on (ExFlow, arXiv 2401.08383, section IV, counts only the latter).

    Raises
    ------
    PlacerError
        If the affinity holds only loads.
    """
    if not affinity.has_links:
        raise PlacerError(
            "loads do not show pairs of experts, so only balance can be solved for",
            "record tokens: placer record --help, or placer import --help",
        )
    between: tuple[FloatArray, ...] | None
    between = tuple(counts.astype(np.float64) for counts in affinity.transition)
    within = tuple(counts.astype(np.float64) for counts in affinity.coactivation)
    if policy == "fixed":
        between, name = None, "pairs of one token and layer on different ranks"
    else:
        within = tuple(2 * counts for counts in within)
        name = (
            "ordered pairs of one token, in one or neighbouring layers, on different ranks"
        )
    return PlacementProblem(
        objective_name=name,
        between=between,
        within=within,
        load=tuple(counts.astype(np.float64) for counts in affinity.load),
        max_load=tuple(max_load),
        topology=topology,
    )

"""The proof of every layer of a placement, and the placement that it finds."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from ortools.graph.python.linear_sum_assignment import SimpleLinearSumAssignment

from placer.arrays import BoolArray, IntArray
from placer.placement.placement import Placement
from placer.solver.partition.columns import (
    Columns,
    Limits,
    all_columns,
    cost_of_sets,
    num_columns,
)
from placer.solver.partition.layer import LayerProof, prove_layer
from placer.solver.problem.pairs import PlacementProblem
from placer.solver.problem.traffic import TrafficProblem
from placer.solver.proof.copies import TokenSets

#: Sets of experts of a layer that are looked at by default, and in a full proof.
QUICK_COLUMNS, FULL_COLUMNS = 1 << 20, 12_000_000
# Copies that a rank may receive above its cap for rounding, as ``SAME_OVERFLOW`` has it.
_ROUNDING = 0.05


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PinsAndGroups:
    """Experts that must stay together, or on their ranks.

    Attributes
    ----------
    n_group
        Router groups that stay whole; 1: none need.
    pinned
        L arrays ``[E]`` bool: experts that stay on their ranks; ``None``: all may move.
    """

    n_group: int = 1
    pinned: tuple[BoolArray, ...] | None = None

    def labels(self, layer: int, ranks: IntArray, size: int) -> IntArray | None:
        """Return ``[E]``: experts of different labels share no rank, but those of -1."""
        num_experts = len(ranks)
        if self.pinned is not None and self.pinned[layer].any():
            return np.where(self.pinned[layer], ranks, -1)
        if self.n_group > 1 and num_experts // self.n_group >= size:
            return np.arange(num_experts) * self.n_group // num_experts
        return None

    def together(self, layer: int, ranks: IntArray, size: int) -> Iterator[tuple[int, ...]]:
        """Yield the sets of experts of which a rank holds all or none."""
        num_experts = len(ranks)
        if self.pinned is not None and self.pinned[layer].any():
            pinned = np.flatnonzero(self.pinned[layer])
            for rank in np.unique(ranks[pinned]):
                yield tuple(pinned[ranks[pinned] == rank].tolist())
        elif self.n_group > 1 and num_experts // self.n_group < size:
            for group in np.arange(num_experts).reshape(self.n_group, -1):
                yield tuple(group.tolist())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layer:
    """One layer as a set partition: its tokens, limits and placement."""

    tokens: TokenSets
    load: IntArray
    limits: Limits
    sets: IntArray

    @property
    def size(self) -> int:
        return int(self.sets.shape[1])

    def columns(self) -> Columns:
        rows, weight = self.tokens.experts, self.tokens.num_tokens
        return all_columns(rows, weight, self.load, self.size, self.limits)

    def cost(self) -> IntArray:
        return cost_of_sets(self.tokens.experts, self.tokens.num_tokens, list(self.sets))


def prove_layers(
    tokens: Sequence[TokenSets],
    placement: Placement,
    problem: PlacementProblem,
    traffic: TrafficProblem,
    kept: PinsAndGroups,
    most_columns: int,
    goes_on: Callable[[], bool],
) -> Iterator[LayerProof | None]:
    """Prove the layers of a placement without replicas, one after the other.

    Parameters
    ----------
    tokens
        L: the sets of experts that tokens use.
    placement
        Where the search ended. Where no placement under a cap is found, what it holds is
        allowed.
    problem, traffic
        The caps on load and on received copies.
    kept
        Pins and router groups.
    most_columns
        Layers with more sets of experts are left out: ``None``.
    goes_on
        Asked between steps whether to go on.
    """
    for layer, own in enumerate(tokens):
        size = problem.slots_per_rank(layer)
        num_experts = placement.num_experts[layer]
        few = num_columns(num_experts, size) <= most_columns
        if size < 2 or problem.num_ranks < 2 or not few or not goes_on():
            yield None
            continue
        one = _layer_of(layer, own, placement, problem, traffic, kept)
        yield _under_cap(one, _most_cost(traffic), goes_on) or prove_layer(
            one.columns(), one.sets, one.cost(), goes_on
        )


def _under_cap(
    layer: _Layer, most_cost: int, goes_on: Callable[[], bool]
) -> LayerProof | None:
    """Prove a layer under a cap on received copies that its placement is above.

    Each of its sets takes part at a cost that no partition under the cap has. ``None``
    where it is under the cap, or no partition under the cap was found.
    """
    if layer.limits.most_cost <= most_cost:
        return None
    num_ranks = len(layer.sets)
    too_much = np.full(num_ranks, num_ranks * most_cost + 1)
    limits = replace(layer.limits, most_cost=most_cost)
    columns = replace(layer, limits=limits).columns()
    if len(columns.cost) < num_ranks:
        return None
    found = prove_layer(columns, layer.sets, too_much, goes_on)
    return found if found.cost < too_much[0] else None


def _layer_of(
    layer: int,
    tokens: TokenSets,
    placement: Placement,
    problem: PlacementProblem,
    traffic: TrafficProblem,
    kept: PinsAndGroups,
) -> _Layer:
    num_ranks, size = problem.num_ranks, problem.slots_per_rank(layer)
    row = placement.physical_to_logical_map[layer]
    sets = np.sort(row.reshape(num_ranks, size), axis=1)
    ranks = placement.expert_rank(layer)
    load = problem.load[layer].astype(np.int64)
    most_load = max(math.floor(problem.max_load[layer]), int(load[sets].sum(axis=1).max()))
    cost = cost_of_sets(tokens.experts, tokens.num_tokens, list(sets))
    limits = Limits(
        least_load=int(load.sum()) - (num_ranks - 1) * most_load,
        most_load=most_load,
        most_cost=max(_most_cost(traffic), int(cost.max())),
        together=tuple(kept.together(layer, ranks, size)),
        apart=kept.labels(layer, ranks, size),
    )
    return _Layer(tokens=tokens, load=load, limits=limits, sets=sets)


def _most_cost(traffic: TrafficProblem) -> int:
    """Return the most tokens that may use a rank; it is home to one in R of them."""
    most = traffic.caps.max_received_copies
    if most is None or traffic.policy != "fixed":
        return traffic.num_tokens
    others = traffic.topology.num_ranks - 1
    return math.floor(most * traffic.num_tokens / others + _ROUNDING)


def with_best_sets(
    placement: Placement, proofs: Sequence[LayerProof | None], kept: PinsAndGroups
) -> Placement:
    """Return the placement of the best sets, each on the rank that holds most of it."""
    rows = []
    for layer, (row, proof) in enumerate(
        zip(placement.physical_to_logical_map, proofs, strict=True)
    ):
        if proof is None:
            rows.append(row)
            continue
        before = placement.expert_rank(layer)
        labels = kept.labels(layer, before, proof.sets.shape[1])
        order = _on_ranks(proof.sets, before, labels)
        rows.append(np.sort(proof.sets[order], axis=1).ravel())
    return replace(placement, physical_to_logical_map=tuple(rows))


def _on_ranks(sets: IntArray, before: IntArray, labels: IntArray | None) -> IntArray:
    """Return ``[R]``: the set of each rank, so that few experts move.

    A set with labels goes to a rank that held some of the same.
    """
    num_ranks, num_experts = len(sets), len(before)
    kept = np.zeros((num_ranks, num_ranks), dtype=np.int64)
    for number, one in enumerate(sets):
        np.add.at(kept[number], before[one], 1)
    if labels is not None:
        of_set = labels[sets].max(axis=1)
        of_rank = np.full(num_ranks, -1, dtype=np.int64)
        np.maximum.at(of_rank, before, labels)
        labelled = (of_set >= 0)[:, None] & (of_set[:, None] == of_rank)
        kept += labelled * (num_experts + 1)
    assignment = SimpleLinearSumAssignment()
    row, column = np.indices(kept.shape)
    assignment.add_arcs_with_cost(row.ravel(), column.ravel(), -kept.ravel())
    if assignment.solve() != assignment.OPTIMAL:
        raise RuntimeError("an assignment of sets to ranks failed")
    on_rank = np.empty(num_ranks, dtype=np.int64)
    for number in range(num_ranks):
        on_rank[assignment.right_mate(number)] = number
    return on_rank

"""Random problems that are small enough to try every placement, and what links cost."""

import functools
import itertools
from collections.abc import Iterator

import numpy as np

from placer.placement.topology import Topology
from placer.solver.problem.pairs import PlacementProblem

ONE_NODE = {ranks: Topology(gpus_per_node=ranks) for ranks in (2, 3, 4)}
TWO_NODES = Topology(num_nodes=2, gpus_per_node=2, inter_cost=5, intra_cost=2)


def cost_between(topology: Topology, one: int, two: int) -> int:
    """Return the cost of a copy from one rank to another; 0 to itself."""
    if topology.cost is not None:
        return topology.cost[one][two]
    if one == two:
        return 0
    if topology.num_nodes == 1:
        return 1
    same = one // topology.gpus_per_node == two // topology.gpus_per_node
    return topology.intra_cost if same else topology.inter_cost


def random_problem(
    num_experts: tuple[int, ...],
    topology: Topology,
    seed: int,
    *,
    linked: bool = True,
    reachable: bool = False,
) -> PlacementProblem:
    """Counts with a few hot experts, so that optima are not all alike.

    ``reachable``: caps below the load of the evenest placement are raised to it.
    """
    rng = np.random.default_rng(seed)

    def counts(rows: int, columns: int) -> np.ndarray:
        return np.floor(100 * rng.random((rows, columns)) ** 3)

    within = []
    for size in num_experts:
        upper = np.triu(counts(size, size), 1)
        within.append(upper + upper.T)
    load = [np.floor(20 + 60 * rng.random(size)) for size in num_experts]
    cap = rng.choice([1.15, 1.3, 9.0])
    num_ranks = topology.num_ranks
    max_load = [np.floor(cap * one.sum() / num_ranks) for one in load]
    if reachable:
        max_load = [
            max(most, least_max_load(one, num_ranks))
            for most, one in zip(max_load, load, strict=True)
        ]
    return PlacementProblem(
        objective_name="random",
        between=tuple(counts(*pair) for pair in itertools.pairwise(num_experts))
        if linked
        else None,
        within=tuple(within),
        load=tuple(load),
        max_load=tuple(max_load),
        topology=topology,
    )


@functools.cache
def every_layer(num_experts: int, num_ranks: int) -> list[np.ndarray]:
    slots = num_experts // num_ranks
    every = itertools.product(range(num_ranks), repeat=num_experts)
    return [
        np.asarray(one)
        for one in every
        if all(one.count(rank) == slots for rank in range(num_ranks))
    ]


def least_max_load(load: np.ndarray, num_ranks: int) -> float:
    """Return what the busiest rank bears where loads ``[E]`` are placed most evenly."""
    every = every_layer(len(load), num_ranks)
    return float(min(np.bincount(one, load).max() for one in every))


def every_placement(problem: PlacementProblem) -> Iterator[tuple[np.ndarray, ...]]:
    """All placements with equal slots under the load caps."""
    layers = []
    for load, most in zip(problem.load, problem.max_load, strict=True):
        layers.append(
            [
                one
                for one in every_layer(len(load), problem.num_ranks)
                if all(load[one == rank].sum() <= most for rank in range(problem.num_ranks))
            ]
        )
    return itertools.product(*layers)

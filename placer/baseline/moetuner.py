"""Two integer programs: MoETuner (arXiv 2502.06643)."""

import itertools

import numpy as np

from placer.arrays import IntArray
from placer.baseline.cp_sat import GroupingProgram
from placer.baseline.problem import BaselineProblem
from placer.placement.placement import Placement
from placer.solver.balance.load_caps import greedy_balance

# The tolerance at which the paper's solver stops.
_GAP = 0.025


def moetuner(problem: BaselineProblem) -> Placement:
    """Cluster each layer's experts by load, then give clusters to ranks by traffic.

    arXiv 2502.06643: the first program minimises, layer by layer, the distance of the
    clusters' loads from their mean; the second, over all layers, the slowest transfer
    between two ranks of neighbouring layers, added up. There clusters of a layer may
    differ in size, here slots are equal. Solved by CP-SAT in ``solver_seconds`` instead of
    Gurobi, half of them for each program; a transfer costs the topology's price of a copy.
    """
    problem.require_no_replicas()
    seconds = problem.solver_seconds / 2
    clusters = [
        _cluster(problem, counts.astype(np.int64), seconds / len(problem.load))
        for counts in problem.load
    ]
    cluster_rank = _assign(problem, clusters, seconds)
    ranks = [rank[own] for rank, own in zip(cluster_rank, clusters, strict=True)]
    return Placement.from_expert_rank(ranks, problem.num_ranks, problem.num_nodes)


def _cluster(problem: BaselineProblem, load: IntArray, seconds: float) -> IntArray:
    """Return the cluster of each expert of a layer, ``[E]`` int64."""
    from ortools.sat.python.cp_model import LinearExpr

    num_ranks, total = problem.num_ranks, int(load.sum())
    program = GroupingProgram()
    model = program.model
    cluster = program.add_experts(
        greedy_balance(load.astype(np.float64), num_ranks), num_ranks
    )
    away = []
    for column in zip(*cluster, strict=True):
        # Times R, so that the mean is whole.
        over = LinearExpr.weighted_sum(column, (num_ranks * load).tolist()) - total
        distance = model.new_int_var(0, num_ranks * total, "")
        model.add(distance >= over)
        model.add(distance >= -over)
        away.append(distance)
    model.minimize(sum(away))
    return program.solve(seconds, problem.seed, _GAP)[0]


def _assign(
    problem: BaselineProblem, clusters: list[IntArray], seconds: float
) -> list[IntArray]:
    """Return the rank of each cluster in every layer, L arrays ``[R]`` int64."""
    num_ranks, topology = problem.num_ranks, problem.topology
    program = GroupingProgram()
    model = program.model
    in_order = np.arange(num_ranks)
    on_rank = [program.add_experts(in_order, num_ranks) for _ in clusters]
    price = topology.rank_cost().astype(np.int64)
    # Ranks that are one place to each other, and the price of a transfer between places.
    places = {1: 1}
    if problem.num_nodes > 1:
        places = {1: topology.intra_cost, topology.gpus_per_node: topology.inter_cost}
    slowest = []
    for layer, counts in enumerate(problem.affinity.transition):
        sent = _between(counts, clusters[layer], clusters[layer + 1], num_ranks)
        longest = model.new_int_var(0, int((sent * price.max()).max()), "")
        model.add_hint(longest, int((sent * price).max()))
        slowest.append(longest)
        for one, two in itertools.product(range(num_ranks), repeat=2):
            here, there = on_rank[layer][one], on_rank[layer + 1][two]
            for ranks, cost in places.items():
                together = model.new_bool_var("")
                model.add_hint(together, one // ranks == two // ranks)
                for g in range(0, num_ranks, ranks):
                    model.add(
                        sum(here[g : g + ranks]) == sum(there[g : g + ranks])
                    ).only_enforce_if(together)
                model.add(longest >= cost * int(sent[one, two])).only_enforce_if(~together)
    model.minimize(sum(slowest))
    return program.solve(seconds, problem.seed, _GAP)


def _between(counts: IntArray, first: IntArray, second: IntArray, num: int) -> IntArray:
    """Return ``[R, R]``: pairs between the clusters of neighbouring layers."""
    clusters = np.arange(num)
    sent: IntArray = (first == clusters[:, None]) @ counts @ (second[:, None] == clusters)
    return sent

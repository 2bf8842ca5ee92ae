"""What the baselines share that group the experts of one layer."""

from collections.abc import Callable

import numpy as np

from placer.arrays import FloatArray, IntArray
from placer.baseline.problem import BaselineProblem
from placer.placement.placement import Placement
from placer.solver.search.pair_search import transport

#: Groups some experts (``[n]`` ids, ascending) of a layer into equal groups; ``[n]``.
Split = Callable[[int, IntArray, int], IntArray]


def node_then_rank(problem: BaselineProblem, split: Split) -> Placement:
    """Group every layer's experts into nodes, then the experts of a node into ranks."""
    problem.require_no_replicas()
    num_nodes = problem.num_nodes
    gpus_per_node = problem.topology.gpus_per_node
    rows = []
    for layer, size in enumerate(problem.num_experts):
        ranks = np.empty(size, dtype=np.int64)
        node = _split(split, layer, np.arange(size), num_nodes)
        for n in range(num_nodes):
            members = np.flatnonzero(node == n)
            inside = _split(split, layer, members, gpus_per_node)
            ranks[members] = n * gpus_per_node + inside
        rows.append(ranks)
    return Placement.from_expert_rank(rows, problem.num_ranks, num_nodes)


def _split(split: Split, layer: int, experts: IntArray, num_groups: int) -> IntArray:
    if num_groups == 1:
        return np.zeros(len(experts), dtype=np.int64)
    if num_groups == len(experts):
        return np.arange(num_groups)
    return split(layer, experts, num_groups)


def equal_groups(group: IntArray, affinity: FloatArray, num_groups: int) -> IntArray:
    """Make groups equal: of the fewest moves, those that lose least affinity.

    Parameters
    ----------
    group
        ``[n]`` int64: the group of each expert.
    affinity
        ``[n, n]``: whole numbers, zero diagonal.
    num_groups
        Groups, which divide n.

    Returns
    -------
    ndarray
        ``[n]`` int64; affinity is taken to the groups as they were. Exact, by min-cost
        flow: a move costs more than all affinity can.
    """
    member = group[:, None] == np.arange(num_groups)
    towards = affinity @ member
    cost = towards.max() - towards
    cost += (1 + len(group) * cost.max()) * ~member
    return transport(cost, len(group) // num_groups)

"""Greedy grouping by co-activation: Occult (arXiv 2505.13345, ICML 2025)."""

import numpy as np

from placer.arrays import FloatArray, IntArray
from placer.baseline.grouping import node_then_rank
from placer.baseline.problem import BaselineProblem
from placer.placement.placement import Placement


def occult(problem: BaselineProblem) -> Placement:
    """Group experts that tokens use together, one expert at a time.

    Every layer separately. The groups start from experts that collaborate least with one
    another, farthest first. Then the pair of an expert and a group with the highest mean
    collaboration is joined, one pair at a time, until all groups have the same number of
    experts. This is the placement of arXiv 2505.13345. Its pruning is left out: it changes
    what the model computes.
    """
    coactivation = problem.affinity.coactivation

    def split(layer: int, experts: IntArray, num_groups: int) -> IntArray:
        return group_greedily(
            coactivation[layer][np.ix_(experts, experts)].astype(np.float64), num_groups
        )

    return node_then_rank(problem, split)


def group_greedily(affinity: FloatArray, num_groups: int) -> IntArray:
    """Return ``[n]``: the group of each expert, from an affinity ``[n, n]``."""
    size = len(affinity) // num_groups
    group = np.full(len(affinity), -1, dtype=np.int64)
    towards = np.zeros((len(affinity), num_groups))
    count = np.zeros(num_groups, dtype=np.int64)

    def add(expert: int, chosen: int) -> None:
        group[expert] = chosen
        towards[:, chosen] += affinity[:, expert]
        count[chosen] += 1

    add(int(affinity.sum(axis=1).argmax()), 0)
    for chosen in range(1, num_groups):
        to_seeds = towards.sum(axis=1)
        add(int(np.where(group < 0, to_seeds, np.inf).argmin()), chosen)
    while (group < 0).any():
        mean = np.where((group < 0)[:, None] & (count < size), towards / count, -1.0)
        add(*divmod(int(mean.argmax()), num_groups))
    return group

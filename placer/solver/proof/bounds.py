"""Proved lower bounds of the pair objective.

Every expert shares its rank with exactly C experts of a neighbouring layer, C = E/R slots
per rank, and with C - 1 others of its own. So the pairs that share a rank weigh at most
the heaviest matrix z, 0 <= z <= 1, with those row and column sums: a b-matching, solved by
one min-cost flow. With nodes, the same holds for the experts of a node, and

    cost = intra_cost [ranks differ] + (inter_cost - intra_cost) [nodes differ]

is bounded term by term; of a matrix of costs the least inside a node and the least between
nodes count. Load caps and pins only take placements away, so the bound stays
valid; replicas would break it.
"""

import math

import numpy as np
from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

from placer.arrays import FloatArray
from placer.solver.problem.pairs import PlacementProblem

METHOD = "b-matching per layer and pair of neighbouring layers"


def pair_bound(problem: PlacementProblem) -> float:
    """Return a lower bound of ``problem.objective`` over all placements, a whole number."""
    topology = problem.topology
    inside, across = topology.least_costs()
    bound = inside * _cut_bound(problem, problem.num_ranks)
    if across > inside:
        bound += (across - inside) * _cut_bound(problem, topology.num_nodes)
    return float(math.ceil(bound))  # objectives are whole numbers


def _cut_bound(problem: PlacementProblem, num_groups: int) -> float:
    """Bound the weight of pairs in different groups, over all splits into equal groups."""
    bound = 0.0
    for layer, within in enumerate(problem.within):
        size = len(within) // num_groups
        off_diagonal = within.copy()
        np.fill_diagonal(off_diagonal, -1.0)
        # z is symmetric, so the flow counts every unordered pair twice.
        kept = heaviest_b_matching(off_diagonal, size - 1, size - 1)
        bound += (float(within.sum()) - kept) / 2
        if problem.between is not None and layer + 1 < problem.num_layers:
            between = problem.between[layer]
            other = between.shape[1] // num_groups
            bound += float(between.sum()) - heaviest_b_matching(between, other, size)
    return bound


def heaviest_b_matching(weight: FloatArray, row_sum: int, column_sum: int) -> float:
    """Return max sum(weight * z) with 0 <= z <= 1 and given row and column sums.

    Parameters
    ----------
    weight
        ``[N, M]`` whole numbers; a negative entry forbids the pair.
    row_sum, column_sum
        With ``N * row_sum == M * column_sum``.
    """
    num_rows, num_columns = weight.shape
    if row_sum == 0:
        return 0.0
    row, column = np.nonzero(weight >= 0)
    flow = SimpleMinCostFlow()
    flow.add_arcs_with_capacity_and_unit_cost(
        row.astype(np.int32),
        (num_rows + column).astype(np.int32),
        np.ones(len(row), dtype=np.int64),
        -weight[row, column].astype(np.int64),
    )
    flow.set_nodes_supplies(
        np.arange(num_rows + num_columns, dtype=np.int32),
        np.r_[
            np.full(num_rows, row_sum, dtype=np.int64),
            np.full(num_columns, -column_sum, dtype=np.int64),
        ],
    )
    if flow.solve() != flow.OPTIMAL:
        raise RuntimeError("min-cost flow failed on a feasible b-matching")
    return float(-flow.optimal_cost())

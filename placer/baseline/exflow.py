"""Inter-layer affinity by integer programming: ExFlow (arXiv 2401.08383, IPDPS 2024)."""

from collections.abc import Sequence

import numpy as np

from placer.arrays import IntArray
from placer.baseline.cp_sat import GroupingProgram
from placer.baseline.problem import BaselineProblem
from placer.placement.placement import Placement
from placer.solver.search.pair_search import transport

#: Experts of every layer, as ascending ids.
Members = Sequence[IntArray]


def exflow(problem: BaselineProblem) -> Placement:
    """Keep tokens where they are from layer to layer: node by node, then rank by rank.

    The program of arXiv 2401.08383, section IV: every layer's experts in equal groups, the
    least number of tokens that change group between neighbouring layers; first for nodes,
    then inside each node. There it has variables per token and takes top-1 routing; here
    tokens are counted into pairs of experts, over all k, which is the same program with
    far fewer variables. CP-SAT has ``solver_seconds`` instead of Gurobi, split over the
    programs, and starts where min-cost flow, layer by layer, gains no more.
    """
    problem.require_no_replicas()
    everyone = [np.arange(size) for size in problem.num_experts]
    ranks = [np.zeros(size, dtype=np.int64) for size in problem.num_experts]
    num_nodes, gpus_per_node = problem.num_nodes, problem.topology.gpus_per_node
    # The programs of all nodes together have as many pairs as the first, or fewer.
    seconds = problem.solver_seconds / (2 if num_nodes > 1 else 1)
    nodes = _solve(problem, everyone, num_nodes, seconds)
    for n in range(num_nodes):
        members = [np.flatnonzero(node == n) for node in nodes]
        inside = _solve(problem, members, gpus_per_node, seconds / num_nodes)
        for layer, experts in enumerate(members):
            ranks[layer][experts] = n * gpus_per_node + inside[layer]
    return Placement.from_expert_rank(ranks, problem.num_ranks, num_nodes)


def _solve(
    problem: BaselineProblem, members: Members, num_groups: int, seconds: float
) -> list[IntArray]:
    """Solve one stage: all layers at once, ``num_groups`` equal groups."""
    from ortools.sat.python.cp_model import LinearExpr

    if num_groups == 1:
        return [np.zeros(len(experts), dtype=np.int64) for experts in members]
    pairs = [
        counts[np.ix_(members[layer], members[layer + 1])]
        for layer, counts in enumerate(problem.affinity.transition)
    ]
    start = _start(pairs, len(members[0]), num_groups)
    program = GroupingProgram()
    model = program.model
    in_group = [program.add_experts(groups, num_groups) for groups in start]
    kept = []
    for layer, counts in enumerate(pairs):
        for i, row in enumerate(counts.tolist()):
            most = sum(row)
            for g, column in enumerate(zip(*in_group[layer + 1], strict=True)):
                together = LinearExpr.weighted_sum(column, row)
                tokens = model.new_int_var(0, most, "")
                model.add(tokens <= together)
                model.add(tokens <= most * in_group[layer][i][g])
                here = start[layer][i] == g
                model.add_hint(tokens, int(counts[i] @ (start[layer + 1] == g)) * int(here))
                kept.append(tokens)
    model.maximize(sum(kept))
    return program.solve(seconds, problem.seed)


def _start(pairs: Sequence[IntArray], num_first: int, num_groups: int) -> list[IntArray]:
    """Return where to start: layer by layer the best for its neighbours, by min-cost flow.

    First along the layers, each given the one before it, then back and forth until no
    layer gains.
    """
    one_hot = np.eye(num_groups, dtype=np.int64)
    num_layers = len(pairs) + 1
    groups = [np.arange(num_first) * num_groups // num_first]

    def improve(layer: int) -> int:
        """Place one layer again; return the pairs that it keeps."""
        kept = np.zeros((1, num_groups), dtype=np.int64)
        if layer > 0:
            kept = kept + pairs[layer - 1].T @ one_hot[groups[layer - 1]]
        if layer + 1 < len(groups):
            kept = kept + pairs[layer] @ one_hot[groups[layer + 1]]
        cost = (kept.max() - kept).astype(np.float64)
        groups[layer : layer + 1] = [transport(cost, len(cost) // num_groups)]
        return int(kept[np.arange(len(kept)), groups[layer]].sum())

    for layer in range(1, num_layers):
        improve(layer)
    before, after = -1, 0
    while after > before:
        there_and_back = [*range(num_layers - 2, -1, -1), *range(1, num_layers)]
        before, after = after, sum(improve(layer) for layer in there_and_back)
    return groups

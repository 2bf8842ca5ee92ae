"""Inter-layer affinity by integer programming: ExFlow (arXiv 2401.08383, IPDPS 2024)."""

from collections.abc import Sequence

import numpy as np
from ortools.sat.python import cp_model

from placer.baseline.cp_sat import equal_assignment, read_assignment, solve_model
from placer.baseline.problem import BaselineProblem
from placer.plan.placement import Placement
from placer.plan.problem import IntArray
from placer.plan.search import transport

#: Experts of every layer, as ascending ids.
Members = Sequence[IntArray]


def exflow(problem: BaselineProblem) -> Placement:
    """Keep tokens where they are from layer to layer: node by node, then rank by rank.

    The program of arXiv 2401.08383, section IV: every layer's experts in equal groups, the
    least number of tokens that change group between neighbouring layers; first for nodes,
    then inside each node. Groups are halved, and the halves again, as the paper's public
    code does by default. That code has a variable per token and takes top-1 routing; here
    tokens are counted into pairs of experts, over all k, which is the same program with
    far fewer variables. Solved by CP-SAT in ``solver_seconds`` instead of Gurobi.
    """
    problem.require_no_replicas()
    everyone = [np.arange(size) for size in problem.num_experts]
    ranks = [np.zeros(size, dtype=np.int64) for size in problem.num_experts]
    gpus_per_node = problem.topology.gpus_per_node
    inter = problem.solver_seconds / (2 if 1 < problem.num_nodes < problem.num_ranks else 1)
    nodes = _split(problem, everyone, problem.num_nodes, inter)
    intra = problem.solver_seconds - (inter if problem.num_nodes > 1 else 0)
    for n in range(problem.num_nodes):
        members = [np.flatnonzero(node == n) for node in nodes]
        inside = _split(problem, members, gpus_per_node, intra / problem.num_nodes)
        for layer, experts in enumerate(members):
            ranks[layer][experts] = n * gpus_per_node + inside[layer]
    return Placement.from_expert_rank(ranks, problem.num_ranks, problem.num_nodes)


def _split(
    problem: BaselineProblem, members: Members, num_groups: int, seconds: float
) -> list[IntArray]:
    """Return the group of each member: by halves while groups are even, then at once."""
    if num_groups == 1:
        return [np.zeros(len(experts), dtype=np.int64) for experts in members]
    if num_groups == 2 or num_groups % 2:
        return _solve(problem, members, num_groups, seconds)
    # Half the pairs are left when all are split in two.
    halves = _solve(problem, members, 2, seconds / 2)
    groups = [np.zeros_like(half) for half in halves]
    for side in range(2):
        chosen = [np.flatnonzero(half == side) for half in halves]
        part = [experts[at] for experts, at in zip(members, chosen, strict=True)]
        inside = _split(problem, part, num_groups // 2, seconds / 4)
        for group, at, within in zip(groups, chosen, inside, strict=True):
            group[at] = side * num_groups // 2 + within
    return groups


def _solve(
    problem: BaselineProblem, members: Members, num_groups: int, seconds: float
) -> list[IntArray]:
    """Solve one stage: all layers at once, ``num_groups`` equal groups."""
    pairs = [
        counts[np.ix_(members[layer], members[layer + 1])]
        for layer, counts in enumerate(problem.affinity.transition)
    ]
    start = _chain(pairs, len(members[0]), num_groups)
    model = cp_model.CpModel()
    in_group = [equal_assignment(model, hint, num_groups) for hint in start]
    kept = []
    for layer, counts in enumerate(pairs):
        for i, row in enumerate(counts.tolist()):
            most = sum(row)
            for g, column in enumerate(zip(*in_group[layer + 1], strict=True)):
                together = cp_model.LinearExpr.weighted_sum(column, row)
                tokens = model.new_int_var(0, most, "")
                model.add(tokens <= together)
                model.add(tokens <= most * in_group[layer][i][g])
                here = start[layer][i] == g
                model.add_hint(tokens, int(counts[i] @ (start[layer + 1] == g)) * int(here))
                kept.append(tokens)
    model.maximize(sum(kept))
    solver = solve_model(model, seconds, problem.seed)
    return [read_assignment(solver, layer) for layer in in_group]


def _chain(pairs: Sequence[IntArray], num_first: int, num_groups: int) -> list[IntArray]:
    """Return where to start: every layer at its best after the one before it."""
    groups = [np.arange(num_first) * num_groups // num_first]
    for counts in pairs:
        arriving = counts.T @ (groups[-1][:, None] == np.arange(num_groups))
        cost = (arriving.max() - arriving).astype(np.float64)
        groups.append(transport(cost, len(cost) // num_groups))
    return groups

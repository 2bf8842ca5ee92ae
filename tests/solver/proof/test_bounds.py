"""Bounds of the pairs, term by term against a linear program and against all placements."""

import math

import numpy as np
import pytest
from ortools.linear_solver import pywraplp

from placer.placement.topology import Topology
from placer.solver.problem.pairs import PlacementProblem
from placer.solver.proof.bounds import heaviest_b_matching, pair_bound
from tests.solver.enumeration import ONE_NODE, TWO_NODES, every_placement, random_problem

LINKS = ((0, 3, 9, 9), (3, 0, 9, 9), (9, 9, 0, 4), (9, 9, 4, 0))
#: Its nearest ranks are in different nodes.
CROSSED = ((0, 6, 2, 7), (6, 0, 8, 9), (2, 8, 0, 6), (7, 9, 6, 0))


def by_linear_program(weight: np.ndarray, row_sum: int, column_sum: int) -> float | None:
    """Return the most weight of a matrix with these sums, or ``None`` if there is none."""
    solver = pywraplp.Solver.CreateSolver("GLOP")
    share = [
        [solver.NumVar(0, 1 if one >= 0 else 0, "") for one in row]
        for row in weight.tolist()
    ]
    for row in share:
        solver.Add(sum(row) == row_sum)
    for column in zip(*share, strict=True):
        solver.Add(sum(column) == column_sum)
    solver.Maximize(
        sum(
            one * value
            for row, values in zip(share, weight.tolist(), strict=True)
            for one, value in zip(row, values, strict=True)
        )
    )
    done = solver.Solve()
    return solver.Objective().Value() if done == solver.OPTIMAL else None


@pytest.mark.parametrize("seed", range(12))
def test_the_heaviest_matching_is_that_of_the_linear_program(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, columns, row_sum, column_sum = (
        (4, 4, 2, 2),
        (6, 3, 1, 2),
        (2, 6, 3, 1),
        (5, 5, 3, 3),
        (3, 3, 0, 0),
    )[seed % 5]
    weight = np.floor(9 * rng.random((rows, columns)))  # zeros among them
    if row_sum and rows == columns:
        np.fill_diagonal(weight, -1.0)  # forbidden
    expected = by_linear_program(weight, row_sum, column_sum)
    assert heaviest_b_matching(weight, row_sum, column_sum) == pytest.approx(expected)


def test_pairs_of_no_weight_may_be_matched_and_forbidden_ones_may_not() -> None:
    assert heaviest_b_matching(np.zeros((3, 3)), 2, 2) == 0
    forbidden = np.array([[5.0, -1], [4, -1]])
    assert by_linear_program(forbidden, 1, 1) is None
    with pytest.raises(RuntimeError, match="min-cost flow failed"):
        heaviest_b_matching(forbidden, 1, 1)


def cut_by_linear_program(problem: PlacementProblem, num_groups: int) -> float:
    total = 0.0
    for within in problem.within:
        slots = len(within) // num_groups
        pairs = within.copy()
        np.fill_diagonal(pairs, -1)
        kept = by_linear_program(pairs, slots - 1, slots - 1)
        assert kept is not None
        total += (within.sum() - kept) / 2
    for between in problem.between or ():
        one, two = (size // num_groups for size in between.shape)
        kept = by_linear_program(between, two, one)
        assert kept is not None
        total += between.sum() - kept
    return total


CASES = [
    ((4, 4, 4), ONE_NODE[2], True),
    ((6, 2), ONE_NODE[2], True),
    ((6, 3), ONE_NODE[3], False),
    ((4, 4), Topology(), True),
    ((8, 4), TWO_NODES, True),
    ((4, 8), Topology(num_nodes=2, gpus_per_node=2, cost=LINKS), True),
    ((8,), Topology(num_nodes=2, gpus_per_node=2, cost=CROSSED), False),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num_experts", "topology", "linked"), CASES)
def test_the_bound_is_that_of_ranks_and_of_nodes_together(
    num_experts: tuple[int, ...], topology: Topology, linked: bool, seed: int
) -> None:
    problem = random_problem(num_experts, topology, seed, linked=linked)
    num_ranks, width = topology.num_ranks, topology.gpus_per_node
    cost = topology.rank_cost()
    pairs = [(i, j) for i in range(num_ranks) for j in range(num_ranks) if i != j]
    across = [cost[i, j] for i, j in pairs if i // width != j // width]
    inside = min((cost[i, j] for i, j in pairs), default=0)  # of the cheapest link
    bound = inside * cut_by_linear_program(problem, num_ranks)
    if across:
        more = min(across) - inside
        bound += more * cut_by_linear_program(problem, topology.num_nodes)
    assert pair_bound(problem) == math.ceil(bound - 1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cost", [LINKS, CROSSED])
def test_no_placement_costs_less_on_unequal_links(
    cost: tuple[tuple[int, ...], ...], seed: int
) -> None:
    topology = Topology(num_nodes=2, gpus_per_node=2, cost=cost)
    problem = random_problem((4, 4), topology, seed, reachable=True)
    least = min(problem.objective(one) for one in every_placement(problem))
    assert pair_bound(problem) <= least


def test_a_layer_that_no_split_cuts_costs_nothing() -> None:
    """Pairs of experts that are used only together, on as many ranks."""
    within = np.zeros((6, 6))
    for one in (0, 2, 4):
        within[one, one + 1] = within[one + 1, one] = 10.0
    problem = PlacementProblem(
        objective_name="pairs",
        between=(np.eye(6) * 7,),
        within=(within, within),
        load=(np.ones(6),) * 2,
        max_load=(2.0, 2.0),
        topology=ONE_NODE[3],
    )
    assert pair_bound(problem) == 0

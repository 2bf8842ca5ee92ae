"""The exact method against enumeration of every placement."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from placer.errors import NoSolutionError
from placer.placement.topology import Topology
from placer.solver.problem.pairs import PlacementProblem
from placer.solver.search.dynamic import num_assignments, solve_exactly
from tests.solver.enumeration import ONE_NODE, TWO_NODES, every_placement, random_problem


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    ("num_experts", "topology"),
    [
        ((4, 4, 4), ONE_NODE[2]),
        ((2, 6, 4), ONE_NODE[2]),
        ((6, 3), ONE_NODE[3]),
        ((4, 4), TWO_NODES),
        ((4, 4), ONE_NODE[4]),
        ((4,), ONE_NODE[2]),
    ],
)
@pytest.mark.parametrize("linked", [True, False])
def test_it_is_the_least_cost_of_all_placements(
    num_experts: tuple[int, ...], topology: Topology, seed: int, linked: bool
) -> None:
    problem = random_problem(num_experts, topology, seed, linked=linked)
    costs = [problem.objective(one) for one in every_placement(problem)]
    if not costs:
        with pytest.raises(NoSolutionError, match="no balanced assignment"):
            solve_exactly(problem)
        return
    exact = solve_exactly(problem)
    assert exact is not None
    assert exact.objective == min(costs)
    assert problem.objective(exact.expert_rank) == min(costs)
    assert problem.is_feasible(exact.expert_rank)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("topology", [ONE_NODE[2], TWO_NODES])
def test_pins_are_kept_and_the_rest_is_optimal(topology: Topology, seed: int) -> None:
    problem = random_problem((4, 4), topology, seed)
    rng = np.random.default_rng(seed)
    pinned = {(layer, int(rng.integers(4))): seed % 2 for layer in range(2)}
    allowed = [np.ones((4, topology.num_ranks), dtype=np.bool_) for _ in range(2)]
    for (layer, expert), rank in pinned.items():
        allowed[layer][expert] = np.arange(topology.num_ranks) == rank
    costs = [
        problem.objective(one)
        for one in every_placement(problem)
        if all(one[layer][expert] == rank for (layer, expert), rank in pinned.items())
    ]
    if not costs:
        with pytest.raises(NoSolutionError):
            solve_exactly(problem, allowed=allowed)
        return
    exact = solve_exactly(problem, allowed=allowed)
    assert exact is not None
    assert exact.objective == min(costs) == problem.objective(exact.expert_rank)
    for (layer, expert), rank in pinned.items():
        assert exact.expert_rank[layer][expert] == rank


def test_eight_experts_on_four_ranks_over_32_layers_find_the_planted_groups() -> None:
    """Mixtral's size: groups that change their rank from layer to layer cost nothing."""
    rng = np.random.default_rng(0)
    planted = [rng.permutation(np.repeat(np.arange(4), 2)) for _ in range(32)]
    problem = PlacementProblem(
        objective_name="planted",
        between=tuple(
            np.where(one[:, None] == two, 100.0, 0.0)
            for one, two in itertools.pairwise(planted)
        ),
        within=(np.zeros((8, 8)),) * 32,
        load=(np.ones(8),) * 32,
        max_load=(2.0,) * 32,
        topology=ONE_NODE[4],
    )
    exact = solve_exactly(problem)
    assert exact is not None
    assert exact.objective == 0
    for found, one in zip(exact.expert_rank, planted, strict=True):
        assert len(set(zip(found.tolist(), one.tolist(), strict=True))) == 4


class Apart:
    """Two experts must not share a rank; counts the assignments it is asked of."""

    def __init__(self) -> None:
        self.asked = 0

    def allows(self, layer: int, assignments: np.ndarray) -> np.ndarray:
        self.asked += len(assignments)
        return assignments[:, 0] != assignments[:, 1]

    def steps_to(self, layer: int, assignments: np.ndarray) -> None:
        return None


@pytest.mark.parametrize(
    ("topology", "renamings"), [(ONE_NODE[3], 6), (ONE_NODE[2], 2), (TWO_NODES, 8)]
)
def test_a_limit_is_asked_of_one_assignment_of_each_class(
    topology: Topology, renamings: int
) -> None:
    """What it takes away is taken away under all names of the ranks."""
    size = 6 if topology.num_ranks < 4 else 4
    problem = random_problem((size,), topology, 0, linked=False)
    problem = replace(problem, max_load=(float(problem.load[0].sum()),))
    limit = Apart()
    exact = solve_exactly(problem, limit=limit)
    allowed = [one for one in every_placement(problem) if one[0][0] != one[0][1]]
    assert exact is not None
    assert exact.objective == min(map(problem.objective, allowed))
    assert limit.asked == num_assignments(size, topology.num_ranks) // renamings


def test_too_many_assignments_are_left_to_other_methods() -> None:
    assert num_assignments(8, 4) == 2520
    assert solve_exactly(random_problem((32, 32), ONE_NODE[4], 0)) is None
    small = random_problem((6, 6), ONE_NODE[2], 1)
    assert solve_exactly(small, max_operations=10) is None

"""Certificates of the pair objective against the least cost of all placements."""

import numpy as np
import pytest

from placer.placement.topology import Topology
from placer.solver.problem.pairs import PlacementProblem
from placer.solver.proof import certificate as certificate_module
from placer.solver.proof.bounds import METHOD as MATCHING_METHOD
from placer.solver.proof.bounds import pair_bound
from placer.solver.proof.certificate import METHOD, PairCertificate, stable_floor
from placer.solver.proof.grouping import GroupingProblem
from placer.solver.proof.relaxation import Relaxation
from tests.solver.enumeration import ONE_NODE, TWO_NODES, every_placement, random_problem

SHAPES = [
    ((4, 4, 4), ONE_NODE[2]),
    ((6, 2, 4), ONE_NODE[2]),
    ((8,), ONE_NODE[2]),
    ((6, 3), ONE_NODE[3]),
    ((4, 4), TWO_NODES),
    ((4, 6), Topology(num_nodes=2, gpus_per_node=1, inter_cost=3)),
]


def least_cost(problem: PlacementProblem) -> float:
    return min(problem.objective(one) for one in every_placement(problem))


@pytest.mark.parametrize(("num_experts", "topology"), SHAPES)
def test_bounds_are_near_the_least_cost(
    num_experts: tuple[int, ...], topology: Topology
) -> None:
    """A bound of nothing would be valid too."""
    problems = [
        random_problem(num_experts, topology, seed, reachable=True) for seed in range(3)
    ]
    least = sum(least_cost(one) for one in problems)
    proved = sum(PairCertificate(one).improve(150) for one in problems)
    assert 0.975 * least <= proved <= least


def test_a_bound_of_unequal_links_counts_the_cheapest_of_each_kind() -> None:
    """Where all links of a kind cost the same, a matrix proves what two numbers do."""
    rank = np.arange(4)
    apart = rank[:, None] // 2 != rank // 2
    cost = np.where(apart, 5, 2) * (rank[:, None] != rank)
    matrix = Topology(num_nodes=2, gpus_per_node=2, cost=tuple(map(tuple, cost.tolist())))
    proved = []
    for topology in (TWO_NODES, matrix):
        problem = random_problem((4, 4), topology, 0, reachable=True)
        proved.append(PairCertificate(problem).improve(40))
    assert proved[0] == proved[1]
    # Dearer links cannot make the bound lower, and it stays valid.
    cost[0, 1] = cost[1, 0] = 4
    cost[0, 3] = cost[3, 0] = 9
    dearer = Topology(num_nodes=2, gpus_per_node=2, cost=tuple(map(tuple, cost.tolist())))
    problem = random_problem((4, 4), dearer, 0, reachable=True)
    assert proved[0] == PairCertificate(problem).improve(40) <= least_cost(problem)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize(("num_experts", "topology"), SHAPES)
def test_no_placement_costs_less_than_the_bound(
    num_experts: tuple[int, ...], topology: Topology, seed: int
) -> None:
    problem = random_problem(
        num_experts, topology, seed, linked=seed % 5 > 0, reachable=True
    )
    least = least_cost(problem)
    certificate = PairCertificate(problem)
    bounds = [certificate.bound, *(certificate.improve(40) for _ in range(2))]
    assert bounds == sorted(bounds)
    assert bounds[-1] <= least


def kept_together(problem: GroupingProblem, placement: tuple[np.ndarray, ...]) -> float:
    total = 0.0
    for (layer, next_layer), weight in problem.weight.items():
        together = placement[layer][:, None] == placement[next_layer]
        total += (weight * together).sum() / (2 if layer == next_layer else 1)
    return total


@pytest.mark.parametrize("seed", range(60))
def test_any_prices_certify(seed: int) -> None:
    """Also far from convergence, with weights that are neither whole nor positive."""
    rng = np.random.default_rng(seed)
    sizes = (4, 6) if seed % 2 else (4, 4, 2)
    costs = random_problem(sizes, ONE_NODE[2], seed, reachable=True)
    assert costs.between is not None
    weight = {(n, n): one * rng.normal() for n, one in enumerate(costs.within)}
    weight |= {
        (n, n + 1): one * rng.normal(size=one.shape) for n, one in enumerate(costs.between)
    }
    problem = GroupingProblem(
        num_groups=2, weight=weight, load=costs.load, max_load=costs.max_load
    )
    kept = [kept_together(problem, one) for one in every_placement(costs)]
    relaxed = Relaxation(problem)
    for held in relaxed._copies:
        held.price = rng.normal(size=held.price.shape) * 10 ** rng.uniform(-3, 1)
    for num_steps in (0, 1, 7):
        relaxed.run(num_steps)
        assert relaxed.upper_bound() >= max(kept)
    relaxed.reweight({block: -one for block, one in weight.items()})
    assert relaxed.upper_bound() >= -min(kept)
    relaxed.run(50)
    assert relaxed.upper_bound() >= -min(kept)


def test_a_ring_is_cut_twice_though_b_matchings_cut_nothing() -> None:
    """Six experts in a ring, two ranks: every expert could keep its two neighbours."""
    ring = np.zeros((6, 6))
    for one in range(6):
        two = (one + 1) % 6
        ring[one, two] = ring[two, one] = 60.0
    problem = PlacementProblem(
        objective_name="a ring on two ranks",
        between=None,
        within=(ring,),
        load=(np.ones(6),),
        max_load=(3.0,),
        topology=ONE_NODE[2],
    )
    assert least_cost(problem) == 120
    certificate = PairCertificate(problem)
    assert pair_bound(problem) == certificate.bound == 0
    # By hand: the ring's smallest eigenvalue gap is 1, so (6 / 4) * 60 = 90; triangles
    # close the rest.
    assert 89 < certificate.improve(50) <= 90
    assert 115 < certificate.improve(600) <= 120
    assert certificate.method == METHOD


def test_load_rows_raise_the_bound_and_no_load_changes_nothing() -> None:
    problem = random_problem((8, 8), ONE_NODE[4], 3)
    mean = [one.sum() / 4 for one in problem.load]

    def bound(cap: float) -> float:
        capped = PlacementProblem(
            objective_name="capped",
            between=problem.between,
            within=problem.within,
            load=problem.load,
            max_load=tuple(np.floor(cap * one) for one in mean),
            topology=problem.topology,
        )
        return PairCertificate(capped).improve(200)

    assert bound(100.0) == bound(4.0) < bound(1.2)


def test_the_same_steps_give_the_same_bound() -> None:
    problem = random_problem((8, 8, 8), TWO_NODES, 5)
    one, two = PairCertificate(problem), PairCertificate(problem)
    assert one.improve(60) == two.improve(60)


def test_triangles_move_for_the_first_time_after_the_first_steps() -> None:
    certificate = PairCertificate(random_problem((4, 4), ONE_NODE[2], 0))
    ((_, grouping),) = certificate._groupings
    every = certificate_module._STEPS_PER_MOVE
    first = certificate_module._FIRST_STEPS // every * every + every
    for num_steps, taken, moves in ((first - 1, first - 1, 0), (1, first, 1)):
        certificate.improve(num_steps)
        assert grouping._relaxed._num_steps == taken
        assert grouping._triangles._num_moves == moves


def test_stable_floor_is_at_most_a_millionth_below() -> None:
    for value in (0.0, 3.0, 12345678.9, -12345678.9, 0.3, 1e18):
        assert value - abs(value) * 2e-6 <= stable_floor(value) <= value
    assert stable_floor(3.0) == 3.0
    # Four leading bits, counted from the first that is not zero.
    assert [stable_floor(one, 4) for one in (29.0, 3.3, -29.0, 0.9)] == [
        28,
        3.25,
        -30,
        0.875,
    ]


def test_one_rank_and_empty_counts_cost_nothing() -> None:
    problem = random_problem((4, 4), Topology(), 0)
    assert PairCertificate(problem).improve(5) == 0
    empty = PlacementProblem(
        objective_name="nothing recorded",
        between=(np.zeros((4, 4)),),
        within=(np.zeros((4, 4)),) * 2,
        load=(np.zeros(4),) * 2,
        max_load=(0.0, 0.0),
        topology=ONE_NODE[2],
    )
    certificate = PairCertificate(empty)
    assert certificate.improve(5) == 0
    assert certificate.method == MATCHING_METHOD  # which proved as much before

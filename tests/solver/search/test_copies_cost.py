"""The copies of the exact method against tokens followed one by one, and simulate."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from placer.placement.placement import Placement
from placer.placement.policy import Policy
from placer.placement.topology import Topology
from placer.planning.planner import plan_from_trace
from placer.simulation import simulate
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.solver.params import SolverParams
from placer.solver.problem.pairs import PlacementProblem
from placer.solver.proof.copies import CopiesCertificate, token_sets
from placer.solver.search.copies_cost import CopiesCost
from placer.solver.search.dynamic import solve_exactly
from placer.trace import EVERYTHING, Chunk
from tests.solver.enumeration import ONE_NODE, TWO_NODES, every_placement, least_max_load


def problem_of(chunk: Chunk, sizes: tuple[int, ...], topology: Topology, cap: float):
    """No pairs, loads of the tokens, and a cap that some placement meets."""
    load = [
        np.bincount(experts.ravel(), minlength=size).astype(np.float64)
        for experts, size in zip(chunk.experts, sizes, strict=True)
    ]
    return PlacementProblem(
        objective_name="copies",
        between=None,
        within=tuple(np.zeros((size, size)) for size in sizes),
        load=tuple(load),
        max_load=tuple(
            max(
                np.floor(cap * one.sum() / topology.num_ranks),
                least_max_load(one, topology.num_ranks),
            )
            for one in load
        ),
        topology=topology,
    )


def follow_tokens(
    chunk: Chunk, placement: tuple[np.ndarray, ...], policy: Policy, topology: Topology
) -> float:
    """R times the cost of all copies; before the first layer, all homes are as likely."""

    def cost(one: int, two: int) -> int:
        if one == two:
            return 0
        if topology.num_nodes == 1:
            return 1
        same = one // topology.gpus_per_node == two // topology.gpus_per_node
        return topology.intra_cost if same else topology.inter_cost

    num_ranks = topology.num_ranks
    total = 0.0
    for token in range(chunk.num_tokens):
        homes = list(range(num_ranks))
        for layer, ranks in enumerate(placement):
            serving = [int(ranks[e]) for e in chunk.experts[layer][token]]
            sent = sum(cost(home, rank) for home in homes for rank in set(serving))
            total += sent * num_ranks / len(homes)
            if policy == "follow":
                # max() keeps the first of the ranks that serve most.
                majority = max(serving, key=serving.count)
                total += num_ranks * sum(cost(rank, majority) for rank in set(serving))
                homes = [majority]
    return total


@pytest.mark.parametrize("policy", ["fixed", "follow"])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("sizes", "topology", "top_k"),
    [
        ((4, 4, 4), ONE_NODE[2], 2),
        ((4, 6), ONE_NODE[2], 3),
        ((4, 4), ONE_NODE[4], 3),
        ((6, 3), ONE_NODE[3], 2),
        ((4, 4), TWO_NODES, 2),
        ((4, 4, 2), ONE_NODE[2], 1),
    ],
)
def test_the_exact_method_finds_the_fewest_copies(
    make_chunk: Callable[..., Chunk],
    policy: Policy,
    seed: int,
    sizes: tuple[int, ...],
    topology: Topology,
    top_k: int,
) -> None:
    chunk = make_chunk(num_tokens=12, num_experts=sizes, top_k=top_k, seed=seed)
    problem = problem_of(chunk, sizes, topology, cap=1.5)
    costs = [
        follow_tokens(chunk, one, policy, topology) for one in every_placement(problem)
    ]
    exact = solve_exactly(problem, CopiesCost.of([chunk], policy, topology))
    assert exact is not None
    assert exact.objective == min(costs)
    assert follow_tokens(chunk, exact.expert_rank, policy, topology) == min(costs)
    certificate = CopiesCertificate(
        token_sets([chunk]), problem.load, problem.max_load, problem.num_ranks
    )
    certificate.improve(20)
    assert certificate.cost_bound(policy, topology) <= exact.objective


def test_fixed_homes_do_not_tell_the_order_of_experts_apart(
    make_chunk: Callable[..., Chunk],
) -> None:
    """Top 4 of 16 on 2 ranks: 12,870 assignments times orders would fill the memory."""
    chunk = make_chunk(num_tokens=2000, num_experts=(6, 6), top_k=4, vocab_size=500)
    cost = CopiesCost.of([chunk], "fixed", ONE_NODE[2])
    for ids, rows, counts in zip(chunk.experts, cost.rows, cost.num_tokens, strict=True):
        sets = Counter(frozenset(token.tolist()) for token in ids)
        assert (
            Counter(dict(zip(map(frozenset, rows.tolist()), counts, strict=True))) == sets
        )
        assert len(rows) == len(sets)
    ordered = CopiesCost.of([chunk], "follow", ONE_NODE[2])
    assert len(ordered.rows[0]) == len(
        {tuple(token.tolist()) for token in chunk.experts[0]}
    )


def test_it_is_what_simulate_reports(make_chunk: Callable[..., Chunk]) -> None:
    """Mixtral's layers: 8 experts, top 2, here 4 layers on 4 ranks."""
    chunk = make_chunk(num_tokens=300, num_experts=(8,) * 4, num_sequences=12)
    problem = problem_of(chunk, (8,) * 4, ONE_NODE[4], cap=1.2)
    for policy in ("fixed", "follow"):
        cost = CopiesCost.of([chunk], policy, ONE_NODE[4])
        exact = solve_exactly(problem, cost)
        assert exact is not None
        placed = Placement.from_expert_rank(exact.expert_rank, 4)
        metrics = simulate(placed, chunk)[policy].to_json()
        mean = exact.objective / (4 * 4 * chunk.num_tokens)
        reported = metrics["remote_rank_copies_per_token"]
        if policy == "follow":
            reported += metrics["combine_rank_copies_per_token"]
        # The trace has one home per sequence where the cost has the mean over homes.
        assert reported == pytest.approx(mean, abs=0.05)


def test_tokens_are_not_counted_in_pairs_where_layers_cannot_be_enumerated(
    make_trace, monkeypatch
):
    """16 experts on 4 ranks have 63 million assignments; the rows would fill the memory."""

    def refuse(*_):
        raise AssertionError("counted rows of neighbouring layers")

    monkeypatch.setattr(CopiesCost, "of", refuse)
    options = SolveOptions(
        topology=ONE_NODE[4],
        goal=Goal(policy="follow", caps=Caps(max_imbalance=4.0)),
        proof="none",
        params=SolverParams(num_rounds=1, num_sweeps=1),
    )
    plan = plan_from_trace(make_trace(num_experts=(16, 16)), options, EVERYTHING)
    assert plan.solver.status == "feasible"

"""The copies of the exact method against tokens followed one by one, and simulate."""

from collections import Counter
from collections.abc import Callable
from functools import partial

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
from placer.solver.search.copies_cost import CopiesCost, ReceiveLimit
from placer.solver.search.dynamic import solve_exactly
from placer.trace import EVERYTHING, Chunk
from tests.solver.enumeration import (
    ONE_NODE,
    TWO_NODES,
    cost_between,
    every_placement,
    least_max_load,
)


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
    num_ranks = topology.num_ranks
    cost = partial(cost_between, topology)
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


def some_layers(
    sizes: tuple[int, ...], num_ranks: int, number: int, seed: int
) -> list[np.ndarray]:
    """Return for every layer ``[A, E]``: some assignments with equal slots."""
    rng = np.random.default_rng(seed)
    even = [np.arange(size) % num_ranks for size in sizes]
    return [np.array([rng.permutation(one) for _ in range(number)]) for one in even]


LINKS = Topology(
    num_nodes=2,
    gpus_per_node=2,
    cost=((0, 3, 9, 7), (3, 0, 5, 8), (9, 5, 0, 4), (7, 8, 4, 0)),
)


@pytest.mark.parametrize("policy", ["fixed", "follow"])
@pytest.mark.parametrize(
    ("sizes", "topology", "top_k"),
    [
        ((6, 3, 9), ONE_NODE[3], 3),
        ((8, 4, 8), TWO_NODES, 4),
        ((4, 4), LINKS, 2),
        ((6, 4), ONE_NODE[2], 1),
        ((4, 8), Topology(), 2),
    ],
)
def test_layers_and_steps_add_up_to_what_tokens_cost(
    make_chunk: Callable[..., Chunk],
    policy: Policy,
    sizes: tuple[int, ...],
    topology: Topology,
    top_k: int,
) -> None:
    """Tokens of two parts, with different rows; assignments chosen at random."""
    parts = [
        make_chunk(num_tokens=9, num_experts=sizes, top_k=top_k, seed=seed)
        for seed in range(2)
    ]
    cost = CopiesCost.of(parts, policy, topology)
    layers = some_layers(sizes, topology.num_ranks, 3, seed=top_k)
    for number in np.ndindex(*(3,) * len(sizes)):
        placement = [one[n] for one, n in zip(layers, number, strict=True)]
        total = 0.0
        for layer, n in enumerate(number):
            total += cost.single(layer, layers[layer])[n]
            if policy == "follow" and layer + 1 < len(sizes):
                earlier = cost.earlier(layer, layers[layer])
                later = cost.later(layer, layers[layer + 1])
                assert earlier.shape == later.shape == (3, cost.num_features(layer))
                total += earlier[n] @ later[number[layer + 1]]
        expected = sum(follow_placed(part, placement, policy, topology) for part in parts)
        assert total == pytest.approx(expected)
    if policy == "fixed":
        assert [cost.num_features(layer) for layer in range(len(sizes))] == [0] * len(sizes)
        assert cost.num_linked == ()


def follow_placed(
    chunk: Chunk, placement: list[np.ndarray], policy: Policy, topology: Topology
) -> float:
    """R times the cost of all copies of a placement, for any topology."""
    if topology.cost is None:
        return follow_tokens(chunk, tuple(placement), policy, topology)
    num_ranks, total = topology.num_ranks, 0.0
    for token in range(chunk.num_tokens):
        homes = list(range(num_ranks))
        for layer, ranks in enumerate(placement):
            serving = [int(ranks[e]) for e in chunk.experts[layer][token]]
            sent = sum(topology.cost[home][rank] for home in homes for rank in set(serving))
            total += sent * num_ranks / len(homes)
            if policy == "follow":
                homes = [max(serving, key=serving.count)]
                total += num_ranks * sum(topology.cost[r][homes[0]] for r in set(serving))
    return total


def received(
    chunk: Chunk, layer: int, ranks: np.ndarray, earlier: np.ndarray | None, num_ranks: int
) -> np.ndarray:
    """Copies that each rank receives, with homes on ``earlier`` or anywhere."""
    counts = np.zeros(num_ranks)
    for token in range(chunk.num_tokens):
        homes = list(range(num_ranks))
        if earlier is not None:
            before = [int(earlier[e]) for e in chunk.experts[layer - 1][token]]
            homes = [max(before, key=before.count)]
        for rank in {int(ranks[e]) for e in chunk.experts[layer][token]}:
            counts[rank] += sum(home != rank for home in homes) / len(homes)
    return counts


@pytest.mark.parametrize(("num_ranks", "top_k"), [(2, 2), (3, 3)])
def test_a_cap_on_received_copies_allows_what_is_at_most_at_it(
    make_chunk: Callable[..., Chunk], num_ranks: int, top_k: int
) -> None:
    sizes = (6, 6, 6)
    chunk = make_chunk(num_tokens=25, num_experts=sizes, top_k=top_k, seed=num_ranks)
    layers = some_layers(sizes, num_ranks, 6, seed=1)
    for policy in ("fixed", "follow"):
        cost = CopiesCost.of([chunk], policy, ONE_NODE[num_ranks])
        for layer in range(3):
            reached = np.array(
                [
                    received(chunk, layer, one, None, num_ranks).max()
                    for one in layers[layer]
                ]
            )
            # The cap itself is met, what is a thousandth above it is not.
            cap = float(np.sort(reached)[2]) * num_ranks / chunk.num_tokens
            for limit, shift in ((cap, 0), (0.999 * cap, 1e-3)):
                allows = ReceiveLimit(cost=cost, max_copies=limit).allows(
                    layer, layers[layer]
                )
                expected = reached <= np.sort(reached)[2] * (1 - shift) + 1e-9
                if policy == "follow" and layer:
                    expected[:] = True  # it depends on the layer before
                assert allows.tolist() == expected.tolist()
            steps = ReceiveLimit(cost=cost, max_copies=cap).steps_to
            if policy == "fixed":
                assert steps(layer, layers[layer]) is None
            elif layer:
                matrix = np.array(
                    [
                        [
                            received(chunk, layer, one, before, num_ranks).max()
                            for one in layers[layer]
                        ]
                        for before in layers[layer - 1]
                    ]
                )
                most = float(np.median(matrix))
                limit = ReceiveLimit(
                    cost=cost, max_copies=most * num_ranks / chunk.num_tokens
                )
                found = limit.steps_to(layer, layers[layer])
                assert found is not None
                for n, before in enumerate(layers[layer - 1]):
                    allowed = found(before[None])
                    assert np.ravel(allowed).tolist() == (matrix[n] <= most).tolist()


def test_a_cap_on_one_layer(make_chunk: Callable[..., Chunk]) -> None:
    chunk = make_chunk(num_tokens=25, num_experts=(6,), top_k=2)
    cost = CopiesCost.of([chunk], "follow", ONE_NODE[2])
    layer = some_layers((6,), 2, 6, seed=1)[0]
    reached = np.array([received(chunk, 0, one, None, 2).max() for one in layer])
    most = float(np.median(reached))
    limit = ReceiveLimit(cost=cost, max_copies=most * 2 / chunk.num_tokens)
    assert limit.allows(0, layer).tolist() == (reached <= most + 1e-9).tolist()


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

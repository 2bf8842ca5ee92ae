"""The solver against brute force, written from the tokens and not from the counts."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from placer.affinity import count_affinity
from placer.errors import NoSolutionError, PlacerError, UsageError
from placer.model import ModelSpec
from placer.placement.topology import Topology
from placer.planning import planner
from placer.planning.planner import plan_from_trace
from placer.solver.balance.load_caps import balance_layer, greedy_balance
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.solver.params import SolverParams
from placer.solver.problem.pairs import placement_problem
from placer.solver.proof.bounds import heaviest_b_matching
from placer.solver.search.pair_search import Search, transport
from placer.solver.solve import solve
from placer.trace import Chunk, Fold, Selection, Trace


def balanced_assignments(num_experts: int, num_ranks: int) -> list[tuple[int, ...]]:
    slots = num_experts // num_ranks
    ranks = [rank for rank in range(num_ranks) for _ in range(slots)]
    return sorted(set(itertools.permutations(ranks)))


def cost_of_tokens(
    chunk: Chunk, expert_rank: list[tuple[int, ...]], policy: str, topology: Topology
) -> int:
    """Count remote pairs token by token, as the policy's objective is worded."""

    def apart(one: int, two: int) -> int:
        if one == two:
            return 0
        if topology.num_nodes == 1:
            return 1
        same_node = one // topology.gpus_per_node == two // topology.gpus_per_node
        return topology.intra_cost if same_node else topology.inter_cost

    total = 0
    for t in range(chunk.num_tokens):
        ranks = [
            [expert_rank[layer][e] for e in chunk.experts[layer][t]]
            for layer in range(len(chunk.experts))
        ]
        for layer, here in enumerate(ranks):
            pairs = sum(apart(a, b) for a, b in itertools.combinations(here, 2))
            total += pairs if policy == "fixed" else 2 * pairs
            if policy == "follow" and layer + 1 < len(ranks):
                total += sum(apart(a, b) for a in here for b in ranks[layer + 1])
    return total


def feasible(chunk: Chunk, expert_rank: list[tuple[int, ...]], num_ranks: int, cap: float):
    for layer, ranks in enumerate(expert_rank):
        load = np.zeros(num_ranks)
        for e in chunk.experts[layer].ravel():
            load[ranks[e]] += 1
        if load.max() > cap * load.mean() + 1e-9:
            return False
    return True


@pytest.mark.parametrize("policy", ["fixed", "follow"])
@pytest.mark.parametrize(
    "topology",
    [Topology(gpus_per_node=2), Topology(num_nodes=2, gpus_per_node=1, inter_cost=3)],
    ids=["1x2", "2x1"],
)
@pytest.mark.parametrize("seed", range(4))
def test_search_finds_the_optimum_of_tiny_problems_and_the_bound_stays_below(
    make_chunk: Callable[..., Chunk], policy: str, topology: Topology, seed: int
) -> None:
    chunk = make_chunk(num_tokens=40, num_experts=(4, 4, 4), seed=seed)
    affinity = count_affinity([chunk], ModelSpec(num_experts=(4, 4, 4), top_k=2), {})
    cap = 1.2
    layer_choices = balanced_assignments(4, 2)
    costs = {
        choice: cost_of_tokens(chunk, list(choice), policy, topology)
        for choice in itertools.product(layer_choices, repeat=3)
        if feasible(chunk, list(choice), 2, cap)
    }
    best = min(costs.values())
    options = SolveOptions(
        topology=topology, goal=Goal(policy=policy, caps=Caps(max_imbalance=cap))
    )
    placement, report = solve(affinity, options)
    found = tuple(tuple(placement.expert_rank(n).tolist()) for n in range(3))
    assert report.objective == costs[found], "the reported objective is the placement's own"
    assert report.objective == best
    assert report.bound <= best
    assert (report.status == "optimal") == (report.bound == best)


def test_exact_bound_where_groups_are_planted() -> None:
    """Only the last token leaves its group: a pair per layer, two from layer to layer."""
    experts = np.asarray([[0, 2], [1, 3], [0, 2], [1, 3], [0, 1]], np.uint8)
    chunk = Chunk(
        experts=(experts, experts[:, ::-1].copy()),
        sequence_ids=np.arange(5, dtype=np.int32),
        positions=np.zeros(5, np.int32),
    )
    affinity = count_affinity([chunk], ModelSpec(num_experts=(4, 4), top_k=2), {})
    for policy, pairs in (("fixed", 2), ("follow", 2 * 2 + 2)):
        _, report = solve(
            affinity,
            SolveOptions(topology=Topology(gpus_per_node=2), goal=Goal(policy=policy)),
        )
        assert (report.objective, report.bound, report.gap) == (pairs, pairs, 0)
        assert report.status == "optimal"


def test_transport_is_exact() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        cost = rng.integers(0, 50, (6, 3)).astype(float)
        best = min(
            sum(cost[e, r] for e, r in enumerate(ranks))
            for ranks in balanced_assignments(6, 3)
        )
        found = transport(cost, 2)
        assert np.bincount(found).tolist() == [2, 2, 2]
        assert cost[np.arange(6), found].sum() == best


def test_b_matching_equals_a_linear_program_by_hand() -> None:
    weight = np.asarray([[5.0, 1.0], [4.0, 3.0]])
    assert heaviest_b_matching(weight, 1, 1) == 8
    assert heaviest_b_matching(weight, 2, 2) == 13
    assert heaviest_b_matching(weight, 0, 0) == 0


def test_search_never_leaves_the_cap_and_never_loses_its_start(
    make_chunk: Callable[..., Chunk],
) -> None:
    sizes = (12, 12, 12, 12)
    chunk = make_chunk(num_tokens=600, num_experts=sizes, top_k=3)
    affinity = count_affinity([chunk], ModelSpec(num_experts=sizes, top_k=3), {})
    start = [greedy_balance(counts.astype(float), 4) for counts in affinity.load]
    caps = [
        float(np.bincount(ranks, counts, minlength=4).max())
        for ranks, counts in zip(start, affinity.load, strict=True)
    ]
    problem = placement_problem(affinity, "follow", Topology(gpus_per_node=4), caps)
    before = problem.objective(start)
    search = Search(
        problem=problem,
        expert_rank=[ranks.copy() for ranks in start],
        rng=np.random.default_rng(0),
        params=SolverParams(num_rounds=5),
    )
    after = search.run()
    assert problem.is_feasible(search.expert_rank)
    assert after == problem.objective(search.expert_rank) <= before


def test_balance_is_optimal_where_greedy_is_not() -> None:
    """The best split of 8, 7, 6, 5, 4, 3 into three each is 17 and 16, and proved so."""
    load = np.asarray([8.0, 7.0, 6.0, 5.0, 4.0, 3.0])
    best = min(
        max(np.bincount(ranks, load, minlength=2)) for ranks in balanced_assignments(6, 2)
    )
    found = balance_layer(load, 2, max_load=1.0)
    assert found.max_load == best == found.proved_max_load


def test_impossible_cap_names_layers_and_best_reachable(
    make_chunk: Callable[..., Chunk],
) -> None:
    chunk = make_chunk(num_tokens=200)
    affinity = count_affinity([chunk], ModelSpec(num_experts=(8, 8, 8), top_k=2), {})
    options = SolveOptions(
        topology=Topology(gpus_per_node=8), goal=Goal(caps=Caps(max_imbalance=1.01))
    )
    with pytest.raises(
        NoSolutionError, match="out of reach in 3 of 3 MoE layers"
    ) as caught:
        solve(affinity, options)
    assert caught.value.exit_code == 3
    assert "--relax-cap" in caught.value.hint
    relaxed = SolveOptions(
        topology=options.topology, goal=Goal(caps=Caps(max_imbalance=1.01, relax=True))
    )
    _, report = solve(affinity, relaxed)
    busiest = chunk.experts[1].ravel()
    expected = np.bincount(busiest).max() / (len(busiest) / 8)
    assert report.relaxed_layers["1"] == pytest.approx(expected)


def test_ranks_that_do_not_divide_the_slots_are_refused(
    make_chunk: Callable[..., Chunk],
) -> None:
    affinity = count_affinity([make_chunk()], ModelSpec(num_experts=(8, 8, 8), top_k=2), {})
    with pytest.raises(UsageError, match="8 experts do not divide over 3 ranks") as caught:
        solve(affinity, SolveOptions(topology=Topology(gpus_per_node=3)))
    assert "the first 2 ranks hold one more expert" in str(caught.value)
    assert "--redundant-experts 1 or 4 or 7, with --engine NAME; " in caught.value.hint
    assert "1, 2, 4, 8" in caught.value.hint


def test_same_seed_same_bytes(make_trace: Callable[..., Trace], tmp_path: Path) -> None:
    trace = make_trace(num_sequences=12)
    options = SolveOptions(
        topology=Topology(gpus_per_node=4),
        goal=Goal(policy="follow", caps=Caps(max_imbalance=1.3)),
    )
    for name in ("one.json", "two.json"):
        plan_from_trace(trace, options, Selection(Fold(0, 2))).write(tmp_path / name)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_heldout_sequences_are_not_seen(make_trace: Callable[..., Trace]) -> None:
    """The placement of a fold is that of a trace which holds nothing but the fold."""
    trace = make_trace(num_sequences=12)
    only = count_affinity(trace.chunks(Selection(Fold(0, 2))), trace.model, {})
    options = SolveOptions(
        topology=Topology(gpus_per_node=4), goal=Goal(caps=Caps(max_imbalance=1.3))
    )
    alone, _ = solve(only, options)
    plan = plan_from_trace(trace, options, Selection(Fold(0, 2)))
    assert plan.placement.to_json() == alone.to_json()
    assert plan.metrics["heldout"] is not None


def test_a_fold_that_leaves_nothing_to_judge_on_is_refused_before_any_search(
    make_trace: Callable[..., Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "solve", lambda *_: pytest.fail("solved in vain"))
    trace = make_trace(num_sequences=1)
    options = SolveOptions(topology=Topology(gpus_per_node=2))
    with pytest.raises(PlacerError, match="--not-fold 0/2, so no token is left") as error:
        planner.plan_from_trace(trace, options, Selection(Fold(0, 2)))
    assert error.value.hint


@pytest.mark.parametrize("hot", [0, 40])
def test_the_search_starts_from_contiguous_where_that_is_allowed_and_cheaper(
    make_chunk: Callable[..., Chunk], monkeypatch: pytest.MonkeyPatch, hot: int
) -> None:
    """So no plan is worse, even if the search finds nothing; unless it breaks the cap.

    Each token uses two neighbours of one rank; hot ones are all of the first rank.
    """
    monkeypatch.setattr(Search, "run", lambda *_: None)
    first = np.concatenate([np.repeat(np.arange(0, 16, 2), 10), np.tile([0, 2], hot)])
    experts = np.stack([first, first + 1], axis=1).astype(np.uint8)
    chunk = make_chunk(num_tokens=len(first), num_experts=(16,))
    model = ModelSpec(num_experts=(16,), top_k=2)
    affinity = count_affinity([replace(chunk, experts=(experts,))], model, {})
    options = SolveOptions(topology=Topology(gpus_per_node=4), proof="none")
    ranks = solve(affinity, options)[0].expert_rank(0).tolist()
    assert (ranks == [e // 4 for e in range(16)]) == (hot == 0)

"""Homes and placement in turn, against plain loops over tokens and all placements."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from placer.affinity import count_affinity
from placer.errors import PlacerError, UsageError
from placer.model import ModelSpec
from placer.placement import Placement
from placer.placement.topology import Topology
from placer.planning.drift import check_plan
from placer.planning.judge import judge_plan
from placer.planning.planner import plan_from_trace
from placer.planning.tables import TableOptions, make_table
from placer.run.deadline import Deadline
from placer.solver.balance.requests import place_requests
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.solver.params import SolverParams
from placer.solver.problem.layer_profile import layer_tokens
from placer.solver.problem.traffic import TrafficProblem
from placer.solver.search.alternation import Alternation, sequence_parts, vocabulary_of
from placer.solver.search.evaluator import Evaluator
from placer.solver.search.refine import refined
from placer.solver.solve import solve
from placer.table.build import DEFAULT_SHRINKAGE
from placer.trace import EVERYTHING, Chunk, Fold, Selection, Trace, TraceWriter
from tests.plans import changed

TWO = Topology(gpus_per_node=2)


def alternation(chunk: Chunk, num_experts: int, num_ranks: int, **options) -> Alternation:
    load = [
        np.bincount(ids.ravel(), minlength=num_experts)[None].astype(float)
        for ids in chunk.experts
    ]
    return Alternation(
        traffic=TrafficProblem(
            experts=layer_tokens(chunk),
            topology=Topology(gpus_per_node=num_ranks),
            policy="fixed",
            load=tuple(load),
            max_load=tuple(np.full(1, 1e9) for _ in load),
        ),
        tokens=chunk,
        vocab_size=vocabulary_of(chunk, "token"),
        params=SolverParams(num_sweeps=8),
        **options,
    )


def price_by_hand(
    chunk: Chunk, ranks: tuple[tuple[int, ...], ...], num_ranks: int
) -> tuple[float, float]:
    """Copies from homes by token id alone, each part of sequences by all the others.

    A single sequence is all there is: its own table gives its homes.
    The second value is less by the pairs that are served at home.
    """
    part = sequence_parts(chunk, 4, seed=0)
    copies, at_home = 0, 0
    for ids, rank_of in zip(chunk.experts, ranks, strict=True):
        served = np.array(rank_of)[ids]
        for token, here in enumerate(served):
            others = part != part[token] if part.max() else np.ones(len(part), bool)
            prior = np.bincount(served[others].ravel(), minlength=num_ranks)
            prior = prior / prior.sum()
            same = others & (chunk.token_ids == chunk.token_ids[token])
            counts = np.bincount(served[same].ravel(), minlength=num_ranks)
            weight = DEFAULT_SHRINKAGE * len(here)
            home = int(
                ((counts + weight * prior) / (len(here) * same.sum() + weight)).argmax()
            )
            copies += len(set(here.tolist()) - {home})
            at_home += here.tolist().count(home)
    per_layer = served.shape[0] * len(ranks)
    return copies / per_layer, (copies - at_home) / per_layer


HALVES = [
    tuple(int(e in chosen) for e in range(4))
    for chosen in itertools.combinations(range(4), 2)
]


@pytest.mark.parametrize("seed", range(3))
def test_token_price_is_that_of_plain_loops_and_never_rises(
    make_chunk: Callable[..., Chunk], seed: int
) -> None:
    # Two layers are fewer than the layers that a history needs: token ids alone decide.
    chunk = make_chunk(
        num_tokens=60, num_experts=(4, 4), vocab_size=9, num_sequences=7, seed=seed
    )
    found = alternation(chunk, 4, 2, policy="token")
    prices = {
        ranks: price_by_hand(chunk, ranks, 2) for ranks in itertools.product(HALVES, HALVES)
    }
    for ranks, (copies, _) in prices.items():
        placement = Placement.from_expert_rank([np.array(r) for r in ranks], 2, 1)
        assert found.price(placement) == pytest.approx(copies)
    worth = {ranks: price for ranks, (_, price) in prices.items()}
    for start in (max(worth, key=worth.get), (HALVES[0], HALVES[3])):
        end = found.run(Placement.from_expert_rank([np.array(r) for r in start], 2, 1))
        reached = tuple(tuple(end.placement.expert_rank(n).tolist()) for n in range(2))
        assert (end.cost.copies, end.cost.price) == pytest.approx(prices[reached])
        assert worth[reached] <= worth[start]


def test_a_mixture_takes_each_layer_from_where_it_costs_less(
    make_chunk: Callable[..., Chunk],
) -> None:
    chunk = make_chunk(
        num_tokens=60, num_experts=(4, 4), vocab_size=9, num_sequences=7, seed=1
    )
    found = alternation(chunk, 4, 2, policy="token")
    worth = {
        ranks: price_by_hand(chunk, ranks, 2)[1]
        for ranks in itertools.product(HALVES, HALVES)
    }
    starts = [(HALVES[0], HALVES[1]), (HALVES[1], HALVES[0])]
    ends = []
    for ranks in starts:
        placement = Placement.from_expert_rank([np.array(r) for r in ranks], 2, 1)
        # No sweeps: nothing moves, so this is what the start costs.
        still = replace(found, params=SolverParams(num_sweeps=0))
        ends.append(still.run(placement))
    mixed = found.mixture(*ends, Deadline())
    reached = tuple(tuple(mixed.placement.expert_rank(n).tolist()) for n in range(2))
    # Token ids alone decide the homes, so layers do not depend on each other.
    choices = itertools.product(*zip(*starts, strict=True))
    assert worth[reached] == min(worth[one] for one in choices)
    assert mixed.cost.price == pytest.approx(worth[reached])


def test_parts_hold_whole_sequences_of_about_the_same_number(
    make_chunk: Callable[..., Chunk],
) -> None:
    chunk = make_chunk(num_sequences=10)
    part = sequence_parts(chunk, 4, seed=5)
    pairs = set(zip(chunk.sequence_ids.tolist(), part.tolist(), strict=True))
    assert len(pairs) == 10
    assert sorted(np.bincount([p for _, p in pairs])) == [2, 2, 3, 3]


def topics(num_sequences: int, seed: int, num_topics: int = 4) -> Chunk:
    """Top-1 routing: a sequence's topic decides which pair of experts it uses.

    Each token uses one expert, so nothing is used together within a layer. Experts e and
    e + 4 belong together, which contiguous placements separate.
    """
    rng = np.random.default_rng(seed)
    length, layers = 24, 3
    turns = [rng.permutation(num_topics) for _ in range(num_sequences // num_topics // 2)]
    # The request router gives each rank one sequence per turn: so topics come in turns,
    # in both of the folds of even and of odd sequences.
    topic = np.repeat(np.concatenate(turns), 2 * length)
    noise = rng.random((layers, len(topic))) < 0.03
    experts = [
        np.where(
            noise[n],
            rng.integers(8, size=len(topic)),
            topic + 4 * rng.integers(2, size=len(topic)),
        )[:, None].astype(np.uint8)
        for n in range(layers)
    ]
    return Chunk(
        experts=tuple(experts),
        token_ids=(topic * 10 + rng.integers(10, size=len(topic))).astype(np.int32),
        sequence_ids=np.repeat(np.arange(num_sequences), length).astype(np.int32),
        positions=np.tile(np.arange(length), num_sequences).astype(np.int32),
    )


def write(directory: Path, chunk: Chunk, num_experts: int = 8) -> Trace:
    model = ModelSpec(
        num_experts=(num_experts,) * len(chunk.experts), top_k=chunk.experts[0].shape[1]
    )
    with TraceWriter(directory=directory, model=model) as writer:
        writer.append(chunk)
        writer.finish()
    return Trace(directory)


@pytest.mark.parametrize("policy", ["token", "request"])
def test_planted_topics_are_found_and_the_plan_says_so(tmp_path: Path, policy: str) -> None:
    trace = write(tmp_path / "trace", topics(64, seed=1))
    options = SolveOptions(
        topology=Topology(gpus_per_node=4),
        goal=Goal(policy=policy, caps=Caps(max_imbalance=1.3)),
        proof="none",
    )
    plan = plan_from_trace(trace, options, Selection(Fold(part=0, parts=2)))
    for layer in range(3):
        rank = plan.placement.expert_rank(layer)
        assert (rank[:4] == rank[4:]).all()
        assert sorted(rank[:4]) == [0, 1, 2, 3]
    assert plan.policy == policy
    own = plan.metrics["heldout"][policy]
    assert own["local_activation_rate"] > 0.9
    base = plan.metrics["baselines"]["contiguous"][policy]
    assert own["remote_rank_copies_per_token"] < 0.3 * base["remote_rank_copies_per_token"]
    assert plan.solver.bound is None
    if policy == "token":
        again = plan_from_trace(trace, options, Selection(Fold(part=0, parts=2)))
        assert json.dumps(again.to_json()) == json.dumps(plan.to_json())


def test_requests_stay_under_the_cap_and_go_where_they_are_served() -> None:
    counts = np.random.default_rng(0).integers(1, 9, size=(40, 6)).astype(float)
    served = counts @ np.eye(3)[[0, 0, 1, 1, 2, 2]]
    rank = place_requests(counts, served, 1.2)
    load = np.bincount(rank, counts.sum(axis=1))
    assert load.max() <= 1.2 * load.mean()
    roomy = place_requests(counts, served, 3.0, likeness=0.0)
    assert roomy.tolist() == (served / counts.sum(axis=1)[:, None]).argmax(axis=1).tolist()
    alone = np.diag([5.0, 7.0, 9.0])
    assert place_requests(alone, np.roll(alone, 1, axis=1), 2.0).tolist() == [1, 2, 0]


@pytest.mark.parametrize("seed", range(4))
def test_a_plan_that_is_served_is_never_made_worse(
    make_chunk: Callable[..., Chunk], seed: int
) -> None:
    chunk = make_chunk(num_tokens=300, num_sequences=12, seed=seed)
    affinity = count_affinity([chunk], ModelSpec(num_experts=(8, 8, 8), top_k=2), {})
    options = SolveOptions(
        topology=Topology(gpus_per_node=4),
        goal=Goal(policy="token", caps=Caps(max_imbalance=2.0)),
        proof="none",
        params=SolverParams(num_sweeps=8),
    )
    judge = alternation(chunk, 8, 4, policy="token")
    start, _ = solve(affinity, options, None, chunk)
    again = changed(options, placement=start, params=SolverParams(num_sweeps=1))
    end, _ = solve(affinity, again, None, chunk)
    assert judge.rated(end).cost.price <= judge.rated(start).cost.price


def test_one_sequence_is_judged_by_its_own_table(make_chunk: Callable[..., Chunk]) -> None:
    chunk = make_chunk(num_tokens=60, num_sequences=1, num_experts=(4, 4), vocab_size=9)
    found = alternation(chunk, 4, 2, policy="token")
    ranks = ((0, 1, 0, 1), (0, 0, 1, 1))
    start = Placement.from_expert_rank([np.array(r) for r in ranks], 2, 1)
    cost = found.rated(start).cost
    assert (cost.copies, cost.price) == pytest.approx(price_by_hand(chunk, ranks, 2))


def test_without_token_ids_there_are_no_homes(make_chunk: Callable[..., Chunk]) -> None:
    whole = make_chunk()
    model = ModelSpec(num_experts=(8, 8, 8), top_k=2)
    affinity = count_affinity([whole], model, {})
    options = SolveOptions(topology=TWO, goal=Goal(policy="token"))
    blind = Chunk(
        experts=whole.experts, sequence_ids=whole.sequence_ids, positions=whole.positions
    )
    with pytest.raises(PlacerError, match="no token ids") as caught:
        solve(affinity, options, None, blind)
    assert "placer record" in str(caught.value.hint)
    with pytest.raises(UsageError, match="--policy token needs the tokens"):
        solve(affinity, options)


def test_follow_pays_for_every_token_above_the_cap_on_homes(
    make_chunk: Callable[..., Chunk],
) -> None:
    chunk = make_chunk(num_tokens=300, seed=4)
    plain = replace(alternation(chunk, 8, 4, policy="token").traffic, policy="follow")
    capped = replace(plain, caps=Caps(max_home_imbalance=1.1))
    limits = SolverParams(num_sweeps=8)
    start = Placement.from_expert_rank([np.arange(8) // 2] * 3, 4, 1)

    def excess(placement: Placement) -> list[float]:
        """Tokens above 1.1 x 75, whose home is where most of their experts are."""
        found = []
        for layer in range(2):  # nothing follows the third layer
            homes = []
            for experts in chunk.experts[layer]:
                ranks = [int(placement.expert_rank(layer)[e]) for e in experts]
                homes.append(max(ranks, key=lambda r: (ranks.count(r), -ranks.index(r))))
            found.append(sum(max(0, homes.count(r) - 1.1 * 75) for r in range(4)))
        return [*found, 0.0]

    prices = []
    for problem in (plain, capped):
        prices.append(Evaluator(problem, start).price_per_layer())
    paid = (prices[1] - prices[0]) / (4 * SolverParams().home_price)
    assert paid == pytest.approx(excess(start))
    free, even = (refined(start, problem, limits) for problem in (plain, capped))
    assert sum(excess(even)) < 0.5 * sum(excess(free))


@pytest.mark.parametrize("policy", ["fixed", "request"])
def test_a_cap_on_homes_is_refused_where_it_means_nothing(policy: str) -> None:
    with pytest.raises(UsageError, match="--max-home-imbalance") as caught:
        SolveOptions(
            topology=TWO, goal=Goal(policy=policy, caps=Caps(max_home_imbalance=1.5))
        )
    assert "--policy" in str(caught.value.hint)
    with pytest.raises(UsageError, match="must be above 1"):
        SolveOptions(
            topology=TWO, goal=Goal(policy="token", caps=Caps(max_home_imbalance=1.0))
        )


def test_a_cap_on_homes_evens_them_out(make_trace: Callable[..., Trace]) -> None:
    trace = make_trace(num_tokens=2000, vocab_size=200)
    worst = {}
    for cap in (None, 1.05):
        options = SolveOptions(
            topology=TWO,
            goal=Goal(policy="token", caps=Caps(max_imbalance=1.5, max_home_imbalance=cap)),
            proof="none",
        )
        plan = plan_from_trace(trace, options, EVERYTHING)
        worst[cap] = plan.metrics["profile"]["token"]["home_imbalance_max"]
    assert worst[1.05] <= 1.05 + 1e-6 < worst[None]


def test_a_plan_for_tokens_is_judged_with_its_table_or_says_what_it_lacks(
    tmp_path: Path,
) -> None:
    trace = write(tmp_path / "trace", topics(64, seed=2))
    fold = Selection(Fold(part=0, parts=2))
    options = SolveOptions(
        topology=Topology(gpus_per_node=4),
        goal=Goal(policy="token", caps=Caps(max_imbalance=1.3)),
        proof="none",
    )
    plan = plan_from_trace(trace, options, fold)
    path, table = tmp_path / "plan.json", tmp_path / "table.safetensors"
    plan.write(path)
    found = make_table(path, trace, fold=None, options=TableOptions())
    found.table.write(table)
    (judged,) = judge_plan(path, trace, selection=fold.complement(), table_path=table)
    assert judged.policies["token"].to_json() == plan.metrics["heldout"]["token"]
    assert not any("--table" in warning for warning in judged.warnings)
    (without,) = judge_plan(path, trace, selection=fold.complement())
    assert any("--table TABLE" in warning for warning in without.warnings)
    assert without.policy == "fixed"
    assert not check_plan(plan, trace, fold.complement()).drifted

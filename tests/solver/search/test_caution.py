"""Load caps of redundant experts whose copies serve as tables and draws will have it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from placer.affinity import count_affinity
from placer.errors import UsageError
from placer.model import ModelSpec
from placer.placement import Placement, SolverReport
from placer.placement.reference import contiguous
from placer.placement.reference import random as random_placement
from placer.placement.topology import Topology
from placer.planning.planner import plan_from_trace
from placer.run.deadline import Deadline
from placer.run.session import Session
from placer.serving.replica_choice import sglang_static_ranks
from placer.simulation import simulate
from placer.solver.balance.replicas import with_replicas
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.solver.params import SolverParams
from placer.solver.problem.layer_profile import layer_tokens
from placer.solver.problem.traffic import TrafficProblem
from placer.solver.search.alternation import Alternation, vocabulary_of
from placer.solver.search.caution import Caution, kept_under_cap
from placer.solver.search.drawn import best_as_drawn
from placer.solver.search.evaluation import Evaluation, Rated
from placer.solver.search.evaluator import evaluate
from placer.solver.solve import solve
from placer.trace import Chunk, Fold, Selection, Trace, TraceWriter
from tests.plans import changed

SIZES = (16,) * 4
RANKS = 4


def loads_of(chunk: Chunk, size: int, layer: int) -> np.ndarray:
    return np.bincount(chunk.experts[layer].ravel(), minlength=size).astype(float)


def with_copies(chunk: Chunk, placement: Placement, redundant_experts: int) -> Placement:
    loads = [loads_of(chunk, size, n) for n, size in enumerate(placement.num_experts)]
    return with_replicas(placement, loads, redundant_experts)


def traffic(chunk: Chunk, **options: object) -> TrafficProblem:
    """Return a problem of these tokens without caps, unless options say otherwise."""
    sizes = tuple(int(ids.max()) + 1 for ids in chunk.experts)
    loads = tuple(loads_of(chunk, size, n)[None] for n, size in enumerate(sizes))
    fields = {
        "topology": Topology(gpus_per_node=RANKS),
        "policy": "fixed",
        "load": loads,
        "max_load": tuple(np.full(1, 1e9) for _ in loads),
        "replica_choice": "local-first",
    }
    return TrafficProblem(experts=layer_tokens(chunk), **(fields | options))


def local_first(held: np.ndarray, home: int, turn: int) -> int:
    """Return who serves on one node: the copy at home, else all in turn."""
    copies = np.flatnonzero(held)
    return home if held[home] else int(copies[turn % len(copies)])


def imbalance(load: np.ndarray) -> float:
    return float(load.max() / load.mean())


@pytest.mark.parametrize("policy", ["token", "request"])
def test_copies_bear_the_load_that_the_homes_of_tables_ask_of_them(
    make_chunk: Callable[..., Chunk], policy: str
) -> None:
    chunk = make_chunk(num_tokens=3000, num_experts=SIZES, top_k=4, num_sequences=40)
    options = SolveOptions(
        topology=Topology(gpus_per_node=RANKS),
        goal=Goal(
            policy=policy,
            redundant_experts=RANKS,
            replica_choice="local-first",
            caps=Caps(max_imbalance=1.05),
        ),
        proof="none",
    )
    placement, _ = solved(chunk, options)
    assert [len(row) for row in placement.physical_to_logical_map] == [20] * 4
    table = Alternation(
        traffic=traffic(chunk),
        tokens=chunk,
        policy=policy,
        vocab_size=vocabulary_of(chunk, policy),
        params=SolverParams(),
    )
    for layer, homes in enumerate(table.table_homes(placement)):
        held, load = placement.holds(layer), np.zeros(RANKS)
        for token, experts in enumerate(chunk.experts[layer].tolist()):
            for expert in experts:
                load[local_first(held[expert], int(homes[token]), token)] += 1
        assert imbalance(load) <= 1.05 + 1e-9


@pytest.mark.parametrize("policy", ["token", "request"])
def test_what_no_round_brings_under_the_cap_is_repaired(
    make_chunk: Callable[..., Chunk], policy: str
) -> None:
    """Without sweeps, rounds leave the replicas of the busiest experts where they are."""
    chunk = make_chunk(num_tokens=3000, num_experts=SIZES, top_k=4, num_sequences=40)
    start = with_copies(chunk, contiguous(SIZES, RANKS), RANKS)
    table = Alternation(
        traffic=traffic(chunk, max_load=(np.array([1.06 * 3000]),) * 4),
        tokens=chunk,
        policy=policy,
        vocab_size=vocabulary_of(chunk, policy),
        params=SolverParams(num_sweeps=0),
    )
    assert table.rated(start).cost.imbalance.max() > 1.1
    assert table.run(start).cost.imbalance.max() <= 1.06 + 1e-9


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_copies_bear_the_load_that_sglang_draws(
    make_chunk: Callable[..., Chunk], num_nodes: int
) -> None:
    """Under even homes: each home of an expert asks one copy for its part of the load."""
    chunk = make_chunk(num_tokens=1500, num_experts=SIZES, top_k=4)
    options = SolveOptions(
        topology=Topology(num_nodes=num_nodes, gpus_per_node=8 // num_nodes),
        goal=Goal(
            redundant_experts=8,
            replica_choice="sglang-static",
            caps=Caps(max_imbalance=1.1),
        ),
        proof="none",
    )
    placement, _ = solved(chunk, options)
    for layer, serving in enumerate(sglang_static_ranks(placement)):
        load = np.zeros(8)
        for expert, pairs in enumerate(loads_of(chunk, 16, layer)):
            np.add.at(load, serving[:, expert], pairs / 8)
        assert imbalance(load) <= 1.1 + 1e-9


@pytest.mark.parametrize("caution", [None, 0.0, 0.4, 1.0])
def test_caution_counts_what_homes_might_ask_of_a_copy(
    make_chunk: Callable[..., Chunk], caution: float | None
) -> None:
    chunk = make_chunk(num_tokens=300, num_experts=(16,), top_k=4)
    placement = with_copies(chunk, contiguous((16,), RANKS), 2 * RANKS)
    homes = np.random.default_rng(1).choice(RANKS, 300, p=[0.6, 0.2, 0.1, 0.1])
    held, served = placement.holds(0), np.zeros((16, RANKS))
    for token, experts in enumerate(chunk.experts[0].tolist()):
        for expert in experts:
            served[expert, local_first(held[expert], int(homes[token]), token)] += 1
    whole = held * served.sum(axis=1, keepdims=True)
    expected = served + (caution or 0) * (whole - served)
    share = None if caution is None else np.array([caution])
    problem = traffic(chunk, policy="given", homes=(homes,), caution=share)
    found = evaluate(problem, placement)
    assert found.imbalance[0] == pytest.approx(imbalance(expected.sum(axis=0)))


@pytest.mark.parametrize("caution", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("num_nodes", [1, 2])
def test_caution_counts_what_draws_might_ask_of_a_copy(
    make_chunk: Callable[..., Chunk], caution: float, num_nodes: int
) -> None:
    """Far homes ask any copy alike in the mean, and at the most all of them the same."""
    chunk = make_chunk(num_tokens=300, num_experts=(16,), top_k=4)
    placement = with_copies(chunk, contiguous((16,), RANKS, num_nodes), 2 * RANKS)
    width, load = RANKS // num_nodes, np.zeros(RANKS)
    for held, pairs in zip(placement.holds(0), loads_of(chunk, 16, 0), strict=True):
        copies = np.flatnonzero(held).tolist()
        for home in range(RANKS):
            near = [r for r in copies if r // width == home // width]
            if home in copies:
                load[home] += pairs / RANKS
            elif near and len(near) < len(copies):
                load[near[0]] += pairs / RANKS
            else:
                mean = 1 / len(copies)
                load[copies] += pairs / RANKS * (mean + caution * (1 - mean))
    problem = traffic(
        chunk,
        topology=Topology(num_nodes=num_nodes, gpus_per_node=width),
        replica_choice="sglang-static",
        caution=np.array([caution]),
    )
    found = evaluate(problem, placement)
    assert found.imbalance[0] == pytest.approx(imbalance(load))


def served_by_hand(
    chunk: Chunk,
    placement: Placement,
    layer: int,
    homes: np.ndarray,
    layer_ids: tuple[int, ...] | None = None,
) -> tuple[float, np.ndarray]:
    """Return the copies of a layer per token, and the load, as SGLang draws for it."""
    serving = sglang_static_ranks(placement, layer_ids)[layer]
    copies, load = 0, np.zeros(placement.num_ranks)
    for home, experts in zip(homes.tolist(), chunk.experts[layer].tolist(), strict=True):
        ranks = [int(serving[home, expert]) for expert in experts]
        copies += len(set(ranks) - {home})
        np.add.at(load, ranks, 1)
    return copies / len(homes), load


@pytest.mark.parametrize("ids", [None, (3, 4, 6, 7)])
def test_draws_serve_as_sglang_has_them(
    make_chunk: Callable[..., Chunk], ids: tuple[int, ...] | None
) -> None:
    chunk = make_chunk(num_tokens=400, num_experts=SIZES, top_k=4)
    homes = tuple(np.random.default_rng(n).integers(RANKS, size=400) for n in range(4))
    problem = traffic(
        chunk,
        policy="given",
        homes=homes,
        replica_choice="sglang-static",
        layer_ids=ids,
    )
    placement = with_copies(chunk, random_placement(SIZES, RANKS, seed=2), 2 * RANKS)
    found = evaluate(problem, placement)
    by_hand = [served_by_hand(chunk, placement, n, homes[n], ids) for n in range(4)]
    assert found.copies == pytest.approx(np.mean([copies for copies, _ in by_hand]))
    assert found.imbalance == pytest.approx([imbalance(load) for _, load in by_hand])


@pytest.mark.parametrize("cap", [1.25, 2.0])
@pytest.mark.parametrize("layer_ids", [None, (1, 2, 4, 7)])
def test_each_layer_is_of_the_placement_that_draws_serve_best(
    make_chunk: Callable[..., Chunk], cap: float, layer_ids: tuple[int, ...] | None
) -> None:
    """In order: what is taken in one layer moves the draws of all after it."""
    chunk = make_chunk(num_tokens=400, num_experts=SIZES, top_k=4)
    homes = tuple(np.random.default_rng(n).integers(RANKS, size=400) for n in range(4))
    tried = [
        with_copies(chunk, random_placement(SIZES, RANKS, seed=n), 2 * RANKS)
        for n in range(5)
    ]
    mean = 400 * 4 / RANKS
    problem = traffic(
        chunk,
        policy="given",
        homes=homes,
        replica_choice="sglang-static",
        max_load=(np.array([cap * mean]),) * 4,
        layer_ids=layer_ids,
    )
    found = best_as_drawn(problem, tried)
    rows = list(tried[0].physical_to_logical_map)
    for layer in range(4):
        judged = []
        for one in tried:
            rows[layer] = one.physical_to_logical_map[layer]
            placement = Placement(
                physical_to_logical_map=tuple(rows), num_experts=SIZES, num_ranks=RANKS
            )
            copies, load = served_by_hand(chunk, placement, layer, homes[layer], layer_ids)
            over = np.maximum(load - cap * mean, 0).sum()
            judged.append((round(over, 3), copies, rows[layer]))
        rows[layer] = min(judged, key=lambda one: one[:2])[2]
    for row, expected in zip(found.physical_to_logical_map, rows, strict=True):
        slots = expected.reshape(RANKS, -1)
        assert np.sort(row.reshape(RANKS, -1)).tolist() == np.sort(slots).tolist()


def evaluation(*overflow: float) -> Evaluation:
    """Return what is so far above the load cap in each layer."""
    none = np.zeros(len(overflow))
    return Evaluation(
        copies=0.0,
        price=0.0,
        price_of_layer=none,
        overflow=np.array([overflow, none]),
        imbalance=none,
        most_received_copies=none,
    )


def test_caution_halves_until_a_layer_is_above_its_cap_and_doubles_then() -> None:
    caution = Caution.of_share(np.full(3, 0.3))
    shares = []
    for overflow in ((0, 5, 0), (0, 5, 0), (7, 0, 0), (0, 0, 0), (0, 9, 0)):
        caution = caution.adapted(evaluation(*overflow), 0.1)
        shares.append(caution.share.tolist())
    assert np.array(shares) == pytest.approx(
        np.array(
            [
                [0.15, 0.6, 0.15],
                [0.075, 1.0, 0.075],
                [0.15, 1.0, 0.0375],
                [0.15, 1.0, 0.01875],
                [0.15, 1.0, 0.009375],
            ]
        )
    )


@pytest.mark.parametrize("is_late", [False, True])
def test_layers_above_the_cap_are_repaired_with_more_and_more_caution(
    is_late: bool,
) -> None:
    """Not the others, and each time what is best so far; late, while that helps."""
    seen = []

    def repaired(best: Rated, layers: np.ndarray, share: float, number: int) -> Rated:
        seen.append((layers.tolist(), share, best.cost.overflow[0].tolist()))
        left = {0.1: (0, 9), 0.2: (0, 2), 0.4: (0, 0)}.get(share, (0, 7))
        return Rated(placement=best.placement, cost=evaluation(*left))

    deadline = Deadline(stopped=is_late)
    start = Rated(placement=contiguous((4, 4), 2), cost=evaluation(0, 8))
    found = kept_under_cap(start, repaired, SolverParams(), deadline)
    rounds = [
        ([False, True], 0.0, [0, 8]),
        ([False, True], 0.1, [0, 7]),
        ([False, True], 0.2, [0, 7]),
        ([False, True], 0.4, [0, 2]),
    ]
    assert seen == (rounds[:2] if is_late else rounds)
    assert found.cost.overflow[0].tolist() == ([0, 7] if is_late else [0, 0])
    seen.clear()
    assert kept_under_cap(start, repaired, SolverParams(), Deadline(seconds=0.0)) is start
    assert seen == [], "no time is left"


def test_careful_copies_hardly_add_to_any_rank() -> None:
    """Counted whole, copies of the least used experts go where most room is."""
    load = np.array([8.0, 7, 6, 5, 4, 3, 2, 1])
    placement = contiguous((8,), 4)
    slots = with_replicas(placement, [load], 4, np.array([True]))
    ranks = slots.physical_to_logical_map[0].reshape(4, 3).tolist()
    # From the least loaded on: rank 3 (3) has 7, so 6 is not new either: it takes 5;
    # rank 2 (7), rank 3 is full, rank 1 (11) and rank 0 (15) all take 7.
    assert ranks == [[0, 1, 7], [2, 3, 7], [4, 5, 7], [5, 6, 7]]


def busy_chunk(num_tokens: int = 1500) -> Chunk:
    """One expert has more load than a rank may serve: only copies of it meet the cap."""
    rng = np.random.default_rng(3)
    taste = np.zeros(16)
    taste[5] = 3.0
    experts = tuple(
        np.argsort(-(taste + rng.gumbel(size=(num_tokens, 16))), axis=1)[:, :4].astype(
            np.uint8
        )
        for _ in SIZES
    )
    return Chunk(
        experts=experts,
        token_ids=rng.integers(50, size=num_tokens).astype(np.int32),
        sequence_ids=np.sort(rng.integers(30, size=num_tokens)).astype(np.int32),
        positions=np.arange(num_tokens).astype(np.int32),
    )


def solved(
    chunk: Chunk, options: SolveOptions, session: Session | None = None
) -> tuple[Placement, SolverReport]:
    sizes = tuple(int(ids.max()) + 1 for ids in chunk.experts)
    top_k = chunk.experts[0].shape[1]
    affinity = count_affinity([chunk], ModelSpec(num_experts=sizes, top_k=top_k), {})
    return solve(affinity, options, session, chunk)


@pytest.mark.parametrize(
    ("policy", "rule"),
    [("token", "local-first"), ("fixed", "sglang-static"), ("follow", "sglang-static")],
)
def test_a_rank_that_only_copies_relieve_is_relieved(policy: str, rule: str) -> None:
    chunk = busy_chunk()
    assert loads_of(chunk, 16, 0).max() > 1.15 * 1500 * 4 / 8
    options = SolveOptions(
        topology=Topology(gpus_per_node=8),
        goal=Goal(
            policy=policy,
            redundant_experts=8,
            replica_choice=rule,
            caps=Caps(max_imbalance=1.15),
        ),
        proof="none",
    )
    solved(chunk, options, Session(seed=2))  # or it says that the cap was not reached


def test_few_experts_with_copies_are_not_called_optimal(
    make_chunk: Callable[..., Chunk],
) -> None:
    """Eight experts on four ranks are solved exactly, except for their copies."""
    chunk = make_chunk(num_tokens=600, num_experts=(8, 8), top_k=2)
    options = SolveOptions(
        topology=Topology(gpus_per_node=RANKS),
        goal=Goal(
            redundant_experts=RANKS,
            replica_choice="sglang-static",
            caps=Caps(max_imbalance=1.2),
        ),
    )
    _, report = solved(chunk, options)
    assert (report.status, report.bound, report.gap) == ("feasible", None, None)
    _, capped = solved(chunk, changed(options, max_received_copies=1.3))
    assert capped.most_received_copies <= 1.3


@pytest.mark.parametrize("policy", ["fixed", "follow"])
def test_a_plan_that_sglang_serves_is_never_made_worse(
    make_chunk: Callable[..., Chunk], policy: str
) -> None:
    chunk = make_chunk(num_tokens=600, num_experts=SIZES, top_k=4)
    options = SolveOptions(
        topology=Topology(gpus_per_node=RANKS),
        goal=Goal(
            policy=policy,
            redundant_experts=RANKS,
            replica_choice="sglang-static",
            caps=Caps(max_imbalance=1.2),
        ),
        proof="none",
        params=SolverParams(num_sweeps=8),
    )
    start, report = solved(chunk, options)
    again = changed(options, placement=start, params=SolverParams(num_sweeps=1))
    assert solved(chunk, again, Session(seed=1))[1].objective <= report.objective


@pytest.mark.parametrize(
    ("policy", "rule"),
    [("token", "local-first"), ("fixed", "sglang-static"), ("follow", "sglang-static")],
)
def test_a_search_that_has_no_time_still_repairs_what_it_has(
    make_chunk: Callable[..., Chunk], policy: str, rule: str
) -> None:
    chunk = make_chunk(num_tokens=1500, num_experts=SIZES, top_k=4, num_sequences=40)
    options = SolveOptions(
        topology=Topology(gpus_per_node=RANKS),
        goal=Goal(
            policy=policy,
            redundant_experts=RANKS,
            replica_choice=rule,
            caps=Caps(max_imbalance=1.25),
        ),
        proof="none",
    )
    _, report = solved(chunk, options, Session.begun(time_limit=0.001))
    assert not report.reproducible


def topics(num_topics: int = 8, num_sequences: int = 30, length: int = 30) -> Chunk:
    """Each sequence has the ten token ids of a topic, each id a taste for experts."""
    rng = np.random.default_rng(1)
    topic = np.repeat(rng.integers(num_topics, size=num_sequences), length)
    ids = topic * 10 + rng.integers(10, size=len(topic))
    taste = 1.5 * rng.gumbel(size=(3, num_topics * 10, 16))
    order = [np.argsort(-(one[ids] + rng.gumbel(size=(len(ids), 16)))) for one in taste]
    return Chunk(
        experts=tuple(one[:, :4].astype(np.uint8) for one in order),
        token_ids=ids.astype(np.int32),
        sequence_ids=np.repeat(np.arange(num_sequences), length).astype(np.int32),
        positions=np.tile(np.arange(length), num_sequences).astype(np.int32),
    )


def test_caution_from_the_first_round_meets_a_cap_that_tables_exceed_without_it() -> None:
    """Without it, two of the three layers stay above the cap."""
    options = SolveOptions(
        topology=Topology(gpus_per_node=8),
        goal=Goal(
            policy="token",
            redundant_experts=8,
            replica_choice="sglang-static",
            caps=Caps(max_imbalance=1.1, relax=True),
        ),
        proof="none",
        params=SolverParams(num_sweeps=4),
    )
    assert not solved(topics(), options)[1].relaxed_layers


def test_hash_needs_no_caution_for_homes(make_chunk: Callable[..., Chunk]) -> None:
    """It does not look at homes: the busiest experts' replicas share their load evenly."""
    chunk = make_chunk(num_tokens=1500, num_experts=SIZES, top_k=4, num_sequences=40)
    options = SolveOptions(
        topology=Topology(gpus_per_node=RANKS),
        goal=Goal(
            policy="token",
            redundant_experts=RANKS,
            replica_choice="hash",
            caps=Caps(max_imbalance=1.1),
        ),
        proof="none",
    )
    placement, _ = solved(chunk, options)
    for layer in range(4):
        held = placement.holds(layer)
        load = loads_of(chunk, 16, layer) / held.sum(axis=1) @ held
        assert imbalance(load) <= 1.1 + 1e-9


def test_copies_that_do_not_fit_are_refused_before_the_search(
    make_chunk: Callable[..., Chunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = "placer.solver.search.minimise.refined"
    monkeypatch.setattr(searched, lambda *_, **__: pytest.fail("it searched"))
    options = SolveOptions(
        topology=Topology(gpus_per_node=RANKS),
        goal=Goal(
            policy="token", redundant_experts=RANKS + 2, replica_choice="local-first"
        ),
        proof="none",
    )
    with pytest.raises(UsageError, match="do not divide over 4 ranks"):
        solved(make_chunk(num_experts=SIZES, top_k=4), options)


@pytest.mark.parametrize("rule", ["sglang-static", "hash"])
def test_plans_report_what_copies_serve_by_their_own_rule(
    make_chunk: Callable[..., Chunk], tmp_path: Path, rule: str
) -> None:
    chunk = make_chunk(num_tokens=1200, num_experts=SIZES, top_k=4, num_sequences=40)
    model = ModelSpec(num_experts=SIZES, top_k=4)
    with TraceWriter(directory=tmp_path / "trace", model=model) as writer:
        writer.append(chunk)
        writer.finish()
    options = SolveOptions(
        topology=Topology(gpus_per_node=RANKS),
        goal=Goal(
            redundant_experts=RANKS, replica_choice=rule, caps=Caps(max_imbalance=1.2)
        ),
        proof="none",
    )
    fold = Selection(Fold(part=0, parts=2))
    plan = plan_from_trace(Trace(tmp_path / "trace"), options, fold)
    heldout = Trace(tmp_path / "trace").read(fold.complement())
    reported = plan.metrics["heldout"]["fixed"]
    for choice in (rule, "local-first"):
        found = simulate(plan.placement, heldout, replica_choice=choice)["fixed"]
        assert (found.to_json() == reported) == (choice == rule)
    assert plan.replica_choice == rule

"""The refinement against a plain count, token by token, of the copies that a plan sends."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from placer.affinity import count_affinity
from placer.errors import NoSolutionError, UsageError
from placer.model import ModelSpec
from placer.placement import Placement, SolverReport
from placer.placement.reference import contiguous, random
from placer.placement.topology import Topology
from placer.run.deadline import Deadline
from placer.run.session import Session
from placer.solver.balance.replicas import with_replicas
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.solver.params import SolverParams
from placer.solver.problem.layer_profile import layer_tokens
from placer.solver.problem.scenarios import load_scenarios
from placer.solver.problem.traffic import TrafficProblem, copy_prices, sample_sequences
from placer.solver.search.evaluator import Evaluator, evaluate
from placer.solver.search.refine import _Refinement, refined
from placer.solver.solve import solve
from placer.trace import Chunk
from tests.plans import changed

SIZES = (8, 8, 8)
TOPOLOGIES = {
    "1x4": Topology(gpus_per_node=4),
    "2x2": Topology(num_nodes=2, gpus_per_node=2, inter_cost=5, intra_cost=2),
}


def price_of_copies(
    chunk: Chunk,
    placement: Placement,
    policy: str,
    exchange: str,
    topology: Topology,
    rule: str = "local-first",
) -> float:
    """Follow every token through the layers with sets and loops; mean over (token, layer).

    Every first home is tried.
    """
    serving = server(chunk, placement, rule)
    num_ranks, width = topology.num_ranks, topology.gpus_per_node
    inside = 1 if topology.num_nodes == 1 else topology.intra_cost

    def sent(home: int, ranks: set[int]) -> float:
        if exchange == "per-rank":
            return sum(
                (topology.inter_cost if r // width != home // width else inside)
                for r in ranks - {home}
            )
        total = 0.0
        for node in {r // width for r in ranks}:
            total += topology.inter_cost if node != home // width else 0
            landing = node * width + home % width
            total += inside * len({r for r in ranks if r // width == node} - {landing})
        return total

    total = 0.0
    for t in range(chunk.num_tokens):
        for first in range(num_ranks):
            home = first
            for layer in range(len(chunk.experts)):
                ranks = serving(t, layer, home)
                total += sent(home, set(ranks)) / num_ranks
                if policy == "follow":
                    home = next_home(ranks)
                    total += sent(home, set(ranks)) / num_ranks
    return total / chunk.num_tokens / len(chunk.experts)


def server(
    chunk: Chunk, placement: Placement, rule: str = "local-first"
) -> Callable[[int, int, int], list[int]]:
    """Return what names the k ranks that serve a token in a layer, from a home.

    ``local-first``: at home, else on the home's node, else any; ``hash``: any. Equal ones
    take turns by the token's place.
    """
    width = placement.ranks_per_node
    tokens = [ids.tolist() for ids in chunk.experts]
    held = [
        [np.flatnonzero(row).tolist() for row in placement.holds(layer)]
        for layer in range(placement.num_layers)
    ]

    def serving(t: int, layer: int, home: int) -> list[int]:
        found = []
        for e in tokens[layer][t]:
            near = copies = held[layer][e]
            if rule == "local-first":
                near = [r for r in copies if r == home]
                near = near or [r for r in copies if r // width == home // width] or copies
            found.append(near[t % len(near)])
        return found

    return serving


def next_home(ranks: list[int]) -> int:
    """Return the rank that serves most experts of a token; of equals the first."""
    return max(ranks, key=lambda r: (ranks.count(r), -ranks.index(r)))


def follow_with_replicas(*, num_ranks: int, max_imbalance: float) -> SolveOptions:
    return SolveOptions(
        topology=Topology(gpus_per_node=num_ranks),
        goal=Goal(
            policy="follow",
            redundant_experts=num_ranks,
            replica_choice="local-first",
            caps=Caps(max_imbalance=max_imbalance),
        ),
        proof="none",
    )


def loads_of_followed_homes(chunk: Chunk, placement: Placement) -> list[list[int]]:
    """Follow every token from a home drawn for it; count what the ranks serve."""
    homes = np.random.default_rng(5).integers(placement.num_ranks, size=chunk.num_tokens)
    serving, found = server(chunk, placement), []
    for layer in range(placement.num_layers):
        served = [serving(t, layer, home) for t, home in enumerate(homes)]
        found.append(np.bincount(np.ravel(served), minlength=placement.num_ranks).tolist())
        homes = [next_home(ranks) for ranks in served]
    return found


def imbalance(load: list[int]) -> float:
    return max(load) / (sum(load) / len(load))


def traffic(chunk: Chunk, topology: Topology, **options: object) -> TrafficProblem:
    load = load_scenarios(chunk, SIZES, "none", 0)
    fields = {
        "policy": "fixed",
        "load": load,
        "max_load": tuple(np.array([1e9]) for _ in load),
    }
    return TrafficProblem(
        experts=layer_tokens(chunk), topology=topology, **(fields | options)
    )


def searched(problem: TrafficProblem, start: Placement, **options: object) -> Placement:
    limits = SolverParams(num_sweeps=4)
    return refined(start, problem, limits, **options)


@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES)
@pytest.mark.parametrize("exchange", ["per-rank", "per-node"])
@pytest.mark.parametrize("policy", ["fixed", "follow"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_price_is_that_of_the_copies(
    make_chunk: Callable[..., Chunk],
    topology: Topology,
    exchange: str,
    policy: str,
    top_k: int,
) -> None:
    chunk = make_chunk(num_tokens=30, top_k=top_k)
    problem = traffic(chunk, topology, policy=policy, exchange=exchange)
    placement = random(SIZES, topology.num_ranks, topology.num_nodes, seed=3)
    better = searched(problem, placement)
    prices = []
    for one in (placement, better):
        found = evaluate(problem, one)
        assert found.copies == pytest.approx(
            price_of_copies(chunk, one, policy, exchange, topology)
        )
        prices.append(found.copies)
    # A single copy to any rank with even homes costs the same wherever experts are.
    constant = top_k == 1 and policy == "fixed"
    assert prices[1] == prices[0] if constant else prices[1] < prices[0]


@pytest.mark.parametrize(("rule", "error"), [("local-first", 0.02), ("hash", 1e-9)])
def test_replicas_are_priced_as_they_are_served(
    make_chunk: Callable[..., Chunk], rule: str, error: float
) -> None:
    """Where homes decide, each token stands for one: many come near the mean over homes."""
    chunk = make_chunk(num_tokens=3000, top_k=2)
    topology = TOPOLOGIES["2x2"]
    problem = traffic(chunk, topology, replica_choice=rule)
    loads = [load[0] for load in problem.load]
    start = with_replicas(contiguous(SIZES, 4, 2), loads, 8)
    better = searched(problem, start)
    prices = []
    for one in (start, better):
        found = evaluate(problem, one)
        plain = price_of_copies(chunk, one, "fixed", "per-rank", topology, rule)
        assert found.copies == pytest.approx(plain, rel=error)
        prices.append(plain)
    assert prices[1] < 0.95 * prices[0]
    assert [len(row) for row in better.physical_to_logical_map] == [16] * 3


def test_replicas_bear_the_load_that_homes_ask_of_them(
    make_chunk: Callable[..., Chunk],
) -> None:
    """Homes follow experts, and the turns of their copies: they are not even."""
    sizes = (16,) * 4
    chunk = make_chunk(num_tokens=3000, num_experts=sizes, top_k=4)
    affinity = count_affinity([chunk], ModelSpec(num_experts=sizes, top_k=4), {})
    options = follow_with_replicas(num_ranks=4, max_imbalance=1.05)
    placement, report = solve(affinity, options, tokens=chunk)
    assert not report.relaxed_layers
    found = loads_of_followed_homes(chunk, placement)
    assert max(imbalance(load) for load in found) < 1.05 + 0.01


CUT = follow_with_replicas(num_ranks=8, max_imbalance=1.03)
WHOLE = follow_with_replicas(num_ranks=8, max_imbalance=1.1).quick()


@pytest.mark.parametrize(
    ("options", "last", "seed"),
    [
        (changed(WHOLE, max_received_copies=3.2), "no line", 0),
        (CUT, "copies, sweep 7", 2),
    ],
    ids=["whole", "cut"],
)
def test_what_moves_break_further_on_is_repaired(
    make_chunk: Callable[..., Chunk],
    monkeypatch: pytest.MonkeyPatch,
    options: SolveOptions,
    last: str,
    seed: int,
) -> None:
    sizes = (16,) * 8
    chunk = make_chunk(num_tokens=1500, num_experts=sizes, top_k=4, seed=seed)
    affinity = count_affinity([chunk], ModelSpec(num_experts=sizes, top_k=4), {})

    def solved() -> tuple[Placement, SolverReport]:
        deadline = Deadline()

        def stop(line: str) -> None:
            deadline.stopped = deadline.stopped or last in line

        return solve(affinity, options, Session(progress=stop, deadline=deadline), chunk)

    placement, report = solved()
    assert report.reproducible == (options is not CUT)
    found = loads_of_followed_homes(chunk, placement)
    assert max(imbalance(load) for load in found) < options.goal.caps.load_cap + 0.02
    monkeypatch.setattr(_Refinement, "repair", lambda *_: None)
    with pytest.raises(NoSolutionError, match="was not reached") as caught:
        solved()
    assert ("the search was stopped" in str(caught.value)) == (options is CUT)


@pytest.mark.parametrize("seed", range(3))
def test_tiny_problems_end_at_the_optimum(
    make_chunk: Callable[..., Chunk], seed: int
) -> None:
    chunk = make_chunk(num_tokens=60, num_experts=(6,), top_k=2, seed=seed)
    topology = Topology(gpus_per_node=3)
    orders = {
        tuple(sorted((tuple(sorted(p[0:2])), tuple(sorted(p[2:4])), tuple(sorted(p[4:])))))
        for p in itertools.permutations(range(6))
    }
    best = min(
        price_of_copies(
            chunk,
            Placement(
                physical_to_logical_map=(np.array(sum(order, ())),),
                num_experts=(6,),
                num_ranks=3,
            ),
            "fixed",
            "per-rank",
            topology,
        )
        for order in orders
    )
    load = load_scenarios(chunk, (6,), "none", 0)
    problem = replace(traffic(make_chunk(), topology), experts=layer_tokens(chunk))
    problem = replace(problem, load=load, max_load=(np.array([1e9]),))
    found = searched(problem, contiguous((6,), 3))
    reached = price_of_copies(chunk, found, "fixed", "per-rank", topology)
    assert reached == pytest.approx(best)


def test_annealing_again_only_makes_layers_cheaper(
    make_chunk: Callable[..., Chunk],
) -> None:
    """Under ``fixed`` each layer keeps its best; the first of four is the only one."""
    chunk = make_chunk(num_tokens=400, top_k=3)
    problem = traffic(chunk, TOPOLOGIES["1x4"])
    start = random(SIZES, 4, 1, seed=3)
    prices = []
    for num_starts in (1, 4):
        limits = SolverParams(num_sweeps=1, num_starts=num_starts)
        found = refined(start, problem, limits)
        prices.append(Evaluator(problem, found).price_per_layer())
    assert (prices[1] <= prices[0]).all()
    assert (prices[1] < prices[0]).any()


@pytest.mark.parametrize("policy", ["fixed", "follow"])
def test_the_cap_is_never_left(make_chunk: Callable[..., Chunk], policy: str) -> None:
    chunk = make_chunk(num_tokens=2000)
    affinity = count_affinity([chunk], ModelSpec(num_experts=SIZES, top_k=2), {})
    options = SolveOptions(
        topology=Topology(gpus_per_node=4),
        goal=Goal(
            policy=policy, robust="bootstrap", caps=Caps(max_imbalance=1.05, relax=True)
        ),
        proof="none",
    )
    placement, report = solve(affinity, options, tokens=chunk)
    for layer, load in enumerate(affinity.load):
        held = np.bincount(placement.expert_rank(layer), load, minlength=4)
        cap = report.relaxed_layers.get(str(layer), 1.05)
        assert held.max() / held.mean() <= cap + 1e-9


def test_threads_change_nothing_and_the_seed_decides(
    make_chunk: Callable[..., Chunk],
) -> None:
    chunk = make_chunk(num_tokens=500, num_experts=(16,) * 4, top_k=4)
    load = load_scenarios(chunk, (16,) * 4, "bootstrap", 0)
    problem = TrafficProblem(
        experts=layer_tokens(chunk),
        topology=Topology(gpus_per_node=4),
        policy="follow",
        load=load,
        max_load=tuple(np.full(len(one), 650.0) for one in load),
        overflow_price=2.0,
        receive_price=0.5,
    )
    start = contiguous((16,) * 4, 4)
    one, two, other = (
        searched(problem, start, num_threads=n, seed=seed).to_json()
        for n, seed in ((1, 0), (2, 0), (1, 1))
    )
    assert one == two != other


def test_robust_plans_bear_other_loads_better(make_chunk: Callable[..., Chunk]) -> None:
    """Over the resampled loads, less is above the cap than without them."""
    chunk = make_chunk(num_tokens=1500, num_experts=(16, 16), num_sequences=12, top_k=2)
    affinity = count_affinity([chunk], ModelSpec(num_experts=(16, 16), top_k=2), {})
    scenarios = load_scenarios(chunk, (16, 16), "bootstrap", 0)

    def overflow(robust: str) -> float:
        options = SolveOptions(
            topology=Topology(gpus_per_node=4),
            goal=Goal(robust=robust, caps=Caps(max_imbalance=1.10, relax=True)),
            proof="none",
        )
        placement, _ = solve(affinity, options, tokens=chunk)
        over = 0.0
        for layer, loads in enumerate(scenarios):
            for load in loads[1:]:
                held = np.bincount(placement.expert_rank(layer), load, minlength=4)
                over += np.maximum(held - 1.10 * held.mean(), 0).sum()
        return over

    assert overflow("bootstrap") < overflow("none")


def test_a_price_on_the_busiest_receiver_evens_it_out(
    make_chunk: Callable[..., Chunk],
) -> None:
    chunk = make_chunk(num_tokens=1500, num_experts=(16,), top_k=4)
    affinity = count_affinity([chunk], ModelSpec(num_experts=(16,), top_k=4), {})

    def busiest(price: float) -> int:
        options = SolveOptions(
            topology=Topology(gpus_per_node=4),
            goal=Goal(receive_price=price, caps=Caps(max_imbalance=2.0)),
            proof="none",
        )
        placement, _ = solve(affinity, options, tokens=chunk)
        ranks = placement.expert_rank(0)[chunk.experts[0]]
        return max(int((ranks == r).any(axis=1).sum()) for r in range(4))

    assert busiest(5.0) < busiest(0.0)


def test_scenarios_keep_the_profile_first_and_its_size(
    make_chunk: Callable[..., Chunk],
) -> None:
    chunk = make_chunk(num_tokens=300)
    domains = (chunk.sequence_ids % 2).astype(np.uint8)
    chunk = replace(chunk, domain_ids=domains)
    for robust, number in (("none", 1), ("bootstrap", 65), ("domains", 3)):
        for layer, load in enumerate(load_scenarios(chunk, SIZES, robust, 0)):
            own = np.bincount(chunk.experts[layer].ravel(), minlength=8)
            assert load.shape == (number, 8)
            assert (load[0] == own).all()
            assert load.sum(axis=1) == pytest.approx(np.full(number, own.sum()))
    of_one = np.bincount(chunk.experts[0][domains == 1].ravel(), minlength=8)
    by_domain = load_scenarios(chunk, SIZES, "domains", 0)[0][2]
    assert by_domain / by_domain.sum() == pytest.approx(of_one / of_one.sum())


def test_replicas_that_cannot_be_are_refused() -> None:
    start = contiguous((4,), 2)
    load = [np.array([4.0, 3.0, 2.0, 1.0])]
    with pytest.raises(UsageError, match="do not divide over 2 ranks"):
        with_replicas(start, load, 3)
    with pytest.raises(UsageError, match="no rank may hold two replicas"):
        with_replicas(start, load, 6)
    assert with_replicas(start, load, 4).holds(0).all()


def test_a_cap_missed_with_replicas_is_refused_or_recorded(
    make_chunk: Callable[..., Chunk],
) -> None:
    chunk = make_chunk(num_tokens=200)
    affinity = count_affinity([chunk], ModelSpec(num_experts=SIZES, top_k=2), {})
    options = SolveOptions(
        topology=Topology(gpus_per_node=4),
        goal=Goal(
            redundant_experts=4, replica_choice="local-first", caps=Caps(max_imbalance=1.0)
        ),
    )
    with pytest.raises(NoSolutionError, match="was not reached in") as caught:
        solve(affinity, options, tokens=chunk)
    assert "--relax-cap" in caught.value.hint
    _, report = solve(affinity, changed(options, relax=True), tokens=chunk)
    assert report.relaxed_layers
    assert report.bound is None


def test_exchanges_without_choice_are_refused() -> None:
    with pytest.raises(UsageError, match="does not depend on the placement"):
        copy_prices(Topology(gpus_per_node=2), "all-gather")


def test_long_profiles_are_sampled_by_whole_sequences(
    make_chunk: Callable[..., Chunk],
) -> None:
    chunk = make_chunk(num_tokens=2000, num_sequences=40)
    sample = sample_sequences(chunk, 500, 0)
    assert 500 <= sample.num_tokens < 650
    for sequence in np.unique(sample.sequence_ids):
        whole = np.count_nonzero(chunk.sequence_ids == sequence)
        assert np.count_nonzero(sample.sequence_ids == sequence) == whole

"""The cap on received copies, against all placements and tokens followed by hand."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from placer.affinity import count_affinity
from placer.cli.main import main
from placer.errors import NoSolutionError, UsageError
from placer.model import ModelSpec
from placer.placement import Placement, Plan
from placer.placement.reference import random
from placer.placement.topology import Topology
from placer.planning.frontier import write_frontier
from placer.planning.planner import plan_from_trace
from placer.simulation import simulate
from placer.solver.balance.replicas import with_replicas
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.solver.params import SolverParams
from placer.solver.problem.layer_profile import layer_tokens
from placer.solver.problem.scenarios import load_scenarios
from placer.solver.problem.traffic import TrafficProblem
from placer.solver.search.evaluator import evaluate
from placer.solver.search.refine import refined
from placer.solver.solve import solve
from placer.trace import EVERYTHING, Chunk, Trace
from tests.plans import changed
from tests.solver.enumeration import every_placement
from tests.solver.search.test_copies_cost import follow_tokens, problem_of
from tests.solver.search.test_refine import next_home, server

ONE_NODE = Topology(gpus_per_node=4)
TWO_NODES = Topology(num_nodes=2, gpus_per_node=2, inter_cost=5, intra_cost=2)


def received(
    chunk: Chunk, placement: Sequence[np.ndarray], policy: str, num_ranks: int
) -> np.ndarray:
    """Return [L, R]: copies that each rank receives; homes of ``fixed`` are even."""
    counts = np.zeros((len(placement), num_ranks))
    for token in range(chunk.num_tokens):
        home = None
        for layer, ranks in enumerate(placement):
            serving = [int(ranks[e]) for e in chunk.experts[layer][token]]
            for rank in set(serving):
                if home is None:
                    counts[layer, rank] += (num_ranks - 1) / num_ranks
                elif rank != home:
                    counts[layer, rank] += 1
            if policy == "follow":
                home = max(serving, key=serving.count)
    return counts


def busiest(counts: np.ndarray, num_tokens: int) -> float:
    """R x the copies that the busiest rank receives per token, in the worst layer."""
    return float(counts.shape[1] * counts.max() / num_tokens)


def solved(chunk: Chunk, sizes: tuple[int, ...], options: SolveOptions):
    model = ModelSpec(num_experts=sizes, top_k=chunk.experts[0].shape[1])
    return solve(count_affinity([chunk], model, {}), options, None, chunk)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("policy", "sizes", "topology"),
    [
        ("fixed", (6,), Topology(gpus_per_node=3)),
        ("fixed", (8,), ONE_NODE),
        ("fixed", (8,), TWO_NODES),
        ("follow", (4, 4, 4), Topology(gpus_per_node=2)),
        ("follow", (4, 4, 4), Topology(num_nodes=2, gpus_per_node=1)),
        ("follow", (6, 3), Topology(gpus_per_node=3)),
    ],
)
def test_of_all_placements_under_both_caps_the_cheapest_is_found(
    make_chunk: Callable[..., Chunk],
    policy: str,
    sizes: tuple[int, ...],
    topology: Topology,
    seed: int,
) -> None:
    chunk = make_chunk(num_tokens=40, num_experts=sizes, top_k=2, seed=seed)
    problem = problem_of(chunk, sizes, topology, 1.4)
    every = list(every_placement(problem))
    most = [busiest(received(chunk, one, policy, topology.num_ranks), 40) for one in every]
    cap = float(np.quantile(most, 0.1)) + 1e-6
    best = min(
        follow_tokens(chunk, one, policy, topology)
        for one, copies in zip(every, most, strict=True)
        if copies <= cap
    )
    options = SolveOptions(
        topology=topology,
        goal=Goal(policy=policy, caps=Caps(max_imbalance=1.4, max_received_copies=cap)),
    )
    placement, report = solved(chunk, sizes, options)
    ranks = [placement.expert_rank(layer) for layer in range(len(sizes))]
    assert problem.is_feasible(ranks)
    reached = busiest(received(chunk, ranks, policy, topology.num_ranks), 40)
    assert reached <= cap
    assert report.most_received_copies == pytest.approx(reached, abs=1e-6)
    assert follow_tokens(chunk, ranks, policy, topology) == pytest.approx(best)
    assert report.status == "optimal"
    with pytest.raises(NoSolutionError, match="proved") as caught:
        solved(chunk, sizes, changed(options, max_received_copies=min(most) - 1e-6))
    assert "--relax-cap" in caught.value.hint


def counted(chunk: Chunk, placement: Placement, policy: str) -> np.ndarray:
    """Return what ``received`` does, of a placement without replicas."""
    ranks = [placement.expert_rank(layer) for layer in range(placement.num_layers)]
    return received(chunk, ranks, policy, placement.num_ranks)


def received_of_replicas(
    chunk: Chunk, placement: Placement, policy: str, rule: str
) -> np.ndarray:
    """Return what ``received`` does, [L, R], with replicas: every first home is tried."""
    serving = server(chunk, placement, rule)
    counts = np.zeros((placement.num_layers, placement.num_ranks))
    for token in range(chunk.num_tokens):
        for first in range(placement.num_ranks):
            home = first
            for layer in range(placement.num_layers):
                ranks = serving(token, layer, home)
                counts[layer, list(set(ranks) - {home})] += 1 / placement.num_ranks
                if policy == "follow":
                    home = next_home(ranks)
    return counts


def capped_problem(
    chunk: Chunk, policy: str, topology: Topology, cap: float | None, **options: object
) -> TrafficProblem:
    sizes = (16,) * len(chunk.experts)
    load = load_scenarios(chunk, sizes, "none", 0)
    return TrafficProblem(
        experts=layer_tokens(chunk),
        topology=topology,
        policy=policy,
        load=load,
        max_load=tuple(np.array([1.3 * one.sum() / 4]) for one in load),
        caps=Caps(max_received_copies=cap),
        **options,
    )


@pytest.mark.parametrize("policy", ["fixed", "follow"])
@pytest.mark.parametrize(
    ("topology", "exchange"),
    [(ONE_NODE, "per-rank"), (TWO_NODES, "per-rank"), (TWO_NODES, "per-node")],
)
def test_moves_reach_the_cap_and_keep_to_it(
    make_chunk: Callable[..., Chunk], policy: str, topology: Topology, exchange: str
) -> None:
    """From uneven placements the cap is met, and not left again for fewer copies."""
    chunk = make_chunk(num_tokens=600, num_experts=(16,) * 3, top_k=4)
    start = random((16,) * 3, 4, topology.num_nodes, seed=1)
    cap = 2.18
    assert busiest(counted(chunk, start, policy), 600) > cap
    limits = SolverParams(num_sweeps=3)

    def refine(start: Placement, cap: float | None) -> Placement:
        problem = capped_problem(chunk, policy, topology, cap, exchange=exchange)
        return refined(start, problem, limits)

    free, capped = refine(start, None), refine(start, cap)
    assert busiest(counted(chunk, free, policy), 600) > cap
    assert busiest(counted(chunk, capped, policy), 600) <= cap + 1e-6
    again = refine(capped, cap)
    assert busiest(counted(chunk, again, policy), 600) <= cap + 1e-6
    problem = capped_problem(chunk, policy, topology, cap, exchange=exchange)
    assert evaluate(problem, again).price <= evaluate(problem, capped).price + 1e-9


@pytest.mark.parametrize("policy", ["fixed", "follow"])
@pytest.mark.parametrize(
    ("replica_choice", "error"), [("local-first", 0.05), ("hash", 1e-6)]
)
def test_with_replicas_the_cap_is_met_as_they_are_served(
    make_chunk: Callable[..., Chunk], policy: str, replica_choice: str, error: float
) -> None:
    """Under local-first each token stands for one home: many come near all of them."""
    chunk = make_chunk(num_tokens=800, num_experts=(16,) * 3, top_k=4, num_sequences=800)
    problem = capped_problem(chunk, policy, ONE_NODE, 2.0, replica_choice=replica_choice)
    loads = [one[0] for one in problem.load]
    start = with_replicas(random((16,) * 3, 4, 1, seed=2), loads, 8)
    before = evaluate(problem, start)
    found = refined(start, problem, SolverParams(num_sweeps=4))
    reached = evaluate(problem, found)
    assert before.missed_receive_cap()
    assert not reached.missed_receive_cap()
    counts = received_of_replicas(chunk, found, policy, replica_choice)
    assert busiest(counts, 800) <= 2 * (1 + error)
    most = 4 * counts.max(axis=1) / 800
    assert reached.most_received_copies == pytest.approx(most, rel=error)


def test_a_cap_out_of_reach_is_refused_or_recorded(
    make_chunk: Callable[..., Chunk],
) -> None:
    """One expert that every token uses: its rank receives more than all others."""
    chunk = make_chunk(num_tokens=400, num_experts=(16, 16), top_k=2)
    hot = [ids.copy() for ids in chunk.experts]
    hot[1][:, 0], hot[1][:, 1] = 0, 1 + hot[1][:, 1] % 15
    chunk = replace(chunk, experts=tuple(hot))
    options = SolveOptions(
        topology=ONE_NODE,
        goal=Goal(caps=Caps(max_imbalance=3.0, max_received_copies=2.0)),
        proof="none",
        params=SolverParams(num_sweeps=3),
    )
    with pytest.raises(NoSolutionError, match="in 1 of 2 MoE layers") as caught:
        solved(chunk, (16, 16), options)
    assert "--relax-cap" in caught.value.hint
    for robust in ("none", "bootstrap"):
        asked = changed(options, relax=True, robust=robust)
        placement, report = solved(chunk, (16, 16), asked)
        ranks = [placement.expert_rank(layer) for layer in range(2)]
        counts = received(chunk, ranks, "fixed", 4)
        assert list(report.relaxed_receive_layers) == ["1"]
        assert report.relaxed_receive_layers["1"] == pytest.approx(busiest(counts, 400))
        assert busiest(counts[:1], 400) <= 2 + 1e-6


def test_the_plan_tells_the_cap_and_what_was_reached(
    make_trace: Callable[..., Trace], tmp_path: Path
) -> None:
    """What the solver says of ``follow`` is what a simulation of the profile counts."""
    trace = make_trace(num_tokens=600, num_experts=(16, 16), top_k=4)
    options = SolveOptions(
        topology=ONE_NODE,
        goal=Goal(policy="follow", caps=Caps(max_imbalance=1.4, max_received_copies=2.2)),
        proof="none",
        params=SolverParams(num_sweeps=4),
    )
    plan = plan_from_trace(trace, options, EVERYTHING)
    assert plan.provenance["max_received_copies"] == 2.2
    assert not plan.solver.relaxed_receive_layers
    assert plan.solver.most_received_copies <= 2.2 + 1e-6
    ranks = [plan.placement.expert_rank(layer) for layer in range(2)]
    counts = received(trace.read(), ranks, "follow", 4)
    assert plan.solver.most_received_copies == pytest.approx(busiest(counts, 600), abs=1e-6)
    # One batch of all tokens; after layer 0 the homes are those of the search.
    copies = simulate(plan.placement, trace.read())["follow"]
    assert copies.bottleneck_rank_copies_per_token == pytest.approx(
        4 * counts.max(axis=1).mean() / 600, rel=0.03
    )
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json").to_json() == plan.to_json()


def test_options_that_cannot_keep_it_are_refused(
    make_chunk: Callable[..., Chunk],
) -> None:
    with pytest.raises(UsageError, match="must be above 0"):
        SolveOptions(topology=ONE_NODE, goal=Goal(caps=Caps(max_received_copies=0.0)))
    with pytest.raises(UsageError, match="must be above 0"):
        SolveOptions(
            topology=ONE_NODE, goal=Goal(caps=Caps(max_received_copies=float("nan")))
        )
    with pytest.raises(UsageError, match="homes of a table"):
        SolveOptions(
            topology=ONE_NODE, goal=Goal(policy="token", caps=Caps(max_received_copies=1.1))
        )
    asked = SolveOptions(topology=ONE_NODE, goal=Goal(caps=Caps(max_received_copies=1.1)))
    counts = count_affinity([make_chunk()], ModelSpec(num_experts=(8,) * 3, top_k=2), {})
    with pytest.raises(UsageError, match="--max-received-copies needs the tokens"):
        solve(counts, asked)
    with pytest.raises(UsageError, match="--max-received-copies is for traffic"):
        solve(counts, changed(asked, objective="balance"))


def test_robust_plans_are_held_to_it(make_trace: Callable[..., Trace]) -> None:
    """The inner cap may be missed, what was asked for may not."""
    trace = make_trace(num_tokens=300, num_experts=(8, 8), top_k=2)
    options = SolveOptions(
        topology=ONE_NODE,
        goal=Goal(
            robust="bootstrap", caps=Caps(max_imbalance=2.0, max_received_copies=1.4)
        ),
        proof="none",
        params=SolverParams(num_sweeps=1),
    )
    with pytest.raises(NoSolutionError, match=r"--max-received-copies 1\.4 was"):
        plan_from_trace(trace, options, EVERYTHING)
    plan = plan_from_trace(trace, changed(options, relax=True), EVERYTHING)
    assert plan.solver.relaxed_receive_layers


def test_plans_of_a_frontier_are_held_to_it(
    make_trace: Callable[..., Trace], tmp_path: Path
) -> None:
    """A frontier relaxes its own load caps, not a cap that was asked for beside them."""
    trace = make_trace(num_tokens=300, num_experts=(16, 16), top_k=3)
    options = SolveOptions(
        topology=ONE_NODE, goal=Goal(caps=Caps(max_received_copies=0.5))
    ).quick()
    with pytest.raises(NoSolutionError, match=r"in 2 of 2 MoE layers under .* 1\.2;"):
        write_frontier(trace, options, EVERYTHING, [1.2, 1.5], tmp_path / "curve")
    assert not (tmp_path / "curve").exists()
    relaxed = changed(options, relax=True)
    write_frontier(trace, relaxed, EVERYTHING, [1.2, 1.5], tmp_path / "curve")
    plan = Plan.read(tmp_path / "curve" / "plan-1.2.json")
    assert sorted(plan.solver.relaxed_receive_layers) == ["0", "1"]
    reachable = changed(options, max_received_copies=2.5)
    write_frontier(trace, reachable, EVERYTHING, [1.2, 1.5], tmp_path / "held")
    assert not Plan.read(tmp_path / "held" / "plan-1.2.json").solver.relaxed_receive_layers


def test_the_command_tells_what_became_of_the_cap(
    make_trace: Callable[..., Trace],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trace = make_trace(num_tokens=300, num_experts=(16, 16), top_k=3)
    words = [
        "solve", str(trace.directory), "--gpus-per-node", "4", "--max-imbalance", "1.5",
        "--num-sweeps", "2", "--num-rounds", "1", "--proof", "none",
    ]  # fmt: skip
    for cap, ask, status, said in (
        ("2", (), 0, "in the worst layer, cap 2"),
        ("0.5", (), 3, "--max-received-copies 0.5 was not reached in 2 of 2"),
        ("0.5", ("--relax-cap",), 0, "--max-received-copies 0.5 was relaxed in 2 MoE"),
    ):
        out = tmp_path / f"{cap}{len(ask)}.json"
        asked = [*words, "--max-received-copies", cap, *ask, "--out", str(out), "--force"]
        with pytest.raises(SystemExit) as ended:
            main(asked)
        assert ended.value.code == status
        assert said in capsys.readouterr().err
        assert out.exists() == (status == 0)

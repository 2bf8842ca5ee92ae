"""What is settled before a plan is solved, and who is told."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.checkpoint.permutation import require_whole_groups
from placer.errors import NotProvedError, UsageError
from placer.model import ModelSpec
from placer.placement import Placement, Plan
from placer.placement.pins import Pin
from placer.placement.reference import contiguous
from placer.placement.topology import Topology
from placer.planning import layer_time, planner
from placer.planning.request import SolveRequest
from placer.planning.solving import solve_frontier, solve_request
from placer.report.comparison import plan_warnings
from placer.run.session import Session
from placer.simulation.batch_figures import BatchOptions, batch_steps
from placer.simulation.simulate import simulate
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.solver.search import alternation
from placer.table.build import build_table
from placer.table.table import Table
from placer.trace import Chunk, Fold, Selection, Trace, TraceWriter
from tests.plans import changed, request_for, unsolved_plan

QUICK = SolveOptions(
    topology=Topology(gpus_per_node=2), goal=Goal(caps=Caps(relax=True))
).quick()
NODES = Topology(num_nodes=2, gpus_per_node=2)
GROUPED = ModelSpec(num_experts=(8, 8), top_k=2, n_group=4, topk_group=2)


@pytest.fixture
def request_of(make_trace: Callable[..., Trace]) -> Callable[..., SolveRequest]:
    """Return a builder of requests for one trace on two ranks."""
    trace = make_trace(num_experts=(8, 8), num_sequences=8)

    def build(options: SolveOptions = QUICK, **asked: object) -> SolveRequest:
        return request_for(trace.directory, options, Selection(Fold(0, 2)), **asked)

    return build


def nobody(text: str) -> None:
    pytest.fail(f"nothing is to be told, but: {text}")


def test_the_plan_is_that_of_the_options_and_judged_on_what_was_held_out(
    request_of: Callable[..., SolveRequest],
) -> None:
    request = request_of(max_imbalance=1.5)
    plan = solve_request(request, nobody, nobody).plan
    assert (plan.max_imbalance, plan.provenance["fold"]) == (1.5, "0/2")
    heldout = Trace(request.source).read(Selection(Fold(1, 2)))
    judged = simulate(plan.placement, heldout)["fixed"].to_json()
    assert plan.metrics["heldout"]["fixed"] == judged
    simple = simulate(contiguous((8, 8), 2), heldout)["fixed"].to_json()
    assert plan.metrics["baselines"]["contiguous"]["fixed"] == simple


@pytest.fixture
def grouped_request(
    make_chunk: Callable[..., Chunk], tmp_path: Path
) -> Callable[..., SolveRequest]:
    """Return a builder of requests for a router with four groups of two experts."""
    path = tmp_path / "grouped"
    with TraceWriter(directory=path, model=GROUPED) as writer:
        writer.append(make_chunk(num_experts=(8, 8), num_sequences=8))
        writer.finish()

    def build(options: SolveOptions = QUICK, **asked: object) -> SolveRequest:
        return request_for(path, options, **asked)

    return build


def test_a_plan_for_vllm_can_be_exported_where_routers_have_groups(
    grouped_request: Callable[..., SolveRequest],
) -> None:
    """Four groups of two experts: the rule of the export accepts the plan."""
    told: list[str] = []
    request = grouped_request(engine="vllm-deepep-ht", max_imbalance=3.0)
    plan = solve_request(request, told.append, told.append).plan
    assert any("router groups are kept whole" in line for line in told)
    require_whole_groups(GROUPED, [plan.placement.permutation(layer) for layer in (0, 1)])
    told.clear()
    even = replace(request, engine="vllm-agrs")
    plan = solve_request(even, told.append, told.append).plan
    assert any("router groups stay whole" in line for line in told), "balanced inside them"
    require_whole_groups(GROUPED, [plan.placement.permutation(layer) for layer in (0, 1)])
    with pytest.raises(UsageError, match="vLLM loads no map") as error:
        more = replace(request.options.goal, redundant_experts=2)
        solve_request(request.with_goal(more), nobody, nobody, nobody)
    assert "--redundant-experts 0" in error.value.hint


@pytest.mark.parametrize("option", ["--start", "--pin", "--ignore-groups"])
def test_what_may_split_the_groups_of_a_permuted_checkpoint_is_refused(
    grouped_request: Callable[..., SolveRequest], tmp_path: Path, option: str
) -> None:
    """Before the search: the export would refuse the plan after it."""
    split = Placement.from_expert_rank([np.arange(8) % 2] * 2, 2)
    unsolved_plan(GROUPED, split).write(tmp_path / "start.json")
    asked: dict[str, dict[str, object]] = {
        "--start": {"start": tmp_path / "start.json"},
        "--pin": {"options": changed(QUICK, pins=(Pin.parse("0:3=0"),))},
        "--ignore-groups": {"options": changed(QUICK, ignore_groups=True)},
    }
    for engine in ("vllm-deepep-ht", "vllm-agrs"):
        request = grouped_request(engine=engine, **asked[option])
        with pytest.raises(UsageError, match=f"{option} may split") as error:
            solve_request(request, lambda _: None, lambda _: None)
        assert error.value.hint == f"drop {option}"


@pytest.mark.parametrize(
    ("asked", "offered"),
    [
        ({}, True),
        ({"options": changed(QUICK, topology=NODES, preserve_groups=True)}, False),
        ({"engine": "vllm-agrs"}, False),
    ],
)
def test_splitting_groups_is_offered_where_it_can_be_had(
    grouped_request: Callable[..., SolveRequest], asked: dict[str, object], offered: bool
) -> None:
    """Not beside --preserve-groups, which excludes it, nor where the export refuses."""
    told: list[str] = []
    fields = {"objective": "balance", "options": replace(QUICK, topology=NODES)}
    request = grouped_request(**fields | asked)
    solve_request(request, told.append, told.append)
    (line,) = [one for one in told if "router groups stay whole" in one]
    assert ("--ignore-groups" in line) == offered


@pytest.mark.parametrize("policy", ["fixed", "follow"])
def test_a_plan_for_traffic_says_why_groups_are_split(
    grouped_request: Callable[..., SolveRequest], policy: str
) -> None:
    """With the figures of both options; a warning where nodes get more to receive."""
    notes: list[str] = []
    warnings: list[str] = []
    options = changed(QUICK, topology=NODES, policy=policy)
    plan = solve_request(
        grouped_request(options=options), notes.append, warnings.append
    ).plan
    (line,) = [one for one in notes + warnings if "router groups are split" in one]
    assert "load cap, 1.1" in line and line.endswith("--preserve-groups")
    placed = {"": plan.metrics["profile"], **plan.metrics["baselines"]}
    nodes, even = "remote_node_copies_per_token", "load_imbalance_mean"
    figures = {
        name: f"{found[policy][nodes]:.3f} and {found[policy][even]:.3f}"
        for name, found in placed.items()
    }
    whole = f"{figures['contiguous']} (contiguous), {figures['eplb']} (eplb)."
    assert f"imbalance: {figures['']}; with whole groups {whole}" in line
    base = placed["contiguous"][policy][nodes]
    more = placed[""][policy][nodes] > 1.005 * base
    assert (line in warnings) == more == line.startswith("tokens visit more nodes than")
    notes.clear(), warnings.clear()
    kept = grouped_request(options=changed(options, preserve_groups=True))
    solve_request(kept, notes.append, warnings.append)
    assert not any("router groups are split" in one for one in notes + warnings)


def test_more_nodes_than_from_contiguous_are_said_first(tmp_path: Path) -> None:
    """Each token uses the two experts of one group; half use the same group."""
    group = np.random.default_rng(0).choice(4, 2000, p=(0.55, 0.15, 0.15, 0.15))
    pairs = np.stack([2 * group, 2 * group + 1], axis=1).astype(np.uint8)
    model = ModelSpec(num_experts=(8,), top_k=2, n_group=4, topk_group=1)
    with TraceWriter(directory=tmp_path / "t", model=model) as writer:
        sequences = (np.arange(2000) // 50).astype(np.int32)
        positions = (np.arange(2000) % 50).astype(np.int32)
        writer.append(Chunk(experts=(pairs,), sequence_ids=sequences, positions=positions))
        writer.finish()
    request = request_for(
        tmp_path / "t",
        replace(QUICK, topology=Topology(num_nodes=2, gpus_per_node=1)),
        exchange="per-node",
    )
    warnings: list[str] = []
    solve_request(request, lambda _: None, warnings.append)
    first = warnings[0]
    assert first.startswith("tokens visit more nodes than from the contiguous placement")


@pytest.mark.parametrize("policy", ["token", "request"])
def test_hardware_decides_nothing_under_a_table(
    request_of: Callable[..., SolveRequest], policy: str
) -> None:
    told: list[str] = []
    request = request_of(
        options=changed(QUICK, policy=policy),
        hardware="h100",
        hidden_size=64,
        expert_size=64,
    )
    solve_request(request, told.append, lambda _: None)
    assert (
        f"--hardware has no effect here: batches of --policy {policy} cannot"
        in " ".join(told)
    )


def test_time_is_predicted_for_the_exchange_that_is_asked_for(
    request_of: Callable[..., SolveRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an engine; between nodes one copy per node is fewer than one per rank."""
    served = set()

    def noted(placement: Placement, tokens: Chunk, shape: object, options: BatchOptions):
        served.add(options.exchanges)
        return batch_steps(placement, tokens, shape, options)

    monkeypatch.setattr(layer_time, "batch_steps", noted)
    for exchange in ("per-rank", "per-node"):
        request = request_of(
            objective="time",
            options=replace(QUICK, topology=NODES),
            exchange=exchange,
            hardware="h100",
            hidden_size=64,
            expert_size=64,
        )
        solve_request(request, lambda _: None, lambda _: None)
        assert served == {(exchange, exchange)}
        served.clear()


def test_an_engine_that_sends_all_to_all_is_balanced_and_said_so(
    request_of: Callable[..., SolveRequest], tmp_path: Path
) -> None:
    told: list[str] = []
    request = request_of(engine="vllm-agrs")
    plan = solve_request(request, told.append, nobody).plan
    assert plan.provenance["objective"] == "balance"
    assert len(told) == 1
    assert "so the load is balanced" in told[0]
    with pytest.raises(UsageError, match="--engine vllm-agrs does not"):
        solve_frontier(request, [1.5], tmp_path / "curve", told.append, nobody)
    with pytest.raises(UsageError, match="--objective time does not") as error:
        solve_frontier(
            request_of(objective="time"), [1.5], tmp_path / "curve", nobody, nobody
        )
    assert "TRACE" not in error.value.hint  # a trace it is
    assert not (tmp_path / "curve").exists()


@pytest.mark.parametrize(
    ("engine", "sent", "is_priced"),
    [
        (None, "per-rank", True),
        ("sglang-deepep", "per-node", False),
        ("trtllm-deepep-ll", "per-expert", False),
    ],
)
def test_only_copies_that_the_engine_sends_are_priced(
    request_of: Callable[..., SolveRequest], engine: str | None, sent: str, is_priced: bool
) -> None:
    """A balanced plan counts copies per rank, whatever the engine sends."""
    topology = Topology(num_nodes=2, gpus_per_node=2, inter_cost=8)
    asked = request_of(options=replace(QUICK, topology=topology), objective="balance")
    asked = replace(asked, engine=engine)
    plan = solve_request(asked, lambda _: None, lambda _: None).plan
    assert plan.exchange == sent
    assert ("prices" in plan.metrics) == is_priced


@pytest.mark.parametrize("asked", [{"engine": "vllm-agrs"}, {"objective": "balance"}])
def test_costs_of_links_that_balancing_ignores_are_told(
    request_of: Callable[..., SolveRequest], asked: dict[str, object]
) -> None:
    told: list[str] = []
    solve_request(request_of(priced_links=True, **asked), told.append, nobody)
    assert "balancing ignores link costs" in told[-1]


def test_nodes_that_an_engine_takes_otherwise_are_warned_of(
    request_of: Callable[..., SolveRequest],
) -> None:
    warned: list[str] = []
    for nodes in (1, 2):
        topology = Topology(num_nodes=nodes, gpus_per_node=4 // nodes)
        asked = request_of(
            options=replace(QUICK, topology=topology), engine="sglang-deepep"
        )
        solve_request(asked, nobody, warned.append)
    assert sum("every 4 ranks in a row" in line for line in warned) == 1


def test_a_ladder_does_not_blame_the_load_for_received_copies(
    request_of: Callable[..., SolveRequest],
) -> None:
    options = changed(QUICK, max_received_copies=0.1)
    request = request_of(
        options=options,
        chooses_redundant=True,
        replica_choice="local-first",
        max_imbalance=2.0,
    )
    told: list[str] = []
    solve_request(request, told.append, nobody)
    assert "0.753866 with 0 (misses a cap)" in told[0]
    assert "load" not in told[0]


def test_redundant_experts_of_a_frontier_are_chosen_under_its_loosest_cap(
    request_of: Callable[..., SolveRequest], tmp_path: Path
) -> None:
    """The default cap of 1.10 is out of reach of 8 experts on 8 ranks; 8 is not."""
    options = changed(QUICK, topology=Topology(gpus_per_node=8), relax=False)
    request = request_of(
        options=options,
        chooses_redundant=True,
        replica_choice="local-first",
        redundant_gain=0.99,
    )
    told: list[str] = []
    curve = tmp_path / "curve"
    solve_frontier(request, [4.0, 8.0], curve, told.append, nobody)
    assert "misses a cap" not in told[0]
    plan = Plan.read(curve / "plan-4.json")
    assert plan.provenance["redundant_experts"]["redundant_experts"] == 0


@pytest.mark.parametrize("policy", ["token", "request"])
def test_tables_that_time_did_not_allow_are_told(
    request_of: Callable[..., SolveRequest],
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
) -> None:
    """No baseline is measured, and the plan is rated on a sample."""
    monkeypatch.setattr(planner, "_MORE_SECONDS", 1e3)  # for the figures of the plan
    built = []

    def noted(placement: Placement, tokens: Chunk, **asked: Any) -> Table:
        table = build_table(placement, tokens, **asked)
        built.append(tokens.num_tokens)
        return table

    monkeypatch.setattr(alternation, "build_table", noted)
    options = changed(QUICK, policy=policy)
    whole = solve_request(request_of(options=options), lambda _: None, nobody).plan
    assert list(whole.metrics["baselines"]) == ["contiguous", "eplb", "balanced"]
    assert "sample" not in whole.solver.objective_name
    assert not any("baselines" in line for line in plan_warnings(whole))
    built.clear()
    params = replace(options.params, num_hurried_tokens=60)
    hasty = request_of(options=replace(options, params=params))
    plan = solve_request(hasty, nobody, nobody, Session.begun(time_limit=0.0)).plan
    profile = Trace(request_of().source).read(Selection(Fold(0, 2))).num_tokens
    assert [one for one in built if one > 120] == [profile], "of the plan"
    assert plan.metrics["baselines"] == {}
    assert plan.metrics["profile"] is not None
    assert not plan.solver.reproducible
    assert "on a sample of" in plan.solver.objective_name
    assert any("no time to measure all baselines" in one for one in plan_warnings(plan))


def test_steps_that_time_did_not_allow_are_not_said_to_save_little(
    request_of: Callable[..., SolveRequest],
) -> None:
    """The first step is the only one: nothing is known of the next."""
    request = request_of(
        options=QUICK,
        chooses_redundant=True,
        replica_choice="local-first",
        max_imbalance=2.0,
    )
    told: list[str] = []
    solve_request(request, told.append, nobody, Session.begun(time_limit=0.0))
    because = "0 redundant experts, because no time was left to try 2."
    assert told[0].startswith(because)
    assert "save " not in told[0]


def test_a_proof_that_is_required_and_missing_is_an_error(
    request_of: Callable[..., SolveRequest],
) -> None:
    by_table = request_of(options=changed(QUICK, policy="token"), require_optimal=True)
    with pytest.raises(NotProvedError, match="bound None"):
        solve_request(by_table, nobody, nobody)


@pytest.mark.parametrize(
    ("asked", "company"),
    [
        ({"hardware": "h100", "max_imbalance": 2.0}, "--objective time"),
        ({"weight_bytes": 1.0}, "--redundant-experts"),
        ({"redundant_gain": 0.1, "redundant_experts": 2}, "--redundant-experts auto"),
        ({"overflow_price": 1.0}, "--robust bootstrap"),
        ({"replica_choice": "hash"}, "--redundant-experts"),
    ],
)
def test_what_has_no_effect_is_refused(
    request_of: Callable[..., SolveRequest], asked: dict[str, object], company: str
) -> None:
    with pytest.raises(UsageError, match=company) as error:
        request_of(**asked)
    assert error.value.hint.startswith("drop --")

"""Without a cap of the user's own, no rank of a plan is busier than EPLB's busiest."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from placer.affinity import count_affinity
from placer.cli.main import main
from placer.model import ModelSpec
from placer.placement import Placement, Plan
from placer.placement.reference import random
from placer.placement.topology import Topology
from placer.report.comparison import plan_notes
from placer.run.deadline import Deadline
from placer.run.session import Session
from placer.simulation.simulate import simulate
from placer.solver.options import SolveOptions
from placer.solver.solve import solve
from placer.trace import Chunk, Trace
from tests.plans import changed, unsolved_plan

SIZES = (16,) * 3
RANKS = 4
OPTIONS = SolveOptions(topology=Topology(gpus_per_node=RANKS), proof="none")


@pytest.fixture
def chunk(make_chunk: Callable[..., Chunk]) -> Chunk:
    return make_chunk(num_tokens=600, num_experts=SIZES, top_k=3)


def solved(chunk: Chunk, options: SolveOptions) -> tuple[Placement, object]:
    affinity = count_affinity([chunk], ModelSpec(num_experts=SIZES, top_k=3), {})
    return solve(affinity, options, None, chunk)


def eplb_by_hand(load: np.ndarray, more: int) -> list[list[tuple[int, float]]]:
    """EPLB's README: copies of whatever is heaviest per copy, packed heaviest first."""
    copies = np.ones(len(load))
    for _ in range(more):
        per_copy = np.where(copies < RANKS, load / copies, -1)
        copies[per_copy.argmax()] += 1
    width = (len(load) + more) // RANKS
    ranks: list[list[tuple[int, float]]] = [[] for _ in range(RANKS)]
    for expert in np.argsort(-load / copies, kind="stable"):
        for _ in range(int(copies[expert])):
            free = [
                rank
                for rank in ranks
                if len(rank) < width and expert not in [one for one, _ in rank]
            ]
            lightest = min(free, key=lambda rank: sum(share for _, share in rank))
            lightest.append((int(expert), load[expert] / copies[expert]))
    return ranks


def busiest_of_eplb(chunk: Chunk, more: int) -> list[float]:
    found = []
    for ids in chunk.experts:
        load = np.bincount(ids.ravel(), minlength=16).astype(float)
        total = [sum(share for _, share in rank) for rank in eplb_by_hand(load, more)]
        found.append(max(total) / (load.sum() / RANKS))
    return found


def busiest(placement: Placement, chunk: Chunk) -> list[float]:
    """An expert's load shared evenly by its copies."""
    found = []
    for layer, ids in enumerate(chunk.experts):
        load = np.bincount(ids.ravel(), minlength=16).astype(float)
        holds = placement.holds(layer)
        total = (load / holds.sum(axis=1)) @ holds
        found.append(total.max() / total.mean())
    return found


@pytest.mark.parametrize("policy", ["fixed", "follow"])
def test_no_layer_has_a_busier_rank_than_eplb(chunk: Chunk, policy: str) -> None:
    asked = changed(OPTIONS, policy=policy)
    limit = busiest_of_eplb(chunk, 0)
    free, _ = solved(chunk, asked)
    assert any(np.array(busiest(free, chunk)) > limit), "1.10 alone would allow more"
    placement, report = solved(chunk, asked.guarded())
    assert all(np.array(busiest(placement, chunk)) <= np.array(limit) + 1e-9)
    assert report.eplb_caps == pytest.approx(limit, abs=RANKS / 1800)
    assert not report.above_eplb_layers


def test_copies_of_experts_are_no_busier_than_those_of_eplb(chunk: Chunk) -> None:
    """By hash, copies share an expert's load evenly."""
    asked = changed(OPTIONS, redundant_experts=4, replica_choice="hash")
    limit = busiest_of_eplb(chunk, 4)
    placement, report = solved(chunk, asked.guarded())
    assert all(np.array(busiest(placement, chunk)) <= np.array(limit) + 1e-6)
    assert not report.above_eplb_layers


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_a_search_without_time_is_no_further_above_its_caps_than_eplb(
    chunk: Chunk, num_nodes: int
) -> None:
    """On two nodes EPLB's load is no cap, but its placement meets that of 1.10."""
    topology = Topology(num_nodes=num_nodes, gpus_per_node=RANKS // num_nodes)
    asked = changed(
        OPTIONS, topology=topology, redundant_experts=4, replica_choice="hash"
    ).guarded()
    affinity = count_affinity([chunk], ModelSpec(num_experts=SIZES, top_k=3), {})
    session = Session(deadline=Deadline(seconds=0.0))
    placement, report = solve(affinity, asked, session, chunk)
    assert report.termination == "time_limit"
    limit = np.maximum(busiest_of_eplb(chunk, 4), 1.0 if num_nodes == 1 else 1.1)
    assert all(np.array(busiest(placement, chunk)) <= limit + 1e-6)
    assert not report.relaxed_layers
    assert not report.above_eplb_layers


def test_what_is_given_or_links_that_differ_void_the_comparison() -> None:
    assert OPTIONS.guarded().goal.caps.below_eplb
    # On one node that sends the same.
    assert changed(OPTIONS, exchange="per-node").guarded().goal.caps.below_eplb
    for other in (
        {"max_imbalance": 1.1},
        {"topology": Topology(num_nodes=2, gpus_per_node=2)},
        {"topology": Topology(gpus_per_node=2, cost=((0, 3), (3, 0)))},
        {"preserve_groups": True},
        {"objective": "balance"},
        {"max_received_copies": 2.0},
        {"placement": random(SIZES, RANKS)},
        {"robust": "bootstrap"},
    ):
        assert not changed(OPTIONS, **other).guarded().goal.caps.below_eplb


def test_the_command_tells_which_cap_resulted(
    make_trace: Callable[..., Trace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = make_trace(num_tokens=600, num_experts=SIZES, top_k=3)
    words = ["solve", str(trace.directory), "--gpus-per-node", "4", "--proof", "none"]

    def said(out: str, *more: str) -> str:
        with pytest.raises(SystemExit) as done:
            main([*words, *more, "--out", str(tmp_path / out), "--force"])
        assert done.value.code == 0
        return capsys.readouterr().err

    assert "EPLB's busiest rank on the profile, with as many slots: 1.0" in said(
        "plan.json", "--details"
    )
    plan = Plan.read(tmp_path / "plan.json")
    limit = busiest_of_eplb(trace.read(), 0)
    assert plan.solver.eplb_caps == pytest.approx(limit, abs=RANKS / 1800)
    own = simulate(plan.placement, trace.read())["fixed"].load_imbalance_mean
    assert own <= np.mean(limit) + 1e-9
    assert "EPLB" not in said("capped.json", "--max-imbalance", "1.1", "--details")


def test_layers_that_such_a_cap_does_not_hold_in_are_told() -> None:
    placement = Placement.from_expert_rank([np.array([0, 1])], 2, 1)
    plan = unsolved_plan(ModelSpec(num_experts=(2,), top_k=1), placement)
    plan = replace(
        plan,
        solver=msgspec.structs.replace(
            plan.solver, eplb_caps=(1.02,), above_eplb_layers={"0": 1.03}
        ),
        provenance={"max_received_copies": None},
    )
    (line,) = plan_notes(plan)
    assert "slots: 1.02 times the mean load (1 of 1 MoE layers are above it)" in line


def test_layers_above_the_load_cap_are_above_eplbs_too() -> None:
    """Layer 0 is above 1.1, layer 1 only above EPLB's load, layer 2 keeps its cap."""
    placement = Placement.from_expert_rank([np.array([0, 1])] * 4, 2, 1)
    plan = unsolved_plan(ModelSpec(num_experts=(2,) * 4, top_k=1), placement)
    solver = msgspec.structs.replace(
        plan.solver,
        eplb_caps=(1.02, 1.02, 1.02, 1.3),
        relaxed_layers={"0": 1.25, "3": 1.3},
        above_eplb_layers={"1": 1.03},
    )
    asked = {"max_received_copies": None, "max_imbalance_given": False}
    (line,) = plan_notes(replace(plan, solver=solver, provenance=asked))
    assert "(2 of 4 MoE layers are above it)" in line

"""The line of a search: proved bounds from the start, and no effect on what is found."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from placer.affinity import count_affinity
from placer.model import ModelSpec
from placer.placement import Placement, SolverReport
from placer.placement.topology import Topology
from placer.planning.planner import plan_from_trace
from placer.report.comparison import plan_warnings
from placer.run.progress import GapLine
from placer.run.session import Session
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.solver.params import SolverParams
from placer.solver.partition import improved
from placer.solver.problem.pairs import placement_problem
from placer.solver.proof.reports import early_copies_bound, early_pair_bound
from placer.solver.solve import solve
from placer.trace import EVERYTHING, Chunk, Trace
from tests.plans import changed
from tests.solver.enumeration import every_placement
from tests.solver.search.test_copies_cost import follow_tokens

SIZES = (16,) * 3
OPTIONS = SolveOptions(
    topology=Topology(gpus_per_node=4),
    goal=Goal(caps=Caps(relax=True)),
    params=SolverParams(num_rounds=3, num_sweeps=2),
)
LINE = re.compile(
    r"(?P<what>.+): objective (?P<objective>[\d.]+), bound (?P<bound>[\d.]+), "
    r"gap (?P<gap>[\d.]+)%"
)


def solved(
    chunk: Chunk,
    options: SolveOptions,
    progress: Callable[[str], None] | None = None,
    time_limit: float | None = None,
) -> tuple[Placement, SolverReport]:
    affinity = count_affinity([chunk], ModelSpec(num_experts=SIZES, top_k=3), {})
    session = Session.begun(time_limit=time_limit, progress=progress)
    return solve(affinity, options, session, chunk)


@pytest.fixture
def chunk(make_chunk: Callable[..., Chunk]) -> Chunk:
    return make_chunk(num_tokens=400, num_experts=SIZES, top_k=3)


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS,
        changed(OPTIONS, policy="follow"),
        changed(
            OPTIONS, exchange="per-node", topology=Topology(num_nodes=2, gpus_per_node=2)
        ),
    ],
    ids=["fixed", "follow", "per-node"],
)
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "relaxed"])
def test_every_line_has_objective_bound_and_gap(
    chunk: Chunk, options: SolveOptions, listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the integer program, and where a layer has too many sets of experts for it."""
    if not listed:
        monkeypatch.setattr(improved, "QUICK_COLUMNS", 0)
    lines: list[str] = []
    told, report = solved(chunk, options, lines.append)
    alone, silent = solved(chunk, options)
    assert told.to_json() == alone.to_json()
    assert report.to_json() | {"seconds": 0} == silent.to_json() | {"seconds": 0}

    bounds: dict[str, list[float]] = {}
    for line in lines:
        if line.startswith("load cap: "):  # before the search
            continue
        found = LINE.fullmatch(line)
        assert found is not None, line
        objective, bound, gap = (float(found[k]) for k in ("objective", "bound", "gap"))
        assert gap == pytest.approx(100 * (objective - bound) / objective, abs=0.06)
        bounds.setdefault(found["what"].split(",")[0], []).append(bound)
    steps = ["pairs", "copies", "integer program"] if listed else ["pairs", "copies"]
    assert list(bounds) == [*steps, "proof of the pairs", "proof of the copies"]
    assert all(one == sorted(one) for one in bounds.values())
    # A bound known before the search holds for what it finds.
    assert 0 < bounds["copies"][0] <= report.objective
    assert 0 < bounds["pairs"][0] <= report.pairs.objective
    assert bounds["proof of the copies"][-1] == pytest.approx(report.bound, abs=1e-4)
    assert bounds["proof of the pairs"][-1] == report.pairs.bound


@pytest.mark.parametrize("policy", ["fixed", "follow"])
@pytest.mark.parametrize("seed", range(8))
def test_early_bounds_are_below_every_placement(
    make_chunk: Callable[..., Chunk], policy: str, seed: int
) -> None:
    sizes = (6,) if policy == "fixed" else (4, 4)
    topology = Topology(gpus_per_node=sizes[0] // 2)
    chunk = make_chunk(num_tokens=40, num_experts=sizes, top_k=2 + seed % 2, seed=seed)
    model = ModelSpec(num_experts=sizes, top_k=2 + seed % 2)
    affinity = count_affinity([chunk], model, {})
    caps = [1.3 * load.sum() / topology.num_ranks for load in affinity.load]
    problem = placement_problem(affinity, policy, topology, caps)
    every = list(every_placement(problem))
    options = SolveOptions(topology=topology, goal=Goal(policy=policy))
    least = min(follow_tokens(chunk, one, policy, topology) for one in every)
    scale = topology.num_ranks * chunk.num_tokens * len(sizes)
    assert 0 < early_copies_bound(problem, chunk, options) <= least / scale + 1e-12
    assert early_pair_bound(problem) <= min(map(problem.objective, every))


def test_there_is_no_early_bound_where_caps_may_be_broken(chunk: Chunk) -> None:
    affinity = count_affinity([chunk], ModelSpec(num_experts=SIZES, top_k=3), {})
    caps = [load.sum() for load in affinity.load]
    problem = placement_problem(affinity, "fixed", OPTIONS.topology, caps)
    assert early_copies_bound(problem, chunk, OPTIONS) is not None
    replicas = changed(OPTIONS, redundant_experts=4, replica_choice="hash")
    assert early_copies_bound(problem, chunk, replicas) is None
    placed, _ = solved(chunk, OPTIONS)
    started = changed(OPTIONS, placement=placed)
    assert early_copies_bound(problem, chunk, started) is None


def test_the_gap_is_that_of_the_copies_and_its_bound_never_falls(chunk: Chunk) -> None:
    """What is priced beside the copies has no bound: it would only look like a gap."""
    lines: list[str] = []
    _, report = solved(chunk, changed(OPTIONS, receive_price=5.0), lines.append)
    copies = [
        found
        for found in map(LINE.fullmatch, lines)
        if found is not None and "copies" in found["what"]
    ]
    objectives = [float(found["objective"]) for found in copies]
    assert objectives == pytest.approx([report.objective] * len(copies), rel=0.05)
    bounds = [float(found["bound"]) for found in copies]
    assert bounds == sorted(bounds)
    sweeps = [found["what"] for found in copies if "sweep" in found["what"]]
    assert sweeps == [
        f"copies, sweep {n} of {len(sweeps)}" for n in range(1, len(sweeps) + 1)
    ]


@pytest.mark.parametrize(
    "where",
    ["copies, sweep 1", "integer program", "proof of the pairs", "proof of the copies"],
)
def test_what_is_stopped_keeps_the_bound_that_was_told(chunk: Chunk, where: str) -> None:
    def interrupt(line: str) -> None:
        if line.startswith(where):
            raise KeyboardInterrupt

    free, whole = solved(chunk, OPTIONS)
    placement, report = solved(chunk, OPTIONS, interrupt)
    if where.startswith("proof"):
        assert placement.to_json() == free.to_json()
    assert not report.reproducible
    assert 0 < report.pairs.bound <= whole.pairs.bound
    assert 0 < report.bound <= whole.bound
    assert report.bound < whole.bound or where.startswith("proof")


def test_without_a_bound_it_is_said_why(chunk: Chunk) -> None:
    _, stopped = solved(chunk, OPTIONS, time_limit=0.0)
    assert (stopped.bound, stopped.gap) == (None, None)
    assert stopped.bound_method == "none: stopped before the copies were proved"
    for unproved in (
        replace(OPTIONS, proof="none"),
        changed(OPTIONS, policy="follow", exchange="per-node"),
    ):
        for seconds in (None, 0.0):
            _, report = solved(chunk, unproved, time_limit=seconds)
            assert report.bound is None
            assert "of this policy and exchange" in report.bound_method


def test_a_gap_without_a_bound_is_not_told() -> None:
    lines: list[str] = []
    line = GapLine(tell=lines.append, num_decimals=2)
    line("pairs, round 0", 10)
    line.raise_bound(None)
    line.raise_bound(8)
    line.raise_bound(5)
    line("pairs, round 1", 10)
    assert lines == [
        "pairs, round 0: objective 10.00",
        "pairs, round 1: objective 10.00, bound 8.00, gap 20.0%",
    ]


def test_a_plan_of_which_only_the_proof_was_cut_cannot_be_reproduced(
    make_trace: Callable[..., Trace],
) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("proof"):
            raise KeyboardInterrupt

    trace = make_trace(num_tokens=400, num_experts=SIZES, top_k=3)
    plan = plan_from_trace(trace, OPTIONS, EVERYTHING, Session(progress=interrupt))
    warned = list(plan_warnings(plan))
    assert not plan.solver.reproducible
    assert "cannot be reproduced" in warned[-1]

"""A search that is stopped gives a legal plan, no worse than its start, and says so."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from placer.affinity import count_affinity
from placer.errors import UsageError
from placer.model import ModelSpec
from placer.placement import Plan
from placer.placement.reference import contiguous, random
from placer.placement.topology import Topology
from placer.planning.frontier import write_frontier
from placer.planning.judging import Figures, Judging
from placer.planning.planner import plan_from_trace
from placer.planning.redundant import Memory, choose_redundant_experts, worth_on_profile
from placer.planning.request import SolveRequest
from placer.planning.solving import solve_frontier
from placer.report.comparison import plan_warnings
from placer.run.deadline import Deadline, OutOfTimeError
from placer.run.session import Session
from placer.simulation.simulate import simulate
from placer.solver.balance import load_caps as balance
from placer.solver.balance.eplb import pack_loads
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.solver.params import SolverParams
from placer.solver.search.pair_search import Search
from placer.solver.solve import solve
from placer.trace import EVERYTHING, Chunk, Trace
from tests.plans import changed

SIZES = (16,) * 4
OPTIONS = SolveOptions(topology=Topology(gpus_per_node=4), goal=Goal(caps=Caps(relax=True)))
COPIES = "remote_rank_copies_per_token"


@pytest.fixture
def chunk(make_chunk: Callable[..., Chunk]) -> Chunk:
    return make_chunk(num_tokens=400, num_experts=SIZES, top_k=3)


def solved(
    chunk: Chunk,
    options: SolveOptions,
    time_limit: float | None = None,
    progress: Callable[[str], None] | None = None,
):
    affinity = count_affinity([chunk], ModelSpec(num_experts=SIZES, top_k=3), {})
    session = Session.begun(time_limit=time_limit, progress=progress)
    return solve(affinity, options, session, chunk)


def test_a_limit_of_no_time_gives_the_start(chunk: Chunk) -> None:
    start = random(SIZES, 4, seed=1)
    placement, report = solved(chunk, changed(OPTIONS, placement=start), 0.0)
    assert not report.reproducible
    for layer in range(len(SIZES)):
        assert (placement.holds(layer) == start.holds(layer)).all()


def test_a_limit_that_is_not_reached_changes_nothing(chunk: Chunk) -> None:
    free, _ = solved(chunk, OPTIONS)
    limited, report = solved(chunk, OPTIONS, 1000.0)
    assert report.reproducible
    assert limited.to_json() == free.to_json()


@pytest.mark.parametrize("where", ["pairs, round 1", "copies, sweep 1"])
def test_an_interrupt_keeps_what_was_reached(chunk: Chunk, where: str) -> None:
    def interrupt(line: str) -> None:
        if line.startswith(where):
            raise KeyboardInterrupt

    start, _ = solved(chunk, OPTIONS, 0.0)
    placement, report = solved(chunk, OPTIONS, progress=interrupt)
    assert not report.reproducible
    found, begun = (simulate(one, chunk)["fixed"].to_json() for one in (placement, start))
    assert found[COPIES] < begun[COPIES]


def test_an_interrupt_among_router_groups_is_told(
    chunk: Chunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(search: Search, number: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "_round", interrupt)
    model = ModelSpec(num_experts=SIZES, top_k=3, n_group=4)
    options = changed(OPTIONS, preserve_groups=True)
    _, report = solve(count_affinity([chunk], model, {}), options, None, chunk)
    assert not report.reproducible


def test_time_passes() -> None:
    assert not Deadline().passed()
    assert Deadline(seconds=0.0).passed()
    late = Deadline(seconds=1000.0)
    assert not late.passed()
    with late.interruptible():
        raise KeyboardInterrupt
    assert late.passed()
    with pytest.raises(UsageError, match="--time-limit must not be negative"):
        Session.begun(time_limit=-1.0)


def test_without_a_limit_the_clock_decides_nothing(
    make_trace: Callable[..., Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every look at a clock finds a day gone: choices, search and proof stay the same."""
    trace = make_trace(num_tokens=300, num_experts=SIZES, top_k=3)
    asked = [OPTIONS.guarded(), changed(OPTIONS, robust="bootstrap", proof="full")]

    def written(name: str) -> list[bytes]:
        found = []
        for n, options in enumerate(asked):
            path = tmp_path / f"{name}-{n}.json"
            plan_from_trace(trace, options, EVERYTHING).write(path)
            found.append(path.read_bytes())
        return found

    plain, days = written("plain"), count(step=86_400)
    for clock in ("monotonic", "perf_counter", "time"):
        monkeypatch.setattr(time, clock, lambda: float(next(days)))
    assert written("days") == plain


def test_what_has_to_follow_is_kept_time_for() -> None:
    whole = Deadline(seconds=100.0)
    whole.reserve(50.0)
    whole.needs(10.0)
    whole.needs(20.0)
    assert whole.left() == pytest.approx(30, abs=1)
    with whole.keeping(0.5):
        assert whole.left() == pytest.approx(15, abs=1)
        assert whole.part(1.0).seconds == pytest.approx(15, abs=1)
    assert whole.left() == pytest.approx(30, abs=1)
    whole.needs(60.0)
    assert whole.passed()
    assert Deadline(seconds=10.0, began=time.monotonic() - 20.0).passed()
    free = Deadline()
    free.needs(1e9)
    assert (free.left(), free.passed()) == (None, False)


def test_what_follows_can_be_made_smaller() -> None:
    short = Deadline(seconds=1000.0)
    short.needs(2000.0)
    assert short.left() == 0.0
    short.needs_less(0.25)
    assert short.left() == pytest.approx(500, abs=1)
    assert not short.reproducible
    short.needs_less(0.5, fixed=100.0)
    assert short.needed == 350.0
    short.needs_less(0.5, fixed=1000.0)
    assert short.needed == 350.0, "less work takes no more"


def test_tables_that_were_built_in_vain_say_what_the_next_would_take(
    make_trace: Callable[..., Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures that stop 0.1 s before their end after 2 s: a search is kept 3 x 2.1 s."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def late(judging: Judging, *_: object, deadline: Deadline) -> list[Figures]:
        clock[0] += 2.0
        raise OutOfTimeError(0.1)

    monkeypatch.setattr(Judging, "figures", late)
    trace = make_trace(num_tokens=60, num_experts=SIZES, top_k=3)
    options = changed(OPTIONS, policy="token")
    profile = trace.read()
    judging = Judging(model=trace.model, options=options, profile=profile, heldout=None)
    whole = Deadline(seconds=10.0)
    assert judging.measure({"contiguous": contiguous(SIZES, 4)}, whole) == {}
    assert whole.needed == pytest.approx(6.3)


def test_tokens_too_many_for_one_rating_are_searched_by_a_few(
    make_chunk: Callable[..., Chunk],
) -> None:
    many = make_chunk(num_tokens=1000, num_experts=SIZES, top_k=3, num_sequences=50)
    affinity = count_affinity([many], ModelSpec(num_experts=SIZES, top_k=3), {})
    deadline = Deadline(seconds=1000.0)
    deadline.needs(2000.0)
    told: list[str] = []
    params = replace(OPTIONS.quick().params, num_hurried_tokens=100)
    options = changed(OPTIONS, policy="token", params=params)
    _, report = solve(
        affinity, options, Session(progress=told.append, deadline=deadline), many
    )
    assert "on a sample of" in report.objective_name
    assert any(line.startswith("homes and placement, round 4") for line in told)
    assert not report.reproducible


def test_copies_without_time_for_a_mixture_are_those_of_eplb_or_better(
    make_chunk: Callable[..., Chunk],
) -> None:
    """One expert in 16 has half of the load: without time, only EPLB relieves its rank."""
    chunk = make_chunk(num_tokens=400, num_experts=(16, 16), top_k=1)
    hot = tuple(np.where(np.arange(400)[:, None] % 2, ids, 3) for ids in chunk.experts)
    chunk = replace(chunk, experts=hot)
    affinity = count_affinity([chunk], ModelSpec(num_experts=(16, 16), top_k=1), {})
    options = changed(
        OPTIONS,
        policy="token",
        redundant_experts=4,
        replica_choice="hash",
        max_imbalance=1.0,
    )
    placement, _ = solve(affinity, options, Session.begun(time_limit=0.0), chunk)
    eplb = pack_loads(affinity.load, options.topology, 4)
    for layer, load in enumerate(affinity.load):
        busiest, allowed = (
            (load / one.holds(layer).sum(axis=1) @ one.holds(layer)).max()
            for one in (placement, eplb)
        )
        assert busiest <= allowed + 1e-9


def test_steps_that_would_not_be_done_in_time_are_not_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each step takes 2 s by this clock: after one, five are known not to fit in 9 s."""
    clock = count(step=2)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    done: list[int] = []
    with pytest.raises(OutOfTimeError) as late:
        done.extend(Deadline(seconds=9.0, began=0.0).paced(range(5), 5))
    assert late.value.seconds > 5
    assert list(Deadline(seconds=100.0, began=0.0).paced(range(5), 5)) == [0, 1, 2, 3, 4]
    assert list(Deadline().paced(range(5), 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(OutOfTimeError):
        list(Deadline(seconds=0.0, began=0.0).paced(range(5), 5))


@pytest.mark.parametrize("policy", ["fixed", "token"])
def test_without_time_nothing_is_measured_and_the_plan_says_so(
    make_trace: Callable[..., Trace], policy: str
) -> None:
    trace = make_trace(num_tokens=300, num_experts=SIZES, top_k=3)
    options = changed(OPTIONS, policy=policy)
    late = Deadline(seconds=0.0, began=time.monotonic() - 1000)
    plan = plan_from_trace(trace, options, EVERYTHING, Session(deadline=late))
    assert plan.metrics == {"profile": None, "heldout": None, "baselines": {}}
    assert not plan.solver.reproducible
    assert "no time to measure the plan" in " ".join(plan_warnings(plan))
    long = Session.begun(time_limit=1e6)
    whole = plan_from_trace(trace, options.quick(), EVERYTHING, long)
    assert set(whole.metrics["baselines"]) == {"contiguous", "eplb", "balanced"}


def test_one_expert_per_token_is_placed_without_a_search(
    make_chunk: Callable[..., Chunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the placement, a token sends 1 - 1/R copies; the load is evened out."""
    monkeypatch.setattr(Search, "run", None)
    one = make_chunk(num_tokens=400, num_experts=SIZES, top_k=1)
    affinity = count_affinity([one], ModelSpec(num_experts=SIZES, top_k=1), {})
    placement, report = solve(affinity, OPTIONS, None, one)
    assert (report.status, report.objective) == ("optimal", pytest.approx(0.75))
    assert report.bound_method == "one expert per token: every placement sends as many"
    for layer, ids in enumerate(one.experts):
        load = np.bincount(placement.expert_rank(layer)[ids].ravel(), minlength=4)
        assert load.max() <= 1.1 * load.mean()


def test_parts_share_what_is_left_and_tell_of_haste() -> None:
    whole = Deadline(seconds=1000.0)
    with whole.choosing() as quick:
        assert quick.seconds == pytest.approx(500, abs=1)
        assert quick.part(0.5).seconds == pytest.approx(250, abs=1)
    assert whole.reproducible
    late = Deadline(seconds=0.0)
    with late.choosing() as quick:
        assert quick.passed()
    assert not late.stopped
    assert not late.reproducible
    assert not late.part(1.0).reproducible
    assert Deadline().part(0.5).seconds is None


def test_choices_by_quick_plans_count_and_tell_that_they_were_cut(
    make_trace: Callable[..., Trace], tmp_path: Path
) -> None:
    """No time: one quick plan each is made, of whatever there is, and the plan says so."""
    trace = make_trace(num_tokens=300, num_experts=SIZES, top_k=3)
    robust = changed(OPTIONS, robust="bootstrap")
    plan = plan_from_trace(trace, robust, EVERYTHING, Session.begun(time_limit=0.0))
    assert not plan.solver.reproducible
    assert len(plan.solver.inner_cap.trials) == 1
    free = plan_from_trace(trace, robust, EVERYTHING, Session.begun(time_limit=1000.0))
    assert free.solver.reproducible
    assert len(free.solver.inner_cap.trials) == 3

    model = ModelSpec(num_experts=SIZES, top_k=3)
    profile = trace.read()
    worth = worth_on_profile(count_affinity([profile], model, {}), profile)
    served = changed(OPTIONS, replica_choice="local-first")
    for seconds, steps in ((0.0, [0]), (1000.0, [0, 4, 8])):
        session = Session.begun(time_limit=seconds)
        with session.choosing() as quick:
            choice = choose_redundant_experts(
                SIZES, served, worth, Memory.of(None, None), 0.001, quick
            )
        assert [one.redundant_experts for one in choice.ladder][:3] == steps
        assert session.deadline.reproducible == (seconds > 0)


def test_plans_of_a_frontier_share_the_time(
    make_trace: Callable[..., Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def noted(trace, options, fold, session):
        given.append(session.deadline.seconds)
        return plan_from_trace(trace, options, fold, session)

    monkeypatch.setattr("placer.planning.frontier.plan_from_trace", noted)
    trace = make_trace(num_tokens=200, num_experts=(16, 16), top_k=2)
    quick, long = OPTIONS.quick(), Session.begun(time_limit=3000.0)
    curve = tmp_path / "curve"
    points = write_frontier(trace, quick, EVERYTHING, [1.1, 1.5, 2.0], curve, long)
    assert all(point.reproducible for point in points)
    # What the first plans leave is the last one's.
    assert given == pytest.approx([1000, 1500, 3000], rel=0.05)
    none = Session.begun(time_limit=0.0)
    cut = write_frontier(trace, quick, EVERYTHING, [1.1, 2.0], tmp_path / "cut", none)
    # No search, so the second cap has no plan of its own.
    assert [point.max_imbalance for point in cut] == [1.1]
    assert not any(point.reproducible for point in cut)
    assert "reproducible" in (tmp_path / "cut" / "frontier.csv").read_text().split()[0]


def test_ctrl_c_ends_a_frontier_with_the_plan_that_it_stopped(
    make_trace: Callable[..., Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(search: Search, number: int) -> None:
        raise KeyboardInterrupt

    trace = make_trace(num_tokens=200, num_experts=(16, 16), top_k=2)
    monkeypatch.setattr(Search, "_round", interrupt)
    options = replace(OPTIONS.quick(), params=SolverParams(num_rounds=1))
    said: list[str] = []
    points = solve_frontier(
        SolveRequest(source=trace.directory, selection=EVERYTHING, options=options),
        [1.1, 1.5, 2.0], tmp_path / "curve", said.append, said.append,
    )  # fmt: skip
    assert [point.reproducible for point in points] == [False]
    assert "no plan for 1.5, 2" in said[-1]
    assert sorted(one.name for one in (tmp_path / "curve").iterdir()) == [
        "frontier.csv",
        "plan-1.1.json",
    ]


def test_ctrl_c_among_quick_plans_ends_the_command(
    chunk: Chunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(search: Search, number: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "_round", interrupt)
    affinity = count_affinity([chunk], ModelSpec(num_experts=SIZES, top_k=3), {})
    with pytest.raises(KeyboardInterrupt):
        worth_on_profile(affinity, chunk)(OPTIONS, Session())


@pytest.fixture
def heeded_ctrl_c() -> Iterator[None]:
    """What a shell starts in the background ignores Ctrl-C, with all that this starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_a_layer_is_balanced_is_not_swallowed(
    heeded_ctrl_c: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CP-SAT would catch it, end its own search and say nothing."""
    monkeypatch.setattr(balance, "_DETERMINISTIC_TIME", 2.0)
    load = np.floor(np.random.default_rng(0).random(96) * 1e6 + 1)
    interrupt = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt.start()
            balance.balance_layer(load, 8, max_load=0.0)
    finally:
        interrupt.cancel()
        interrupt.join()


def test_ctrl_c_writes_a_plan_that_is_marked(
    heeded_ctrl_c: None, make_trace: Callable[..., Trace], tmp_path: Path
) -> None:
    trace = make_trace(num_tokens=500, num_experts=(32,) * 4, top_k=4)
    out, searching = tmp_path / "plan.json", tmp_path / "searching"
    code = (
        "import pathlib, sys\n"
        "from placer.cli.main import main\n"
        "from placer.solver.search.pair_search import Search\n"
        "plain = Search._round\n"
        "def marked(self, number):\n"
        "    plain(self, number)\n"
        f"    pathlib.Path({str(searching)!r}).touch()\n"
        "Search._round = marked\n"
        "main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "solve", str(trace.directory)]
    options = ["--gpus-per-node", "8", "--relax-cap", "--out", str(out), "--force"]
    with subprocess.Popen(
        # So many rounds would take hours.
        [*command, *options, "--num-rounds", "10000000", "--proof", "none"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            for _ in range(1000):
                if searching.exists() or running.poll() is not None:
                    break
                time.sleep(0.1)
            running.send_signal(signal.SIGINT)
            _, said = running.communicate(timeout=100)
        finally:
            running.kill()
    assert running.returncode == 0, said
    assert "cannot be reproduced" in said
    assert not Plan.read(out).solver.reproducible

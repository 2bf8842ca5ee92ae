"""A plan holds on more of its own traffic, and not where experts meet others."""

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from placer.affinity import Affinity
from placer.cli.main import main
from placer.errors import PlacerError, UsageError
from placer.model import ModelSpec
from placer.placement import Plan
from placer.placement.reference import contiguous
from placer.placement.topology import Topology
from placer.planning.drift import NUM_GROUPS, check_on_loads, check_plan, improving_command
from placer.planning.planner import plan_from_affinity, plan_from_trace
from placer.planning.profile import profile_itself
from placer.report.inspect import summarize
from placer.simulation.simulate import simulate
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.trace import Chunk, Fold, Selection, Trace, TraceWriter
from tests.plans import unsolved_plan

MODEL = ModelSpec(num_experts=(8,), top_k=2)
KEY = "remote_rank_copies_per_token"


def write(directory: Path, apart: int, seed: int, num_sequences: int = 80) -> Trace:
    """Experts e and e + apart are mostly used together."""
    rng = np.random.default_rng(seed)
    num_tokens = 50 * num_sequences
    first = rng.integers(8, size=num_tokens)
    partner = (first + apart) % 8
    other = (first + rng.integers(1, 8, size=num_tokens)) % 8
    second = np.where(rng.random(num_tokens) < 0.8, partner, other)
    chunk = Chunk(
        experts=(np.stack([first, second], axis=1).astype(np.uint8),),
        sequence_ids=np.repeat(np.arange(num_sequences), 50).astype(np.int32),
        positions=np.tile(np.arange(50), num_sequences).astype(np.int32),
        phase=np.tile(np.arange(50) >= 40, num_sequences).astype(np.uint8),
    )
    with TraceWriter(directory=directory, model=MODEL) as writer:
        writer.append(chunk)
        writer.finish()
    return Trace(directory)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    options = SolveOptions(
        topology=Topology(gpus_per_node=4), goal=Goal(caps=Caps(relax=True)), proof="none"
    )
    return plan_from_trace(
        write(tmp_path / "profile", 4, 0), options, Selection(Fold(0, 2))
    )


def test_a_plan_holds_on_more_of_the_same(plan: Plan, tmp_path: Path) -> None:
    report = check_plan(plan, write(tmp_path / "same", 4, 1))
    assert not report.drifted


def test_other_partners_are_drift(plan: Plan, tmp_path: Path) -> None:
    report = check_plan(plan, write(tmp_path / "other", 1, 1))
    assert [one.drifted for one in report.figures] == [True, False]
    assert report.figures[0].now > 1, "worse than contiguous, which keeps neighbours"


def test_the_tolerance_and_twice_the_error_are_allowed(plan: Plan, tmp_path: Path) -> None:
    other = write(tmp_path / "other", 1, 1)
    traffic = check_plan(plan, other, tolerance=0.0).figures[0]
    assert traffic.allowed == 2 * traffic.error > 0
    assert not check_plan(plan, other, tolerance=10.0).drifted


def test_the_error_is_the_jackknife_of_whole_sequences(plan: Plan, tmp_path: Path) -> None:
    trace = write(tmp_path / "same", 4, 1)
    tokens = trace.read()
    base = contiguous((8,), 4)
    ratios = []
    for group in range(NUM_GROUPS):
        part = tokens.select(tokens.sequence_ids % NUM_GROUPS != group)
        own = simulate(plan.placement, part)["fixed"].to_json()[KEY]
        ratios.append(own / simulate(base, part)["fixed"].to_json()[KEY])
    mean = sum(ratios) / NUM_GROUPS
    spread = sum((ratio - mean) ** 2 for ratio in ratios)
    expected = ((NUM_GROUPS - 1) / NUM_GROUPS * spread) ** 0.5
    assert check_plan(plan, trace).figures[0].error == pytest.approx(expected)


def test_what_cannot_be_told_is_refused(plan: Plan, tmp_path: Path) -> None:
    few = write(tmp_path / "few", 4, 1, num_sequences=20)
    with pytest.raises(PlacerError, match="20 sequences are too few"):
        check_plan(plan, few)
    for tolerance in (-1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="must not be negative"):
            check_plan(plan, few, tolerance=tolerance)


def test_only_what_the_engine_sends_and_a_placement_changes_is_watched(
    plan: Plan, tmp_path: Path
) -> None:
    """An engine that sends pairs sends as many, whatever is placed."""
    trace = write(tmp_path / "other", 3, 1)
    watched = {}
    for engine in (None, "sglang-deepep-ll"):
        one = replace(plan, provenance={**plan.provenance, "engine": engine})
        watched[engine] = [figure.name for figure in check_plan(one, trace).figures]
    assert watched == {
        None: ["copies of contiguous", "load imbalance"],
        "sglang-deepep-ll": ["load imbalance"],
    }


def test_a_plan_without_figures_is_refused(tmp_path: Path) -> None:
    plan = unsolved_plan(MODEL, contiguous((8,), 4))
    with pytest.raises(PlacerError, match="the plan records no figures"):
        check_plan(plan, write(tmp_path / "same", 4, 1))


def test_on_one_rank_nothing_is_sent_and_nothing_drifts(tmp_path: Path) -> None:
    options = SolveOptions(topology=Topology(gpus_per_node=1), proof="none")
    plan = plan_from_trace(
        write(tmp_path / "profile", 4, 0), options, Selection(Fold(0, 2))
    )
    report = check_plan(plan, write(tmp_path / "other", 1, 1))
    assert [(one.then, one.now, one.error) for one in report.figures] == [(1, 1, 0)] * 2
    assert not report.drifted


def test_the_command_exits_with_its_own_code(plan: Plan, tmp_path: Path) -> None:
    plan.write(tmp_path / "plan.json")
    codes = []
    for apart in (4, 1):
        trace = write(tmp_path / f"t{apart}", apart, 2)
        with pytest.raises(SystemExit) as done:
            main(["check", str(tmp_path / "plan.json"), str(trace.directory)])
        codes.append(done.value.code)
    assert codes == [0, 6]


def test_the_profile_itself_is_told(plan: Plan, tmp_path: Path) -> None:
    selection, other = Selection(Fold(0, 2)), Selection(Fold(1, 2))
    profile = tmp_path / "profile"
    assert "solved on" in str(profile_itself(plan, profile, selection))
    assert profile_itself(plan, profile, other) is None
    today = write(tmp_path / "today", 4, 2).directory
    assert profile_itself(plan, today, selection) is None


EVEN = [900, 100, 800, 200, 700, 300, 600, 400]
HOT = [400, 100, 800, 200, 700, 300, 600, 900]


def counted(load: list[int]) -> Affinity:
    return Affinity(
        model=MODEL,
        num_tokens=sum(load) // 2,
        load=(np.asarray(load, dtype=np.int64),),
    )


def test_on_loads_balance_alone_is_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loads of two experts change places: the plan has one of them beside the wrong one."""
    counted(EVEN).write(tmp_path / "then")
    counted(HOT).write(tmp_path / "now")
    path, codes = tmp_path / "plan.json", []
    options = SolveOptions(
        topology=Topology(gpus_per_node=4), goal=Goal(objective="balance")
    )
    plan = plan_from_affinity(tmp_path / "then", options)
    plan.write(path)
    report = check_on_loads(plan, counted(HOT), "now")
    (figure,) = report.figures
    assert (figure.name, figure.then, figure.error) == ("load imbalance", 1.0, None)
    totals = np.bincount(plan.placement.expert_rank(0), HOT)
    assert figure.now == pytest.approx(totals.max() / totals.mean())
    for name in ("then", "now"):
        with pytest.raises(SystemExit) as done:
            main(["check", str(path), str(tmp_path / name)])
        codes.append(done.value.code)
    assert codes == [0, 6]
    printed = capsys.readouterr()
    pairs = sum(EVEN)
    assert f"holds on {pairs:,} pairs of a token and an expert per layer" in " ".join(
        printed.out.split()
    )
    told = printed.err
    assert told.count(f"{tmp_path / 'then'} is what the plan was solved on") == 1
    assert "now is what the plan" not in told
    assert "only balance is judged" in told
    command = shlex.split(told.split("with few moves: placer ")[1].splitlines()[0])
    command[command.index("COPIES")] = "1"
    command[command.index("NEW")] = str(tmp_path / "new.json")
    with pytest.raises(SystemExit) as done:
        main(command)
    assert done.value.code == 0, "the hint is a command that runs"
    new = Plan.read(tmp_path / "new.json")
    assert not check_on_loads(new, counted(HOT), "now").drifted
    assert new.provenance["moved_experts"] > 0


def test_counts_of_another_model_are_refused_with_both_paths(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan.write(tmp_path / "plan.json")
    model = ModelSpec(num_experts=(6,), top_k=2)
    other = replace(counted(EVEN), model=model, load=(np.full(6, 10),), num_tokens=30)
    other.write(tmp_path / "now")
    with pytest.raises(SystemExit) as done:
        main(["check", str(tmp_path / "plan.json"), str(tmp_path / "now")])
    assert done.value.code == 2
    told = capsys.readouterr().err
    for name in ("plan.json", "now"):
        assert f"placer inspect {tmp_path / name}" in told


def test_without_top_k_pairs_are_not_called_tokens(plan: Plan, tmp_path: Path) -> None:
    model = ModelSpec(num_experts=(8,), top_k=0)
    loads = replace(counted(EVEN), model=model, num_tokens=sum(EVEN))
    assert summarize(loads).facts["num_tokens"] is None
    assert check_on_loads(plan, loads, "now").num_tokens is None
    assert summarize(counted(EVEN)).facts["num_tokens"] == sum(EVEN) // 2


def test_tokens_of_counts_cannot_be_selected(plan: Plan, tmp_path: Path) -> None:
    plan.write(tmp_path / "plan.json")
    counted(EVEN).write(tmp_path / "then")
    arguments = [str(tmp_path / "plan.json"), str(tmp_path / "then"), "--fold", "0/2"]
    with pytest.raises(SystemExit) as done:
        main(["check", *arguments])
    assert done.value.code == 2


SOLVED = "--nodes 2 --gpus-per-node 2 --proof none --num-rounds 2 --fold 0/2"


@pytest.mark.parametrize(
    "asked",
    [
        "--exchange per-node --inter-cost 5 --phase prefill --max-imbalance 1.5",
        "--engine sglang-deepep --max-imbalance 1.2 --relax-cap --receive-price 0.5",
        "--engine sglang-none --redundant-experts 4",
        "--policy follow --max-home-imbalance 1.5 --pin 0:3=1",
        "--redundant-experts 4 --replica-choice local-first --max-received-copies 1.9",
    ],
)
@pytest.mark.parametrize("from_counts", [False, True])
def test_the_command_that_improves_a_plan_asks_for_what_it_was_solved_for(
    asked: str, from_counts: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs, and the new plan's record of what was asked is that of the old one."""
    then, now = write(tmp_path / "then", 4, 0), write(tmp_path / "now", 1, 1)
    path, new, source = tmp_path / "plan.json", tmp_path / "new.json", now.directory
    run(
        [
            "solve",
            str(then.directory),
            *shlex.split(f"{SOLVED} {asked}"),
            "--out",
            str(path),
        ]
    )
    if from_counts:
        source = tmp_path / "counts"
        run(["affinity", str(now.directory), "--out", str(source)])
    plan = Plan.read(path)
    command = shlex.split(improving_command(plan, path, source))[1:]
    command[command.index("COPIES")] = "1"
    command[command.index("NEW")] = str(new)
    run(command)
    capsys.readouterr()
    made = Plan.read(new)
    same = ["engine", "max_imbalance_given", "relax_cap", "replica_choice"]
    if not from_counts:
        assert (made.policy, made.exchange) == (plan.policy, plan.exchange)
        same += ["objective", "phase", "pins", "inter_cost", "receive_price"]
        same += ["max_home_imbalance", "max_received_copies"]
    for key in same:
        assert made.provenance.get(key) == plan.provenance.get(key), key
    assert made.max_imbalance == plan.max_imbalance
    assert made.provenance["start_map_sha256"]


def run(words: list[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 0

"""A plan holds on more of its own traffic, and not where experts meet others."""

from pathlib import Path

import numpy as np
import pytest

from placer.cli.main import main
from placer.errors import PlacerError, UsageError
from placer.model import ModelSpec
from placer.plan import Plan
from placer.plan.options import SolveOptions
from placer.plan.planner import plan_from_trace
from placer.plan.problem import Topology
from placer.report.drift import NUM_GROUPS, check_plan
from placer.simulation.baselines import contiguous
from placer.simulation.simulate import simulate
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
    )
    with TraceWriter(directory=directory, model=MODEL) as writer:
        writer.append(chunk)
        writer.finish()
    return Trace(directory)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    options = SolveOptions(topology=Topology(gpus_per_node=4), proof="none", relax_cap=True)
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

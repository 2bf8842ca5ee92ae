"""Predicted time decides whether a rank may be busier than EPLB's busiest."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from placer.affinity import Affinity
from placer.cli.main import main
from placer.model import ModelSpec
from placer.placement import Placement, Plan
from placer.placement.reference import contiguous
from placer.placement.topology import Topology
from placer.planning.cap_choice import choose_cap
from placer.planning.question import Question
from placer.run.deadline import Deadline
from placer.run.session import Session
from placer.simulation.cost import ExpertShape
from placer.solver.options import SolveOptions
from placer.target.hardware import Hardware
from placer.trace import Chunk, Trace

FOUR = Topology(gpus_per_node=4)
MODEL = ModelSpec(num_experts=(8, 8), top_k=2)
OPTIONS = SolveOptions(topology=FOUR).guarded()


def partners(num_tokens: int = 6400) -> Chunk:
    """Experts e and e + 4 are used together; used as often, except for a twentieth.

    EPLB parts them, for a slightly evener load.
    """
    share = np.array([0.2625, 0.2625, 0.2375, 0.2375])
    first = np.random.default_rng(0).choice(4, size=num_tokens, p=share)
    pairs = np.stack([first, first + 4], axis=1).astype(np.uint8)
    return Chunk(
        experts=(pairs, pairs),
        sequence_ids=(np.arange(num_tokens) // 100).astype(np.int32),
        positions=(np.arange(num_tokens) % 100).astype(np.int32),
    )


def question(bandwidth: float) -> Question:
    hardware = Hardware.named("h100")
    fast = replace(hardware.fast, bandwidth=bandwidth)
    return Question(
        topology=FOUR,
        hardware=replace(hardware, fast=fast),
        expert=ExpertShape(hidden_size=64, intermediate_size=4096),
    )


def test_links_decide_whether_copies_or_load_count() -> None:
    """Of slow links only copies count; of links next to infinitely fast only load."""
    slow = choose_cap(MODEL, partners(), OPTIONS, question(1e6))
    assert not slow.options.goal.caps.below_eplb
    assert slow.relative_time < 0.8, "together, partners take half of the copies"
    assert "predicted to take" in slow.told
    fast = choose_cap(MODEL, partners(), OPTIONS, question(1e18))
    assert fast.options.goal.caps.below_eplb
    assert "at or below EPLB's" in fast.told


@pytest.mark.parametrize(
    ("gain", "is_below", "told"),
    [
        (-0.001, True, "0.1% more time"),
        (0.001, True, "0.1% less time"),
        (0.05, False, "5.0%"),
    ],
)
def test_a_gain_within_the_error_of_quick_plans_decides_nothing(
    monkeypatch: pytest.MonkeyPatch, gain: float, is_below: bool, told: str
) -> None:
    """The first plan is under EPLB's load, the second under the default cap."""
    seconds = iter((1.0, 1.0 - gain))
    monkeypatch.setattr(
        "placer.planning.cap_choice.batch_times",
        lambda *_: [SimpleNamespace(overlapped=next(seconds))],
    )
    found = choose_cap(MODEL, partners(800), OPTIONS, question(1e6))
    assert found.options.goal.caps.below_eplb == is_below
    assert told in found.told


def test_a_plan_that_spends_its_time_leaves_the_other_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deadline = Deadline(seconds=1000.0)
    given = []

    def spend(
        affinity: Affinity, options: SolveOptions, profile: Chunk, session: Session
    ) -> tuple[Placement, None]:
        part = session.deadline
        assert not part.passed()
        given.append(part.seconds)
        for one in (part, deadline):
            one.began -= given[-1]
        assert part.passed()
        return contiguous((8, 8), 4), None

    monkeypatch.setattr("placer.planning.cap_choice.solve_to_choose", spend)
    choose_cap(MODEL, partners(800), OPTIONS, question(1e6), Session(deadline=deadline))
    assert given == pytest.approx([500, 500], abs=20)
    assert not deadline.reproducible, "the plan tells that what it is was chosen in haste"


@pytest.fixture
def said(
    make_trace: Callable[..., Trace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[object, str]]:
    trace = make_trace(num_experts=(8, 8), num_sequences=8)
    words = ["solve", str(trace.directory), "--gpus-per-node", "4", "--proof", "none"]

    def said(*more: str) -> tuple[object, str]:
        (tmp_path / "plan.json").unlink(missing_ok=True)
        with pytest.raises(SystemExit) as done:
            main([*words, *more, "--out", str(tmp_path / "plan.json"), "--force"])
        return done.value.code, capsys.readouterr().err

    return said


def test_the_command_says_which_cap_it_took(
    said: Callable[..., tuple[object, str]], tmp_path: Path
) -> None:
    hardware = ("--hardware", "h100", "--hidden-size", "64", "--expert-size", "64")
    # Its per-node exchange sends on one node what per-rank does.
    hardware += ("--engine", "sglang-deepep")
    code, told = said(*hardware)
    assert code == 0
    assert told.lower().count("with two-batch overlap") == 1
    assert "decides nothing" not in told
    plan = Plan.read(tmp_path / "plan.json")
    is_below = plan.provenance["cap_by_time"]["below_eplb"]
    assert is_below == (plan.solver.eplb_caps is not None)
    code, told = said(*hardware, "--max-imbalance", "1.5")
    assert (code, "--hardware h100 is for --objective time" in told) == (2, True)
    code, told = said("--hardware", "h100")
    assert (code, "needs the size of an expert" in told) == (2, True)

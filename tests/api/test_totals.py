"""Every call that may take long tells which step of how many begins."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import placer
from placer.affinity import from_traces
from placer.trace import Trace as TraceDirectory

STEP = re.compile(r"(?:.*, )?(?:part|step|tensor|text) (?P<number>\d+) of (?P<total>\d+)")


def last_of(told: list[str]) -> list[tuple[int, int]]:
    """Return each last step and its total; every step but a heading has both."""
    steps = [found for found in map(STEP.match, told) if found is not None]
    assert len(steps) >= len(told) - 1, told
    counted = [(int(one["number"]), int(one["total"])) for one in steps]
    return [
        one
        for one, following in zip(counted, [*counted[1:], (1, 0)], strict=True)
        if following[0] == 1
    ]


@pytest.fixture
def trace(make_trace: Callable[..., TraceDirectory]) -> placer.Trace:
    return placer.open(make_trace().directory)


@pytest.fixture
def plan(trace: placer.Trace) -> placer.Plan:
    return placer.solve(trace, gpus_per_node=4, fold="0/2", num_sweeps=0, proof="none")


def test_simulate_counts_each_placement_and_batch(
    trace: placer.Trace, plan: placer.Plan
) -> None:
    told: list[str] = []
    plan.simulate(
        trace,
        not_fold="0/2",
        baseline=["eplb"],
        tokens_per_rank="8,16",
        progress=told.append,
    )
    assert last_of(told) == [(6, 6)]
    assert told[-2:] == ["step 5 of 6: eplb", "step 6 of 6: plan"]


def test_tables_tell_their_steps(trace: placer.Trace, plan: placer.Plan) -> None:
    told: list[str] = []
    plan.table(trace, progress=told.append)
    assert last_of(told) == [(4, 4)]


def test_links_tell_the_steps_of_each_trace(
    trace: placer.Trace, make_trace: Callable[..., TraceDirectory]
) -> None:
    told: list[str] = []
    other = placer.open(make_trace("other", seed=1).directory)
    placer.links([trace, other], progress=told.append)
    first, second = last_of(told)
    assert first == second == (len(told) // 2, len(told) // 2)
    assert told[0].startswith("trace 1 of 2, step 1 of ")


@pytest.mark.parametrize("workers", [1, 2])
def test_affinity_tells_the_parts_of_all_traces(
    make_trace: Callable[..., TraceDirectory],
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    monkeypatch.setattr(from_traces, "_WORTH_A_WORKER", 1)
    told: list[str] = []
    traces = [placer.open(make_trace(f"t{n}", seed=n).directory) for n in (0, 1)]
    placer.count_affinity(traces, workers=workers, progress=told.append)
    number = sum(len(one.contents.header.chunks) for one in traces)
    assert last_of(told) == [(number, number)]


@pytest.mark.parametrize("target", ["checkpoint", "ranks"])
def test_verify_tells_tensors_and_texts(
    tiny_model: Path, make_plan: Callable[..., Path], tmp_path: Path, target: str
) -> None:
    made = placer.open(make_plan(tiny_model))
    made.export(target, tiny_model, tmp_path / "out")
    told: list[str] = []
    found = made.verify(tiny_model, tmp_path / "out", max_tokens=300, progress=told.append)
    ends = last_of(told)
    assert all(number == total for number, total in ends)
    tensors = [line for line in told if re.search(r"\btensor \d", line)]
    assert len(tensors) == found.facts["num_tensors"]
    if target == "checkpoint":  # the same text on both models
        assert ends[1] == ends[2]

"""How many redundant experts ``auto`` takes, by ladders written out by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from placer.affinity import count_affinity
from placer.cli.main import app
from placer.errors import UsageError
from placer.model import ModelSpec
from placer.placement.topology import Topology
from placer.planning.redundant import (
    Memory,
    choose_redundant_experts,
    ladder,
    worth_on_profile,
)
from placer.run.session import Session
from placer.simulation.cost import ExpertShape
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.solver.solve import solve
from placer.trace import Chunk, Trace
from tests.plans import changed

FOUR = SolveOptions(
    topology=Topology(gpus_per_node=4),
    goal=Goal(replica_choice="local-first", caps=Caps(relax=True)),
)
NO_LIMIT = Memory()


def call(words: list[str]) -> str:
    """Run ``placer`` and return what it told on stderr."""
    return CliRunner().invoke(app, words, catch_exceptions=False).stderr


def chosen(
    values: dict[int, float],
    options: SolveOptions = FOUR,
    least_gain: float = 0.05,
    excess: dict[int, float] | None = None,
) -> tuple[int, list[int]]:
    """Return what is taken of given values, and the steps that were tried."""
    found = choose_redundant_experts(
        (16, 16),
        options,
        lambda one, deadline: (
            values[one.goal.redundant_experts],
            "a value",
            (excess or {}).get(one.goal.redundant_experts, 0.0),
        ),
        NO_LIMIT,
        least_gain,
    )
    assert found.objective_name == "a value"
    return found.redundant_experts, [step.redundant_experts for step in found.ladder]


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "expected"),
    [
        ((16, 16), 4, [0, 4, 8, 16]),
        ((32,), 8, [0, 8, 16, 32]),
        ((16, 8), 4, [0, 4, 8]),  # the smaller layer decides
        ((16,), 1, [0]),  # one rank holds everything once
        ((16,), 2, [0, 2, 4, 8, 16]),
        ((12,), 4, [0, 4, 8]),
        ((256,), 36, [32, 68, 104, 176]),  # TensorRT-LLM's example of 288 slots
        ((256,), 72, [32, 104, 176]),
        ((257,), 16, [15, 31, 47, 79, 143]),
        ((60,), 8, [4, 12, 20, 36]),
    ],
)
def test_steps_fill_the_ranks_up_to_two_copies_of_each(
    num_experts: tuple[int, ...], num_ranks: int, expected: list[int]
) -> None:
    assert ladder(num_experts, num_ranks, NO_LIMIT)[0] == expected


def test_memory_ends_the_ladder() -> None:
    """An expert of 3 x 64 x 32 weights of two bytes is 12,288 bytes."""
    expert = ExpertShape(hidden_size=64, intermediate_size=32)
    memory = Memory.of(expert, 0.5 / 2**10)
    assert memory.expert_bytes == 3 * 64 * 32 * 2
    # 0.5 MiB are 524,288 bytes: 42 experts, or 21 slots in each of two layers.
    assert memory.bytes_per_rank(21, 2) == 516_096
    steps, because = ladder((128, 128), 4, memory)
    assert steps == [0, 4, 8, 16, 32, 64]  # 16 slots per rank
    assert because == "128 would take more than --redundant-memory"
    assert ladder((128, 128), 4, Memory.of(expert, 0.1 / 2**10))[0] == [0, 4, 8, 16]
    assert ladder((128, 128), 4, Memory.of(expert, 0.0))[0] == [0]


def test_whole_router_groups_hold_fewer_copies() -> None:
    """4 groups on 8 ranks: the 2 ranks of a group of 4 experts hold 4 copies more."""
    assert ladder((16,), 8, NO_LIMIT)[0] == [0, 8, 16]
    steps, because = ladder((16,), 8, NO_LIMIT, 4)
    assert steps == [0, 8, 16]
    steps, because = ladder((32,), 32, NO_LIMIT, 8)
    assert steps == [0, 32]
    steps, because = ladder((16,), 16, NO_LIMIT, 16)
    assert steps == [0]
    assert "two replicas of an expert" in because


@pytest.mark.parametrize(
    ("values", "expected", "tried"),
    [
        ({0: 100, 4: 90, 8: 80, 16: 70}, 16, [0, 4, 8, 16]),
        ({0: 100, 4: 90, 8: 86, 16: 1}, 4, [0, 4, 8]),  # 86 > 0.95 x 90: it ends here
        ({0: 100, 4: 96, 8: 1, 16: 1}, 0, [0, 4]),
        ({0: 100, 4: 95, 8: 94, 16: 1}, 4, [0, 4, 8]),  # exactly the share is enough
    ],
)
def test_the_smallest_beyond_which_little_is_gained(
    values: dict[int, float], expected: int, tried: list[int]
) -> None:
    assert chosen(values) == (expected, tried)


def test_above_the_caps_a_step_must_come_nearer_to_them() -> None:
    """What is saved does not count there, unless caps may be relaxed."""
    values = {0: 100.0, 4: 99.0, 8: 98.0, 16: 97.0}
    strict = changed(FOUR, relax=False)
    nearer = {0: 0.4, 4: 0.1}
    assert chosen(values, strict, excess=nearer) == (8, [0, 4, 8, 16])
    assert chosen(values, FOUR, excess=nearer) == (0, [0, 4])
    # 0.39 is not 5 % less than 0.4: the larger numbers are not tried.
    out_of_reach = {0: 0.4, 4: 0.39, 8: 0.3, 16: 0.1}
    assert chosen(values, strict, excess=out_of_reach) == (0, [0, 4])
    ever_nearer = {0: 0.4, 4: 0.3, 8: 0.2, 16: 0.1}
    assert chosen(values, strict, excess=ever_nearer) == (16, [0, 4, 8, 16])
    assert chosen(values, strict, excess={4: 0.1}) == (0, [0, 4])


@pytest.mark.parametrize("least_gain", [0.0, 1.0, -0.1])
def test_a_gain_that_is_no_share_is_refused(least_gain: float) -> None:
    with pytest.raises(UsageError, match="--redundant-gain is a share"):
        chosen({0: 1.0, 4: 1.0}, least_gain=least_gain)


def test_memory_without_the_size_of_an_expert_is_refused() -> None:
    with pytest.raises(UsageError, match="needs the size of an expert"):
        Memory.of(None, 1.0)
    with pytest.raises(UsageError, match="must not be negative"):
        Memory.of(ExpertShape(hidden_size=1, intermediate_size=1), -1.0)


def test_values_are_objectives_of_quick_plans(make_chunk: Callable[..., Chunk]) -> None:
    chunk = make_chunk(num_tokens=200)
    model = ModelSpec(num_experts=(8, 8, 8), top_k=2)
    affinity = count_affinity([chunk], model, {})
    worth = worth_on_profile(affinity, chunk)
    value, name, _ = worth(changed(FOUR, redundant_experts=4), Session())
    quick = changed(FOUR.quick(), redundant_experts=4)
    _, report = solve(affinity, quick, None, chunk)
    assert (value, name) == (report.objective, report.objective_name)


def test_the_command_records_its_ladder(
    make_trace: Callable[..., Trace], tmp_path: Path
) -> None:
    make_trace(num_experts=(8, 8), num_sequences=6)
    plan = tmp_path / "plan.json"
    solve_it = ["solve", str(tmp_path / "trace"), "--gpus-per-node", "4", "--relax-cap"]
    more = [
        "--redundant-experts",
        "auto",
        "--replica-choice",
        "local-first",
        "--proof",
        "none",
        "--force",
        "--out",
        str(plan),
    ]
    more += ["--hidden-size", "64", "--expert-size", "32", "--redundant-memory", "1"]
    told = call([*solve_it, *more])
    written = json.loads(plan.read_text())
    choice = written["provenance"]["redundant_experts"]
    number = choice["redundant_experts"]
    assert f"{number} redundant experts, because" in told
    assert [len(row) for row in written["physical_to_logical_map"]] == [8 + number] * 2
    steps = [step["redundant_experts"] for step in choice["ladder"]]
    assert steps == [0, 4, 8][: len(steps)]
    assert choice["ladder"][1]["bytes_per_rank"] == 2 * 3 * 64 * 32 * 2
    assert choice["least_gain"] == 0.05
    first = plan.read_bytes()
    call([*solve_it, *more])
    assert plan.read_bytes() == first


def test_by_time_it_is_predicted_seconds(
    make_trace: Callable[..., Trace], tmp_path: Path
) -> None:
    make_trace(num_experts=(8, 8), num_sequences=6)
    plan = tmp_path / "plan.json"
    call(["solve", str(tmp_path / "trace"), "--gpus-per-node", "2", "--relax-cap",
          "--redundant-experts", "auto", "--replica-choice", "local-first",
          "--proof", "none", "--objective", "time",
          "--hardware", "h100", "--hidden-size", "64", "--expert-size", "32",
          "--out", str(plan)])  # fmt: skip
    choice = json.loads(plan.read_text())["provenance"]["redundant_experts"]
    assert choice["objective_name"].startswith("predicted seconds of a layer")
    assert all(0 < step["value"] < 1e-2 for step in choice["ladder"])

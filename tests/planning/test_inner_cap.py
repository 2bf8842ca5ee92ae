"""The cap of a robust plan: chosen on the profile alone, by arithmetic done by hand."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from placer.affinity import count_affinity
from placer.errors import NoSolutionError, UsageError
from placer.model import ModelSpec
from placer.placement import Plan
from placer.placement.solver_report import CapTrial
from placer.placement.topology import Topology
from placer.planning.inner_cap import (
    cheapest_that_holds,
    choose_inner_cap,
    inner_halves,
    loosest_that_holds,
    predicted_imbalance,
)
from placer.planning.planner import plan_from_trace
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.solver.params import SolverParams
from placer.solver.solve import solve
from placer.trace import EVERYTHING, Chunk, Fold, Selection, Trace, TraceWriter
from tests.plans import changed

SIZES = (8, 8, 8)
ROBUST = SolveOptions(
    topology=Topology(gpus_per_node=2),
    goal=Goal(robust="bootstrap", caps=Caps(max_imbalance=1.2, relax=True)),
    proof="none",
    params=SolverParams(num_sweeps=2),
)


def model() -> ModelSpec:
    return ModelSpec(num_experts=SIZES, top_k=2)


def imbalance(expert_rank: list[np.ndarray], chunk: Chunk, num_ranks: int) -> float:
    """Count pairs one by one: max/mean, mean over the layers."""
    found = []
    for ranks, ids in zip(expert_rank, chunk.experts, strict=True):
        load = [0] * num_ranks
        for expert in ids.ravel().tolist():
            load[int(ranks[expert])] += 1
        found.append(max(load) / (sum(load) / num_ranks))
    return sum(found) / len(found)


def trials(
    *values: float,
    caps: tuple[float, ...] = (1.10, 1.06, 1.02),
    prices: tuple[float, ...] = (10.0, 10.0, 10.0),
) -> list[CapTrial]:
    return [
        CapTrial(
            max_imbalance=cap,
            overflow_price=price,
            objective=1.0,
            profile_imbalance=1.0,
            heldout_imbalance=1.0,
            predicted_imbalance=value,
        )
        for cap, price, value in zip(caps, prices, values, strict=True)
    ]


def test_what_is_above_the_profile_counts_a_square_root_of_two_less() -> None:
    assert predicted_imbalance(1.04, 1.14) == pytest.approx(1.04 + 0.1 / math.sqrt(2))
    assert predicted_imbalance(1.10, 1.05) == pytest.approx(1.10 - 0.05 / math.sqrt(2))


@pytest.mark.parametrize(
    ("values", "asked", "cap", "expected", "holds"),
    [
        # A line of slope 1/2: 1.14 at 1.10, 1.10 at 1.02.
        ((1.14, 1.12, 1.10), 1.15, 1.10, 1.14, True),
        ((1.14, 1.12, 1.10), 1.1305, 1.081, 1.1305, True),
        ((1.14, 1.12, 1.10), 1.09, 1.02, 1.10, False),
        # The same line through values that lie about it.
        ((1.15, 1.10, 1.11), 1.1305, 1.081, 1.1305, True),
        # Tighter caps that help nothing: the tightest, or the loosest where it holds.
        ((1.12, 1.12, 1.12), 1.11, 1.02, 1.12, False),
        ((1.12, 1.12, 1.12), 1.12, 1.10, 1.12, True),
        ((1.10, 1.12, 1.14), 1.09, 1.02, 1.14, False),
    ],
)
def test_the_loosest_cap_on_the_line_is_taken(
    values: tuple[float, ...], asked: float, cap: float, expected: float, holds: bool
) -> None:
    found = loosest_that_holds(asked, trials(*values))
    assert found.max_imbalance == pytest.approx(cap)
    assert found.predicted_imbalance == pytest.approx(expected, abs=6e-4)
    assert found.holds is holds


@pytest.mark.parametrize(
    ("values", "asked", "price", "expected", "holds"),
    [
        # A line that falls by 0.02 per doubling: 1.12 at 10, 1.08 at 40.
        ((1.12, 1.10, 1.08), 1.10, 20, 1.10, True),
        ((1.12, 1.10, 1.08), 1.11, 15, 1.12 - 0.02 * math.log2(1.5), True),
        ((1.12, 1.10, 1.08), 1.07, 40, 1.08, False),
        # The same line through values that lie about it.
        ((1.13, 1.08, 1.09), 1.10, 20, 1.10, True),
        # Prices that help nothing, or do harm: the first.
        ((1.12, 1.12, 1.12), 1.10, 10, 1.12, False),
        ((1.12, 1.13, 1.14), 1.10, 10, 1.12, False),
    ],
)
def test_the_cheapest_price_on_the_line_is_taken(
    values: tuple[float, ...], asked: float, price: float, expected: float, holds: bool
) -> None:
    caps = trials(1.14, 1.13, values[0])
    costlier = trials(*values[1:], caps=(1.02, 1.02), prices=(20.0, 40.0))
    found = cheapest_that_holds(asked, caps, costlier)
    assert (found.max_imbalance, found.overflow_price) == (1.02, price)
    assert found.predicted_imbalance == pytest.approx(expected, abs=6e-4)
    assert found.holds is holds
    assert found.trials == (*caps, *costlier)


def test_prices_are_tried_where_no_cap_holds_and_none_is_asked_for(
    make_chunk: Callable[..., Chunk],
) -> None:
    chunk = make_chunk(num_tokens=300, num_experts=SIZES, num_sequences=12)
    strict = changed(ROBUST, max_imbalance=1.01)
    found = choose_inner_cap(model(), chunk, strict)
    assert [one.overflow_price for one in found.trials] == [10, 10, 10, 20, 40]
    asked = choose_inner_cap(model(), chunk, changed(strict, overflow_price=15.0))
    assert [one.overflow_price for one in asked.trials] == [15, 15, 15]
    assert asked.overflow_price == 15


def test_halves_are_every_second_sequence_whatever_their_ids(
    make_chunk: Callable[..., Chunk],
) -> None:
    chunk = make_chunk(num_sequences=9)
    chunk = replace(chunk, sequence_ids=(chunk.sequence_ids * 2 + 4).astype(np.int32))
    one, two = inner_halves(chunk, "--robust bootstrap")
    assert set(one.sequence_ids.tolist()) == {4, 8, 12, 16, 20}
    assert set(two.sequence_ids.tolist()) == {6, 10, 14, 18}


def test_trials_are_plans_of_one_half_judged_on_the_other(
    make_chunk: Callable[..., Chunk],
) -> None:
    chunk = make_chunk(num_tokens=300, num_experts=SIZES, num_sequences=12)
    trial = choose_inner_cap(model(), chunk, ROBUST).trials[1]
    assert trial.max_imbalance == pytest.approx(1 + 0.6 * 0.2)
    quick = changed(
        ROBUST,
        max_imbalance=trial.max_imbalance,
        params=SolverParams(num_rounds=0, num_sweeps=1, num_starts=1),
    )
    even = np.unique(chunk.sequence_ids, return_inverse=True)[1] % 2 == 0
    halves = [chunk.select(even), chunk.select(~even)]
    own, other = [], []
    for here, there in itertools.permutations(halves):
        placement, _ = solve(count_affinity([here], model(), {}), quick, None, here)
        ranks = [placement.expert_rank(layer) for layer in range(3)]
        own.append(imbalance(ranks, here, 2))
        other.append(imbalance(ranks, there, 2))
    assert trial.profile_imbalance == pytest.approx(sum(own) / 2, abs=1e-5)
    assert trial.heldout_imbalance == pytest.approx(sum(other) / 2, abs=1e-5)


def test_what_is_held_out_is_not_looked_at(
    tmp_path: Path, make_chunk: Callable[..., Chunk]
) -> None:
    """Two traces whose profiles agree and whose other sequences do not: one plan."""
    chunks = [make_chunk(num_sequences=12, seed=0), make_chunk(num_sequences=12, seed=5)]
    kept = [chunk.select(chunk.sequence_ids % 2 == 0) for chunk in chunks[:1]]
    found = []
    for number, chunk in enumerate(chunks):
        odd = chunk.select(chunk.sequence_ids % 2 == 1)
        odd = replace(odd, sequence_ids=(odd.sequence_ids + 12).astype(np.int32))
        joined = Chunk.concatenate([*kept, odd])
        with TraceWriter(directory=tmp_path / str(number), model=model()) as writer:
            writer.append(joined)
            writer.finish()
        plan = plan_from_trace(Trace(tmp_path / str(number)), ROBUST, Selection(Fold(0, 2)))
        found.append(plan.to_json())
    for key in ("physical_to_logical_map", "solver"):
        assert found[0][key] == found[1][key]
    assert found[0]["metrics"]["heldout"] != found[1]["metrics"]["heldout"]


def test_a_plan_keeps_what_was_asked_beside_what_was_solved_under(
    make_trace: Callable[..., Trace], tmp_path: Path
) -> None:
    trace = make_trace(num_experts=SIZES, num_sequences=12, num_tokens=300)
    plan = plan_from_trace(
        trace, changed(ROBUST, max_imbalance=1.05), Selection(Fold(0, 2))
    )
    plan.write(tmp_path / "plan.json")
    read = Plan.read(tmp_path / "plan.json")
    inner = read.solver.inner_cap
    assert read.max_imbalance == 1.05
    assert inner == plan.solver.inner_cap
    assert inner is not None
    assert inner.max_imbalance < 1.05, "few tokens: what is balanced here is not there"
    assert (
        plan_from_trace(trace, changed(ROBUST, robust="none"), EVERYTHING).solver.inner_cap
        is None
    )


@pytest.mark.parametrize(
    ("changes", "options", "error", "match"),
    [
        ({"num_sequences": 1}, {}, UsageError, "the profile has only one"),
        ({}, {"params": SolverParams(num_sweeps=0)}, UsageError, "--num-sweeps is 0"),
        ({}, {"robust": "domains"}, UsageError, "the trace has no domains"),
        (
            {"num_tokens": 51},
            {
                "topology": Topology(gpus_per_node=4),
                "max_imbalance": 1.0,
                "relax": False,
            },
            NoSolutionError,
            "--max-imbalance 1.0 is out of reach",
        ),
    ],
)
def test_profiles_that_tell_nothing_are_refused(
    make_trace: Callable[..., Trace],
    changes: dict[str, int],
    options: dict[str, object],
    error: type[Exception],
    match: str,
) -> None:
    trace = make_trace(**{"num_experts": SIZES, "num_sequences": 12, **changes})
    with pytest.raises(error, match=match):
        plan_from_trace(trace, changed(ROBUST, **options), EVERYTHING)

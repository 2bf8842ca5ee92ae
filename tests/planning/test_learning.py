"""The learning curve: nested parts, one last point that is the whole profile."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from placer.errors import UsageError
from placer.placement import Placement
from placer.placement.topology import Topology
from placer.planning.learning import _parts, learning_curve, moved_share
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.solver.params import SolverParams
from placer.solver.search.pair_search import Search
from placer.trace import Fold, Selection, Trace
from tests.plans import changed

OPTIONS = SolveOptions(
    topology=Topology(gpus_per_node=2),
    goal=Goal(policy="follow", caps=Caps(max_imbalance=2.0)),
    params=SolverParams(num_rounds=2),
)


def test_parts_grow_to_the_whole_profile(make_trace: Callable[..., Trace]) -> None:
    trace = make_trace(num_tokens=4000, num_sequences=80)
    points = learning_curve(
        trace, OPTIONS, Selection(Fold(0, 2)), tokens=(1000, 100, 10**9)
    )
    assert [100 <= points[0].num_tokens < 250, 1000 <= points[1].num_tokens < 1150] == [
        True
    ] * 2
    assert len(points) == 3
    assert points[2].num_tokens == trace.read(Selection(Fold(0, 2))).num_tokens
    assert points[2].ratio < 1


def test_each_part_holds_the_part_before(make_trace: Callable[..., Trace]) -> None:
    profile = make_trace(num_tokens=4000, num_sequences=80).read(Selection(Fold(0, 2)))
    small, more, whole = (
        set(part.sequence_ids.tolist()) for part in _parts(profile, (1000, 100), 0)
    )
    assert small < more < whole


def test_a_fold_smaller_than_the_parts_is_refused(make_trace: Callable[..., Trace]) -> None:
    with pytest.raises(UsageError, match="fewer than the smallest part"):
        learning_curve(make_trace(), OPTIONS, Selection(Fold(0, 2)), tokens=(10_000,))


@pytest.mark.parametrize("policy", ["token", "request"])
def test_homes_from_tables_are_refused(
    make_trace: Callable[..., Trace], policy: str
) -> None:
    options = changed(OPTIONS, policy=policy)
    with pytest.raises(UsageError, match=f"--policy {policy}") as error:
        learning_curve(make_trace(), options, Selection(Fold(0, 2)), tokens=(100,))
    assert error.value.hint == "choose fixed or follow"


def test_ctrl_c_ends_the_curve_not_one_of_its_plans(
    make_trace: Callable[..., Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(search: Search, number: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "_round", interrupt)
    trace = make_trace(num_experts=(16, 16), num_sequences=8)
    options = replace(OPTIONS, topology=Topology(gpus_per_node=4))
    with pytest.raises(KeyboardInterrupt):
        learning_curve(trace, options, Selection(Fold(0, 2)), tokens=(50,))


def test_renamed_ranks_are_no_move_and_a_swap_moves_two() -> None:
    ranks = np.arange(8) // 2
    one = Placement.from_expert_rank([ranks], 4)
    renamed = Placement.from_expert_rank([3 - ranks], 4)
    assert moved_share(one, renamed) == 0
    swapped = ranks.copy()
    swapped[[0, 7]] = swapped[[7, 0]]
    assert moved_share(one, Placement.from_expert_rank([3 - swapped], 4)) == 2 / 8


def test_the_command_prints_a_row_per_part(
    make_trace: Callable[..., Trace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from placer.cli.main import main

    trace = make_trace(num_tokens=2000, num_sequences=40)
    command = ["trace", "learning", str(trace.directory), "--gpus-per-node", "2"]
    with pytest.raises(SystemExit) as caught:
        main([*command, "--max-imbalance", "2", "--tokens", "200", "--tokens", "500"])
    assert caught.value.code in (0, None)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if len(row) == 6 and row[0].isdecimal()] == [
        *("206", "500", "996"),
    ]

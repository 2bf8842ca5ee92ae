"""The curve holds one legal plan per cap, and traffic falls as the cap is lifted."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from placer.cli.main import main
from placer.errors import UsageError
from placer.placement import Plan
from placer.placement.topology import Topology
from placer.planning.frontier import parse_caps, write_frontier
from placer.simulation.simulate import simulate
from placer.solver.options import SolveOptions
from placer.trace import EVERYTHING, Trace


def test_caps_are_read_ascending_and_once() -> None:
    assert parse_caps("1.5,1.02,1.5,1") == [1.0, 1.02, 1.5]
    for wrong in ("x", "0.9,2", "1.1,", "nan", "inf"):
        with pytest.raises(UsageError, match="--frontier"):
            parse_caps(wrong)


@pytest.mark.parametrize(
    ("asked", "key", "heading"),
    [
        ("--gpus-per-node 4", "remote_rank_copies_per_token", "copies/token"),
        (
            "--nodes 2 --gpus-per-node 2 --exchange per-node",
            "remote_node_copies_per_token",
            "node copies/token",
        ),
        (
            "--gpus-per-node 4 --engine sglang-deepep-ll --policy follow",
            "remote_pairs_per_token",
            "pairs/token",
        ),
    ],
)
def test_each_point_is_its_plan(
    make_trace: Callable[..., Trace],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    asked: str,
    key: str,
    heading: str,
) -> None:
    """It tells what is sent."""
    trace = make_trace(num_tokens=3000, num_experts=(16,) * 3, num_sequences=40)
    out = tmp_path / "curve"
    arguments = ["solve", str(trace.directory), *asked.split(), "--out", str(out)]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--frontier", "3,1.05", "--proof", "none", "--num-rounds", "2"])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert "plan-1.05.json" in printed
    assert heading in printed
    with (out / "frontier.csv").open() as stream:
        tight, loose = csv.DictReader(stream)
    assert float(loose["objective"]) <= float(tight["objective"])
    for row in (tight, loose):
        plan = Plan.read(out / row["file"])
        own = simulate(plan.placement, trace.read())[plan.policy].to_json()
        assert float(row["load_imbalance_mean"]) == own["load_imbalance_mean"]
        assert float(row[key]) == own[key]
    assert float(tight["load_imbalance_mean"]) < float(loose["load_imbalance_mean"])


def test_caps_that_are_almost_equal_have_plans_of_their_own(
    make_trace: Callable[..., Trace], tmp_path: Path
) -> None:
    quick = SolveOptions(topology=Topology(gpus_per_node=2), proof="none").quick()
    caps = parse_caps("1.5000001,1.5,2,3.50")
    points = write_frontier(make_trace(), quick, EVERYTHING, caps, tmp_path / "curve")
    names = ["plan-1.5.json", "plan-1.5000001.json", "plan-2.json", "plan-3.5.json"]
    assert [point.file for point in points] == names
    for point in points:
        assert Plan.read(tmp_path / "curve" / point.file).max_imbalance in caps


def test_a_directory_that_is_there_is_kept(
    make_trace: Callable[..., Trace], tmp_path: Path
) -> None:
    trace = make_trace()
    (tmp_path / "curve").mkdir()
    arguments = ["solve", str(trace.directory), "--gpus-per-node", "4"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--frontier", "1.1", "--out", str(tmp_path / "curve")])
    assert done.value.code == 1
    assert not list((tmp_path / "curve").iterdir())


def test_a_cap_out_of_reach_is_refused_or_relaxed_aloud(
    make_trace: Callable[..., Trace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As --max-imbalance is: 202 pairs do not divide over 8 ranks."""
    trace = make_trace(num_tokens=101, num_experts=(16,) * 3)
    out = tmp_path / "curve"
    words = ["solve", str(trace.directory), "--gpus-per-node", "8", "--out", str(out)]
    words += ["--frontier", "1,3", "--proof", "none", "--num-rounds", "1"]
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 3
    err = capsys.readouterr().err
    assert "--frontier 1 is out of reach in 3 of 3 MoE layers; no placement has" in err
    assert not out.exists()
    with pytest.raises(SystemExit) as done:
        main([*words, "--relax-cap"])
    assert done.value.code == 0
    assert "warning: --frontier 1 is out of reach" in " ".join(
        capsys.readouterr().err.split()
    )
    assert (out / "plan-1.json").exists()

"""Results that other commands print are read back, and refused in a sentence if damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from placer.cli.main import main
from tests.report.conftest import Reports

Change = Callable[[dict[str, Any]], object]


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", *map(str, words)])
    told = capsys.readouterr()
    assert stopped.value.code not in (0, None)
    assert told.out == ""
    assert "hint: " in told.err
    return told.err


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("simulation", lambda v: v["batches"].pop("plan"), "have different placements"),
        ("simulation", lambda v: v["baselines"].pop("eplb"), "have different placements"),
        ("simulation", lambda v: v["policies"].clear(), "plan has no figures of"),
        ("simulation", lambda v: v["batches"]["eplb"].pop(), "other sizes than the plan"),
        ("simulation", lambda v: v.update(tokens="many"), "tokens"),
        ("simulation", lambda v: v.pop("warnings"), "warnings"),
        ("learning", lambda v: v["points"].clear(), "points"),
        ("learning", lambda v: v["points"][0].pop("ratio"), "ratio"),
        ("learning", lambda v: v["points"][0].update(ratio=None), "ratio"),
    ],
)
def test_a_damaged_result_is_refused(
    name: str,
    change: Change,
    words: str,
    reports: Reports,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    value = json.loads(Path(reports.inspected[name][0]).read_text(encoding="utf-8"))
    change(value)
    (tmp_path / "result.json").write_text(json.dumps(value), encoding="utf-8")
    assert words in refused(capsys, tmp_path / "result.json")


def test_rows_that_may_be_counts_are_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "counts.json").write_text("[[3, 0, 1, 2], [0, 1, 2, 3]]")
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "counts.json"), "--json"])
    (told,) = json.loads(capsys.readouterr().out)["headline"]["misleading"]
    assert "placer import load-matrix" in told


def test_several_engines_are_refused_with_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "all.json").write_text('{"engines": {"one": {}, "two": {}}}')
    assert "of several engines: one, two" in refused(capsys, tmp_path / "all.json")


@pytest.mark.parametrize("table", ["", "file\n", "file\n\n", "file,max_imbalance\n,1\n"])
def test_a_frontier_that_names_no_plan_is_refused(
    table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "frontier.csv").write_text(table)
    assert "names no plan" in refused(capsys, tmp_path)


def test_a_frontier_without_its_plans_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "frontier.csv").write_text("file\n../plan-1.json\n")
    assert "plan-1.json does not exist" in refused(capsys, tmp_path)


def test_plans_for_other_ranks_are_not_compared(
    reports: Reports, capsys: pytest.CaptureFixture[str]
) -> None:
    (plan,), (nodes, _) = (reports.inspected[n] for n in ("plan", "plan-with-replicas"))
    assert "has num_nodes 1" in refused(capsys, plan, nodes)

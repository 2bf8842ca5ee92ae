"""``--quiet`` prints errors and the path of the result, nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest

from placer.cli.main import main
from placer.trace import Trace

Captured = pytest.CaptureFixture[str]


def run(capsys: Captured, *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def test_only_the_path_of_the_result(
    make_trace: Callable[..., Trace], tmp_path: Path, capsys: Captured
) -> None:
    trace, plan = make_trace().directory, tmp_path / "plan.json"
    solve = ["solve", trace, "--gpus-per-node", 2, "--out", plan]
    assert run(capsys, *solve, "-q") == (0, f"{plan}\n", "")
    counts = tmp_path / "counts.safetensors"
    assert run(capsys, "affinity", trace, "--out", counts, "--quiet") == (
        *(0, f"{counts}\n", ""),
    )
    code, out, err = run(capsys, *solve, "--force")
    assert code == 0 and out != f"{plan}\n" and err, "each command chooses anew"


def test_errors_and_json_are_printed_all_the_same(
    make_trace: Callable[..., Trace], tmp_path: Path, capsys: Captured
) -> None:
    trace, plan = make_trace().directory, tmp_path / "plan.json"
    assert run(capsys, "solve", trace, "--gpus-per-node", 2, "--out", plan, "-q")[0] == 0
    code, out, err = run(capsys, "solve", trace, "--gpus-per-node", 2, "--out", plan, "-q")
    assert (code, out) == (1, "") and err.startswith("placer: ")
    code, out, err = run(capsys, "simulate", plan, trace, "-q", "--json")
    assert code == 0 and out.startswith("{") and err == ""

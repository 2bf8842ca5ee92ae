"""The README's table: its lines, its differences, and a figure counted by the referee."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import GPT_OSS
from tests.referee import baseline, load_plan, load_trace, score

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def reproduce() -> ModuleType:
    path = ROOT / "docs" / "reproduce.py"
    spec = importlib.util.spec_from_file_location("reproduce", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["reproduce"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def figures(name: str) -> list[float]:
    (line,) = (one for one in README.splitlines() if one.startswith(f"{name}  "))
    return [float(value) for value in re.findall(r"\d\.\d{3}", line)]


def test_every_case_is_in_the_readme_in_80_columns(reproduce: ModuleType) -> None:
    for case in reproduce.CASES:
        assert len(figures(case.name)) == 5
    assert max(map(len, reproduce.HEADING.splitlines())) <= 80
    assert reproduce.HEADING in README


def test_a_line_is_shares_of_the_default(reproduce: ModuleType) -> None:
    def metrics(sent: float, busiest: float) -> dict[str, dict[str, float]]:
        case = reproduce.CASES[0]
        return {case.policy: {case.sent: sent, "load_imbalance_mean": busiest}}

    judged = {
        "policies": metrics(3, 1.2),
        "baselines": {"contiguous": metrics(4, 1.5), "eplb": metrics(5, 1.1)},
    }
    line = reproduce.row(reproduce.CASES[0], judged)
    assert line.split()[-5:] == ["1.250", "0.750", "1.500", "1.100", "1.200"]
    assert len(line) <= 80


def test_a_figure_that_differs_is_named(reproduce: ModuleType) -> None:
    name = reproduce.CASES[0].name
    readme = f"```console\n$ make reproduce\n{name:31}   1.000\nsame\n```\n"
    assert list(reproduce.differences("same", readme)) == []
    (found,) = reproduce.differences(f"{name:31}   2.000", readme)
    assert "2.000" in found
    assert "1.000" in found
    (found,) = reproduce.differences("new", readme)
    assert "no such line" in found


def test_the_referee_counts_the_first_line(reproduce: ModuleType, tmp_path: Path) -> None:
    """The plan is solved as ``make reproduce`` does; contiguous is the referee's own."""
    case = reproduce.CASES[0]
    command = case.commands(tmp_path)[0]
    subprocess.run(
        [sys.executable, "-m", "placer.cli.main", *shlex.split(command)[1:]],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (plan,) = tmp_path.glob("*.json")
    maps, num_ranks, num_nodes, sizes = load_plan(plan)
    experts, sequence_ids, _ = load_trace(GPT_OSS, "1/2")
    default = baseline("contiguous", experts, 32, num_ranks)
    own, other = (
        score(experts, sequence_ids, one, num_ranks, num_nodes, sizes=sizes)[case.policy]
        for one in (maps, default)
    )
    _, sent, contiguous, _, busiest = figures(case.name)
    assert own[case.sent] / other[case.sent] == pytest.approx(sent, abs=6e-4)
    assert own["load_imbalance_mean"] == pytest.approx(busiest, abs=6e-4)
    assert other["load_imbalance_mean"] == pytest.approx(contiguous, abs=6e-4)

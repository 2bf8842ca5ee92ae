"""The fuzzers find planted faults; what they found is refused; a run finds nothing."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from mutation import MUTATIONS
from structured import fault_of, fuzz
from targets import GUIDED, OLD, TARGETS

from placer.placement import plan

FOLDER = Path(__file__).parent
FOUND = sorted(path for path in (FOLDER / "found").glob("*/*"))


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_read(name: str, tmp_path: Path) -> None:
    """A reader that refused its seeds would be fuzzed at its door alone."""
    for seed in TARGETS[name].seeds:
        TARGETS[name].read(seed, tmp_path)
    assert TARGETS[name].kind in MUTATIONS


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_stays_refused(path: Path) -> None:
    name = path.parent.name.replace("_", " ")
    assert fault_of(name, TARGETS[name], path.read_bytes()) is None


def test_a_few_rounds_find_nothing() -> None:
    outcomes = list(fuzz(TARGETS, seed=3, rounds=6))
    assert len(outcomes) == 6 * len(TARGETS)
    assert [one for one in outcomes if one is not None] == []


def test_inputs_follow_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[bytes] = []

    def keep(name: str, target: object, content: bytes) -> None:
        drawn.append(content)

    monkeypatch.setattr("structured.fault_of", keep)
    few = {name: TARGETS[name] for name in ("plan", "csv", "table", "exflow")}
    for seed in (5, 5, 6):
        list(fuzz(few, seed, 8))
    one, same, other = drawn[:32], drawn[32:64], drawn[64:]
    assert one == same != other


def test_an_unchecked_field_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the plan's reader takes the map as it stands."""
    rows = json.loads((OLD / "plan.json").read_text())["physical_to_logical_map"]
    few = {"plan": TARGETS["plan"]}
    assert not any(fuzz(few, seed=0, rounds=150))
    real = plan.validated

    def unchecked(value: dict, kind: type, where: str, again: str) -> object:
        read = real({**value, "physical_to_logical_map": rows}, kind, where, again)
        given = value.get("physical_to_logical_map")
        return msgspec.structs.replace(read, physical_to_logical_map=given)

    monkeypatch.setattr(plan, "validated", unchecked)
    assert any(fuzz(few, seed=0, rounds=150))


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None and "PLACER_FUZZ" not in os.environ,
    reason="needs atheris: make fuzz installs it and runs this test",
)
def test_coverage_guides_to_a_planted_fault(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "guided.py"), "planted", "--seconds", "120"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 77, done.stderr[-2000:]
    (kept,) = (tmp_path / "build" / "fuzz" / "planted").iterdir()
    assert kept.read_bytes().startswith(b"PL!")
    assert set(GUIDED) <= set(TARGETS)

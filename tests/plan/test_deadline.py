"""A search that is stopped gives a legal plan, no worse than its start, and says so."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from placer.affinity import count_affinity
from placer.errors import UsageError
from placer.model import ModelSpec
from placer.plan import Plan
from placer.plan.deadline import Deadline
from placer.plan.options import SolveOptions
from placer.plan.problem import Topology
from placer.plan.search import Search
from placer.plan.solve import solve
from placer.simulation.simulate import simulate
from placer.trace import Chunk, Trace

SIZES = (16,) * 4
OPTIONS = SolveOptions(topology=Topology(gpus_per_node=4), relax_cap=True)
COPIES = "remote_rank_copies_per_token"


@pytest.fixture
def chunk(make_chunk: Callable[..., Chunk]) -> Chunk:
    return make_chunk(num_tokens=400, num_experts=SIZES, top_k=3)


def solved(
    chunk: Chunk, options: SolveOptions, progress: Callable[[str], None] | None = None
):
    affinity = count_affinity([chunk], ModelSpec(num_experts=SIZES, top_k=3), {})
    return solve(affinity, options, progress, chunk)


def test_a_limit_of_no_time_gives_the_start(chunk: Chunk) -> None:
    placement, report = solved(chunk, replace(OPTIONS, time_limit=0.0))
    assert not report.reproducible
    assert [len(row) for row in placement.physical_to_logical_map] == [16] * 4


def test_a_limit_that_is_not_reached_changes_nothing(chunk: Chunk) -> None:
    free, _ = solved(chunk, OPTIONS)
    limited, report = solved(chunk, replace(OPTIONS, time_limit=1000.0))
    assert report.reproducible
    assert limited.to_json() == free.to_json()


@pytest.mark.parametrize("where", ["pairs, round 0", "copies, sweep 0"])
def test_an_interrupt_keeps_what_was_reached(chunk: Chunk, where: str) -> None:
    def interrupt(line: str) -> None:
        if line.startswith(where):
            raise KeyboardInterrupt

    start, _ = solved(chunk, replace(OPTIONS, time_limit=0.0))
    placement, report = solved(chunk, OPTIONS, interrupt)
    assert not report.reproducible
    found, begun = (simulate(one, chunk)["fixed"].to_json() for one in (placement, start))
    assert found[COPIES] < begun[COPIES]


def test_an_interrupt_among_router_groups_is_told(
    chunk: Chunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(search: Search, number: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "_round", interrupt)
    model = ModelSpec(num_experts=SIZES, top_k=3, n_group=4)
    options = replace(OPTIONS, preserve_groups=True)
    _, report = solve(count_affinity([chunk], model, {}), options, None, chunk)
    assert not report.reproducible


def test_time_passes() -> None:
    assert not Deadline().passed()
    assert Deadline(seconds=0.0).passed()
    late = Deadline(seconds=1000.0)
    assert not late.passed()
    with late.interruptible():
        raise KeyboardInterrupt
    assert late.passed()
    with pytest.raises(UsageError, match="--time-limit must not be negative"):
        replace(OPTIONS, time_limit=-1.0)


def test_ctrl_c_writes_a_plan_that_is_marked(
    make_trace: Callable[..., Trace], tmp_path: Path
) -> None:
    trace = make_trace(num_tokens=20_000, num_experts=(64,) * 12, top_k=6)
    out, searching = tmp_path / "plan.json", tmp_path / "searching"
    code = (
        "import pathlib, sys\n"
        "from placer.cli.main import main\n"
        "from placer.plan.search import Search\n"
        "plain = Search._round\n"
        "def marked(self, number):\n"
        "    plain(self, number)\n"
        f"    pathlib.Path({str(searching)!r}).touch()\n"
        "Search._round = marked\n"
        "main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "solve", str(trace.directory)]
    options = ["--gpus-per-node", "8", "--relax-cap", "--out", str(out)]
    running = subprocess.Popen(
        # So many rounds would take hours.
        [*command, *options, "--num-rounds", "100000", "--proof", "none"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not searching.exists() and running.poll() is None:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=100)
    assert running.returncode == 0, said
    assert "cannot be reproduced" in said
    assert not Plan.read(out).solver.reproducible

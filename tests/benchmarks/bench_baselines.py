"""Baselines and solved plans on real traces, held out; prints the tables of the docs.

Profile on one fold of the sequences, judge on the other; both directions. Seconds are those
of the process, reading and counting the profile included; placer's leave out certificates,
as no baseline has any. placer's rows alone: ``-k "baselines and placer"``.
"""

import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from placer.baseline import BASELINES, BaselineProblem
from placer.errors import UsageError
from placer.plan import Placement
from placer.plan.options import SolveOptions
from placer.plan.planner import plan_from_trace
from placer.plan.problem import Topology
from placer.simulation import PolicyMetrics, contiguous, simulate
from placer.trace import Fold, Trace
from placer.trace.imported import import_file
from placer.trace.npz import read_npz

COPIES = "remote_rank_copies_per_token"
TOPOLOGY = Topology(gpus_per_node=8)
FOLDS = (Fold(0, 2), Fold(1, 2))
#: placer's own: policy, cap on the imbalance, redundant experts.
SOLVED = {
    "**placer** `fixed`, cap 1.10": ("fixed", 1.1, 0),
    "**placer** `follow`, cap 1.10": ("follow", 1.1, 0),
    "**placer** `fixed`, no cap": ("fixed", 8.0, 0),
    "**placer** `follow`, no cap": ("follow", 8.0, 0),
    "**placer** `fixed`, 8 redundant": ("fixed", 1.1, 8),
    "**placer** `follow`, 8 redundant": ("follow", 1.1, 8),
}


Cells = dict[str, list[str]]


@pytest.fixture(scope="module")
def tables() -> Iterator[dict[str, Cells]]:
    """The rows of each trace, printed when all are there."""
    found: dict[str, Cells] = {}
    yield found
    for name, rows in found.items():
        print(f"\n\n| {name} | `fixed` | `follow` | imbalance | home | s |")
        print("|---|---|---|---|---|---|")
        for row, values in rows.items():
            print(f"| {row} | {' | '.join(values)} |")


@pytest.fixture(scope="module")
def real_trace(
    shared_traces: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Trace]:
    """Return a real trace by its name, as ``placer import`` writes it."""
    folder = tmp_path_factory.mktemp("traces")

    @cache
    def read(name: str) -> Trace:
        import_file(read_npz, "npz", shared_traces / f"{name}.npz", folder / name)
        return Trace(folder / name)

    return read


@pytest.mark.parametrize("row", [*BASELINES, *SOLVED])
@pytest.mark.parametrize(
    "name", ["gpt-oss-20b", "deepseek-v2-lite-intent", "deepseek-v2-lite-summary"]
)
def test_baselines(
    name: str, row: str, real_trace: Callable[[str], Trace], tables: dict[str, Cells]
) -> None:
    trace = real_trace(name)
    figures: list[list[float]] = []
    for fold in FOLDS:
        try:
            placement, seconds = place(row, trace, fold)
        except UsageError as error:
            pytest.skip(error.message)  # a partitioner that is not installed
        heldout = trace.read(fold.complement())
        base = contiguous(trace.model.num_experts, TOPOLOGY.num_ranks, TOPOLOGY.num_nodes)
        judged = row_figures(simulate(placement, heldout), simulate(base, heldout))
        figures.append([*judged, seconds])
    tables.setdefault(name, {})[row] = list(cells(figures))


def place(row: str, trace: Trace, fold: Fold) -> tuple[Placement, float]:
    """Return the placement of a row of the table, and the seconds that it took."""
    began = time.process_time()
    if row in BASELINES:
        problem = BaselineProblem(
            trace=trace,
            fold=fold,
            topology=TOPOLOGY,
            redundant_experts=8 if row == "eplb" else 0,
        )
        return BASELINES[row](problem), time.process_time() - began
    policy, cap, redundant_experts = SOLVED[row]
    options = SolveOptions(
        topology=TOPOLOGY,
        policy=policy,
        max_imbalance=cap,
        relax_cap=True,
        redundant_experts=redundant_experts,
        proof="none",
    )
    return plan_from_trace(trace, options, fold).placement, time.process_time() - began


def row_figures(
    judged: dict[str, PolicyMetrics], base: dict[str, PolicyMetrics]
) -> Iterator[float]:
    """Yield copies as shares of the contiguous placement's, imbalance, home imbalance."""
    for policy in ("fixed", "follow"):
        yield getattr(judged[policy], COPIES) / getattr(base[policy], COPIES)
    yield judged["fixed"].load_imbalance_mean
    yield judged["follow"].home_imbalance_max


def cells(figures: list[list[float]]) -> Iterator[str]:
    """Yield one cell per figure, both folds in it; seconds are their mean."""
    *shares, seconds = zip(*figures, strict=True)
    for values in shares:
        yield " / ".join(f"{value:.3f}" for value in values)
    yield f"{sum(seconds) / len(seconds):.1f}"

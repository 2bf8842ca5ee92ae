"""Baselines and solved plans on real traces, held out; prints the tables of the docs.

Profile on one fold of the sequences, judge on the other; both directions. Seconds include
reading and counting the profile; those of placer leave out certificates, as no baseline
has any.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from placer.baseline import BASELINES, BaselineProblem
from placer.errors import UsageError
from placer.plan import Placement
from placer.plan.options import SolveOptions
from placer.plan.planner import plan_from_trace
from placer.plan.problem import Topology
from placer.simulation import PolicyMetrics, simulate
from placer.trace import Fold, Trace
from placer.trace.imported import import_file
from placer.trace.npz import read_npz

COPIES = "remote_rank_copies_per_token"
TOPOLOGY = Topology(gpus_per_node=8)
FOLDS = (Fold(0, 2), Fold(1, 2))
#: placer's own: policy, cap on the imbalance, redundant experts.
SOLVED = {
    "**placer** `fixed`": ("fixed", 1.1, 0),
    "**placer** `follow`": ("follow", 1.1, 0),
    "**placer** `fixed`, no cap": ("fixed", 8.0, 0),
    "**placer** `follow`, no cap": ("follow", 8.0, 0),
    "**placer** `fixed`, 8 replicas": ("fixed", 1.1, 8),
}


@pytest.mark.parametrize(
    "name", ["gpt-oss-20b", "deepseek-v2-lite-intent", "deepseek-v2-lite-summary"]
)
def test_baselines(shared_traces: Path, tmp_path: Path, name: str) -> None:
    import_file(read_npz, "npz", shared_traces / f"{name}.npz", tmp_path / "trace")
    trace = Trace(tmp_path / "trace")
    heldout = {fold: trace.read(fold.complement()) for fold in FOLDS}
    base: dict[Fold, dict[str, PolicyMetrics]] = {}
    print(f"\n| {name} | `fixed` | `follow` | imbalance | home | s |")
    print("|---|---|---|---|---|---|")
    for row in (*BASELINES, *SOLVED):
        figures: list[list[float]] = []
        for fold in FOLDS:
            try:
                placement, seconds = place(row, trace, fold)
            except UsageError as error:  # a partitioner that is not installed
                print(f"| {row} | {error.message} | | | | |")
                break
            judged = simulate(placement, heldout[fold])
            base.setdefault(fold, judged)
            figures.append([*row_figures(judged, base[fold]), seconds])
        else:
            print(f"| {row} | {' | '.join(cells(figures))} |", flush=True)


def place(row: str, trace: Trace, fold: Fold) -> tuple[Placement, float]:
    """Return the placement of a row of the table, and the seconds that it took."""
    began = time.perf_counter()
    if row in BASELINES:
        problem = BaselineProblem(
            trace=trace,
            fold=fold,
            topology=TOPOLOGY,
            redundant_experts=8 if row == "eplb" else 0,
        )
        return BASELINES[row](problem), time.perf_counter() - began
    policy, cap, redundant_experts = SOLVED[row]
    options = SolveOptions(
        topology=TOPOLOGY,
        policy=policy,
        max_imbalance=cap,
        relax_cap=True,
        redundant_experts=redundant_experts,
        proof="none",
    )
    return plan_from_trace(trace, options, fold).placement, time.perf_counter() - began


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

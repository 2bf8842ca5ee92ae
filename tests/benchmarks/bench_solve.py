"""Solved plans beside the contiguous placement, held out, on real traces.

``make bench`` prints the tables of ``docs/benchmarks.md``: both folds, five seeds, one
process per core. What is measured is kept in ``build/benchmarks`` beside the hash of the
sources, so that a run that was stopped goes on; delete it to measure anew. ``BENCH_SEEDS``
is the number of seeds, and pytest selects rows::

    BENCH_SEEDS=1 python -m pytest -s tests/benchmarks/bench_solve.py \
        -k "placements and gpt-oss-20b and 1x8 and follow"
"""

import multiprocessing
import os
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from placements import Case, Folders, measure, sources_sha256

from placer.plan.options import SolveOptions
from placer.plan.planner import plan_from_trace
from placer.plan.problem import Topology
from placer.trace import Fold, Trace
from placer.trace.imported import import_file
from placer.trace.npz import read_npz

TRACES = ["gpt-oss-20b", "deepseek-v2-lite-intent", "deepseek-v2-lite-summary"]
#: Nodes x GPUs per node.
SHAPES = [(1, 4), (1, 8), (1, 16), (2, 4), (2, 8)]
NUM_SEEDS = int(os.environ.get("BENCH_SEEDS", "5"))
BUILD = Path(__file__).resolve().parents[2] / "build" / "benchmarks"
COPIES = "remote_rank_copies_per_token"
NODE_COPIES = "remote_node_copies_per_token"
BUSIEST = "bottleneck_rank_copies_per_token"

#: Copies of contiguous that are aimed at on one node of 8 ranks, trace by trace.
TARGETS = {"follow": (0.705, 0.600, 0.660), "fixed": (0.831, 0.710, 0.760)}

Figures = dict[str, Any]


def cases(trace: str, shape: tuple[int, int], policy: Any, part: int) -> list[Case]:
    """Return the seeds of one row of the tables."""
    return [
        Case(
            trace=trace,
            num_nodes=shape[0],
            gpus_per_node=shape[1],
            policy=policy,
            part=part,
            seed=seed,
        )
        for seed in range(NUM_SEEDS)
    ]


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest,
    shared_traces: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[Case, Future[Figures]]]:
    """The figures of all cases of the tests that were selected, as they are measured."""
    rows = [
        item.callspec.params
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_placements
    ]
    folders = Folders(
        traces=tmp_path_factory.mktemp("traces"),
        results=BUILD / "placements" / sources_sha256()[:16],
        referee=shared_traces.parent / "tools" / "score.py",
    )
    folders.results.mkdir(parents=True, exist_ok=True)
    for name in {row["trace"] for row in rows}:
        import_file(read_npz, "npz", shared_traces / f"{name}.npz", folders.traces / name)
    # One process per core, so none has threads beside it.
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
            patch.setenv(name, "1")
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context)
        try:
            # Seed by seed: a run that is stopped has some seeds of every row.
            every = sorted(
                (case for row in rows for case in cases(**row)), key=lambda case: case.seed
            )
            yield {case: pool.submit(measure, case, folders) for case in every}
        finally:
            pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def rows() -> Iterator[list[list[Figures]]]:
    """The seeds of each row; the tables are printed when all are there."""
    found: list[list[Figures]] = []
    yield found
    for across_nodes in (False, True):
        lines = [row(one) for one in found if (one[0]["num_nodes"] > 1) == across_nodes]
        if lines:
            print(f"\n\n{header(across_nodes)}\n" + "\n".join(lines))
    print("\n" + "\n".join(beside_targets(found)))


@pytest.mark.parametrize("part", [0, 1], ids=["0of2", "1of2"])
@pytest.mark.parametrize("policy", ["fixed", "follow"])
@pytest.mark.parametrize("shape", SHAPES, ids=["x".join(map(str, s)) for s in SHAPES])
@pytest.mark.parametrize("trace", TRACES)
def test_placements(
    trace: str,
    shape: tuple[int, int],
    policy: str,
    part: int,
    measured: dict[Case, Future[Figures]],
    rows: list[list[Figures]],
) -> None:
    found = [measured[case].result() for case in cases(trace, shape, policy, part)]
    rows.append(found)
    assert found[0]["referee_difference"] < 1e-4


def header(across_nodes: bool) -> str:
    names = ["trace", "ranks", "policy", "profile fold"]
    if across_nodes:
        names += ["node copies, median (range)", "interval over sequences", "rank copies"]
    else:
        names += ["copies, median (range)", "interval over sequences"]
    names += ["imbalance", "balanced", "receiver", "home", "gap", "pairs", "s"]
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def row(found: Sequence[Figures]) -> str:
    """Return a row of a table: what the seeds of one case have in the median."""
    first = found[0]
    num_nodes, gpus_per_node = first["num_nodes"], first["gpus_per_node"]
    across_nodes = num_nodes > 1
    cells = [
        first["trace"],
        f"{num_nodes} x {gpus_per_node}" if across_nodes else str(gpus_per_node),
        f"`{first['policy']}`",
        f"{first['part']}/2",
    ]
    shares = share(found, NODE_COPIES if across_nodes else COPIES)
    median = statistics.median(shares)
    cells.append(f"{median:.3f} ({min(shares):.3f} to {max(shares):.3f})")
    sure = first["interval"]
    cells.append(
        "" if sure is None or sure[0] is None else f"{sure[0]:.3f} to {sure[1]:.3f}"
    )
    if across_nodes:
        cells.append(f"{statistics.median(share(found, COPIES)):.3f}")
    own = [one["placer"] for one in found]
    cells += [
        f"{statistics.median(one['load_imbalance_mean'] for one in own):.3f}",
        f"{first['balanced']['load_imbalance_mean']:.3f}",
        f"{statistics.median(share(found, BUSIEST)):.3f}",
        f"{statistics.median(one['home_imbalance_max'] for one in own):.2f}",
    ]
    gaps = (first["gap"], first["pairs_gap"])
    cells += ["" if gap is None else f"{gap * 100:.1f} %" for gap in gaps]
    cells.append(f"{statistics.median(one['cpu_seconds'] for one in found):.0f}")
    return f"| {' | '.join(cells)} |"


def beside_targets(rows: Sequence[Sequence[Figures]]) -> Iterator[str]:
    """Yield a sentence for each target: the median over the seeds, fold by fold."""
    for policy, targets in TARGETS.items():
        for trace, target in zip(TRACES, targets, strict=True):
            wanted = {"trace": trace, "policy": policy, "num_nodes": 1, "gpus_per_node": 8}
            medians = [
                statistics.median(share(found, COPIES))
                for found in rows
                if wanted.items() <= found[0].items()
            ]
            if medians:
                reached = ", ".join(f"{median:.4f}" for median in medians)
                said = "met" if max(medians) <= target else f"{max(medians) - target:+.4f}"
                aimed = f"`{policy}`, {trace}, 8 ranks: at most {target:.3f}"
                yield f"{aimed}, reached {reached} ({said})"


def share(found: Sequence[Figures], name: str) -> list[float]:
    """Return a figure of each seed's plan as a share of the contiguous placement's."""
    return [one["placer"][name] / one["contiguous"][name] for one in found]


#: What each option is for, its policy, and the options: 8 ranks, both folds.
VARIANTS = {
    "even receivers": ("fixed", {"receive_price": 10.0}),
    "robust": (
        "follow",
        {"robust": "bootstrap", "relax_cap": True},
    ),
    "8 redundant experts": (
        "fixed",
        {"redundant_experts": 8, "relax_cap": True},
    ),
}


@pytest.mark.parametrize("name", ["gpt-oss-20b", "deepseek-v2-lite-intent"])
def test_levers(shared_traces: Path, tmp_path: Path, name: str) -> None:
    """Receive price, robust load and replicas beside contiguous and the load balancer."""
    import_file(read_npz, "npz", shared_traces / f"{name}.npz", tmp_path / "trace")
    trace = Trace(tmp_path / "trace")
    print(f"\n{name}, 8 ranks: copies and bottleneck of contiguous, held-out imbalance")
    for title, (policy, options) in VARIANTS.items():
        for fold in (Fold(0, 2), Fold(1, 2)):
            asked = SolveOptions(
                topology=Topology(gpus_per_node=8), policy=policy, proof="none", **options
            )
            plan = plan_from_trace(trace, asked, fold)
            rows = {**plan.metrics["baselines"], "placer": plan.metrics["heldout"]}
            base = rows["contiguous"][policy]
            for row in ("eplb", "balanced", "placer"):
                if row not in rows:
                    continue
                own = rows[row][policy]
                busiest = "bottleneck_rank_copies_per_token"
                print(
                    f"{title:20s} {fold!s:5s} {row:9s} {own[COPIES] / base[COPIES]:.3f} "
                    f"{own[busiest] / base[busiest]:.3f} {own['load_imbalance_mean']:.3f}"
                )

"""Solved plans beside the contiguous placement, held out, on real traces.

``make bench`` prints the tables of ``docs/benchmarks.md`` and ``docs/follow_measured.md``:
both folds, five seeds, one process per core. What is measured is kept in
``build/benchmarks`` beside the hash of the sources, so that a run that was stopped goes on;
delete it to measure anew. ``BENCH_SEEDS`` is the number of seeds, and pytest selects rows::

    BENCH_SEEDS=1 python -m pytest -s tests/benchmarks/bench_solve.py \
        -k "placements and gpt-oss-20b and 1x8 and follow"
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from instances import (
    BUSIEST,
    HOME_IMBALANCE,
    IMBALANCE,
    PART_IDS,
    PARTS,
    RANK_COPIES,
    SHAPE_IDS,
    SHAPES,
    TRACES,
    Figures,
    Measuring,
    baseline,
    copies_name,
    paired,
    seeds,
    shares,
)
from placements import Case

#: Copies of contiguous that are aimed at on one node of 8 ranks, trace by trace.
TARGETS = {"follow": (0.705, 0.600, 0.660), "fixed": (0.831, 0.710, 0.760)}
#: What a plan is solved for beyond a cap of 1.10, where, and under which policies.
LEVERS = [
    ("gpt-oss-20b", (1, 8), "redundant", "fixed"),
    ("gpt-oss-20b", (1, 8), "redundant", "follow"),
    ("deepseek-v2-lite-intent", (1, 8), "redundant", "fixed"),
    ("deepseek-v2-lite-intent", (1, 8), "redundant", "follow"),
    ("deepseek-v2-lite-summary", (1, 8), "redundant", "fixed"),
    ("gpt-oss-20b", (1, 16), "redundant", "fixed"),
    ("gpt-oss-20b", (1, 8), "redundant, 1.03", "fixed"),
    ("deepseek-v2-lite-intent", (1, 8), "redundant, 1.03", "fixed"),
    ("gpt-oss-20b", (1, 8), "redundant, robust", "fixed"),
    ("gpt-oss-20b", (1, 8), "robust", "follow"),
    ("deepseek-v2-lite-summary", (1, 8), "robust", "follow"),
    ("gpt-oss-20b", (1, 8), "even-receivers", "fixed"),
    ("deepseek-v2-lite-intent", (1, 8), "even-receivers", "fixed"),
    ("deepseek-v2-lite-intent", (1, 8), "even-receivers, 2", "follow"),
    ("deepseek-v2-lite-summary", (1, 8), "even-receivers, 2", "follow"),
]


@pytest.fixture(scope="module")
def rows() -> Iterator[list[tuple[list[Figures], Figures, Figures]]]:
    """Plans, contiguous and balanced of each row; printed when all are there."""
    found: list[tuple[list[Figures], Figures, Figures]] = []
    yield found
    for across_nodes in (False, True):
        lines = [row(*one) for one in found if (one[1]["num_nodes"] > 1) == across_nodes]
        if lines:
            print(f"\n\n{header(across_nodes)}\n" + "\n".join(lines))
    print("\n" + "\n".join(beside_targets(found)))


@pytest.fixture(scope="module")
def lever_rows() -> Iterator[list[str]]:
    """The rows of the levers, printed when all are there."""
    found: list[str] = []
    yield found
    names = [
        "trace",
        "ranks",
        "lever",
        "policy",
        "profile fold",
        "copies, median (range)",
        "imbalance, median (range)",
        "`eplb`",
        "receiver",
        "s",
    ]
    print(f"\n\n| {' | '.join(names)} |\n{'|---' * len(names)}|\n" + "\n".join(found))


def placement_cases(trace: str, shape: Any, policy: str, part: int) -> list[Case]:
    """Return the plans of a row, and what stands beside them."""
    beside = (baseline(trace, shape, part, name) for name in ("contiguous", "balanced"))
    return [*seeds(trace, shape, policy, part), *beside]


@pytest.mark.measures(cases=placement_cases)
@pytest.mark.parametrize("part", PARTS, ids=PART_IDS)
@pytest.mark.parametrize("policy", ["fixed", "follow"])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("trace", TRACES)
def test_placements(
    trace: str,
    shape: tuple[int, int],
    policy: str,
    part: int,
    measuring: Measuring,
    rows: list[tuple[list[Figures], Figures, Figures]],
) -> None:
    every = [
        measuring(case).result() for case in placement_cases(trace, shape, policy, part)
    ]
    rows.append((every[:-2], every[-2], every[-1]))
    assert every[0]["referee_difference"] < 1e-4


def lever_cases(lever: tuple[str, Any, str, str], part: int) -> list[Case]:
    """Return the plans of a lever, and what stands beside them."""
    trace, shape, variant, policy = lever
    beside = (baseline(trace, shape, part, name) for name in ("contiguous", "eplb"))
    return [*seeds(trace, shape, policy, part, variant), *beside]


@pytest.mark.measures(cases=lever_cases)
@pytest.mark.parametrize("part", PARTS, ids=PART_IDS)
@pytest.mark.parametrize(
    "lever", LEVERS, ids=["-".join(map(str, lever)) for lever in LEVERS]
)
def test_levers(
    lever: tuple[str, Any, str, str],
    part: int,
    measuring: Measuring,
    lever_rows: list[str],
) -> None:
    """Receive price, robust load and replicas, beside replicas for balance alone."""
    every = [measuring(case).result() for case in lever_cases(lever, part)]
    lever_rows.append(lever_row(every[:-2], every[-2], every[-1]))
    assert every[0]["referee_difference"] < 1e-4


def header(across_nodes: bool) -> str:
    names = ["trace", "ranks", "policy", "profile fold"]
    if across_nodes:
        names += ["node copies, median (range)", "interval over sequences", "rank copies"]
    else:
        names += ["copies, median (range)", "interval over sequences"]
    names += ["imbalance", "balanced", "receiver", "home", "gap", "pairs", "s"]
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def row(found: Sequence[Figures], base: Figures, balanced: Figures) -> str:
    """Return a row of a table: what the seeds of one case have in the median."""
    first = found[0]
    policy = first["policy"]
    num_nodes, gpus_per_node = first["num_nodes"], first["gpus_per_node"]
    cells = [
        first["trace"],
        f"{num_nodes} x {gpus_per_node}" if num_nodes > 1 else str(gpus_per_node),
        f"`{policy}`",
        f"{first['part']}/2",
        spread(shares(found, base, policy, copies_name(first))),
    ]
    sure = paired(first, base, policy)
    cells.append(
        "" if sure is None or sure.low is None else f"{sure.low:.3f} to {sure.high:.3f}"
    )
    if num_nodes > 1:
        cells.append(f"{statistics.median(shares(found, base, policy, RANK_COPIES)):.3f}")
    own = [one[policy]["heldout"] for one in found]
    cells += [
        f"{statistics.median(one[IMBALANCE] for one in own):.3f}",
        f"{balanced[policy]['heldout'][IMBALANCE]:.3f}",
        f"{statistics.median(shares(found, base, policy, BUSIEST)):.3f}",
        f"{statistics.median(one[HOME_IMBALANCE] for one in own):.2f}",
    ]
    gaps = (first["gap"], first["pairs_gap"])
    cells += ["" if gap is None else f"{gap * 100:.1f} %" for gap in gaps]
    cells.append(f"{statistics.median(one['cpu_seconds'] for one in found):.0f}")
    return f"| {' | '.join(cells)} |"


def lever_row(found: Sequence[Figures], base: Figures, eplb: Figures) -> str:
    first = found[0]
    policy = first["policy"]
    theirs = eplb[policy]["heldout"][IMBALANCE]
    cells = [
        first["trace"],
        str(first["num_nodes"] * first["gpus_per_node"]),
        first["variant"],
        f"`{policy}`",
        f"{first['part']}/2",
        spread(shares(found, base, policy, RANK_COPIES)),
        spread([one[policy]["heldout"][IMBALANCE] for one in found]),
        f"{shares([eplb], base, policy, RANK_COPIES)[0]:.3f} at {theirs:.3f}",
        f"{statistics.median(shares(found, base, policy, BUSIEST)):.3f}",
        f"{statistics.median(one['cpu_seconds'] for one in found):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float]) -> str:
    """Return the median, and from where to where the seeds are."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def beside_targets(
    rows: Sequence[tuple[list[Figures], Figures, Figures]],
) -> Iterator[str]:
    """Yield a sentence for each target: the median over the seeds, fold by fold."""
    for policy, targets in TARGETS.items():
        for trace, target in zip(TRACES, targets, strict=True):
            wanted = {"trace": trace, "policy": policy, "num_nodes": 1, "gpus_per_node": 8}
            medians = [
                statistics.median(shares(found, base, policy, RANK_COPIES))
                for found, base, _ in rows
                if wanted.items() <= found[0].items()
            ]
            if medians:
                reached = ", ".join(f"{median:.4f}" for median in medians)
                said = "met" if max(medians) <= target else f"{max(medians) - target:+.4f}"
                aimed = f"`{policy}`, {trace}, 8 ranks: at most {target:.3f}"
                yield f"{aimed}, reached {reached} ({said})"

"""What ``bench_solve.py`` and ``bench_baselines.py`` measure, and shares of a baseline."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from placements import Baseline, Case, Solved

from placer.intervals import CopiesRatio, copies_ratio

TRACES = ["gpt-oss-20b", "deepseek-v2-lite-intent", "deepseek-v2-lite-summary"]
#: Nodes x GPUs per node.
SHAPES = [(1, 4), (1, 8), (1, 16), (2, 4), (2, 8)]
SHAPE_IDS = ["x".join(map(str, shape)) for shape in SHAPES]
PARTS = [0, 1]
PART_IDS = ["0of2", "1of2"]
NUM_SEEDS = int(os.environ.get("BENCH_SEEDS", "5"))

RANK_COPIES = "remote_rank_copies_per_token"
NODE_COPIES = "remote_node_copies_per_token"
BUSIEST = "bottleneck_rank_copies_per_token"
IMBALANCE = "load_imbalance_mean"
HOME_IMBALANCE = "home_imbalance_max"

Figures = dict[str, Any]
Measuring = Callable[[Case], Future[Figures]]


def seeds(
    trace: str, shape: tuple[int, int], policy: Any, part: int, variant: str = "capped"
) -> list[Solved]:
    """Return the plans of one row of a table, seed by seed."""
    return [
        Solved(
            trace=trace,
            num_nodes=shape[0],
            gpus_per_node=shape[1],
            part=part,
            variant=variant,
            policy=policy,
            seed=seed,
        )
        for seed in range(NUM_SEEDS)
    ]


def baseline(trace: str, shape: tuple[int, int], part: int, name: str) -> Baseline:
    """Return the case of a baseline."""
    return Baseline(
        trace=trace, num_nodes=shape[0], gpus_per_node=shape[1], part=part, name=name
    )


def copies_name(figures: Figures) -> str:
    """Return the figure that a plan of this topology minimises first."""
    return RANK_COPIES if figures["num_nodes"] == 1 else NODE_COPIES


def shares(found: Sequence[Figures], base: Figures, policy: str, name: str) -> list[float]:
    """Return a held-out figure of each placement as a share of the baseline's."""
    below = base[policy]["heldout"][name]
    return [one[policy]["heldout"][name] / below for one in found]


def paired(own: Figures, other: Figures, policy: str) -> CopiesRatio | None:
    """Return the held-out copies of one over those of the other, with an interval."""
    kind = "rank" if own["num_nodes"] == 1 else "node"
    mine, theirs = (
        np.array(one[policy]["copies_of_sequence"][kind]) for one in (own, other)
    )
    return copies_ratio(mine, theirs, np.arange(len(mine)), None, ())

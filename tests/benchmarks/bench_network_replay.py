"""Throughput of replayed runs on emulated networks, beside the cost model's prediction.

The demo model on 4 ranks, as 4 nodes and as 2 nodes of 2 (fast inside, slow between).
``placer calibrate`` measures every network once; then forward passes are timed without
limits, and ``placer replay --elsewhere`` predicts from these what they take under each
limit; only then they are timed there. What is predicted is no part of the calibration.

The passes without limits are timed a second time at the end, and both count, since half of
the cells are hardly more than those.

Four processes share two cores and the links are emulated: the figures check the counting
and show how the curves bend; they are not a cluster's.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_network import calibrated
from network import emulated, run_ranks

ROOT = Path(__file__).parents[2]
MODEL, TRACE = ROOT / "traces/demo/model", ROOT / "traces/demo/traces/final"
PLACER = (sys.executable, "-m", "placer.cli.main")
RANKS, PASSES = 4, 1
LIMITS = (100, 300, 1000, 3000, 10_000)
CLOSE = 0.15
Runs = dict[tuple[str, str], dict[str, Any]]


def placer(*words: object) -> None:
    done = subprocess.run(
        [*PLACER, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def replay(folder: Path, num_nodes: int, limit: float | None) -> Runs:
    """Replay under a limit in Mbit/s; without one, predict what all limits cost."""
    words = ("replay", folder / "plan.json", MODEL, "--trace", TRACE, "--fold", "1/2")
    # Passes on slow links take long, and wait more than they compute: they vary less.
    repeats = 3 if limit == min(LIMITS) else 5
    options = ("--table", folder / "table", "--passes", PASSES, "--repeats", repeats)
    links: list[object] = []
    if limit is None:
        links += ["--hardware", calibrated(num_nodes, None)[0]]
        for other in LIMITS:
            links += ["--elsewhere", calibrated(num_nodes, other)[0]]
    command = [*PLACER, *map(str, (*words, *options, *links, "--json"))]
    with emulated(num_ranks=RANKS, num_nodes=num_nodes, slow_mbit=limit) as network:
        outcome = json.loads(run_ranks(command, network, timeout=900)[0].stdout)
    runs = {(run["placement"], run["exchange"]): run for run in outcome["runs"]}
    assert all(run["as_predicted"] for run in runs.values())
    return runs


@pytest.mark.parametrize("num_nodes", [4, 2])
def test_throughput(tmp_path: Path, num_nodes: int) -> None:
    layout = ("--nodes", num_nodes, "--gpus-per-node", RANKS // num_nodes)
    plan = tmp_path / "plan.json"
    placer(
        *("solve", TRACE, *layout, "--policy", "follow", "--relax-cap", "--fold", "0/2"),
        *("--proof", "none", "--out", plan),
    )
    placer(
        "tables", plan, TRACE, "--fold", "0/2", "--token-score", "--out", tmp_path / "table"
    )
    before = replay(tmp_path, num_nodes, None)
    found = {limit: replay(tmp_path, num_nodes, limit) for limit in LIMITS}
    free = (before, replay(tmp_path, num_nodes, None))
    limits = (f"{limit:,} Mbit/s" for limit in LIMITS)
    print(f"\n{num_nodes} nodes: ms of a forward pass (predicted / measured)\n")
    print(f"| placement | exchange | no limit | {' | '.join(limits)} |")
    print(f"|{'---|' * (3 + len(LIMITS))}")
    ratios = []
    for key in before:
        base = statistics.mean(runs[key]["seconds"] for runs in free)
        cells = [*key, f"{base * 1e3:,.0f}"]
        for limit, runs in found.items():
            seconds = runs[key]["seconds"]
            name = calibrated(num_nodes, limit)[0].stem
            predicted = statistics.mean(
                runs[key]["seconds_elsewhere"][name] for runs in free
            )
            ratios.append(predicted / seconds)
            cells.append(f"{seconds * 1e3:,.0f} ({ratios[-1]:.2f})")
        print(f"| {' | '.join(cells)} |", flush=True)
    close = sum(abs(ratio - 1) <= CLOSE for ratio in ratios)
    print(
        f"\n{num_nodes} nodes: {close} of {len(ratios)} predictions within {CLOSE:.0%}, "
        f"ratios {min(ratios):.2f} to {max(ratios):.2f}, "
        f"median {statistics.median(ratios):.2f}",
        flush=True,
    )

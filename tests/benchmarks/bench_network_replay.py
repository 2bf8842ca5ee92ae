"""Throughput of replayed runs on emulated networks, beside the cost model's prediction.

The demo model on 4 ranks, as 4 nodes and as 2 nodes of 2 (fast inside, slow between).
Forward passes are timed with links of each speed and with none: what a run takes without
limits is its computation, and the model adds what the busiest rank's bytes take over the
bandwidth that ``placer calibrate`` measured once per layout and limit:

    seconds = seconds without limits + busiest bytes between nodes / bandwidth

Four processes share two cores and the links are emulated: the figures check the counting
and show how the curves bend; they are not a cluster's.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_network import run_calibrate
from network import emulated, run_ranks

ROOT = Path(__file__).parents[2]
MODEL, TRACE = ROOT / "traces/demo/model", ROOT / "traces/demo/traces/final"
PLACER = (sys.executable, "-m", "placer.cli.main")
RANKS, PASSES, REPEATS = 4, 2, 3
LIMITS = (100, 300, 1000, 3000, 10_000)
Runs = dict[tuple[str, str], dict[str, Any]]


def placer(*words: object) -> None:
    done = subprocess.run(
        [*PLACER, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def replay(folder: Path, num_nodes: int, limit: float | None) -> tuple[Runs, float | None]:
    """Replay under a limit in Mbit/s; return runs, and the measured bytes per second."""
    words = ("replay", folder / "plan.json", MODEL, "--trace", TRACE, "--fold", "1/2")
    options = ("--table", folder / "table", "--passes", PASSES, "--repeats", REPEATS)
    command = [*PLACER, *map(str, (*words, *options, "--json"))]
    with emulated(num_ranks=RANKS, num_nodes=num_nodes, slow_mbit=limit) as network:
        told = None
        if limit is not None:
            out = folder / f"{limit}.toml"
            told = run_calibrate(network, out)["slow"]["bandwidth_bytes_per_s"]
        outcome = json.loads(run_ranks(command, network, timeout=900)[0].stdout)
    runs = {(run["placement"], run["exchange"]): run for run in outcome["runs"]}
    assert all(run["as_predicted"] for run in runs.values())
    return runs, told


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
    free, _ = replay(tmp_path, num_nodes, None)
    found = [replay(tmp_path, num_nodes, limit) for limit in LIMITS]
    limits = (f"{limit:,} Mbit/s" for limit in LIMITS)
    print(f"\n{num_nodes} nodes: ms of a forward pass (predicted / measured)")
    print(f"| placement | exchange | no limit | {' | '.join(limits)} |")
    print(f"|{'---|' * (3 + len(LIMITS))}")
    for key, run in free.items():
        cells = [*key, f"{run['seconds'] * 1e3:,.0f}"]
        for runs, bandwidth in found:
            assert bandwidth is not None
            seconds = runs[key]["seconds"]
            predicted = run["seconds"] + run["busiest_slow_bytes"] / PASSES / bandwidth
            cells.append(f"{seconds * 1e3:,.0f} ({predicted / seconds:.2f})")
        print(f"| {' | '.join(cells)} |", flush=True)

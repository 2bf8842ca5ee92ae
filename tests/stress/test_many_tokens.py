"""Millions of tokens: what each command takes grows in proportion, and memory is bounded.

`make stress` measures 0.5 to 5 million tokens of 58 layers of 256 experts, top 8 (2.3 GB of
expert ids); `make test` 20,000 to 160,000 of 6 layers.
"""

import os
import shutil

import pytest

from tests.stress.sizes import Used, measured, tell, write_trace

ALL = os.environ.get("PLACER_STRESS") == "all"
SIZES = (500_000, 1_000_000, 2_000_000, 5_000_000) if ALL else (40_000, 320_000)
NUM_EXPERTS = (256,) * (58 if ALL else 6)
RANKS = ("--nodes", 4, "--gpus-per-node", 8)
# A trace is compared with its half or less: a start-up is no growth.
SLACK = 1.35
# What a command may hold of a trace, in times the trace's own bytes.
MAY_HOLD = {"validate": 0.0, "affinity": 0.0, "sample": 0.0, "simulate": 0.5}
# One chunk and what is made of it, at 58 layers.
CHUNK_MIB = 1200


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Used]]:
    """Figures of every command by the number of tokens."""
    folder = tmp_path_factory.mktemp("many")
    found: dict[int, dict[str, Used]] = {}
    for size in SIZES:
        found[size] = one = {}
        trace = write_trace(folder / "trace", NUM_EXPERTS, 8, size)
        one["validate"] = measured("trace", "validate", trace)
        counts, sample, plan = folder / "counts", folder / "sample", folder / "plan.json"
        one["affinity"] = measured("affinity", trace, "--workers", 1, "--out", counts)
        words = ("--sequences", 60, "--out", sample)
        one["sample"] = measured("trace", "sample", trace, *words)
        words = ("--max-imbalance", 1.5, "--time-limit", 60, "--proof", "none")
        one["solve"] = measured("solve", sample, *RANKS, *words, "--out", plan)
        one["simulate"] = measured("simulate", plan, trace)
        for command, figures in one.items():
            tell(
                command,
                tokens=size,
                cpu_s=round(figures.cpu_s, 1),
                peak_mib=round(figures.peak_mib),
                wall_s=round(figures.wall_s, 1),
            )
        shutil.rmtree(trace)
        shutil.rmtree(sample)
        for path in (counts, plan):
            path.unlink()
    return found


@pytest.mark.parametrize("command", MAY_HOLD)
def test_time_grows_in_proportion(command: str, used: dict[int, dict[str, Used]]) -> None:
    least, most = min(SIZES), max(SIZES)
    growth = used[most][command].cpu_s / used[least][command].cpu_s
    assert growth < SLACK * most / least


@pytest.mark.parametrize("command", MAY_HOLD)
def test_memory_is_bounded(command: str, used: dict[int, dict[str, Used]]) -> None:
    least, most = min(SIZES), max(SIZES)
    trace_mib = (most - least) * len(NUM_EXPERTS) * 8 / 2**20
    grown = used[most][command].peak_mib - used[least][command].peak_mib
    assert grown < MAY_HOLD[command] * trace_mib + (CHUNK_MIB if ALL else 100)

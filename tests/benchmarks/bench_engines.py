"""What placing is worth: engine by engine, phase by phase, batch by batch.

``make bench`` prints the table of ``docs/benchmarks_engines.md``. For each row and seed,
``placer solve`` makes a plan of a real trace, which is judged as ``placer simulate`` does:
held out, beside contiguous and EPLB at equal slots. Effort is less than the default: three
sweeps, no proof.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.placement import Plan
from placer.planning.judge import Serving, judge_plan
from placer.simulation.cost import find_expert_shape
from placer.target.engine import Engine
from placer.target.hardware import Hardware
from placer.trace import Fold, Selection, Trace

BUILD = Path(__file__).resolve().parents[2] / "build" / "benchmarks" / "engines"
#: Hidden size, width of an expert, bytes per weight.
SIZES = {
    "gpt-oss-20b": (2880, 2880, 0.53),
    "deepseek-v2-lite-intent": (2048, 1408, 2),
    "deepseek-v2-lite-summary": (2048, 1408, 2),
}
#: Engines without redundant experts that serve what is solved for ``sglang-deepep``.
WITHOUT_COPIES = (
    "sglang-none",
    "vllm-agrs",
    "vllm-deepep-ht",
    "vllm-deepep-ll",
    "vllm-deepep-v2-hybrid",
)
COLUMNS = (
    "ranks",
    "redundant",
    "solved for",
    "served by",
    "phase, tokens per rank",
    "sent / contiguous",
    "sent / EPLB",
    "busiest rank: contiguous",
    "EPLB",
    "plan",
    "layer us (overlapped): contiguous",
    "EPLB",
    "plan",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A plan, and the engines that serve it."""

    engine: str
    num_nodes: int
    gpus_per_node: int
    redundant_experts: int

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed with redundant experts: a search among replicas takes far longer."""
        return (0,) if self.redundant_experts else (0, 1, 2)

    @property
    def engines(self) -> tuple[str, ...]:
        """Which engines serve the plan."""
        if self.engine != "sglang-deepep":
            return (self.engine,)
        found = ("sglang-deepep", "sglang-deepep-ll", "sglang-deepep-v2-hybrid")
        if self.num_nodes == 1:
            found += ("sglang-deepep-v2-direct",)
        if not self.redundant_experts:
            found += WITHOUT_COPIES
            if self.num_nodes == 1:
                found += ("trtllm-onesided",)
        return found


SERVED = [
    Served(engine="sglang-deepep", num_nodes=1, gpus_per_node=8, redundant_experts=0),
    Served(engine="sglang-deepep", num_nodes=1, gpus_per_node=8, redundant_experts=8),
    Served(engine="sglang-deepep-ll", num_nodes=1, gpus_per_node=8, redundant_experts=8),
    Served(engine="trtllm-onesided", num_nodes=1, gpus_per_node=8, redundant_experts=8),
    Served(engine="sglang-deepep", num_nodes=2, gpus_per_node=8, redundant_experts=0),
    Served(engine="sglang-deepep", num_nodes=2, gpus_per_node=8, redundant_experts=16),
    Served(engine="sglang-deepep-ll", num_nodes=2, gpus_per_node=8, redundant_experts=16),
    Served(engine="trtllm-onesided", num_nodes=1, gpus_per_node=16, redundant_experts=0),
    Served(engine="trtllm-onesided", num_nodes=1, gpus_per_node=16, redundant_experts=16),
]


@pytest.mark.parametrize("trace", SIZES)
def test_engines(trace: str, archive: Callable[[str], Path]) -> None:
    """Print the rows of one trace; engines with equal figures share one."""
    recorded = _recorded(trace, archive)
    told: dict[Served, list[dict[str, Any]]] = {}
    for served, seed in ((one, seed) for one in SERVED for seed in one.seeds):
        plan = _solved(recorded, served, seed)
        told.setdefault(served, []).append(_judged(plan, recorded, served))
    print(f"\n{trace}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for served, found in told.items():
        rows: dict[tuple[str, ...], list[str]] = {}
        for engine in served.engines:
            for row in _rows([one[engine] for one in found]):
                rows.setdefault(row, []).append(engine)
        assert rows
        shape = f"{served.num_nodes} x {served.gpus_per_node}"
        for row, engines in rows.items():
            cells = (
                shape,
                str(served.redundant_experts),
                served.engine,
                ", ".join(engines),
            )
            print(f"| {' | '.join((*cells, *row))} |", flush=True)


def _recorded(trace: str, archive: Callable[[str], Path]) -> Path:
    BUILD.mkdir(parents=True, exist_ok=True)
    recorded = BUILD / trace
    if not recorded.exists():
        _placer("import", "npz", archive(trace), "--out", recorded)
    return recorded


def _solved(trace: Path, served: Served, seed: int) -> Path:
    name = (
        f"{trace.name}.{served.engine}.{served.num_nodes}x{served.gpus_per_node}"
        f".{served.redundant_experts}.seed{seed}.json"
    )
    plan = BUILD / name
    if not plan.exists():
        _placer(
            *("solve", trace, "--fold", "0/2", "--engine", served.engine),
            *("--nodes", served.num_nodes, "--gpus-per-node", served.gpus_per_node),
            *("--redundant-experts", served.redundant_experts, "--seed", seed),
            *("--proof", "none", "--num-sweeps", 3, "--num-rounds", 5, "--out", plan),
        )
    return plan


def _judged(plan: Path, trace: Path, served: Served) -> dict[str, Any]:
    """Return what ``placer simulate --json`` says, by engine."""
    kept = plan.with_suffix(".judged")
    if not kept.exists():
        hidden_size, expert_size, weight_bytes = SIZES[trace.name]
        solved = Plan.read(plan)
        engines = [Engine.named(name) for name in served.engines]
        judgements = judge_plan(
            plan,
            Trace(trace),
            selection=Selection(Fold(1, 2)),
            baselines=("contiguous", "eplb"),
            servings=[
                Serving(
                    engine=engine,
                    replica_choice=solved.choose_replicas(engine, None, ""),
                    hardware=Hardware.named("h100"),
                    expert=find_expert_shape(
                        None, hidden_size, expert_size, weight_bytes, engine
                    ),
                )
                for engine in engines
            ],
        )
        found = {one["engine"]: one for one in (each.to_json() for each in judgements)}
        kept.write_text(json.dumps(found))
    judged: dict[str, Any] = json.loads(kept.read_text())
    return judged


def _rows(told: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return what each size of batches shows, over the seeds, without the engine."""
    rows = []
    for index, batch in enumerate(told[0]["batches"]["plan"]):
        each = {
            name: [one["batches"][name][index] for one in told]
            for name in ("contiguous", "eplb", "plan")
        }
        ratios = [
            [one["sent_ratio"][name]["ratio"] for one in told if name in one["sent_ratio"]]
            for name in ("contiguous", "eplb")
        ]
        times = [[one["time"] for one in every] for every in each.values()]
        rows.append(
            (
                f"{batch['batching']}, {batch['tokens_per_rank']:,}",
                *(_spread(found, 3) for found in ratios),
                *(_spread([b["straggler_mean"] for b in e], 2) for e in each.values()),
                *(_microseconds(every) for every in times),
            )
        )
    return rows


def _microseconds(times: Sequence[Mapping[str, float]]) -> str:
    total, overlapped = (
        _spread([one[way] for one in times], 0) for way in ("total_us", "overlapped_us")
    )
    return f"{total} ({overlapped})"


def _spread(values: Sequence[float], decimals: int) -> str:
    """Return the mean over seeds, and how far the farthest seed is from it.

    >>> _spread([0.5, 0.502, 0.504], 3), _spread([1.0, 1.0], 1), _spread([], 2)
    ('0.502±.002', '1.0', '-')
    """
    if not values:
        return "-"
    mean = float(np.mean(values))
    farthest = f"{max(abs(value - mean) for value in values):.{decimals}f}"
    is_one = not float(farthest)
    return f"{mean:.{decimals}f}" + ("" if is_one else f"±{farthest.removeprefix('0')}")


def _placer(*words: object) -> str:
    command = [sys.executable, "-m", "placer.cli.main", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

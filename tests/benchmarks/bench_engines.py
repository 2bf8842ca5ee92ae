"""What placing is worth: engine by engine, phase by phase, batch by batch.

``make bench`` prints the table of ``docs/benchmarks_engines.md``. Every row is one run of
``placer solve`` and one of ``placer simulate``, on real traces, held out, beside contiguous
and EPLB at equal slots. Effort is less than the default: three sweeps, no proof.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

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
    "engines",
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
    Served(engine="trtllm-onesided", num_nodes=1, gpus_per_node=8, redundant_experts=8),
    Served(engine="sglang-deepep", num_nodes=2, gpus_per_node=8, redundant_experts=0),
    Served(engine="sglang-deepep", num_nodes=2, gpus_per_node=8, redundant_experts=16),
    Served(engine="trtllm-onesided", num_nodes=1, gpus_per_node=16, redundant_experts=0),
    Served(engine="trtllm-onesided", num_nodes=1, gpus_per_node=16, redundant_experts=16),
]


@pytest.mark.parametrize("trace", SIZES)
def test_engines(trace: str, shared_traces: Path) -> None:
    """Print the rows of one trace; engines with equal figures share one."""
    BUILD.mkdir(parents=True, exist_ok=True)
    recorded = BUILD / trace
    if not recorded.exists():
        _placer("import", "npz", shared_traces / f"{trace}.npz", "--out", recorded)
    print(f"\n{trace}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for served in SERVED:
        plan = _solved(recorded, served)
        rows: dict[tuple[str, ...], list[str]] = {}
        for engine in served.engines:
            for row in _rows(_simulated(plan, recorded, engine)):
                rows.setdefault(row, []).append(engine)
        assert rows
        shape = f"{served.num_nodes} x {served.gpus_per_node}"
        for row, engines in rows.items():
            told = (shape, str(served.redundant_experts), ", ".join(engines), *row)
            print(f"| {' | '.join(told)} |")


def _solved(trace: Path, served: Served) -> Path:
    name = (
        f"{trace.name}.{served.engine}.{served.num_nodes}x{served.gpus_per_node}"
        f".{served.redundant_experts}.json"
    )
    plan = BUILD / name
    if not plan.exists():
        _placer(
            *("solve", trace, "--fold", "0/2", "--engine", served.engine),
            *("--nodes", served.num_nodes, "--gpus-per-node", served.gpus_per_node),
            *("--redundant-experts", served.redundant_experts),
            *("--proof", "none", "--num-sweeps", 3, "--num-rounds", 5, "--out", plan),
        )
    return plan


def _simulated(plan: Path, trace: Path, engine: str) -> dict[str, Any]:
    hidden_size, expert_size, weight_bytes = SIZES[trace.name]
    told: dict[str, Any] = json.loads(
        _placer(
            *("simulate", plan, trace, "--fold", "1/2", "--engine", engine, "--json"),
            *("--hardware", "h100", "--hidden-size", hidden_size),
            *("--expert-size", expert_size, "--weight-bytes", weight_bytes),
            *("--baseline", "contiguous", "--baseline", "eplb"),
        )
    )
    return told


def _rows(told: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return what each size of batches shows, without the engine."""
    ratios = told["sent_ratio"] or {}
    names = ("contiguous", "eplb", "plan")
    rows = []
    for index, batch in enumerate(told["batches"]["plan"]):
        each = [told["batches"][name][index] for name in names]
        rows.append(
            (
                f"{batch['batching']}, {batch['tokens_per_rank']:,}",
                *(f"{ratios[n]['ratio']:.3f}" if n in ratios else "-" for n in names[:2]),
                *(f"{one['straggler_mean']:.2f}" for one in each),
                *(_microseconds(one["time"]) for one in each),
            )
        )
    return rows


def _microseconds(time: dict[str, float]) -> str:
    return f"{time['total_us']:.0f} ({time['overlapped_us']:.0f})"


def _placer(*words: object) -> str:
    command = [sys.executable, "-m", "placer.cli.main", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

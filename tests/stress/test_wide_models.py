"""94 layers of 512 experts and 128 redundant ones on 320 ranks; 260,000 token ids."""

import json
import os
from pathlib import Path

import numpy as np

from placer.placement import Plan
from tests.stress.sizes import measured, tell, write_trace

ALL = os.environ.get("PLACER_STRESS") == "all"
LAYERS = 94 if ALL else 6
REDUNDANT = ("--redundant-experts", 128, "--nodes", 40, "--gpus-per-node", 8)
VOCABULARY = 260_000 if ALL else 26_000


def told(name: str, *words: object, limit_mib: int = 3000) -> None:
    used = measured(*words)
    tell(
        name,
        layers=LAYERS,
        vocabulary=VOCABULARY,
        cpu_s=round(used.cpu_s, 1),
        peak_mib=round(used.peak_mib),
        wall_s=round(used.wall_s, 1),
    )
    assert used.peak_mib < limit_mib


def test_320_ranks_from_loads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    loads = rng.pareto(1.5, (LAYERS, 512)) * 1000 + 10
    (tmp_path / "loads.json").write_text(json.dumps(loads.astype(int).tolist()))
    counts, plan = tmp_path / "counts", tmp_path / "plan.json"
    words = ("import", "load-matrix", tmp_path / "loads.json", "--out", counts)
    told("import loads", *words)
    words = ("solve", counts, *REDUNDANT, "--objective", "balance", "--out", plan)
    told("solve loads", *words)
    found = Plan.read(plan).placement
    assert found.num_ranks == 320
    assert all(len(row) == 640 for row in found.physical_to_logical_map)
    for row in found.physical_to_logical_map:
        assert set(np.asarray(row).tolist()) == set(range(512))
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": LAYERS,
        "num_experts": 512,
        "num_experts_per_tok": 8,
        "hidden_size": 64,
        "vocab_size": 100,
    }
    model, exported = tmp_path / "model", tmp_path / "map.json"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    told("export loads", "export", "sglang", plan, model, "--out", exported)
    told("verify loads", "verify", model, exported, plan)


def test_320_ranks_from_a_trace(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace", (512,) * LAYERS, 8, 4096)
    plan = tmp_path / "plan.json"
    words = ("--time-limit", 120, "--proof", "none", "--replica-choice", "hash")
    told("solve trace", "solve", trace, *REDUNDANT, *words, "--out", plan)
    assert all(len(row) == 640 for row in Plan.read(plan).placement.physical_to_logical_map)
    told("simulate trace", "simulate", plan, trace)


def test_a_table_of_a_large_vocabulary(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace", (64,) * LAYERS, 8, 65_536, VOCABULARY)
    plan, table = tmp_path / "plan.json", tmp_path / "table"
    words = ("--gpus-per-node", 8, "--max-imbalance", 4, "--time-limit", 60)
    told("solve", "solve", trace, *words, "--proof", "none", "--out", plan)
    told("tables", "tables", plan, trace, "--out", table)
    told("simulate", "simulate", plan, trace, "--table", table)

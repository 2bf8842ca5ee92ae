"""A checkpoint of very many tensors is exported, verified and restored to its own bytes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from placer.checkpoint.export import export_checkpoint
from placer.model import ModelSpec
from placer.placement import Placement
from tests.faults.checks import state_of
from tests.plans import unsolved_plan
from tests.stress.sizes import measured, tell

ALL = os.environ.get("PLACER_STRESS") == "all"
# Layers x experts x 3 matrices: 199,680 tensors of experts in 64 shards, or 3,072 in 8.
LAYERS, EXPERTS, SHARDS = (65, 1024, 64) if ALL else (8, 128, 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensors") / "model"
    folder.mkdir()
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": LAYERS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "hidden_size": 4,
        "vocab_size": 100,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, np.ndarray]] = [{} for _ in range(SHARDS)]
    shards[0]["model.embed_tokens.weight"] = np.ones((100, 4), np.float32)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp"
        shards[layer % SHARDS][f"{prefix}.gate.weight"] = np.arange(
            EXPERTS * 4, dtype=np.float32
        ).reshape(EXPERTS, 4)
        for expert in range(EXPERTS):
            for number, part in enumerate(("gate_proj", "up_proj", "down_proj")):
                name = f"{prefix}.experts.{expert}.{part}.weight"
                value = layer * EXPERTS * 3 + expert * 3 + number
                shards[(layer + expert) % SHARDS][name] = np.full((2, 4), value, np.float32)
    weight_map = {}
    for number, tensors in enumerate(shards):
        file = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_exported_verified_and_restored(model: Path, tmp_path: Path) -> None:
    """Every expert moves; the restored files are the original's bytes."""
    row = np.random.default_rng(0).permutation(EXPERTS).tolist()
    placement = Placement.from_json([row] * LAYERS, (EXPERTS,) * LAYERS, 64, 8)
    plan = tmp_path / "plan.json"
    unsolved_plan(ModelSpec.from_checkpoint(model), placement).write(plan)
    out, back = tmp_path / "out", tmp_path / "back"
    for name, *words in (
        ("export", "export", "checkpoint", plan, model, "--out", out),
        ("verify", "verify", model, out, plan, "--max-tokens", 0),
        ("inverse", "export", "checkpoint", out, "--inverse", "--out", back),
    ):
        used = measured(*words)
        tell(
            name,
            tensors=LAYERS * EXPERTS * 3,
            shards=SHARDS,
            cpu_s=round(used.cpu_s, 1),
            peak_mib=round(used.peak_mib),
            wall_s=round(used.wall_s, 1),
        )
        assert used.peak_mib < (4000 if ALL else 1000)
    assert state_of(back) == state_of(model)


def test_an_export_in_this_process_is_the_same(model: Path, tmp_path: Path) -> None:
    placement = Placement.from_json(
        [list(range(EXPERTS))] * LAYERS, (EXPERTS,) * LAYERS, 64, 8
    )
    plan = tmp_path / "plan.json"
    unsolved_plan(ModelSpec.from_checkpoint(model), placement).write(plan)
    export_checkpoint(plan, model, tmp_path / "same")
    for path in model.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "same" / path.name).read_bytes()

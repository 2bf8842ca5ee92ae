"""Files of proposals, plugins and forks: written as their source reads them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from placer.affinity import Affinity
from placer.cli.main import main
from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.placement import Placement
from placer.placement.topology import Topology
from placer.runtime_map.imported import import_map
from placer.runtime_map.maps import export_map, verify_map
from tests.plans import unsolved_plan

# Layer 0 is dense; layer 3 drafts (MTP).
CONFIG = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size": 16,
    "vocab_size": 32,
}
# Six slots on two ranks.
ROWS = [[3, 2, 1, 0, 3, 2], [0, 1, 2, 3, 0, 1]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "model"


@pytest.fixture
def plan(model: Path, tmp_path: Path) -> Path:
    placed = Placement.from_json(ROWS, (4, 4), 2, 1)
    unsolved_plan(ModelSpec.from_checkpoint(model), placed).write(tmp_path / "plan")
    return tmp_path / "plan"


def written(name: str, plan: Path, model: Path) -> tuple[object, str]:
    out = model / f"{name}.json"
    result = export_map(name, plan, model, out)
    assert verify_map(out, plan, model).runtime == name
    return json.loads(out.read_text()), " ".join(result.warnings)


def test_the_map_that_is_proposed_to_vllm(model: Path, plan: Path) -> None:
    """vllm-project/vllm#49572: a list of slots for every MoE layer."""
    value, warnings = written("vllm-pr49572", plan, model)
    assert value == ROWS
    assert "no release of vLLM reads this file" in warnings


def test_the_map_of_hygons_plugin_has_mtp_apart(model: Path, plan: Path) -> None:
    """As HYGON-AI/vllm-plugin-das reads version 2: by class, the MTP layer in order."""
    value, warnings = written("vllm-das", plan, model)
    assert value == {
        "version": 2,
        "model_maps": {
            "DeepseekV3ForCausalLM": {"physical_to_logical_map": ROWS},
            "DeepSeekMTP": {"physical_to_logical_map": [[0, 1, 2, 3, 0, 1]]},
        },
    }
    assert "only HYGON-AI/vllm-plugin-das reads this file" in warnings
    (model / "config.json").write_text(json.dumps(CONFIG | {"architectures": []}))
    with pytest.raises(PlacerError, match="names no architectures"):
        export_map("vllm-das", plan, model, model / "x.json")


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("vllm-pr49572", [[0, 1, 2, 3], [0, 1]], "row 1 has 2 slots, not 4"),
        ("vllm-pr49572", [[0, 1, 2, 3]], "has 1 layers|1 rows"),
        ("vllm-pr49572", {"a": 1}, "is not a list of layers"),
        ("vllm-das", {"version": 1}, "its version is 1, not 2"),
        ("vllm-das", {"version": 2, "model_maps": {}}, "maps of no model"),
        ("vllm-das", {"version": 2}, "not a JSON object"),
    ],
)
def test_what_their_readers_refuse_is_refused(
    model: Path, tmp_path: Path, name: str, value: object, match: str
) -> None:
    (tmp_path / "m.json").write_text(json.dumps(value))
    two = Topology(num_nodes=1, gpus_per_node=2)
    with pytest.raises(PlacerError, match=match) as caught:
        import_map(name, tmp_path / "m.json", two, model, tmp_path / "out")
    assert caught.value.hint


def test_counts_for_ktransformers(model: Path, tmp_path: Path) -> None:
    """``logical_count`` as SGLang's recorder dumps it, and as placer reads it back."""
    load = (np.array([5, 0, 2**33, 1]), np.array([4, 3, 2, 2**33]))
    counts = Affinity(
        model=ModelSpec.from_checkpoint(model),
        num_tokens=1,
        load=load,
    )
    counts.write(tmp_path / "counts")
    words = ["export", "ktransformers", str(tmp_path / "counts"), str(model), "--out"]
    with pytest.raises(SystemExit) as done:
        main([*words, str(tmp_path / "c.pt")])
    assert not done.value.code
    value = torch.load(tmp_path / "c.pt", weights_only=True)["logical_count"]
    assert value.dtype == torch.int32
    # Larger than int32: halved three times, so that the proportions stay.
    assert value.tolist() == [[[0, 0, 0, 0], [0, 0, 2**30, 0], [0, 0, 0, 2**30]]]

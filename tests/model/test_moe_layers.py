"""Keys by which configs say which layers are MoE layers; expected layers are by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from placer.errors import PlacerError
from placer.model import Architecture, ModelSpec, read_config

CONFIG = {
    "num_hidden_layers": 6,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 16,
    "vocab_size": 4,
}


def layers(model_type: str, keys: dict[str, Any]) -> list[int]:
    config = CONFIG | {"model_type": model_type} | keys
    return Architecture.of(config, Path("model")).moe_layers(config)


@pytest.mark.parametrize(
    ("model_type", "keys", "expected"),
    [
        # K-EXAONE as first released: the list decides
        (
            "exaone_moe",
            {"is_moe_layer": [0, 1, 1, 0, 1, 1], "first_last_k_dense_replace": 1},
            [1, 2, 4, 5],
        ),
        ("exaone_moe", {"is_moe_layer": [False] + [True] * 5}, [1, 2, 3, 4, 5]),
        # MiMo, MiniMax-M3; Step pads for MTP layers
        ("mimo_v2_flash", {"moe_layer_freq": [0, 1, 1, 1, 1, 0]}, [1, 2, 3, 4]),
        ("minimax_m2", {"moe_layer_freq": [0, 1, 1, 1, 1, 1, 1]}, [1, 2, 3, 4, 5]),
        ("step3p5", {"moe_layers_enum": "2,3, 5,6"}, [2, 3, 5]),
        ("step3p5", {"moe_layers_enum": [3, 4]}, [3, 4]),
        ("deepseek_v3", {"first_k_dense_replace": 2}, [2, 3, 4, 5]),
        ("deepseek_v3", {"first_k_dense_replace": 1, "moe_layer_freq": 2}, [2, 4]),
        ("deepseek_v3", {"dense_mlp_idx": 3}, [3, 4, 5]),
        (
            "glm4_moe",
            {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 4, "first_k_dense_replace": 1},
            [2, 3, 4, 5],
        ),
        ("qwen3_moe", {"mlp_only_layers": [0, 3], "decoder_sparse_step": 1}, [1, 2, 4, 5]),
        ("arctic", {"moe_layer_frequency": 2}, [1, 3, 5]),
        # keys of others that say the same
        ("mixtral", {"first_k_dense_replace": 0, "moe_layer_freq": 1}, list(range(6))),
        ("mixtral", {"mlp_only_layers": [], "moe_every_n_layer": 1}, list(range(6))),
        ("deepseek_v3", {"first_k_dense_replace": 1, "num_moe_layers": 5}, [1, 2, 3, 4, 5]),
    ],
)
def test_keys_are_read_whatever_the_family(
    model_type: str, keys: dict[str, Any], expected: list[int]
) -> None:
    assert layers(model_type, keys) == expected


@pytest.mark.parametrize(
    ("model_type", "keys", "named"),
    [
        ("mixtral", {"first_k_dense_replace": 3}, "first_k_dense_replace"),
        ("qwen3_moe", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek_v3", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("exaone_moe", {"first_last_k_dense_replace": 2}, "first_last_k_dense_replace"),
        ("mixtral", {"moe_layer_num_skipped": 1}, "moe_layer_num_skipped"),
        ("qwen3_moe", {"dense_layer_indices": [0]}, "dense_layer_indices"),
        ("qwen3_moe", {"expert_every_n_layers": 2}, "expert_every_n_layers"),
        ("mixtral", {"sparse_layer_pattern": "0,1,1"}, "sparse_layer_pattern"),
        # values that make no sense
        ("deepseek_v3", {"moe_layer_freq": 0}, "moe_layer_freq"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("jamba", {"expert_layer_period": 0}, "expert_layer_period"),
        ("mimo_v2_flash", {"moe_layer_freq": [1, 1]}, "moe_layer_freq"),
        ("glm4_moe", {"mlp_layer_types": ["dense"]}, "mlp_layer_types"),
        ("glm4_moe", {"mlp_layer_types": ["odd"] * 6}, "mlp_layer_types"),
        ("deepseek_v3", {"first_k_dense_replace": "two"}, "first_k_dense_replace"),
        ("llama4_text", {"moe_layers": 3}, "moe_layers"),
    ],
)
def test_a_key_that_is_not_read_or_makes_no_sense_is_refused_by_name(
    model_type: str, keys: dict[str, Any], named: str
) -> None:
    with pytest.raises(PlacerError, match=named):
        layers(model_type, keys)


def test_a_refusal_names_a_key_that_is_read() -> None:
    with pytest.raises(PlacerError) as caught:
        layers("mixtral", {"first_k_dense_replace": 3})
    assert "moe_layers" in caught.value.hint
    assert layers("mixtral", {"first_k_dense_replace": 3, "moe_layers": [3, 4, 5]}) == [
        3,
        4,
        5,
    ]


def write(folder: Path, config: dict[str, Any], routers: list[int]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    names = [f"model.layers.{n}.mlp.gate.weight" for n in routers]
    index = {"weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_layers_with_routers_among_the_tensors_decide(tmp_path: Path) -> None:
    """A config that is silent, or read wrongly, is found out."""
    config = {"model_type": "deepseek_v3", "first_k_dense_replace": 1}
    model = write(tmp_path / "right", config, [1, 2, 3, 4, 5])
    assert ModelSpec.from_checkpoint(model).layer_ids == (1, 2, 3, 4, 5)
    write(tmp_path / "wrong", {"model_type": "deepseek_v3"}, [1, 2, 3, 4, 5])
    with pytest.raises(PlacerError, match="layer 0 has no router among the tensors"):
        ModelSpec.from_checkpoint(tmp_path / "wrong")


def test_experts_may_differ_by_layer(tmp_path: Path) -> None:
    sizes = [8, 8, 6, 4, 8, 2]
    model = write(tmp_path / "all", {"model_type": "qwen3_moe", "num_experts": sizes}, [])
    assert ModelSpec.from_checkpoint(model).num_experts == tuple(sizes)
    config = {"model_type": "deepseek_v3", "first_k_dense_replace": 1, "num_experts": sizes}
    model = write(tmp_path / "moe", config, [])
    assert ModelSpec.from_checkpoint(model).num_experts == (8, 6, 4, 8, 2)
    config["num_experts"] = sizes[:4]
    with pytest.raises(PlacerError, match="4 numbers of experts for 5 MoE layers"):
        ModelSpec.from_checkpoint(write(tmp_path / "odd", config, []))


@pytest.mark.parametrize("count", [0, None])
def test_a_dense_model_is_called_so(count: int | None, tmp_path: Path) -> None:
    config = {"model_type": "granitemoehybrid", "num_local_experts": count}
    config |= {"num_experts": None, "n_routed_experts": None}
    with pytest.raises(PlacerError, match="is a dense model: there are no experts"):
        ModelSpec.from_checkpoint(write(tmp_path / "model", config, []))


def test_a_hub_id_is_answered_with_the_download(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlacerError) as caught:
        read_config(Path("Qwen/Qwen3-30B-A3B"))
    assert caught.value.hint.startswith(
        "hf download Qwen/Qwen3-30B-A3B --local-dir Qwen3-30B-A3B"
    )
    (tmp_path / "Qwen").mkdir()
    with pytest.raises(PlacerError, match="does not exist"):
        read_config(Path("Qwen/Qwen3-30B-A3B"))

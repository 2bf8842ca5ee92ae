"""Families and quantisers by the names of their files: every byte is followed.

Names are those that the data files of the families cite; shapes are shrunk.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import load_file, save_file

from placer.checkpoint.export import export_checkpoint, prepare_export, restore_checkpoint
from placer.checkpoint.ranks import prepare_ranks
from placer.checkpoint.verify import verify
from placer.checkpoint.verify_ranks import verify_ranks
from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.placement import Placement
from tests.checkpoint.test_quantised_layouts import (
    DEEPSEEK,
    FP8_BLOCKS,
    NUM_EXPERTS,
    PROJECTIONS,
    QWEN3,
    ROUTER,
    Layout,
    WritePlan,
    follow,
    permuting_plan,
    qwen3,
    read,
    write,
)
from tests.families import RELEASED

E = NUM_EXPERTS
BF16 = {"weight": ("BF16", [8, 16])}
DENSE_FIRST = {**DEEPSEEK, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}


def deepseek_like(
    model_type: str,
    block: str = "model.layers.{}.mlp",
    bias: str | None = "gate.e_score_correction_bias",
    nested: bool = False,
    **config: Any,
) -> Layout:
    config = DENSE_FIRST | {"model_type": model_type} | config
    if nested:
        config = {"model_type": model_type, "text_config": config}
    layout = Layout(config, [1, 2], block).per_expert(BF16).all_experts(ROUTER)
    layout.rest[block.format(1) + ".shared_experts.up_proj.weight"] = ("BF16", [8, 16])
    return layout if bias is None else layout.all_experts({bias: ("F32", [E])})


def step(model_type: str, block: str) -> Layout:
    """stepfun-ai/Step-3.5-Flash: keys of its released config, MTP layers padded."""
    config = {
        **QWEN3,
        "num_hidden_layers": 3,
        "model_type": model_type,
        "moe_num_experts": E,
        "moe_top_k": 2,
        "moe_layers_enum": "1, 2,3",
    }
    fused = {f"{p}.weight": ("BF16", [E, 8, 16]) for p in PROJECTIONS}
    layout = Layout(config, [1, 2], block).all_experts(fused, ROUTER)
    return layout.all_experts({"router_bias": ("F32", [E])})


def mistral_large_3() -> Layout:
    params = {
        "dim": 16,
        "n_layers": 3,
        "vocab_size": 5,
        "moe": {
            "num_experts": E,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "route_every_n": 1,
            "num_shared_experts": 1,
            "num_expert_groups": 1,
            "num_expert_groups_per_tok": 1,
            "expert_hidden_dim": 8,
        },
    }
    parts = {"weight": ("F8_E4M3", [8, 16]), "qscale_weight": ("F32", [])}
    layout = Layout(params, [1, 2], "layers.{}").per_expert(parts, ("w1", "w2", "w3"))
    layout.all_experts(ROUTER, {"router_biases": ("F32", [E])})
    layout.rest["layers.1.attention.wo.weight"] = ("BF16", [16, 16])
    layout.rest["layers.0.feed_forward.w1.weight"] = ("BF16", [8, 16])
    return layout


FAMILY_LAYOUTS = {
    "bailing_moe": lambda: deepseek_like(
        "bailing_moe", bias="gate.expert_bias", num_experts=E
    ),
    "bailing_moe_v2": lambda: deepseek_like(
        "bailing_moe_v2", bias="gate.expert_bias", num_experts=E
    ),
    "deepseek": lambda: deepseek_like("deepseek", bias=None),
    "kimi_vl": lambda: deepseek_like(
        "kimi_vl", "language_model.model.layers.{}.mlp", nested=True
    ),
    "mimo_v2": lambda: deepseek_like("mimo_v2", moe_layer_freq=[0, 1, 1]),
    "mistral4": lambda: deepseek_like("mistral4"),
    "mistral_large_3": mistral_large_3,
    "step3p5": lambda: step("step3p5", "model.layers.{}.moe"),
    "step3p7": lambda: step("step3p7", "model.language_model.layers.{}.moe"),
}


def test_every_family_without_a_class_has_a_layout() -> None:
    assert set(FAMILY_LAYOUTS) | {"kimi_k2"} == RELEASED  # kimi_k2: test_quantised_layouts


@pytest.mark.parametrize("name", FAMILY_LAYOUTS)
def test_every_tensor_of_a_family_is_where_its_expert_is(
    name: str, write_plan: WritePlan, tmp_path: Path
) -> None:
    layout = FAMILY_LAYOUTS[name]()
    model = write(layout, tmp_path / "model")
    if name == "mistral_large_3":
        (model / "config.json").rename(model / "params.json")
    assert ModelSpec.from_checkpoint(model).layer_ids == (1, 2)
    follow(layout, model, write_plan, tmp_path)


def fused(block: str, model_type: str, names: dict[str, Any], router: str) -> Layout:
    text = {**QWEN3, "model_type": model_type, "num_local_experts": E}
    nested = {"model_type": model_type, "text_config": text} | text
    layout = Layout(nested, [0, 1], block).all_experts(names)
    return layout.all_experts({router: ROUTER["gate.weight"]})


NVFP4 = {
    f"experts.{p}{part}": (dtype, [E, *shape])
    for p in ("gate_up_proj", "down_proj")
    for part, dtype, shape in (
        ("", "U8", [8, 4]),
        ("_weight_scale", "F8_E4M3", [8, 1]),
        ("_weight_scale_2", "F32", [2]),
        ("_input_scale", "F32", [2]),
    )
}
FP8 = {
    f"experts.{p}{part}": one
    for p in ("gate_up_proj", "down_proj")
    for part, one in (("", ("F8_E4M3", [E, 8, 4])), ("_scale_inv", ("F32", [E, 1, 1])))
}
GRANITE = {
    f"{p}.weight{part}": one
    for p in ("input_linear", "output_linear")
    for part, one in (("", ("F8_E4M3", [E, 8, 4])), ("_scale", ("BF16", [E, 8, 1])))
}
FBGEMM = {
    "experts.gate_up_proj": ("F8_E4M3", [E, 8, 4]),
    "experts.gate_up_proj_scale": ("F32", [E, 1, 4]),
    "experts.down_proj": ("F8_E4M3", [E, 8, 4]),
    "experts.down_proj_scale": ("F32", [E, 8, 1]),
}
MLX = {
    f"switch_mlp.{p}.{part}": one
    for p in PROJECTIONS
    for part, one in (
        ("weight", ("I32", [E, 8, 2])),
        ("scales", ("BF16", [E, 8, 1])),
        ("biases", ("BF16", [E, 8, 1])),
    )
}
VISION = "model.language_model.layers.{}.mlp"
FUSED_LAYOUTS = {
    "granite-fp8": lambda: fused(
        "model.layers.{}.block_sparse_moe",
        "granitemoehybrid",
        GRANITE,
        "router.layer.weight",
    ),
    "qwen3-vl-fp8": lambda: fused(VISION, "qwen3_vl_moe", FP8, "gate.weight"),
    "mistral-small-4-fp8": lambda: fused(VISION, "mistral3", FP8, "gate.weight"),
    "qwen3.5-nvfp4": lambda: fused(VISION, "qwen3_5_moe", NVFP4, "gate.weight"),
    "gpt-oss-nvfp4": lambda: fused(
        "model.layers.{}.mlp", "gpt_oss", NVFP4, "router.weight"
    ),
    "llama4-fbgemm": lambda: fused(
        "model.layers.{}.feed_forward", "llama4_text", FBGEMM, "router.weight"
    ),
    "mlx": lambda: fused(
        "model.layers.{}.mlp", "qwen3_moe", MLX, "gate.weight"
    ).all_experts({"gate.scales": ("BF16", [E, 1]), "gate.biases": ("BF16", [E, 1])}),
}


@pytest.mark.parametrize("name", FUSED_LAYOUTS)
def test_what_stands_beside_fused_experts_moves_with_them(
    name: str, write_plan: WritePlan, tmp_path: Path
) -> None:
    layout = FUSED_LAYOUTS[name]()
    follow(layout, write(layout, tmp_path / "model"), write_plan, tmp_path)


@pytest.mark.parametrize(("bits", "words"), [(8, 3), (4, 2)])
def test_a_router_of_gptq_has_a_column_per_expert(
    bits: int, words: int, write_plan: WritePlan, tmp_path: Path
) -> None:
    """Zero points share words: unpacked by hand here, the lowest bits first."""
    experts = 32 * words // bits
    rng = np.random.default_rng(1)
    config = {**QWEN3, "num_hidden_layers": 1, "num_experts": experts}
    gate = "model.layers.0.mlp.gate."
    zeros = rng.integers(0, 2**bits, (3, experts))
    packed = np.zeros((3, words), np.uint32)
    for e in range(experts):
        place = e * bits
        packed[:, place // 32] |= (zeros[:, e] << place % 32).astype(np.uint32)
    tensors = {
        gate + "qweight": rng.integers(0, 99, (4, experts), np.int32),
        gate + "qzeros": packed.view(np.int32),
        gate + "scales": rng.random((3, experts)).astype(np.float16),
        gate + "g_idx": np.arange(16, dtype=np.int32),
    }
    for e in range(experts):
        tensors[f"model.layers.0.mlp.experts.{e}.up_proj.qweight"] = np.full(2, e, np.int32)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    save_file(tensors, model / "model.safetensors")
    spec = ModelSpec.from_checkpoint(model)
    row = rng.permutation(experts)
    plan = write_plan(
        spec, Placement.from_json([row.tolist()], (experts,), num_ranks=4, num_nodes=1)
    )
    export_checkpoint(plan, model, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for part in ("qweight", "scales"):
        assert np.array_equal(found[gate + part], tensors[gate + part][:, row])
    assert np.array_equal(found[gate + "g_idx"], tensors[gate + "g_idx"])
    new = found[gate + "qzeros"].view(np.uint32)
    for e in range(experts):
        got = new[:, e * bits // 32] >> (e * bits % 32) & (2**bits - 1)
        assert np.array_equal(got, zeros[:, row[e]])
    assert verify(model, tmp_path / "out", plan, [], 0).num_tensors == len(tensors)
    restore_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        model / "model.safetensors"
    ).read_bytes()


def test_a_router_of_awq_is_refused(write_plan: WritePlan, tmp_path: Path) -> None:
    """It packs experts eight to a word in an order of its own."""
    layout = qwen3(BF16)()
    del layout.fused["gate.weight"]
    layout.all_experts({"gate.qweight": ("I32", [16, 2]), "gate.qzeros": ("I32", [1, 2])})
    model = write(layout, tmp_path / "model")
    with pytest.raises(PlacerError, match=r"gate\.q.* cannot be classified: its shape is"):
        export_checkpoint(permuting_plan(model, write_plan)[1], model, tmp_path / "out")


def test_ranks_read_fused_tensors_with_a_first_axis_of_one(
    write_plan: WritePlan, tmp_path: Path
) -> None:
    layout = fused(VISION, "qwen3_5_moe", NVFP4, "gate.weight")
    layout.all_experts({"experts.down_proj_scale": ("F32", [1, E])})
    model = write(layout, tmp_path / "model")
    rows, plan = permuting_plan(model, write_plan)
    prepare_ranks(plan, model, experts_only=False).write(tmp_path / "out")
    assert verify_ranks(model, tmp_path / "out", plan).num_ranks == 4
    name = VISION.format(0) + ".experts.down_proj_scale"
    old = np.frombuffer(read(model)[name][2], np.float32)
    _, shape, content = read(tmp_path / "out" / "rank-00001")[name]
    assert shape == [1, 3]
    assert np.array_equal(np.frombuffer(content, np.float32), old[rows[0][3:6]])


@pytest.mark.parametrize("counted", [0, None])
def test_layers_behind_the_last_stay_whether_counted_or_not(
    counted: int | None, write_plan: WritePlan, tmp_path: Path
) -> None:
    layout = deepseek_like("glm4_moe", num_nextn_predict_layers=counted)
    for e in range(E):
        layout.rest[f"model.layers.3.mlp.experts.{e}.up_proj.weight"] = ("BF16", [8, 16])
    layout.rest["model.layers.3.mlp.gate.weight"] = ROUTER["gate.weight"]
    follow(layout, write(layout, tmp_path / "model"), write_plan, tmp_path)


def test_experts_that_were_approximated_are_refused_by_name(
    write_plan: WritePlan, tmp_path: Path
) -> None:
    layout = qwen3(FP8_BLOCKS)()
    names = dict(layout.names())
    for name in [n for n in names if "layers.1.mlp.experts.3." in n]:
        del names[name]
    names["model.layers.1.mlp.experts.3.approx_value"] = ("BF16", [16])
    layout.names = lambda: iter(names.items())
    model = write(layout, tmp_path / "model")
    plan = permuting_plan(model, write_plan)[1]
    with pytest.raises(
        PlacerError, match="expert 3 has approx_value where other experts have"
    ):
        prepare_export(plan, model)


def test_groups_that_limit_nothing_are_none(write_plan: WritePlan, tmp_path: Path) -> None:
    for n_group, topk_group in ((0, 0), (3, 3), (1, 1)):
        layout = deepseek_like("deepseek_v3", n_group=n_group, topk_group=topk_group)
        model = write(layout, tmp_path / f"model{n_group}")
        spec = ModelSpec.from_checkpoint(model)
        assert (spec.n_group, spec.topk_group) == (1, 1)
        row = list(range(E))[::-1]
        placement = Placement.from_json(
            [row] * 2, spec.num_experts, num_ranks=4, num_nodes=1
        )
        assert prepare_export(write_plan(spec, placement), model).record


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("file", "index", "odd"),
    [
        ("quant_model_weights-1.safetensors", "quant_model_weights" + INDEX[5:], None),
        ("weights/model-1.safetensors", INDEX, None),
        ("model-00001-of-00001.safetensors", None, None),
        ("model-1.safetensors", INDEX, "unheld"),
        ("model-1.safetensors", INDEX, "unlisted"),
    ],
)
def test_files_are_found_as_engines_find_them(
    file: str, index: str | None, odd: str | None, write_plan: WritePlan, tmp_path: Path
) -> None:
    """ModelSlim's names, a folder, no index, and an index that is not exact."""
    layout = qwen3(BF16)()
    model = write(layout, tmp_path / "model")
    old = read(model)
    (model / file).parent.mkdir(exist_ok=True)
    (model / "model.safetensors").rename(model / file)
    listed = dict.fromkeys(old, file)
    if odd == "unheld":
        listed["model.layers.0.self_attn.rotary_emb.inv_freq"] = file
    elif odd == "unlisted":
        del listed["model.embed_tokens.weight"]
    if index is not None:
        (model / index).write_text(json.dumps({"weight_map": listed}))
    rows, plan = permuting_plan(model, write_plan)
    export_checkpoint(plan, model, tmp_path / "out")
    found = load_names(tmp_path / "out" / file)
    for e, source in enumerate(rows[0]):
        name = "model.layers.0.mlp.experts.{}.up_proj.weight"
        assert found[name.format(e)] == old[name.format(source)][2]
    assert verify(model, tmp_path / "out", plan, [], 0).num_tensors == len(old)
    restore_checkpoint(tmp_path / "out", tmp_path / "back")
    for path in (file, *([index] if index else [])):
        assert (tmp_path / "back" / path).read_bytes() == (model / path).read_bytes()


def load_names(path: Path) -> dict[str, bytes]:
    return {name: bytes(one["data"]) for name, one in deserialize(path.read_bytes())}


def test_an_index_that_names_experts_that_no_file_holds_is_refused(
    write_plan: WritePlan, tmp_path: Path
) -> None:
    model = write(qwen3(BF16)(), tmp_path / "model")
    names = [*read(model), "model.layers.0.mlp.experts.0.up_proj.weight_scale"]
    listed = dict.fromkeys(names, "model.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(PlacerError, match="weight_scale, which no file contains"):
        prepare_export(permuting_plan(model, write_plan)[1], model)

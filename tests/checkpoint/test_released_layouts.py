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

from placer.checkpoint.export import export_checkpoint, prepare_export, prepare_restore
from placer.checkpoint.ranks import prepare_ranks
from placer.checkpoint.source import CheckpointSource
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


def everywhere(
    model_type: str,
    block: str,
    router: str = "gate.weight",
    names: tuple[str, ...] = PROJECTIONS,
    **config: Any,
) -> Layout:
    """Experts in both layers, or where the config says."""
    config = {**QWEN3, "model_type": model_type, "num_local_experts": E} | config
    layout = Layout(config, [0, 1], block).per_expert(BF16, names)
    return layout.all_experts({router: ROUTER["gate.weight"]})


def kimi_k3() -> Layout:
    """moonshotai's latent experts stand between two projections of all of them."""
    block = "language_model.model.layers.{}.block_sparse_moe"
    layout = deepseek_like("kimi_k3", block, nested=True, num_experts_per_token=2)
    for name in ("down_proj", "norm", "up_proj"):
        one = f"{block.format(1)}.routed_expert_{name}.weight"
        layout.rest[one] = ("BF16", [16, 16])
    return layout


def arctic() -> Layout:
    """Snowflake/snowflake-arctic-instruct: experts in every second layer."""
    block = "model.layers.{}.block_sparse_moe"
    layout = everywhere("arctic", block, names=W123, moe_layer_frequency=2)
    layout.config["num_hidden_layers"] = 4
    layout.layers = [1, 3]
    layout.rest["model.layers.0.block_sparse_moe.mlp.w1.weight"] = ("BF16", [16, 16])
    layout.rest["model.layers.1.residual_mlp.w1.weight"] = ("BF16", [16, 16])
    return layout


def aria() -> Layout:
    """rhymes-ai/Aria: all experts of a layer in fc1 and fc2, a router by another name."""
    inner = {k: v for k, v in QWEN3.items() if not k.startswith("num_experts")}
    inner |= {"model_type": "aria_moe_lm", "moe_num_experts": E, "moe_topk": 2}
    config = {"model_type": "aria", "text_config": inner}
    block = "language_model.model.layers.{}.mlp"
    layout = Layout(config, [0, 1], block)
    shared = block.format(0) + ".shared_experts.up_proj.weight"
    layout.rest[shared] = ("BF16", [16, 16])
    layout.rest["vision_tower.encoder.layers.0.mlp.fc1.weight"] = ("BF16", [16, 16])
    experts = {f"experts.fc{n}.weight": ("BF16", [E, 16, 32]) for n in (1, 2)}
    return layout.all_experts(experts, {"router.weight": ROUTER["gate.weight"]})


def qwen4(model_type: str, block: str) -> Layout:
    layout = everywhere(model_type, block)
    layout.rest[block.format(0) + ".shared_expert_gate.weight"] = ("BF16", [1, 16])
    layout.rest["mtp.layers.0.mlp.experts.0.up_proj.weight"] = ("BF16", [8, 16])
    return layout


def whole(
    model_type: str, block: str, names: tuple[str, ...], bias: str | None, **config: Any
) -> Layout:
    """All experts of a layer in one tensor of each name."""
    inner = {**QWEN3, "model_type": model_type + "_text", "num_local_experts": E}
    whole_config = {"model_type": model_type, "text_config": inner | config}
    layout = Layout(whole_config, [0, 1], block).all_experts(ROUTER)
    layout.all_experts({f"experts.{name}": ("BF16", [E, 8, 16]) for name in names})
    return layout if bias is None else layout.all_experts({bias: ("F32", [E])})


def muse_spark() -> Layout:
    """Latent experts stand between two projections of all of them."""
    names = ("gate_up_proj", "down_proj")
    layout = whole("muse_spark", VISION, names, "gate.e_score_correction_bias")
    for name in ("pre_expert_proj", "pre_expert_norm", "experts.post_expert_norm"):
        layout.rest[f"{VISION.format(1)}.{name}.weight"] = ("BF16", [16, 16])
    return layout


def inkling2() -> Layout:
    """With the scales of MXFP8, which stand beside every tensor of experts."""
    block = "model.llm.layers.{}.mlp"
    layout = whole("inkling2", block, ("w13_weight", "w2_weight"), "gate.bias")
    scales = {f"experts.w{n}_weight_scale": ("U8", [E, 8, 1]) for n in (13, 2)}
    return layout.all_experts(scales)


def alone(layout: Layout, block: str) -> Layout:
    """The language model of a layout by itself."""
    layout.config = layout.config["text_config"]
    layout.rest = {
        name.replace(layout.block.format(1), block.format(1)): shape
        for name, shape in layout.rest.items()
    }
    layout.block = block
    return layout


def mistral_large4() -> Layout:
    layout = deepseek_like("mistral_large4", "layers.{}", bias=None, nested=True)
    layout.config["text_config"]["model_type"] = "mistral_large4_text"
    layout.rest["layers.1.attention.indexer.wk.weight"] = ("BF16", [16, 16])
    layout.rest["layers.0.feed_forward.w1.weight"] = ("BF16", [8, 16])
    layout.rest["vision_encoder.layers.0.feed_forward.w1.weight"] = ("BF16", [8, 16])
    return layout


def k2_horizon(model_type: str) -> Layout:
    """Its attention has experts of values, which no plan moves."""
    layout = everywhere(model_type, "model.layers.{}.mlp")
    layout.rest["model.layers.0.self_attn.v_experts.0.weight"] = ("BF16", [16, 16])
    return layout.all_experts({"gate.bias": ("F32", [E])})


def iquest_q1() -> Layout:
    layout = Layout(
        {
            **QWEN3,
            "model_type": "iquest_q1",
            "num_hidden_layers": 3,
            "mlp_only_layers": [0],
        },
        [1, 2],
        "model.layers.{}.mlp",
    )
    layout.rest["mtp_layers.0.mlp.experts.fc"] = ("BF16", [E, 8, 16])
    layout.all_experts({"router.weight": ROUTER["gate.weight"]})
    return layout.all_experts(
        {f"experts.{n}": ("BF16", [E, 8, 16]) for n in ("fc", "proj")}
    )


def unsloth() -> Layout:
    """unsloth/gpt-oss-20b-unsloth-bnb-4bit: tensors of its own for every expert."""
    layout = Layout({**QWEN3, "model_type": "gpt_oss"}, [0, 1], "model.layers.{}.mlp")
    layout.experts = {
        f"experts.{p}.{{}}.{part}": one
        for p in ("gate_up_projs", "down_projs")
        for part, one in (
            ("weight", ("U8", [64, 1])),
            ("weight.absmax", ("U8", [2])),
            ("weight.quant_state.bitsandbytes__nf4", ("U8", [20])),
            ("bias", ("BF16", [16])),
        )
    }
    router = {"router.linear.weight": ROUTER["gate.weight"]}
    return layout.all_experts(router, {"router.linear.bias": ("BF16", [E])})


W123 = ("w1", "w2", "w3")
SPARSE = "model.layers.{}.block_sparse_moe"
VISION = "model.language_model.layers.{}.mlp"
FAMILY_LAYOUTS = {
    "arctic": arctic,
    "aria": aria,
    "bailing_moe": lambda: deepseek_like(
        "bailing_moe", bias="gate.expert_bias", num_experts=E
    ),
    "bailing_moe_v2": lambda: deepseek_like(
        "bailing_moe_v2", bias="gate.expert_bias", num_experts=E
    ),
    **{
        name: lambda name=name: deepseek_like(name, bias="gate.expert_bias", num_experts=E)
        for name in ("bailing_moe_linear", "llada2_moe", "param2moe")
    },
    **{
        name: lambda name=name: deepseek_like(name)
        for name in ("dots_vlm", "gigachat3_5", "pangu_ultra_moe", "deepseek_ocr2_text")
    },
    **{
        name: lambda name=name: deepseek_like(name, bias=None)
        for name in ("deepseek", "unlimited_language", "unlimited_ocr_text")
    },
    "inkling2": inkling2,
    "inkling2_text": lambda: alone(inkling2(), "model.layers.{}.mlp"),
    "iquest_q1": iquest_q1,
    "k2_horizon": lambda: k2_horizon("k2_horizon"),
    "minicpm": lambda: everywhere("minicpm", "model.layers.{}.mlp", names=W123),
    "mistral_large4": mistral_large4,
    "mistral_large4_text": lambda: alone(mistral_large4(), "layers.{}"),
    "muse_spark": muse_spark,
    "muse_spark_text": lambda: alone(muse_spark(), "model.layers.{}.mlp"),
    "sdar_moe": lambda: everywhere("sdar_moe", "model.layers.{}.mlp"),
    "xllm": lambda: k2_horizon("xllm"),
    "xverse_moe": lambda: everywhere(
        "xverse_moe", "model.layers.{}.mlp", "router.weight", moe_top_k=2
    ),
    "git": lambda: everywhere("git", SPARSE, names=W123),
    "glm4v_moe_text": lambda: deepseek_like("glm4v_moe_text"),
    "glm5_next": lambda: deepseek_like("glm5_next", VISION, nested=True),
    "glm5_next_text": lambda: deepseek_like("glm5_next_text"),
    "hunyuan": lambda: everywhere(
        "hunyuan", "model.layers.{}.mlp", "gate.wg.weight", moe_topk=[2, 2]
    ),
    "kimi_k3": kimi_k3,
    "kimi_vl": lambda: deepseek_like(
        "kimi_vl", "language_model.model.layers.{}.mlp", nested=True
    ),
    "mimo_v2": lambda: deepseek_like("mimo_v2", moe_layer_freq=[0, 1, 1]),
    "minimax_m1": lambda: everywhere("minimax_m1", SPARSE, names=W123),
    "minimax_text_01": lambda: everywhere("minimax_text_01", SPARSE, names=W123),
    "mistral4": lambda: deepseek_like("mistral4"),
    "mistral_large_3": mistral_large_3,
    "qwen3_vl_moe_text": lambda: everywhere("qwen3_vl_moe_text", "model.layers.{}.mlp"),
    "qwen4_exp": lambda: qwen4("qwen4_exp", VISION),
    "qwen4_exp_text": lambda: qwen4("qwen4_exp_text", "model.layers.{}.mlp"),
    "sarvam_mla": lambda: deepseek_like("sarvam_mla", bias="gate.expert_bias"),
    "sarvam_moe": lambda: deepseek_like("sarvam_moe", bias="gate.expert_bias"),
    "step3_text": lambda: step("step3_text", "model.layers.{}.moe"),
    "step3_vl": lambda: step("step3_vl", "model.layers.{}.moe"),
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
    assert ModelSpec.from_checkpoint(model).layer_ids == tuple(layout.layers)
    follow(layout, model, write_plan, tmp_path)


def inside(model_type: str, key: str, root: str, inner: dict[str, Any]) -> Layout:
    """A language model of a known family inside a model that placer does not know."""
    config = {"model_type": model_type, key: {**QWEN3, **inner}}
    layout = Layout(config, [0, 1], root + "layers.{}.mlp").per_expert(BF16)
    layout.rest["vision_model.encoder.layers.0.mlp.fc1.weight"] = ("BF16", [16, 16])
    layout.config["quantization_config"] = {"ignore": ["lm_head", "re:vision_model.*"]}
    return layout.all_experts(ROUTER)


WRAPPED = {
    "internvl_chat": ("llm_config", "language_model.model.", {}),
    "interns1": ("text_config", "model.language_model.", {}),
    "deepseek_vl_v2": (
        "language_config",
        "language.model.",
        {"model_type": "deepseek_v2", "n_routed_experts": E},
    ),
    "minicpmv": ("llm_config", "llm.model.", {}),
    "deepseek-ocr": (
        "language_config",
        "model.",
        {"model_type": "deepseek_v2", "n_routed_experts": E},
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_language_model_inside_another_model_is_followed(
    name: str, write_plan: WritePlan, tmp_path: Path
) -> None:
    layout = inside(name, *WRAPPED[name])
    model = write(layout, tmp_path / "model")
    assert ModelSpec.from_checkpoint(model).model_type == name
    follow(layout, model, write_plan, tmp_path)


def test_a_model_around_an_unknown_or_refused_family_is_refused(tmp_path: Path) -> None:
    for inner in ("llama", "longcat_flash"):
        layout = inside("any_vl", "text_config", "language_model.model.", {})
        layout.config["text_config"]["model_type"] = inner
        with pytest.raises(PlacerError, match=f"any_vl.*{inner}"):
            ModelSpec.from_checkpoint(write(layout, tmp_path / inner))


def test_a_language_model_without_a_kind_is_named(tmp_path: Path) -> None:
    layout = inside("internvl_chat", "llm_config", "language_model.model.", {})
    del layout.config["llm_config"]["model_type"]
    with pytest.raises(PlacerError, match="whose llm_config has no model_type"):
        ModelSpec.from_checkpoint(write(layout, tmp_path / "model"))


def test_an_adapter_of_experts_beside_the_weights_is_named(
    write_plan: WritePlan, tmp_path: Path
) -> None:
    layout = everywhere("qwen3_moe", "model.layers.{}.mlp")
    path = "base_model.model.model.layers.0.mlp.experts.0.up_proj.lora_A.weight"
    layout.rest[path] = ("BF16", [2, 16])
    model = write(layout, tmp_path / "model")
    with pytest.raises(PlacerError, match="belongs to a LoRA adapter") as caught:
        prepare_export(permuting_plan(model, write_plan)[1], model)
    assert "merge" in caught.value.hint


def test_experts_outside_the_language_model_stop_the_export(
    write_plan: WritePlan, tmp_path: Path
) -> None:
    layout = inside("any_vl", "text_config", "language_model.model.", {})
    layout.rest["vision_model.layers.0.mlp.experts.0.weight"] = ("BF16", [16, 16])
    model = write(layout, tmp_path / "model")
    with pytest.raises(PlacerError, match=r"vision_model.* no rule of its family"):
        prepare_export(permuting_plan(model, write_plan)[1], model)


@pytest.mark.parametrize(
    "name", ["e_score_correction_bias", "moe.expert_bias", "router_bias"]
)
def test_a_bias_of_experts_outside_their_block_stops_the_export(
    name: str, write_plan: WritePlan, tmp_path: Path
) -> None:
    """Kolibri 1 has one there; left in its old order it would make another model."""
    layout = everywhere("qwen3_moe", "model.layers.{}.mlp")
    layout.rest[f"model.layers.1.{name}"] = ("F32", [E])
    model = write(layout, tmp_path / "model")
    with pytest.raises(PlacerError, match=f"{name} .*no rule of its family"):
        prepare_export(permuting_plan(model, write_plan)[1], model)


def test_an_expert_may_have_tensors_of_its_own_in_gpt_oss(
    write_plan: WritePlan, tmp_path: Path
) -> None:
    layout = unsloth()
    follow(layout, write(layout, tmp_path / "model"), write_plan, tmp_path)
    names = dict(layout.names())
    for name in [n for n in names if "1.mlp.experts.down_projs.3.weight" in n]:
        del names[name]
    layout.names = lambda: iter(names.items())
    model = write(layout, tmp_path / "less")
    with pytest.raises(PlacerError, match=r"lacks down_projs\.weight of expert 3"):
        prepare_export(permuting_plan(model, write_plan)[1], model)


@pytest.mark.parametrize("shape", [[1, E], [1, 3], [1, 1]])
def test_one_row_of_scales_is_of_all_experts_of_a_router(
    shape: list[int], write_plan: WritePlan, tmp_path: Path
) -> None:
    """FP8 in blocks of 128 x 128: columns are blocks of inputs, whatever their number."""
    layout = qwen3(FP8_BLOCKS)()
    layout.all_experts({"gate.weight": ("F8_E4M3", [E, 16])})
    layout.rest["model.layers.0.mlp.gate.weight_scale_inv"] = ("F32", shape)
    follow(layout, write(layout, tmp_path / "model"), write_plan, tmp_path)


def test_parts_of_a_model_for_ranks_are_refused_by_name(tmp_path: Path) -> None:
    """xai-org/grok-2 as released: every tensor in several files, a part in each."""
    layout = FAMILY_LAYOUTS["git"]()
    model = write(layout, tmp_path / "model")
    one = model / "pytorch_model-00000-TP-000.safetensors"
    (model / "model.safetensors").rename(one)
    (model / one.name.replace("TP-000", "TP-001")).write_bytes(one.read_bytes())
    with pytest.raises(PlacerError, match="tensor-parallel ranks"):
        CheckpointSource.open(model)


@pytest.mark.parametrize("fused_experts", [False, True])
def test_layers_may_have_fewer_experts_than_the_config_says(
    fused_experts: bool, write_plan: WritePlan, tmp_path: Path
) -> None:
    """Pruned models that keep their config: routers and names of experts agree."""
    shapes: dict[str, tuple[str, list[int]]] = {}
    for layer, size in ((0, E), (1, E - 4)):
        block = f"model.layers.{layer}.mlp"
        shapes[f"{block}.gate.weight"] = ("BF16", [size, 16])
        if fused_experts:
            shapes[f"{block}.experts.gate_up_proj"] = ("BF16", [size, 4, 16])
        else:
            for e in range(size):
                shapes[f"{block}.experts.{e}.up_proj.weight"] = ("BF16", [8, 16])
    layout = qwen3(BF16)()
    layout.names = lambda: iter(shapes.items())
    model = write(layout, tmp_path / "model")
    spec = ModelSpec.from_checkpoint(model)
    assert spec.num_experts == (E, E - 4)
    rows = [list(range(E))[::-1], list(range(E - 4))[::-1]]
    placement = Placement.from_json(rows, spec.num_experts, num_ranks=4, num_nodes=1)
    plan = write_plan(spec, placement)
    export_checkpoint(plan, model, tmp_path / "out")
    assert verify(model, tmp_path / "out", plan, [], 0).num_tensors == len(shapes)
    router = "model.layers.1.mlp.gate.weight"
    old, new = (
        np.frombuffer(read(d)[router][2], np.uint8) for d in (model, tmp_path / "out")
    )
    assert np.array_equal(new.reshape(E - 4, -1), old.reshape(E - 4, -1)[::-1])


def test_an_incomplete_layer_is_not_taken_for_a_small_one(
    write_plan: WritePlan, tmp_path: Path
) -> None:
    layout = qwen3(BF16)()
    names = {n: one for n, one in layout.names() if "1.mlp.experts.11." not in n}
    layout.names = lambda: iter(names.items())
    model = write(layout, tmp_path / "model")
    assert ModelSpec.from_checkpoint(model).num_experts == (E, E)
    with pytest.raises(PlacerError, match=r"layer 1: .* lacks \w+ of expert 11"):
        prepare_export(permuting_plan(model, write_plan)[1], model)


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
PACKED = {
    f"experts.{p}.{part}": one
    for p in ("gate_up_proj", "down_proj")
    for part, one in (
        ("weight_packed", ("I32", [E, 8, 2])),
        ("weight_scale", ("BF16", [E, 8, 1])),
        ("weight_zero_point", ("I32", [E, 1, 1])),
        ("weight_g_idx", ("I32", [E, 16])),
    )
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
    "compressed-tensors": lambda: fused(
        "model.layers.{}.mlp", "qwen3_moe", PACKED, "gate.weight"
    ).beside(**{"model.layers.0.mlp.experts.down_proj.weight_shape": ("I64", [2])}),
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
    prepare_restore(tmp_path / "out").write(tmp_path / "back")
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
    prepare_restore(tmp_path / "out").write(tmp_path / "back")
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


@pytest.mark.parametrize("odd", [None, "shared tensor", "missing file"])
def test_several_indexes_must_be_of_parts_of_one_checkpoint(
    odd: str | None, write_plan: WritePlan, tmp_path: Path
) -> None:
    """Engines look for neither name: they load all files."""
    model = tmp_path / "model"
    for layer, name in enumerate(("a", "b")):
        part = qwen3(BF16)()
        part.layers = [layer]
        if layer:
            part.rest = {"lm_head.weight": ("BF16", [5, 16])}
        folder = write(part, model if layer == 0 else tmp_path / "other")
        listed = dict.fromkeys(read(folder), f"{name}.safetensors")
        if layer and odd:
            listed["model.embed_tokens.weight" if "tensor" in odd else "x"] = (
                "b.safetensors" if "tensor" in odd else "c.safetensors"
            )
        (folder / "model.safetensors").rename(model / f"{name}.safetensors")
        index = model / f"{name}.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": listed}))
    rows, plan = permuting_plan(model, write_plan)
    if odd:
        with pytest.raises(PlacerError, match=r"several indexes: a\.safetensors"):
            export_checkpoint(plan, model, tmp_path / "out")
        return
    export_checkpoint(plan, model, tmp_path / "out")
    expert = "model.layers.{}.mlp.experts.{}.up_proj.weight"
    for layer, name in enumerate(("a.safetensors", "b.safetensors")):
        old, new = load_names(model / name), load_names(tmp_path / "out" / name)
        assert old.keys() == new.keys()
        for e, source in enumerate(rows[layer]):
            assert new[expert.format(layer, e)] == old[expert.format(layer, source)]
    assert verify(model, tmp_path / "out", plan, [], 0).num_tensors == len(
        {*load_names(model / "a.safetensors"), *load_names(model / "b.safetensors")}
    )
    assert not [*(tmp_path / "out").glob("*.index.json")]

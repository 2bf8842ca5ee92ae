"""Quantised checkpoints as they are released: names, types, axes; every byte is followed.

Shapes are shrunk, all else is as in the files of the model that each layout names. What
must become of a tensor is said here by hand, in the table itself; the oracle reads files by
the safetensors library.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import deserialize

from placer.checkpoint.export import export_checkpoint, prepare_restore
from placer.checkpoint.verify import verify
from placer.errors import PlacerError, VerificationError
from placer.model import ModelSpec
from placer.placement import Placement

WritePlan = Callable[..., Path]
NUM_EXPERTS, HIDDEN, WIDTH = 12, 16, 8
BYTES = {"F32": 4, "I32": 4, "I64": 8, "BF16": 2, "F16": 2}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

# Per part of a projection: type and shape.
FP8_BLOCKS = {"weight": ("F8_E4M3", [8, 16]), "weight_scale_inv": ("F32", [1, 1])}
AWQ = {
    "qweight": ("I32", [16, 1]),
    "qzeros": ("I32", [2, 1]),
    "scales": ("F16", [2, 8]),
}
GPTQ = AWQ | {"qweight": ("I32", [2, 8]), "g_idx": ("I32", [16])}
PACK_QUANTIZED = {
    "weight_packed": ("I32", [8, 2]),
    "weight_scale": ("BF16", [8, 2]),
    "weight_shape": ("I64", [2]),
}
W8A8 = {"weight": ("F8_E4M3", [8, 16]), "weight_scale": ("BF16", [8, 1])}
NVFP4 = {
    "weight": ("U8", [8, 8]),
    "weight_scale": ("F8_E4M3", [8, 1]),
    "weight_scale_2": ("F32", []),
    "input_scale": ("F32", []),
}
FP4 = {"weight": ("I8", [8, 8]), "scale": ("F8_E8M0", [8, 1])}
MXFP4 = {
    f"{projection}_{part}": (dtype, [NUM_EXPERTS, *shape])
    for projection in ("gate_up_proj", "down_proj")
    for part, dtype, shape in (
        ("blocks", "U8", [4, 2, 16]),
        ("scales", "U8", [4, 2]),
        ("bias", "BF16", [4]),
    )
}
FUSED_NVFP4 = {
    f"{projection}{part}": (dtype, shape)
    for projection in ("gate_up_proj", "down_proj")
    for part, dtype, shape in (
        ("", "U8", [NUM_EXPERTS, 8, 8]),
        ("_weight_scale", "F8_E4M3", [NUM_EXPERTS, 8, 1]),
        ("_weight_scale_2", "F32", []),
        ("_input_scale", "F32", [1]),
    )
}
FUSED_BF16 = {
    "gate_up_proj": ("BF16", [NUM_EXPERTS, 16, 8]),
    "down_proj": ("BF16", [NUM_EXPERTS, 8, 16]),
}
ROUTER = {"gate.weight": ("BF16", [NUM_EXPERTS, HIDDEN])}
BIAS = {"gate.e_score_correction_bias": ("F32", [NUM_EXPERTS])}

QWEN3 = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 2,
    "hidden_size": HIDDEN,
    "vocab_size": 5,
}
DEEPSEEK = {
    **QWEN3,
    "model_type": "deepseek_v3",
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "n_routed_experts": NUM_EXPERTS,
    "n_group": 3,
    "topk_group": 2,
}
Tensor = tuple[str, list[int]]


class Layout:
    """One released checkpoint: its config, and tensors by what an export does to them."""

    def __init__(self, config: dict[str, Any], layers: list[int], block: str) -> None:
        self.config, self.layers, self.block = config, layers, block
        self.experts: dict[str, Tensor] = {}
        self.fused: dict[str, Tensor] = {}
        self.rest: dict[str, Tensor] = {"model.embed_tokens.weight": ("BF16", [5, HIDDEN])}
        self.tables: dict[str, Tensor] = {}

    def per_expert(
        self, parts: dict[str, Tensor], names: tuple[str, ...] = PROJECTIONS
    ) -> "Layout":
        self.experts |= {
            f"experts.{{}}.{projection}.{part}": one
            for projection in names
            for part, one in parts.items()
        }
        return self

    def all_experts(self, *groups: dict[str, Tensor], below: str = "") -> "Layout":
        self.fused |= {below + name: one for group in groups for name, one in group.items()}
        return self

    def beside(self, **tensors: Tensor) -> "Layout":
        self.rest |= tensors
        return self

    def names(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the checkpoint."""
        yield from self.rest.items()
        for layer in self.layers:
            prefix = self.block.format(layer)
            for name, one in (*self.fused.items(), *self.tables.items()):
                yield f"{prefix}.{name}", one
            for name, one in self.experts.items():
                for expert in range(NUM_EXPERTS):
                    yield f"{prefix}.{name.format(expert)}", one


def deepseek_v3() -> Layout:
    """deepseek-ai/DeepSeek-V3: FP8 in blocks, a layer of multi-token prediction last."""
    layout = Layout(DEEPSEEK, [1, 2], "model.layers.{}.mlp").per_expert(FP8_BLOCKS)
    layout.all_experts(ROUTER, BIAS)
    for expert in range(NUM_EXPERTS):
        for part, one in FP8_BLOCKS.items():
            layout.rest[f"model.layers.3.mlp.experts.{expert}.up_proj.{part}"] = one
    for name, one in (ROUTER | BIAS).items():
        layout.rest[f"model.layers.3.mlp.{name}"] = one
    layout.rest["model.layers.3.shared_head.norm.weight"] = ("BF16", [HIDDEN])
    layout.rest["model.layers.0.mlp.gate_proj.weight"] = ("F8_E4M3", [8, 16])
    for part, one in FP8_BLOCKS.items():
        layout.rest[f"model.layers.1.mlp.shared_experts.up_proj.{part}"] = one
    return layout


def kimi_k2() -> Layout:
    """moonshotai/Kimi-K2-Thinking: experts of four bits, one router group."""
    config = {**DEEPSEEK, "model_type": "kimi_k2", "n_group": 1, "topk_group": 1}
    layout = Layout(config, [1, 2], "model.layers.{}.mlp").per_expert(PACK_QUANTIZED)
    return layout.all_experts(ROUTER, BIAS)


def deepseek_v4() -> Layout:
    """deepseek-ai/DeepSeek-V4: FP4 experts, tables of experts by token, ``mtp``."""
    config = {**DEEPSEEK, "model_type": "deepseek_v4", "num_hidden_layers": 2, "n_group": 1}
    del config["first_k_dense_replace"]
    layout = Layout(config, [0, 1], "layers.{}.ffn").per_expert(FP4, ("w1", "w2", "w3"))
    layout.all_experts(ROUTER)
    layout.tables["gate.tid2eid"] = ("I32", [5, 2])
    for expert in range(NUM_EXPERTS):
        layout.rest[f"mtp.0.ffn.experts.{expert}.w1.weight"] = ("I8", [8, 8])
    layout.rest["mtp.0.ffn.gate.weight"] = ROUTER["gate.weight"]
    layout.rest["layers.0.ffn.shared_experts.w1.scale"] = ("F8_E8M0", [1, 1])
    return layout


def gpt_oss() -> Layout:
    """openai/gpt-oss-20b: MXFP4, all experts of a layer in one tensor, a biased router."""
    router = {
        "router.weight": ROUTER["gate.weight"],
        "router.bias": ("BF16", [NUM_EXPERTS]),
    }
    config = {**QWEN3, "model_type": "gpt_oss", "num_local_experts": NUM_EXPERTS}
    layout = Layout(config, [0, 1], "model.layers.{}.mlp").all_experts(router)
    layout.rest["model.layers.0.self_attn.sinks"] = ("BF16", [4])
    return layout.all_experts(MXFP4, below="experts.")


def qwen3(parts: dict[str, Tensor]) -> Callable[[], Layout]:
    def build() -> Layout:
        layout = Layout(QWEN3, [0, 1], "model.layers.{}.mlp")
        return layout.per_expert(parts).all_experts(ROUTER)

    return build


def llama4_nvfp4() -> Layout:
    """nvidia/Llama-4-Scout-17B-16E-Instruct-FP4: one scale for all experts stays."""
    text = {**QWEN3, "model_type": "llama4_text", "num_local_experts": NUM_EXPERTS}
    text |= {"num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
    config = {"model_type": "llama4", "text_config": text}
    block = "language_model.model.layers.{}.feed_forward"
    layout = Layout(config, [0, 1], block)
    moved = {name: one for name, one in FUSED_NVFP4.items() if len(one[1]) > 1}
    layout.all_experts(moved, below="experts.")
    layout.all_experts({"router.weight": ROUTER["gate.weight"]})
    for layer in (0, 1):
        for name in FUSED_NVFP4.keys() - moved.keys():
            layout.rest[f"{block.format(layer)}.experts.{name}"] = FUSED_NVFP4[name]
        name = f"{block.format(layer)}.shared_expert.up_proj.weight"
        layout.rest[name] = ("BF16", [8, HIDDEN])
    return layout


def qwen3_5() -> Layout:
    """Qwen/Qwen3.5-35B-A3B: fused below ``language_model``, ``mtp`` with own experts."""
    config = {"model_type": "qwen3_5_moe", "text_config": QWEN3}
    layout = Layout(config, [0, 1], "model.language_model.layers.{}.mlp")
    layout.all_experts(FUSED_BF16, below="experts.").all_experts(ROUTER)
    for name, one in FUSED_BF16.items():
        layout.rest[f"mtp.layers.0.mlp.experts.{name}"] = one
    layout.rest["mtp.layers.0.mlp.gate.weight"] = ROUTER["gate.weight"]
    prefix = layout.block.format(0)
    layout.rest[f"{prefix}.shared_expert_gate.weight"] = ("BF16", [1, HIDDEN])
    return layout


LAYOUTS: dict[str, Callable[[], Layout]] = {
    "deepseek-v3-fp8": deepseek_v3,
    "deepseek-v4-fp4": deepseek_v4,
    "gpt-oss-mxfp4": gpt_oss,
    "kimi-k2-pack-quantized": kimi_k2,
    "llama4-nvfp4": llama4_nvfp4,
    "qwen3-awq": qwen3(AWQ),
    "qwen3-gptq": qwen3(GPTQ),
    "qwen3-nvfp4": qwen3(NVFP4),
    "qwen3-pack-quantized": qwen3(PACK_QUANTIZED),
    "qwen3-w8a8": qwen3(W8A8),
    "qwen3.5-fused": qwen3_5,
}


def write(layout: Layout, folder: Path, config: dict[str, Any] | None = None) -> Path:
    """Write the checkpoint, every tensor with bytes of its own."""
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(layout.config | (config or {}), indent=2)
    )
    rng = np.random.default_rng(0)
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, shape) in layout.names():
        count = int(np.prod(shape))
        content = rng.bytes(count * BYTES.get(dtype, 1))
        if name.endswith("tid2eid"):
            content = rng.integers(NUM_EXPERTS, size=count, dtype=np.int32).tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + data
    )
    return folder


def read(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    raw = (folder / "model.safetensors").read_bytes()
    return {
        name: (one["dtype"], one["shape"], bytes(one["data"]))
        for name, one in deserialize(raw)
    }


def permuting_plan(folder: Path, write_plan: WritePlan) -> tuple[list[list[int]], Path]:
    """Whole groups of four change places, and experts inside them."""
    rows = [[7, 4, 6, 5, 9, 8, 11, 10, 0, 2, 1, 3], [1, 0, 2, 3, 8, 11, 9, 10, 5, 4, 6, 7]]
    spec = ModelSpec.from_checkpoint(folder)
    placement = Placement.from_json(rows, spec.num_experts, num_ranks=4, num_nodes=1)
    return rows, write_plan(spec, placement)


def follow(layout: Layout, model: Path, write_plan: WritePlan, tmp_path: Path) -> None:
    """Export at random, find every tensor where it must be, verify and restore."""
    rows, plan = permuting_plan(model, write_plan)
    export_checkpoint(plan, model, tmp_path / "out")
    old, expected = read(model), read(model)
    for layer, row in zip(layout.layers, rows, strict=True):
        prefix = layout.block.format(layer) + "."
        for part in layout.experts:
            for e, source in enumerate(row):
                expected[prefix + part.format(e)] = old[prefix + part.format(source)]
        for part in layout.fused:
            dtype, shape, content = old[prefix + part]
            blocks = np.frombuffer(content, np.uint8).reshape(NUM_EXPERTS, -1)
            expected[prefix + part] = (dtype, shape, blocks[row].tobytes())
        for part in layout.tables:
            dtype, shape, content = old[prefix + part]
            ids = [row.index(e) for e in np.frombuffer(content, np.int32).tolist()]
            expected[prefix + part] = (dtype, shape, np.int32(ids).tobytes())
    found = read(tmp_path / "out")
    assert found == expected
    assert found != old
    report = verify(model, tmp_path / "out", plan, [], 0)
    assert report.num_tensors == len(old)
    prepare_restore(tmp_path / "out").write(tmp_path / "back")
    for file in model.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_is_where_its_expert_is(
    name: str, write_plan: WritePlan, tmp_path: Path
) -> None:
    layout = LAYOUTS[name]()
    follow(layout, write(layout, tmp_path / "model"), write_plan, tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("qwen3-fp8", "model.layers.0.mlp.gate.weight_zeros"),
        ("qwen3-fp8", "model.layers.0.mlp.experts.gate_up_proj_offset"),
        ("gpt-oss-mxfp4", "model.layers.1.mlp.router.other.weight"),
        ("gpt-oss-mxfp4", "model.layers.1.mlp.experts.gate_up_proj_zeros"),
        ("deepseek-v4-fp4", "layers.1.ffn.gate.other_bias"),
        ("deepseek-v3-fp8", "model.layers.0.mlp.experts.0.up_proj.weight"),
        ("qwen3.5-fused", "model.visual.blocks.0.mlp.experts.0.weight"),
    ],
)
def test_a_tensor_that_no_rule_names_stops_the_export(
    name: str, tensor: str, write_plan: WritePlan, tmp_path: Path
) -> None:
    layout = LAYOUTS.get(name, qwen3(W8A8))()
    layout.rest[tensor] = ("F32", [NUM_EXPERTS])
    model = write(layout, tmp_path / "model")
    with pytest.raises(PlacerError, match=f"{tensor} cannot be classified"):
        export_checkpoint(permuting_plan(model, write_plan)[1], model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "part", "wrong"),
    [
        ("gpt-oss-mxfp4", "experts.down_proj_blocks", [4, NUM_EXPERTS, 2, 16]),
        ("gpt-oss-mxfp4", "router.bias", [NUM_EXPERTS + 1]),
        ("deepseek-v3-fp8", "gate.weight", [HIDDEN, NUM_EXPERTS]),
    ],
)
def test_experts_along_another_axis_are_not_guessed(
    name: str, part: str, wrong: list[int], write_plan: WritePlan, tmp_path: Path
) -> None:
    layout = LAYOUTS[name]()
    layout.fused[part] = (layout.fused[part][0], wrong)
    model = write(layout, tmp_path / "model")
    with pytest.raises(PlacerError, match=rf"{part} cannot be classified: its shape is"):
        export_checkpoint(permuting_plan(model, write_plan)[1], model, tmp_path / "out")


def test_a_table_of_experts_that_do_not_exist_is_refused(
    write_plan: WritePlan, tmp_path: Path
) -> None:
    model = write(deepseek_v4(), tmp_path / "model")
    raw = bytearray((model / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    first = start + header["layers.1.ffn.gate.tid2eid"]["data_offsets"][0]
    raw[first : first + 4] = (NUM_EXPERTS).to_bytes(4, "little")
    (model / "model.safetensors").write_bytes(raw)
    with pytest.raises(PlacerError, match="but there are 12 experts"):
        export_checkpoint(permuting_plan(model, write_plan)[1], model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_single_expert_that_was_not_quantised_moves_too(
    write_plan: WritePlan, tmp_path: Path
) -> None:
    """compressed-tensors lists it under ``ignore``, by name; the list is renumbered."""
    layout = deepseek_v3()
    names = dict(layout.names())
    ignored = "model.layers.1.mlp.experts.9.up_proj"
    for part in FP8_BLOCKS:
        del names[f"{ignored}.{part}"]
    names[f"{ignored}.weight"] = ("BF16", [8, 16])
    layout.names = lambda: iter(names.items())
    lists = {
        "ignore": [
            "lm_head",
            "re:.*mlp.gate$",
            ignored,
            "layers.2.mlp.experts.10",
            "model.layers.3.mlp.experts.4.up_proj",
        ],
        "dynamic": {"-:model.layers.1.mlp.experts.3.*": {"bits": 8}},
    }
    model = write(layout, tmp_path / "model", {"quantization_config": lists})
    modelopt = {"quantization": {"exclude_modules": [ignored, "lm_head"]}}
    (model / "hf_quant_config.json").write_text(json.dumps(modelopt, indent=4) + "\r\n")
    rows, plan = permuting_plan(model, write_plan)
    export_checkpoint(plan, model, tmp_path / "out")
    moved = f"model.layers.1.mlp.experts.{rows[0].index(9)}.up_proj"
    assert read(tmp_path / "out")[f"{moved}.weight"][:2] == ("BF16", [8, 16])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {
        "ignore": [
            "lm_head",
            "re:.*mlp.gate$",
            moved,
            f"layers.2.mlp.experts.{rows[1].index(10)}",
            "model.layers.3.mlp.experts.4.up_proj",
        ],
        "dynamic": {f"-:model.layers.1.mlp.experts.{rows[0].index(3)}.*": {"bits": 8}},
    }
    assert verify(model, tmp_path / "out", plan, [], 0).num_tensors == len(names)
    text = (tmp_path / "out" / "hf_quant_config.json").read_bytes().decode()
    assert text == (json.dumps(modelopt, indent=4) + "\r\n").replace(ignored, moved)
    prepare_restore(tmp_path / "out").write(tmp_path / "back")
    for file in model.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_verify_finds_a_list_that_names_other_experts(
    write_plan: WritePlan, tmp_path: Path
) -> None:
    names = ["model.layers.0.mlp.experts.3", "model.layers.1.mlp.experts.4.up_proj"]
    lists = {"quantization_config": {"ignore": names}}
    model = write(qwen3(W8A8)(), tmp_path / "model", lists)
    _, plan = permuting_plan(model, write_plan)
    export_checkpoint(plan, model, tmp_path / "out")
    verify(model, tmp_path / "out", plan, [], 0)
    (tmp_path / "out" / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(VerificationError, match=r"layers.0.mlp.experts.3.*of the original"):
        verify(model, tmp_path / "out", plan, [], 0)


def test_a_list_of_all_experts_of_any_layer_stays(
    write_plan: WritePlan, tmp_path: Path
) -> None:
    """GPTQ names every expert once and no layer; with one missing it would matter."""
    every = [f"mlp.experts.{e}.{p}" for e in range(NUM_EXPERTS) for p in PROJECTIONS]
    lists = {"quantization_config": {"modules_in_block_to_quantize": [["q_proj"], every]}}
    model = write(qwen3(GPTQ)(), tmp_path / "model", lists)
    _, plan = permuting_plan(model, write_plan)
    export_checkpoint(plan, model, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (
        model / "config.json"
    ).read_bytes()
    del every[7]
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN3 | lists))
    with pytest.raises(PlacerError, match=r"names single experts: mlp\.experts"):
        export_checkpoint(plan, model, tmp_path / "other")


@pytest.mark.parametrize(
    "text",
    [
        "re:.*mlp.experts.12.*",
        r"re:model\.layers\.0\.mlp\.experts\.3\.up_proj",
        "model.layers.0.mlp.experts.1*",
        "model.layers.0.mlp.experts.[0-3].up_proj",
        "mlp.experts.5",
        "model.layers.0.mlp.experts.99.up_proj",
    ],
)
def test_patterns_that_pick_single_experts_are_refused(
    text: str, write_plan: WritePlan, tmp_path: Path
) -> None:
    lists = {"quantization_config": {"ignore": [text]}}
    model = write(qwen3(W8A8)(), tmp_path / "model", lists)
    with pytest.raises(PlacerError, match="names single experts") as caught:
        export_checkpoint(permuting_plan(model, write_plan)[1], model, tmp_path / "out")
    assert text in caught.value.message
    assert not (tmp_path / "out").exists()


def test_router_groups_are_kept_or_the_plan_is_refused(
    write_plan: WritePlan, tmp_path: Path
) -> None:
    model = write(deepseek_v3(), tmp_path / "model")
    spec = ModelSpec.from_checkpoint(model)
    rows = [list(range(NUM_EXPERTS))[::-1], [4, 1, 2, 3, 0, 5, 6, 7, 8, 9, 10, 11]]
    placement = Placement.from_json(rows, spec.num_experts, num_ranks=4, num_nodes=1)
    plan = write_plan(spec, placement)
    with pytest.raises(
        PlacerError, match=r"MoE layer 1: .*router groups \[0, 1\]"
    ) as caught:
        export_checkpoint(plan, model, tmp_path / "out")
    again = "placer solve TRACE --nodes 1 --gpus-per-node 4 --redundant-experts 0 --out NEW"
    assert f"{again} --preserve-groups" in caught.value.hint
    assert f"placer export sglang {plan} {model} --out map.json" in caught.value.hint

"""What a plan changes in a checkpoint, from the names and shapes of tensors alone.

Exports of whole checkpoints are in ``test_checkpoint_families.py`` and beside it; here each
rule and each refusal has one small case.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.checkpoint.permutation import (
    TensorChanges,
    require_whole_groups,
    tensor_changes,
)
from placer.checkpoint.shard import TensorInfo
from placer.errors import PlacerError
from placer.model import Architecture, ModelSpec

Shapes = dict[str, tuple[str, list[int]]]
BITS = {"BF16": 16, "F16": 16, "F32": 32, "F4": 4, "I32": 32, "I64": 64, "U8": 8}
#: Layers 1 and 2 are MoE layers, of 4 and of 6 experts; new expert e is old expert row[e].
ROWS = [[2, 0, 3, 1], [1, 0, 2, 3, 5, 4]]


def changes(
    shapes: Shapes,
    family: str = "qwen3_moe",
    layers: tuple[int, ...] = (1, 2),
    rows: list[list[int]] = ROWS,
    num_layers: int = 3,
) -> TensorChanges:
    """Return the changes of a checkpoint whose tensors follow each other in one file."""
    config = {"model_type": family, "num_hidden_layers": num_layers, "n_layers": num_layers}
    tensors, start = {}, 24
    for name, (dtype, shape) in shapes.items():
        stop = start + math.prod(shape) * BITS[dtype] // 8
        tensors[name] = TensorInfo(dtype=dtype, shape=tuple(shape), start=start, stop=stop)
        start = stop
    sizes = tuple(len(row) for row in rows)
    return tensor_changes(
        tensors,
        Architecture.of(config, Path("config.json")),
        config,
        ModelSpec(num_experts=sizes, top_k=1, layer_ids=layers),
        [np.array(row) for row in rows],
    )


def experts(
    layer: int, number: int, block: str = "model.layers.{layer}.mlp", *parts: str
) -> Shapes:
    """Return the router and the experts of a layer, of two projections each."""
    stem = block.format(layer=layer)
    return {f"{stem}.gate.weight": ("BF16", [number, 8])} | {
        f"{stem}.experts.{e}.{part}.weight": ("BF16", [4, 8])
        for e in range(number)
        for part in parts or ("up_proj", "down_proj")
    }


def whole() -> Shapes:
    return {
        "model.embed_tokens.weight": ("BF16", [9, 8]),
        "model.layers.0.mlp.up_proj.weight": ("BF16", [4, 8]),
        "model.layers.1.self_attn.q_proj.weight": ("BF16", [8, 8]),
        **experts(1, 4),
        **experts(2, 6),
        **experts(3, 4),  # behind the last layer
    }


def test_experts_get_the_numbers_of_the_plan_and_routers_its_rows() -> None:
    found = changes(whole())
    expected = {}
    for layer, row in zip((1, 2), ROWS, strict=True):
        for new, old in enumerate(row):
            for part in ("up_proj", "down_proj"):
                stem = f"model.layers.{layer}.mlp.experts"
                if new != old:
                    one = f"{stem}.{old}.{part}.weight"
                    expected[one] = f"{stem}.{new}.{part}.weight"
    assert found.names == expected
    rows = {name: row.tolist() for name, row in found.rows.items()}
    assert rows == {f"model.layers.{n + 1}.mlp.gate.weight": ROWS[n] for n in range(2)}
    assert not found.columns
    assert not found.tables


@pytest.mark.parametrize(("layers", "num_layers"), [((0, 1), 2), ((0, 2), 3)])
def test_the_first_layer_may_be_an_moe_layer(
    layers: tuple[int, ...], num_layers: int
) -> None:
    shapes = experts(layers[0], 4) | experts(layers[1], 6)
    found = changes(shapes, layers=layers, num_layers=num_layers)
    assert found.names["model.layers.0.mlp.experts.2.up_proj.weight"] == (
        "model.layers.0.mlp.experts.0.up_proj.weight"
    )
    assert found.rows["model.layers.0.mlp.gate.weight"].tolist() == ROWS[0]
    assert found.rows[f"model.layers.{layers[1]}.mlp.gate.weight"].tolist() == ROWS[1]


def test_a_model_of_one_layer() -> None:
    found = changes(experts(0, 4), layers=(0,), rows=ROWS[:1], num_layers=1)
    assert len(found.names) == 8


def test_shared_experts_and_layers_that_predict_ahead_stay() -> None:
    beside: Shapes = {
        "model.layers.1.mlp.shared_experts.up_proj.weight": ("BF16", [4, 8]),
        "mtp.layers.0.mlp.experts.0.up_proj.weight": ("BF16", [4, 8]),
        "model.layers.1.mlp.gate.e_score_correction_bias": ("F32", [4]),
        "model.layers.2.mlp.gate.e_score_correction_bias": ("F32", [1, 6]),
    }
    found = changes(whole() | beside, "deepseek_v3")
    assert not set(found.names) & set(beside)
    assert {name: row.tolist() for name, row in found.rows.items() if "bias" in name} == {
        f"model.layers.{n + 1}.mlp.gate.e_score_correction_bias": ROWS[n] for n in range(2)
    }


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.layers.1.mlp.odd.weight", "no rule of its family names it"),
        ("model.layers.1.mlp.experts.4.up_proj.weight", "the layer has 4 experts"),
        ("model.layers.2.mlp.experts.6.up_proj.weight", "the layer has 6 experts"),
        ("model.layers.0.mlp.gate.weight", "layer 0 is not an MoE layer by the config"),
        ("model.layers.0.mlp.expert_bias", "layer 0 is not an MoE layer by the config"),
        ("model.experts.0.weight", "no rule of its family names it"),
    ],
)
def test_what_may_depend_on_the_order_of_experts_is_not_guessed(
    name: str, reason: str
) -> None:
    with pytest.raises(PlacerError) as caught:
        changes(whole() | {name: ("BF16", [4, 8])})
    assert caught.value.message == f"tensor {name} cannot be classified: {reason}"
    assert "qwen3_moe" in caught.value.hint


def test_an_adapter_is_named() -> None:
    name = "model.layers.1.mlp.odd.lora_A.weight"
    with pytest.raises(PlacerError, match="belongs to a LoRA adapter"):
        changes(whole() | {name: ("BF16", [4, 8])})


def fused(layer: int, number: int) -> Shapes:
    stem = f"model.layers.{layer}.mlp"
    return {
        f"{stem}.router.weight": ("BF16", [number, 8]),
        f"{stem}.router.bias": ("BF16", [number]),
        f"{stem}.experts.gate_up_proj": ("BF16", [number, 8, 4]),
        f"{stem}.experts.down_proj": ("BF16", [1, number, 8, 4]),
        f"{stem}.experts.down_proj_bias": ("BF16", [1]),  # one number for all
    }


def test_tensors_of_all_experts_are_cut_into_one_block_for_each() -> None:
    found = changes(fused(1, 4) | fused(2, 6), "gpt_oss")
    assert not found.names
    assert {name: row.tolist() for name, row in found.rows.items()} == {
        f"model.layers.{layer}.mlp.{part}": row
        for layer, row in zip((1, 2), ROWS, strict=True)
        for part in (
            *("router.weight", "router.bias"),
            *("experts.gate_up_proj", "experts.down_proj"),
        )
    }


@pytest.mark.parametrize(
    ("part", "dtype", "shape", "reason"),
    [
        ("experts.gate_up_proj", "BF16", [8, 4, 4], "its shape is [8, 4, 4], not [4, ...]"),
        ("experts.gate_up_proj", "BF16", [1, 1, 8], "its shape is [1, 1, 8], not [4, ...]"),
        ("router.weight", "BF16", [8, 4], "its shape is [8, 4], not [4, ...]"),
        ("router.weight", "BF16", [1, 4], "its shape is [1, 4], not [4, ...]"),
        ("experts.gate_up_proj", "F4", [4, 3], "its rows do not end at a byte"),
    ],
)
def test_blocks_that_do_not_fit_the_experts_are_refused(
    part: str, dtype: str, shape: list[int], reason: str
) -> None:
    name = f"model.layers.1.mlp.{part}"
    with pytest.raises(PlacerError) as caught:
        changes(fused(1, 4) | fused(2, 6) | {name: (dtype, shape)}, "gpt_oss")
    assert caught.value.message == f"tensor {name} cannot be classified: {reason}"


def stacked(rows: int) -> Shapes:
    stem = "transformer.blocks.0.ffn"
    return {
        f"{stem}.router.layer.weight": ("BF16", [4, 8]),
        f"{stem}.experts.mlp.w1": ("BF16", [rows, 8]),
    }


def test_experts_one_after_the_other_have_as_many_rows_each() -> None:
    given: Any = {"layers": (0,), "rows": ROWS[:1], "num_layers": 1}
    found = changes(stacked(12), "dbrx", **given)
    assert found.rows["transformer.blocks.0.ffn.experts.mlp.w1"].tolist() == ROWS[0]
    with pytest.raises(PlacerError, match=r"its shape is \[13, 8\], not \[4, \.\.\.\]"):
        changes(stacked(13), "dbrx", **given)


def test_a_table_of_numbers_gets_the_new_ones() -> None:
    block = "layers.{layer}.ffn"
    shapes = experts(1, 4, block) | experts(2, 6, block)
    table = "layers.1.ffn.gate.tid2eid"
    found = changes(shapes | {table: ("I64", [9, 2])}, "deepseek_v4")
    assert {name: one.tolist() for name, one in found.tables.items()} == {
        table: [ROWS[0].index(old) for old in range(4)]
    }
    assert table not in found.rows
    with pytest.raises(PlacerError, match="F32 is not a whole number"):
        changes(shapes | {table: ("F32", [9, 2])}, "deepseek_v4")


def packed(number: int, **parts: tuple[str, list[int]]) -> Shapes:
    """Return a layer whose router GPTQ packed into columns."""
    shapes = experts(1, number)
    del shapes["model.layers.1.mlp.gate.weight"]
    given = {"qweight": ("I32", [2, number]), "scales": ("F16", [3, number])} | parts
    return shapes | {f"model.layers.1.mlp.gate.{n}": one for n, one in given.items()}


def packed_changes(number: int, **parts: tuple[str, list[int]]) -> TensorChanges:
    row = [*range(1, number), 0]
    return changes(packed(number, **parts), layers=(1,), rows=[row])


@pytest.mark.parametrize(
    ("number", "zeros"),
    [
        (8, ("I32", [3, 1])),  # 4 bits each
        (16, ("I32", [3, 1])),  # 2 bits
        (4, ("I32", [3, 1])),  # 8 bits
        (4, ("F16", [3, 4])),
        (4, ("U8", [5, 4])),
        (4, ("I32", [5, 4])),
    ],
)
def test_a_router_of_gptq_moves_by_columns(
    number: int, zeros: tuple[str, list[int]]
) -> None:
    found = packed_changes(number, qzeros=zeros)
    gate = "model.layers.1.mlp.gate."
    assert found.columns == {
        gate + "qweight": 2,
        gate + "scales": 3,
        gate + "qzeros": zeros[1][0],
    }
    assert all(found.rows[name][-1] == 0 for name in found.columns)


@pytest.mark.parametrize(
    ("number", "part", "dtype", "shape"),
    [
        (4, "qweight", "I32", [4]),
        (4, "qweight", "I32", [2, 2, 4]),
        (4, "qweight", "I32", [2, 5]),
        (4, "qweight", "I32", [2, 8]),
        (4, "scales", "I64", [2, 4]),
        (4, "qweight", "I32", [0, 4]),
        (4, "scales", "F16", [3, 2]),  # 8 bits each, but no zero points
        (2, "qzeros", "I32", [3, 1]),  # 16 bits are not packed
        (32, "qzeros", "I32", [3, 3]),  # 3 bits share bytes
        (7, "qzeros", "I32", [1, 1]),  # 4 bits each, and 4 are left
    ],
)
def test_columns_that_are_not_one_for_each_expert_are_refused(
    number: int, part: str, dtype: str, shape: list[int]
) -> None:
    with pytest.raises(PlacerError) as caught:
        packed_changes(number, **{part: (dtype, shape)})
    name = f"model.layers.1.mlp.gate.{part}"
    reason = f"its shape is {shape}, not [..., {number}]"
    assert caught.value.message == f"tensor {name} cannot be classified: {reason}"


def without(shapes: Shapes, *words: str) -> Shapes:
    return {
        name: one for name, one in shapes.items() if not any(word in name for word in words)
    }


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            without(whole(), "layers.2.mlp.experts.3.up"),
            "layer 2: the checkpoint lacks up_proj of expert 3",
        ),
        (
            without(whole(), "layers.1.mlp.experts.0.", "layers.2.mlp.experts.0."),
            "layer 1: the checkpoint lacks up_proj of expert 0",
        ),
        (
            without(whole(), "layers.2.mlp.gate"),
            "layer 2: the checkpoint lacks its router",
        ),
        (
            without(whole(), "layers.2.mlp.experts"),
            "layer 2: the checkpoint lacks its experts",
        ),
        (
            without(whole(), "layers.2.mlp"),
            "layer 2: the checkpoint lacks its experts",
        ),
        # Other experts, and other layers, have something of their own.
        (
            without(whole(), "layers.1.mlp.experts.2.up")
            | {
                "model.layers.1.mlp.experts.3.approx_value": ("BF16", [8]),
                "model.layers.2.mlp.experts.2.approx_value": ("BF16", [8]),
            },
            "layer 1: the checkpoint lacks up_proj of expert 2",
        ),
        (
            without(whole(), "layers.1.mlp.experts.2")
            | {"model.layers.1.mlp.experts.2.approx_value": ("BF16", [8])},
            "layer 1: expert 2 has approx_value where other experts have up_proj: "
            "it is an approximated expert (MoNE)",
        ),
    ],
)
def test_what_a_layer_lacks_is_named(shapes: Shapes, message: str) -> None:
    with pytest.raises(PlacerError) as caught:
        changes(shapes)
    assert caught.value.message == message


def test_a_single_expert_may_be_left_out_of_quantisation() -> None:
    shapes = without(whole(), "layers.1.mlp.experts.2.up")
    shapes["model.layers.1.mlp.experts.2.up_proj.weight_packed"] = ("U8", [4, 4])
    found = changes(shapes)
    old = "model.layers.1.mlp.experts.2.up_proj.weight_packed"
    assert found.names[old] == old.replace("experts.2", "experts.0")


def test_projections_may_stand_before_the_expert() -> None:
    """As unsloth writes gpt-oss."""

    def split(layer: int, number: int) -> Shapes:
        stem = f"model.layers.{layer}.mlp"
        return {f"{stem}.router.weight": ("BF16", [number, 8])} | {
            f"{stem}.experts.{part}.{e}.weight": ("BF16", [4, 8])
            for part in ("gate_up_projs", "down_projs")
            for e in range(number)
        }

    shapes = split(1, 4) | split(2, 6)
    found = changes(shapes, "gpt_oss")
    stem = "model.layers.1.mlp.experts.down_projs"
    assert found.names[f"{stem}.2.weight"] == f"{stem}.0.weight"
    del shapes[f"{stem}.1.weight"]
    with pytest.raises(PlacerError, match=r"lacks down_projs\.weight of expert 1$"):
        changes(shapes, "gpt_oss")


@pytest.mark.parametrize(
    ("n_group", "row", "mixed"),
    [
        (1, [3, 2, 0, 1, 7, 6, 4, 5], None),
        (1, [0, 7, 2, 3, 4, 5, 6, 1], None),
        (2, [7, 4, 5, 6, 3, 2, 1, 0], None),
        (2, [0, 1, 2, 4, 3, 5, 6, 7], "[0, 1]"),
        (4, [3, 2, 0, 1, 7, 6, 4, 5], None),
        (4, [0, 1, 2, 3, 4, 6, 5, 7], "[2, 3]"),
        (8, [3, 2, 0, 1, 7, 6, 4, 5], None),
    ],
)
def test_router_groups_stay_whole(n_group: int, row: list[int], mixed: str | None) -> None:
    model = ModelSpec(
        num_experts=(8, 8), top_k=1, n_group=n_group, topk_group=1, model_type="of tests"
    )
    both = [np.arange(8), np.array(row)]
    if mixed is None:
        require_whole_groups(model, both)
        return
    with pytest.raises(PlacerError) as caught:
        require_whole_groups(model, both)
    assert f"MoE layer 1: the plan mixes router groups {mixed}," in caught.value.message
    assert f"picks among {n_group} groups" in caught.value.message

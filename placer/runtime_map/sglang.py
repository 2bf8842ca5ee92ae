"""SGLang: the file of ``--init-expert-location``.

Facts from SGLang 0.5.23, ``srt/eplb/expert_location.py``: a JSON object is passed on as
keyword arguments, so it holds ``physical_to_logical_map`` and nothing else; one row per
hidden layer of the model, dense layers included; slot p is on rank p // (P / ep_size).
SGLang checks none of this itself.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from placer.errors import PlacerError
from placer.files import atomic_file, read_json
from placer.model import Architecture, ModelSpec, require_same_model
from placer.plan import Placement, Plan

# Model types whose SGLang class has get_model_config_for_expert_location; for any other the
# map is silently ignored. gpt_oss has it too, but loads MXFP4 experts contiguously all the
# same, so it is not among them.
READS_MAP = frozenset(
    {
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v4",
        "glm4_moe",
        "qwen2_moe",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_5_moe",
        "qwen3_vl_moe",
        "minimax_m2",
        "nemotron_h",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangMap:
    """A written map and how to start SGLang with it.

    Attributes
    ----------
    num_rows
        Hidden layers of the model, one row each.
    flags
        Flags of ``python -m sglang.launch_server``, quoted for a shell.
    conditions
        When SGLang would ignore the map, or it could do no good.
    warnings
        What is wrong for this very model, or rests on shapes alone.
    """

    num_rows: int
    flags: str
    conditions: tuple[str, ...]
    warnings: tuple[str, ...]


def export_sglang(plan_path: Path, directory: Path, out: Path) -> SglangMap:
    """Write the map of a plan.

    Parameters
    ----------
    plan_path
        The plan.
    directory
        The model: its config says how many hidden layers there are and which are dense.
    out
        The ``.json`` file to write; SGLang knows the format by that suffix.

    Raises
    ------
    PlacerError
        If plan and model differ, layers have different numbers of slots, or ``out`` has
        another suffix.
    """
    plan = Plan.read(plan_path)
    model = ModelSpec.from_checkpoint(directory)
    warning = require_same_model(plan.model, str(plan_path), model, str(directory))
    if out.suffix != ".json":
        raise PlacerError(
            f"SGLang reads a map of {out} only if it ends in .json", f"--out {out}.json"
        )
    config = read_json(directory / "config.json", "model config")
    rows = _rows(
        plan.placement, model, Architecture.of(config, directory).num_hidden_layers(config)
    )
    with atomic_file(out) as temporary:
        temporary.write_text(json.dumps({"physical_to_logical_map": rows}) + "\n")
    warnings = [] if warning is None else [warning]
    if model.model_type not in READS_MAP:
        warnings.append(
            f"SGLang ignores a map for {model.model_type}: serve a permuted checkpoint, "
            f"placer export checkpoint {plan_path} {directory} --out DIR"
        )
    return SglangMap(
        num_rows=len(rows),
        flags=_flags(plan.placement, out),
        conditions=(
            "with --moe-a2a-backend none every token goes to every rank: "
            "placement cannot cut traffic there",
            "drafted (MTP) layers beyond the map use the identity",
            "--enable-eplb would replace the map at its first rebalance",
            "SGLang checks neither the map nor the flags: both must be of this plan",
        ),
        warnings=tuple(warnings),
    )


def _rows(
    placement: Placement, model: ModelSpec, num_hidden_layers: int
) -> list[list[int]]:
    """Return one row per hidden layer; a dense layer's is a valid filler, never used."""
    widths = {len(row) for row in placement.physical_to_logical_map}
    if len(widths) > 1 or len(set(model.num_experts)) > 1:
        raise PlacerError(
            "SGLang's map needs the same number of slots in every layer, "
            f"got {sorted(widths)}",
            "solve with --redundant-experts 0, or, where layers differ in experts, serve a "
            "permuted checkpoint: placer export checkpoint",
        )
    num_slots, num_experts = widths.pop(), model.num_experts[0]
    filler = _filler(num_slots, num_experts, placement.num_ranks)
    ordinal = {layer: n for n, layer in enumerate(model.layer_ids or ())}
    return [
        placement.physical_to_logical_map[ordinal[layer]].tolist()
        if layer in ordinal
        else filler
        for layer in range(num_hidden_layers)
    ]


def _filler(num_slots: int, num_experts: int, num_ranks: int) -> list[int]:
    """Return a row without two copies of one expert on a rank: every rank counts on."""
    row = [slot % num_experts for slot in range(num_slots)]
    Placement(
        physical_to_logical_map=(np.asarray(row, dtype=np.int64),),
        num_experts=(num_experts,),
        num_ranks=num_ranks,
    )
    return row


def _flags(placement: Placement, out: Path) -> str:
    redundant = len(placement.physical_to_logical_map[0]) - placement.num_experts[0]
    # With this backend SGLang sets ep_size to tp_size, whatever --ep-size says.
    parts: list[Any] = ["--init-expert-location", out, "--moe-a2a-backend", "deepep"]
    parts += ["--tp-size", placement.num_ranks, "--ep-size", placement.num_ranks]
    if redundant:
        parts += ["--ep-num-redundant-experts", redundant]
    if placement.num_nodes > 1:
        parts += ["--nnodes", placement.num_nodes]
    return shlex.join(str(part) for part in parts)

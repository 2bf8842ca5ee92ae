"""TensorRT-LLM: the file of ``moe_config.load_balancer``.

Facts from ``MoeLoadBalancerConfig`` (``tensorrt_llm/llmapi/llm_args.py``) and
``examples/wide_ep/ep_load_balancer``: ``num_slots``, divisible by the expert-parallel size;
``layer_updates_per_iter``, 0 for a placement that stays; ``initial_global_assignments`` by
the model's own layer number, ``num_slots`` experts each, consecutive slots on one rank. A
layer that is missing is a KeyError at start, that of multi-token prediction included
(NVIDIA/TensorRT-LLM#13974); an unknown key is refused.

What placer writes is YAML so plain that no library is needed; it reads any YAML.
"""

import json
from pathlib import Path
from typing import Any

from placer.errors import PlacerError
from placer.run.documents import parse_yaml
from placer.run.files import read_text
from placer.runtime_map.runtime import (
    MapSource,
    ParsedMap,
    Runtime,
    require_integers,
    require_same_width,
    require_valid_rows,
    whole_number,
)

_ASSIGNMENTS = "initial_global_assignments"
_KEYS = ("num_slots", "layer_updates_per_iter", _ASSIGNMENTS)
# Where the map may be in a file of TensorRT-LLM's options.
_OUTER_KEYS = ("moe_config", "load_balancer")


def _layers(source: MapSource) -> tuple[int, ...]:
    """Return the layers that TensorRT-LLM requires: the MoE layers, then the MTP layers."""
    first = source.num_hidden_layers
    return (
        *(source.model.layer_ids or ()),
        *range(first, first + source.num_mtp_layers),
    )


def _write(source: MapSource, path: Path, _suffix: str) -> None:
    rows = source.uniform_rows("TensorRT-LLM")
    rows += [source.filler()] * source.num_mtp_layers
    lines = [f"num_slots: {len(rows[0])}", "layer_updates_per_iter: 0", f"{_ASSIGNMENTS}:"]
    lines += [
        f"  {layer}: {json.dumps(row)}"
        for layer, row in zip(_layers(source), rows, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _read(source: MapSource, path: Path, _suffix: str) -> list[list[int]]:
    scalars, assignments = parse_assignments(path)
    num_slots = scalars.get("num_slots")
    if num_slots is None or scalars.get("layer_updates_per_iter") != 0:
        raise PlacerError(
            "the map needs num_slots, and layer_updates_per_iter must be 0, else "
            f"TensorRT-LLM moves experts: {scalars}"
        )
    layers = _layers(source)
    missing = [layer for layer in layers if layer not in assignments]
    if missing or len(assignments) > len(layers):
        raise PlacerError(
            f"layers {sorted(assignments)} are assigned, the model's are "
            f"{sorted(layers)}; TensorRT-LLM stops if a layer is missing"
        )
    rows = [assignments[layer] for layer in layers]
    require_same_width(rows, num_slots, "assignment")
    num_experts = source.model.num_experts[0]
    require_valid_rows(rows, (num_experts,) * len(rows), source.placement.num_ranks)
    return rows[: source.model.num_layers]


def _parse(path: Path, _suffix: str) -> ParsedMap:
    _, assignments = parse_assignments(path)
    layers = sorted(assignments)
    if not layers:
        raise PlacerError("it assigns no layer")
    return ParsedMap(rows=[assignments[n] for n in layers], layer_ids=tuple(layers))


def parse_assignments(path: Path) -> tuple[dict[str, int], dict[int, list[int]]]:
    """Return the numbers of a map and the experts in the slots of each layer.

    The file is that of ``load_balancer``, or TensorRT-LLM's options with it inside.

    Raises
    ------
    PlacerError
        If it is no YAML, holds another key, or a layer is not a list of whole numbers.
    """
    value = parse_yaml(read_text(path, what="map"), f"map {path.name}")
    for key in _OUTER_KEYS:
        if isinstance(value, dict) and key in value:
            value = value[key]
    if not isinstance(value, dict):
        raise PlacerError(f"it holds {type(value).__name__}, not {', '.join(_KEYS)}")
    if odd := [key for key in value if key not in _KEYS]:
        raise PlacerError(f"TensorRT-LLM refuses unknown keys: {odd[0]!r}")
    assignments = value.get(_ASSIGNMENTS) or {}
    if isinstance(assignments, dict):
        assignments = _numbered(assignments)
    scalars = {key: value[key] for key in _KEYS if key != _ASSIGNMENTS and key in value}
    if not isinstance(assignments, dict) or any(
        type(number) is not int for number in (*scalars.values(), *assignments)
    ):
        raise PlacerError(f"{', '.join(_KEYS[:2])} and layer numbers must be whole numbers")
    return scalars, {
        layer: require_integers(row, f"layer {layer}") for layer, row in assignments.items()
    }


def _numbered(assignments: dict[Any, Any]) -> dict[Any, Any]:
    """Return layer numbers that are texts, as JSON spells keys, as TensorRT-LLM does."""
    found = {whole_number(layer): row for layer, row in assignments.items()}
    if len(found) < len(assignments):
        raise PlacerError(f"{_ASSIGNMENTS} has a layer twice, as number and as text")
    return found


TRTLLM = Runtime(
    needs_model=True,
    write=_write,
    read=_read,
    parse=_parse,
    family="trtllm",
)

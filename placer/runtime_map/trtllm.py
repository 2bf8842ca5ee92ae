"""TensorRT-LLM: the file of ``moe_config.load_balancer``.

Facts from ``MoeLoadBalancerConfig`` (``tensorrt_llm/llmapi/llm_args.py``) and
``examples/wide_ep/ep_load_balancer``: ``num_slots``, divisible by the expert-parallel size;
``layer_updates_per_iter``, 0 for a placement that stays; ``initial_global_assignments`` by
the model's own layer number, ``num_slots`` experts each, consecutive slots on one rank. A
layer that is missing is a KeyError at start, that of multi-token prediction included
(NVIDIA/TensorRT-LLM#13974); an unknown key is refused.

The file is YAML so plain that no library is needed to write it, or to read it back.
"""

import json
import re
from pathlib import Path

from placer.errors import PlacerError
from placer.run.documents import parse_json
from placer.run.files import read_text
from placer.runtime_map.runtime import (
    MapSource,
    ParsedMap,
    Runtime,
    require_integers,
    require_same_width,
    require_valid_rows,
)

_SCALAR = re.compile(r"(num_slots|layer_updates_per_iter): (\d{1,9})")
_LAYER = re.compile(r"  (\d{1,9}): (\[[\d, ]*\])")
_ASSIGNMENTS = "initial_global_assignments:"


def _layers(source: MapSource) -> tuple[int, ...]:
    """Return the layers that TensorRT-LLM asks for: the MoE layers, then those of MTP."""
    first = source.num_hidden_layers
    return (
        *(source.model.layer_ids or ()),
        *range(first, first + source.num_mtp_layers),
    )


def _write(source: MapSource, path: Path, _suffix: str) -> None:
    rows = source.uniform_rows("TensorRT-LLM")
    rows += [source.filler()] * source.num_mtp_layers
    lines = [f"num_slots: {len(rows[0])}", "layer_updates_per_iter: 0", _ASSIGNMENTS]
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
            "num_slots must be given and layer_updates_per_iter be 0, else TensorRT-LLM "
            f"moves experts: {scalars}"
        )
    layers = _layers(source)
    missing = [layer for layer in layers if layer not in assignments]
    if missing or len(assignments) > len(layers):
        raise PlacerError(
            f"layers {sorted(assignments)} are assigned, the model's are {sorted(layers)}; "
            "TensorRT-LLM stops at a layer that is missing"
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

    Raises
    ------
    PlacerError
        If a line is none that placer writes.
    """
    scalars: dict[str, int] = {}
    assignments: dict[int, list[int]] = {}
    inside = False
    for number, line in enumerate(read_text(path, what="map").splitlines(), 1):
        if line == _ASSIGNMENTS:
            inside = True
        elif (found := _SCALAR.fullmatch(line)) and found[1] not in scalars:
            scalars[found[1]], inside = int(found[2]), False
        elif inside and (found := _LAYER.fullmatch(line)):
            if int(found[1]) in assignments:
                raise PlacerError(f"line {number}: layer {found[1]} stands twice")
            assignments[int(found[1])] = _numbers(found[2], number)
        else:
            raise PlacerError(
                f"line {number} is none that placer writes, and TensorRT-LLM refuses "
                f"unknown keys: {line[:60]!r}"
            )
    return scalars, assignments


def _numbers(text: str, line: int) -> list[int]:
    return require_integers(parse_json(text, f"line {line}"), f"line {line}")


TRTLLM = Runtime(
    suffixes=(".yaml", ".yml"),
    needs_model=True,
    write=_write,
    read=_read,
    parse=_parse,
    family="trtllm",
)

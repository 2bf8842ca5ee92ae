"""vllm-ascend: the file of ``eplb_config.expert_map_path``.

Facts from ``vllm_ascend/eplb/core/eplb_utils.py`` and ``ascend_config.py``: layers and
devices are read by their place in the lists, never by ``layer_id`` or ``device_id``; all
devices of a layer list the same number of experts; the redundancy is what is listed beyond
the experts. A second replica on one device would hide the first. Numbers may be the model's
own, but must rise: where they contradict the places, what was meant is unknown.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from placer.errors import PlacerError
from placer.run.documents import read_json
from placer.runtime_map.runtime import (
    MapSource,
    ParsedMap,
    Runtime,
    require_integers,
    require_rows,
    require_same_width,
    whole_number,
)


def _write(source: MapSource, path: Path, _suffix: str) -> None:
    size = source.placement.num_ranks
    layers = []
    for ordinal, row in enumerate(source.uniform_rows("vllm-ascend")):
        width = len(row) // size
        devices = [
            {"device_id": rank, "device_expert": row[rank * width : (rank + 1) * width]}
            for rank in range(size)
        ]
        layers.append({"layer_id": ordinal, "device_count": size, "device_list": devices})
    value = {"moe_layer_count": len(layers), "layer_list": layers}
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")


def _read(source: MapSource, path: Path, _suffix: str) -> list[list[int]]:
    value = read_json(path, "map")
    try:
        layers = value["layer_list"]
        if (
            value["moe_layer_count"] != len(layers)
            or len(layers) != source.model.num_layers
        ):
            raise PlacerError(
                f"moe_layer_count is {value['moe_layer_count']} and {len(layers)} layers "
                f"are listed; the model has {source.model.num_layers} MoE layers"
            )
        require_integers([value["moe_layer_count"]], "moe_layer_count")
        ids = _layer_ids(layers)
        if ids not in (None, source.model.layer_ids):
            raise PlacerError(
                f"its values of layer_id are {[*ids]}. They neither count from 0 nor are "
                "the MoE layers of the model"
            )
        rows = [_layer(one, ordinal, source) for ordinal, one in enumerate(layers)]
    except (KeyError, TypeError) as error:
        raise PlacerError(f"it lacks a field: {error}") from error
    require_same_width(rows, len(rows[0]), "layer")
    return rows


def _parse(path: Path, _suffix: str) -> ParsedMap:
    try:
        layers = read_json(path, "map")["layer_list"]
        held = [[one["device_expert"] for one in layer["device_list"]] for layer in layers]
        layer_ids = _layer_ids(layers)
    except (KeyError, TypeError) as error:
        raise PlacerError(f"it lacks a field: {error}") from error
    rows = [
        [expert for experts in require_rows(layer, f"layer {n}") for expert in experts]
        for n, layer in enumerate(held)
    ]
    return ParsedMap(rows=rows, layer_ids=layer_ids)


def _layer_ids(layers: Any) -> tuple[int, ...] | None:
    """Return the model's own numbers of the layers; ``None`` where they count from 0."""
    ids = [whole_number(one["layer_id"]) for one in layers]
    require_integers(ids, "layer_id")
    if ids == [*range(len(ids))]:
        return None
    if any(one >= other for one, other in pairwise([-1, *ids])):
        raise PlacerError(
            f"its values of layer_id are {ids}, but vllm-ascend reads layers in order",
            "if layer_id is right, sort them: "
            "jq '.layer_list |= sort_by(.layer_id)' MAP > SORTED",
        )
    return tuple(ids)


def _layer(value: Any, ordinal: int, source: MapSource) -> list[int]:
    """Return the slots of a layer, device after device."""
    devices = value["device_list"]
    size = source.placement.num_ranks
    ids = [one["device_id"] for one in devices]
    numbers = [value["device_count"], *ids]
    require_integers(numbers, f"device_count or device_id of layer {ordinal}")
    if not value["device_count"] == len(devices) == size:
        raise PlacerError(
            f"layer {ordinal} has device_count {value['device_count']} and {len(devices)} "
            f"devices; the plan has {size} ranks"
        )
    if ids != list(range(size)):
        raise PlacerError(
            f"layer {ordinal}: values of device_id are {ids}, but vllm-ascend reads "
            "devices in order",
            "if device_id is right, sort them: "
            "jq '.layer_list[].device_list |= sort_by(.device_id)' MAP > SORTED",
        )
    held = [
        require_integers(one["device_expert"], f"layer {ordinal}, device_expert")
        for one in devices
    ]
    require_same_width(held, len(held[0]), f"layer {ordinal}, device")
    return [expert for one in held for expert in one]


VLLM_ASCEND = Runtime(
    needs_model=True,
    write=_write,
    read=_read,
    parse=_parse,
    family="vllm-ascend",
)

"""vLLM: maps that no release reads, of a proposal and of a vendor's plugin.

``vllm-pr49572`` is the file of ``eplb_config.initial_expert_map_path``, proposed in
vllm-project/vllm#49572: one row of slots for each MoE layer. ``vllm-das`` is the file of
``eplb_config.expert_map_path`` of HYGON-AI/vllm-plugin-das (merged as #69;
``model_executor/layers/fused_moe/static_eplb.py``): ``version`` 2 and ``model_maps``, by
the class of the model, with a separate entry for multi-token prediction (MTP). It refuses a
map of another shape, and a model whose class is missing.
"""

import json
from pathlib import Path
from typing import Any

from placer.errors import PlacerError
from placer.run.documents import parse_json, read_json, require_object
from placer.run.files import read_text
from placer.runtime_map.runtime import (
    MapSource,
    ParsedMap,
    Runtime,
    require_rows,
    require_same_width,
    require_valid_rows,
)

_ROWS = "physical_to_logical_map"
# Classes that draft tokens (vllm 0.32.0: model_executor/models/registry.py). That the
# plugin looks a map up by them was not tried.
_MTP_CLASSES = {
    "DeepseekV3ForCausalLM": "DeepSeekMTP",
    "Glm4MoeForCausalLM": "Glm4MoeMTP",
    "HYV4ForCausalLM": "HYV4MTP",
    "Qwen3NextForCausalLM": "Qwen3NextMTP",
}


def _write_rows(source: MapSource, path: Path, _suffix: str) -> None:
    path.write_text(json.dumps(source.uniform_rows("vLLM")) + "\n", encoding="utf-8")


def _rows(path: Path, _suffix: str) -> list[list[int]]:
    rows = require_rows(parse_json(read_text(path, what="map"), "map"), "the map")
    require_same_width(rows, len(rows[0]), "row")
    return rows


def _read_rows(source: MapSource, path: Path, suffix: str) -> list[list[int]]:
    return _of_model(_rows(path, suffix), source)


def _write_das(source: MapSource, path: Path, _suffix: str) -> None:
    name = _class_of(source)
    maps = {name: {_ROWS: source.uniform_rows("vllm-das")}}
    if source.num_mtp_layers and name in _MTP_CLASSES:
        maps[_MTP_CLASSES[name]] = {_ROWS: [source.filler()] * source.num_mtp_layers}
    value = {"version": 2, "model_maps": maps}
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")


def _class_of(source: MapSource) -> str:
    if not source.architectures:
        raise PlacerError(
            "config.json names no architectures, and vllm-das finds a map by them",
            'add them to config.json: "architectures": ["...ForCausalLM"]',
        )
    return source.architectures[0]


def _maps(path: Path) -> dict[str, Any]:
    value = read_json(path, "map")
    if type(value.get("version")) is not int or value["version"] != 2:
        raise PlacerError(f"its version is {value.get('version')!r}, not 2")
    return require_object(value.get("model_maps"), "model_maps")


def _rows_of(maps: dict[str, Any], name: str) -> list[list[int]]:
    if name not in maps:
        raise PlacerError(f"it has maps of {', '.join(maps)}, and none of {name}")
    rows = require_rows(require_object(maps[name], name).get(_ROWS), f"{name}.{_ROWS}")
    require_same_width(rows, len(rows[0]), f"{name}, row")
    return rows


def _read_das(source: MapSource, path: Path, _suffix: str) -> list[list[int]]:
    maps, name = _maps(path), _class_of(source)
    drafts = _MTP_CLASSES.get(name)
    if source.num_mtp_layers and drafts is not None:
        filled = _rows_of(maps, drafts)
        if len(filled) != source.num_mtp_layers:
            raise PlacerError(
                f"{drafts} has {len(filled)} rows, the model "
                f"{source.num_mtp_layers} layers of multi-token prediction"
            )
        sizes = source.placement.num_experts[:1] * len(filled)
        require_valid_rows(filled, sizes, source.placement.num_ranks)
    return _of_model(_rows_of(maps, name), source)


def _parse_das(path: Path, _suffix: str) -> ParsedMap:
    maps = _maps(path)
    served = [name for name in maps if name not in _MTP_CLASSES.values()]
    if len(served) != 1:
        raise PlacerError(
            f"it has maps of {', '.join(maps) or 'no model'}, not of one and its MTP"
        )
    return ParsedMap(rows=_rows_of(maps, served[0]))


def _of_model(rows: list[list[int]], source: MapSource) -> list[list[int]]:
    if len(rows) != source.model.num_layers:
        raise PlacerError(
            f"it has {len(rows)} rows, the model {source.model.num_layers} MoE layers"
        )
    return rows


PROPOSED = Runtime(
    needs_model=False,
    write=_write_rows,
    read=_read_rows,
    parse=lambda path, suffix: ParsedMap(rows=_rows(path, suffix)),
    status="no release of vLLM reads this file: vllm-project/vllm#49572 proposes it, as "
    "eplb_config.initial_expert_map_path",
)
DAS = Runtime(
    needs_model=True,
    write=_write_das,
    read=_read_das,
    parse=_parse_das,
    status="only HYGON-AI/vllm-plugin-das reads this file (#69), as "
    "eplb_config.expert_map_path; vLLM itself does not",
)

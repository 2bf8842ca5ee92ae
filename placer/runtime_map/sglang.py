"""SGLang: the file of ``--init-expert-location``.

Facts from SGLang 0.5.23, ``srt/eplb/expert_location.py``: a ``.json`` or ``.pt`` file is
passed on as keyword arguments, so it holds ``physical_to_logical_map`` and nothing else;
one row per hidden layer of the model, dense layers included; slot p is on rank
p // (P / ep_size). SGLang checks none of this itself. Rows by themselves, which SGLang does
not load, are read where they are JSON: verification takes such a list for vLLM's.

The order of slots inside a rank is the plan's. SGLang's static choice of a replica does not
depend on it, because candidates are listed by slot and so by rank. That choice is the
replica on the same GPU; else the first on the same node, if other nodes have replicas too;
else a seeded fair choice.
"""

import io
import json
from pathlib import Path
from typing import Any

from placer.errors import PlacerError
from placer.run.archives import load_torch
from placer.run.documents import parse_json
from placer.run.files import read_bytes, require_file
from placer.runtime_map.runtime import (
    MapSource,
    ParsedMap,
    Runtime,
    require_integers,
    require_rows,
    require_same_width,
    require_valid_rows,
)

_KEY = "physical_to_logical_map"


def _write(source: MapSource, path: Path, suffix: str) -> None:
    rows = _rows(source)
    if suffix == ".pt":
        import torch

        # Saved to a path, the archive would hold the name of that path.
        buffer = io.BytesIO()
        torch.save({_KEY: torch.tensor(rows, dtype=torch.int64)}, buffer)
        path.write_bytes(buffer.getvalue())
        return
    path.write_text(json.dumps({_KEY: rows}) + "\n", encoding="utf-8")


def _rows(source: MapSource) -> list[list[int]]:
    """Return one row per hidden layer; a dense layer's is a valid filler, never used."""
    placed = dict(
        zip(source.model.layer_ids or (), source.uniform_rows("SGLang"), strict=True)
    )
    filler = source.filler()
    return [placed.get(layer, filler) for layer in range(source.num_hidden_layers)]


def _parse(path: Path, suffix: str) -> ParsedMap:
    rows = require_rows(_value(path, suffix, any_integers=True), _KEY)
    return ParsedMap(rows=rows, of_hidden_layers=True)


def _value(path: Path, suffix: str, any_integers: bool) -> Any:
    value = (
        _load_pt(path, any_integers)
        if suffix == ".pt"
        else parse_json(read_bytes(path, what="map"), f"map {path}")
    )
    if isinstance(value, str):  # the text that the flag takes, written as JSON
        value = parse_json(value, f"the text in map {path}")
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise PlacerError(f"it holds {type(value).__name__}, not an object or a list")
    if set(value) != {_KEY}:
        raise PlacerError(
            f"SGLang uses every key as an argument: {sorted(map(str, value))}, not "
            f"[{_KEY!r}]"
        )
    return value[_KEY]


def _read(source: MapSource, path: Path, suffix: str) -> list[list[int]]:
    rows = _value(path, suffix, source.any_integers)
    if not isinstance(rows, list) or len(rows) != source.num_hidden_layers:
        raise PlacerError(
            f"{_KEY} has {len(rows) if isinstance(rows, list) else 'no'} rows, the model "
            f"{source.num_hidden_layers} hidden layers"
        )
    rows = [require_integers(row, f"row {n}") for n, row in enumerate(rows)]
    num_experts, num_ranks = source.model.num_experts[0], source.placement.num_ranks
    require_same_width(rows, len(rows[0]), "row")
    require_valid_rows(rows, (num_experts,) * len(rows), num_ranks)
    return [rows[layer] for layer in source.model.layer_ids or ()]


def _load_pt(path: Path, any_integers: bool) -> dict[str, Any]:
    import torch

    require_file(path, "map")
    value = load_torch(path)
    if not isinstance(value, dict):
        raise PlacerError(
            f"it holds {type(value).__name__}, not a dict",
            f"SGLang loads a dict: torch.save({{{_KEY!r}: value}}, FILE)",
        )
    rows = value.get(_KEY)
    if isinstance(rows, torch.Tensor):
        narrow = (torch.uint8, torch.int8, torch.int16, torch.int32)
        if rows.dtype not in (torch.int64, *(narrow if any_integers else ())):
            raise PlacerError(f"{_KEY} is {rows.dtype}, not torch.int64")
        value[_KEY] = rows.tolist()
    return value


SGLANG = Runtime(
    needs_model=True,
    write=_write,
    read=_read,
    parse=_parse,
    family="sglang",
)

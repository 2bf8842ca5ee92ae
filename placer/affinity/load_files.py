"""Reading counts that are bare: matrices of numbers, and CSV."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from placer.affinity.loads import (
    CountedLoads,
    matrix_loads,
    most_experts,
    require_expert,
    whole_counts,
    whole_floats,
)
from placer.errors import PlacerError
from placer.run.archives import (
    UNREADABLE,
    load_array,
    load_arrays,
    unreadable_reason,
    unzipped,
)
from placer.run.documents import parse_json
from placer.run.files import MAX_DOCUMENT_BYTES, open_regular, require_file
from placer.trace.csv_rows import read_table, require_whole
from placer.trace.imported import BoundModel, axes_doubt
from placer.trace.json_rows import layer_number
from placer.trace.sglang_dump import load_dump

_CSV_LAYOUT = (
    "the header is layer,expert,count, or layer_id,expert_id,count, or layer,expert "
    "(docs/importing.md)"
)
_CSV_SLOTS = (
    "check --model or --num-experts; if the ids are slots of an engine with redundant "
    "experts, first add up the counts of each expert's slots"
)
_MATRIX_LAYOUT = (
    "a matrix of counts is .npy, .npz, .pt or .json: [L, E] (docs/importing.md)"
)
# What files call the matrix where it is not all that they hold.
_NAMES = (
    *("logical_count", "expert_counts", "counts", "load", "loads", "expert_load"),
    *("expert_load_window", "expert_load_view", "expert_count", "count"),
)
# Columns of counts of one expert in one layer.
_CSV_NAMES = {
    "layer_idx": "layer_id",
    "layer_index": "layer_id",
    "expert_idx": "expert_id",
    "expert_index": "expert_id",
    **dict.fromkeys(("load", "tokens", "num_tokens", "token_count", "counts"), "count"),
}


# A column of every expert.
_WIDE = re.compile(r"e(?:xpert)?_?\d+")


def read_load_matrix(file: Path, model: BoundModel | None) -> CountedLoads:
    """Read ``[L, E]`` or ``[passes, L, E]`` counts; L are MoE layers or all hidden ones.

    In a ``.json``, ``.json.gz`` or ``.pt`` file it may be the whole file, or the value of
    ``logical_count``, as in SGLang's dumps.

    Raises
    ------
    PlacerError
        If the file is none of these, or holds no such matrix of whole numbers.
    """
    if file.suffix == ".npy":
        return _of_matrix(_npy(file), "the array")
    if file.suffix == ".npz":
        value = _npy(file)
    elif file.name.endswith((".json", ".json.gz")):
        value = parse_json(_unzipped_bytes(file), f"counts {file.name}")
    elif file.suffix in (".pt", ".pth"):
        value = _for_numpy(load_dump(file, _MATRIX_LAYOUT))
    else:
        raise PlacerError(f"its suffix is {file.suffix or 'none'}", _MATRIX_LAYOUT)
    if not isinstance(value, dict):
        return _of_matrix(value, "the matrix")
    if value and all(layer_number(key) is not None for key in value):
        return _of_layers(value)
    name = next((name for name in _NAMES if name in value), None)
    if name is None and file.suffix == ".npz" and len(value) == 1:
        (name,) = value
    if name is None:
        raise PlacerError(
            f"it holds {', '.join(map(str, value)) or 'nothing'}, and none of "
            f"{', '.join(_NAMES)}",
            _MATRIX_LAYOUT,
        )
    if isinstance(value[name], dict) and all(
        layer_number(key) is not None for key in value[name]
    ):
        return _of_layers(value[name])
    return _of_matrix(value[name], name)


def _unzipped_bytes(file: Path) -> bytes:
    try:
        with open_regular(file, "counts") as stream:
            return unzipped(stream).read(MAX_DOCUMENT_BYTES + 1)
    except UNREADABLE as error:
        raise PlacerError(f"it cannot be read: {unreadable_reason(error)}") from error


def _of_matrix(value: Any, what: str) -> CountedLoads:
    """Return what a matrix counts; ``null`` in place of a row is a layer without counts."""
    if isinstance(value, list) and any(isinstance(row, list) for row in value):
        width = next(len(row) for row in value if isinstance(row, list))
        value = [[0] * width if row is None else row for row in value]
    counted = matrix_loads(value, what)
    layers, experts = len(counted.by_layer), len(counted.by_layer[0])
    # Released models have a multiple of four experts, and most have more than layers.
    if layers <= experts and experts % 4 == 0:
        return counted
    return replace(counted, doubt=axes_doubt(f"{layers} layers of {experts} experts"))


def _for_numpy(value: Any) -> Any:
    """Return tensors of bfloat16, which NumPy lacks, as float32, which holds them all."""
    import torch

    if isinstance(value, dict):
        return {key: _for_numpy(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_for_numpy(one) for one in value]
    is_bfloat16 = isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16
    return value.float() if is_bfloat16 else value


def _of_layers(value: Mapping[Any, Any]) -> CountedLoads:
    """Return counts by layer: lists of all experts, or the count of each expert."""
    by_layer = {}
    for key, counts in value.items():
        if counts is None:  # a dense layer
            continue
        if isinstance(counts, dict):
            experts = [layer_number(expert) for expert in counts]
            if None in experts or not experts:
                raise PlacerError(f"layer {key} names experts by {', '.join(counts)}")
            row = np.zeros(1 + max(e for e in experts if e is not None), dtype=np.int64)
            for expert, count in zip(experts, counts.values(), strict=True):
                row[expert] = whole_counts(whole_floats(np.asarray(count)), f"layer {key}")
        else:
            row = whole_counts(whole_floats(np.asarray(counts)), f"layer {key}")
        by_layer[layer_number(key) or 0] = row
    numbers = sorted(by_layer)
    if numbers == [*range(len(numbers))] and len({len(r) for r in by_layer.values()}) == 1:
        return matrix_loads([by_layer[n] for n in numbers], "the matrix")
    return CountedLoads(by_layer=by_layer, of_moe_layers=False)


def _npy(file: Path) -> Any:
    require_file(file, "counts")
    try:
        return load_arrays(file)[0] if file.suffix == ".npz" else load_array(file)
    except UNREADABLE as error:
        raise PlacerError(
            f"no readable .npy array: {unreadable_reason(error)}", _MATRIX_LAYOUT
        ) from error


def read_csv_loads(file: Path, model: BoundModel | None) -> CountedLoads:
    """Read counts, one row for each layer and expert, or one for each choice.

    ``layer,expert,count``: layers count from 0 over MoE layers. ``layer_id,expert_id,
    count``, as SGLang's old recorder wrote: layers by the model's own numbers. ``layer,
    expert`` without a count, as llama.cpp's ``moe-trace`` writes: each row is one token's
    choice, layers by the model's own numbers. Rows may be in any order; an expert without
    a row has no tokens.

    Raises
    ------
    PlacerError
        If a column is missing, a value is not a whole number, the model has no such expert,
        or an expert has two counts.
    """
    table = (
        read_table(file, _CSV_LAYOUT).rename(columns=str.lower).rename(columns=_CSV_NAMES)
    )
    wide = [name for name in map(str, table.columns) if _WIDE.fullmatch(name)]
    if wide and "expert" not in table and "expert_id" not in table:
        name = next((one for one in ("layer", "layer_id") if one in table), None)
        require_whole(table, [name or "layer", *wide], _CSV_LAYOUT)
        layers = table[name].tolist()
        return _of_layers(dict(zip(layers, table[wide].to_numpy(), strict=True)))
    names = ("layer_id", "expert_id") if "layer_id" in table else ("layer", "expert")
    has_count = "count" in table or len(table.columns) > 2
    if "count" in table:
        table["count"] = whole_floats(table["count"].to_numpy())
    require_whole(table, [*names, *(["count"] if has_count else [])], _CSV_LAYOUT)
    for name in (*names, *(["count"] if has_count else [])):
        below = np.flatnonzero(table[name].to_numpy() < 0)
        if below.size:
            row, value = below[0] + 1, table[name].iloc[below[0]]
            raise PlacerError(
                f"row {row} after the header holds {value} in column {name}, which is not "
                "a whole number of at least 0",
                _CSV_LAYOUT,
            )
    layer, expert = (
        whole_counts(table[name].to_numpy(), f"column {name}") for name in names
    )
    count = (
        whole_counts(table["count"].to_numpy(), "column count")
        if has_count
        else np.ones(len(table), dtype=np.int64)
    )
    by_layer = {}
    for number in np.unique(layer).tolist():
        of_it = layer == number
        require_expert(int(expert[of_it].max()), most_experts(model), number, _CSV_SLOTS)
        times = np.bincount(expert[of_it])
        if has_count and times.max() > 1:
            raise PlacerError(
                f"layer {number}, expert {times.argmax()} has {times.max()} rows",
                "give one row for each layer and expert: add rows up if they count "
                "different tokens, else remove the repeated ones",
            )
        rows = np.zeros(len(times), dtype=np.int64)
        np.add.at(rows, expert[of_it], count[of_it])
        by_layer[number] = rows
    return CountedLoads(by_layer=by_layer, of_moe_layers=has_count and names[0] == "layer")

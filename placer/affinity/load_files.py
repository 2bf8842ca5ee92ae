"""Reading counts that are bare: matrices of numbers, and CSV."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from placer.affinity.loads import (
    CountedLoads,
    matrix_loads,
    most_experts,
    require_expert,
    whole_counts,
    whole_floats,
)
from placer.arrays import IntArray
from placer.errors import PlacerError
from placer.run.archives import (
    UNREADABLE,
    load_array,
    load_arrays,
    unreadable_reason,
    unzipped,
)
from placer.run.documents import parse_json, shown
from placer.run.files import MAX_DOCUMENT_BYTES, open_regular, require_file
from placer.trace.csv_rows import read_table, require_whole
from placer.trace.imported import BoundModel, axes_doubt
from placer.trace.json_rows import layer_number
from placer.trace.sglang_dump import load_dump

if TYPE_CHECKING:
    import pandas as pd

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
_WIDE = re.compile(r"e(?:xpert)?_?\d{1,6}")


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
        first = next(iter(value.values()))
        if len(value) == 1 and _has_rows(first):  # such as arr_0 of np.savez
            return _of_matrix(first, "the matrix")
        return _of_layers(value.items())
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
        return _of_layers(value[name].items())
    return _of_matrix(value[name], name)


def _has_rows(value: Any) -> bool:
    if isinstance(value, list):
        return any(isinstance(row, list) for row in value)
    return getattr(value, "ndim", 0) > 1


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


def _of_layers(layers: Iterable[tuple[Any, Any]]) -> CountedLoads:
    """Return counts by layer: lists of all experts, or the count of each expert."""
    by_layer: dict[int, IntArray] = {}
    by_expert = set()
    for key, counts in layers:
        if counts is None:  # a dense layer
            continue
        number = key if isinstance(key, int) else layer_number(key) or 0
        _require_new(number in by_layer, f"layer {number}")
        if isinstance(counts, dict):
            by_expert.add(number)
            by_layer[number] = _of_experts(counts, key)
        else:
            by_layer[number] = _counts(counts, f"layer {key}", "a list of counts", ndim=1)
    # Where each expert has a key, the last experts have none if they have no tokens.
    width = max(map(len, by_layer.values()), default=0)
    for number in by_expert:
        row = by_layer[number]
        by_layer[number] = np.pad(row, (0, width - len(row)))
    numbers = sorted(by_layer)
    if numbers == [*range(len(numbers))] and len({len(r) for r in by_layer.values()}) == 1:
        return matrix_loads([by_layer[n] for n in numbers], "the matrix")
    return CountedLoads(by_layer=by_layer, of_moe_layers=False)


def _of_experts(counts: Mapping[Any, Any], layer: Any) -> IntArray:
    """Return ``[E]`` of the count of each expert, E up to the last one named."""
    by_number: dict[int, IntArray] = {}
    for key, count in counts.items():
        if (expert := layer_number(key)) is None:
            raise PlacerError(
                f"layer {layer} names experts by {', '.join(map(str, counts))}"
            )
        _require_new(expert in by_number, f"layer {layer}, expert {expert}")
        require_expert(expert, most_experts(None), layer)
        what = f"layer {layer}, expert {expert}"
        by_number[expert] = _counts(count, what, "one count", ndim=0)
    if not by_number:
        raise PlacerError(f"layer {layer} names no experts", "give null to a dense layer")
    row = np.zeros(1 + max(by_number), dtype=np.int64)
    row[[*by_number]] = [*by_number.values()]
    return row


def _counts(value: Any, what: str, expected: str, *, ndim: int) -> IntArray:
    try:
        counts = np.asarray(value)
    except ValueError:  # lists of different lengths
        counts = np.empty((0, 0))
    if counts.ndim != ndim:
        raise PlacerError(
            f"{what} holds {shown(value)}, expected {expected}", _MATRIX_LAYOUT
        )
    return whole_counts(whole_floats(counts), what)


def _require_new(is_known: bool, what: str) -> None:
    if is_known:
        raise PlacerError(
            f"{what} has counts twice",
            "give them once: add them up if they count different tokens, else remove the "
            "repeated ones",
        )


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
        or a layer or an expert has counts twice.
    """
    table = _usual_columns(read_table(file, _CSV_LAYOUT))
    wide = [name for name in map(str, table.columns) if _WIDE.fullmatch(name)]
    if wide and "expert" not in table and "expert_id" not in table:
        name = next((one for one in ("layer", "layer_id") if one in table), None)
        wide = _by_number(wide, model)
        require_whole(table, [name or "layer", *wide], _CSV_LAYOUT)
        _require_not_negative(table, [name or "layer"])
        layers = table[name].tolist()
        return _of_layers(zip(layers, table[wide].to_numpy(), strict=True))
    names = ("layer_id", "expert_id") if "layer_id" in table else ("layer", "expert")
    has_count = "count" in table or len(table.columns) > 2
    if "count" in table:
        table["count"] = whole_floats(table["count"].to_numpy())
    require_whole(table, [*names, *(["count"] if has_count else [])], _CSV_LAYOUT)
    _require_not_negative(table, [*names, *(["count"] if has_count else [])])
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


def _usual_columns(table: "pd.DataFrame") -> "pd.DataFrame":
    """Return a table with the columns of the layout, by what the header's names mean."""
    lower = {name: str(name).lower() for name in table.columns}
    taken = {*lower.values()}
    new = {
        name: one if (usual := _CSV_NAMES.get(one, one)) in taken else usual
        for name, one in lower.items()
    }
    meant, times = Counter(new.values()).most_common(1)[0]
    if times > 1:
        same = [str(name) for name, one in new.items() if one == meant]
        raise PlacerError(
            f"its columns {' and '.join(same)} mean the same: {meant}",
            "keep one of them",
        )
    return table.rename(columns=new)


def _by_number(wide: Sequence[str], model: BoundModel | None) -> list[str]:
    """Return the columns of experts in the order of their numbers, which may begin at 1."""
    numbered = sorted((int(re.sub(r"\D", "", name)), name) for name in wide)
    numbers = [number for number, _ in numbered]
    known = numbers[0] == 0 or model is None or len(wide) == most_experts(model)
    first = min(numbers[0], 1) if known else 0
    if numbers != [*range(first, first + len(numbers))]:
        raise PlacerError(
            f"its {len(wide)} columns of experts have the numbers {shown(numbers)}",
            "give each expert one column, and number them from 0 without a gap: e0,e1,...",
        )
    return [name for _, name in numbered]


def _require_not_negative(table: "pd.DataFrame", names: Sequence[str]) -> None:
    for name in names:
        below = np.flatnonzero(table[name].to_numpy() < 0)
        if below.size:
            row, value = below[0] + 1, table[name].iloc[below[0]]
            raise PlacerError(
                f"row {row} after the header holds {value} in column {name}, which is not "
                "a whole number of at least 0",
                _CSV_LAYOUT,
            )

"""Reading counts that are bare: matrices of numbers, and CSV."""

from pathlib import Path
from typing import Any

import numpy as np

from placer.affinity.loads import (
    CountedLoads,
    matrix_loads,
    most_experts,
    require_expert,
    whole_counts,
)
from placer.errors import PlacerError
from placer.run.archives import UNREADABLE, load_array, unreadable_reason
from placer.run.documents import parse_json
from placer.run.files import (
    read_bytes,
    require_file,
)
from placer.trace.csv_rows import (
    read_table,
    require_whole,
)
from placer.trace.imported import (
    BoundModel,
)
from placer.trace.sglang_dump import load_dump

_CSV_LAYOUT = (
    "the header is layer,expert,count, or layer_id,expert_id,count, or layer,expert "
    "(docs/importing.md)"
)
_CSV_SLOTS = (
    "check --model or --num-experts; if the ids are slots of an engine with redundant "
    "experts, first add up the counts of each expert's slots"
)
_MATRIX_LAYOUT = "a matrix of counts is .npy, .pt or .json: [L, E] (docs/importing.md)"
# What files call the matrix where it is not all that they hold.
_NAMES = ("logical_count", "expert_counts", "counts", "load")


def read_load_matrix(file: Path, model: BoundModel | None) -> CountedLoads:
    """Read ``[L, E]`` or ``[passes, L, E]`` counts; L are MoE layers or all hidden ones.

    In a ``.json`` or ``.pt`` file it may be the whole file, or the value of
    ``logical_count``, as in SGLang's dumps.

    Raises
    ------
    PlacerError
        If the file is none of these, or holds no such matrix of whole numbers.
    """
    if file.suffix == ".npy":
        return matrix_loads(_npy(file), "the array")
    if file.suffix == ".json":
        value = parse_json(read_bytes(file, what="counts"), f"counts {file.name}")
    elif file.suffix == ".pt":
        value = load_dump(file, _MATRIX_LAYOUT)
    else:
        raise PlacerError(f"its suffix is {file.suffix or 'none'}", _MATRIX_LAYOUT)
    if not isinstance(value, dict):
        return matrix_loads(value, "the matrix")
    name = next((name for name in _NAMES if name in value), None)
    if name is None:
        raise PlacerError(
            f"it holds {', '.join(map(str, value)) or 'nothing'}, and none of "
            f"{', '.join(_NAMES)}",
            _MATRIX_LAYOUT,
        )
    return matrix_loads(value[name], name)


def _npy(file: Path) -> Any:
    require_file(file, "counts")
    try:
        return load_array(file)
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
    table = read_table(file, _CSV_LAYOUT)
    names = ("layer_id", "expert_id") if "layer_id" in table else ("layer", "expert")
    has_count = "count" in table or len(table.columns) > 2
    require_whole(table, [*names, *(["count"] if has_count else [])], _CSV_LAYOUT)
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

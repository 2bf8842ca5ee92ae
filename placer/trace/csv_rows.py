"""Reading routing from a CSV file: one row per token and layer."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from placer.errors import PlacerError
from placer.run.archives import UNREADABLE
from placer.run.files import memory_bytes, open_regular
from placer.trace.imported import (
    BoundModel,
    ImportedTokens,
)
from placer.trace.token_rows import (
    TokenRows,
    phase_numbers,
    whole_tokens,
)

if TYPE_CHECKING:
    import pandas as pd

# Bytes of the first line; pandas takes a line of any length, and all columns that it names.
_MOST_HEADER = 1 << 20
_LAYOUT = (
    "the header is sequence_id,position,layer,e0,e1,..., and may have token_id, phase and "
    "w0,w1,... (docs/importing.md)"
)


def read_csv(file: Path, model: BoundModel | None) -> ImportedTokens:
    """Read columns ``sequence_id, position, layer, e0, e1, ...``.

    ``token_id``, ``phase`` (prefill or decode, or 0 or 1) and the router weights ``w0,
    w1, ...`` may be among them. Without weights ``e0`` is the expert with the largest
    one. Rows may be in any order; every token has one row per layer. Layers count from 0
    over MoE layers, or over all hidden layers; other numbers are the model's own.

    Raises
    ------
    PlacerError
        If a column is missing, a value is not a whole number, or a token lacks a layer or
        has one twice.
    """
    table = read_table(file, _LAYOUT)
    num_experts, num_weights = (
        sum(name[:1] == letter and name[1:].isdecimal() for name in table.columns)
        for letter in "ew"
    )
    experts = [f"e{n}" for n in range(num_experts)]
    weights = [f"w{n}" for n in range(num_experts if num_weights else 0)]
    phase = None
    if "phase" in table:
        phase = phase_numbers(table.pop("phase").tolist(), _LAYOUT)
    _require_numbers(table, weights)
    values = table[weights].to_numpy(dtype=np.float32) if weights else None
    whole = table.drop(columns=weights)
    require_whole(
        whole, ["sequence_id", "position", "layer", "e0", *experts, *whole.columns], _LAYOUT
    )
    rows = TokenRows(
        sequence=whole["sequence_id"].to_numpy(),
        position=whole["position"].to_numpy(),
        layer=whole["layer"].to_numpy(),
        experts=whole[experts].to_numpy(),
        weights=values,
        token_ids=whole["token_id"].to_numpy() if "token_id" in whole else None,
        phase=phase,
    )
    return whole_tokens(rows, model, _LAYOUT)


def _require_numbers(table: "pd.DataFrame", columns: Sequence[str]) -> None:
    for name in columns:
        if name not in table.columns:
            raise PlacerError(f"it has no column {name}", _LAYOUT)
        if table[name].to_numpy().dtype.kind not in "fiu":
            raise PlacerError(f"column {name} holds a value that is not a number", _LAYOUT)


def read_table(file: Path, layout: str) -> "pd.DataFrame":
    """Read a CSV file, whose header names every column.

    Raises
    ------
    PlacerError
        If it is not a CSV file, or its rows are longer than its header; the hint is
        ``layout``.
    """
    import pandas as pd

    try:
        with open_regular(file) as stream:
            if os.fstat(stream.fileno()).st_size > memory_bytes():
                raise ValueError("it is larger than the memory of this machine")
            head = stream.readline(_MOST_HEADER)
            if b"\0" in head or len(head) == _MOST_HEADER:
                raise ValueError("its first line is no header: it is too long, or binary")
            stream.seek(0)
            table = pd.read_csv(stream)
    except UNREADABLE as error:
        raise PlacerError(f"it is not a CSV file: {error}", layout) from error
    # Of longer rows pandas silently makes the first values an index.
    if not isinstance(table.index, pd.RangeIndex):
        raise PlacerError("its rows have more values than the header", layout)
    return table


def require_whole(table: "pd.DataFrame", columns: Sequence[str], layout: str) -> None:
    """Refuse a table that lacks a column, or has one that is not of whole numbers.

    Raises
    ------
    PlacerError
        The column is named, and the hint is ``layout``.
    """
    for name in columns:
        if name not in table.columns:
            raise PlacerError(f"it has no column {name}", layout)
        if not np.issubdtype(table[name].to_numpy().dtype, np.integer):
            raise PlacerError(
                f"column {name} holds a value that is not a whole number", layout
            )

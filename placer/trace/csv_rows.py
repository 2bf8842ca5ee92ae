"""Reading routing from a CSV file: one row per token and layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from placer.errors import PlacerError
from placer.run.files import open_regular
from placer.trace.imported import (
    UNREADABLE,
    BoundModel,
    ImportedTokens,
)

if TYPE_CHECKING:
    import pandas as pd

_LAYOUT = (
    "the header is sequence_id,position[,token_id],layer,e0,e1,... (docs/importing.md)"
)


def read_csv(file: Path, model: BoundModel | None) -> ImportedTokens:
    """Read columns ``sequence_id, position, token_id (optional), layer, e0, e1, ...``.

    ``e0`` is the expert with the largest router weight. Rows may be in any order; every
    token has one row per layer, layers counted from 0.

    Raises
    ------
    PlacerError
        If a column is missing, a value is no whole number, or a token lacks a layer or
        has one twice.
    """
    table = read_table(file, _LAYOUT)
    experts = [name for name in table.columns if name[:1] == "e" and name[1:].isdecimal()]
    needed = ["sequence_id", "position", "layer", *(f"e{n}" for n in range(len(experts)))]
    require_whole(table, [*needed, "e0", *table.columns], _LAYOUT)
    table = table.sort_values(["sequence_id", "position", "layer"], kind="stable")
    return _tokens(table, [f"e{n}" for n in range(len(experts))])


def read_table(file: Path, layout: str) -> "pd.DataFrame":
    """Read a CSV file, whose header names every column.

    Raises
    ------
    PlacerError
        If it is no CSV file, or its rows are longer than its header; the hint is
        ``layout``.
    """
    import pandas as pd

    try:
        with open_regular(file) as stream:
            table = pd.read_csv(stream)
    except UNREADABLE as error:
        raise PlacerError(f"it is no CSV file: {error}", layout) from error
    # Of longer rows pandas silently makes the first values an index.
    if not isinstance(table.index, pd.RangeIndex):
        raise PlacerError("its rows have more values than its header has names", layout)
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
                f"column {name} holds something that is no whole number", layout
            )


def _tokens(table: "pd.DataFrame", experts: list[str]) -> ImportedTokens:
    layer = table["layer"].to_numpy()
    if layer.min() < 0:
        raise PlacerError(f"layer {layer.min()} is negative", _LAYOUT)
    num_layers = int(layer.max()) + 1
    if len(table) % num_layers or (layer != np.arange(len(table)) % num_layers).any():
        short = min(len(table), len(table) // num_layers * num_layers)
        wrong = layer[:short] != np.arange(short) % num_layers
        row = table.iloc[int(wrong.argmax()) if wrong.any() else -1]
        raise PlacerError(
            f"the token at position {row['position']} of sequence "
            f"{row['sequence_id']} does not have each of the layers 0 to "
            f"{num_layers - 1} once",
            _LAYOUT,
        )
    first = table.iloc[::num_layers]
    return ImportedTokens(
        experts=table[experts].to_numpy().reshape(-1, num_layers, len(experts)),
        sequence_ids=first["sequence_id"].to_numpy(),
        positions=first["position"].to_numpy(),
        token_ids=first["token_id"].to_numpy() if "token_id" in table else None,
    )

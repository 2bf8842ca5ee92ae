"""Reading routing from a CSV file: one row per token and layer."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from placer.errors import PlacerError
from placer.trace.imported import BoundModel, ImportedTokens

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
    import pandas as pd

    try:
        table = pd.read_csv(file)
    except (ValueError, pd.errors.ParserError) as error:
        raise PlacerError(f"{file} is no CSV file: {error}", _LAYOUT) from error
    experts = [name for name in table.columns if name[:1] == "e" and name[1:].isdigit()]
    needed = ["sequence_id", "position", "layer", *(f"e{n}" for n in range(len(experts)))]
    missing = [name for name in [*needed, "e0"] if name not in table.columns]
    if missing:
        raise PlacerError(f"{file} has no column {missing[0]}", _LAYOUT)
    for name in table.columns:
        if not np.issubdtype(table[name].to_numpy().dtype, np.integer):
            raise PlacerError(
                f"{file}: column {name} holds something that is no whole number", _LAYOUT
            )
    table = table.sort_values(["sequence_id", "position", "layer"], kind="stable")
    return _tokens(table, [f"e{n}" for n in range(len(experts))], file)


def _tokens(table: "pd.DataFrame", experts: list[str], file: Path) -> ImportedTokens:
    num_layers = int(table["layer"].max()) + 1
    layer = table["layer"].to_numpy()
    if len(table) % num_layers or (layer != np.arange(len(table)) % num_layers).any():
        short = min(len(table), len(table) // num_layers * num_layers)
        wrong = layer[:short] != np.arange(short) % num_layers
        row = table.iloc[int(wrong.argmax()) if wrong.any() else -1]
        raise PlacerError(
            f"{file}: the token at position {row['position']} of sequence "
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

"""Reading routing from a CSV file: one row per token and layer."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from placer.errors import PlacerError
from placer.run.archives import UNREADABLE, unzipped
from placer.run.documents import shown
from placer.run.files import memory_bytes, open_regular
from placer.trace.imported import BoundModel, ImportedTokens
from placer.trace.json_rows import NO_KEYS, Keys, chosen_weights, layer_of, row_ids
from placer.trace.token_rows import TokenRows, phase_numbers, whole_tokens

# Columns of the layout, by what they mean.
_COLUMNS = {
    "sequence": "sequence_id",
    "token": "position",
    "layer": "layer",
    "token_id": "token_id",
    "phase": "phase",
}

_TOKEN = ("sequence_id", "position", "layer")
# Columns of the number of a choice, where each has a row.
_CHOICE = ("choice", "topk_rank", "rank", "k")

# A column of the first, second or further choice of a token, counted from 0 or 1.
_NUMBERED = re.compile(
    r"(?:(?P<weight>w(?:eights?)?)|e(?:xperts?)?|topk|top)(?:_ids?|_idx)?_?(?P<number>[\d]{1,3})"
)

if TYPE_CHECKING:
    import pandas as pd

# Bytes of the first line; pandas takes a line of any length, and all columns that it names.
_MOST_HEADER = 1 << 20
_LAYOUT = (
    "the header is sequence_id,position,layer,e0,e1,..., and may have token_id, phase and "
    "w0,w1,... (docs/importing.md)"
)


def csv_reader(keys: Keys) -> Callable[[Path, BoundModel | None], ImportedTokens]:
    """Return :func:`read_csv` with columns that the user names."""
    return lambda file, model: read_csv(file, model, keys)


def read_csv(file: Path, model: BoundModel | None, keys: Keys = NO_KEYS) -> ImportedTokens:
    """Read columns ``sequence_id, position, layer, e0, e1, ...``.

    ``token_id``, ``phase`` (prefill or decode, or 0 or 1) and the router weights ``w0,
    w1, ...`` may be among them. Without weights ``e0`` is the expert with the largest
    one. Rows may be in any order; every token has one row per layer. Layers count from 0
    over MoE layers, or over all hidden layers; other numbers are the model's own. With one
    column of experts there may be a row for each choice, and ``weight``.

    Raises
    ------
    PlacerError
        If a column is missing, a value is not a whole number, or a token lacks a layer or
        has one twice.
    """
    table = _numbered_layers(usual_columns(read_table(file, _LAYOUT), keys))
    table, remarks = _joined_choices(table)
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
    names = [*_TOKEN, "e0", *experts[1:], *(["token_id"] if "token_id" in table else [])]
    require_whole(table, names, _LAYOUT)
    whole = table[names]
    if unread := [str(name) for name in table.columns if name not in (*names, *weights)]:
        remarks.append(f"it has columns that are not read: {shown(unread)}")
    rows = TokenRows(
        sequence=whole["sequence_id"].to_numpy(),
        position=whole["position"].to_numpy(),
        layer=whole["layer"].to_numpy(),
        experts=whole[experts].to_numpy(),
        weights=values,
        token_ids=whole["token_id"].to_numpy() if "token_id" in whole else None,
        phase=phase,
    )
    return whole_tokens(rows, model, _LAYOUT, remarks)


def usual_columns(table: "pd.DataFrame", keys: Keys) -> "pd.DataFrame":
    """Return a table with the columns of the layout, by what the header's names mean.

    Experts may stand in columns such as ``expert_0`` or ``topk_1``, counted from 0 or 1,
    or all in one, as ``"3 7"``, with their weights in another. Capital letters in names
    mean nothing.
    """
    lower = {str(one): str(one).lower() for one in table.columns}
    if len({*lower.values()}) == len(lower):
        given = keys.named.values()
        table = table.rename(columns={n: new for n, new in lower.items() if n not in given})
    row = dict.fromkeys(map(str, table.columns))
    named = {
        column: name
        for meaning, column in _COLUMNS.items()
        if column not in row or meaning in keys.named
        if (name := keys.found(meaning, row)) is not None
    }
    # The user names another column in place of one of the layout.
    replaced = [one for one in named if one in table and one not in named.values()]
    table = table.drop(columns=replaced).rename(
        columns={name: column for column, name in named.items()}
    )
    if "e0" in table:
        return table
    listed = keys.found("experts", row)
    if listed is not None:
        ids = [row_ids(one) for one in table.pop(listed).tolist()]
        if len({len(one) for one in ids}) > 1:
            raise PlacerError(f"column {listed} has other numbers of ids in other rows")
        for n, column in enumerate(zip(*ids, strict=True)):
            table[f"e{n}"] = column
        weight = keys.found("weights", row) or "weight"
        if weight in table and "w0" not in table:
            weights = [_row_weights(one) for one in table.pop(weight).tolist()]
            columns = chosen_weights(weights, np.asarray(ids)).T if ids else ()
            table = table.assign(**{f"w{n}": column for n, column in enumerate(columns)})
        return table
    found = [(name, m) for name in row if (m := _NUMBERED.fullmatch(name))]
    first = min((int(m["number"]) for _, m in found), default=0)
    return table.rename(
        columns={
            name: f"{'w' if m['weight'] else 'e'}{int(m['number']) - first}"
            for name, m in found
        }
    )


def _row_weights(value: Any) -> list[Any]:
    """Return weights of one row: one number, or several in a text."""
    return (
        re.split(r"[\s,;|]+", value.strip("[]() ")) if isinstance(value, str) else [value]
    )


def _numbered_layers(table: "pd.DataFrame") -> "pd.DataFrame":
    """Return a table with numbers for the names of layers, such as of their modules."""
    if "layer" not in table or table["layer"].to_numpy().dtype.kind != "O":
        return table
    names = table["layer"].tolist()
    numbers = {name: layer_of(name) for name in names}
    if len({*numbers.values()}) < len(numbers):
        raise PlacerError(
            f"some of its {len(numbers)} names of layers have the same number",
            "give each layer one name: leave out rows of other modules",
        )
    return table.assign(layer=[numbers[name] for name in names])


def _joined_choices(table: "pd.DataFrame") -> "tuple[pd.DataFrame, list[str]]":
    """Make one row of the rows that a token has in a layer, one for each choice."""
    if "e1" in table or not {*_TOKEN, "e0"} <= {*table.columns}:
        return table, []
    if not table.duplicated([*_TOKEN]).any():
        return table, []
    require_whole(table, [*_TOKEN, "e0"], _LAYOUT)
    rows = table.groupby([*_TOKEN]).size()
    k = int(rows.iloc[0])
    if (rows != k).any():
        raise PlacerError(
            f"tokens have {rows.min()} to {rows.max()} rows in a layer: each needs one row "
            "for each choice of an expert, and all tokens as many",
            _LAYOUT,
        )
    table = table.sort_values([*_TOKEN], kind="stable", ignore_index=True)
    given: list[str] = []
    for name in _CHOICE:
        if name in table and table[name].dtype.kind in "iu":
            by_choice = table.sort_values([*_TOKEN, name], ignore_index=True)
            numbers = by_choice[name].to_numpy().reshape(-1, k)
            if not given and (numbers == np.arange(k) + numbers.min()).all():
                table, given = by_choice, [name]
    joined = table.iloc[::k].drop(columns=["e0", *given]).reset_index(drop=True)
    for name in ("e", "w"):
        if f"{name}0" in table:
            values = table[f"{name}0"].to_numpy().reshape(-1, k)
            joined = joined.assign(**{f"{name}{n}": values[:, n] for n in range(k)})
    told = f"each token has {k} rows in each layer, which are read as its {k} choices"
    if not given and "w0" not in table:
        told += (
            ". No column choice or weight orders them, so the first row is taken for the "
            "first choice"
        )
    return joined, [told]


def _require_numbers(table: "pd.DataFrame", columns: Sequence[str]) -> None:
    for name in columns:
        if name not in table.columns:
            raise PlacerError(f"it has no column {name}", _LAYOUT)
        if table[name].to_numpy().dtype.kind not in "fiu":
            raise PlacerError(f"column {name} holds a value that is not a number", _LAYOUT)


def read_table(file: Path, layout: str) -> "pd.DataFrame":
    """Read a CSV file, whose header names every column; it may be gzipped.

    Raises
    ------
    PlacerError
        If it is not a CSV file, its header has a name twice, or its rows are longer than
        its header.
    """
    import pandas as pd

    try:
        with open_regular(file) as opened:
            if os.fstat(opened.fileno()).st_size > memory_bytes():
                raise ValueError("it is larger than the memory of this machine")
            stream = unzipped(opened)
            head = stream.readline(_MOST_HEADER)
            if b"\0" in head or len(head) == _MOST_HEADER:
                raise ValueError("its first line is no header: it is too long, or binary")
            stream.seek(0)
            separator = next((mark for mark in "\t;" if mark.encode() in head), ",")
            dialect: dict[str, Any] = {
                "sep": "," if b"," in head else separator,
                "encoding": "utf-8-sig",
                "skipinitialspace": True,
            }
            names = pd.read_csv(stream, **dialect, header=None, nrows=1, dtype=str)
            header = names.iloc[0].dropna()
            stream.seek(0)
            table: pd.DataFrame = pd.read_csv(stream, **dialect)
    except UNREADABLE as error:
        raise PlacerError(f"it is not a CSV file: {error}", layout) from error
    # Of equal names pandas silently changes all but the first.
    if header.duplicated().any():
        raise PlacerError(
            f"its header names column {header[header.duplicated()].iloc[0]} twice",
            "rename one of the two columns, or remove it",
        )
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

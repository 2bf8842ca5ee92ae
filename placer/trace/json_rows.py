"""Reading routing from JSON lines of any program: the user names the keys."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from placer.errors import PlacerError, UsageError
from placer.run.documents import require_object
from placer.trace.imported import BoundModel, ImportedTokens, axes_doubt
from placer.trace.json_lines import json_values
from placer.trace.token_rows import TokenRows, phase_numbers, whole_tokens

Array = npt.NDArray[Any]
# Keys that public logs of routing have, by what they mean.
_USUAL: Mapping[str, tuple[str, ...]] = {
    "layer": (
        *("layer", "layer_id", "layer_idx", "layer_index", "layer_number", "layer_name"),
        "moe_layer",
    ),
    "token": (
        *("token_idx", "token_index", "token_position", "token_pos", "position", "pos"),
        "token",
    ),
    "experts": (
        *("topk_ids", "experts", "expert_ids", "topk_experts", "topk_idx"),
        *("topk_indices", "selected_experts", "expert_indices", "router_indices"),
        *("expert_idx", "expert_id", "expert"),
    ),
    "weights": (
        *("weights", "topk_weights", "gating_probs", "topk_weight", "routing_weights"),
        "router_weights",
    ),
    "sequence": (
        *("sequence_id", "request_id", "seq_id", "req_id", "rid", "sequence", "req"),
        *("sample_id", "prompt_id"),
    ),
    "token_id": ("token_id", "input_id"),
    "phase": ("phase",),
}
# The layer of a row that was made of a row of all layers; no file has such a key.
_LAYER = " layer"
_MISSING = object()
_LISTED_IDS = re.compile(r"[\[(]?\s*\d+(?:[\s,;|]+\d+)*\s*[\])]?")
_NEEDED = ("layer", "token", "experts")
# Keys of the object of layers, in the object of a request.
_REQUEST_KEYS = ("layers", "experts", "routed_experts", "topk_ids")
_LAYOUT = (
    "map the keys of the file: --keys layer=KEY,token=KEY,experts=KEY, and weights, "
    "sequence, token_id and phase if it has them (docs/importing.md)"
)
_REQUESTS_LAYOUT = (
    "each line is one request: layer numbers, and under each a list of the experts of its "
    "tokens; name the key that holds them: --keys experts=KEY (docs/importing.md)"
)
# Without sequences, blocks of this many tokens make folds possible.
_BLOCK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """The meaning of a file's keys; a key that is not given is found by its usual names."""

    named: Mapping[str, str]

    @classmethod
    def parse(cls, text: str | None) -> Self:
        """Read ``layer=layer,token=token_idx,...``.

        Raises
        ------
        UsageError
            If it is not such a list, or gives a meaning that there is not.
        """
        named = {}
        for part in text.split(",") if text else ():
            meaning, separator, key = part.partition("=")
            if not separator or not key or meaning not in _USUAL or meaning in named:
                raise UsageError(
                    f"--keys has {part!r}",
                    f"give MEANING=KEY,... with each of {', '.join(_USUAL)} at most once",
                )
            named[meaning] = key
        return cls(named=named)

    def is_in(self, meaning: str, row: Mapping[str, Any]) -> bool:
        """Return whether a row has a key for a meaning."""
        named = self.named.get(meaning)
        return any(
            _has(row, one) for one in (_USUAL[meaning] if named is None else [named])
        )

    def found(self, meaning: str, row: Mapping[str, Any]) -> str | None:
        """Return the key that a row has for a meaning.

        Raises
        ------
        PlacerError
            If the user named a key that it has not.
        """
        if (key := self.named.get(meaning)) is None:
            return next((one for one in _USUAL[meaning] if one in row), None)
        if not _has(row, key):
            raise PlacerError(f"it has no key {key}; it has {', '.join(row)}", _LAYOUT)
        return key


NO_KEYS = Keys(named={})
Reader = Callable[[Path, BoundModel | None], ImportedTokens]


def jsonl_reader(keys: Keys) -> Reader:
    """Return the reader of one JSON object per token and layer.

    ``experts`` is a list of ids, or one id; ``weights`` has one for each of them, or one
    for every expert of the layer. ``sequence`` may be text. Without it the tokens are cut
    into blocks of 256.

    Raises
    ------
    PlacerError
        From the reader: if keys are missing, or rows do not fit together.
    """

    def read(file: Path, model: BoundModel | None) -> ImportedTokens:
        rows, remarks = _without_header(_by_columns(list(_objects(file)), keys), keys)
        names = {meaning: keys.found(meaning, rows[0]) for meaning in _USUAL}
        if names["layer"] is None and names["experts"] is not None:
            rows = _by_layer(rows, names)
            names["layer"] = _LAYER if _LAYER in rows[0] else None
        if (experts := names["experts"]) is not None:  # null in dense layers
            rows = [row for row in rows if _value(row, experts, 0) is not None] or rows
        if missing := [meaning for meaning in _NEEDED if names[meaning] is None]:
            raise PlacerError(
                f"a row has no key for {' or '.join(missing)}: its keys are "
                f"{', '.join(rows[0])}",
                _LAYOUT,
            )
        columns = {
            meaning: _column(rows, name)
            for meaning, name in names.items()
            if name is not None
        }
        return _tokens(columns, model, remarks)

    return read


def requests_reader(keys: Keys) -> Reader:
    """Return the reader of one JSON object per request: layer -> experts of its tokens.

    The layers are the keys of the object itself, or of one object in it. Under a layer is
    a list with a list of ids for each token; or, where a model says how many experts a
    token has, one list of all ids.

    Raises
    ------
    PlacerError
        From the reader: if layers are missing, or a layer has no list of ids for each
        token.
    """

    def read(file: Path, model: BoundModel | None) -> ImportedTokens:
        values = list(_objects(file))
        held = [_held(one, keys) for one in values]
        layers_first, remarks = _axes(held, model)
        parts = [
            _request(value, _named_layers(layers, layers_first), number, model)
            for number, (value, layers) in enumerate(zip(values, held, strict=True))
        ]
        widths = {part.experts.shape[1] for part in parts}
        if len(widths) > 1:
            raise PlacerError(
                f"tokens have {' or '.join(map(str, sorted(widths)))} experts",
                _REQUESTS_LAYOUT,
            )
        rows = TokenRows(
            **{
                name: np.concatenate([getattr(part, name) for part in parts])
                for name in ("sequence", "position", "layer", "experts")
            }
        )
        return whole_tokens(rows, model, _REQUESTS_LAYOUT, remarks)

    return read


def _objects(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, one or a list of them to a line."""
    empty = True
    for where, value in json_values(file):
        empty = False
        yield require_object(value, where)
    if empty:
        raise PlacerError("it holds no JSON object", _LAYOUT)


def _by_columns(rows: list[dict[str, Any]], keys: Keys) -> list[dict[str, Any]]:
    """Return the rows of one object of columns: lists, or objects as pandas writes them."""
    if len(rows) > 1 or not keys.is_in("token", rows[0]):
        return rows
    row = {
        key: [*value.values()] if isinstance(value, dict) else value
        for key, value in rows[0].items()
    }
    token = row.get(keys.found("token", rows[0]) or "")
    if not isinstance(token, list):
        return rows
    columns = {key: value for key, value in row.items() if isinstance(value, list)}
    lengths = {key: len(value) for key, value in columns.items()}
    if len({*lengths.values()}) > 1:
        raise PlacerError(f"its columns differ in length: {lengths}", _LAYOUT)
    if not token:
        raise PlacerError(f"its columns are empty: {', '.join(columns)}", _LAYOUT)
    order = {tuple(one) for one in rows[0].values() if isinstance(one, dict)}
    if len(order) > 1:
        raise PlacerError("its columns name their rows differently", _LAYOUT)
    return [
        row | dict(zip(columns, one, strict=True))
        for one in zip(*columns.values(), strict=True)
    ]


def _without_header(
    rows: list[dict[str, Any]], keys: Keys
) -> tuple[list[dict[str, Any]], list[str]]:
    """Leave out a first object that describes the file."""
    place = ("layer", "token")
    if len(rows) < 2 or any(keys.is_in(meaning, rows[0]) for meaning in place):
        return rows, []
    if not (keys.is_in("token", rows[1]) and keys.is_in("experts", rows[1])):
        return rows, []
    return rows[1:], [
        f"its first object, of {', '.join(rows[0])}, is no token. It is left out"
    ]


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    for number, row in enumerate(rows, start=1):
        if not _has(row, name):
            raise PlacerError(f"row {number} has no key {name}, which others have", _LAYOUT)
    return [_value(row, name) for row in rows]


def _has(row: Mapping[str, Any], key: str) -> bool:
    """Return whether a row has a key; a dot goes into an object in it."""
    return _value(row, key, _MISSING) is not _MISSING


def _value(row: Mapping[str, Any], key: str, missing: Any = None) -> Any:
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        value = value.get(part, missing) if isinstance(value, dict) else missing
    return value


def _by_layer(
    rows: Sequence[Mapping[str, Any]], names: Mapping[str, str | None]
) -> list[dict[str, Any]]:
    """Return a row for each layer, of rows whose experts are a list with one list each.

    Other rows are returned as they are.
    """
    spread = [key for key in (names["experts"], names["weights"]) if key is not None]
    made = []
    for number, row in enumerate(rows, start=1):
        lists = [_value(row, key) for key in spread]
        if not all(isinstance(one, list) for one in lists):
            return list(map(dict, rows))
        if not all(isinstance(one, list | None) for part in lists for one in part):
            return list(map(dict, rows))
        if len({len(one) for one in lists}) > 1:
            raise PlacerError(
                f"row {number} has {len(lists[0])} lists in {spread[0]}, and "
                f"{len(lists[1])} in {spread[1]}",
                "write a list for each layer in both, or leave the weights out",
            )
        made += [
            {**row, _LAYER: layer, **dict(zip(spread, parts, strict=True))}
            for layer, parts in enumerate(zip(*lists, strict=True))
        ]
    return made or list(map(dict, rows))


def _tokens(
    columns: Mapping[str, Sequence[Any]], model: BoundModel | None, remarks: list[str]
) -> ImportedTokens:
    token = _whole(columns["token"], "token")
    experts = _whole([row_ids(one) for one in columns["experts"]], "experts", ndim=2)
    if "sequence" in columns:
        sequence = _numbered(columns["sequence"])
    else:
        sequence = token // _BLOCK
        remarks.append(
            f"no key gives the sequence of a token, so every {_BLOCK} tokens are taken as "
            "one sequence. If the file has such a key: --keys sequence=KEY"
        )
    weights, phase = columns.get("weights"), columns.get("phase")
    ids = columns.get("token_id")
    rows = TokenRows(
        sequence=sequence,
        position=token,
        layer=_whole([layer_of(one) for one in columns["layer"]], "layer"),
        experts=experts,
        weights=None if weights is None else chosen_weights(weights, experts),
        token_ids=None if ids is None else _whole(ids, "token_id"),
        phase=None if phase is None else phase_numbers(phase, _LAYOUT),
    )
    return whole_tokens(rows, model, _LAYOUT, remarks)


def row_ids(value: Any) -> list[Any]:
    """Return ids of one row: a list, one id, or several in a text."""
    if isinstance(value, str) and _LISTED_IDS.fullmatch(value):
        return [int(one) for one in re.findall(r"\d+", value)]
    return value if isinstance(value, list) else [value]


def layer_of(value: Any) -> Any:
    """Return the number of a layer, which may be that of its module's name."""
    number = layer_number(value) if isinstance(value, str) else None
    return value if number is None else number


def _numbered(names: Sequence[Any]) -> Array:
    """Return whole numbers as they are, other names numbered as they come."""
    if all(type(name) is int for name in names):
        return _whole(names, "sequence")
    numbers: dict[str, int] = {}
    return np.asarray([numbers.setdefault(str(name), len(numbers)) for name in names])


def chosen_weights(values: Sequence[Any], experts: Array) -> Array:
    """Return ``[N, k]`` float32, of weights of the chosen experts or of all.

    Raises
    ------
    PlacerError
        If they are not numbers, or neither k nor one for every expert.
    """
    try:
        given = np.asarray(
            [one if isinstance(one, list) else [one] for one in values], dtype=np.float32
        )
    except (ValueError, TypeError) as error:
        raise PlacerError("weights are not rows of numbers of one length") from error
    if given.shape == experts.shape:
        return given
    if experts.max() >= given.shape[1]:
        raise PlacerError(
            f"{given.shape[1]} weights are given for {experts.shape[1]} experts up to "
            f"{experts.max()}: they must be the weights of the chosen experts, or of all",
            _LAYOUT,
        )
    # Rows of padding, and of dense layers, have -1 for experts.
    return np.take_along_axis(given, np.maximum(experts, 0), axis=1)


def _whole(values: Sequence[Any], what: str, ndim: int = 1) -> Array:
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise PlacerError(f"{what} differ in length from row to row", _LAYOUT) from error
    if array.dtype.kind == "f" and (array == np.floor(array)).all():
        array = array.astype(np.int64)  # as pandas writes columns with gaps
    if array.ndim != ndim or not np.issubdtype(array.dtype, np.integer):
        raise PlacerError(f"{what} holds a value that is not a whole number", _LAYOUT)
    return array


def _held(value: Mapping[str, Any], keys: Keys) -> Any:
    """Return what holds the layers of a request; lists of lists of ids as ``[., ., k]``."""
    if all(layer_number(key) is not None for key in value):
        return value
    key = keys.named.get("experts") or next(
        (one for one in _REQUEST_KEYS if one in value), ""
    )
    layers = _value(value, key)
    if not isinstance(layers, list) or not layers or isinstance(layers[0], dict):
        return layers
    try:
        ids = np.asarray(layers)
    except ValueError:  # lists of different lengths
        return layers
    return ids if ids.ndim == 3 else layers


def _axes(held: Sequence[Any], model: BoundModel | None) -> tuple[bool, list[str]]:
    """Return whether arrays have layers before tokens, and a remark where that is unsure.

    Requests differ in tokens, never in layers.
    """
    shapes = [one.shape for one in held if isinstance(one, np.ndarray)]
    first, second = ({shape[axis] for shape in shapes} for axis in (0, 1))
    if len(first) == 1 and len(second) > 1:
        return True, [
            f"every request has {first.pop()} lists of as many lists as it has tokens, so "
            "they are read as [layers][tokens][experts]"
        ]
    if model is None and len(first) == len(second) == 1 and max(second) > max(first):
        return False, [axes_doubt(f"{first.pop()} tokens of {second.pop()} layers")]
    if model is not None and len(first) == len(second) == 1:
        moe = model.spec.num_layers
        own = {model.num_hidden_layers, moe, moe - len(model.hash_layers)}
        return first <= own and not second <= own, []
    return False, []


def _request(
    value: Mapping[str, Any], layers: Any, number: int, model: BoundModel | None
) -> TokenRows:
    if not isinstance(layers, dict) or all(ids is None for ids in layers.values()):
        raise PlacerError(
            f"request {number} has no layers; its keys are {', '.join(value)}",
            _REQUESTS_LAYOUT,
        )
    parts = []
    for key, ids in layers.items():
        if ids is None:  # a dense layer
            continue
        layer = layer_number(key)
        if layer is None:
            raise PlacerError(f"request {number}: {key} is not a layer", _REQUESTS_LAYOUT)
        try:
            experts = np.asarray(ids) if isinstance(ids, list) else np.zeros(0)
        except ValueError:  # lists of different lengths
            experts = np.zeros(0)
        if experts.ndim == 1 and experts.size and model is not None:
            if experts.size % model.spec.top_k:
                raise PlacerError(
                    f"request {number}, layer {layer}: {experts.size} ids do not divide "
                    f"into tokens of {model.spec.top_k}",
                    "check --model",
                )
            experts = experts.reshape(-1, model.spec.top_k)
        if experts.ndim != 2 or not np.issubdtype(experts.dtype, np.integer):
            raise PlacerError(
                f"request {number}, layer {layer} does not hold a list of ids for each "
                "token",
                "if it is one list of all ids, name the model: --model DIR (a folder "
                "with its config.json is enough)",
            )
        parts.append((layer, experts))
    if len({ids.shape[1] for _, ids in parts}) > 1:
        raise PlacerError(f"request {number}: layers differ in experts per token")
    return TokenRows(
        sequence=np.full(sum(len(ids) for _, ids in parts), number),
        position=np.concatenate([np.arange(len(ids)) for _, ids in parts]),
        layer=np.repeat([layer for layer, _ in parts], [len(ids) for _, ids in parts]),
        experts=np.concatenate([ids for _, ids in parts]),
    )


def _named_layers(layers: Any, layers_first: bool) -> Any:
    """Return a list of layers, or an array of tokens and layers, by layer number."""
    if isinstance(layers, np.ndarray):
        ids = layers if layers_first else layers.swapaxes(0, 1)
        return {str(layer): one.tolist() for layer, one in enumerate(ids)}
    if not isinstance(layers, list) or not layers or not isinstance(layers[0], dict):
        return layers
    keys = NO_KEYS
    names = {meaning: keys.found(meaning, layers[0]) for meaning in ("layer", "experts")}
    named: dict[str, Any] = {}
    for one in layers:
        if not isinstance(one, dict):
            raise PlacerError(
                f"a list of layers holds {one!r:.40}, not an object", _REQUESTS_LAYOUT
            )
        layer = str(one.get(names["layer"]))
        if layer in named:
            raise PlacerError(
                f"layer {layer} is twice in the list of layers of one request",
                "list the experts of all tokens of a layer together; or write each object, "
                "with its token and request_id, on a line, and import that as jsonl",
            )
        named[layer] = one.get(names["experts"])
    return named


def layer_number(key: Any) -> int | None:
    """Return the number of ``3``, ``layer_3`` or ``model.layers.3.mlp``."""
    found = re.findall(r"\d+", str(key))
    # int() refuses thousands of digits; no model has a layer of ten.
    return int(found[0]) if len(found) == 1 and len(found[0]) < 10 else None

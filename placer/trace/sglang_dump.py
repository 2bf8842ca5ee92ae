"""Reading what SGLang's expert distribution recorder dumps in mode ``per_token``.

A ``.pt`` file (``expert_distribution_recorder_*.pt``; SGLang 0.4.6 and later,
``srt/eplb/expert_distribution.py``) that holds a list of forward passes and the map from
physical to logical experts when it was dumped. Ids in it are physical.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from placer.errors import PlacerError
from placer.run.archives import UNREADABLE, load_torch
from placer.trace.imported import Array, BoundModel, ImportedTokens

_DECODE = 2  # SGLang's ForwardMode.DECODE
_RECORD_AGAIN = "record in mode per_token: --expert-distribution-recorder-mode per_token"


def read_sglang_dump(file: Path, model: BoundModel | None) -> ImportedTokens:
    """Read a dump; physical ids become logical ones by the dump's own map.

    Each prompt is a sequence. The dump does not say which request a decoded token is of,
    so each of those is its own sequence: rows that follow each other in one request
    may fall on both sides of a fold. Layers that no token has ids for are dense: their
    rows are zeros where a model is bound, and left out where none is.

    Raises
    ------
    PlacerError
        If it is not such a dump, would need unpickling of foreign classes, or an id has no
        place in the map.
    """
    dump = _tokens_of(file)
    try:
        return _imported(dump, model)
    except UNREADABLE as error:
        raise PlacerError(
            f"it is not a dump of mode per_token: {error!r}", _RECORD_AGAIN
        ) from error


def _imported(dump: Mapping[str, Any], model: BoundModel | None) -> ImportedTokens:
    physical = [np.asarray(one["topk_ids_of_layer"]) for one in dump["records"]]
    ids = _logical(np.concatenate(physical, axis=1), dump["last_physical_to_logical_map"])
    recorded = (ids >= 0).any(axis=(1, 2))
    real = (ids[recorded] >= 0).any(axis=2).all(axis=0)
    columns = (ids[recorded][:, real] >= 0).all(axis=(0, 1))
    kept = ids[:, real][:, :, columns]
    if not kept.size:
        raise PlacerError("it has no routed tokens", _RECORD_AGAIN)
    if model is None:
        kept = kept[recorded]
    tokens = {name: values[real] for name, values in _passes(dump["records"]).items()}
    return ImportedTokens(
        experts=np.maximum(kept, 0).transpose(1, 0, 2),
        sequence_ids=tokens["sequence_ids"],
        positions=tokens["positions"],
        token_ids=tokens["token_ids"],
        phase=tokens["phase"],
    )


def load_dump(file: Path, record_again: str) -> Any:
    """Load a ``.pt`` file of the recorder, without running code from it.

    Raises
    ------
    PlacerError
        If it cannot be read so; the hint is ``record_again``.
    """
    try:
        return load_torch(file)
    except PlacerError as error:
        raise PlacerError(error.message, record_again) from error


def _tokens_of(file: Path) -> Mapping[str, Any]:
    dump = load_dump(file, _RECORD_AGAIN)
    records = dump.get("records") if isinstance(dump, dict) else None
    if isinstance(dump, dict) and "logical_count" in dump:
        raise PlacerError(
            f"{file} holds only counts (mode stat): links between layers and "
            "co-activation are unknown",
            "balance with them: placer import sglang-stat FILE --model DIR --out "
            f"AFFINITY; or {_RECORD_AGAIN}",
        )
    if (
        not isinstance(records, list)
        or not records
        or "last_physical_to_logical_map" not in dump
        or any(not isinstance(one, dict) for one in records)
    ):
        raise PlacerError(f"{file} is not a dump of mode per_token", _RECORD_AGAIN)
    loaded: Mapping[str, Any] = dump
    return loaded


def _logical(physical: Array, mapping: Any) -> Array:
    """Map ``[L, T, k]`` physical ids by ``[L, P]``; -1 stays -1."""
    table = np.asarray(mapping)
    if not (
        np.issubdtype(table.dtype, np.integer) and np.issubdtype(physical.dtype, np.integer)
    ):
        raise PlacerError(
            f"ids are {physical.dtype} and the map {table.dtype}, expected integers"
        )
    if table.ndim != 2 or len(table) != len(physical):
        raise PlacerError(
            f"last_physical_to_logical_map has shape {list(table.shape)}, but ids are of "
            f"{len(physical)} layers",
            _RECORD_AGAIN,
        )
    if physical.max() >= table.shape[1]:
        raise PlacerError(
            f"a token uses physical expert {physical.max()}, but the map has "
            f"{table.shape[1]}",
            "the map changed while recording; switch rebalancing off and record again",
        )
    layer = np.arange(len(table))[:, None, None]
    return np.where(physical < 0, -1, table[layer, np.maximum(physical, 0)]).astype(
        np.int64
    )


def _passes(records: list[Mapping[str, Any]]) -> dict[str, Array]:
    """Return sequence ids, positions, token ids and phase of every token ``[T]``."""
    sequence, phase, first = [], [], 0
    for one in records:
        num_tokens = len(one["input_ids"])
        decoding = one["forward_mode"] == _DECODE
        lengths = one.get("extend_seq_lens")
        if decoding or lengths is None:
            lengths = [1] * num_tokens
        if sum(lengths) != num_tokens or len(one["positions"]) != num_tokens:
            raise PlacerError(
                f"forward pass {one.get('forward_pass_id')} has {num_tokens} tokens, but "
                f"{sum(lengths)} in its sequences and {len(one['positions'])} positions",
                _RECORD_AGAIN,
            )
        sequence.append(first + np.repeat(np.arange(len(lengths)), lengths))
        phase.append(np.full(num_tokens, int(decoding)))
        first += len(lengths)
    return {
        "sequence_ids": np.concatenate(sequence),
        "positions": np.concatenate([np.asarray(one["positions"]) for one in records]),
        "token_ids": np.concatenate([np.asarray(one["input_ids"]) for one in records]),
        "phase": np.concatenate(phase).astype(np.uint8),
    }

"""Building whole tokens from rows of one token in one layer."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.errors import PlacerError
from placer.trace.imported import BoundModel, ImportedTokens

Array = npt.NDArray[Any]
# No model has as many: a larger number means something else.
_MOST_LAYERS = 4096
_PHASES = {"prefill": 0, "decode": 1}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenRows:
    """N rows, of one token in one layer each, in any order.

    Attributes
    ----------
    sequence, position, layer
        ``[N]`` integers.
    experts
        ``[N, k]`` integers.
    weights
        ``[N, k]`` floats, or ``None``.
    token_ids, phase
        ``[N]`` integers, or ``None``.
    """

    sequence: Array
    position: Array
    layer: Array
    experts: Array
    weights: Array | None = None
    token_ids: Array | None = None
    phase: Array | None = None


def whole_tokens(
    rows: TokenRows, model: BoundModel | None, layout: str, remarks: Sequence[str] = ()
) -> ImportedTokens:
    """Join the rows of every token.

    Layers that are not numbered from 0 without a gap are the model's own layer numbers.

    Parameters
    ----------
    rows
        The rows.
    model
        The model, or ``None``: then the layers found are taken for its MoE layers.
    layout
        What such a file looks like: the hint of an error.
    remarks
        What the reader has to say.

    Raises
    ------
    PlacerError
        If a token lacks a layer or has one twice, or the model has no such layer.
    """
    layers, column = np.unique(rows.layer, return_inverse=True)
    if layers[0] < 0 or layers[-1] >= _MOST_LAYERS:
        odd = layers[0] if layers[0] < 0 else layers[-1]
        raise PlacerError(f"layer {odd} is negative or beyond {_MOST_LAYERS}", layout)
    order = np.lexsort((column, rows.position, rows.sequence))
    _require_every_layer(rows, column[order], order, layers, layout)
    first = order[:: len(layers)]
    experts = rows.experts[order].reshape(len(first), len(layers), -1)
    weights = None if rows.weights is None else rows.weights[order].reshape(experts.shape)
    told = list(remarks)
    if layers.tolist() != [*range(len(layers))]:
        if model is None:
            told.append(
                f"its {len(layers)} layers have the numbers {layers[0]} to {layers[-1]}: "
                "placer takes them as all MoE layers of the model"
            )
        else:
            if is_counted_from_one(layers.tolist(), model):
                layers = layers - 1
                told.append(counted_from_one(len(layers)))
            experts, weights = _in_hidden_layers(experts, weights, layers, model)
    return ImportedTokens(
        experts=experts,
        weights=weights,
        sequence_ids=rows.sequence[first],
        positions=rows.position[first],
        token_ids=None if rows.token_ids is None else rows.token_ids[first],
        phase=None if rows.phase is None else rows.phase[first],
        remarks=tuple(told),
    )


def is_counted_from_one(layers: Collection[int], model: BoundModel) -> bool:
    """Return whether the numbers of layers are the model's own MoE layers, each plus 1.

    Models with hash layers are left alone: without the first layer, which is not recorded,
    and with one for multi-token prediction, their own numbers look the same.
    """
    own = model.spec.layer_ids or ()
    return not model.hash_layers and {*layers} == {one + 1 for one in own}


def counted_from_one(num_layers: int) -> str:
    """Return the remark that layers count from 1."""
    return f"its {num_layers} layers count from 1: they are the model's layers, each plus 1"


def phase_numbers(values: Sequence[Any], layout: str) -> Array:
    """Return 0 for prefill and 1 for decode, given so or by name.

    Raises
    ------
    PlacerError
        If a value is neither.
    """
    named = [_PHASES.get(v.lower(), -1) if isinstance(v, str) else v for v in values]
    odd = [v for v, n in zip(values, named, strict=True) if n not in (0, 1)]
    if odd:
        raise PlacerError(
            f"phase is {odd[0]!r}, expected prefill or decode, or 0 or 1", layout
        )
    return np.asarray(named, dtype=np.int64)


def _require_every_layer(
    rows: TokenRows, column: Array, order: Array, layers: Array, layout: str
) -> None:
    expected = np.arange(len(order)) % len(layers)
    token = np.stack([rows.sequence[order], rows.position[order]])
    starts = np.arange(len(order)) - expected
    wrong = (column != expected) | (token != token[:, starts]).any(axis=0)
    if len(order) % len(layers):
        wrong[-1] = True
    if not wrong.any():
        return
    row = order[int(wrong.argmax())]
    numbers = f"{layers[0]} to {layers[-1]}"
    raise PlacerError(
        f"the token at position {rows.position[row]} of sequence {rows.sequence[row]} does "
        f"not have each of the layers {numbers} once",
        layout,
    )


def _in_hidden_layers(
    experts: Array, weights: Array | None, layers: Array, model: BoundModel
) -> tuple[Array, Array | None]:
    """Set layers at the model's own numbers, zeros in all others."""
    if layers[-1] >= model.num_hidden_layers:
        raise PlacerError(
            f"it has layer {layers[-1]}, the model {model.num_hidden_layers} hidden layers",
            "check --model; layers after the last one are for multi-token prediction "
            "(MTP): leave them out. Layers count from 0: if yours count from 1, subtract 1",
        )
    shape = (len(experts), model.num_hidden_layers, experts.shape[2])
    placed = np.zeros(shape, dtype=experts.dtype)
    placed[:, layers] = experts
    if weights is None:
        return placed, None
    of_placed = np.zeros(shape, dtype=weights.dtype)
    of_placed[:, layers] = weights
    return placed, of_placed

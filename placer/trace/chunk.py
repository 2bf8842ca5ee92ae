"""One chunk of a trace: whole sequences, one tensor per MoE layer."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from placer.arrays import AnyArray, BoolArray, IntArray
from placer.errors import PlacerError
from placer.model import ModelSpec

_TOKEN_FIELDS: dict[str, type[np.generic]] = {
    "token_ids": np.int32,
    "sequence_ids": np.int32,
    "positions": np.int32,
    "domain_ids": np.uint8,
    "phase": np.uint8,
    "step_ids": np.int32,
}
_REQUIRED_FIELDS = ("sequence_ids", "positions")
_LARGEST = int(np.iinfo(np.int32).max)
_RANGES = (
    ("sequence_ids", 0, _LARGEST),
    ("positions", 0, _LARGEST),
    ("token_ids", -1, _LARGEST),
    ("phase", 0, 1),
)


def expert_dtype(num_experts: int) -> type[np.generic]:
    """Return the dtype of expert ids: uint8 up to 256 experts, else int16."""
    return np.uint8 if num_experts <= 256 else np.int16


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The routing of T tokens.

    Attributes
    ----------
    experts
        L arrays ``[T, k]``, uint8 or int16: logical expert ids by descending router
        weight, as the router chose them, before any capacity drop.
    weights
        L arrays ``[T, k]`` float16: the router weights of those experts, or ``None``.
    token_ids
        ``[T]`` int32 vocabulary ids, -1 where unknown, or ``None``.
    sequence_ids
        ``[T]`` int32, non-decreasing.
    positions
        ``[T]`` int32 position of the token in its sequence.
    domain_ids
        ``[T]`` uint8 index into the trace's domains, or ``None``.
    phase
        ``[T]`` uint8: 0 prefill, 1 decode, or ``None``.
    step_ids
        ``[T]`` int32: the forward pass that computed the token, or ``None``.
    """

    experts: tuple[AnyArray, ...]
    weights: tuple[AnyArray, ...] | None = None
    token_ids: AnyArray | None = None
    sequence_ids: AnyArray
    positions: AnyArray
    domain_ids: AnyArray | None = None
    phase: AnyArray | None = None
    step_ids: AnyArray | None = None

    def __post_init__(self) -> None:
        if self.sequence_ids.ndim != 1 or self.experts[0].ndim != 2:
            raise PlacerError(
                f"sequence_ids has shape {list(self.sequence_ids.shape)} and experts.0 "
                f"{list(self.experts[0].shape)}, expected [T] and [T, k]"
            )
        shape = (self.num_tokens, self.experts[0].shape[1])
        for name, layers in (("experts", self.experts), ("weights", self.weights or ())):
            for layer, values in enumerate(layers):
                if values.shape != shape:
                    raise PlacerError(
                        f"{name}.{layer} has shape {list(values.shape)}, "
                        f"expected {list(shape)}"
                    )
        for name in _TOKEN_FIELDS:
            values = getattr(self, name)
            if values is not None and values.shape != (self.num_tokens,):
                raise PlacerError(
                    f"{name} has shape {list(values.shape)}, expected [{self.num_tokens}]"
                )
        # Compared, not subtracted: a difference of int32 may wrap around.
        if (self.sequence_ids[1:] < self.sequence_ids[:-1]).any():
            raise PlacerError("sequence_ids decrease inside a chunk")

    @property
    def num_tokens(self) -> int:
        """Number of tokens, T."""
        return len(self.sequence_ids)

    def tensors(self) -> dict[str, AnyArray]:
        """Return the chunk under the tensor names of the file format."""
        named = {f"experts.{n}": ids for n, ids in enumerate(self.experts)}
        for layer, weights in enumerate(self.weights or ()):
            named[f"weights.{layer}"] = weights
        for name in _TOKEN_FIELDS:
            if (values := getattr(self, name)) is not None:
                named[name] = values
        return {name: np.ascontiguousarray(values) for name, values in named.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, AnyArray], num_layers: int) -> Self:
        """Read the inverse of :meth:`tensors`.

        Raises
        ------
        PlacerError
            If a tensor is missing, unknown, or of another dtype than the format's.
        """
        names = [f"experts.{n}" for n in range(num_layers)]
        weight_names = [f"weights.{n}" for n in range(num_layers)]
        unknown = set(tensors) - {*names, *weight_names, *_TOKEN_FIELDS}
        if unknown:
            raise PlacerError(f"unknown tensors: {', '.join(sorted(unknown))}")
        for name in (*names, *_REQUIRED_FIELDS):
            if name not in tensors:
                raise PlacerError(f"tensor {name} is missing")
        for name, dtype in _TOKEN_FIELDS.items():
            if name in tensors and tensors[name].dtype != dtype:
                raise PlacerError(
                    f"{name} is {tensors[name].dtype}, expected {np.dtype(dtype)}"
                )
        for name in names:
            if tensors[name].dtype not in (np.uint8, np.int16):
                raise PlacerError(
                    f"{name} is {tensors[name].dtype}, expected uint8 or int16"
                )
        has_weights = any(name in tensors for name in weight_names)
        for name in weight_names if has_weights else ():
            if name not in tensors or tensors[name].dtype != np.float16:
                raise PlacerError(f"{name} must be float16, like the weights of all layers")
        fields: dict[str, Any] = {name: tensors.get(name) for name in _TOKEN_FIELDS}
        return cls(
            experts=tuple(tensors[name] for name in names),
            weights=tuple(tensors[name] for name in weight_names) if has_weights else None,
            **fields,
        )

    def select(self, index: AnyArray) -> "Chunk":
        """Return the tokens at ``index`` ([T] bool or int64 positions)."""
        return self._map(lambda values: values[index])

    def _map(self, change: Callable[[AnyArray], AnyArray]) -> "Chunk":
        fields: dict[str, Any] = {
            name: None if (v := getattr(self, name)) is None else change(v)
            for name in _TOKEN_FIELDS
        }
        return Chunk(
            experts=tuple(change(ids) for ids in self.experts),
            weights=None
            if self.weights is None
            else tuple(change(w) for w in self.weights),
            **fields,
        )

    @classmethod
    def concatenate(cls, chunks: Iterable["Chunk"]) -> "Chunk":
        """Join chunks of one trace, by sequence id; optional fields must agree.

        Raises
        ------
        PlacerError
            If there is none, or one continues a sequence of another.
        """
        parts = list(chunks)
        if not parts:
            raise PlacerError(
                "no token is left to read",
                "choose another --fold or --phase, or record more text",
            )
        first = parts[0]
        order = sequence_order([part.sequence_ids for part in parts])

        def joined(values: list[AnyArray]) -> AnyArray:
            every: AnyArray = np.concatenate(values)
            return every if order is None else every[order]

        def join(values: list[AnyArray | None]) -> AnyArray | None:
            present = [v for v in values if v is not None]
            return joined(present) if len(present) == len(parts) else None

        fields: dict[str, Any] = {
            name: join([getattr(p, name) for p in parts]) for name in _TOKEN_FIELDS
        }
        return cls(
            experts=tuple(
                joined([p.experts[n] for p in parts]) for n in range(len(first.experts))
            ),
            weights=tuple(
                joined([p.weights[n] for p in parts if p.weights is not None])
                for n in range(len(first.experts))
            )
            if all(p.weights is not None for p in parts)
            else None,
            **fields,
        )

    def require_finite_weights(self) -> None:
        """Refuse router weights that are no numbers, or too large for float16.

        Raises
        ------
        PlacerError
            If a weight is infinite or NaN; the MoE layer is named.
        """
        for layer, weights in enumerate(self.weights or ()):
            if not np.isfinite(weights).all():
                raise PlacerError(
                    f"MoE layer {layer}: a router weight is NaN or beyond float16, so the "
                    "order of the experts is unknown",
                    "check how they were recorded; some models need bfloat16 or float32",
                )

    def first_sequences(self, num_tokens: int) -> "Chunk":
        """Return the first whole sequences: at least this many tokens where there are."""
        if self.num_tokens <= num_tokens:
            return self
        return self.select(self.sequence_ids <= self.sequence_ids[num_tokens])

    def require_within(self, model: ModelSpec) -> None:
        """Refuse ids that the model cannot have emitted.

        Raises
        ------
        PlacerError
            If the number of layers or top-k differs, an expert id is out of range, a
            token lists one expert twice, or another id is none that the format has.
        """
        require_ranges(self)
        if len(self.experts) != model.num_layers:
            raise PlacerError(
                f"{len(self.experts)} MoE layers recorded, the model has {model.num_layers}"
            )
        for layer, (ids, size) in enumerate(
            zip(self.experts, model.num_experts, strict=True)
        ):
            if ids.shape[1] != model.top_k:
                raise PlacerError(
                    f"MoE layer {layer}: {ids.shape[1]} experts per token recorded, "
                    f"the model's top_k is {model.top_k}"
                )
            if ids.size == 0:
                continue
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= size:
                raise PlacerError(
                    f"MoE layer {layer}: expert id {high if high >= size else low} is "
                    f"outside 0..{size - 1}",
                    "check that the trace is of this model and holds logical ids",
                )
            twice = _listed_twice(ids)
            if twice.any():
                row = int(twice.argmax())
                raise PlacerError(
                    f"MoE layer {layer}: token {row} lists an expert twice: "
                    f"{ids[row].tolist()}",
                    "layers that are not captured are often all zeros: record again, or "
                    "leave that layer out",
                )


def require_ranges(tokens: object) -> None:
    """Refuse ids of tokens that the format does not allow, by names of :class:`Chunk`.

    Raises
    ------
    PlacerError
        If one is too small or too large; both values are named.
    """
    for name, low, high in _RANGES:
        values = getattr(tokens, name)
        if values is None or not values.size:
            continue
        for found in (int(values.min()), int(values.max())):
            if not low <= found <= high:
                raise PlacerError(f"{name} holds {found}, expected {low} to {high}")


def sequence_order(parts: list[AnyArray]) -> IntArray | None:
    """Return the order of the tokens by the ids of their sequences, ``None`` if as given.

    Raises
    ------
    PlacerError
        If it is another order, and a sequence is in two parts.
    """
    ids = np.concatenate(parts)
    if not (ids[1:] < ids[:-1]).any():
        return None
    every, times = np.unique(
        np.concatenate([np.unique(part) for part in parts]), return_counts=True
    )
    if (times > 1).any():
        raise PlacerError(
            f"sequence {every[times.argmax()]} is in two chunks, but a chunk holds whole "
            "sequences",
            "find the damage: placer trace validate TRACE; then record or import it again",
        )
    order: IntArray = np.argsort(ids, kind="stable")
    return order


def _listed_twice(ids: AnyArray) -> BoolArray:
    """Return ``[T]``: whether a row of ``ids`` [T, k] holds an id more than once."""
    columns = np.ascontiguousarray(ids.T)
    twice = np.zeros(columns.shape[1], dtype=np.bool_)
    # Few columns: comparing all pairs of them beats sorting every row.
    for n, column in enumerate(columns):
        for earlier in columns[:n]:
            twice |= column == earlier
    return twice

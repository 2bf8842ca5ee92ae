"""What a plan changes in a checkpoint: names of expert tensors, rows of routers."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from placer.arrays import IntArray
from placer.checkpoint.copying import TABLE_DTYPES
from placer.checkpoint.shard import TensorInfo
from placer.errors import PlacerError
from placer.model import Architecture, ModelSpec
from placer.model.tensor_layout import (
    NAMES_EXPERTS,
    TensorKind,
    TensorPlace,
    has_columns,
    is_of_all,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorChanges:
    """The changes of one checkpoint.

    Attributes
    ----------
    names
        New name of every per-expert tensor whose expert moves, by old name.
    rows
        Per tensor that holds all experts of a layer, routers among them, the old block
        that each new block takes; blocks are E equal parts of it.
    columns
        Those of ``rows`` whose blocks are the columns of a matrix, with its rows.
    tables
        Per tensor whose values are numbers of experts, the new number of each old one.
    """

    names: Mapping[str, str]
    rows: Mapping[str, IntArray]
    columns: Mapping[str, int]
    tables: Mapping[str, IntArray]


def tensor_changes(
    tensors: Mapping[str, TensorInfo],
    architecture: Architecture,
    config: Mapping[str, Any],
    model: ModelSpec,
    permutation: Sequence[IntArray],
) -> TensorChanges:
    """Classify every tensor, and say what happens to those of MoE layers.

    Layers for multi-token prediction, which plans do not place, stay as they are: they
    have their own experts and router.

    Parameters
    ----------
    tensors
        All tensors of the checkpoint.
    architecture, config, model
        Its family, ``config.json`` and shape.
    permutation
        L arrays ``[E]``: new expert e is old expert ``permutation[l][e]``.

    Raises
    ------
    PlacerError
        If a tensor belongs to experts or a router and no rule of the family
        names it, or an expert or router is missing: nothing is guessed.
    """
    found = _Changes(architecture, config, model, permutation, tensors)
    for name, info in tensors.items():
        place = found.place(name)
        if place is not None:
            found.add(name, info, place)
    found.held.require_complete(model)
    return TensorChanges(
        names=found.names, rows=found.rows, columns=found.columns, tables=found.tables
    )


class _Changes:
    """The changes of the tensors seen so far."""

    def __init__(
        self,
        architecture: Architecture,
        config: Mapping[str, Any],
        model: ModelSpec,
        permutation: Sequence[IntArray],
        tensors: Mapping[str, TensorInfo],
    ) -> None:
        self.names: dict[str, str] = {}
        self.rows: dict[str, IntArray] = {}
        self.columns: dict[str, int] = {}
        self.tables: dict[str, IntArray] = {}
        self.held = _Held()
        self._architecture = architecture
        self._layout = architecture.require_layout()
        self._tensors = tensors
        # Layers behind the last are of multi-token prediction, counted in config or not.
        self._num_layers = architecture.num_hidden_layers(config)
        self._num_experts = model.num_experts
        self._ordinal = {layer: n for n, layer in enumerate(model.layer_ids or ())}
        self._old = permutation
        self._new = [np.argsort(row) for row in permutation]

    def place(self, name: str) -> TensorPlace | None:
        """Return what a tensor is, ``None`` if no plan changes it."""
        place = self._layout.classify(name)
        if place is not None and (
            place.kind is TensorKind.REST or (place.layer or 0) >= self._num_layers
        ):
            return None
        in_moe_layer = place is not None and place.layer in self._ordinal
        known = place is not None and place.kind is not None
        if in_moe_layer and known:
            return place
        if in_moe_layer or (place is None and NAMES_EXPERTS.search(name)):
            raise self._unknown(name, "no rule of its family names it")
        if place is not None and (known or NAMES_EXPERTS.search(name)):
            reason = f"layer {place.layer} is not an MoE layer by the config"
            raise self._unknown(name, reason)
        return None

    def add(self, name: str, info: TensorInfo, place: TensorPlace) -> None:
        """Note what becomes of a tensor of an MoE layer."""
        n = self._ordinal[place.layer or 0]
        self.held.add(n, place)
        if place.expert is not None:
            if place.expert >= self._num_experts[n]:
                reason = f"the layer has {self._num_experts[n]} experts"
                raise self._unknown(name, reason)
            new = int(self._new[n][place.expert])
            if new != place.expert:
                self.names[name] = place.template.replace("{expert}", str(new))
        elif place.kind is TensorKind.TABLE:
            if info.dtype not in TABLE_DTYPES:
                raise self._unknown(name, f"{info.dtype} is not a whole number")
            self.tables[name] = self._new[n]
        elif has_columns(name, self._tensors):
            self._require_columns(name, info, self._num_experts[n])
            self.rows[name] = self._old[n]
            self.columns[name] = info.shape[0]
        elif not is_of_all(place.kind, name, info.shape):
            self._require_blocks(name, info, place.kind, self._num_experts[n])
            self.rows[name] = self._old[n]

    def _require_blocks(
        self, name: str, info: TensorInfo, kind: TensorKind | None, size: int
    ) -> None:
        """Check that a tensor is E equal blocks, one after the other."""
        axis = info.shape[0] if info.shape else 1
        if kind is not TensorKind.ROUTER:  # [E] or [1, E]
            axis = next((n for n in info.shape if n != 1), 1)
        fits = axis % size == 0 if kind is TensorKind.STACKED else axis == size
        if not fits:
            reason = f"its shape is {list(info.shape)}, not [{size}, ...]"
            raise self._unknown(name, reason)
        if (info.stop - info.start) % size:
            raise self._unknown(name, "its rows do not end at a byte")

    def _require_columns(self, name: str, info: TensorInfo, size: int) -> None:
        """Check that a matrix has one column per expert, of ``qzeros`` packed into words.

        GPTQ packs weights along their input, so that only zero points share a word; AWQ
        packs experts eight to a word, in its own order.
        """
        bits = 8 * (info.stop - info.start)
        per_column = bits // (info.shape[0] * size) if math.prod(info.shape) else 0
        whole = per_column in (2, 4, 8, 16, 32)
        packed = name.endswith(".qzeros") and per_column < 16
        if (
            len(info.shape) != 2
            or bits != per_column * info.shape[0] * size
            or not whole
            or (info.shape[1] != size and not packed)
        ):
            reason = f"its shape is {list(info.shape)}, not [..., {size}]"
            raise self._unknown(name, reason)

    def _unknown(self, name: str, reason: str) -> PlacerError:
        if ".lora_" in name:
            return PlacerError(
                f"tensor {name} belongs to a LoRA adapter, which names experts by their "
                "old numbers",
                "move the adapter's file out of the directory, or merge it into the "
                "weights first (PEFT: merge_and_unload)",
            )
        return PlacerError(
            f"tensor {name} cannot be classified: {reason}",
            f"add it to the data file of {self._architecture.model_types[0]} "
            "(placer/model/architectures), or report the checkpoint",
        )


class _Held:
    """Which experts, and which routers, the MoE layers of a checkpoint have."""

    def __init__(self) -> None:
        self.experts: dict[tuple[int, str], set[int]] = defaultdict(set)
        self.fused: set[int] = set()
        self.routers: set[int] = set()

    def add(self, n: int, place: TensorPlace) -> None:
        if place.expert is not None:
            # A projection: single experts may be left out of quantisation, and then
            # have a weight where others have a packed weight and scales.
            before, _, after = place.template.partition(".{expert}.")
            stem = before.rpartition(".")[2]
            projection = after.partition(".")[0]
            part = projection if stem == "experts" else f"{stem}.{projection}"
            self.experts[n, part].add(place.expert)
        elif place.kind in (TensorKind.FUSED, TensorKind.STACKED):
            self.fused.add(n)
        elif place.kind is TensorKind.ROUTER:
            self.routers.add(n)

    def require_complete(self, model: ModelSpec) -> None:
        for n, size in enumerate(model.num_experts):
            layer = (model.layer_ids or ())[n]
            parts = [part for (where, part) in self.experts if where == n]
            for part in parts:
                missing = set(range(size)) - self.experts[n, part]
                if missing:
                    raise self._lacking(n, layer, part, min(missing))
            has_experts = parts or n in self.fused
            if not has_experts or n not in self.routers:
                raise PlacerError(
                    f"layer {layer}: the checkpoint lacks its "
                    + ("router" if has_experts else "experts"),
                    "fetch the checkpoint again, or check its config.json",
                )

    def _lacking(self, n: int, layer: int, part: str, expert: int) -> PlacerError:
        """Say what an expert lacks, and what it has instead."""
        of_all = max(
            (held for (where, _), held in self.experts.items() if where == n), key=len
        )
        own = sorted(
            other
            for (where, other), held in self.experts.items()
            if where == n and expert in held and held != of_all
        )
        if own:
            return PlacerError(
                f"layer {layer}: expert {expert} has {own[0]} where other experts have "
                f"{part}: it is an approximated expert (MoNE)",
                "placer permutes experts of one shape only: give the checkpoint from "
                "before experts were replaced",
            )
        return PlacerError(
            f"layer {layer}: the checkpoint lacks {part} of expert {expert}",
            "fetch the checkpoint again",
        )


def require_whole_groups(model: ModelSpec, permutation: Sequence[IntArray]) -> None:
    """Refuse a permutation that breaks the groups of a group-limited router.

    The router first picks groups of consecutive experts, so a permutation commutes with
    it only if it moves whole groups, and experts inside a group.

    Raises
    ------
    PlacerError
        If experts of one group would land in different groups.
    """
    for layer, row in enumerate(permutation):
        groups = (row // (len(row) // model.n_group)).reshape(model.n_group, -1)
        mixed = (groups != groups[:, :1]).any(axis=1)
        if mixed.any():
            raise PlacerError(
                f"MoE layer {layer}: the plan mixes router groups "
                f"{sorted(set(groups[mixed.argmax()].tolist()))}, but the router of "
                f"{model.model_type} picks among {model.n_group} groups of consecutive "
                "experts, so a permuted checkpoint would route differently",
                "solve again with whole groups: placer solve TRACE --preserve-groups "
                "--nodes N --gpus-per-node M --out NEW",
            )

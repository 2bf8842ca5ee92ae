"""What a plan changes in a checkpoint: names of expert tensors, rows of routers."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.checkpoint.copying import TABLE_DTYPES
from placer.checkpoint.shard import TensorInfo
from placer.errors import PlacerError
from placer.layout import NAMES_EXPERTS, TensorKind, TensorPlace
from placer.model import Architecture, ModelSpec

IntArray = npt.NDArray[np.int64]


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
    tables
        Per tensor whose values are numbers of experts, the new number of each old one.
    """

    names: Mapping[str, str]
    rows: Mapping[str, IntArray]
    tables: Mapping[str, IntArray]


def tensor_changes(
    tensors: Mapping[str, TensorInfo],
    architecture: Architecture,
    config: Mapping[str, Any],
    model: ModelSpec,
    permutation: Sequence[IntArray],
) -> TensorChanges:
    """Classify every tensor, and say what becomes of those of MoE layers.

    Layers for multi-token prediction, which plans do not place, stay as they are: they
    have experts and a router of their own.

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
        If a tensor stands among the experts or at a router and no rule of the family
        names it, or an expert or router is missing: nothing is guessed.
    """
    layout = architecture.require_layout()
    ordinal = {layer: n for n, layer in enumerate(model.layer_ids or ())}
    inverse = [np.argsort(row) for row in permutation]
    mtp_layers = architecture.mtp_layers(config)
    names: dict[str, str] = {}
    rows: dict[str, IntArray] = {}
    tables: dict[str, IntArray] = {}
    held = _Held()
    for name, info in tensors.items():
        place = layout.classify(name)
        if place is None:
            if NAMES_EXPERTS.search(name):
                raise _unknown(name, architecture, "no rule of its family names it")
            continue
        if place.kind is TensorKind.REST or place.layer in mtp_layers:
            continue
        n = ordinal.get(place.layer or 0)
        if n is None:
            if place.kind is not None or NAMES_EXPERTS.search(name):
                raise _unknown(
                    name, architecture, f"layer {place.layer} is no MoE layer by the config"
                )
            continue
        size = model.num_experts[n]
        held.add(n, place)
        if place.kind is None:
            raise _unknown(name, architecture, "no rule of its family names it")
        if place.expert is not None:
            if place.expert >= size:
                raise _unknown(name, architecture, f"the layer has {size} experts")
            new = int(inverse[n][place.expert])
            if new != place.expert:
                names[name] = place.template.replace("{expert}", str(new))
        elif place.kind is TensorKind.TABLE:
            if info.dtype not in TABLE_DTYPES:
                raise _unknown(name, architecture, f"{info.dtype} is no whole number")
            tables[name] = inverse[n]
        elif place.kind is not TensorKind.FUSED or math.prod(info.shape) != 1:
            _require_blocks(name, info, place.kind, size, architecture)
            rows[name] = permutation[n]
    held.require_complete(model)
    return TensorChanges(names=names, rows=rows, tables=tables)


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
            projection = place.template.partition("{expert}.")[2].partition(".")[0]
            self.experts[n, projection].add(place.expert)
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
                    raise PlacerError(
                        f"layer {layer}: the checkpoint lacks {part} of expert "
                        f"{min(missing)}",
                        "fetch the checkpoint again",
                    )
            has_experts = parts or n in self.fused
            if not has_experts or n not in self.routers:
                raise PlacerError(
                    f"layer {layer}: the checkpoint lacks its "
                    + ("router" if has_experts else "experts"),
                    "fetch the checkpoint again, or check its config.json",
                )


def _require_blocks(
    name: str,
    info: TensorInfo,
    kind: TensorKind | None,
    size: int,
    architecture: Architecture,
) -> None:
    """Check that a tensor is E equal blocks, one after the other."""
    # [1, E] has its experts along the first axis that is longer than 1.
    axis = next((n for n in info.shape if n != 1), 1)
    fits = axis % size == 0 if kind is TensorKind.STACKED else axis == size
    if not fits:
        raise _unknown(
            name, architecture, f"its shape is {list(info.shape)}, not [{size}, ...]"
        )
    if (info.stop - info.start) % size:
        raise _unknown(name, architecture, "its rows end within a byte")


def require_whole_groups(model: ModelSpec, permutation: Sequence[IntArray]) -> None:
    """Refuse a permutation that a group-limited router cannot express.

    The router first picks groups of consecutive experts, so a permutation commutes with
    it only if it moves whole groups, and experts inside a group.

    Raises
    ------
    PlacerError
        If experts of one group would land in different groups.
    """
    if model.n_group == 1:
        return
    for layer, row in enumerate(permutation):
        groups = (row // (len(row) // model.n_group)).reshape(model.n_group, -1)
        mixed = (groups != groups[:, :1]).any(axis=1)
        if mixed.any():
            raise PlacerError(
                f"MoE layer {layer}: the plan mixes router groups "
                f"{sorted(set(groups[mixed.argmax()].tolist()))}, but the router of "
                f"{model.model_type} picks among {model.n_group} groups of consecutive "
                "experts, so a permuted checkpoint would route differently",
                "solve again with whole groups: placer solve --preserve-groups; or export "
                "a runtime map, which has no such limit: placer export sglang",
            )


def _unknown(name: str, architecture: Architecture, reason: str) -> PlacerError:
    return PlacerError(
        f"tensor {name} cannot be classified: {reason}",
        f"name it in the data file of {architecture.model_types[0]} "
        "(placer/architectures), or report the checkpoint",
    )

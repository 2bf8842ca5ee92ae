"""What a plan changes in a checkpoint: names of expert tensors, rows of routers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.checkpoint.shard import TensorInfo
from placer.errors import PlacerError
from placer.model import Architecture, ModelSpec, name_pattern

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorChanges:
    """The changes of one checkpoint.

    Attributes
    ----------
    names
        New name of every per-expert tensor whose expert moves, by old name.
    rows
        Per router tensor (old name), the old row that each new row takes.
    """

    names: Mapping[str, str]
    rows: Mapping[str, IntArray]


def tensor_changes(
    tensors: Mapping[str, TensorInfo],
    architecture: Architecture,
    model: ModelSpec,
    permutation: Sequence[IntArray],
) -> TensorChanges:
    """Classify every tensor, and say what becomes of those of MoE layers.

    Parameters
    ----------
    tensors
        All tensors of the checkpoint.
    architecture, model
        Its family and shape.
    permutation
        L arrays ``[E]``: new expert e is old expert ``permutation[l][e]``.

    Raises
    ------
    PlacerError
        If a tensor stands among the experts or at a router and no rule of the family
        names it, or an expert or router is missing: nothing is guessed.
    """
    ordinal = {layer: n for n, layer in enumerate(model.layer_ids or ())}
    inverse = [np.argsort(row) for row in permutation]
    suspicious = _suspicious(architecture)
    names: dict[str, str] = {}
    rows: dict[str, IntArray] = {}
    experts_of: dict[tuple[int, str], set[int]] = {}
    for name, info in tensors.items():
        found = _match(architecture, name)
        if found is None:
            if suspicious.search(name):
                raise _unknown(name, architecture, "no rule of its family names it")
            continue
        template, layer, expert, part = found
        if layer not in ordinal:
            raise _unknown(
                name, architecture, f"layer {layer} is no MoE layer by the config"
            )
        n = ordinal[layer]
        size = model.num_experts[n]
        if expert is None:
            if not info.shape or info.shape[0] != size:
                raise _unknown(
                    name,
                    architecture,
                    f"its shape is {list(info.shape)}, not [{size}, ...]",
                )
            if (info.stop - info.start) % size:
                raise _unknown(name, architecture, "its rows end within a byte")
            rows[name] = permutation[n]
            continue
        if expert >= size:
            raise _unknown(name, architecture, f"the layer has {size} experts")
        experts_of.setdefault((n, part), set()).add(expert)
        names[name] = template.format(
            layer=layer, expert=int(inverse[n][expert]), name=part
        )
    _require_complete(model, experts_of, rows, architecture)
    return TensorChanges(
        names={old: new for old, new in names.items() if old != new}, rows=rows
    )


def require_no_expert_by_number(value: Any, source: Path) -> None:
    """Refuse a config that names single experts, whose numbers are about to change.

    Quantised checkpoints list layers that were left out, for example
    ``model.layers.3.mlp.experts.5.down_proj``.

    Parameters
    ----------
    value
        A JSON value: the config, or the metadata of a shard.
    source
        The file it stands in, for the error.

    Raises
    ------
    PlacerError
        If any text in it, keys included, holds ``experts.`` and a number.
    """
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for one in value:
            require_no_expert_by_number(one, source)
    elif isinstance(value, str) and re.search(r"\bexperts?\.\d", value):
        raise PlacerError(
            f"{source} names single experts: {value}",
            "remove it if it does not matter, or export a runtime map: "
            "placer export sglang",
        )


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
                "export a runtime map, which has no such limit: placer export sglang",
            )


def _match(
    architecture: Architecture, name: str
) -> tuple[str, int, int | None, str] | None:
    """Return template, layer, expert and rest of a name that a rule of the family fits.

    A number written otherwise than Python would write it (``07``) fits no rule.
    """
    for template in (*architecture.router_tensors, *architecture.expert_tensors):
        if match := name_pattern(template).fullmatch(name):
            found = match.groupdict()
            layer, part = int(found["layer"]), found.get("name") or ""
            expert = int(found["expert"]) if "expert" in found else None
            if template.format(layer=layer, expert=expert, name=part) == name:
                return template, layer, expert, part
    return None


def _suspicious(architecture: Architecture) -> re.Pattern[str]:
    """Return what marks a tensor as belonging to experts or a router.

    ``shared_expert`` is no routed expert, ``expert_bias`` belongs to the routed ones.
    """
    routers = "|".join(
        name_pattern(template.rpartition(".")[0] + ".").pattern.replace("?P<layer>", "?:")
        for template in architecture.router_tensors
    )
    return re.compile(rf"\bexperts?(?![a-z])|^(?:{routers})")


def _require_complete(
    model: ModelSpec,
    experts_of: Mapping[tuple[int, str], set[int]],
    rows: Mapping[str, IntArray],
    architecture: Architecture,
) -> None:
    for n, size in enumerate(model.num_experts):
        layer = (model.layer_ids or ())[n]
        parts = [part for (where, part) in experts_of if where == n]
        for part in parts:
            missing = set(range(size)) - experts_of[n, part]
            if missing:
                raise PlacerError(
                    f"layer {layer}: the checkpoint lacks {part} of expert {min(missing)}",
                    "fetch the checkpoint again",
                )
        routers = [template.format(layer=layer) for template in architecture.router_tensors]
        if not parts or not all(name in rows for name in routers):
            raise PlacerError(
                f"layer {layer}: the checkpoint lacks "
                + ("its experts" if not parts else f"its router {routers[0]}"),
                "fetch the checkpoint again, or check its config.json",
            )


def _unknown(name: str, architecture: Architecture, reason: str) -> PlacerError:
    return PlacerError(
        f"tensor {name} cannot be classified: {reason}",
        f"name it in the data file of {architecture.model_types[0]} "
        "(placer/architectures), or report the checkpoint",
    )

"""How many experts each layer has by the tensors, where a config gives one number for all.

Pruned models keep other numbers of experts in each layer, and some keep their old config.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from placer.model.config_file import tensor_shapes
from placer.model.tensor_layout import TensorKind, TensorLayout, name_pattern


def held_experts(
    directory: Path,
    layout: TensorLayout,
    names: Collection[str],
    layer_ids: Sequence[int],
    sizes: Sequence[int],
) -> tuple[int, ...]:
    """Return ``[L]``: experts of each MoE layer, fewer than ``sizes`` where tensors say so.

    A layer has fewer where its router has as many rows as the names of its tensors count
    experts; or, where all its experts are in one tensor, as the router has rows.

    Parameters
    ----------
    directory
        The checkpoint; it may hold no tensors.
    layout
        The names of its family.
    names
        Those of its tensors.
    layer_ids, sizes
        ``[L]``: the model's own numbers of the MoE layers, and their experts by the config.
    """
    counted = dict(_counted(layout, names, layer_ids))
    doubtful = {
        layer: size
        for layer, size in zip(layer_ids, sizes, strict=True)
        if counted.get(layer, 0) < size
    }
    rows = _router_rows(directory, layout, names, doubtful)
    return tuple(
        rows[layer]
        if rows.get(layer, size) < size and counted.get(layer) in (None, rows[layer])
        else size
        for layer, size in zip(layer_ids, sizes, strict=True)
    )


def _counted(
    layout: TensorLayout, names: Collection[str], layer_ids: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """Yield each layer whose experts have tensors of their own, and how many they are."""
    found: dict[int, set[int]] = {}
    wanted = set(layer_ids)
    for pattern in _expert_patterns(layout, names, layer_ids[0]):
        for name in names:
            if (place := pattern.fullmatch(name)) and int(place["layer"]) in wanted:
                found.setdefault(int(place["layer"]), set()).add(int(place["expert"]))
    for layer, experts in found.items():
        yield layer, len(experts)


def _expert_patterns(
    layout: TensorLayout, names: Collection[str], layer: int
) -> list[re.Pattern[str]]:
    """Return the patterns of experts in the blocks that a checkpoint has."""
    return [
        name_pattern(f"{block}.{rule}")
        for block in layout.blocks_held(layer, names)
        for rule in layout.rules[TensorKind.EXPERT]
    ]


def _router_rows(
    directory: Path,
    layout: TensorLayout,
    names: Collection[str],
    layers: Mapping[int, int],
) -> dict[int, int]:
    """Return the rows of the routers of some layers, where files tell them."""
    routers = {
        name: layer for layer in layers for name in layout.router_names(layer, names)
    }
    return {
        routers[name]: shape[0]
        for name, shape in tensor_shapes(directory, routers).items()
        if len(shape) == 2
    }

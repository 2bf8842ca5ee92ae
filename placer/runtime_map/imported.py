"""Importing an engine's map as a plan."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from placer.errors import PlacerError, UsageError
from placer.model import ModelSpec, require_same_model
from placer.placement import Placement, Plan, SolverReport
from placer.placement.topology import Topology
from placer.run.files import require_file, sha256_file
from placer.runtime_map.engine_family import known_families
from placer.runtime_map.maps import RUNTIMES, require_plan
from placer.runtime_map.runtime import MapSource, ParsedMap
from placer.target.engine import known_engines
from placer.target.map_formats import MAPS
from placer.version import __version__


def import_map(
    name: str, path: Path, topology: Topology, directory: Path | None, out: Path
) -> tuple[Plan, str | None]:
    """Write the plan of a map; return it, and whether only shapes were compared.

    Parameters
    ----------
    name
        A key of ``RUNTIMES``.
    path
        The map; its suffix must be one of the runtime's.
    topology
        Ranks and nodes that the engine runs on.
    directory
        The model that the map is for. Without it every row of the map is taken for a MoE
        layer, and the experts of a token stay unknown (``top_k`` 0), unless the map says.
    out
        The plan to write.

    Raises
    ------
    PlacerError
        As :func:`read_map` does.
    """
    plan, warning = read_map(name, path, topology, directory)
    plan.write(out)
    return plan, warning


def read_map(
    name: str, path: Path, topology: Topology, directory: Path | None
) -> tuple[Plan, str | None]:
    """Return the plan of a map, and whether only shapes were compared.

    Parameters are those of :func:`import_map`.

    Raises
    ------
    PlacerError
        If the map breaks a rule of its runtime, or is not for this model or these ranks.
    """
    require_file(path, "map")
    suffixes = MAPS[name].suffixes
    if path.suffix not in suffixes:
        raise UsageError(
            f"{path} is not a {name} map: its name does not end in {' or '.join(suffixes)}",
            f"placer import {name}-map FILE{suffixes[0]} --gpus-per-node M --out PLAN",
        )
    try:
        return _imported(name, path, topology, directory)
    except PlacerError as error:
        hint = error.hint or (
            f"check FORMAT, --nodes, --gpus-per-node and --model: {name}-map, "
            f"{topology.num_nodes}, {topology.gpus_per_node} and {directory or 'none'}"
        )
        raise type(error)(f"{path}: {error.message}", hint) from error


def _imported(
    name: str, path: Path, topology: Topology, directory: Path | None
) -> tuple[Plan, str | None]:
    runtime = RUNTIMES[name]
    parsed = runtime.parse(path, path.suffix)
    model = _model_of(parsed)
    layers: Sequence[int] = range(len(parsed.rows))
    warning = None
    if directory is not None:
        model = ModelSpec.from_checkpoint(directory)
        layers = parsed.placed_layers(model)
        if parsed.model is not None:
            warning = require_same_model(parsed.model, str(path), model, str(directory))
    rows = [parsed.rows[layer] for layer in layers]
    placement = Placement.from_json(
        rows, model.num_experts, topology.num_ranks, topology.num_nodes
    )
    plan = Plan(
        model=model,
        placement=placement,
        policy="fixed",
        exchange="per-rank",
        max_imbalance=1.1,
        solver=SolverReport(
            status="imported",
            termination=None,
            objective_name="none",
            objective=0.0,
            bound=None,
            gap=None,
            bound_method="none: imported, not solved",
            seconds=None,
            seed=0,
        ),
        metrics={"profile": None, "heldout": None, "baselines": {}},
        provenance={
            "placer": __version__,
            "source": f"{name}-map",
            "map_sha256": sha256_file(path),
            "replica_choice": _drawn(name) if placement.has_replicas else None,
        },
    )
    source = replace(MapSource.of(path, plan, directory), any_integers=True)
    if not runtime.needs_model:
        # Such a map may have been written for a plan that knew no layer numbers.
        named = msgspec.structs.replace(model, fingerprint=None, layer_ids=parsed.layer_ids)
        source = replace(source, model=named)
    elif directory is None:
        ids = parsed.layer_ids or tuple(range(len(rows)))
        source = replace(
            source,
            model=msgspec.structs.replace(model, fingerprint=None, layer_ids=ids),
            num_hidden_layers=ids[-1] + 1,
        )
    require_plan(runtime.read(source, path, path.suffix), source)
    return plan, warning


def _model_of(parsed: ParsedMap) -> ModelSpec:
    """Return what a map says of its model."""
    if parsed.model is not None:
        return parsed.model
    largest = max((expert for row in parsed.rows for expert in row), default=0)
    sizes = parsed.num_experts or (largest + 1,) * len(parsed.rows)
    return ModelSpec(num_experts=sizes, top_k=0, layer_ids=parsed.layer_ids)


def _drawn(name: str) -> str | None:
    """Return how the engine of a format draws replicas, if that is known."""
    family = known_families().get(RUNTIMES[name].family or "")
    if family is None or family.default is None:
        return None
    return known_engines()[family.default].replica_choice

"""The rows of a plan that a permuted checkpoint can hold, or the commands that help."""

import shlex
from pathlib import Path

from placer.arrays import IntArray
from placer.checkpoint.permutation import require_whole_groups
from placer.errors import PlacerError
from placer.model import ModelSpec, read_config
from placer.placement import Plan
from placer.runtime_map.engine_family import known_families, solve_again
from placer.target.map_formats import MAPS


def rows_without_replicas(plan: Plan) -> tuple[IntArray, ...]:
    """Return the permutation of each layer: new expert p is old expert ``row[p]``.

    Raises
    ------
    PlacerError
        If the plan has replicas, with a command that keeps its ranks, engine and tokens.
    """
    try:
        return tuple(map(plan.placement.permutation, range(plan.placement.num_layers)))
    except PlacerError as error:
        again = solve_again(plan, redundant_experts=0)
        raise PlacerError(error.message, f"solve again without them: {again}") from error


def permuted_rows(
    plan: Plan, path: Path, model: ModelSpec, directory: Path
) -> tuple[IntArray, ...]:
    """Return the permutation of each layer; router groups stay whole in it.

    Parameters
    ----------
    plan, path
        The plan, and its file.
    model, directory
        The model, and its Hugging Face directory.

    Raises
    ------
    PlacerError
        If the plan has replicas or mixes router groups. The hint names a map only if the
        engine of the plan reads one of this model.
    """
    try:
        rows = rows_without_replicas(plan)
        require_whole_groups(model, rows)
    except PlacerError as error:
        hint = error.hint
        if not plan.placement.has_replicas:
            hint = f"solve again with whole groups: {solve_again(plan)} --preserve-groups"
        command = _map_command(plan, path, model, directory)
        hint = f"{hint}; or serve a map: {command}" if command else hint
        raise PlacerError(error.message, hint) from error
    return rows


def _map_command(plan: Plan, path: Path, model: ModelSpec, directory: Path) -> str | None:
    """Return the command that writes a map; ``None`` if the plan's engine reads none."""
    engine = plan.engine
    target = "sglang" if engine is None else engine.map_format
    if target not in MAPS:
        return None
    family = known_families()["sglang" if engine is None else engine.family]
    architectures = read_config(directory).get("architectures") or ()
    if family.no_map_reason(model.model_type, architectures) is not None:
        return None
    out = f"map{MAPS[target].suffixes[0]}"
    words = ("export", target, str(path), str(directory), "--out", out)
    return shlex.join(("placer", *words))

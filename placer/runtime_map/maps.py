"""All runtime maps: written, read back by the runtime's own rules, and verified."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from placer.errors import PlacerError, UsageError, VerificationError
from placer.run.documents import parse_json
from placer.run.files import read_text, require_file
from placer.run.writing import atomic_file
from placer.runtime_map.engine_family import (
    Start,
    known_families,
    other_choice,
    solve_again,
    start_lines,
)
from placer.runtime_map.runtime import MapSource, Runtime, require_valid_rows
from placer.target.map_formats import MAPS, format_of_json, format_of_suffix

RUNTIMES: dict[str, Runtime] = {
    name: getattr(import_module(f"placer.runtime_map.{one.runtime[0]}"), one.runtime[1])
    for name, one in MAPS.items()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenMap:
    """A written map and how to start the engine with it.

    Attributes
    ----------
    runtime
        The target.
    num_layers
        MoE layers placed.
    num_slots
        Slots of all of them together.
    start
        How engines are started with it; empty where the format belongs to none, and where
        its engine ignores a map of this model.
    warnings
        Warnings: first that the engine ignores it, then what else is wrong for this model,
        or if only shapes were compared.
    ignored
        The warning that its engine ignores a map of this model; ``None`` where it reads it.
    """

    runtime: str
    num_layers: int
    num_slots: int
    start: tuple[Start, ...]
    warnings: tuple[str, ...]
    ignored: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MapReport:
    """The result of verifying a map: every slot equals the plan's.

    Attributes
    ----------
    runtime
        The format that it is in.
    num_layers, num_slots, num_ranks
        MoE layers, slots of all of them together, and ranks.
    num_replicas
        Slots beyond one per expert.
    ignored
        Why its engine does not read it for this model, and what to serve instead; ``None``
        where it does.
    """

    runtime: str
    num_layers: int
    num_slots: int
    num_ranks: int
    num_replicas: int
    ignored: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def export_map(name: str, plan_path: Path, directory: Path | None, out: Path) -> WrittenMap:
    """Write the map of a plan; it is read back by the runtime's rules before it counts.

    Parameters
    ----------
    name
        A key of ``RUNTIMES``.
    plan_path
        The plan.
    directory
        The model: its config says which layers are MoE layers. ``None`` only for a runtime
        that needs none.
    out
        The file to write; its suffix must be one of the runtime's.

    Raises
    ------
    PlacerError
        If plan and model differ, the runtime cannot express the plan, or ``out`` has
        another suffix.
    """
    runtime = RUNTIMES[name]
    if directory is None and runtime.needs_model:
        raise UsageError(
            f"target {name} needs MODEL: its config says which layers are MoE layers",
            f"placer export {name} {plan_path} MODEL --out {out}",
        )
    suffixes = MAPS[name].suffixes
    if out.suffix not in suffixes:
        raise UsageError(
            f"a map for {name} must have the suffix {' or '.join(suffixes)}, but "
            f"{out} has {out.suffix or 'none'}",
            f"--out {out.with_suffix(suffixes[0])}",
        )
    source = MapSource.read(plan_path, directory)
    with atomic_file(out) as temporary:
        runtime.write(source, temporary, out.suffix)
        require_plan(runtime.read(source, temporary, out.suffix), source)
    rows, ignored = source.placement.physical_to_logical_map, _ignored(runtime, source)
    start = start_lines(name, source.plan, str(directory or "MODEL"), str(out))
    return WrittenMap(
        runtime=name,
        num_layers=len(rows),
        num_slots=sum(len(row) for row in rows),
        start=() if ignored else tuple(start),
        warnings=(*([ignored] if ignored else []), *_warnings(runtime, source)),
        ignored=ignored,
    )


def verify_map(path: Path, plan_path: Path, directory: Path) -> MapReport:
    """Compare a map with the plan: coverage, duplicates, slot counts, every slot.

    Parameters
    ----------
    path
        The map; its format is known by its suffix and content.
    plan_path, directory
        The plan and the model that it was exported for.

    Raises
    ------
    VerificationError
        If the map breaks a rule of its runtime, or is not the plan's.
    PlacerError
        If the plan or the model cannot be read.
    """
    require_file(path, "map")
    source = MapSource.read(plan_path, directory)
    name = _format_of(path)
    again = f"placer export {name} {plan_path} {directory} --out NEW{path.suffix}"
    try:
        rows = RUNTIMES[name].read(source, path, path.suffix)
        require_plan(rows, source)
    except PlacerError as error:
        raise VerificationError(
            f"{path} is not a valid {name} map of {plan_path}: {error.message}",
            f"export it again: {again}",
        ) from error
    num_slots = sum(len(row) for row in rows)
    return MapReport(
        runtime=name,
        num_layers=len(rows),
        num_slots=num_slots,
        num_ranks=source.placement.num_ranks,
        num_replicas=num_slots - sum(source.placement.num_experts),
        ignored=_ignored(RUNTIMES[name], source),
    )


def _warnings(runtime: Runtime, source: MapSource) -> Iterator[str]:
    """Yield what is wrong with a map for this model."""
    if source.warning:
        yield source.warning
    if runtime.status:
        yield runtime.status
    if runtime.family is None:
        return
    if (drawn := other_choice(source.plan, runtime.family)) is not None:
        yield drawn


def _ignored(runtime: Runtime, source: MapSource) -> str | None:
    """Return why the engine does not read a map of this model, and what to serve."""
    if runtime.family is None:
        return None
    family = known_families()[runtime.family]
    reason = family.no_map_reason(source.model.model_type, source.architectures)
    if reason is None:
        return None
    if not source.placement.has_replicas:
        return f"{reason}: serve a permuted checkpoint, {source.checkpoint_command()}"
    engine = family.default if source.plan.engine is None else source.plan.engine.name
    again = solve_again(source.plan, engine, redundant_experts=0)
    return f"{reason}: {again}, then serve a permuted checkpoint, " + (
        source.checkpoint_command("NEW")
    )


def require_plan(rows: Any, source: MapSource) -> None:
    """Refuse rows that are no placement, or not the plan's placement.

    Raises
    ------
    PlacerError
        With layer, slot and both experts.
    """
    placed = source.placement
    found = require_valid_rows(rows, placed.num_experts, placed.num_ranks).to_json()
    for layer, (row, expected) in enumerate(zip(found, placed.to_json(), strict=True)):
        if row == expected:
            continue
        if len(row) != len(expected):
            raise PlacerError(
                f"MoE layer {layer} has {len(row)} slots, the plan {len(expected)}"
            )
        slot = next(n for n, expert in enumerate(row) if expert != expected[n])
        raise PlacerError(
            f"MoE layer {layer}, slot {slot} holds expert {row[slot]}, in the plan "
            f"{expected[slot]}"
        )


def _format_of(path: Path) -> str:
    """Return the name of a map's format; files of many engines end in ``.json``."""
    if (name := format_of_suffix(path.suffix)) is None:
        known = sorted({suffix for one in MAPS.values() for suffix in one.suffixes})
        raise UsageError(
            f"{path} is not a map: its name ends in none of {', '.join(known)}",
            "give a file that placer export wrote, or an exported checkpoint directory",
        )
    if path.suffix != ".json":
        return name
    try:
        value = parse_json(read_text(path, what="map"), f"map {path}")
    except PlacerError as error:
        raise VerificationError(error.message, "export it again") from error
    return format_of_json(value) or (
        "vllm-pr49572" if isinstance(value, list) else "sglang"
    )

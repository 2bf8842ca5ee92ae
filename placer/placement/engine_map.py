"""Telling an engine's map from a plan: maps are imported first."""

from pathlib import Path

from placer.errors import PlacerError
from placer.run.documents import parse_json
from placer.run.files import read_bytes
from placer.target.map_formats import MAPS, format_of_json, format_of_suffix


def map_format(path: Path) -> str | None:
    """Return the format of an engine's map, without ``-map``; ``None`` of other files."""
    name = format_of_suffix(path.suffix)
    if name is None:
        return None
    if path.suffix != ".json":
        mark = MAPS[name].mark
        return name if not mark or mark in read_bytes(path) else None
    try:
        return format_of_json(parse_json(read_bytes(path), "file"))
    except PlacerError:
        return None


def require_no_map(path: Path) -> None:
    """Refuse an engine's map where a plan is read.

    Raises
    ------
    PlacerError
        With the command that makes a plan of it.
    """
    if path.is_file() and (name := map_format(path)) is not None:
        raise PlacerError(
            f"{path} is an engine's map ({name}-map), not a plan",
            f"import it first: placer import {name}-map {path} --nodes N --gpus-per-node M "
            "--out PLAN",
        )

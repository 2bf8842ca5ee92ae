"""Telling an engine's map from a plan: maps are imported first."""

from pathlib import Path

from placer.errors import PlacerError
from placer.run.documents import parse_json
from placer.run.files import read_bytes
from placer.target.map_formats import MAPS, format_of_json, format_of_suffix

# Recorded tokens and loads are in such files too, and in JSON lists of rows.
_SUFFIXES_OF_RECORDS = (".csv", ".pt")


def map_format(path: Path) -> str | None:
    """Return the format of an engine's map, without ``-map``; ``None`` of other files."""
    name = format_of_suffix(path.suffix)
    if name is None:
        return None
    try:
        if path.suffix == ".json":
            return format_of_json(parse_json(read_bytes(path), "file"))
        mark = MAPS[name].mark
        return name if not mark or mark in read_bytes(path) else None
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


def require_no_map_as(path: Path, wanted: str) -> None:
    """Refuse an engine's map where ``wanted``, such as "a trace", is read.

    A file that may be recorded tokens or loads as well passes: its reader says what lacks.

    Raises
    ------
    PlacerError
        With the command that makes a plan of it.
    """
    if not path.is_file() or path.suffix in _SUFFIXES_OF_RECORDS:
        return
    name = map_format(path)
    if name is not None and (path.suffix != ".json" or MAPS[name].keys):
        raise PlacerError(
            f"{path} is an engine's map ({name}-map), not {wanted}",
            f"a map becomes a plan: placer import {name}-map {path} --nodes N "
            "--gpus-per-node M --out PLAN",
        )

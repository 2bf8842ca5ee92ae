"""Recognise an engine's map where a plan is expected: maps are imported first."""

from pathlib import Path
from typing import Any

from placer.errors import PlacerError
from placer.run.documents import parse_json
from placer.run.files import read_bytes

# Formats whose suffix no plan has. Files in .json are recognised by their keys.
_BY_SUFFIX = {".yaml": "trtllm", ".yml": "trtllm", ".pt": "sglang", ".csv": "csv"}
_ARRAYS = (".npz", ".safetensors")


def map_format(path: Path) -> str | None:
    """Return the format of an engine's map, without ``-map``; ``None`` of other files."""
    if path.suffix in _ARRAYS:
        return "eplb" if b"phy2log" in read_bytes(path) else None
    if path.suffix != ".json":
        return _BY_SUFFIX.get(path.suffix)
    try:
        return json_format(parse_json(read_bytes(path), "file"))
    except PlacerError:
        return None


def json_format(value: Any) -> str | None:
    """Return the format of a map in JSON, ``None`` of other documents."""
    if isinstance(value, list) and value and all(isinstance(one, list) for one in value):
        return "vllm-pr49572"
    keys = set(value) if isinstance(value, dict) else set()
    if "layer_list" in keys:
        return "vllm-ascend"
    if "model_maps" in keys:
        return "vllm-das"
    if "physical_to_logical_map" not in keys or (keys & {"model", "kind"} == {"model"}):
        return None
    return "json" if "kind" in keys else "sglang"


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

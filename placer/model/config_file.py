"""The config of a model directory, and the names of its tensors."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from placer.errors import PlacerError
from placer.run.documents import parse_json, read_json
from placer.run.files import open_regular

CONFIG_NAME = "config.json"
#: Mistral's own config, of checkpoints in ``consolidated`` files.
PARAMS_NAME = "params.json"
#: Indexes of the files of tensors, and single files, in the order in which they are sought.
INDEX_NAMES = ("model.safetensors.index.json", "consolidated.safetensors.index.json")
SINGLE_NAMES = ("model.safetensors", "consolidated.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MAX_HEADER_BYTES = 100_000_000
# What sglang 0.5.23 calls them (srt/utils/hf_transformers/mistral_utils.py).
_MOE_KEYS = {"route_every_n": "moe_layer_freq"}


def read_config(directory: Path) -> dict[str, Any]:
    """Read a model's ``config.json``, or Mistral's ``params.json`` where there is none.

    Instead of the directory, a ``config.json`` itself may be given.

    The keys of ``moe`` in ``params.json`` are found next to the others.

    Raises
    ------
    PlacerError
        If there is no such directory, or no config in it.
    """
    require_downloaded(directory)
    if directory.is_file():
        return read_json(directory, "model config")
    path = directory / CONFIG_NAME
    params = directory / PARAMS_NAME
    if path.is_file() or not params.is_file():
        return read_json(path, "model config")
    config = read_json(params, "model config")
    moe = config.get("moe")
    if not isinstance(moe, dict):
        raise PlacerError(
            f"{params} has no moe, so the model is dense: there are no experts to place",
            "give a Mixture-of-Experts model",
        )
    named = {_MOE_KEYS.get(str(key)) or str(key): value for key, value in moe.items()}
    return {**config, **named, "model_type": "mistral_large_3"}


def require_downloaded(directory: Path) -> None:
    """Refuse the name of a Hugging Face hub model, with the command to download it.

    Raises
    ------
    PlacerError
        If it may be such a name, and no path here begins like it.
    """
    # A folder of the owner's name speaks for a path that was misspelled.
    if _HUB_ID.fullmatch(str(directory)) and not directory.parent.exists():
        raise PlacerError(
            f"there is no directory {directory}. Download a model of the Hugging Face hub "
            "first",
            f"hf download {directory} --local-dir {directory.name}, then give "
            f"{directory.name} instead",
        )


def tensor_names(directory: Path) -> frozenset[str] | None:
    """Return the names of a model's tensors, from the index or from one file.

    ``None`` where neither can be read: whoever reads the tensors says why.
    """
    for name in INDEX_NAMES:
        if (path := directory / name).is_file():
            try:
                return frozenset(read_json(path, "index")["weight_map"])
            except (PlacerError, KeyError, TypeError):
                return None
    for name in SINGLE_NAMES:
        if (path := directory / name).is_file():
            header = _header(path)
            return None if header is None else frozenset(header)
    return None


def tensor_shapes(directory: Path, names: Collection[str]) -> dict[str, list[int]]:
    """Return the shapes of some tensors, of those that safetensors files hold."""
    files = next((one for one in SINGLE_NAMES if (directory / one).is_file()), None)
    found = dict.fromkeys(names, files)
    for index in INDEX_NAMES:
        if (path := directory / index).is_file():
            weight_map = read_json(path, "index")["weight_map"]
            found = {name: weight_map[name] for name in names if name in weight_map}
            break
    headers = {file: _header(directory / file) for file in {*found.values()} if file}
    shapes = {
        name: ((headers.get(file or "") or {}).get(name) or {}).get("shape")
        for name, file in found.items()
    }
    return {name: shape for name, shape in shapes.items() if isinstance(shape, list)}


def _header(path: Path) -> dict[str, Any] | None:
    """Return the header of a safetensors file, ``None`` where it cannot be read."""
    try:
        with open_regular(path) as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                return None
            header = parse_json(stream.read(length), path.name)
    except (OSError, PlacerError):
        return None
    return header if isinstance(header, dict) else None

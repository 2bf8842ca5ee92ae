"""Reading tensors with the libraries of their formats, and with no code of the exporter."""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from placer.checkpoint.source import weight_files
from placer.errors import PlacerError
from placer.run.archives import load_torch
from placer.run.documents import read_json
from placer.run.files import require_file

if TYPE_CHECKING:
    import torch

# Opening a file parses its whole header, so many are kept open: as many as large
# checkpoints have, twice.
_OPEN_FILES = 512


def tensor_files(
    directory: Path, refusal: type[PlacerError]
) -> tuple[dict[str, Path], frozenset[str]]:
    """Return the file of every tensor, and the tensors that only the index names.

    Raises
    ------
    PlacerError
        As ``refusal``, if a file cannot be read, or the index says something else.
    """
    index_path, paths = weight_files(directory)
    found: dict[str, Path] = {}
    for path in paths:
        if ".." in path.relative_to(directory).parts:
            raise refusal(
                f"index {index_path} says that tensors are in {path}, "
                "outside its directory",
                "export or fetch it again",
            )
        for name in _names(path, refusal):
            if found.setdefault(name, path) != path:
                raise refusal(
                    f"both {found[name]} and {path} hold {name}", "export or fetch it again"
                )
    if index_path is None:
        return found, frozenset()
    weight_map = read_json(index_path, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise refusal(f"index {index_path} has no weight_map", "export or fetch it again")
    for name in sorted(weight_map.keys() & found.keys()):
        if directory / str(weight_map[name]) != found[name]:
            raise refusal(
                f"index {index_path} says that {name} is in {weight_map[name]}, "
                f"but it is in {found[name].relative_to(directory)}",
                "export or fetch it again",
            )
    return found, frozenset(weight_map.keys() - found.keys())


def read_tensor(path: Path, name: str) -> "torch.Tensor":
    """Read a tensor of a safetensors or PyTorch file, by the library of each."""
    if path.suffix == ".bin":
        return _torch_tensors(path)[name]
    state = path.stat()
    tensor: torch.Tensor = _opened(path, state.st_ino, state.st_mtime_ns).get_tensor(name)
    return tensor


@lru_cache(maxsize=1)
def _torch_tensors(path: Path) -> "dict[str, torch.Tensor]":
    found: dict[str, torch.Tensor] = load_torch(path, mapped=True)
    return found


@lru_cache(maxsize=_OPEN_FILES)
def _opened(path: Path, _inode: int, _changed: int) -> Any:
    """Open a file once, and again where another has taken its place."""
    return safe_open(path, "pt")


def _names(path: Path, refusal: type[PlacerError]) -> list[str]:
    require_file(path, "shard")
    if path.suffix == ".bin":
        return sorted(_torch_tensors(path))
    try:
        with safe_open(path, "pt") as opened:
            return sorted(opened.keys())
    except (SafetensorError, OSError) as error:
        raise refusal(
            f"shard {path} cannot be read: {error}", "export or fetch it again"
        ) from error

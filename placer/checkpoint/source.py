"""A checkpoint directory as it is found: shards, index and other files."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from placer.checkpoint.shard import Shard
from placer.checkpoint.torch_shard import open_torch_shard
from placer.errors import PlacerError
from placer.run.documents import read_json
from placer.run.files import read_text

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
TORCH_INDEX_NAME = "pytorch_model.bin.index.json"
TORCH_SINGLE_NAME = "pytorch_model.bin"
RECORD_NAME = "placer.json"
# Weights in formats that are not rewritten would contradict those that are.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
# What git and the Hugging Face client keep beside a checkpoint is no part of it.
_FOREIGN_FOLDERS = (".git", ".cache")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSource:
    """The files of a Hugging Face checkpoint.

    Attributes
    ----------
    directory
        Where it is.
    shards
        The safetensors files, by name; or PyTorch files, seen as safetensors files.
    index_text
        The index as it stands in its file, or ``None`` for a single file; for PyTorch
        files that of the safetensors files.
    other_files
        All other files, relative to the directory; those of ``.git`` and ``.cache``
        are left out.
    """

    directory: Path
    shards: tuple[Shard, ...]
    index_text: str | None
    other_files: tuple[Path, ...]

    @property
    def shard_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Find and check all files.

        Raises
        ------
        PlacerError
            If there is no checkpoint, a file is damaged, the index and the shards disagree,
            weights of another format lie beside them, or a link leads
            out of the checkpoint.
        """
        index_path = directory / INDEX_NAME
        if not index_path.is_file() and not (directory / SINGLE_NAME).is_file():
            torch_index = directory / TORCH_INDEX_NAME
            if torch_index.is_file() or (directory / TORCH_SINGLE_NAME).is_file():
                return cls._open_torch(directory, torch_index)
        if index_path.is_file():
            names = _shard_names(index_path, ".safetensors")
            index_text = read_text(index_path, what="index")
        else:
            index_text, names = None, [SINGLE_NAME]
        if not (directory / names[0]).is_file():
            raise PlacerError(
                f"{directory} holds no {names[0]}",
                "give a Hugging Face directory with safetensors weights",
            )
        other_files = _other_files(directory, {*names, INDEX_NAME})
        shards = tuple(Shard.open(directory / name) for name in names)
        if index_text is not None:
            _require_agreement(index_path, json.loads(index_text)["weight_map"], shards)
        return cls(
            directory=directory,
            shards=shards,
            index_text=index_text,
            other_files=other_files,
        )

    @classmethod
    def _open_torch(cls, directory: Path, index_path: Path) -> Self:
        """See PyTorch files as the safetensors files that an export writes of them."""
        sharded = index_path.is_file()
        names = _shard_names(index_path, ".bin") if sharded else [TORCH_SINGLE_NAME]
        other_files = _other_files(directory, {*names, index_path.name})
        shards = tuple(
            open_torch_shard(directory / name, _safetensors_name(name)) for name in names
        )
        index_text = None
        if sharded:
            weight_map = read_json(index_path, "index")["weight_map"]
            weight_map = {n: _safetensors_name(file) for n, file in weight_map.items()}
            _require_agreement(index_path, weight_map, shards)
            index_text = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2)
        return cls(
            directory=directory,
            shards=shards,
            index_text=index_text,
            other_files=other_files,
        )


def _safetensors_name(name: str) -> str:
    """Return what transformers calls the safetensors file of a ``pytorch_model`` file."""
    return name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"


def _shard_names(index_path: Path, suffix: str) -> list[str]:
    index = read_json(index_path, "index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PlacerError(f"index {index_path} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(suffix):
            raise PlacerError(
                f"index {index_path} names the shard {name!r}, "
                f"which is no plain name of a {suffix} file",
                "do not use this checkpoint: its index reaches outside its directory",
            )
    return names


def _require_agreement(
    index_path: Path, weight_map: Mapping[str, str], shards: tuple[Shard, ...]
) -> None:
    held = {name: shard.name for shard in shards for name in shard.tensors}
    for name in sorted({*held, *weight_map}):
        if held.get(name) != weight_map.get(name):
            raise PlacerError(
                f"index {index_path} says that {name} is in {weight_map.get(name)}, "
                f"but it is in {held.get(name)}",
                "fetch the checkpoint again",
            )


def _other_files(directory: Path, weights: set[str]) -> tuple[Path, ...]:
    found = []
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        if relative.parts[0] in _FOREIGN_FOLDERS:
            continue
        _require_inside(directory, path)
        if not path.is_file() or str(relative) in weights:
            continue
        if path.suffix in (*_OTHER_WEIGHTS, ".safetensors"):
            raise PlacerError(
                f"{path} holds weights that the index does not name; "
                "they would not be permuted",
                "move them out of the directory",
            )
        found.append(relative)
    return tuple(found)


def _require_inside(directory: Path, path: Path) -> None:
    """Refuse a link out of the checkpoint, whose target would be copied as part of it.

    The cache of Hugging Face is made of links too: ``snapshots/REVISION/FILE`` points to
    ``blobs``, beside ``snapshots``.
    """
    if not path.is_symlink():
        return
    own, target = directory.resolve(), path.resolve()
    blobs = own.parent.parent / "blobs"
    if path.is_file() and (target.is_relative_to(own) or target.parent == blobs):
        return
    raise PlacerError(
        f"{path} is a link that leads to no file of the checkpoint, but to {target}",
        f"if that is meant, copy it with its files: cp -rL {directory} COPY",
    )

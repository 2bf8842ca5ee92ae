"""A checkpoint directory as it is found: shards, index and other files."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from placer.checkpoint.served_files import require_inside, served_files
from placer.checkpoint.shard import Shard
from placer.checkpoint.torch_shard import open_torch_shard
from placer.errors import PlacerError, SourceChangedError
from placer.model.config_file import INDEX_NAMES, SINGLE_NAMES
from placer.run.documents import read_json
from placer.run.files import read_text, sha256_file

INDEX_NAME, _MISTRAL_INDEX_NAME = INDEX_NAMES
SINGLE_NAME, _MISTRAL_NAME = SINGLE_NAMES
TORCH_INDEX_NAME = "pytorch_model.bin.index.json"
TORCH_SINGLE_NAME = "pytorch_model.bin"
RECORD_NAME = "placer.json"
#: Size, time of the last change (ns) and inode.
FileState = tuple[int, int, int]
# Parts of tensors, one file for each rank (sglang 0.5.23: srt/models/grok.py).
_OF_RANK = re.compile(r"-TP-\d+\.safetensors$")
_STATE = ("size", "time of the last change", "inode")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSource:
    """The files of a Hugging Face checkpoint.

    Attributes
    ----------
    directory
        Where it is.
    shards
        The safetensors files, by name; or PyTorch files, seen as safetensors files.
    index_name
        Name of the index, also where there is none.
    index_text
        The index as it is in its file, or ``None`` where there is none; for PyTorch
        files, the index of the safetensors files.
    unheld
        Tensors that the index names and no file holds.
    other_files
        All other files that are served, relative to the directory.
    left_out
        Files that are not: weights of another format or a second time, and states of
        training. ``.git`` and ``.cache`` are not even looked at.
    states
        Size, time of the last change (ns) and inode of every file that was read.
    file_sha256
        SHA-256 of the other files.
    """

    directory: Path
    shards: tuple[Shard, ...]
    index_name: str
    index_text: str | None
    unheld: tuple[str, ...]
    other_files: tuple[Path, ...]
    left_out: tuple[Path, ...]
    states: Mapping[Path, FileState]
    file_sha256: Mapping[str, str]

    @property
    def shard_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Find and check all files.

        Engines load what the index names, or without one all safetensors files; tensors
        of other files are permuted too.

        Raises
        ------
        PlacerError
            If there is no checkpoint, a file is damaged, the index and the shards
            contradict each other, or a link leads out of the checkpoint.
        """
        states = {path: file_state(path) for path in directory.rglob("*") if path.is_file()}
        index_name = _index_name(directory)
        if index_name == TORCH_INDEX_NAME:
            return cls._open_torch(directory, directory / TORCH_INDEX_NAME, states)
        index_path = directory / index_name
        index_text, weight_map, names = None, {}, []
        if index_path.is_file():
            index_text = read_text(index_path, what="index")
            weight_map = _weight_map(index_path)
            names = _shard_names(index_path, weight_map, ".safetensors")
        shards = [_opened(directory, name) for name in names]
        held = {name for shard in shards for name in shard.tensors}
        for path in _further(directory, names, index_name):
            shard = _opened(directory, path.name)
            if index_text is None or not held.issuperset(shard.tensors):
                shards.append(shard)
        if not shards:
            raise PlacerError(
                f"{directory} holds no {SINGLE_NAME}",
                "give a Hugging Face directory with safetensors weights",
            )
        shards.sort(key=lambda shard: shard.name)
        written = {*(shard.name for shard in shards), index_name}
        other_files, left_out = served_files(directory, written)
        return cls(
            directory=directory,
            shards=tuple(shards),
            index_name=index_name,
            index_text=index_text,
            unheld=_unheld(index_path, weight_map, shards),
            other_files=other_files,
            left_out=left_out,
            states=_of_files(states, directory, written | {*map(str, other_files)}),
            file_sha256=_hashes(directory, other_files),
        )

    @classmethod
    def _open_torch(
        cls, directory: Path, index_path: Path, states: Mapping[Path, FileState]
    ) -> Self:
        """See PyTorch files as the safetensors files that an export writes of them."""
        sharded = index_path.is_file()
        names, weight_map = [TORCH_SINGLE_NAME], {}
        if sharded:
            weight_map = _weight_map(index_path)
            names = _shard_names(index_path, weight_map, ".bin")
        for name in names:
            require_inside(directory, directory / name)
        shards = [
            open_torch_shard(directory / name, _safetensors_name(name)) for name in names
        ]
        weight_map = {n: _safetensors_name(file) for n, file in weight_map.items()}
        index = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2)
        read = {*names, index_path.name}
        other_files, left_out = served_files(directory, read)
        return cls(
            directory=directory,
            shards=tuple(shards),
            index_name=INDEX_NAME,
            index_text=index if sharded else None,
            unheld=_unheld(index_path, weight_map, shards),
            other_files=other_files,
            left_out=left_out,
            states=_of_files(states, directory, read | {*map(str, other_files)}),
            file_sha256=_hashes(directory, other_files),
        )

    def require_unchanged(self) -> None:
        """Refuse a checkpoint of which a file is not what it was when it was opened.

        Raises
        ------
        SourceChangedError
            With the file and what changed.
        """
        require_states(self.states)
        found = _hashes(self.directory, self.other_files)
        for name, sha256 in found.items():
            if sha256 != self.file_sha256[name]:
                raise self.changed(Path(name), "its content")

    def changed(self, relative: Path, what: str) -> SourceChangedError:
        """Return the error for a file that changed while it was read."""
        return _changed(self.directory / relative, what)


def require_states(states: Mapping[Path, FileState]) -> None:
    """Refuse files that are not what they were.

    Raises
    ------
    SourceChangedError
        With the file and what changed.
    """
    for path, before in states.items():
        if not path.is_file():
            raise _changed(path, "it was removed")
        for what, old, new in zip(_STATE, before, file_state(path), strict=True):
            if old != new:
                raise _changed(path, f"{what} {old}, now {new}")


def _changed(path: Path, what: str) -> SourceChangedError:
    return SourceChangedError(
        f"{path} changed while it was read: {what}",
        "export again when nothing writes to the checkpoint any more",
    )


def file_state(path: Path) -> FileState:
    """Return what changes with a file, without a look at its content."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _of_files(
    states: Mapping[Path, FileState], directory: Path, names: set[str]
) -> dict[Path, FileState]:
    return {
        directory / n: states[directory / n]
        for n in sorted(names)
        if directory / n in states
    }


def _hashes(directory: Path, files: Sequence[Path]) -> dict[str, str]:
    return {path.as_posix(): sha256_file(directory / path) for path in files}


def weight_files(directory: Path) -> tuple[Path | None, list[Path]]:
    """Return the index, if there is one, and the files that engines load."""
    index_path = directory / _index_name(directory)
    if index_path.is_file():
        names = sorted(set(_weight_map(index_path).values()))
        return index_path, [directory / name for name in names]
    if index_path.name == TORCH_INDEX_NAME:
        return None, [directory / TORCH_SINGLE_NAME]
    return None, _further(directory, [], index_path.name) or [directory / SINGLE_NAME]


def _index_name(directory: Path) -> str:
    """Return the name of the index by which engines would load the directory.

    Where there is no index it is the name that one would have. Several by other names are
    none to an engine, which loads all files, so they must be of parts of one checkpoint.

    Raises
    ------
    PlacerError
        If there are several, none of them by the usual name, and they are not of parts.
    """
    if (directory / INDEX_NAME).is_file() or (directory / SINGLE_NAME).is_file():
        return INDEX_NAME
    # ModelSlim names its index after its files.
    found = {path.name for path in directory.glob("*.safetensors.index.json")}
    found.discard(_MISTRAL_INDEX_NAME)
    if len(found) > 1 and not _of_parts([directory / name for name in sorted(found)]):
        raise PlacerError(
            f"{directory} has several indexes: {', '.join(sorted(found))}",
            f"keep only one of them, or rename the right one to {INDEX_NAME}",
        )
    if len(found) == 1:
        return found.pop()
    if _further(directory, [], INDEX_NAME):
        return INDEX_NAME
    if (directory / TORCH_INDEX_NAME).is_file() or (
        directory / TORCH_SINGLE_NAME
    ).is_file():
        return TORCH_INDEX_NAME
    return _MISTRAL_INDEX_NAME if any(directory.glob("consolidated*")) else INDEX_NAME


def _of_parts(indexes: Sequence[Path]) -> bool:
    """Return whether all files of indexes are there, and no two name the same tensor."""
    maps = [_weight_map(path) for path in indexes]
    files = {
        path.parent / name
        for path, one in zip(indexes, maps, strict=True)
        for name in _shard_names(path, one, ".safetensors")
    }
    names = [name for one in maps for name in one]
    is_top = all(file.is_file() and file.parent == indexes[0].parent for file in files)
    return is_top and len(names) == len(set(names))


def _further(directory: Path, names: Sequence[str], index_name: str) -> list[Path]:
    """Return safetensors files next to the config that no index names.

    Mistral's ``consolidated`` files hold the same weights under other names: they are the
    checkpoint only where there is no other.
    """
    mistral = index_name == _MISTRAL_INDEX_NAME
    return [
        path
        for path in sorted(directory.glob("*.safetensors"))
        if path.name not in names and path.name.startswith("consolidated") == mistral
    ]


def _opened(directory: Path, name: str) -> Shard:
    require_inside(directory, directory / name)
    return replace(Shard.open(directory / name), name=name)


def _safetensors_name(name: str) -> str:
    """Return what transformers calls the safetensors file of a ``pytorch_model`` file."""
    return name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"


def _weight_map(index_path: Path) -> dict[str, str]:
    weight_map = read_json(index_path, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PlacerError(f"index {index_path} has no weight_map")
    return {name: str(file) for name, file in weight_map.items()}


def _shard_names(index_path: Path, weight_map: Mapping[str, str], suffix: str) -> list[str]:
    names = sorted(set(weight_map.values()))
    for name in names:
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name:
            raise PlacerError(
                f"index {index_path} names the shard {name!r}, which is outside its "
                "directory",
                "do not use this checkpoint",
            )
        if not name.endswith(suffix):
            raise PlacerError(
                f"index {index_path} names the shard {name!r}, which is not a {suffix} "
                "file",
                "fetch the checkpoint again",
            )
    return names


def _unheld(
    index_path: Path, weight_map: Mapping[str, str], shards: Sequence[Shard]
) -> tuple[str, ...]:
    """Return the tensors that the index names and no shard holds; refuse contradictions.

    Engines load files whole, so a tensor that the index leaves out is loaded as well.
    """
    held: dict[str, str] = {}
    for shard in shards:
        for name in shard.tensors:
            if (first := held.setdefault(name, shard.name)) != shard.name:
                if _OF_RANK.search(first) and _OF_RANK.search(shard.name):
                    raise PlacerError(
                        f"{first} and {shard.name} both hold {name}: they are parts for "
                        "tensor-parallel ranks, like those of Grok-2",
                        "give a checkpoint whose files are merged",
                    )
                raise PlacerError(
                    f"{index_path.parent}: both {first} and {shard.name} hold {name}",
                    "move the file that engines should not load out of the directory",
                )
    for name in sorted(weight_map):
        if name in held and held[name] != weight_map[name]:
            raise PlacerError(
                f"index {index_path} says that {name} is in {weight_map[name]}, "
                f"but it is in {held[name]}",
                "fetch the checkpoint again",
            )
    return tuple(sorted(weight_map.keys() - held.keys()))

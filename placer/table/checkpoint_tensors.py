"""Which file of a checkpoint holds a tensor; only the files that are needed are opened."""

from collections.abc import Mapping
from pathlib import Path

from placer.checkpoint.shard import Shard
from placer.errors import PlacerError
from placer.run.documents import read_json

_INDEX_NAME = "model.safetensors.index.json"


def tensor_files(directory: Path) -> Mapping[str, Path]:
    """Return the safetensors file of every tensor of a Hugging Face checkpoint.

    Raises
    ------
    PlacerError
        If there is no checkpoint, its file or index is damaged, or the index reaches
        outside of the directory.
    """
    index_path = directory / _INDEX_NAME
    if index_path.is_file():
        weight_map = read_json(index_path, "checkpoint index").get("weight_map")
        if not isinstance(weight_map, dict):
            raise PlacerError(f"checkpoint index {index_path} has no weight_map")
        for name in {str(name) for name in weight_map.values()}:
            if Path(name).name != name:
                raise PlacerError(f"{index_path}: {name!r} is a path")
        return {name: directory / str(file) for name, file in weight_map.items()}
    path = directory / "model.safetensors"
    if not path.is_file():
        raise PlacerError(
            f"{directory} holds neither model.safetensors nor {_INDEX_NAME}",
            "give a Hugging Face checkpoint directory: --embeddings MODEL",
        )
    return dict.fromkeys(Shard.open(path).tensors, path)

"""Contents of a Hugging Face checkpoint: bytes per kind of tensor, from headers only."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from placer.checkpoint.source import RECORD_NAME, CheckpointSource
from placer.model import Architecture, ModelSpec, read_config
from placer.model.tensor_layout import TensorKind, TensorLayout
from placer.run.documents import read_json


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorGroup:
    """Tensors of one kind: their number, data types and bytes."""

    num_tensors: int
    dtypes: tuple[str, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint directory, read without its tensors.

    Attributes
    ----------
    model
        Shape of its routing.
    groups
        ``experts``, ``router`` and ``other``.
    num_shards
        Files of tensors.
    left_out
        Files that an export leaves out, relative to the directory.
    record
        ``placer.json``, if placer exported the checkpoint.
    """

    model: ModelSpec
    groups: Mapping[str, TensorGroup]
    num_shards: int
    left_out: tuple[Path, ...]
    record: Mapping[str, Any] | None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(group.num_bytes for group in self.groups.values())

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read config and tensor headers.

        Raises
        ------
        PlacerError
            If the family is unknown, or a tensor file is missing or damaged.
        """
        model = ModelSpec.from_checkpoint(directory)
        config = read_config(directory)
        source = CheckpointSource.open(directory)
        record = directory / RECORD_NAME
        return cls(
            model=model,
            groups=_groups(Architecture.of(config, directory), source),
            num_shards=len(source.shards),
            left_out=source.left_out,
            record=read_json(record, "export record") if record.is_file() else None,
        )


def _groups(architecture: Architecture, source: CheckpointSource) -> dict[str, TensorGroup]:
    sizes: dict[str, list[int]] = defaultdict(list)
    dtypes: dict[str, set[str]] = defaultdict(set)
    for shard in source.shards:
        for name, info in shard.tensors.items():
            group = _group(architecture.layout, name)
            sizes[group].append(info.stop - info.start)
            dtypes[group].add(info.dtype)
    return {
        group: TensorGroup(
            num_tensors=len(sizes[group]),
            dtypes=tuple(sorted(dtypes[group])),
            num_bytes=sum(sizes[group]),
        )
        for group in ("experts", "router", "other")
    }


def _group(layout: TensorLayout | None, name: str) -> str:
    place = None if layout is None else layout.classify(name)
    if place is None or place.kind in (None, TensorKind.REST):
        return "other"
    if place.kind in (TensorKind.EXPERT, TensorKind.FUSED, TensorKind.STACKED):
        return "experts"
    return "router"

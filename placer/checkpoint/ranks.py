"""One directory per expert-parallel rank: its experts, under their own names, and the rest.

Names and routers are the original's, so that expert ids are logical everywhere;
``placement.json`` says which expert is in which of the rank's slots. Tensors that hold all
experts of a layer hold those of the rank, slot by slot. A replica is in every directory
whose rank has a copy.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from placer.checkpoint.permutation import tensor_changes
from placer.checkpoint.shard import TensorInfo, compose_header
from placer.checkpoint.source import INDEX_NAME, RECORD_NAME, CheckpointSource
from placer.checkpoint.writing import (
    ExportOptions,
    Progress,
    ShardWork,
    by_place,
    bytes_to_write,
    copy_files,
    pieces_of,
    written_shards,
)
from placer.errors import PlacerError
from placer.model import Architecture, ModelSpec, read_config
from placer.model.tensor_layout import TensorKind
from placer.placement import Plan
from placer.placement.all_layers import plan_of
from placer.run.documents import (
    SCHEMA_VERSION,
    Count,
    Document,
    ExpertId,
    NumExperts,
    NumRanks,
    Sha256,
    of_this_version,
    read_json,
    validated,
)
from placer.run.files import canonical_json, sha256_file

RANK_NAME = "placement.json"


class RankRecord(Document, frozen=True, kw_only=True):
    """The JSON object of ``placement.json``; see ``docs/formats.md``."""

    schema_version: Literal[2]
    kind: Literal["rank"]
    rank: Count
    num_ranks: NumRanks
    num_nodes: NumRanks
    world_ranks: list[Count]
    plan_sha256: Sha256
    source_fingerprint: Sha256 | None
    layer_ids: list[Count]
    num_experts: list[NumExperts]
    experts: list[list[ExpertId]]
    experts_only: bool

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read ``placement.json``.

        Raises
        ------
        PlacerError
            If it is none, or damaged.
        """
        where = f"record of a rank {path}"
        again = "export it again: placer export ranks PLAN MODEL --out NEW"
        value = of_this_version(read_json(path, "record of a rank"), where, again)
        return validated(value, cls, where, again)


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksReport:
    """The files written for all ranks together.

    Attributes
    ----------
    num_ranks, num_shards, num_bytes
        Directories, safetensors files and their bytes.
    num_resumed
        Shards that an earlier, interrupted run had finished.
    warning
        A warning if only shapes were compared, or ``None``.
    """

    num_ranks: int
    num_shards: int
    num_bytes: int
    num_resumed: int
    warning: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the figures that a table of the export shows."""
        return {
            "ranks": self.num_ranks,
            "shards": self.num_shards,
            "bytes": self.num_bytes,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksJob:
    """An export by ranks, prepared from headers only: nothing is written.

    Attributes
    ----------
    source
        The checkpoint to read.
    shards
        The files to write, of all ranks.
    indexes
        Per rank, the file of each tensor.
    records
        Per rank, what ``placement.json`` says.
    experts_only
        Whether everything but the routed experts is left out.
    warning
        A warning if only shapes were compared, or ``None``.
    """

    source: CheckpointSource
    shards: tuple[ShardWork, ...]
    indexes: tuple[dict[str, str], ...]
    records: tuple[RankRecord, ...]
    experts_only: bool
    warning: str | None

    def write(
        self,
        out: Path,
        options: ExportOptions | None = None,
        progress: Progress | None = None,
    ) -> RanksReport:
        """Write the directories; a run that was killed continues where it stopped.

        Raises
        ------
        PlacerError
            If ``out`` exists, the disk is too small, or the source changes meanwhile.
        """
        options = options or ExportOptions()
        identity = {
            "ranks": [one.to_json() for one in self.records],
            "experts_only": self.experts_only,
        }
        with written_shards(
            out, self.source, self.shards, self._other_bytes, identity, options, progress
        ) as written:
            for record, index in zip(self.records, self.indexes, strict=True):
                folder = written.directory / rank_folder(record.rank)
                folder.mkdir(exist_ok=True)
                copy_files(self.source, self.other_files, folder)
                (folder / INDEX_NAME).write_text(index_text(index), encoding="utf-8")
                text = canonical_json(record.to_json()) + "\n"
                (folder / RANK_NAME).write_text(text, encoding="utf-8")
        return RanksReport(
            num_ranks=len(self.records),
            num_shards=len(self.shards),
            num_bytes=sum(work.num_bytes for work in self.shards),
            num_resumed=written.num_resumed,
            warning=self.warning,
        )

    @property
    def other_files(self) -> tuple[Path, ...]:
        """Files that are copied into every directory: with experts only, the config."""
        if self.experts_only:
            return (Path("config.json"),)
        return tuple(path for path in self.source.other_files if str(path) != RECORD_NAME)

    def bytes_to_write(self, options: ExportOptions) -> int:
        """Return the bytes that the disk must have free."""
        return self._other_bytes + bytes_to_write(self.shards, options)

    @property
    def _other_bytes(self) -> int:
        return len(self.records) * sum(
            (self.source.directory / path).stat().st_size for path in self.other_files
        )


def rank_folder(rank: int) -> str:
    """Return the name of a rank's directory."""
    return f"rank-{rank:05}"


def index_text(index: Mapping[str, str]) -> str:
    """Return the index that lists the file of each tensor."""
    return json.dumps({"metadata": {}, "weight_map": index}, indent=2) + "\n"


def prepare_ranks(plan_path: Path, directory: Path, *, experts_only: bool) -> RanksJob:
    """Prepare one directory per rank.

    Parameters
    ----------
    plan_path
        The plan; replicas are allowed.
    directory
        The checkpoint; it is only read.
    experts_only
        Leave out everything but the routed experts.

    Raises
    ------
    PlacerError
        If plan and checkpoint are of different models, or a tensor cannot be classified.
    """
    plan = Plan.read(plan_path)
    model = ModelSpec.from_checkpoint(directory)
    plan, warning = plan_of(plan, plan_path, model, directory)
    if (directory / RECORD_NAME).exists():
        raise PlacerError(
            f"{directory} was permuted by placer: its experts are not those of the plan",
            f"give the original: placer export checkpoint {directory} --inverse "
            "--out ORIGINAL",
        )
    source = CheckpointSource.open(directory)
    routed = RoutedTensors.of(source, model)
    placement = plan.placement
    groups = (plan.provenance.get("layout") or {}).get("groups", [])
    shards, indexes, records = [], [], []
    for rank in range(placement.num_ranks):
        held = [
            row.reshape(placement.num_ranks, -1)[rank].tolist()
            for row in placement.physical_to_logical_map
        ]
        works = list(_rank_shards(source, routed, model, held, rank, experts_only))
        shards += [work for work, _ in works]
        indexes.append(
            {name: Path(work.name).name for work, names in works for name in names}
        )
        records.append(
            RankRecord(
                schema_version=SCHEMA_VERSION,
                kind="rank",
                rank=rank,
                num_ranks=placement.num_ranks,
                num_nodes=placement.num_nodes,
                world_ranks=[group[rank] for group in groups],
                plan_sha256=sha256_file(plan_path),
                source_fingerprint=model.fingerprint,
                layer_ids=list(model.layer_ids or ()),
                num_experts=list(model.num_experts),
                experts=held,
                experts_only=experts_only,
            )
        )
    return RanksJob(
        source=source,
        shards=tuple(shards),
        indexes=tuple(indexes),
        records=tuple(records),
        experts_only=experts_only,
        warning=warning,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedTensors:
    """The tensors that depend on which experts a rank has.

    Attributes
    ----------
    single
        MoE layer and expert of each tensor that belongs to one expert.
    fused
        MoE layer of each tensor of all experts, one block after the other.
    shared
        Tensors among the experts that hold for all of them, such as one scale.
    """

    single: Mapping[str, tuple[int, int]]
    fused: Mapping[str, int]
    shared: frozenset[str]

    @classmethod
    def of(cls, source: CheckpointSource, model: ModelSpec) -> Self:
        """Find them in a checkpoint.

        Raises
        ------
        PlacerError
            If a tensor cannot be classified.
        """
        config = read_config(source.directory)
        architecture = Architecture.of(config, source.directory)
        tensors = {
            name: info for shard in source.shards for name, info in shard.tensors.items()
        }
        # With nothing moved, this says that every tensor is known and none is missing.
        in_place = [np.arange(size) for size in model.num_experts]
        changes = tensor_changes(tensors, architecture, config, model, in_place)
        layout = architecture.require_layout()
        ordinal = {layer: n for n, layer in enumerate(model.layer_ids or ())}
        single, fused, shared = {}, {}, set()
        for name in tensors:
            place = layout.classify(name)
            if place is None or place.layer not in ordinal:
                continue
            layer = ordinal[place.layer]
            if place.expert is not None:
                single[name] = (layer, place.expert)
            elif place.kind in (TensorKind.FUSED, TensorKind.STACKED):
                if name in changes.rows:
                    fused[name] = layer
                else:
                    shared.add(name)
        return cls(single=single, fused=fused, shared=frozenset(shared))

    def has(self, name: str, held: list[list[int]], *, experts_only: bool) -> bool:
        """Return whether a rank that has the experts ``held`` has a tensor."""
        if name in self.single:
            layer, expert = self.single[name]
            return expert in held[layer]
        return not experts_only or name in self.fused or name in self.shared


def _rank_shards(
    source: CheckpointSource,
    routed: RoutedTensors,
    model: ModelSpec,
    held: list[list[int]],
    rank: int,
    experts_only: bool,
) -> Iterator[tuple[ShardWork, list[str]]]:
    """Yield what a rank takes of each shard, with the names of the tensors."""
    orders = {name: np.asarray(held[layer]) for name, layer in routed.fused.items()}
    num_blocks = {name: model.num_experts[n] for name, n in routed.fused.items()}
    for shard in source.shards:
        names = [
            name
            for name in by_place(shard)
            if routed.has(name, held, experts_only=experts_only)
        ]
        if not names:
            continue
        entries = []
        for name in names:
            info = shard.tensors[name]
            if name in orders:
                info = _some_blocks(info, len(orders[name]), num_blocks[name])
            entries.append((name, info))
        work = ShardWork(
            name=f"{rank_folder(rank)}/{Path(shard.name).name}",
            shard=shard,
            header=compose_header(entries, shard.metadata),
            pieces=tuple(pieces_of(shard, names, orders, {}, num_blocks, {})),
        )
        yield work, names


def _some_blocks(info: TensorInfo, num_taken: int, num_blocks: int) -> TensorInfo:
    """Return what a tensor is with some of its blocks, which one axis counts."""
    length = (info.stop - info.start) // num_blocks * num_taken
    axis = block_axis(info.shape)
    taken = info.shape[axis] // num_blocks * num_taken
    shape = (*info.shape[:axis], taken, *info.shape[axis + 1 :])
    return replace(info, shape=shape, stop=info.start + length)


def block_axis(shape: Sequence[int]) -> int:
    """Return the axis of a tensor's blocks: the first that is longer than 1, as [1, E]."""
    return next((axis for axis, n in enumerate(shape) if n != 1), 0)

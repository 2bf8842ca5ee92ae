"""Writing a permuted checkpoint, and restoring the original from it.

Every byte of an expert stays where it is; its *name* moves, in the header of its shard and
in the index. Only the rows of routers are rewritten. So an export is a copy, whatever the
dtype or quantisation, and its inverse restores each file bit for bit.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer import __version__
from placer.checkpoint.permutation import (
    TensorChanges,
    require_whole_groups,
    tensor_changes,
)
from placer.checkpoint.shard import Shard, rename_keys
from placer.checkpoint.source import INDEX_NAME, RECORD_NAME, CheckpointSource
from placer.errors import PlacerError
from placer.files import (
    atomic_directory,
    canonical_json,
    read_json,
    require_free_space,
    sha256_file,
)
from placer.model import Architecture, ModelSpec, require_same_model
from placer.plan import Plan

IntArray = npt.NDArray[np.int64]
SCHEMA_VERSION = 1
_COPY_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What an export wrote.

    Attributes
    ----------
    num_shards, num_bytes
        Safetensors files and their bytes.
    num_renamed
        Expert tensors whose name changed.
    num_routers
        Router tensors whose rows were permuted.
    warning
        What rests on shapes alone, or ``None``.
    """

    num_shards: int
    num_bytes: int
    num_renamed: int
    num_routers: int
    warning: str | None


def export_checkpoint(plan_path: Path, directory: Path, out: Path) -> ExportReport:
    """Write the checkpoint whose expert e of layer l is old expert ``map[l][e]``.

    Parameters
    ----------
    plan_path
        A plan without replicas.
    directory
        The original; it is only read.
    out
        The directory to write; it must not exist.

    Raises
    ------
    PlacerError
        If plan and checkpoint are of different models, the plan cannot be written as a
        permutation, a tensor cannot be classified, or the disk is too small.
    """
    plan = Plan.read(plan_path)
    model = ModelSpec.from_checkpoint(directory)
    warning = require_same_model(plan.model, str(plan_path), model, str(directory))
    if (directory / RECORD_NAME).exists():
        raise PlacerError(
            f"{directory} was already permuted by placer",
            "restore it first: placer export checkpoint "
            f"{directory} --inverse --out ORIGINAL",
        )
    permutation = [plan.placement.permutation(n) for n in range(model.num_layers)]
    require_whole_groups(model, permutation)
    source = CheckpointSource.open(directory)
    record = {
        "schema_version": SCHEMA_VERSION,
        "placer": __version__,
        "plan_sha256": sha256_file(plan_path),
        "source_fingerprint": model.fingerprint,
        "layer_ids": list(model.layer_ids or ()),
        "permutation": [row.tolist() for row in permutation],
        "inverse": [np.argsort(row).tolist() for row in permutation],
        "header_bytes": {shard.path.name: shard.header_bytes for shard in source.shards},
    }
    report = _rewrite(source, model, permutation, out, record=record)
    return ExportReport(**report, warning=warning)


def restore_checkpoint(directory: Path, out: Path) -> ExportReport:
    """Write the original of an exported checkpoint, every file bit for bit.

    Raises
    ------
    PlacerError
        If the directory holds no ``placer.json``, or one of another model.
    """
    record = read_json(directory / RECORD_NAME, "export record")
    model = ModelSpec.from_checkpoint(directory)
    if record.get("schema_version") != SCHEMA_VERSION:
        raise PlacerError(
            f"{directory / RECORD_NAME} has schema_version {record.get('schema_version')}, "
            f"this placer reads {SCHEMA_VERSION}",
            "restore with the placer that exported it",
        )
    if record.get("source_fingerprint") != model.fingerprint:
        raise PlacerError(
            f"{directory / RECORD_NAME} is of another model than its config.json: "
            f"fingerprint {str(record.get('source_fingerprint'))[:12]} against "
            f"{str(model.fingerprint)[:12]}",
            "restore from an unchanged copy of the export",
        )
    inverse = [np.asarray(row, dtype=np.int64) for row in record["inverse"]]
    for n, row in enumerate(inverse):
        if not np.array_equal(np.sort(row), np.arange(model.num_experts[n])):
            raise PlacerError(
                f"{directory / RECORD_NAME}: inverse of MoE layer {n} is no permutation"
            )
    report = _rewrite(
        CheckpointSource.open(directory),
        model,
        inverse,
        out,
        header_bytes=record["header_bytes"],
    )
    return ExportReport(**report, warning=None)


def _rewrite(
    source: CheckpointSource,
    model: ModelSpec,
    permutation: Sequence[IntArray],
    out: Path,
    *,
    record: Mapping[str, Any] | None = None,
    header_bytes: Mapping[str, int] | None = None,
) -> dict[str, int]:
    config = read_json(source.directory / "config.json", "model config")
    architecture = Architecture.of(config, source.directory)
    tensors = {
        name: info for shard in source.shards for name, info in shard.tensors.items()
    }
    changes = tensor_changes(tensors, architecture, model, permutation)
    num_bytes = sum(shard.path.stat().st_size for shard in source.shards)
    require_free_space(out, num_bytes + _other_bytes(source))
    with atomic_directory(out) as partial:
        for relative in source.other_files:
            if relative.name == RECORD_NAME:
                continue
            (partial / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.directory / relative, partial / relative)
        for shard in source.shards:
            length = None if header_bytes is None else header_bytes[shard.path.name]
            _write_shard(shard, changes, partial / shard.path.name, length)
        if source.index_text is not None:
            index = rename_keys(source.index_text, changes.names)
            (partial / INDEX_NAME).write_text(index, encoding="utf-8")
        if record is not None:
            (partial / RECORD_NAME).write_text(canonical_json(record) + "\n")
    return {
        "num_shards": len(source.shards),
        "num_bytes": num_bytes,
        "num_renamed": len(changes.names),
        "num_routers": len(changes.rows),
    }


def _write_shard(
    shard: Shard, changes: TensorChanges, target: Path, header_bytes: int | None
) -> None:
    with shard.path.open("rb") as original, target.open("wb") as copy:
        header = shard.renamed_header(changes.names, header_bytes)
        copy.write(header)
        original.seek(shard.data_start)
        shutil.copyfileobj(original, copy, _COPY_BYTES)
        for name, info in shard.tensors.items():
            if name not in changes.rows:
                continue
            order = changes.rows[name]
            original.seek(shard.data_start + info.start)
            content = np.frombuffer(original.read(info.stop - info.start), dtype=np.uint8)
            copy.seek(len(header) + info.start)
            copy.write(content.reshape(len(order), -1)[order].tobytes())


def _other_bytes(source: CheckpointSource) -> int:
    return sum((source.directory / path).stat().st_size for path in source.other_files)

"""Writing a permuted checkpoint, and restoring the original from it.

Every byte of an expert stays where it is; its *name* moves, in the header of its shard and
in the index. Only the rows of routers are rewritten. So an export is a copy, whatever the
dtype or quantisation, and its inverse restores each file bit for bit.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from placer.checkpoint.permutation import (
    TensorChanges,
    require_no_expert_by_number,
    require_whole_groups,
    tensor_changes,
)
from placer.checkpoint.record import ExportRecord
from placer.checkpoint.shard import Shard, rename_keys
from placer.checkpoint.source import INDEX_NAME, RECORD_NAME, CheckpointSource
from placer.errors import PlacerError, UsageError, VerificationError
from placer.files import (
    atomic_directory,
    read_json,
    require_free_space,
    sha256_file,
)
from placer.model import Architecture, ModelSpec, require_same_model
from placer.plan import Plan

IntArray = npt.NDArray[np.int64]
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
    warning: str | None = None


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
    permutation = tuple(plan.placement.permutation(n) for n in range(model.num_layers))
    require_whole_groups(model, permutation)
    config_path = directory / "config.json"
    require_no_expert_by_number(read_json(config_path, "model config"), config_path)
    source = CheckpointSource.open(directory)
    for shard in source.shards:
        require_no_expert_by_number(shard.metadata, shard.path)
    changes = _changes(source, model, permutation)
    with _prepared(source, out) as partial:
        record = ExportRecord(
            plan_sha256=sha256_file(plan_path),
            source_fingerprint=str(model.fingerprint),
            layer_ids=model.layer_ids or (),
            permutation=permutation,
            header_bytes={s.path.name: s.header_bytes for s in source.shards},
            source_sha256=_rewrite(source, changes, partial),
        )
        record.write(partial)
    return _report(source, changes, warning)


def restore_checkpoint(directory: Path, out: Path) -> ExportReport:
    """Write the original of an exported checkpoint, every file bit for bit.

    Raises
    ------
    PlacerError
        If the directory holds no ``placer.json``, or one of another model.
    VerificationError
        If a restored file has another hash than the original: the export was changed.
    """
    record = ExportRecord.read(directory)
    model = ModelSpec.from_checkpoint(directory)
    record.require_model(model, directory)
    source = CheckpointSource.open(directory)
    changes = _changes(source, model, record.inverse)
    with _prepared(source, out) as partial:
        _rewrite(source, changes, partial, record.header_bytes)
        _require_restored(directory, partial, record)
    return _report(source, changes)


def _changes(
    source: CheckpointSource, model: ModelSpec, permutation: Sequence[IntArray]
) -> TensorChanges:
    config = read_json(source.directory / "config.json", "model config")
    architecture = Architecture.of(config, source.directory)
    architecture.require_tensor_names()
    tensors = {
        name: info for shard in source.shards for name, info in shard.tensors.items()
    }
    return tensor_changes(tensors, architecture, model, permutation)


def _report(
    source: CheckpointSource, changes: TensorChanges, warning: str | None = None
) -> ExportReport:
    return ExportReport(
        num_shards=len(source.shards),
        num_bytes=source.shard_bytes,
        num_renamed=len(changes.names),
        num_routers=len(changes.rows),
        warning=warning,
    )


@contextmanager
def _prepared(source: CheckpointSource, out: Path) -> Iterator[Path]:
    """Yield the directory to fill, with all files in it that do not change."""
    if out.resolve().is_relative_to(source.directory.resolve()):
        raise UsageError(
            f"{out} is inside {source.directory}, which is only read",
            "choose an --out outside the model's directory",
        )
    others = [path for path in source.other_files if str(path) != RECORD_NAME]
    other_bytes = sum((source.directory / path).stat().st_size for path in others)
    require_free_space(out, source.shard_bytes + other_bytes)
    with atomic_directory(out) as partial:
        for relative in others:
            (partial / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.directory / relative, partial / relative)
        yield partial


def _rewrite(
    source: CheckpointSource,
    changes: TensorChanges,
    partial: Path,
    header_bytes: Mapping[str, int] | None = None,
) -> dict[str, str]:
    """Write shards and index; return the SHA-256 of each as it is in the source."""
    hashes = {}
    for shard in source.shards:
        name = shard.path.name
        length = None if header_bytes is None else header_bytes.get(name)
        hashes[name] = _write_shard(shard, changes, partial / name, length)
    if source.index_text is not None:
        path = source.directory / INDEX_NAME
        index = rename_keys(source.index_text, changes.names, path, "weight_map")
        (partial / INDEX_NAME).write_bytes(index.encode())
        hashes[INDEX_NAME] = sha256_file(path)
    return hashes


def _write_shard(
    shard: Shard, changes: TensorChanges, target: Path, header_bytes: int | None
) -> str:
    digest = hashlib.sha256()
    with shard.path.open("rb") as original, target.open("wb") as copy:
        digest.update(original.read(shard.data_start))
        copy.write(shard.renamed_header(changes.names, header_bytes))
        for content, order in _pieces(original, shard, changes.rows):
            digest.update(content)
            copy.write(content if order is None else _permuted(content, order))
        copy.flush()
        os.fsync(copy.fileno())
    return digest.hexdigest()


def _pieces(
    stream: BinaryIO, shard: Shard, rows: Mapping[str, IntArray]
) -> Iterator[tuple[bytes, IntArray | None]]:
    """Yield the data of a shard in order: routers whole, all else in blocks."""
    routers = sorted(
        (info.start, info.stop, rows[name])
        for name, info in shard.tensors.items()
        if name in rows and info.start < info.stop
    )
    for start, stop, order in routers:
        yield from _blocks(stream, shard.data_start + start - stream.tell())
        yield stream.read(stop - start), order
    yield from _blocks(stream, shard.path.stat().st_size - stream.tell())


def _blocks(stream: BinaryIO, num_bytes: int) -> Iterator[tuple[bytes, None]]:
    while num_bytes > 0:
        block = stream.read(min(num_bytes, _COPY_BYTES))
        if not block:
            raise PlacerError(
                f"{stream.name} became shorter while it was read", "export again"
            )
        num_bytes -= len(block)
        yield block, None


def _permuted(content: bytes, order: IntArray) -> bytes:
    rows = np.frombuffer(content, dtype=np.uint8).reshape(len(order), -1)
    return rows[order].tobytes()


def _require_restored(directory: Path, partial: Path, record: ExportRecord) -> None:
    """Compare the restored files, as they lie on disk, with the hashes of the original."""
    written = {p.name for p in partial.glob("*.safetensors")}
    written |= {INDEX_NAME} if (partial / INDEX_NAME).exists() else set()
    for name in sorted({*written, *record.source_sha256}):
        expected = record.source_sha256.get(name)
        found = sha256_file(partial / name) if name in written else None
        if found != expected:
            raise VerificationError(
                f"{name} restored from {directory} is not the original: SHA-256 "
                f"{str(found)[:12]} against {str(expected)[:12]}",
                "the export was changed since: restore from an unchanged copy",
            )

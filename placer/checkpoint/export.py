"""Writing a permuted checkpoint, and restoring the original from it.

Every byte of an expert stays where it is; its *name* moves, in the header of its shard and
in the index. Only tensors that hold all experts, such as routers, are reordered, expert by
expert. So an export is a copy for every dtype and quantisation, and its inverse restores
each file bit for bit.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from placer.arrays import IntArray
from placer.checkpoint.named_experts import Renumbering
from placer.checkpoint.permutation import (
    TensorChanges,
    tensor_changes,
)
from placer.checkpoint.permuted_rows import permuted_rows
from placer.checkpoint.record import ExportRecord
from placer.checkpoint.shard import rename_keys
from placer.checkpoint.source import RECORD_NAME, CheckpointSource
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
from placer.errors import PlacerError, UsageError, VerificationError
from placer.model import Architecture, ModelSpec, read_config
from placer.model.tensor_layout import TensorKind, TensorLayout
from placer.placement import Plan
from placer.placement.all_layers import plan_of
from placer.run.files import read_bytes, sha256_file


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What an export wrote.

    Attributes
    ----------
    num_shards, num_bytes
        Safetensors files and their bytes.
    num_renamed
        Expert tensors whose name changed.
    num_permuted
        Tensors that hold all experts of a layer, routers among them, and were reordered.
    num_linked
        Shards that were linked.
    num_resumed
        Shards that an earlier, interrupted run had finished.
    unchecked
        Of a restored checkpoint, the files whose contents no recorded hash vouches for, of
        shards beyond header and size; ``None`` for an export.
    warning
        A warning if only shapes were compared, or ``None``.
    """

    num_shards: int
    num_bytes: int
    num_renamed: int
    num_permuted: int
    num_linked: int
    num_resumed: int
    unchecked: tuple[str, ...] | None = None
    warning: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the figures that a table of the export shows."""
        return {
            "shards": self.num_shards,
            "bytes": self.num_bytes,
            "renamed_tensors": self.num_renamed,
            "permuted_tensors": self.num_permuted,
            "linked_shards": self.num_linked,
            "contents_checked": None if self.unchecked is None else not self.unchecked,
            "unchecked_files": None if self.unchecked is None else list(self.unchecked),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """An export or its inverse, prepared from headers only: nothing is written.

    Attributes
    ----------
    source
        The checkpoint to read.
    changes
        What becomes of its tensors.
    shards
        The files to write.
    index
        The index to write, or ``None``.
    configs
        Configs that name single experts, as they are to be written.
    record
        What ``placer.json`` says, or said.
    restoring
        Whether this is the inverse.
    stale
        Notes that keep the old numbers of experts: no engine reads them.
    warning
        A warning if only shapes were compared, or ``None``.
    """

    source: CheckpointSource
    changes: TensorChanges
    shards: tuple[ShardWork, ...]
    index: bytes | None
    configs: Mapping[str, bytes]
    record: ExportRecord
    restoring: bool
    stale: tuple[Path, ...] = ()
    warning: str | None = None

    @property
    def other_files(self) -> tuple[Path, ...]:
        """Files that are copied unchanged, relative to the directory."""
        written = {RECORD_NAME, *self.configs}
        return tuple(path for path in self.source.other_files if str(path) not in written)

    def write(
        self,
        out: Path,
        options: ExportOptions | None = None,
        progress: Progress | None = None,
    ) -> ExportReport:
        """Write the directory; a run that was killed continues where it stopped.

        Parameters
        ----------
        out
            The directory to write; it must not exist.
        options
            How to write it.
        progress
            Called with how far it is.

        Raises
        ------
        PlacerError
            If the disk is too small, or the source changes while it is read.
        VerificationError
            If a restored file has another hash than the original.
        """
        options = options or ExportOptions()
        directory = self.source.directory
        if options.with_hashes and any(s.positions for s in self.source.shards):
            raise UsageError(
                f"{directory} has PyTorch files. An export converts them, so their hashes "
                "cannot be compared",
                "leave out --hash; placer verify compares every tensor",
            )
        if self.restoring:
            _require_shards(self.source, self.record)
        identity = {"record": self.record.to_json(), "restoring": self.restoring}
        with written_shards(
            out, self.source, self.shards, self._other_bytes, identity, options, progress
        ) as written:
            self._write_others(written.directory)
            if self.restoring:
                _require_restored(directory, written.directory, self.record)
            else:
                record = replace(
                    self.record,
                    source_sha256=written.source_sha256,
                    file_sha256={**self.record.file_sha256, **written.file_sha256},
                )
                record.write(written.directory)
        return ExportReport(
            num_shards=len(self.shards),
            num_bytes=sum(work.num_bytes for work in self.shards),
            num_renamed=len(self.changes.names),
            num_permuted=len(self.changes.rows) + len(self.changes.tables),
            num_linked=written.num_linked,
            num_resumed=written.num_resumed,
            unchecked=self._unchecked() if self.restoring else None,
            warning=self.warning,
        )

    def bytes_to_write(self, options: ExportOptions) -> int:
        """Return the bytes that the disk must have free."""
        return self._other_bytes + bytes_to_write(self.shards, options)

    @property
    def _other_bytes(self) -> int:
        return (
            len(self.index or b"")
            + sum(len(content) for content in self.configs.values())
            + sum((self.source.directory / p).stat().st_size for p in self.other_files)
        )

    def _unchecked(self) -> tuple[str, ...]:
        record = self.record
        known = {*record.source_sha256, *record.file_sha256, *self.configs}
        found = {*(one.name for one in self.shards), *map(Path.as_posix, self.other_files)}
        return tuple(sorted(found - known))

    def _write_others(self, partial: Path) -> None:
        copy_files(self.source, self.other_files, partial)
        for name, content in self.configs.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
        if self.index is not None:
            (partial / self.source.index_name).write_bytes(self.index)


def prepare_export(plan_path: Path, directory: Path) -> ExportJob:
    """Prepare the checkpoint whose expert e of layer l is old expert ``map[l][e]``.

    Parameters
    ----------
    plan_path
        A plan without replicas.
    directory
        The original; it is only read.

    Raises
    ------
    PlacerError
        If plan and checkpoint are of different models, the plan cannot be written as a
        permutation, or a tensor cannot be classified.
    """
    plan = Plan.read(plan_path)
    model = ModelSpec.from_checkpoint(directory)
    plan, warning = plan_of(plan, plan_path, model, directory)
    if (directory / RECORD_NAME).exists():
        raise PlacerError(
            f"{directory} was already permuted by placer",
            "restore it first: placer export checkpoint "
            f"{directory} --inverse --out ORIGINAL",
        )
    permutation = permuted_rows(plan, plan_path, model, directory)
    source = CheckpointSource.open(directory)
    changes = _changes(source, model, permutation)
    record = ExportRecord(
        plan_sha256=sha256_file(plan_path),
        source_fingerprint=str(model.fingerprint),
        layer_ids=model.layer_ids or (),
        permutation=permutation,
        header_bytes={s.name: s.header_bytes for s in source.shards},
        shard_bytes={s.name: s.num_bytes for s in source.shards},
        header_sha256=_hashes(
            {s.name: s.header for s in source.shards},
            source.index_name,
            None if source.index_text is None else source.index_text.encode(),
            {name: read_bytes(directory / name) for name in changes.configs},
        ),
        source_sha256={},
        file_sha256={},
    )
    job = _job(source, changes, record, restoring=False, warning=warning)
    written = _hashes({}, source.index_name, job.index, job.configs)
    return replace(
        job, record=replace(record, file_sha256={**source.file_sha256, **written})
    )


def prepare_restore(directory: Path) -> ExportJob:
    """Prepare the original of an exported checkpoint.

    Raises
    ------
    PlacerError
        If the directory holds no ``placer.json``, or one of another model.
    VerificationError
        If a header or a size would differ from the original's: the export was changed.
    """
    record = ExportRecord.read(directory)
    model = ModelSpec.from_checkpoint(directory)
    record.require_model(model, directory)
    source = CheckpointSource.open(directory)
    changes = _changes(source, model, record.inverse)
    job = _job(source, changes, record, restoring=True)
    headers = {work.name: work.header for work in job.shards}
    hashes = _hashes(headers, source.index_name, job.index, changes.configs)
    _require_equal(directory, hashes, record.header_sha256, "SHA-256 of its header")
    sizes = {work.name: work.num_bytes for work in job.shards}
    _require_equal(directory, sizes, record.shard_bytes, "size")
    _require_small_files(source, record)
    return job


def export_checkpoint(
    plan_path: Path, directory: Path, out: Path, options: ExportOptions | None = None
) -> ExportReport:
    """Prepare and write an export: :func:`prepare_export`, :meth:`ExportJob.write`."""
    return prepare_export(plan_path, directory).write(out, options)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Changes:
    """What becomes of tensors, of configs, and of the metadata of each shard."""

    tensors: TensorChanges
    configs: Mapping[str, bytes]
    metadata: Mapping[str, Mapping[str, str]]
    stale: tuple[Path, ...]


def _changes(
    source: CheckpointSource, model: ModelSpec, permutation: Sequence[IntArray]
) -> _Changes:
    config = read_config(source.directory)
    architecture = Architecture.of(config, source.directory)
    layout = architecture.require_layout()
    tensors = {
        name: info for shard in source.shards for name, info in shard.tensors.items()
    }
    changes = tensor_changes(tensors, architecture, config, model, permutation)
    _require_held(source, layout)
    new_numbers = {
        layer: np.argsort(row)
        for layer, row in zip(model.layer_ids or (), permutation, strict=True)
    }
    renumbering = Renumbering(layout, tensors, new_numbers)
    return _Changes(
        tensors=changes,
        configs=renumbering.configs(source.directory, source.other_files),
        metadata={
            shard.name: renumbering.metadata(shard.metadata, shard.path)
            for shard in source.shards
        },
        stale=renumbering.stale(source.directory, source.other_files),
    )


def _require_held(source: CheckpointSource, layout: TensorLayout) -> None:
    """Refuse an index that names tensors of experts or routers that no file holds."""
    for name in source.unheld:
        place = layout.classify(name)
        if place is not None and place.kind is not TensorKind.REST:
            raise PlacerError(
                f"index {source.directory / source.index_name} names {name}, which no "
                "file contains",
                "fetch the checkpoint again",
            )


def _job(
    source: CheckpointSource,
    changes: _Changes,
    record: ExportRecord,
    *,
    restoring: bool,
    warning: str | None = None,
) -> ExportJob:
    lengths = record.header_bytes if restoring else {}
    tensors = changes.tensors
    shards = tuple(
        ShardWork(
            name=shard.name,
            shard=shard,
            header=shard.renamed_header(
                tensors.names, lengths.get(shard.name), changes.metadata[shard.name]
            ),
            pieces=tuple(
                pieces_of(
                    shard,
                    by_place(shard),
                    tensors.rows,
                    tensors.tables,
                    num_blocks={},
                    columns=tensors.columns,
                )
            ),
        )
        for shard in source.shards
    )
    index = None
    if source.index_text is not None:
        path = source.directory / source.index_name
        text = rename_keys(source.index_text, tensors.names, path, "weight_map")
        index = text.encode()
    return ExportJob(
        source=source,
        changes=tensors,
        shards=shards,
        index=index,
        configs=changes.configs,
        record=record,
        restoring=restoring,
        stale=() if restoring else changes.stale,
        warning=warning,
    )


def _hashes(
    headers: Mapping[str, bytes],
    index_name: str,
    index: bytes | None,
    configs: Mapping[str, bytes],
) -> dict[str, str]:
    contents = {**headers, **configs} | ({} if index is None else {index_name: index})
    return {name: hashlib.sha256(one).hexdigest() for name, one in contents.items()}


def _require_small_files(source: CheckpointSource, record: ExportRecord) -> None:
    """Check all files that are no shards: an export always records their hashes."""
    shards = {shard.name for shard in source.shards}
    found = dict(source.file_sha256)
    if source.index_text is not None:
        found[source.index_name] = hashlib.sha256(source.index_text.encode()).hexdigest()
    for name in sorted(record.file_sha256.keys() - shards):
        _require_file(source.directory, name, found.get(name), record)


def _require_shards(source: CheckpointSource, record: ExportRecord) -> None:
    """Check the shards of an export of which only its own hash is known."""
    for shard in source.shards:
        if shard.name in record.file_sha256 and shard.name not in record.source_sha256:
            _require_file(source.directory, shard.name, sha256_file(shard.path), record)


def _require_file(
    directory: Path, name: str, found: str | None, record: ExportRecord
) -> None:
    expected = record.file_sha256[name]
    if found != expected:
        state = "is missing" if found is None else f"has SHA-256 {found[:12]}"
        raise VerificationError(
            f"{directory / name} is not what was exported: it {state}, "
            f"{RECORD_NAME} says {expected[:12]}",
            "put the exported file back, or restore from an unchanged copy",
        )


def _require_restored(directory: Path, partial: Path, record: ExportRecord) -> None:
    """Compare the restored shards, as they are on disk, with the hashes of the original."""
    names = record.source_sha256
    found = {name: sha256_file(partial / name) for name in names}
    _require_equal(directory, found, record.source_sha256, "SHA-256")


def _require_equal(
    directory: Path, found: Mapping[str, object], expected: Mapping[str, object], what: str
) -> None:
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise VerificationError(
                f"{name} restored from {directory} is not the original: {what} "
                f"{str(found.get(name))[:12]} against {str(expected.get(name))[:12]}",
                "the export was changed after it was written: restore from an unchanged "
                "copy",
            )

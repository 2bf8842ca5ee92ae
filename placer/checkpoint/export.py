"""Writing a permuted checkpoint, and restoring the original from it.

Every byte of an expert stays where it is; its *name* moves, in the header of its shard and
in the index. Only tensors that hold all experts, such as routers, are reordered, expert by
expert. So an export is a copy, whatever the dtype or quantisation, and its inverse restores
each file bit for bit.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.checkpoint.copying import copy_blocks, copy_range, write_all
from placer.checkpoint.journal import Journal, resumable_directory
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
from placer.files import read_json, require_free_space, sha256_file, sha256_json
from placer.model import Architecture, ModelSpec, require_same_model
from placer.plan import Plan

IntArray = npt.NDArray[np.int64]
Progress = Callable[[str], None]
_MOST_WORKERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """How an export is written; none of it changes a tensor.

    Attributes
    ----------
    link
        Hard-link shards that do not change instead of copying them.
    with_hashes
        Record the SHA-256 of every original shard, which takes longer than the copy.
    num_workers
        Shards written at the same time; ``None`` for one per CPU, at most 4.
    """

    link: bool = False
    with_hashes: bool = False
    num_workers: int | None = None

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 1:
            raise UsageError(f"{self.num_workers} workers write nothing", "--workers 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardWork:
    """One shard to write.

    Attributes
    ----------
    shard
        The source.
    header
        Length and header of the shard to write.
    rows
        Per tensor that is reordered (old name), the old block that each new block takes.
    """

    shard: Shard
    header: bytes
    rows: Mapping[str, IntArray]

    @property
    def name(self) -> str:
        """File name."""
        return self.shard.path.name

    @property
    def data_bytes(self) -> int:
        """Bytes of the tensors."""
        return max((info.stop for info in self.shard.tensors.values()), default=0)

    @property
    def num_bytes(self) -> int:
        """Bytes of the file to write."""
        return len(self.header) + self.data_bytes

    @property
    def unchanged(self) -> bool:
        """Whether the file to write is the file that is there."""
        return not self.rows and self.header == self.shard.header


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
    num_linked
        Shards that were linked.
    num_resumed
        Shards that an earlier, interrupted run had finished.
    contents_checked
        Whether a restored checkpoint was compared with hashes of the original's contents,
        not of its headers alone.
    warning
        What rests on shapes alone, or ``None``.
    """

    num_shards: int
    num_bytes: int
    num_renamed: int
    num_routers: int
    num_linked: int
    num_resumed: int
    contents_checked: bool = False
    warning: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """An export or its inverse, prepared from headers alone: nothing is written yet.

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
    record
        What ``placer.json`` says, or said.
    restoring
        Whether this is the inverse.
    warning
        What rests on shapes alone, or ``None``.
    """

    source: CheckpointSource
    changes: TensorChanges
    shards: tuple[ShardWork, ...]
    index: bytes | None
    record: ExportRecord
    restoring: bool
    warning: str | None = None

    @property
    def other_files(self) -> tuple[Path, ...]:
        """Files that come along as they are, relative to the directory."""
        return tuple(path for path in self.source.other_files if str(path) != RECORD_NAME)

    def write(
        self,
        out: Path,
        options: ExportOptions | None = None,
        progress: Progress | None = None,
    ) -> ExportReport:
        """Write the directory; a run that was killed goes on where it stopped.

        Parameters
        ----------
        out
            The directory to write; it must not exist.
        options
            How to write it.
        progress
            Told how far it is.

        Raises
        ------
        PlacerError
            If the disk is too small, or the source changes while it is read.
        VerificationError
            If a restored file has another hash than the original.
        """
        options = options or ExportOptions()
        _require_outside(out, self.source.directory)
        identity = sha256_json(self._identity(options))
        with resumable_directory(out, identity) as (partial, journal):
            done = {
                work.name for work in self.shards if _is_finished(work, partial, journal)
            }
            for name in set(journal.finished) - done:
                del journal.finished[name]
            require_free_space(out, self.bytes_to_write(options, done))
            self._write_shards(partial, journal, options, progress)
            self._write_others(partial)
            hashes = {
                name: facts["source_sha256"]
                for name, facts in journal.finished.items()
                if facts["source_sha256"] is not None
            }
            if self.restoring:
                _require_restored(self.source.directory, partial, self.record)
            else:
                replace(self.record, source_sha256=hashes).write(partial)
            linked = sum(facts["linked"] for facts in journal.finished.values())
        return ExportReport(
            num_shards=len(self.shards),
            num_bytes=sum(work.num_bytes for work in self.shards),
            num_renamed=len(self.changes.names),
            num_routers=len(self.changes.rows),
            num_linked=linked,
            num_resumed=len(done),
            contents_checked=self.restoring and bool(self.record.source_sha256),
            warning=self.warning,
        )

    def _identity(self, options: ExportOptions) -> dict[str, Any]:
        """Return what decides the bytes; a source that was changed since is another one."""
        stats = {work.name: work.shard.path.stat() for work in self.shards}
        return {
            "record": self.record.to_json(),
            "restoring": self.restoring,
            "link": options.link,
            "with_hashes": options.with_hashes,
            "source": {n: [one.st_size, one.st_mtime_ns] for n, one in stats.items()},
        }

    def bytes_to_write(
        self, options: ExportOptions, done: Container[str] = frozenset()
    ) -> int:
        """Return the bytes that the disk must have free, but for shards already done."""
        others = sum(
            (self.source.directory / path).stat().st_size for path in self.other_files
        )
        return (
            others
            + len(self.index or b"")
            + sum(
                work.num_bytes
                for work in self.shards
                if work.name not in done and not (options.link and work.unchanged)
            )
        )

    def _write_shards(
        self,
        partial: Path,
        journal: Journal,
        options: ExportOptions,
        progress: Progress | None,
    ) -> None:
        def write(work: ShardWork) -> None:
            journal.add(work.name, _write_shard(work, partial / work.name, options))

        left = [work for work in self.shards if work.name not in journal.finished]
        num_workers = options.num_workers or min(_MOST_WORKERS, os.cpu_count() or 1)
        pool = ThreadPoolExecutor(num_workers)
        try:
            for one in as_completed([pool.submit(write, work) for work in left]):
                one.result()
                if progress is not None:
                    progress(f"{len(journal.finished)} of {len(self.shards)} shards")
        finally:
            pool.shutdown(cancel_futures=True)

    def _write_others(self, partial: Path) -> None:
        for relative in self.other_files:
            (partial / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.source.directory / relative, partial / relative)
        if self.index is not None:
            (partial / INDEX_NAME).write_bytes(self.index)


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
    record = ExportRecord(
        plan_sha256=sha256_file(plan_path),
        source_fingerprint=str(model.fingerprint),
        layer_ids=model.layer_ids or (),
        permutation=permutation,
        header_bytes={s.path.name: s.header_bytes for s in source.shards},
        shard_bytes={s.path.name: s.path.stat().st_size for s in source.shards},
        header_sha256=_header_hashes(
            {s.path.name: s.header for s in source.shards},
            None if source.index_text is None else source.index_text.encode(),
        ),
        source_sha256={},
    )
    return _job(source, changes, record, restoring=False, warning=warning)


def prepare_restore(directory: Path) -> ExportJob:
    """Prepare the original of an exported checkpoint.

    Raises
    ------
    PlacerError
        If the directory holds no ``placer.json``, or one of another model.
    VerificationError
        If a header or a size would not be that of the original: the export was changed.
    """
    record = ExportRecord.read(directory)
    model = ModelSpec.from_checkpoint(directory)
    record.require_model(model, directory)
    source = CheckpointSource.open(directory)
    changes = _changes(source, model, record.inverse)
    job = _job(source, changes, record, restoring=True)
    hashes = _header_hashes({work.name: work.header for work in job.shards}, job.index)
    _require_equal(directory, hashes, record.header_sha256, "SHA-256 of its header")
    sizes = {work.name: work.num_bytes for work in job.shards}
    _require_equal(directory, sizes, record.shard_bytes, "size")
    return job


def export_checkpoint(
    plan_path: Path, directory: Path, out: Path, options: ExportOptions | None = None
) -> ExportReport:
    """Prepare and write an export: :func:`prepare_export`, :meth:`ExportJob.write`."""
    return prepare_export(plan_path, directory).write(out, options)


def restore_checkpoint(
    directory: Path, out: Path, options: ExportOptions | None = None
) -> ExportReport:
    """Prepare and write the original: :func:`prepare_restore`, :meth:`ExportJob.write`."""
    return prepare_restore(directory).write(out, options)


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


def _job(
    source: CheckpointSource,
    changes: TensorChanges,
    record: ExportRecord,
    *,
    restoring: bool,
    warning: str | None = None,
) -> ExportJob:
    lengths = record.header_bytes if restoring else {}
    shards = tuple(
        ShardWork(
            shard=shard,
            header=shard.renamed_header(changes.names, lengths.get(shard.path.name)),
            rows={n: changes.rows[n] for n in shard.tensors if n in changes.rows},
        )
        for shard in source.shards
    )
    index = None
    if source.index_text is not None:
        path = source.directory / INDEX_NAME
        text = rename_keys(source.index_text, changes.names, path, "weight_map")
        index = text.encode()
    return ExportJob(
        source=source,
        changes=changes,
        shards=shards,
        index=index,
        record=record,
        restoring=restoring,
        warning=warning,
    )


def _require_outside(out: Path, directory: Path) -> None:
    if out.resolve().is_relative_to(directory.resolve()):
        raise UsageError(
            f"{out} is inside {directory}, which is only read",
            "choose an --out outside the model's directory",
        )


def _is_finished(work: ShardWork, partial: Path, journal: Journal) -> bool:
    """Return whether a shard that the journal calls finished lies there, whole."""
    path = partial / work.name
    if work.name not in journal.finished or not path.is_file():
        return False
    with path.open("rb") as stream:
        header = stream.read(len(work.header))
    return header == work.header and path.stat().st_size == work.num_bytes


def _write_shard(work: ShardWork, target: Path, options: ExportOptions) -> dict[str, Any]:
    """Write a shard under its name, whole; return what the journal keeps of it."""
    linked = options.link and work.unchanged and _link(work.shard.path, target)
    if not linked:
        _copy_shard(work, target)
    return {
        "linked": linked,
        "source_sha256": sha256_file(work.shard.path) if options.with_hashes else None,
    }


def _link(source: Path, target: Path) -> bool:
    """Hard-link a file; return whether the file system would."""
    target.unlink(missing_ok=True)
    try:
        # The file itself: in the cache of Hugging Face the source is a link.
        target.hardlink_to(source.resolve())
    except OSError:
        return False
    return True


def _copy_shard(work: ShardWork, target: Path) -> None:
    part = target.with_name(target.name + ".part")
    with work.shard.path.open("rb") as original, part.open("wb") as copy:
        source, written = original.fileno(), copy.fileno()
        write_all(written, work.header, 0)
        for start, stop, order in _pieces(work):
            places = (work.shard.data_start + start, len(work.header) + start)
            if order is None:
                copy_range(source, written, *places, stop - start)
            else:
                copy_blocks(source, written, *places, stop - start, order)
        os.fsync(written)
    part.replace(target)


def _pieces(work: ShardWork) -> Iterator[tuple[int, int, IntArray | None]]:
    """Yield the data of a shard in order: reordered tensors, and what lies between."""
    done = 0
    for start, stop, order in sorted(
        (
            (info.start, info.stop, work.rows[name])
            for name, info in work.shard.tensors.items()
            if name in work.rows and info.start < info.stop
        ),
        key=lambda piece: piece[0],
    ):
        yield done, start, None
        yield start, stop, order
        done = stop
    yield done, work.data_bytes, None


def _header_hashes(headers: Mapping[str, bytes], index: bytes | None) -> dict[str, str]:
    contents = dict(headers) | ({} if index is None else {INDEX_NAME: index})
    return {name: hashlib.sha256(one).hexdigest() for name, one in contents.items()}


def _require_restored(directory: Path, partial: Path, record: ExportRecord) -> None:
    """Compare the restored shards, as they lie on disk, with the hashes of the original."""
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
                "the export was changed since: restore from an unchanged copy",
            )

"""Writing many shards in parallel; a killed run continues where it stopped."""

import functools
import os
import shutil
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from placer.arrays import IntArray
from placer.checkpoint.copying import (
    block_ranges,
    permuted_columns,
    replaced_values,
    sha256_of_contents,
    write_contents,
)
from placer.checkpoint.shard import Shard
from placer.checkpoint.source import CheckpointSource
from placer.errors import PlacerError, UsageError
from placer.run.files import sha256_file, sha256_json, utf8_name
from placer.run.parallel import PROCESSES, Backend
from placer.run.resumable import Journal, resumable_directory
from placer.run.writing import require_free_space

Progress = Callable[[str], None]
_MOST_WORKERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """How an export is written. No option changes a tensor.

    Attributes
    ----------
    link
        Hard-link shards that do not change instead of copying them.
    with_hashes
        Record the SHA-256 of every original shard, which takes longer than the copy.
    num_workers
        Shards written at the same time; ``None`` for one per CPU, at most 4.
    backend
        This machine, or Ray tasks on machines that share source and target.
    """

    link: bool = False
    with_hashes: bool = False
    num_workers: int | None = None
    backend: Backend = PROCESSES

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 1:
            raise UsageError(
                f"--workers must be at least 1, got {self.num_workers}",
                "for example --workers 1",
            )
        if self.num_workers is not None and self.backend.name == "ray":
            raise UsageError(
                f"--workers {self.num_workers} is for this machine; with --backend ray, "
                "Ray chooses the number",
                "drop --workers or --backend",
            )

    @property
    def num_threads(self) -> int:
        """Shards that are written at the same time on this machine."""
        return self.num_workers or min(_MOST_WORKERS, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """Bytes that go from a shard to the one that is written.

    Attributes
    ----------
    start, stop
        First byte in the file, and the byte after the last.
    block_bytes, order
        Where the bytes are blocks of one size: that size, and the old block that each new
        block takes; ``None`` where they stay as they are.
    num_rows
        Where the bytes are a matrix whose columns are ordered so: its rows, else 0.
    dtype, new_values
        Where the bytes are whole numbers to replace: their type, and the new number of
        each old one; ``None`` where they stay as they are.
    """

    start: int
    stop: int
    block_bytes: int = 0
    order: IntArray | None = None
    num_rows: int = 0
    dtype: str = ""
    new_values: IntArray | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes written."""
        if self.order is None or self.num_rows:
            return self.stop - self.start
        return len(self.order) * self.block_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShardWork:
    """One shard to write.

    Attributes
    ----------
    name
        Where, relative to the directory that is written.
    shard
        The source.
    header
        Length and header of the shard to write.
    pieces
        Its data, in order.
    """

    name: str
    shard: Shard
    header: bytes
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the file to write."""
        return len(self.header) + sum(piece.num_bytes for piece in self.pieces)

    @property
    def unchanged(self) -> bool:
        """Whether the file to write is the file that is there."""
        return (
            self.shard.positions is None
            and self.header == self.shard.header
            and all(p.order is None and p.new_values is None for p in self.pieces)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenShards:
    """A directory whose shards are written, and what is left to do in it.

    Attributes
    ----------
    directory
        Where they are; it gets its name at the end.
    file_sha256
        SHA-256 of each shard whose bytes passed through this process.
    source_sha256
        SHA-256 of each source, where hashes were requested.
    num_linked
        Shards that were linked.
    num_resumed
        Shards that an earlier, interrupted run had finished.
    """

    directory: Path
    file_sha256: Mapping[str, str]
    source_sha256: Mapping[str, str]
    num_linked: int
    num_resumed: int


def pieces_of(
    shard: Shard,
    names: Iterable[str],
    orders: Mapping[str, IntArray],
    tables: Mapping[str, IntArray],
    num_blocks: Mapping[str, int],
    columns: Mapping[str, int],
) -> Iterator[Piece]:
    """Yield the data of tensors, those that touch and stay as they are as one piece.

    Parameters
    ----------
    shard
        The source.
    names
        The tensors, in the order in which they are written.
    orders
        Per tensor of equal blocks, the old block that each new block is.
    tables
        Per tensor of whole numbers, the new number of each old one.
    num_blocks
        Blocks of those tensors of which not all blocks are taken.
    columns
        Per tensor whose blocks are the columns of a matrix, its rows.
    """
    start = stop = 0
    for name in names:
        first, last = shard.place(name)
        if first == last:
            continue
        if first != stop or name in orders or name in tables:
            if stop > start:
                yield Piece(start=start, stop=stop)
            start = first
        stop = last
        if name in columns:
            rows, order = columns[name], orders[name]
            yield Piece(start=first, stop=last, order=order, num_rows=rows)
            start = last
        elif name in orders:
            size = (last - first) // num_blocks.get(name, len(orders[name]))
            yield Piece(start=first, stop=last, block_bytes=size, order=orders[name])
            start = last
        elif name in tables:
            dtype = shard.tensors[name].dtype
            yield Piece(start=first, stop=last, dtype=dtype, new_values=tables[name])
            start = last
    if stop > start:
        yield Piece(start=start, stop=stop)


def by_place(shard: Shard) -> list[str]:
    """Return the tensors of a shard in the order of its data."""
    return sorted(shard.tensors, key=lambda name: (shard.tensors[name].start, name))


def bytes_to_write(
    works: Sequence[ShardWork], options: ExportOptions, done: Container[str] = frozenset()
) -> int:
    """Return the bytes that the disk must have free for the shards that are not done."""
    return sum(
        work.num_bytes
        for work in works
        if work.name not in done and not (options.link and work.unchanged)
    )


def copy_files(source: CheckpointSource, files: Iterable[Path], target: Path) -> None:
    """Copy files of a checkpoint to the same place in ``target``.

    Raises
    ------
    SourceChangedError
        If a file changed after the checkpoint was opened.
    """
    for relative in files:
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.directory / relative, target / relative)
        found = sha256_file(target / relative)
        if found != source.file_sha256[relative.as_posix()]:
            raise source.changed(relative, "its content")


@contextmanager
def written_shards(
    out: Path,
    source: CheckpointSource,
    works: Sequence[ShardWork],
    other_bytes: int,
    identity: Mapping[str, Any],
    options: ExportOptions,
    progress: Progress | None,
) -> Iterator[WrittenShards]:
    """Write all shards, then yield for the other files; the directory gets its name last.

    Parameters
    ----------
    out
        The directory to write; it must not exist.
    source
        The checkpoint that is read; it must be the same at the end.
    works
        The shards.
    other_bytes
        Bytes of the other files.
    identity
        What decides the bytes, in addition to sources and options: another export does not
        continue with what this one finished.
    options
        How to write.
    progress
        Called with how far it is.

    Raises
    ------
    PlacerError
        If the disk is too small.
    SourceChangedError
        If a file of the source changes meanwhile.
    """
    shards = sorted({work.shard.path for work in works})
    # A source that was changed since is another one.
    whole = dict(identity) | {
        "options": [options.link, options.with_hashes],
        "sources": {utf8_name(path): source.states[path][:2] for path in shards},
    }
    sources = {path.parent for path in shards}
    with resumable_directory(out, sha256_json(whole), sources) as (partial, journal):
        with ThreadPoolExecutor(options.num_threads) as pool:
            found = pool.map(lambda one: _is_finished(one, partial, journal), works)
            done = {work.name for work, is_one in zip(works, found, strict=True) if is_one}
        for name in set(journal.finished) - done:
            del journal.finished[name]
        require_free_space(out, other_bytes + bytes_to_write(works, options, done))
        try:
            _write_all(works, partial, journal, options, progress)
        except (OSError, PlacerError):
            source.require_unchanged()  # a change explains the error
            raise
        source.require_unchanged()
        facts = journal.finished
        yield WrittenShards(
            directory=partial,
            file_sha256=_known(facts, "sha256"),
            source_sha256=_known(facts, "source_sha256"),
            num_linked=sum(one["linked"] for one in facts.values()),
            num_resumed=len(done),
        )
        source.require_unchanged()


def _known(facts: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, str]:
    return {shard: one[name] for shard, one in facts.items() if one[name] is not None}


def _is_finished(work: ShardWork, partial: Path, journal: Journal) -> bool:
    """Return whether a shard that the journal calls finished is there and complete.

    It is read again, and where no hash is known the source too: as long as a copy takes.
    """
    path, facts = partial / work.name, journal.finished.get(work.name)
    if facts is None or not path.is_file() or path.stat().st_size != work.num_bytes:
        return False
    if facts["linked"]:
        return path.samefile(work.shard.path)
    expected = facts["sha256"]
    if expected is None:
        with work.shard.path.open("rb") as original:
            source = original.fileno()
            expected = sha256_of_contents(source, _contents(work, source))
    return bool(sha256_file(path) == expected)


def _write_all(
    works: Sequence[ShardWork],
    partial: Path,
    journal: Journal,
    options: ExportOptions,
    progress: Progress | None,
) -> None:
    failed = threading.Event()

    def write(work: ShardWork) -> None:
        if failed.is_set():
            return
        try:
            journal.add(work.name, _write_shard(work, partial / work.name, options))
        except BaseException:
            failed.set()
            raise

    left = [work for work in works if work.name not in journal.finished]
    if options.backend.name == "ray":
        _write_on_ray(left, partial, journal, options, progress)
        return
    # Threads are enough: the kernel copies, and Python lets others run meanwhile.
    pool = ThreadPoolExecutor(options.num_threads)
    try:
        for one in as_completed([pool.submit(write, work) for work in left]):
            one.result()
            if progress is not None:
                progress(f"{len(journal.finished)} of {len(works)} shards")
    finally:
        failed.set()
        pool.shutdown(cancel_futures=True)


def _write_on_ray(
    left: Sequence[ShardWork],
    partial: Path,
    journal: Journal,
    options: ExportOptions,
    progress: Progress | None,
) -> None:
    """Write every shard as a task; the journal stays here."""
    # A task may run in another directory.
    target = partial.absolute()
    tasks = [
        replace(work, shard=replace(work.shard, path=work.shard.path.absolute()))
        for work in left
    ]
    write = functools.partial(_write_into, directory=target, options=options)
    whole = len(journal.finished) + len(left)
    for number, facts in options.backend.as_completed(write, tasks):
        journal.add(left[number].name, facts)
        if progress is not None:
            progress(f"{len(journal.finished)} of {whole} shards")


def _write_into(
    work: ShardWork, *, directory: Path, options: ExportOptions
) -> dict[str, Any]:
    return _write_shard(work, directory / work.name, options)


def _write_shard(work: ShardWork, target: Path, options: ExportOptions) -> dict[str, Any]:
    """Write a shard under its name, whole; return what the journal keeps of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    linked = options.link and work.unchanged and _link(work.shard.path, target)
    return {
        "linked": linked,
        "sha256": None if linked else _copy_shard(work, target),
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


def _copy_shard(work: ShardWork, target: Path) -> str | None:
    """Write a shard; return its SHA-256 if its bytes passed through this process."""
    part = target.with_name(target.name + ".part")
    with work.shard.path.open("rb") as original, part.open("wb") as copy:
        source, written = original.fileno(), copy.fileno()
        sha256 = write_contents(source, written, _contents(work, source))
        os.fsync(written)
    part.replace(target)
    return sha256


def _contents(work: ShardWork, source: int) -> Iterator[bytes | range]:
    """Yield what a shard to write holds."""
    yield work.header
    for piece in work.pieces:
        place = (piece.start, piece.stop - piece.start)
        if piece.order is not None and piece.num_rows:
            yield permuted_columns(source, *place, piece.num_rows, piece.order)
        elif piece.order is not None:
            yield from block_ranges(piece.start, piece.block_bytes, piece.order)
        elif piece.new_values is not None:
            yield from replaced_values(source, *place, piece.dtype, piece.new_values)
        else:
            yield range(piece.start, piece.stop)

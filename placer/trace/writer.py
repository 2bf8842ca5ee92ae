"""Writing a trace, chunk by chunk, so that a killed run can go on."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np

from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.run.documents import of_this_version, read_json, validated
from placer.run.files import (
    atomic_file,
    canonical_json,
    partial_path,
    require_absent,
    sha256_file,
    write_tensors,
)
from placer.trace.chunk import Chunk
from placer.trace.header import (
    HEADER_NAME,
    ChunkInfo,
    TraceFile,
    TraceHeader,
    upgraded_trace,
)

_JOURNAL_NAME = "journal.json"


@dataclass(slots=True, kw_only=True)
class TraceWriter:
    """Writes a trace beside its place; :meth:`finish` renames it to ``directory``.

    Used as a context manager, it removes what it wrote if the block raises, unless
    ``resumable``: then the finished chunks and a journal stay in ``DIRECTORY.partial``,
    and a writer with the same model, domains and provenance goes on after them.

    Attributes
    ----------
    directory
        Where the trace will be; must not exist yet.
    model, domains, provenance, experts_by_weight
        What the header will say.
    resumable
        Keep finished chunks after a failure, and take up those of an earlier one.
    """

    directory: Path
    model: ModelSpec
    domains: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    experts_by_weight: bool = True
    resumable: bool = False
    _chunks: list[ChunkInfo] = field(default_factory=list, init=False)
    _finished: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        require_absent(self.directory)
        if self.resumable and (self._partial / _JOURNAL_NAME).exists():
            self._take_up_journal()
        else:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)

    @property
    def num_chunks(self) -> int:
        """Finished chunks."""
        return len(self._chunks)

    @property
    def num_tokens(self) -> int:
        """Tokens in the finished chunks."""
        return sum(chunk.num_tokens for chunk in self._chunks)

    @property
    def _partial(self) -> Path:
        return partial_path(self.directory)

    @property
    def _header(self) -> TraceHeader:
        return TraceHeader(
            model=self.model,
            domains=self.domains,
            provenance=self.provenance,
            experts_by_weight=self.experts_by_weight,
            chunks=tuple(self._chunks),
        )

    def append(self, chunk: Chunk) -> None:
        """Write the next chunk; its sequences must follow those already written."""
        chunk.require_within(self.model)
        chunk.require_finite_weights()
        name = f"chunk-{len(self._chunks):05d}.safetensors"
        path = self._partial / name
        write_tensors(path, chunk.tensors())
        self._chunks.append(
            ChunkInfo(
                file=name,
                num_tokens=chunk.num_tokens,
                num_sequences=len(np.unique(chunk.sequence_ids)),
                sha256=sha256_file(path),
            )
        )
        if self.resumable:
            self._write_header(_JOURNAL_NAME)

    def append_file(self, path: Path, chunk: ChunkInfo) -> None:
        """Take a finished chunk of another trace as the next one, unread."""
        name = f"chunk-{len(self._chunks):05d}.safetensors"
        shutil.copyfile(path, self._partial / name)
        self._chunks.append(msgspec.structs.replace(chunk, file=name))

    def finish(self) -> None:
        """Write the header and give the trace its name.

        Raises
        ------
        PlacerError
            If no token was written.
        """
        if not self._chunks:
            raise PlacerError(
                f"nothing to write to {self.directory}: no token was recorded"
            )
        self._write_header(HEADER_NAME)
        (self._partial / _JOURNAL_NAME).unlink(missing_ok=True)
        self._partial.rename(self.directory)
        self._finished = True

    def _write_header(self, name: str) -> None:
        with atomic_file(self._partial / name) as temporary:
            temporary.write_text(
                canonical_json(self._header.to_json()) + "\n", encoding="utf-8"
            )

    def _take_up_journal(self) -> None:
        path = self._partial / _JOURNAL_NAME
        where, again = f"journal {path}", f"start anew: rm -r {self._partial}"
        journal = of_this_version(read_json(path, "journal"), where, again, upgraded_trace)
        chunks = validated(journal, TraceFile, where, again).chunks
        self._chunks = list(chunks)
        if canonical_json(self._header.to_json()) != canonical_json(journal):
            raise PlacerError(
                f"{self._partial} was begun with another model, corpus or options",
                f"give the same ones to go on, or start anew: rm -r {self._partial}",
            )
        for chunk in chunks:
            path = self._partial / chunk.file
            if not path.is_file() or sha256_file(path) != chunk.sha256:
                raise PlacerError(
                    f"{path} is damaged, so the recording cannot go on",
                    f"start anew: rm -r {self._partial}",
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        worth_keeping = self.resumable and self._chunks
        if not self._finished and not worth_keeping:
            shutil.rmtree(self._partial, ignore_errors=True)

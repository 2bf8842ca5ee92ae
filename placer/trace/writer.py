"""Writing a trace, chunk by chunk, so that a killed run can continue."""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np

from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.run.documents import validated
from placer.run.files import canonical_json, sha256_file, sha256_json
from placer.run.resumable import Journal, resumable_directory
from placer.run.writing import atomic_directory, atomic_file, write_tensors
from placer.trace.chunk import Chunk
from placer.trace.header import HEADER_NAME, ChunkInfo, TraceHeader


@dataclass(slots=True, kw_only=True)
class TraceWriter:
    """Writes a trace next to its place; :meth:`finish` renames it to ``directory``.

    A context manager. It removes what it wrote if the block raises, unless ``resumable``:
    then the finished chunks stay (:mod:`placer.run.resumable`), and a writer with the same
    model, domains and provenance continues after them.

    Attributes
    ----------
    directory
        Where the trace will be; must not exist.
    model, domains, provenance, experts_by_weight
        What the header will say.
    resumable
        Keep finished chunks after a failure, and reuse those of an earlier run.
    """

    directory: Path
    model: ModelSpec
    domains: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    experts_by_weight: bool = True
    resumable: bool = False
    _chunks: list[ChunkInfo] = field(default_factory=list, init=False)
    _finished: bool = field(default=False, init=False)
    _partial: Path = field(init=False)
    _journal: Journal | None = field(default=None, init=False)
    _stack: ExitStack = field(default_factory=ExitStack, init=False)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self.resumable:
                identity = sha256_json(self._header.to_json())
                directory = resumable_directory(self.directory, identity)
                self._partial, self._journal = stack.enter_context(directory)
                self._take_up(self._journal)
            else:
                self._partial = stack.enter_context(atomic_directory(self.directory))
            self._stack = stack.pop_all()
        return self

    @property
    def num_chunks(self) -> int:
        """Finished chunks."""
        return len(self._chunks)

    @property
    def num_tokens(self) -> int:
        """Tokens in the finished chunks."""
        return sum(chunk.num_tokens for chunk in self._chunks)

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
        info = ChunkInfo(
            file=name,
            num_tokens=chunk.num_tokens,
            num_sequences=len(np.unique(chunk.sequence_ids)),
            sha256=sha256_file(path),
        )
        self._chunks.append(info)
        if self._journal is not None:
            self._journal.add(name, msgspec.structs.asdict(info))

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
        with atomic_file(self._partial / HEADER_NAME) as temporary:
            text = canonical_json(self._header.to_json()) + "\n"
            temporary.write_text(text, encoding="utf-8")
        self._finished = True
        self._stack.close()

    def _take_up(self, journal: Journal) -> None:
        """Continue after the chunks of an earlier run, up to the first that is damaged."""
        for name, facts in journal.finished.items():
            path = self._partial / name
            if not path.is_file() or sha256_file(path) != facts.get("sha256"):
                break
            where = f"the journal of {self._partial}"
            chunk = validated(facts, ChunkInfo, where, "move it away to start again")
            self._chunks.append(chunk)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._finished:
            error = error or PlacerError(f"{self.directory} was not finished")
            self._stack.__exit__(type(error), error, traceback)

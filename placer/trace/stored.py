"""Tokens of a trace whose experts stay on disk, layer by layer.

Legend of the shapes: T tokens, L MoE layers, k experts per token.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, overload

import numpy as np

from placer.arrays import AnyArray, BoolArray, IntArray
from placer.errors import SourceChangedError
from placer.run.files import open_regular
from placer.trace.chunk import Chunk, sequence_order
from placer.trace.reader import Trace
from placer.trace.selection import EVERYTHING, Selection

_DTYPES = {"U8": np.uint8, "I16": np.int16}
# Size, time of change and inode.
_State = tuple[int, int, int]


class Routing(Protocol):
    """What a simulation takes: a :class:`Chunk`, or :class:`StoredTokens`."""

    @property
    def experts(self) -> Sequence[AnyArray]:
        """L arrays ``[T, k]`` of expert ids."""

    @property
    def token_ids(self) -> AnyArray | None:
        """``[T]`` int32, or ``None``."""

    @property
    def sequence_ids(self) -> AnyArray:
        """``[T]`` int32, non-decreasing."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens, T."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _StoredChunk:
    """A chunk's file as it was when its hash was verified, and the tokens selected."""

    path: Path
    state: _State | None
    keep: BoolArray | None

    def layer(self, number: int) -> AnyArray:
        """Return ``[tokens, k]``: the expert ids of one layer."""
        with open_regular(self.path, "chunk") as stream:
            if _state(os.fstat(stream.fileno())) != self.state:
                raise SourceChangedError(
                    f"chunk {self.path} changed while it was read",
                    "run the command again when nothing writes to the trace any more",
                )
            length = int.from_bytes(stream.read(8), "little")
            entry = json.loads(stream.read(length))[f"experts.{number}"]
            begin, end = entry["data_offsets"]
            stream.seek(8 + length + begin)
            data = stream.read(end - begin)
        ids = np.frombuffer(data, _DTYPES[entry["dtype"]]).reshape(entry["shape"])
        return ids if self.keep is None else ids[self.keep]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _StoredLayers(Sequence[AnyArray]):
    """L arrays ``[T, k]``, each read when it is asked for."""

    num_layers: int
    chunks: tuple[_StoredChunk, ...]
    order: IntArray | None

    def __len__(self) -> int:
        return self.num_layers

    @overload
    def __getitem__(self, number: int) -> AnyArray: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[AnyArray]: ...
    def __getitem__(self, number: int | slice) -> AnyArray | Sequence[AnyArray]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        if not 0 <= number < self.num_layers:
            raise IndexError(number)
        ids: AnyArray = np.concatenate([chunk.layer(number) for chunk in self.chunks])
        return ids if self.order is None else ids[self.order]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredTokens:
    """The selected tokens of a trace. Memory holds one layer of experts at a time.

    Attributes
    ----------
    experts
        L arrays ``[T, k]`` of expert ids, each read from disk whenever it is asked for.
    token_ids, sequence_ids, domain_ids
        As in :class:`Chunk`.
    """

    experts: Sequence[AnyArray]
    token_ids: AnyArray | None
    sequence_ids: AnyArray
    domain_ids: AnyArray | None

    @property
    def num_tokens(self) -> int:
        """Number of tokens, T."""
        return len(self.sequence_ids)

    @classmethod
    def of(cls, trace: Trace, selection: Selection = EVERYTHING) -> "StoredTokens":
        """Verify the chunks of a trace once, in order; a layer is read from them later.

        Raises
        ------
        PlacerError
            If a chunk is damaged, no token is left, or a phase is selected and the trace
            records none. Reading a layer later raises :class:`SourceChangedError` if a
            chunk is not the file that was verified.
        """
        stored: list[_StoredChunk] = []
        heads: list[Chunk] = []
        # A file's state is taken before its content is verified.
        for state, (path, chunk) in zip(_states(trace), trace.whole_chunks(), strict=True):
            keep = None if selection == EVERYTHING else selection.keep(chunk)
            head = _head(chunk) if keep is None else _head(chunk).select(keep)
            if head.num_tokens:
                stored.append(_StoredChunk(path=path, state=state, keep=keep))
                heads.append(head)
        joined = Chunk.concatenate(heads)
        layers = _StoredLayers(
            num_layers=trace.model.num_layers,
            chunks=tuple(stored),
            order=sequence_order([head.sequence_ids for head in heads]),
        )
        return cls(
            experts=layers,
            token_ids=joined.token_ids,
            sequence_ids=joined.sequence_ids,
            domain_ids=joined.domain_ids,
        )


def _head(chunk: Chunk) -> Chunk:
    """Return the ids of tokens, with a layer of experts that is not used."""
    return Chunk(
        experts=(chunk.experts[0][:, :0],),
        token_ids=chunk.token_ids,
        sequence_ids=chunk.sequence_ids,
        positions=chunk.positions,
        domain_ids=chunk.domain_ids,
    )


def _states(trace: Trace) -> Iterator[_State | None]:
    """Yield what each chunk's file is now; ``None`` where there is none."""
    for info in trace.header.chunks:
        path = trace.directory / info.file
        yield _state(path.stat()) if path.is_file() else None


def _state(found: os.stat_result) -> _State:
    return found.st_size, found.st_mtime_ns, found.st_ino

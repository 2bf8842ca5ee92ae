"""The header of a trace, ``trace.json``."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.run.documents import (
    SCHEMA_VERSION,
    Count,
    Document,
    Sha256,
    of_this_version,
    read_json,
    validated,
)
from placer.run.kinds import require_kind

HEADER_NAME = "trace.json"
# Their index is a byte.
MAX_DOMAINS = 256
AGAIN = "record or import the trace again"


class ChunkInfo(Document, frozen=True, kw_only=True):
    """A chunk file as the header lists it: its name, tokens and SHA-256."""

    file: str
    num_tokens: Count
    num_sequences: Count
    sha256: Sha256


class TraceFile(Document, frozen=True, kw_only=True):
    """The JSON object of ``trace.json``; see ``traces/README.md``."""

    schema_version: Literal[2]
    model: ModelSpec
    id_space: Literal["logical"]
    num_tokens: Count
    num_sequences: Count
    domains: tuple[str, ...]
    provenance: dict[str, Any]
    chunks: tuple[ChunkInfo, ...]
    experts_by_weight: bool


def upgraded_trace(value: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of schema version 2 from the fields of version 1.

    Version 1 had ``experts_by_weight`` only where it is false.
    """
    return {"experts_by_weight": True} | value


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceHeader:
    """What a trace holds.

    Attributes
    ----------
    model
        The model whose router was recorded.
    domains
        Names of the domains; ``domain_ids`` index them.
    provenance
        Where the trace came from: tool version, corpus, dtype. No times, no host.
    chunks
        The chunk files in order.
    experts_by_weight
        Whether the experts of a token are listed by descending router weight.
    """

    model: ModelSpec
    domains: tuple[str, ...]
    provenance: Mapping[str, Any]
    chunks: tuple[ChunkInfo, ...]
    experts_by_weight: bool = True

    def __post_init__(self) -> None:
        if len(set(self.domains)) < len(self.domains) or len(self.domains) > MAX_DOMAINS:
            raise PlacerError(
                f"a trace has at most {MAX_DOMAINS} domains, of different names; these are "
                f"{len(self.domains)}, {len(set(self.domains))} of them different"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens over all chunks."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def num_sequences(self) -> int:
        """Sequences over all chunks (a chunk holds whole sequences)."""
        return sum(chunk.num_sequences for chunk in self.chunks)

    def to_json(self) -> dict[str, Any]:
        """Return the header as the JSON object of ``trace.json``."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model.to_json(),
            "id_space": "logical",
            "num_tokens": self.num_tokens,
            "num_sequences": self.num_sequences,
            "domains": list(self.domains),
            "provenance": dict(self.provenance),
            "chunks": [chunk.to_json() for chunk in self.chunks],
            "experts_by_weight": self.experts_by_weight,
        }

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read ``trace.json`` of a trace directory.

        Raises
        ------
        PlacerError
            If the directory is no complete trace, or of another schema version.
        """
        if not directory.exists():
            raise PlacerError(
                f"trace {directory} does not exist",
                f"write one: placer record MODEL --corpus FILE --out {directory}",
            )
        write = "write one: placer record MODEL --corpus FILE --out TRACE"
        require_kind(directory, ["trace"], write)
        path = directory / HEADER_NAME
        where = f"trace header {path}"
        value = of_this_version(
            read_json(path, "trace header"), where, AGAIN, upgraded_trace
        )
        read = validated(value, TraceFile, where, AGAIN)
        try:
            header = cls(
                model=read.model,
                domains=read.domains,
                provenance=read.provenance,
                chunks=read.chunks,
                experts_by_weight=read.experts_by_weight,
            )
            header._require_sums(read)
        except PlacerError as error:
            raise PlacerError(f"{where}: {error}", AGAIN) from error
        return header

    def _require_sums(self, read: TraceFile) -> None:
        if not self.num_tokens:
            raise PlacerError("its chunks hold no token")
        for name in ("num_tokens", "num_sequences"):
            if getattr(read, name) != getattr(self, name):
                raise PlacerError(
                    f"{name} is {getattr(read, name)}, but its chunks add up to "
                    f"{getattr(self, name)}"
                )

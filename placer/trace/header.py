"""The header of a trace, ``trace.json``."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.run.documents import read_json

SCHEMA_VERSION = 1
HEADER_NAME = "trace.json"
# Their index is a byte.
MAX_DOMAINS = 256
AGAIN = "record or import the trace again"
_FIELDS = {
    "schema_version",
    "model",
    "id_space",
    "num_tokens",
    "num_sequences",
    "domains",
    "provenance",
    "chunks",
}
# Written only where it is false: a trace without it lists experts by weight.
_BY_WEIGHT = "experts_by_weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkInfo:
    """A chunk file as the header lists it: its name, tokens and SHA-256."""

    file: str
    num_tokens: int
    num_sequences: int
    sha256: str

    def __post_init__(self) -> None:
        for name in ("file", "sha256"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} of a chunk is {getattr(self, name)!r}")
        for name in ("num_tokens", "num_sequences"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} of chunk {self.file} is {value!r}")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "file": self.file,
            "num_tokens": self.num_tokens,
            "num_sequences": self.num_sequences,
            "sha256": self.sha256,
        }


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
        if not isinstance(self.experts_by_weight, bool):
            raise ValueError(f"{_BY_WEIGHT} is {self.experts_by_weight!r}")
        if not all(isinstance(name, str) for name in self.domains):
            raise ValueError(f"a domain is no text: {list(self.domains)}")
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
        } | ({} if self.experts_by_weight else {_BY_WEIGHT: False})

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
        value = read_json(directory / HEADER_NAME, "trace header")
        version = value.get("schema_version")
        if version != SCHEMA_VERSION:
            raise PlacerError(
                f"{directory} has schema_version {version}, "
                f"this placer reads {SCHEMA_VERSION}",
                "install the placer that wrote it, or record again",
            )
        if set(value) - {_BY_WEIGHT} != _FIELDS:
            odd = ", ".join(sorted((set(value) - {_BY_WEIGHT}) ^ _FIELDS))
            raise PlacerError(
                f"{directory / HEADER_NAME} has missing or unknown fields: {odd}", AGAIN
            )
        if value["id_space"] != "logical":
            raise PlacerError(
                f"{directory} holds {value['id_space']} expert ids, "
                "placer needs logical ones"
            )
        try:
            header = cls(
                model=ModelSpec.from_json(value["model"]),
                domains=tuple(value["domains"]),
                provenance=value["provenance"],
                chunks=tuple(ChunkInfo(**chunk) for chunk in value["chunks"]),
                experts_by_weight=value.get(_BY_WEIGHT, True),
            )
            header._require_sums(value)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlacerError(
                f"{directory / HEADER_NAME} is damaged: {error}", AGAIN
            ) from error
        return header

    def _require_sums(self, value: Mapping[str, Any]) -> None:
        if not self.num_tokens:
            raise ValueError("its chunks hold no token")
        for name in ("num_tokens", "num_sequences"):
            if value[name] != getattr(self, name):
                raise ValueError(
                    f"{name} is {value[name]!r}, but its chunks add up to "
                    f"{getattr(self, name)}"
                )

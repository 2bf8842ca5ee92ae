"""``placer.json``: what was done to a checkpoint, so that it can be undone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from placer.arrays import IntArray
from placer.checkpoint.source import RECORD_NAME
from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.run.documents import (
    SCHEMA_VERSION,
    Count,
    Document,
    ExpertId,
    Sha256,
    of_this_version,
    read_json,
    validated,
)
from placer.run.files import canonical_json
from placer.run.kinds import require_kind
from placer.run.seals import require_seal, sealed, unsealed
from placer.version import __version__


class RecordFile(Document, frozen=True, kw_only=True):
    """The JSON object of ``placer.json``; see ``docs/formats.md``."""

    schema_version: Literal[2]
    placer: str
    plan_sha256: Sha256
    source_fingerprint: Sha256
    layer_ids: tuple[Count, ...]
    permutation: list[list[ExpertId]]
    inverse: list[list[ExpertId]]
    header_bytes: dict[str, Count]
    shard_bytes: dict[str, Count]
    header_sha256: dict[str, Sha256]
    source_sha256: dict[str, Sha256]
    file_sha256: dict[str, Sha256]
    sha256: Sha256 | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExportRecord:
    """The record in an exported checkpoint.

    Attributes
    ----------
    plan_sha256
        SHA-256 of the plan file.
    source_fingerprint
        Fingerprint of the model.
    layer_ids
        ``[L]``: the model's own number of each MoE layer.
    permutation
        L arrays ``[E]`` int64: the original expert that each new expert is.
    header_bytes
        Length of the header of each original shard.
    shard_bytes
        Size of each original shard.
    header_sha256
        SHA-256 of the beginning of each original shard, length and header, and of the
        whole index.
    source_sha256
        SHA-256 of each original shard; empty unless requested.
    file_sha256
        SHA-256 of the files of the export: of all but this record and shards, and of shards
        whose bytes passed through the process that wrote them.
    """

    plan_sha256: str
    source_fingerprint: str
    layer_ids: tuple[int, ...]
    permutation: tuple[IntArray, ...]
    header_bytes: Mapping[str, int]
    shard_bytes: Mapping[str, int]
    header_sha256: Mapping[str, str]
    source_sha256: Mapping[str, str]
    file_sha256: Mapping[str, str]

    @property
    def inverse(self) -> tuple[IntArray, ...]:
        """L arrays ``[E]`` int64: the new expert that each original expert is."""
        return tuple(np.argsort(row) for row in self.permutation)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of ``placer.json``."""
        return sealed(
            {
                "schema_version": SCHEMA_VERSION,
                "placer": __version__,
                "plan_sha256": self.plan_sha256,
                "source_fingerprint": self.source_fingerprint,
                "layer_ids": list(self.layer_ids),
                "permutation": [row.tolist() for row in self.permutation],
                "inverse": [row.tolist() for row in self.inverse],
                "header_bytes": dict(self.header_bytes),
                "shard_bytes": dict(self.shard_bytes),
                "header_sha256": dict(self.header_sha256),
                "source_sha256": dict(self.source_sha256),
                "file_sha256": dict(self.file_sha256),
            }
        )

    def write(self, directory: Path) -> None:
        """Write ``placer.json``: the same export gives the same bytes."""
        text = canonical_json(self.to_json()) + "\n"
        (directory / RECORD_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read ``placer.json``.

        Raises
        ------
        PlacerError
            If there is none, it is of another schema version, or damaged.
        """
        write = (
            f"an export has {RECORD_NAME}. Write one: placer export checkpoint PLAN MODEL "
            "--out DIR"
        )
        path = directory / RECORD_NAME
        if not path.exists():
            require_kind(directory, ["export"], write)
        where, again = f"export record {path}", "take it from an unchanged copy"
        value = read_json(path, "export record")
        value = of_this_version(value, where, again, _upgraded)
        read = validated(value, RecordFile, where, again)
        record = cls(
            plan_sha256=read.plan_sha256,
            source_fingerprint=read.source_fingerprint,
            layer_ids=read.layer_ids,
            permutation=tuple(np.asarray(row, dtype=np.int64) for row in read.permutation),
            header_bytes=read.header_bytes,
            shard_bytes=read.shard_bytes,
            header_sha256=read.header_sha256,
            source_sha256=read.source_sha256,
            file_sha256=read.file_sha256,
        )
        for layer, row in enumerate(record.permutation):
            if not np.array_equal(np.sort(row), np.arange(len(row))):
                raise PlacerError(
                    f"{where}: permutation[{layer}] is not a permutation", again
                )
        if [row.tolist() for row in record.inverse] != read.inverse:
            raise PlacerError(f"{where}: permutation and inverse do not match", again)
        require_seal(value, where, again)
        return record

    def require_model(self, model: ModelSpec, directory: Path) -> None:
        """Refuse a record that is not for the model in its directory.

        Raises
        ------
        PlacerError
            If fingerprints, layers or numbers of experts differ.
        """
        sizes = tuple(len(row) for row in self.permutation)
        if (
            self.source_fingerprint != model.fingerprint
            or self.layer_ids != model.layer_ids
            or sizes != model.num_experts
        ):
            raise PlacerError(
                f"{directory / RECORD_NAME} is for another model than its config.json: "
                f"fingerprint {str(self.source_fingerprint)[:12]} against "
                f"{str(model.fingerprint)[:12]}",
                "restore from an unchanged copy of the export",
            )


def _upgraded(value: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of schema version 2: version 1 has no hashes of small files."""
    return unsealed(value) | {"file_sha256": {}}

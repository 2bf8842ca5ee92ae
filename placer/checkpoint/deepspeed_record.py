"""``placer.json`` of a DeepSpeed-MoE checkpoint: what was done to it, and its hashes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from placer.errors import PlacerError
from placer.run.documents import (
    SCHEMA_VERSION,
    Document,
    ExpertId,
    Sha256,
    of_this_version,
    read_json,
    validated,
)
from placer.run.files import canonical_json
from placer.run.seals import require_seal, sealed
from placer.version import __version__

# An older record has neither: nothing is known of the bytes that were written.
_NOT_RECORDED: dict[str, Any] = {"file_sha256": {}, "sha256": None}


class DeepspeedRecord(Document, frozen=True, kw_only=True):
    """The JSON object of its ``placer.json``; see ``docs/formats.md``."""

    schema_version: Literal[2]
    kind: Literal["deepspeed"]
    placer: str
    plan_sha256: Sha256
    permutation: list[list[ExpertId]]
    file_sha256: dict[str, Sha256]
    sha256: Sha256 | None

    @classmethod
    def of(
        cls,
        plan_sha256: str,
        permutation: list[list[int]],
        file_sha256: Mapping[str, str],
    ) -> Self:
        """Return the record of an export.

        Parameters
        ----------
        plan_sha256
            SHA-256 of the plan file.
        permutation
            L rows: the original expert that each new expert is.
        file_sha256
            SHA-256 of each file that was written, by its name in the directory.
        """
        value = {
            "schema_version": SCHEMA_VERSION,
            "kind": "deepspeed",
            "placer": __version__,
            "plan_sha256": plan_sha256,
            "permutation": permutation,
            "file_sha256": dict(file_sha256),
        }
        return cls(**sealed(value))

    def write(self, path: Path) -> None:
        """Write it: the same export gives the same bytes."""
        path.write_text(canonical_json(self.to_json()) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path, num_experts: tuple[int, ...]) -> Self:
        """Read the record of an export with so many experts in each MoE layer.

        Raises
        ------
        PlacerError
            If it cannot be read, its permutation does not fit, or it was changed.
        """
        where, again = f"export record {path}", "take it from an unchanged copy"
        value = _NOT_RECORDED | read_json(path, "export record")
        value = of_this_version(value, where, again)
        read = validated(value, cls, where, again)
        sizes = [list(range(n)) for n in num_experts]
        if [sorted(row) for row in read.permutation] != sizes:
            raise PlacerError(
                f"{where}: permutation does not fit a DeepSpeed checkpoint of "
                f"{list(num_experts)} experts",
                again,
            )
        require_seal(value, where, again)
        return read

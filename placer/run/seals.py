"""Hashes of a file's own content: they show changes that no other check would notice."""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from placer.errors import PlacerError
from placer.run.files import canonical_json, sha256_json

if TYPE_CHECKING:
    from placer.arrays import AnyArray


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """Return a document with ``sha256``: the SHA-256 of its canonical JSON without it."""
    return value | {"sha256": sha256_json(value)}


def unsealed(value: dict[str, Any]) -> dict[str, Any]:
    """Return a document of schema version 1, which has no hash of itself."""
    return value | {"sha256": None}


def require_seal(value: Mapping[str, Any], where: str, again: str) -> None:
    """Refuse a document whose ``sha256`` is not its content's hash; null is not checked.

    Raises
    ------
    PlacerError
        With both hashes.
    """
    content = {name: one for name, one in value.items() if name != "sha256"}
    found, stated = sha256_json(content), value["sha256"]
    if stated not in (None, found):
        raise PlacerError(
            f"{where} was changed after it was written: its content has SHA-256 "
            f"{found[:12]}, its field sha256 says {stated[:12]}",
            f"{again}; if you changed it on purpose, set sha256 to null in it",
        )


def sealed_with(value: dict[str, Any], tensors: Mapping[str, "AnyArray"]) -> dict[str, Any]:
    """Return the header of a safetensors file with ``sha256``, of it and the tensors."""
    return value | {"sha256": _sha256(value, tensors)}


def require_seal_with(
    value: Mapping[str, Any], tensors: Mapping[str, "AnyArray"], where: str, again: str
) -> None:
    """Refuse a header or tensors whose hash is not ``sha256``; null says nothing.

    Raises
    ------
    PlacerError
        With both hashes.
    """
    content = {name: one for name, one in value.items() if name != "sha256"}
    stated = value["sha256"]
    if stated is not None and stated != (found := _sha256(content, tensors)):
        raise PlacerError(
            f"{where} was changed after it was written: its content has SHA-256 "
            f"{found[:12]}, its header says {stated[:12]}",
            again,
        )


def _sha256(value: Mapping[str, Any], tensors: Mapping[str, "AnyArray"]) -> str:
    """Hash canonical JSON, then name, dtype, shape and bytes of each tensor, by name."""
    digest = hashlib.sha256(canonical_json(value).encode())
    for name, values in sorted(tensors.items()):
        facts = [name, values.dtype.str, list(values.shape)]
        digest.update(canonical_json(facts).encode())
        digest.update(values.tobytes())
    return digest.hexdigest()

"""The tokenizer that token ids are of: compared wherever two files with such ids meet."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from placer.errors import UsageError
from placer.run.files import sha256_file

# Of transformers, SentencePiece and Mistral; a checkpoint can have several.
_TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model", "tekken.json")
_FIELD = "tokenizer_sha256"


def tokenizer_of(directory: Path) -> str | None:
    """Return the SHA-256 of a checkpoint's ``tokenizer.json``, ``None`` without one.

    Where there is none, of ``tokenizer.model``, or else of ``tekken.json``.
    """
    paths = (directory / name for name in _TOKENIZER_NAMES)
    return next((sha256_file(path) for path in paths if path.is_file()), None)


def recorded_tokenizer(provenance: Mapping[str, Any]) -> str | None:
    """Return the hash that a trace or its counts record, ``None`` where not known."""
    value = provenance.get(_FIELD)
    return value if isinstance(value, str) else None


def require_same_tokenizer(
    one: str | None, one_name: str, other: str | None, other_name: str
) -> str | None:
    """Refuse to combine token ids of two tokenizers.

    Parameters
    ----------
    one, other
        What :func:`tokenizer_of` returned for each, ``None`` where not known.
    one_name, other_name
        The files that hold the ids.

    Returns
    -------
    str or None
        A warning where only one of them is known.

    Raises
    ------
    UsageError
        If both are known and differ.
    """
    if one == other:
        return None
    if one is not None and other is not None:
        raise UsageError(
            f"{one_name} and {other_name} have different tokenizers, so the same token id "
            "may mean another text: SHA-256 of tokenizer.json (or tokenizer.model, "
            f"tekken.json) is {one[:12]} and {other[:12]}",
            "use files of one tokenizer: record with one checkpoint, then write the table "
            "from that trace: placer tables PLAN TRACE --out TABLE",
        )
    unknown, known = (one_name, other_name) if one is None else (other_name, one_name)
    return (
        f"{unknown} does not say which tokenizer made its token ids, but {known} does: "
        "placer assumes that it is the same one"
    )

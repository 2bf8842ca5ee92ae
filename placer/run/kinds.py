"""What kind of result of placer a path is, told by its content."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from placer.errors import PlacerError, UsageError
from placer.run.documents import file_header, parse_json
from placer.run.files import open_regular, read_bytes

#: Each kind, as errors call it.
KINDS: Final = {
    "trace": "a trace",
    "affinity": "an affinity file",
    "plan": "a plan",
    "table": "a table",
    "checkpoint": "a checkpoint",
    "export": "an exported checkpoint",
    "ranks": "an export of ranks",
    "frontier": "a folder of plans",
    "report": "a report",
}
# How a file of each kind ends. Folders may have any name.
_SUFFIXES = {
    "plan": ".json",
    "affinity": ".safetensors",
    "table": ".safetensors",
    "report": ".html",
}
# Names of files that placer or an engine reads as something else.
_KNOWN_SUFFIXES = frozenset(
    [*_SUFFIXES.values(), ".csv", ".jsonl", ".npy", ".npz", ".pt", ".toml", ".txt", ".yaml"]
)
# The file that tells the kind of a folder. An exported checkpoint has a config too.
_FOLDERS = {
    "trace.json": "trace",
    "placer.json": "export",
    "rank-00000": "ranks",
    "frontier.csv": "frontier",
    "config.json": "checkpoint",
}
# Maps of engines have the first of these keys alone.
_PLAN_KEYS = (b'"physical_to_logical_map"', b'"solver"')
_LENGTH_BYTES = 8


def kind_of(path: Path) -> str | None:
    """Return the key of :data:`KINDS` that a path is; ``None`` where nothing tells.

    A damaged file still has its kind as long as the part that names it can be read.
    """
    if path.is_dir():
        return next((kind for n, kind in _FOLDERS.items() if (path / n).exists()), None)
    if not path.is_file():
        return None
    try:
        header = safetensors_header(path)
        if header is not None:
            kind = placer_metadata(header, path).get("kind")
            return kind if kind in ("affinity", "table") else None
        content = read_bytes(path)
    except (OSError, PlacerError):
        return None
    is_plan = content.lstrip().startswith(b"{") and all(k in content for k in _PLAN_KEYS)
    return "plan" if is_plan else None


def is_damaged(path: Path, kind: str) -> bool:
    """Return whether a file that cannot be read may be of this kind, such as one cut short.

    Safetensors begin with the length of their header: eight bytes, of which no real header
    needs the upper four, and a brace. Text and archives have other bytes there.
    """
    if kind_of(path) == kind:
        return True
    with open_regular(path) as stream:
        begin = stream.read(_LENGTH_BYTES + 1)
    is_cut = not any(begin[4:_LENGTH_BYTES]) and begin[_LENGTH_BYTES:] in (b"", b"{")
    return is_cut and safetensors_header(path) is None


def named(kinds: Collection[str]) -> str:
    """Return kinds as errors call them: ``a trace or an affinity file``."""
    return " or ".join(KINDS[one] for one in KINDS if one in kinds)


def require_kind(path: Path, kinds: Collection[str], hint: str) -> None:
    """Refuse a result of another kind. What has no kind passes: its reader says why.

    Raises
    ------
    PlacerError
        With what it is, and with ``hint``.
    """
    found = kind_of(path)
    if found is not None and found not in kinds:
        raise PlacerError(f"{path} is {KINDS[found]}, not {named(kinds)}", hint)


def require_suffix(out: Path, kinds: Collection[str]) -> None:
    """Refuse a name that ends as files of another kind do; other names may be any.

    Parameters
    ----------
    out
        What will be written.
    kinds
        What it will be, where only one kind is written.

    Raises
    ------
    UsageError
        With how the name should end.
    """
    (kind,) = kinds if len(kinds) == 1 else ("",)
    suffix = _SUFFIXES.get(kind)
    if suffix is None or out.suffix == suffix or out.suffix not in _KNOWN_SUFFIXES:
        return
    raise UsageError(
        f"{KINDS[kind]} is a {suffix} file, but {out} ends in {out.suffix}",
        f"name it {out.with_suffix(suffix)}",
    )


def require_replaceable(out: Path, kinds: Collection[str]) -> None:
    """Refuse to replace a result by one of another kind.

    Parameters
    ----------
    out
        What ``--force`` would replace. A link is replaced, not what it leads to.
    kinds
        The kinds that may be replaced. What has no kind may be, such as a damaged file.

    Raises
    ------
    PlacerError
        With what it is.
    """
    found = None if out.is_symlink() else kind_of(out)
    if found is not None and found not in kinds:
        wanted = f", and the command writes {named(kinds)}" if kinds else ""
        raise PlacerError(
            f"{out} is {KINDS[found]}{wanted}: --force replaces only an earlier result of "
            "the same kind",
            "choose another path",
        )


def safetensors_header(path: Path) -> dict[str, Any] | None:
    """Return the header of a safetensors file, or ``None`` if it is none."""
    with open_regular(path) as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if length > path.stat().st_size - _LENGTH_BYTES:
            return None
        try:
            header = parse_json(stream.read(length), f"the header of {path}")
        except PlacerError:
            return None
    return header if isinstance(header, dict) else None


def placer_metadata(header: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return what the one metadata key ``placer`` says, empty if it says nothing.

    Raises
    ------
    PlacerError
        If it is no JSON object.
    """
    metadata = header.get("__metadata__")
    text = metadata.get("placer") if isinstance(metadata, dict) else None
    return file_header({"placer": text}, path.name) if isinstance(text, str) else {}

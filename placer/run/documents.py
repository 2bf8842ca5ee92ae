"""JSON, TOML and YAML: decoded within bounds, validated by type, refused in one sentence.

Every document that placer reads passes here. Placer's own are validated strictly against a
``msgspec.Struct`` of the room that owns the file: no unknown field, no other type, no value
out of range. Documents of others keep what placer does not know.
"""

import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import resources
from inspect import isclass
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import msgspec

from placer.errors import PlacerError
from placer.run.files import MAX_DOCUMENT_BYTES, read_bytes

#: The version of every kind of file that placer writes; version 1 is still read.
SCHEMA_VERSION: Final = 2

Size = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
NumRanks = Annotated[int, msgspec.Meta(ge=1, le=2**16)]
#: Logical experts are named by at most 15 bits in a trace.
NumExperts = Annotated[int, msgspec.Meta(ge=1, le=2**15)]
#: 0 where a map does not say.
TopK = Annotated[int, msgspec.Meta(ge=0, le=2**15)]
ExpertId = Annotated[int, msgspec.Meta(ge=0, lt=2**15)]
#: Names of MoE layers as JSON keys: ordinals from 0.
LayerKey = Annotated[str, msgspec.Meta(pattern="^(0|[1-9][0-9]*)$")]

# Real documents nest less than ten levels, and hold no number of 128 bits.
_MOST_LEVELS = 64
_MOST_BITS = 128
# What takes seconds to decode: a map for 94 layers of 1,024 slots has half of it.
_MOST_YAML = 1 << 20
_MOST_TOML = 1 << 20
# Values beyond one per character that a document may have through aliases.
_FEW_VALUES = 1 << 20
_SHOWN = 60
_UNREADABLE_YAML = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_T = TypeVar("_T")
_Upgrade = Callable[[dict[str, Any]], dict[str, Any]]


class Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of placer, or an object in one: these fields and no others.

    A default is only for code: in a file every field is written.
    """

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        return {n: _plain(v) for n, v in values.items() if v is not msgspec.UNSET}


def parse_json(text: str | bytes, where: str) -> Any:
    """Decode JSON; ``where`` names it in the error.

    Numbers that are not finite are left to :func:`validated`: real configs of others hold
    them where placer does not look, such as ``time_step_limit`` of Mamba layers.

    Raises
    ------
    PlacerError
        If it is not UTF-8 or no JSON, has a key twice in one object, nests too deep, or
        holds a whole number of more than 128 bits.
    """
    return _parsed(
        lambda decoded: json.loads(decoded, object_pairs_hook=_no_duplicates),
        text,
        where,
        "JSON",
    )


def parse_toml(text: str | bytes, where: str) -> dict[str, Any]:
    """Decode TOML, as :func:`parse_json` decodes JSON.

    Raises
    ------
    PlacerError
        As that function does.
    """
    value: dict[str, Any] = _parsed(_load_toml, text, where, "TOML", _MOST_TOML)
    return value


def parse_yaml(text: str | bytes, where: str) -> Any:
    """Decode YAML 1.1 without running code of it, as :func:`parse_json` decodes JSON.

    Raises
    ------
    PlacerError
        As that function does.
    """
    return _parsed(_load_yaml, text, where, "YAML", _MOST_YAML)


def read_data(package: str, name: str, kind: type[_T]) -> dict[str, _T]:
    """Return the tables of a TOML file that is part of placer, each with its ``name``.

    Raises
    ------
    PlacerError
        If one has a field that is unknown, missing, or not what it must be.
    """
    text = (resources.files(package) / name).read_bytes()
    return {
        key: validated(
            {"name": key} | require_object(value, f"{name}: {key}"),
            kind,
            f"{name}: {key}",
            f"correct {package.replace('.', '/')}/{name}",
            complete=False,
        )
        for key, value in parse_toml(text, name).items()
    }


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises
    ------
    PlacerError
        If there is no such file, it is too long, holds no object, or :func:`parse_json`
        refuses it.
    """
    where = f"{what} {path}"
    return require_object(parse_json(read_bytes(path, what=what), where), where)


def file_header(metadata: Mapping[str, str] | None, where: str) -> dict[str, Any]:
    """Return placer's metadata of a safetensors file, empty if it has none.

    Raises
    ------
    PlacerError
        If :func:`parse_json` refuses it, or it is not an object.
    """
    header = f"the header of {where}"
    return require_object(parse_json((metadata or {}).get("placer", "{}"), header), header)


def require_object(value: Any, where: str) -> dict[str, Any]:
    """Refuse decoded JSON that is not an object.

    Raises
    ------
    PlacerError
        With what it is.
    """
    if not isinstance(value, dict):
        raise PlacerError(
            f"{where} is {shown(value)}, not a JSON object",
            "check that the path names the right file",
        )
    return value


def require_bounds(value: Any, where: str) -> None:
    """Refuse decoded JSON that nests too deep, as :func:`parse_json` does.

    Raises
    ------
    PlacerError
        If it does.
    """
    _parsed(lambda _: value, "", where, "JSON")


def validated(
    value: Any, kind: type[_T], where: str, again: str, *, complete: bool = True
) -> _T:
    """Return the content of a document of placer, as its type.

    Parameters
    ----------
    value
        The decoded document.
    kind
        Its type.
    where, again
        What names it in the error, and the remedy.
    complete
        Whether fields that have a default must be written too.

    Raises
    ------
    PlacerError
        With the first field that is unknown, missing, or not what it must be.
    """
    _require_finite(value, where, again)
    try:
        found = msgspec.convert(value, kind)
    except msgspec.ValidationError:
        raise PlacerError(f"{where}: {_fault(value, kind)}", again) from None
    except PlacerError as error:
        raise PlacerError(f"{where}: {error}", error.hint or again) from error
    if complete and (absent := _absent(value, _plain(found))) is not None:
        raise PlacerError(f"{where}: {absent}", again)
    return found


def of_this_version(
    value: dict[str, Any], where: str, again: str, upgrade: _Upgrade = dict
) -> dict[str, Any]:
    """Return a document of the current schema version, upgraded from version 1.

    Parameters
    ----------
    value, where, again
        As :func:`validated` takes them.
    upgrade
        Makes fields of version 2 from the fields of version 1; by default they are the
        same.

    Raises
    ------
    PlacerError
        If a newer placer wrote it, or the version is none.
    """
    version = value.get("schema_version")
    if version == SCHEMA_VERSION and type(version) is int:
        return value
    if version == 1 and type(version) is int:
        try:
            return upgrade(value) | {"schema_version": SCHEMA_VERSION}
        except (KeyError, TypeError, AttributeError):
            # A field that the upgrade needs is missing or of another type.
            return value | {"schema_version": SCHEMA_VERSION}
    if type(version) is int and version > SCHEMA_VERSION:
        raise PlacerError(
            f"{where} was written by a newer placer: it has schema_version {version}, "
            f"this one reads 1 and {SCHEMA_VERSION}",
            "install the newer placer: pip install --upgrade placer",
        )
    raise PlacerError(
        f"{where}: schema_version is {shown(version)}, allowed are 1 and {SCHEMA_VERSION}",
        again,
    )


def _parsed(
    decode: Callable[[str], Any],
    text: str | bytes,
    where: str,
    language: str,
    most: int = MAX_DOCUMENT_BYTES,
) -> Any:
    try:
        if len(text) > most:
            raise ValueError(f"it has {len(text):,} bytes, placer reads at most {most:,}")
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        value = decode(decoded.removeprefix("\ufeff"))  # a byte order mark
        _require_bounds(value, len(text) + _FEW_VALUES)
    except RecursionError:
        reason = f"it nests deeper than {_MOST_LEVELS} levels"
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        reason = f"byte {error.start} is {byte:#04x}, which is not UTF-8"
    except ValueError as error:
        reason = str(error)
    else:
        return value
    raise PlacerError(
        f"{where} is not valid {language}: {reason}",
        "check that the path names the right file, or write it again",
    )


def _no_duplicates(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {shown(name)} appears twice in one object")
        found[name] = value
    return found


def _load_toml(text: str) -> dict[str, Any]:
    # The time that a dotted key takes grows with the square of its length.
    parts = 0
    for part in text.split("."):
        parts = 0 if re.search(r"[\s,=]", part.strip()) else parts + 1
        if parts > _MOST_LEVELS:
            raise RecursionError
    return tomllib.loads(text)


def _load_yaml(text: str) -> Any:
    import yaml

    # PyYAML has no types, and its C loader is not built everywhere.
    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """PyYAML's safe loader, which would keep the last of two equal keys."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            _no_duplicates([(key, None) for key in keys])
            found: dict[Any, Any] = super().construct_mapping(node, deep)
            return found

    try:
        return yaml.load(text, Loader)
    # A key that is a list, and tags on what is no such value: !!int "" and so on.
    except (yaml.YAMLError, *_UNREADABLE_YAML) as error:
        raise ValueError(" ".join((str(error) or repr(error)).split())) from error


def _require_bounds(value: Any, most: int) -> None:
    """Refuse what nests too deep, and numbers and texts that later code cannot take.

    ``most`` bounds the values: by aliases of YAML one object stands in many places, and a
    short text can mean more values than memory holds.
    """
    level = [value]
    for _ in range(_MOST_LEVELS):
        inner: list[Any] = []
        for one in level:
            kind = type(one)
            if kind is int:
                if one.bit_length() > _MOST_BITS:
                    raise ValueError(f"it holds a number of more than {_MOST_BITS} bits")
            elif kind is list:
                most -= len(one)
                inner += one if most >= 0 else ()
            elif kind is dict:
                most -= 2 * len(one)
                inner += one if most >= 0 else ()
                inner += one.values() if most >= 0 else ()
            # Half of a surrogate pair, which JSON can spell, is no character.
            elif kind is str and not one.isascii() and re.search("[\ud800-\udfff]", one):
                raise ValueError(f"{ascii(one)[:_SHOWN]} is not a text")
        if most < 0:
            raise ValueError("its aliases make far more values than it has")
        level = inner
        if not level:
            return
    raise RecursionError


def _require_finite(value: Any, where: str, again: str) -> None:
    """Refuse numbers that are not finite, which configs of others may hold."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict | list):
            left += one.values() if isinstance(one, dict) else one
        elif isinstance(one, float) and not math.isfinite(one):
            raise PlacerError(f"{where} holds {one}, which is not a finite number", again)


def _fault(value: Any, kind: Any, name: str = "") -> str:
    """Say what is wrong with a value, or with the innermost value in it that is."""
    for step, child, child_kind in _children(value, kind):
        if _refusal(child, child_kind) is not None:
            return _fault(child, child_kind, f"{name}{step}")
    message = (_refusal(value, kind) or "").partition(" - at ")[0]
    place = f"{name.removeprefix('.')} " if name else ""
    if (found := re.fullmatch(r"Object (.*) field `(.*)`", message)) is not None:
        how = "lacks" if "missing" in found[1] else "has the unknown field"
        return f"{place or 'it '}{how} {found[2]}"
    allowed = _literals(kind)
    if allowed and not (None in allowed and isinstance(value, dict | list)):
        names = ", ".join("null" if one is None else str(one) for one in allowed)
        return f"{place}is {shown(value)}, allowed are {names}"
    expected = re.sub(
        "`(.*?)`",
        lambda names: " or ".join(_WORDS.get(n, n) for n in names[1].split(" | ")),
        message.removeprefix("Expected ").partition(", got ")[0],
    )
    return f"{place}is {shown(value)}, expected {expected}"


def _plain(value: Any) -> Any:
    """Return what JSON can hold."""
    if isinstance(value, Document):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def _absent(value: Any, written: Any, name: str = "") -> str | None:
    """Say which field a document lacks, of those that would be written again."""
    if isinstance(value, dict) and isinstance(written, dict):
        steps = [(f".{key}", value.get(key), one) for key, one in written.items()]
        if missing := [key for key in written if key not in value]:
            return f"{name.removeprefix('.') or 'it'} lacks {missing[0]}"
    elif isinstance(value, list) and isinstance(written, list):
        pairs = enumerate(zip(value, written, strict=True))
        steps = [(f"[{place}]", one, other) for place, (one, other) in pairs]
    else:
        return None
    found = (_absent(one, other, name + step) for step, one, other in steps)
    return next((one for one in found if one is not None), None)


def _refusal(value: Any, kind: Any) -> str | None:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        return str(error)
    except PlacerError:  # of several fields together, which are reported as such
        return None
    return None


def _children(value: Any, kind: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield where the values in an object or list are, they, and their types."""
    for one in _options(kind):
        origin, items = get_origin(one), get_args(one)
        if isinstance(value, list) and origin in (list, tuple):
            for place, child in enumerate(value):
                yield f"[{place}]", child, items[0]
        elif isinstance(value, dict) and isclass(origin) and issubclass(origin, Mapping):
            for key, child in value.items():
                yield f".{key}", child, items[1]
        elif isinstance(value, dict) and isclass(one) and issubclass(one, msgspec.Struct):
            for key, child_kind in get_type_hints(one, include_extras=True).items():
                if key in value:
                    yield f".{key}", value[key], child_kind


def _options(kind: Any) -> Iterator[Any]:
    """Yield the types of a union, or the one type, bare of its limits."""
    if get_origin(kind) in (Union, UnionType):
        for one in get_args(kind):
            yield from _options(one)
    else:
        yield get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _literals(kind: Any) -> tuple[Any, ...]:
    """Return the values that a type lists, empty where it lists none."""
    found = [v for o in _options(kind) if get_origin(o) is Literal for v in get_args(o)]
    if found and type(None) in _options(kind):
        found.append(None)
    return tuple(found)


def shown(value: Any) -> str:
    """Return a value as JSON for an error, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."

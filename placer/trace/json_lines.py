"""JSON values of a file: one to a line, or one in all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from placer.errors import PlacerError
from placer.run.archives import UNREADABLE, unreadable_reason
from placer.run.documents import parse_json
from placer.run.files import open_regular

# Of one line: routed experts of 100,000 tokens and 60 layers, in base64, take a third.
_MOST_BYTES = 1 << 30
_LOOKED_AT = 1 << 16


def json_values(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield each value, or each item of a list, and its line.

    Raises
    ------
    PlacerError
        If a line is not valid JSON, and the file as a whole is none.
    """
    try:
        with open_regular(file) as stream:
            if b"\0" in stream.read(_LOOKED_AT):
                raise ValueError("it is not text: it holds a zero byte")
            stream.seek(0)
            lines = iter(lambda: stream.readline(_MOST_BYTES), b"")
            for number, line in enumerate(lines, start=1):
                if len(line) == _MOST_BYTES:
                    raise ValueError(f"line {number} has {_MOST_BYTES:,} bytes or more")
                if not line.strip():
                    continue
                where = f"line {number}"
                try:
                    value = parse_json(line, where)
                except PlacerError:
                    if number > 1:
                        raise
                    where, value = "the file", _whole(line, _rest(stream))
                yield from ((where, one) for one in _items(value))
    except UNREADABLE as error:
        raise PlacerError(f"it cannot be read: {unreadable_reason(error)}") from error


def _rest(stream: BinaryIO) -> bytes:
    rest = stream.read(_MOST_BYTES)
    if len(rest) == _MOST_BYTES:
        raise ValueError(f"one document has {_MOST_BYTES:,} bytes or more")
    return rest


def _whole(first: bytes, rest: bytes) -> Any:
    """Return one value over several lines; only the first line says what is wrong."""
    try:
        return parse_json(first + rest, "the file")
    except PlacerError:
        return parse_json(first, "line 1")


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]

"""JSON values of a file: one to a line, or one in all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from placer.errors import PlacerError
from placer.run.archives import UNREADABLE, unreadable_reason
from placer.run.documents import parse_json
from placer.run.files import memory_bytes, open_regular


def json_values(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield each value, or each item of a list, and its line.

    Raises
    ------
    PlacerError
        If a line is not valid JSON, and the file as a whole is none.
    """
    try:
        with open_regular(file) as stream:
            most = memory_bytes() // 8
            lines = iter(lambda: stream.readline(most), b"")
            for number, line in enumerate(lines, start=1):
                if len(line) == most:
                    raise ValueError(f"line {number} has more than {most:,} bytes")
                if not line.strip():
                    continue
                where = f"line {number}"
                try:
                    value = parse_json(line, where)
                except PlacerError:
                    if number > 1:
                        raise
                    where, value = "the file", _whole(line, _rest(stream, most))
                yield from ((where, one) for one in _items(value))
    except UNREADABLE as error:
        raise PlacerError(f"it cannot be read: {unreadable_reason(error)}") from error


def _rest(stream: BinaryIO, most: int) -> bytes:
    rest = stream.read(most)
    if len(rest) == most:
        raise ValueError(f"one document may have {most:,} bytes at most")
    return rest


def _whole(first: bytes, rest: bytes) -> Any:
    """Return one value over several lines; only the first line says what is wrong."""
    try:
        return parse_json(first + rest, "the file")
    except PlacerError:
        return parse_json(first, "line 1")


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]

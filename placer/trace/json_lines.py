"""JSON values of a file: one to a line, or one in all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from placer.errors import PlacerError
from placer.run.documents import parse_json
from placer.run.files import open_regular, unreadable_reason
from placer.trace.imported import UNREADABLE


def json_values(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield each value, or each item of a list, and its line.

    Raises
    ------
    PlacerError
        If a line is not valid JSON, and the file as a whole is none.
    """
    try:
        with open_regular(file) as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                where = f"line {number}"
                try:
                    value = parse_json(line, where)
                except PlacerError:
                    if number > 1:
                        raise
                    where, value = "the file", _whole(line, stream.read())
                yield from ((where, one) for one in _items(value))
    except UNREADABLE as error:
        raise PlacerError(f"it cannot be read: {unreadable_reason(error)}") from error


def _whole(first: bytes, rest: bytes) -> Any:
    """Return one value over several lines; only the first line says what is wrong."""
    try:
        return parse_json(first + rest, "the file")
    except PlacerError:
        return parse_json(first, "line 1")


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]

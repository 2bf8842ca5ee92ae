"""JSON values of a file: one to a line, or one in all; lines of streams too."""

from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from placer.errors import PlacerError
from placer.run.archives import UNREADABLE, unreadable_reason, unzipped
from placer.run.documents import parse_json, require_object
from placer.run.files import open_regular

# Of one line: routed experts of 100,000 tokens and 60 layers, in base64, take a third.
_MOST_BYTES = 1 << 30
_LOOKED_AT = 1 << 16
# Lines of server-sent events that hold no data.
_NO_DATA = (b":", b"event:", b"id:", b"retry:")


class Streamed(dict[str, Any]):
    """A part of a response, from a line ``data: {...}``; empty where the stream ended."""


def json_values(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield each value, or each item of a list, and its line; the file may be gzipped.

    Objects of a stream's lines, ``data: {...}``, are :class:`Streamed`.

    Raises
    ------
    PlacerError
        If a line is not valid JSON, and the file as a whole is none.
    """
    try:
        with open_regular(file) as opened:
            stream = unzipped(opened)
            if b"\0" in stream.read(_LOOKED_AT):
                raise ValueError("it is not text: it holds a zero byte")
            stream.seek(0)
            lines = iter(lambda: stream.readline(_MOST_BYTES), b"")
            first = 0
            for number, line in enumerate(lines, start=1):
                if len(line) == _MOST_BYTES:
                    raise ValueError(f"line {number} has {_MOST_BYTES:,} bytes or more")
                if number == 1:
                    line = line.removeprefix(BOM_UTF8)
                if not line.strip() or line.startswith(_NO_DATA):
                    continue
                first = first or number
                where = f"line {number}"
                if line.startswith(b"data:"):
                    yield where, _streamed(line.removeprefix(b"data:").strip(), where)
                    continue
                try:
                    value = parse_json(line, where)
                except PlacerError:
                    if number > first:
                        raise
                    where, value = "the file", _whole(line, _rest(stream), where)
                yield from ((where, one) for one in _items(value))
    except UNREADABLE as error:
        raise PlacerError(f"it cannot be read: {unreadable_reason(error)}") from error


def _streamed(line: bytes, where: str) -> Streamed:
    return (
        Streamed()
        if line == b"[DONE]"
        else Streamed(require_object(parse_json(line, where), where))
    )


def _rest(stream: IO[bytes]) -> bytes:
    rest = stream.read(_MOST_BYTES)
    if len(rest) == _MOST_BYTES:
        raise ValueError(f"one document has {_MOST_BYTES:,} bytes or more")
    return rest


def _whole(first: bytes, rest: bytes, where: str) -> Any:
    """Return one value over several lines; only the first line says what is wrong."""
    try:
        return parse_json(first + rest, "the file")
    except PlacerError:
        pass
    try:
        return parse_json(first, where)
    except PlacerError as error:
        raise PlacerError(
            error.message,
            "check that the path names the right file. If it holds several JSON documents "
            "over many lines, put each on a line: jq -c . FILE > LINES",
        ) from error


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]

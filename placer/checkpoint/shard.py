"""The bytes of one safetensors file: the header, and the places of tensors.

Format: eight bytes of header length N (little-endian), N bytes of JSON padded with spaces,
then the tensors' bytes (https://github.com/huggingface/safetensors#format).
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from placer.checkpoint.copying import PAGE_BYTES
from placer.errors import PlacerError
from placer.run.documents import parse_json
from placer.run.files import open_regular

_LENGTH_BYTES = 8
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_MAX_HEADER_BYTES = 100_000_000
_DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """The place of a tensor in a file.

    Attributes
    ----------
    dtype
        Its type, as safetensors calls it.
    shape
        Its shape.
    start, stop
        First byte, and the byte after the last, counted from the start of the data.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A safetensors file whose header was checked, or one to be written.

    Attributes
    ----------
    path
        The file.
    name
        Name of the safetensors file, which an export keeps.
    header_text
        The JSON of the header as it is in the file, without padding.
    header_bytes
        Length of the header with its padding.
    tensors
        Every tensor by name.
    metadata
        ``__metadata__`` of the header.
    positions
        Where each tensor is in a file that is not itself a safetensors file, in bytes;
        ``None`` where tensors are where the header says.
    """

    path: Path
    name: str
    header_text: str
    header_bytes: int
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    positions: Mapping[str, int] | None = None

    @property
    def data_start(self) -> int:
        """Offset of the tensors' bytes in a safetensors file."""
        return _LENGTH_BYTES + self.header_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of the safetensors file."""
        return self.data_start + self.data_bytes

    def place(self, name: str) -> tuple[int, int]:
        """Return the bytes of a tensor in the file: first, and the one after the last."""
        info = self.tensors[name]
        if self.positions is None:
            start = self.data_start + info.start
        else:
            start = self.positions[name]
        return start, start + info.stop - info.start

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return max((info.stop for info in self.tensors.values()), default=0)

    @property
    def header(self) -> bytes:
        """Length and header as they are in the file."""
        length = self.header_bytes.to_bytes(_LENGTH_BYTES, "little")
        return length + self.header_text.encode().ljust(self.header_bytes, b" ")

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read and check the header.

        Raises
        ------
        PlacerError
            If the file is truncated, or its header contradicts itself or the file.
        """
        with open_regular(path, "shard") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(
                size - _LENGTH_BYTES, _MAX_HEADER_BYTES
            ):
                raise _damaged(
                    path, f"a header of {length} bytes does not fit its {size} bytes"
                )
            raw = stream.read(length)
        try:
            header = parse_json(raw, "its header")
        except PlacerError as error:
            raise _damaged(path, error.message) from error
        if not isinstance(header, dict):
            raise _damaged(path, "its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        _require_texts(path, metadata)
        tensors = {name: _tensor_info(path, name, entry) for name, entry in header.items()}
        _require_contiguous(path, tensors, size - _LENGTH_BYTES - length)
        return cls(
            path=path,
            name=path.name,
            header_text=raw.decode().rstrip(" "),
            header_bytes=length,
            tensors=tensors,
            metadata=metadata,
        )

    def renamed_header(
        self,
        names: Mapping[str, str],
        header_bytes: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> bytes:
        """Return length and header with tensors renamed and the rest unchanged.

        Parameters
        ----------
        names
            New name by old name; others stay.
        header_bytes
            Length to pad to; by default the length in the file, so that data stays where it
            is. Where that is too short, whole pages are added: the kernel then copies pages
            of data whole, and file systems that share blocks can share them.
        metadata
            New text by old text of the metadata, keys included.
        """
        renamed = rename_keys(self.header_text, names, self.path)
        if metadata:
            start, end = _member(renamed, "__metadata__")
            texts = replace_texts(renamed[start:end], metadata, self.path)
            renamed = renamed[:start] + texts + renamed[end:]
        text = renamed.encode()
        more = max(len(text) - self.header_bytes, 0)
        length = header_bytes or self.header_bytes + -(-more // PAGE_BYTES) * PAGE_BYTES
        if len(text) > length:
            raise _damaged(
                self.path, f"its header of {len(text)} bytes is longer than {length}"
            )
        return length.to_bytes(_LENGTH_BYTES, "little") + text.ljust(length, b" ")


def compose_header(
    tensors: Sequence[tuple[str, TensorInfo]], metadata: Mapping[str, str]
) -> bytes:
    """Return length and header of a file that holds tensors one after the other.

    Parameters
    ----------
    tensors
        Names, and what the tensors are; where they lay before does not matter.
    metadata
        The file's ``__metadata__``.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, info in tensors:
        start, end = end, end + info.stop - info.start
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-len(text) // 8) * 8
    return length.to_bytes(_LENGTH_BYTES, "little") + text.ljust(length, b" ")


def rename_keys(
    text: str, names: Mapping[str, str], path: Path, member: str | None = None
) -> str:
    """Rename keys of a JSON object, byte for byte the same elsewhere.

    Parameters
    ----------
    text
        The JSON text of an object.
    names
        New key by old key, no two of them to the same.
    path
        The file that it is in, for the error.
    member
        Rename the keys of this member, itself an object, instead of those of the whole.

    Raises
    ------
    PlacerError
        If a key to be renamed is spelled with escapes: renaming it back would not give
        the same bytes.
    """
    start = text.index("{")
    if member is not None:
        start = next(value for _, _, key, value in _keys(text, start) if key == member)
    pieces, done = [], 0
    for begin, end, key, _ in _keys(text, start):
        if key not in names:
            continue
        if json.dumps(key) != text[begin:end]:
            raise _damaged(path, f"it spells the name {key} as {text[begin:end]}")
        pieces += [text[done:begin], json.dumps(names[key])]
        done = end
    return "".join((*pieces, text[done:]))


def replace_texts(text: str, replaced: Mapping[str, str], path: Path) -> str:
    """Replace strings of a JSON text all at once: 3 becomes 5 where 5 becomes 3.

    Parameters
    ----------
    text
        The JSON text; the rest of it is kept.
    replaced
        New string by old string.
    path
        The file that it is in, for the error.

    Raises
    ------
    PlacerError
        If a string to be replaced is spelled with escapes that would be lost.
    """

    def replacement(match: re.Match[str]) -> str:
        value = json.loads(match[0], strict=False)
        if replaced.get(value, value) == value:
            return match[0]
        if json.dumps(value) != match[0]:
            raise _damaged(path, f"it spells the name {value} as {match[0]}")
        return json.dumps(replaced[value])

    return _JSON_STRING.sub(replacement, text)


def _member(text: str, member: str) -> tuple[int, int]:
    """Return where the value of a key of a JSON object begins and ends."""
    start = next(v for _, _, key, v in _keys(text, text.index("{")) if key == member)
    return start, json.JSONDecoder().raw_decode(text, start)[1]


def _keys(text: str, start: int) -> Iterator[tuple[int, int, str, int]]:
    """Yield begin, end and value of every key, and where what it names begins.

    ``text`` is known to be JSON, with an object at ``start``.
    """
    decoder = json.JSONDecoder()
    position = _after_space(text, start + 1)
    while text[position] != "}":
        key, end = decoder.raw_decode(text, position)
        value = _after_space(text, _after_space(text, end) + len(":"))
        yield position, end, key, value
        _, position = decoder.raw_decode(text, value)
        position = _after_space(text, position)
        if text[position] == ",":
            position = _after_space(text, position + 1)


def _after_space(text: str, position: int) -> int:
    while text[position] in " \t\r\n":
        position += 1
    return position


def _require_texts(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise _damaged(path, "its __metadata__ holds values that are not texts")


def _tensor_info(path: Path, name: str, entry: Any) -> TensorInfo:
    try:
        shape = tuple(_integer(n) for n in entry["shape"])
        start, stop = (_integer(n) for n in entry["data_offsets"])
        bits = _DTYPE_BITS[entry["dtype"]] * math.prod(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"tensor {name} has no valid dtype, shape, offsets") from error
    if min((*shape, start, 0)) < 0 or stop - start != -(-bits // 8):
        raise _damaged(
            path,
            f"tensor {name} of shape {list(shape)}, {entry['dtype']}, has bytes {start} "
            f"to {stop}",
        )
    return TensorInfo(dtype=entry["dtype"], shape=shape, start=start, stop=stop)


def _integer(value: Any) -> int:
    # A bool is an int to Python, and int() would take 2.5 or "2" for one.
    if type(value) is not int:
        raise TypeError(f"{value!r} is not an integer")
    return value


def _require_contiguous(
    path: Path, tensors: Mapping[str, TensorInfo], data_bytes: int
) -> None:
    end = 0
    for name, info in sorted(
        tensors.items(), key=lambda item: (item[1].start, item[1].stop)
    ):
        if info.start != end:
            raise _damaged(path, f"tensor {name} starts at byte {info.start}, not at {end}")
        end = info.stop
    if end != data_bytes:
        raise _damaged(path, f"its tensors end at byte {end}, its data at {data_bytes}")


def _damaged(path: Path, reason: str) -> PlacerError:
    return PlacerError(
        f"shard {path} is damaged: {reason}",
        "fetch the checkpoint again, or compare hashes",
    )

"""Mutations that know what they change: values of JSON, headers, arrays, and bytes."""

import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_mutated_documents import HOSTILE, mutated, mutated_text

_SHAPES = [(0,), (1,), (10**9, 0), (2, 2, 2, 2), (), (-1,), (3, 1)]
_DTYPES = ["<i8", "<i2", "|u1", "<f8", "<f2", "|b1", "<c16", "<U3", "<M8[s]"]


def of_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat, swap or insert bytes."""
    raw = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(raw) + 1)
        kind = rng.randrange(6)
        if kind == 0 and raw:
            raw[min(place, len(raw) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del raw[place:]
        elif kind == 2:
            raw[place:place] = raw[max(0, place - rng.choice((4, 40))) : place]
        elif kind == 3:
            del raw[place : place + rng.choice((1, 4, 16))]
        elif kind == 4:
            raw[place : place + 8] = rng.choice(
                (0, 1, 2**31, 2**63 - 1, 2**64 - 1)
            ).to_bytes(8, "little")
        else:
            raw[place:place] = rng.choice(
                (b"\0", b"\xff", b"[", b"-", b"9" * 40, b"e", b'"')
            )
    return bytes(raw)


def of_json(content: bytes, rng: random.Random) -> bytes:
    """Change the document; ASCII spelling can hold half characters too."""
    if rng.randrange(4) == 0:
        return mutated_text(content.decode(), rng)
    return json.dumps(mutated(json.loads(content), rng)).encode()


def of_lines(content: bytes, rng: random.Random) -> bytes:
    """Change one line, or lose, repeat or move lines."""
    rows = content.splitlines(keepends=True)
    number = rng.randrange(len(rows))
    kind = rng.randrange(6)
    if kind == 0:
        rows.insert(rng.randrange(len(rows) + 1), rows[number])
    elif kind == 1:
        rng.shuffle(rows)
    elif kind == 2:
        rows[number] = mutated_text(rows[number].decode(), rng)
    else:
        rows[number] = json.dumps(mutated(json.loads(rows[number]), rng)).encode() + b"\n"
    return b"".join(rows)


def of_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Change the header, placer's own header inside it, or the bytes behind it."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    kind = rng.randrange(5)
    if kind == 0:
        return of_bytes(content, rng)
    own = header.get("__metadata__", {}).get("placer")
    if kind <= 2 and own is not None:
        inner = json.loads(own)
        if "sha256" in inner or rng.randrange(2):
            inner["sha256"] = None
        text = json.dumps(mutated(inner, rng))
        header["__metadata__"]["placer"] = (
            text if rng.randrange(5) else mutated_text(text, rng).decode(errors="replace")
        )
    elif kind == 3:
        names = [name for name in header if name != "__metadata__"]
        one = header[rng.choice(names)]
        field = rng.choice(("dtype", "shape", "data_offsets"))
        if field == "dtype":
            one[field] = rng.choice(("U8", "I64", "F16", "BF16", "F8_E4M3", "BOOL", "x", 1))
        else:
            one[field] = mutated(one[field], rng)
    else:
        data = of_bytes(data, rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def of_array(value: np.ndarray, rng: random.Random) -> Any:
    """Change dtype, shape or values of an array."""
    kind = rng.randrange(4)
    try:
        if kind == 0:
            return value.astype(rng.choice(_DTYPES))
        if kind == 1:
            return np.zeros(rng.choice(_SHAPES), value.dtype)
        if kind == 2:
            return np.moveaxis(value, 0, -1)[..., None]
        changed = value.copy()
        changed.flat[rng.randrange(max(changed.size, 1))] = rng.choice(
            [0, -1, 1, 127, 2**15, 2**31, 2**62]
        )
        return changed
    except (ValueError, IndexError, OverflowError, TypeError):
        return value


def of_npz(content: bytes, rng: random.Random) -> bytes:
    """Change, lose or rename an array; or bytes of the archive."""
    if rng.randrange(4) == 0:
        return of_bytes(content, rng)
    with np.load(io.BytesIO(content)) as archive:
        arrays = {name: archive[name] for name in archive.files}
    name = rng.choice(sorted(arrays))
    kind = rng.randrange(8)
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[name + "x"] = arrays.pop(name)
    else:
        arrays[name] = of_array(arrays[name], rng)
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def of_npy(content: bytes, rng: random.Random) -> bytes:
    """Change the array, or bytes of the file."""
    if rng.randrange(3) == 0:
        return of_bytes(content, rng)
    stream = io.BytesIO()
    np.save(stream, of_array(np.load(io.BytesIO(content)), rng))
    return stream.getvalue()


def of_torch(content: bytes, rng: random.Random) -> bytes:
    """Change values and tensors of what was saved, or bytes of the archive."""
    if rng.randrange(4) == 0:
        return of_bytes(content, rng)
    value = torch.load(io.BytesIO(content), weights_only=True)
    holders: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict | list):
            keys = list(one) if isinstance(one, dict) else range(len(one))
            holders += [(one, key) for key in keys]
            waiting += one.values() if isinstance(one, dict) else one
    holder, key = rng.choice(holders)
    one = holder[key]
    if isinstance(one, torch.Tensor) and rng.randrange(2):
        holder[key] = rng.choice(
            [
                one.to(torch.float64),
                one.bool(),
                one.bfloat16(),
                one[None],
                one[:0],
                one - 100,
                one.flatten()[:1].expand(10**12),
                one.tolist(),
            ]
        )
    elif rng.randrange(4) == 0:
        del holder[key]
    else:
        holder[key] = rng.choice(HOSTILE)
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def of_text(content: bytes, rng: random.Random) -> bytes:
    """Change bytes, or put a hostile value where a number was."""
    if rng.randrange(2):
        return mutated_text(content.decode(), rng)
    words = content.decode().replace(",", " , ").split(" ")
    words[rng.randrange(len(words))] = str(rng.choice(HOSTILE))
    return " ".join(words).encode(errors="surrogatepass")


MUTATIONS = {
    "json": of_json,
    "jsonl": of_lines,
    "safetensors": of_safetensors,
    "npz": of_npz,
    "npy": of_npy,
    "torch": of_torch,
    "text": of_text,
}

"""Images of matrices hold the colours that they are given."""

import struct
import zlib
from base64 import b64decode

import numpy as np
import pytest

from placer.arrays import IntArray
from placer.report.png import NOTHING, STEPS, image_url


def pixels(url: str) -> tuple[IntArray, list[tuple[int, ...]]]:
    """Return the places in the palette, and the palette with its transparency."""
    begin, _, text = url.partition(",")
    assert begin == "data:image/png;base64"
    content = b64decode(text, validate=True)
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(content):
        (length,) = struct.unpack_from(">I", content, at)
        name, data = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        (checksum,) = struct.unpack_from(">I", content, at + 8 + length)
        assert checksum == zlib.crc32(name + data)
        chunks[name] = data
        at += 12 + length
    assert list(chunks) == [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"]
    width, height, *kind = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert kind == [4, 3, 0, 0, 0], "four bits, a palette, nothing interlaced"
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert (rows[:, 0] == 0).all(), "no filter"
    both = np.stack([rows[:, 1:] >> 4, rows[:, 1:] & 15], axis=2)
    palette = [
        (*colour, alpha)
        for *colour, alpha in zip(
            *(chunks[b"PLTE"][n::3] for n in range(3)), chunks[b"tRNS"], strict=True
        )
    ]
    return both.reshape(height, -1)[:, :width].astype(np.int64), palette


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (5, 7), (94, 513)])
def test_every_cell_is_a_pixel(shape: tuple[int, int]) -> None:
    colours = np.random.default_rng(0).integers(0, NOTHING + 1, shape)
    found, _ = pixels(image_url(colours))
    np.testing.assert_array_equal(found, colours)


def test_colours_grow_stronger_away_from_the_baseline() -> None:
    _, palette = pixels(image_url(np.zeros((1, 1), dtype=np.int64)))
    less, same, more = palette[:STEPS], palette[STEPS], palette[STEPS + 1 : NOTHING]
    assert {colour[:3] for colour in less}.isdisjoint(colour[:3] for colour in more)
    alphas = [colour[3] for colour in less[::-1]]
    assert alphas == sorted(alphas) == [colour[3] for colour in more]
    assert len(set(alphas)) == STEPS and alphas[-1] == 255
    assert 0 < same[3] <= alphas[0]
    assert palette[NOTHING][3] == 0

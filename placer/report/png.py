"""Images of matrices: one pixel for each cell, in the colours of a report.

The colours are half transparent, so one image fits light and dark pages.
"""

import struct
import zlib
from base64 import b64encode

import numpy as np

from placer.arrays import IntArray

#: Colours on each side of the baseline.
STEPS = 5
#: The colour of a cell of which nothing is known: none at all.
NOTHING = 2 * STEPS + 1
# Near to Okabe and Ito's blue and vermilion, which people who see fewer colours can tell
# apart; both differ from a white page and from a dark one.
_LESS, _SAME, _MORE = (30, 136, 204), (128, 136, 144), (222, 108, 16)
_PALETTE = (
    *((*_LESS, 51 * n) for n in range(STEPS, 0, -1)),
    (*_SAME, 51),
    *((*_MORE, 51 * n) for n in range(1, STEPS + 1)),
    (0, 0, 0, 0),
)
_BITS = 4


def image_url(colours: IntArray) -> str:
    """Return a PNG as a ``data:`` address.

    The pixels are stored as places in a palette, four bits each
    (https://www.w3.org/TR/png-3/, colour type 3).

    Parameters
    ----------
    colours
        ``[N, M]``: from 0, far below the baseline, over ``STEPS``, the baseline, to
        ``2 * STEPS``; or ``NOTHING``.
    """
    rows, columns = colours.shape
    padded = np.zeros((rows, columns + columns % 2), dtype=np.uint8)
    padded[:, :columns] = colours
    packed = (padded[:, ::2] << _BITS) | padded[:, 1::2]
    # Each row begins with the number of its filter: 0, none.
    lines = np.pad(packed, ((0, 0), (1, 0))).tobytes()
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        (
            _chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, _BITS, 3, 0, 0, 0)),
            _chunk(b"PLTE", bytes(part for colour in _PALETTE for part in colour[:3])),
            _chunk(b"tRNS", bytes(colour[3] for colour in _PALETTE)),
            _chunk(b"IDAT", zlib.compress(lines, 9)),
            _chunk(b"IEND", b""),
        )
    )
    return f"data:image/png;base64,{b64encode(content).decode('ascii')}"


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

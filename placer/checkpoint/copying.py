"""Bytes from one file to another, where possible by the kernel, without decoding them."""

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator

import numpy as np

from placer.arrays import IntArray
from placer.errors import PlacerError

#: The blocks in which file systems keep files, and the pages of memory that hold them.
PAGE_BYTES = 4096
# Linux copies at most 2 GiB - 4 KiB a call (man 2 copy_file_range).
_MOST_BYTES = 1 << 30
_CHUNK_BYTES = 1 << 20
#: Types of safetensors in which tables hold numbers of experts.
TABLE_DTYPES: dict[str, str] = {
    "U8": "<u1",
    "I8": "<i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
}
# What kernels and file systems answer that cannot copy between two files.
_CANNOT_COPY = frozenset(
    {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF}
)


#: What a file to write holds, in order: bytes, or a range of bytes of its source.
Contents = Iterable[bytes | range]


def write_contents(source: int, target: int, contents: Contents) -> str | None:
    """Write a file, from its beginning.

    The kernel copies ranges. File systems that share blocks (XFS, Btrfs, NFS 4.2) do so
    where the range allows it; where the kernel cannot copy, a range is read and written in
    chunks.

    Parameters
    ----------
    source, target
        File descriptors, for reading and for writing.
    contents
        What to write.

    Returns
    -------
    str or None
        SHA-256 of what was written, ``None`` where the kernel copied some of it.

    Raises
    ------
    PlacerError
        If the source ends before a range does.
    """
    digest, by_kernel, end = hashlib.sha256(), False, 0
    for one in contents:
        left = one
        if isinstance(one, range):
            copied = _copy_by_kernel(source, target, one, end)
            by_kernel, end, left = by_kernel or copied > 0, end + copied, one[copied:]
        for chunk in _chunks(source, left):
            write_all(target, chunk, end)
            end += len(chunk)
            if not by_kernel:
                digest.update(chunk)
    return None if by_kernel else digest.hexdigest()


def sha256_of_contents(source: int, contents: Contents) -> str:
    """Return the SHA-256 of a file that holds ``contents``, in hexadecimal.

    Raises
    ------
    PlacerError
        As :func:`write_contents` does.
    """
    digest = hashlib.sha256()
    for one in contents:
        for chunk in _chunks(source, one):
            digest.update(chunk)
    return digest.hexdigest()


def block_ranges(start: int, block_bytes: int, order: IntArray) -> Iterator[range]:
    """Yield where blocks of one size are, in another order or some of them only.

    Parameters
    ----------
    start
        First byte of the first block.
    block_bytes
        Size of a block.
    order
        The old block that each new block is.
    """
    # Neighbours that stay neighbours are copied in one go.
    breaks = np.flatnonzero(np.diff(order) != 1) + 1
    for run in np.split(order, breaks):
        first = start + int(run[0]) * block_bytes
        yield range(first, first + len(run) * block_bytes)


def permuted_columns(
    source: int, start: int, num_bytes: int, num_rows: int, order: IntArray
) -> bytes:
    """Return a matrix with its columns in another order, also where they end within bytes.

    Parameters
    ----------
    source, start, num_bytes
        File descriptor, first byte and size of the matrix, which is a router's.
    num_rows
        Its rows; each is columns of equal width, the lowest bits of a byte first.
    order
        The old column that each new column is.
    """
    content = b"".join(_chunks(source, range(start, start + num_bytes)))
    rows = np.frombuffer(content, np.uint8).reshape(num_rows, -1)
    bits = np.unpackbits(rows, axis=1, bitorder="little")
    columns = bits.reshape(num_rows, len(order), -1)[:, order].reshape(num_rows, -1)
    return np.packbits(columns, axis=1, bitorder="little").tobytes()


def replaced_values(
    source: int, start: int, num_bytes: int, dtype: str, new_values: IntArray
) -> Iterator[bytes]:
    """Yield whole numbers, each replaced by another.

    Parameters
    ----------
    source, start, num_bytes
        File descriptor, first byte and size of the numbers.
    dtype
        Their type, one of ``TABLE_DTYPES``.
    new_values
        ``[E]``: the new number of each old one.

    Raises
    ------
    PlacerError
        If a number is not in 0..E-1.
    """
    for content in _chunks(source, range(start, start + num_bytes)):
        values = np.frombuffer(content, dtype=TABLE_DTYPES[dtype])
        if len(values) and not 0 <= values.min() <= values.max() < len(new_values):
            raise PlacerError(
                f"a table of experts holds {values.min()} to {values.max()}, "
                f"but there are {len(new_values)} experts",
                "fetch the checkpoint again",
            )
        yield new_values[values].astype(values.dtype).tobytes()


def write_all(target: int, content: bytes, start: int) -> None:
    """Write all of ``content`` at an offset."""
    view = memoryview(content)
    while view:
        written = os.pwrite(target, view, start)
        view, start = view[written:], start + written


def _copy_by_kernel(source: int, target: int, places: range, target_start: int) -> int:
    """Return the bytes copied; fewer where the kernel cannot or the source has ended."""
    if not hasattr(os, "copy_file_range"):
        return 0
    done = 0
    # Whole blocks can be shared, where both files have them at block boundaries.
    most = -places.start % PAGE_BYTES or _MOST_BYTES
    try:
        while done < len(places):
            copied = os.copy_file_range(
                source,
                target,
                min(len(places) - done, most),
                places.start + done,
                target_start + done,
            )
            if not copied:
                break
            done += copied
            most = -(places.start + done) % PAGE_BYTES or _MOST_BYTES
    except OSError as error:
        if error.errno not in _CANNOT_COPY:
            raise
    return done


def _chunks(source: int, content: bytes | range) -> Iterator[bytes]:
    """Yield bytes as they are, and those in a range of the source in chunks."""
    if isinstance(content, bytes):
        yield content
        return
    for start in range(content.start, content.stop, _CHUNK_BYTES):
        wanted = min(_CHUNK_BYTES, content.stop - start)
        chunk = os.pread(source, wanted, start)
        if len(chunk) < wanted:
            raise _ended(start + len(chunk), content.stop - start - len(chunk))
        yield chunk


def _ended(place: int, num_bytes: int) -> PlacerError:
    return PlacerError(
        f"a file ended at byte {place} but {num_bytes} more bytes were still to be read",
        "the source changed while it was read: export again",
    )

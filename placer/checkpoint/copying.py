"""Bytes from one file to another, by the kernel: nothing is decoded or held in memory."""

import errno
import os

import numpy as np

from placer.arrays import IntArray
from placer.errors import PlacerError

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


def copy_range(
    source: int, target: int, source_start: int, target_start: int, num_bytes: int
) -> None:
    """Copy a range of bytes between two open files.

    File systems that share blocks (XFS, Btrfs, NFS 4.2) do so where the range allows it;
    where the kernel cannot copy at all, it is read and written in chunks.

    Parameters
    ----------
    source, target
        File descriptors, for reading and for writing.
    source_start, target_start
        Offsets in bytes.
    num_bytes
        How many bytes.

    Raises
    ------
    PlacerError
        If the source ends before the range does.
    """
    done, by_kernel = 0, hasattr(os, "copy_file_range")
    while done < num_bytes:
        places = (source_start + done, target_start + done)
        copied = 0
        if by_kernel:
            copied = _copy_by_kernel(source, target, num_bytes - done, *places)
            by_kernel = copied > 0
        done += copied or _copy_chunk(source, target, num_bytes - done, *places)


def copy_blocks(
    source: int,
    target: int,
    source_start: int,
    target_start: int,
    block_bytes: int,
    order: IntArray,
) -> None:
    """Copy blocks of one size, in another order or some of them only.

    Parameters
    ----------
    source, target, source_start, target_start
        As for :func:`copy_range`.
    block_bytes
        Size of a block.
    order
        The old block that each new block is.
    """
    # Neighbours that stay neighbours are copied in one go.
    breaks = np.flatnonzero(np.diff(order) != 1) + 1
    for run in np.split(np.arange(len(order)), breaks):
        first = int(run[0])
        copy_range(
            source,
            target,
            source_start + int(order[first]) * block_bytes,
            target_start + first * block_bytes,
            len(run) * block_bytes,
        )


def copy_columns(
    source: int,
    target: int,
    source_start: int,
    target_start: int,
    num_bytes: int,
    num_rows: int,
    order: IntArray,
) -> None:
    """Copy a matrix with its columns in another order, also where they end within bytes.

    Parameters
    ----------
    source, target, source_start, target_start, num_bytes
        As for :func:`copy_range`; the matrix, that of a router, is held in memory.
    num_rows
        Its rows; each is columns of equal width, the lowest bits of a byte first.
    order
        The old column that each new column is.
    """
    content = os.pread(source, num_bytes, source_start)
    if len(content) < num_bytes:
        raise _ended(source_start + len(content), num_bytes - len(content))
    rows = np.frombuffer(content, np.uint8).reshape(num_rows, -1)
    bits = np.unpackbits(rows, axis=1, bitorder="little")
    columns = bits.reshape(num_rows, len(order), -1)[:, order].reshape(num_rows, -1)
    permuted = np.packbits(columns, axis=1, bitorder="little")
    write_all(target, permuted.tobytes(), target_start)


def copy_values(
    source: int,
    target: int,
    source_start: int,
    target_start: int,
    num_bytes: int,
    dtype: str,
    new_values: IntArray,
) -> None:
    """Copy whole numbers, each replaced by another.

    Parameters
    ----------
    source, target, source_start, target_start, num_bytes
        As for :func:`copy_range`.
    dtype
        Their type, one of ``TABLE_DTYPES``.
    new_values
        ``[E]``: the new number of each old one.

    Raises
    ------
    PlacerError
        If a number is not in 0..E-1.
    """
    for done in range(0, num_bytes, _CHUNK_BYTES):
        content = _read_chunk(source, num_bytes - done, source_start + done)
        values = np.frombuffer(content, dtype=TABLE_DTYPES[dtype])
        if len(values) and not 0 <= values.min() <= values.max() < len(new_values):
            raise PlacerError(
                f"a table of experts holds {values.min()} to {values.max()}, "
                f"but there are {len(new_values)} experts",
                "fetch the checkpoint again",
            )
        replaced = new_values[values].astype(values.dtype)
        write_all(target, replaced.tobytes(), target_start + done)


def write_all(target: int, content: bytes, start: int) -> None:
    """Write all of ``content`` at an offset."""
    view = memoryview(content)
    while view:
        written = os.pwrite(target, view, start)
        view, start = view[written:], start + written


def _copy_by_kernel(
    source: int, target: int, num_bytes: int, source_start: int, target_start: int
) -> int:
    """Return the bytes copied, 0 where the kernel cannot or the source has ended."""
    try:
        return os.copy_file_range(
            source, target, min(num_bytes, _MOST_BYTES), source_start, target_start
        )
    except OSError as error:
        if error.errno in _CANNOT_COPY:
            return 0
        raise


def _copy_chunk(
    source: int, target: int, num_bytes: int, source_start: int, target_start: int
) -> int:
    content = _read_chunk(source, num_bytes, source_start)
    write_all(target, content, target_start)
    return len(content)


def _read_chunk(source: int, num_bytes: int, start: int) -> bytes:
    """Read a chunk, or as many bytes as are asked for."""
    wanted = min(num_bytes, _CHUNK_BYTES)
    content = os.pread(source, wanted, start)
    if len(content) < wanted:
        raise _ended(start + len(content), num_bytes - len(content))
    return content


def _ended(place: int, num_bytes: int) -> PlacerError:
    return PlacerError(
        f"a file ended at byte {place} while {num_bytes} more were to be read",
        "the source changed while it was read: export again",
    )

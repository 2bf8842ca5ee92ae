"""Reading: regular files of a bounded size, as UTF-8, and hashes of files."""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from placer.errors import PlacerError

_READ_BYTES = 1 << 20
#: Most bytes of a document, such as a plan or a config: the index of 200,000 tensors has a
#: third of it, and more takes many seconds to decode.
MAX_DOCUMENT_BYTES = 1 << 26


def require_file(path: Path, what: str) -> None:
    """Raise a :class:`PlacerError` unless ``path`` is a file."""
    # Unlike methods of Path these also take names that no file system can hold.
    if not os.path.isfile(path):
        raise PlacerError(
            f"{what} {path} does not exist"
            if not os.path.exists(path)
            else f"{what} {path} is not a file",
            f"check the path: ls -l {path.parent}",
        )


def open_regular(path: Path, what: str = "file") -> BinaryIO:
    """Open a regular file for reading. Pipes and devices are refused: they may block.

    Parameters
    ----------
    path
        The file; links are followed.
    what
        What the file is, for the error.

    Raises
    ------
    PlacerError
        If it does not exist, or is no regular file.
    """
    require_file(path, what)
    stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    # It may have been replaced since it was looked at.
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise PlacerError(f"{what} {path} is not a file")
    return stream


def read_bytes(path: Path, limit: int = MAX_DOCUMENT_BYTES, what: str = "file") -> bytes:
    """Read a whole regular file of at most ``limit`` bytes.

    Raises
    ------
    PlacerError
        If it is no regular file, or longer.
    """
    with open_regular(path, what) as stream:
        size = os.fstat(stream.fileno()).st_size
        # A read of ``limit`` bytes would take that much memory, however short the file is.
        value = b"" if size > limit else stream.read(size + 1)
        if len(value) > size:  # it has no size, as in /proc, or it grew
            value += stream.read(limit + 1 - len(value))
    if max(size, len(value)) > limit:
        raise PlacerError(
            f"{what} {path} has {max(size, len(value)):,} bytes, but placer reads at most "
            f"{limit:,}",
            "check that the path names the right file",
        )
    return value


def read_text(path: Path, limit: int = MAX_DOCUMENT_BYTES, what: str = "file") -> str:
    """Read a whole regular file as UTF-8 in any locale; line ends are kept.

    Raises
    ------
    PlacerError
        If it is no regular file, longer than ``limit`` bytes, or not UTF-8.
    """
    try:
        return read_bytes(path, limit, what).decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise PlacerError(
            f"{what} {path} is not UTF-8: byte {error.start} is {byte:#04x}",
            f"convert it: iconv -f ENCODING -t UTF-8 {path}",
        ) from error


def utf8_name(path: Path | str) -> str:
    """Return a name as UTF-8 can hold it: the same one in every locale.

    Where Python takes names for ASCII, it has half characters in place of other bytes.
    """
    return os.fsencode(path).decode("utf-8", "replace").replace("\ufffd", "?")


def memory_bytes() -> int:
    """Return the bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """Return the one JSON text of ``value``: sorted keys, no spaces, UTF-8 unescaped."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of ``value``, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()

"""Archives of NumPy and PyTorch: read within bounds, and never with code from them."""

import gzip
import io
import lzma
import os
import pickle
import re
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from placer.errors import PlacerError
from placer.run.files import memory_bytes, open_regular

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from placer.arrays import AnyArray

#: What NumPy, pandas, PyTorch and Python's archives raise at bytes that are damaged, or
#: whose header promises more than is there.
UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    lzma.LZMAError,
    pickle.UnpicklingError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
# Routing compresses a few times, even where whole layers are zeros; Deflate packs zeros
# 1,032 times. What unpacks to little is let pass.
_MOST_PACKED = 100
_LITTLE_BYTES = 1 << 26
# How torch names what it does not load, among its advice to run it.
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
# Values of a pickle beyond one per byte of it.
_FEW_VALUES = 1 << 20


def unreadable_reason(error: Exception) -> str:
    """Return why bytes cannot be read, without the advice of NumPy to unpickle them."""
    if "pickle" in str(error):
        return (
            "it does not hold a plain array, or it holds pickled objects, which "
            "placer never loads"
        )
    return str(error) or repr(error)


def require_fitting_archive(path: Path) -> None:
    """Refuse a zip archive that would unpack to far more than it is, or than memory holds.

    ``zipfile`` never unpacks more of a member than the directory of the archive says.

    Raises
    ------
    PlacerError
        If it does; a file that is no zip archive passes.
    """
    with open_regular(path) as stream:
        if not zipfile.is_zipfile(stream):
            return
        size = os.fstat(stream.fileno()).st_size
        with zipfile.ZipFile(stream) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    memory = memory_bytes()
    if unpacked > memory or unpacked > max(_LITTLE_BYTES, _MOST_PACKED * size):
        raise PlacerError(
            f"{path} has {size:,} bytes and unpacks to {unpacked:,}; placer unpacks at "
            f"most {_MOST_PACKED} times the size, and {memory:,} bytes, the memory here",
            "if it is what you meant, store it uncompressed and in parts: numpy.savez",
        )


class _Unzipped(io.RawIOBase):
    """The content of a gzip file, up to ``most`` bytes."""

    def __init__(self, packed: gzip.GzipFile, most: int) -> None:
        self._packed, self._most = packed, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer).cast("B")
        data = self._packed.read(len(view))
        view[: len(data)] = data
        if self._packed.tell() > self._most:
            raise ValueError(
                f"it unpacks to more than {_MOST_PACKED} times its size, or to more than "
                "the memory of this machine"
            )
        return len(data)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, origin: int = io.SEEK_SET, /) -> int:
        return self._packed.seek(offset, origin)


def unzipped(stream: BinaryIO) -> BinaryIO:
    """Return what an open gzip file holds, and any other file as it is.

    Reading from the result raises ``ValueError`` if it unpacks to far more than it is, or
    than memory holds, and others of :data:`UNREADABLE` where it is damaged.
    """
    start = stream.read(2)
    stream.seek(0)
    if start != b"\x1f\x8b":
        return stream
    size = os.fstat(stream.fileno()).st_size
    most = min(memory_bytes(), max(_LITTLE_BYTES, _MOST_PACKED * size))
    return io.BufferedReader(_Unzipped(gzip.GzipFile(fileobj=stream), most))


def load_array(path: Path) -> Any:
    """Load a ``.npy`` file; raises of :data:`UNREADABLE`, or what the bound refuses."""
    import numpy as np

    require_fitting_archive(path)
    value = np.load(path, allow_pickle=False)
    _require_elements(value)
    return value


def load_arrays(
    path: Path, names: Collection[str] | None = None
) -> "tuple[dict[str, AnyArray], list[str]]":
    """Load arrays of a ``.npz`` archive.

    Parameters
    ----------
    path
        The archive.
    names
        The arrays to load, where it has them; by default all.

    Returns
    -------
    arrays, found
        The arrays by name, and the names of all that the archive has.

    Raises
    ------
    PlacerError
        If it would unpack to too much.
    ValueError
        If a member is no array, or the file no archive; others of :data:`UNREADABLE` where
        it is damaged.
    """
    import numpy as np

    require_fitting_archive(path)
    loaded = np.load(path, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise ValueError("it is one array, not an archive of several")
    with loaded as archive:
        found = list(archive.files)
        arrays = {n: archive[n] for n in found if names is None or n in names}
    for name, value in arrays.items():
        # Of a member that is not an array NumPy returns the bytes.
        if not isinstance(value, np.ndarray):
            raise ValueError(f"{name} is not an array")
        _require_elements(value)
    return arrays, found


def _require_elements(value: Any) -> None:
    """Refuse many rows of nothing, which take no byte in a file, but do in a program."""
    if not getattr(value, "size", 1) and max(value.shape) > _FEW_VALUES:
        raise ValueError(f"an array of shape {list(value.shape)} holds nothing")


def load_torch(path: Path, *, allowed: Sequence[Any] = (), mapped: bool = False) -> Any:
    """Load a file of ``torch.save`` on the CPU: tensors, plain values and no code.

    Parameters
    ----------
    path
        The file.
    allowed
        Classes beyond torch's own that it may hold.
    mapped
        Leave the bytes of tensors on disk until they are read.

    Raises
    ------
    PlacerError
        If it is no such file, is compressed, which ``torch.save`` never does, or holds
        classes that are not allowed, or tensors larger than their bytes in the file.
    """
    import torch

    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
    try:
        _require_stored(path, size)
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # of protocols and byte orders of damaged files
            stack.enter_context(torch.serialization.safe_globals([*allowed]))
            value = torch.load(path, weights_only=True, map_location="cpu", mmap=mapped)
        _require_own_bytes(value, size)
    except UNREADABLE as error:
        found = _GLOBAL.search(str(error))
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise PlacerError(
            f"it holds {found[1]}, and placer runs no code from files"
            if found
            else "it is not a readable .pt file of tensors and plain values: "
            + reason.partition(". In PyTorch")[0]
        ) from error
    return value


def _require_stored(path: Path, size: int) -> None:
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(one.compress_type != zipfile.ZIP_STORED for one in members):
        raise ValueError("it is compressed, which torch.save never does")
    if sum(one.file_size for one in members) > size:
        raise ValueError("its parts are larger than the file")


def _require_own_bytes(value: Any, size: int) -> None:
    """Refuse tensors of more elements than they have bytes for, and lists in themselves.

    Strides of 0 make a tensor of any size of one element; references make a list of any
    length of a short pickle. Either would exhaust memory where it is unrolled.
    """
    import torch

    waiting, left = [value], size + _FEW_VALUES
    while waiting:
        one = waiting.pop()
        left -= 1
        if isinstance(one, torch.Tensor):
            if one.numel() * one.element_size() > one.untyped_storage().nbytes():
                raise ValueError(f"a tensor of shape {list(one.shape)} has too few bytes")
            left -= 0 if one.numel() else sum(one.shape)
        elif isinstance(one, dict):
            waiting += one.values()
            left -= len(one)
        elif isinstance(one, list | tuple | set):
            left -= len(one)
            if left >= 0:
                waiting += one
        if left < 0:
            raise ValueError("its lists hold each other many times over")

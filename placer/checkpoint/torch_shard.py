"""A PyTorch checkpoint file, read as the safetensors file that an export makes from it.

``torch.save`` stores tensors uncompressed in a zip archive (PyTorch 1.6 and later), so
their bytes are copied from their place; the pickle next to them is read with
``weights_only`` and without reading tensors.
"""

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from placer.checkpoint.shard import Shard, TensorInfo, compose_header
from placer.errors import PlacerError
from placer.run.archives import UNREADABLE, load_torch
from placer.run.files import require_file

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "int64": "I64",
    "uint64": "U64",
    "float64": "F64",
    "complex64": "C64",
}


def open_torch_shard(path: Path, name: str) -> Shard:
    """Read which tensors a file holds and where.

    Parameters
    ----------
    path
        A file of ``torch.save`` that holds a dict of tensors.
    name
        Name of the safetensors file to write of it.

    Raises
    ------
    PlacerError
        If it is not an archive of plain, contiguous, little-endian tensors, or holds
        anything but tensors.
    """
    require_file(path, "shard")
    _require_stored(path)
    tensors, positions, end = {}, {}, 0
    for key, value in _load_without_data(path).items():
        info, position = _tensor_info(path, key, value, end)
        tensors[key], positions[key], end = info, position, info.stop
    header = compose_header(list(tensors.items()), {"format": "pt"})
    return Shard(
        path=path,
        name=name,
        header_text=header[8:].decode().rstrip(" "),
        header_bytes=len(header) - 8,
        tensors=tensors,
        metadata={"format": "pt"},
        positions=positions,
    )


def _require_stored(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {one.filename.partition("/")[2]: one for one in archive.infolist()}
            order = b"little"
            if "byteorder" in members:
                order = archive.read(members["byteorder"])
    except UNREADABLE as error:
        raise _refused(
            path, f"it is not an archive of PyTorch 1.6 or later: {error}"
        ) from error
    if order != b"little":
        raise _refused(path, f"its tensors are {order.decode(errors='replace')}-endian")


def _load_without_data(path: Path) -> dict[str, Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            value = load_torch(path)
    except PlacerError as error:
        raise _refused(path, f"it does not load with weights_only: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _refused(path, "it holds no dict of tensors by name")
    return value


def _tensor_info(path: Path, name: str, value: Any, start: int) -> tuple[TensorInfo, int]:
    """Return what a tensor is, ``start`` bytes into the data, and its place in the file."""
    import torch

    dtype = str(getattr(value, "dtype", None)).removeprefix("torch.")
    if not isinstance(value, torch.Tensor) or dtype not in _DTYPES:
        raise _refused(path, f"{name} is not a plain tensor")
    if not value.is_contiguous():
        raise _refused(path, f"{name} is not contiguous")
    num_bytes = value.numel() * value.element_size()
    position = _position(value)
    if position is None or position + num_bytes > path.stat().st_size:
        raise _refused(path, f"the position of {name} is unknown, or outside the file")
    info = TensorInfo(
        dtype=_DTYPES[dtype],
        shape=tuple(value.shape),
        start=start,
        stop=start + num_bytes,
    )
    return info, position


def _position(value: "torch.Tensor") -> int | None:
    # Set by torch.load since PyTorch 2.7.
    start = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        return None
    return int(start) + int(value.storage_offset()) * value.element_size()


def _refused(path: Path, reason: str) -> PlacerError:
    return PlacerError(
        f"shard {path} cannot be read: {reason}",
        "save the model as safetensors: transformers' save_pretrained does",
    )

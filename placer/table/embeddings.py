"""The embedding of a checkpoint: rows of all token ids.

It can be larger than memory, so it is read in blocks.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from placer.arrays import Float32Array, IntArray
from placer.checkpoint.shard import Shard
from placer.errors import PlacerError
from placer.table.checkpoint_tensors import tensor_files

# Rows read at a time: a few tens of megabytes of float32 at the usual widths.
_BLOCK = 1024
_TENSOR_NAMES = (
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "transformer.wte.weight",
    "embed_tokens.weight",
    "embed.weight",
)
# NumPy has no bfloat16: its bits are the upper half of those of a float32.
_STORED: dict[str, npt.DTypeLike] = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}


class Embeddings(Protocol):
    """Embedding rows that are read block by block."""

    @property
    def num_rows(self) -> int:
        """Number of token ids that have a row."""
        ...

    def rows(self, start: int, stop: int) -> Float32Array:
        """Return the rows ``start`` to ``stop - 1``, ``[n, H]`` float32."""
        ...


class CheckpointEmbeddings:
    """The embedding table of a Hugging Face checkpoint, read from its safetensors.

    Parameters
    ----------
    directory
        The checkpoint.

    Raises
    ------
    PlacerError
        If it has no safetensors, or none of the known embedding tensors in a known type.
    """

    def __init__(self, directory: Path) -> None:
        self._path, name = _find(directory)
        shard = Shard.open(self._path)
        info = shard.tensors.get(name)
        if info is None or len(info.shape) != 2 or info.dtype not in _STORED:
            found = "absent" if info is None else f"{info.dtype} {list(info.shape)}"
            raise PlacerError(
                f"{self._path}: {name} is {found}, expected {', '.join(_STORED)} "
                "of two dimensions",
                "leave out --embeddings",
            )
        self._num_rows, self._width = info.shape
        self._dtype = info.dtype
        self._start = shard.place(name)[0]

    @property
    def num_rows(self) -> int:
        """Number of token ids that have a row."""
        return self._num_rows

    def rows(self, start: int, stop: int) -> Float32Array:
        """Return the rows ``start`` to ``stop - 1``, ``[n, H]`` float32."""
        # Not mapped into memory: mapped pages would count as this process's own.
        stored = np.dtype(_STORED[self._dtype])
        count = (stop - start) * self._width
        offset = self._start + start * self._width * stored.itemsize
        values = np.fromfile(self._path, stored, count, offset=offset)
        if self._dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32, copy=False).reshape(-1, self._width)


def require_rows(embeddings: Embeddings, highest: int) -> None:
    """Refuse an embedding that ends before token id ``highest``.

    Raises
    ------
    PlacerError
        If it has no row for it.
    """
    if highest >= embeddings.num_rows:
        raise PlacerError(
            f"the embedding table has {embeddings.num_rows} rows, "
            f"but the vocabulary has token id {highest}",
            "give the checkpoint that the trace was recorded from: --embeddings MODEL",
        )


def unit_rows(embeddings: Embeddings, ids: IntArray, width: int) -> Float32Array:
    """Return the rows of ascending ``ids``, scaled to length 1 (a zero row stays)."""
    scaled = np.empty((len(ids), width), dtype=np.float32)
    for start in np.unique(ids // _BLOCK) * _BLOCK:
        stop = min(int(start) + _BLOCK, embeddings.num_rows)
        wanted = slice(*np.searchsorted(ids, [start, stop]))
        rows = embeddings.rows(int(start), stop)[ids[wanted] - start]
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        scaled[wanted] = rows / np.where(length > 0, length, 1)
    return scaled


def _find(directory: Path) -> tuple[Path, str]:
    """Return the file and the name of the embedding tensor."""
    files = tensor_files(directory)
    for name in _TENSOR_NAMES:
        if name in files:
            return files[name], name
    raise PlacerError(
        f"{directory} has no embedding tensor that placer knows",
        f"looked for {', '.join(_TENSOR_NAMES)}; leave out --embeddings",
    )

"""Rows for token ids that the profile never saw: their neighbours in the embedding."""

from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from placer.errors import PlacerError
from placer.table.checkpoint_tensors import tensor_files

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

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


class Embeddings(Protocol):
    """Embedding rows that are read block by block."""

    @property
    def num_rows(self) -> int:
        """Number of token ids that have a row."""
        ...

    def rows(self, start: int, stop: int) -> FloatArray:
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
        If it has no safetensors, or none of the known embedding tensors.
    """

    def __init__(self, directory: Path) -> None:
        # torch, because NumPy cannot hold the bfloat16 of most checkpoints.
        from safetensors import safe_open

        path, name = _find(directory)
        opened: Any = safe_open(path, "pt")
        self._file = opened
        self._slice = self._file.get_slice(name)

    @property
    def num_rows(self) -> int:
        """Number of token ids that have a row."""
        return int(self._slice.get_shape()[0])

    def rows(self, start: int, stop: int) -> FloatArray:
        """Return the rows ``start`` to ``stop - 1``, ``[n, H]`` float32."""
        rows: FloatArray = self._slice[start:stop].float().numpy()
        return rows

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, traceback)


def nearest_seen(embeddings: Embeddings, seen: IntArray, unseen: IntArray) -> IntArray:
    """Return, for each unseen id, the place in ``seen`` of the nearest one by cosine.

    Parameters
    ----------
    embeddings
        Rows of all ids.
    seen
        ``[S]`` ids, ascending; their rows are held in memory.
    unseen
        ``[N]`` ids, ascending; their rows are read block by block.

    Returns
    -------
    ndarray
        ``[N]`` int64; among equally near ids the lowest.

    Raises
    ------
    PlacerError
        If there is no row for an id.
    """
    highest = int(max(seen.max(initial=-1), unseen.max(initial=-1)))
    if highest >= embeddings.num_rows:
        raise PlacerError(
            f"the embedding table has {embeddings.num_rows} rows, "
            f"but the vocabulary has token id {highest}",
            "give the checkpoint that the trace was recorded from: --embeddings MODEL",
        )
    known = _unit_rows(embeddings, seen)
    nearest = np.empty(len(unseen), dtype=np.int64)
    for start in range(0, len(unseen), _BLOCK):
        block = _unit_rows(embeddings, unseen[start : start + _BLOCK])
        nearest[start : start + _BLOCK] = (block @ known.T).argmax(axis=1)
    return nearest


def _unit_rows(embeddings: Embeddings, ids: IntArray) -> FloatArray:
    """Return the rows of ascending ``ids``, scaled to length 1 (a zero row stays)."""
    parts = []
    for start in np.unique(ids // _BLOCK) * _BLOCK:
        stop = min(int(start) + _BLOCK, embeddings.num_rows)
        wanted = ids[(ids >= start) & (ids < stop)]
        parts.append(embeddings.rows(int(start), stop)[wanted - start])
    rows = np.concatenate(parts)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    scaled = np.zeros_like(rows)
    np.divide(rows, length, out=scaled, where=length > 0)
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

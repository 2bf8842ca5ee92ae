"""Counting affinity from the chunks of a trace, exactly and in one pass."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.affinity.affinity import Affinity
from placer.affinity.sparse import SparseCounts
from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.trace import Chunk

IntArray = npt.NDArray[np.int64]


def count_affinity(
    chunks: Iterable[Chunk],
    model: ModelSpec,
    provenance: Mapping[str, Any],
    *,
    with_rows: bool = True,
) -> Affinity:
    """Count load, transitions, co-activation and, where ids are known, rows per token.

    Parameters
    ----------
    chunks
        The tokens. The result does not depend on how they are cut into chunks.
    model
        Shape of the routing.
    provenance
        What the affinity file says of its origin.
    with_rows
        Count experts per token id and per sequence too.

    Raises
    ------
    PlacerError
        If there is no token.
    """
    total: Affinity | None = None
    for chunk in chunks:
        part = _count_chunk(chunk, model, provenance, with_rows)
        total = part if total is None else total.add(part)
    if total is None:
        raise PlacerError(
            "no token is left to count", "choose another --fold, or record more text"
        )
    return total


def _count_chunk(
    chunk: Chunk, model: ModelSpec, provenance: Mapping[str, Any], with_rows: bool
) -> Affinity:
    sizes = model.num_experts
    experts = chunk.experts

    def rows(ids: npt.NDArray[Any] | None) -> tuple[SparseCounts, ...] | None:
        if ids is None or not with_rows:
            return None
        return tuple(
            _count_rows(ids, chosen, size)
            for chosen, size in zip(experts, sizes, strict=True)
        )

    return Affinity(
        model=model,
        num_tokens=chunk.num_tokens,
        provenance=provenance,
        load=tuple(
            np.bincount(ids.ravel(), minlength=size)
            for ids, size in zip(experts, sizes, strict=True)
        ),
        transition=tuple(
            _count_pairs(experts[n], experts[n + 1], sizes[n], sizes[n + 1])
            for n in range(len(experts) - 1)
        ),
        coactivation=tuple(
            _count_coactivation(ids, size) for ids, size in zip(experts, sizes, strict=True)
        ),
        token_expert=rows(chunk.token_ids),
        sequence_expert=rows(chunk.sequence_ids),
    )


def _count_pairs(
    first: npt.NDArray[Any], second: npt.NDArray[Any], num_first: int, num_second: int
) -> IntArray:
    """Count pairs of a column of ``first`` [T, k] with one of ``second`` [T, k]."""
    counts = np.zeros(num_first * num_second, dtype=np.int64)
    columns = [second[:, b].astype(np.intp) for b in range(second.shape[1])]
    for a in range(first.shape[1]):
        base = first[:, a].astype(np.intp) * num_second
        for column in columns:
            counts += np.bincount(base + column, minlength=len(counts))
    return counts.reshape(num_first, num_second)


def _count_coactivation(experts: npt.NDArray[Any], size: int) -> IntArray:
    """Count pairs of two columns of ``experts`` [T, k], each once, both ways round."""
    counts = np.zeros((size, size), dtype=np.int64)
    for a in range(experts.shape[1] - 1):
        counts += _count_pairs(experts[:, a : a + 1], experts[:, a + 1 :], size, size)
    return counts + counts.T


def _count_rows(
    rows: npt.NDArray[Any], experts: npt.NDArray[Any], size: int
) -> SparseCounts:
    """Count experts [T, k] per row id [T]; a negative id is unknown and left out."""
    known = rows >= 0
    rows, experts = rows[known].astype(np.int64), experts[known].astype(np.int64)
    keys = (rows[:, None] * size + experts).ravel()
    num_rows = int(rows.max()) + 1 if len(rows) else 0
    return SparseCounts.from_keys(keys, np.ones_like(keys), num_rows, size)

"""Counting affinity from the chunks of a trace, exactly and in one pass.

Counts are integers and add up, so the result depends neither on how tokens are cut into
chunks nor on how many processes count them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np

from placer.affinity.affinity import Affinity
from placer.affinity.sparse import SparseCounts
from placer.affinity.sums import PairwiseSum, Rows
from placer.arrays import AnyArray, IntArray
from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.run.devices import CPU, torch_device
from placer.run.parallel import PROCESSES, Backend
from placer.run.progress import Steps
from placer.trace import Chunk, Selection, Trace

ChunkSource = Callable[[], Iterable[Chunk]]

# This many tokens at a time, the keys of all pairs stay in the processor's cache.
_BLOCK_TOKENS = 8192


def count_affinity(
    chunks: Iterable[Chunk],
    model: ModelSpec,
    provenance: Mapping[str, Any],
    *,
    rows: Rows = "none",
    device: str = CPU,
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
    rows
        What experts are counted for one by one, and not only in total: ``none``, ``tokens``
        (token ids, where they are known; memory grows with the vocabulary) or
        ``sequences`` (those too; memory grows with the trace).
    device
        ``cpu``, with NumPy, or ``cuda``: where to count. The counts are the same.

    Raises
    ------
    PlacerError
        If there is no token, or no such device.
    """
    total = _count(chunks, model, provenance, rows, device)
    if total is None:
        raise _no_token()
    return total


def count_sources(
    sources: Sequence[ChunkSource],
    model: ModelSpec,
    provenance: Mapping[str, Any],
    *,
    rows: Rows = "none",
    backend: Backend = PROCESSES,
    device: str = CPU,
    num_workers: int | None = None,
    steps: Steps | None = None,
) -> Affinity:
    """Count several streams of chunks, in processes or Ray tasks.

    Parameters
    ----------
    sources
        Functions that yield chunks; they are sent to the processes, so they must be
        picklable, such as ``functools.partial`` of a module's function.
    model, provenance, rows, device
        As for :func:`count_affinity`.
    backend
        Where to count.
    num_workers
        Number of processes, one for each source by default; 1: this process.
    steps
        Told of each source that is counted.

    Raises
    ------
    PlacerError
        If there is no token or no such device, or a process was killed.
    """
    task = partial(
        _count_source, model=model, provenance=provenance, rows=rows, device=device
    )
    total = PairwiseSum[Affinity]()
    for part in backend.map(task, sources, num_workers):
        if steps is not None:
            steps.begin()
        total.add(part)
    if (counted := total.result()) is None:
        raise _no_token()
    return counted


def _no_token() -> PlacerError:
    return PlacerError(
        "no token is left to count", "choose another --fold or --phase, or record more text"
    )


def _count_source(
    source: ChunkSource,
    *,
    model: ModelSpec,
    provenance: Mapping[str, Any],
    rows: Rows,
    device: str,
) -> Affinity | None:
    return _count(source(), model, provenance, rows, device)


def _count(
    chunks: Iterable[Chunk],
    model: ModelSpec,
    provenance: Mapping[str, Any],
    rows: Rows,
    device: str,
) -> Affinity | None:
    if device != CPU:
        from placer.affinity.on_device import count_on_device

        return count_on_device(
            chunks, model, provenance, device=torch_device(device), rows=rows
        )
    total = PairwiseSum[Affinity]()
    for chunk in chunks:
        total.add(_count_chunk(chunk, model, provenance, rows))
    return total.result()


def _count_chunk(
    chunk: Chunk, model: ModelSpec, provenance: Mapping[str, Any], rows: Rows
) -> Affinity:
    sizes = model.num_experts
    experts = chunk.experts

    def count_rows(ids: AnyArray | None) -> tuple[SparseCounts, ...] | None:
        if ids is None:
            return None
        found = _Rows.of(ids)
        return tuple(
            found.count(chosen, size) for chosen, size in zip(experts, sizes, strict=True)
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
            count_pairs(experts[n], experts[n + 1], sizes[n], sizes[n + 1])
            for n in range(len(experts) - 1)
        ),
        coactivation=tuple(
            _count_coactivation(ids, size) for ids, size in zip(experts, sizes, strict=True)
        ),
        token_expert=count_rows(chunk.token_ids if rows != "none" else None),
        sequence_expert=count_rows(chunk.sequence_ids if rows == "sequences" else None),
    )


def count_pairs(
    first: AnyArray, second: AnyArray, num_first: int, num_second: int
) -> IntArray:
    """Count pairs of a column of ``first`` with one of ``second``.

    Parameters
    ----------
    first, second
        ``[T, a]`` and ``[T, b]`` expert ids.
    num_first, num_second
        How many experts there are.

    Returns
    -------
    ndarray
        ``[num_first, num_second]`` int64.
    """
    counts = np.zeros(num_first * num_second, dtype=np.int64)
    for begin in range(0, len(first), _BLOCK_TOKENS):
        block = slice(begin, begin + _BLOCK_TOKENS)
        rows = first[block].T.astype(np.intp, order="C") * num_second
        columns = second[block].T.astype(np.intp, order="C")
        for row in rows:
            counts += np.bincount((row + columns).ravel(), minlength=len(counts))
    return counts.reshape(num_first, num_second)


def _count_coactivation(experts: AnyArray, size: int) -> IntArray:
    """Count pairs of two columns of ``experts`` [T, k], each once, both ways round."""
    counts = np.zeros((size, size), dtype=np.int64)
    for a in range(experts.shape[1] - 1):
        counts += count_pairs(experts[:, a : a + 1], experts[:, a + 1 :], size, size)
    return counts + counts.T


@dataclass(frozen=True, slots=True)
class _Rows:
    """The known row ids of a chunk, and the tokens in their order."""

    ids: IntArray
    place: IntArray
    order: IntArray

    @classmethod
    def of(cls, ids: AnyArray) -> Self:
        """Take row ids ``[T]``; a negative one is unknown and left out."""
        known = np.flatnonzero(ids >= 0)
        order = known[np.argsort(ids[known], kind="stable")]
        present, place = np.unique(ids[order].astype(np.int64), return_inverse=True)
        return cls(present, place, order)

    def count(self, experts: AnyArray, size: int) -> SparseCounts:
        """Count experts ``[T, k]`` per row id."""
        # A chunk has few ids, so a dense count is cheaper than sorting all pairs; in the
        # order of the ids it goes through memory once.
        keys = (self.place * size)[:, None] + experts[self.order]
        dense = np.bincount(keys.ravel(), minlength=len(self.ids) * size)
        cells = np.flatnonzero(dense > 0)
        place, columns = np.divmod(cells, size)
        num_rows = int(self.ids[-1]) + 1 if len(self.ids) else 0
        return SparseCounts.from_entries(
            self.ids[place], columns, dense[cells], num_rows, size
        )


def expert_load(trace: Trace, selection: Selection) -> list[AnyArray]:
    """Return L arrays ``[E]`` int64: pairs per expert in the tokens selected."""
    load = [np.zeros(size, dtype=np.int64) for size in trace.model.num_experts]
    for chunk in trace.chunks(selection):
        for counts, ids in zip(load, chunk.experts, strict=True):
            counts += np.bincount(ids.ravel(), minlength=len(counts))
    return load

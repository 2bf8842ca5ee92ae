"""Which rank holds a token's hidden state, and which tokens share a batch."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from placer.errors import UsageError
from placer.simulation.serving import RankArray, rank_dtype

IntArray = npt.NDArray[np.int64]


def fixed_homes(sequence_ids: npt.NDArray[Any], num_ranks: int) -> RankArray:
    """Return ``[T]``: the data-parallel rank of each token's sequence.

    It is the ordinal of the sequence among those given, modulo the ranks: chosen without
    regard to content, as vanilla expert parallelism does.
    """
    _, ordinal = np.unique(sequence_ids, return_inverse=True)
    return (ordinal % num_ranks).astype(rank_dtype(num_ranks - 1))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batches:
    """Tokens in the order in which concurrent sequences decode, cut into batches.

    Attributes
    ----------
    order
        ``[T]`` int64: the tokens; one of each sequence in turn.
    batch_of_token
        ``[T]`` int64: the batch of each token of the trace.
    size
        Tokens per batch; the last batch may have fewer.
    """

    order: IntArray
    batch_of_token: IntArray
    size: int

    @property
    def num_full(self) -> int:
        """Number of batches that are full."""
        return len(self.order) // self.size

    @property
    def num_batches(self) -> int:
        """Number of batches, with the last one that may have fewer tokens."""
        return -(-len(self.order) // self.size)

    def row_at_home(self, home: RankArray, num_ranks: int) -> IntArray:
        """Return ``[T]`` int64: each token's row among those of its batch and home.

        A rank runs the tokens that are at home there; rows count from 0 in batch order.
        """
        cell = self.batch_of_token[self.order] * num_ranks + home[self.order]
        by_cell = np.argsort(cell, kind="stable")
        counts = np.bincount(cell)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        row = np.empty(len(home), dtype=np.int64)
        row[self.order[by_cell]] = np.arange(len(home)) - first
        return row

    @classmethod
    def of(cls, sequence_ids: npt.NDArray[Any], batch_size: int) -> Self:
        """Cut the tokens of whole sequences into batches.

        A batch is no larger than the trace.

        Raises
        ------
        UsageError
            If ``batch_size`` is not positive.
        """
        if batch_size < 1:
            raise UsageError(
                f"--batch-size must be positive, got {batch_size}",
                "give the tokens of one forward pass, for example --batch-size 4096",
            )
        num_tokens = len(sequence_ids)
        starts = np.flatnonzero(np.diff(sequence_ids, prepend=sequence_ids[:1] - 1))
        lengths = np.diff(starts, append=num_tokens)
        position = np.arange(num_tokens) - np.repeat(starts, lengths)
        order = np.argsort(position, kind="stable")
        size = min(batch_size, num_tokens)
        batch_of_token = np.empty(num_tokens, dtype=np.int64)
        batch_of_token[order] = np.arange(num_tokens) // size
        return cls(order=order, batch_of_token=batch_of_token, size=size)

"""Which rank holds a token's hidden state, and which tokens share a batch."""

from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from placer.errors import UsageError
from placer.simulation.serving import RankArray, rank_dtype

IntArray = npt.NDArray[np.int64]
Phase = Literal["decode", "prefill"]


def fixed_homes(sequence_ids: npt.NDArray[Any], num_ranks: int) -> RankArray:
    """Return ``[T]``: the data-parallel rank of each token's sequence.

    It is the ordinal of the sequence among those given, modulo the ranks: chosen without
    regard to content, as vanilla expert parallelism does.
    """
    _, ordinal = np.unique(sequence_ids, return_inverse=True)
    return (ordinal % num_ranks).astype(rank_dtype(num_ranks - 1))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batches:
    """Tokens in the order in which they are computed, cut into batches.

    Attributes
    ----------
    order
        ``[T]`` int64: the tokens in that order.
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
        """Cut the tokens of whole sequences into batches of decoding.

        A batch takes one token of each sequence in turn. It is no larger than the trace.

        Raises
        ------
        UsageError
            If ``batch_size`` is not positive.
        """
        return cls._cut(_place_in_run(sequence_ids), batch_size)

    @classmethod
    def of_phase(
        cls, phase: Phase, sequence_ids: npt.NDArray[Any], batch_size: int, num_ranks: int
    ) -> Self:
        """Cut the tokens of whole sequences into batches of decoding or prefilling.

        In prefilling every rank computes the sequences that :func:`fixed_homes` gives it,
        one after another: a batch takes one token of each rank's in turn.

        Raises
        ------
        UsageError
            If ``batch_size`` is not positive, or the phase is neither of the two.
        """
        if phase not in get_args(Phase):
            raise UsageError(
                f"--batching {phase} is not known", f"choose {' or '.join(get_args(Phase))}"
            )
        if phase == "decode":
            return cls.of(sequence_ids, batch_size)
        home = fixed_homes(sequence_ids, num_ranks)
        by_home = np.argsort(home, kind="stable")
        place = np.empty(len(home), dtype=np.int64)
        place[by_home] = _place_in_run(home[by_home])
        # Ranks in order among tokens of the same place in their ranks' queues.
        return cls._cut(place * num_ranks + home, batch_size)

    @classmethod
    def _cut(cls, key: IntArray, batch_size: int) -> Self:
        """Order tokens by ``key`` ([T]), the earlier first among equals, and cut."""
        if batch_size < 1:
            raise UsageError(
                f"--batch-size must be positive, got {batch_size}",
                "give the tokens of one forward pass, for example --batch-size 4096",
            )
        order = np.argsort(key, kind="stable")
        size = min(batch_size, len(key))
        batch_of_token = np.empty(len(key), dtype=np.int64)
        batch_of_token[order] = np.arange(len(key)) // size
        return cls(order=order, batch_of_token=batch_of_token, size=size)


def _place_in_run(values: npt.NDArray[Any]) -> IntArray:
    """Return ``[T]`` int64: each token's place in its run of equal values."""
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    lengths = np.diff(starts, append=len(values))
    place: IntArray = np.arange(len(values)) - np.repeat(starts, lengths)
    return place

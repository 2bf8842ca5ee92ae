"""Which rank holds a token's hidden state, and which tokens share a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import numpy as np

from placer.arrays import AnyArray, IntArray
from placer.errors import UsageError, one_of
from placer.serving.layer_serving import RankArray, rank_dtype

Batching = Literal["decode", "prefill"]

#: Tokens per rank of the batches that are served by default.
TOKENS_PER_RANK = (64, 256, 4096)
# DeepEP's low-latency kernels and the engines' graphs of decoding end about here.
_FEWEST_PREFILL_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """The shape of a batch: its size, and the order of tokens.

    Attributes
    ----------
    tokens_per_rank
        Tokens that each rank brings.
    batching
        How they are drawn: see :meth:`Batches.of_shape`.
    """

    tokens_per_rank: int
    batching: Batching

    def __post_init__(self) -> None:
        if self.tokens_per_rank < 1:
            raise UsageError(
                f"--tokens-per-rank must be positive, got {self.tokens_per_rank}",
                "give the tokens of each rank in one forward pass, for example "
                "--tokens-per-rank 64,256,4096",
            )

    def tokens(self, num_ranks: int) -> int:
        """Return the tokens of a forward pass of this many ranks."""
        return self.tokens_per_rank * num_ranks


def batch_shapes(
    tokens_per_rank: Sequence[int] = TOKENS_PER_RANK, batching: str | None = None
) -> tuple[BatchShape, ...]:
    """Return the batches of these sizes, ascending, each once.

    Without ``batching``, sizes below 1,024 are batches of decoding, others of prefilling.

    Raises
    ------
    UsageError
        If a size is not positive, or the batching is not known.
    """
    known: tuple[Batching, ...] = get_args(Batching)
    asked = None if batching is None else one_of("--batching", batching, known)
    return tuple(
        BatchShape(
            tokens_per_rank=size,
            batching=asked or ("decode" if size < _FEWEST_PREFILL_TOKENS else "prefill"),
        )
        for size in sorted(set(tokens_per_rank))
    )


def parse_tokens_per_rank(text: str | None) -> tuple[int, ...]:
    """Read a list such as ``64,256,4096``; ``None`` is :data:`TOKENS_PER_RANK`.

    Raises
    ------
    UsageError
        If one is not a whole number.
    """
    if text is None:
        return TOKENS_PER_RANK
    if not all(one.strip().isdecimal() for one in text.split(",")):
        raise UsageError(
            f"--tokens-per-rank {text} is not a list of whole numbers",
            "for example --tokens-per-rank 64,256,4096",
        )
    return tuple(int(one) for one in text.split(","))


def fixed_homes(sequence_ids: AnyArray, num_ranks: int) -> RankArray:
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
        Tokens of the trace per batch; the last batch may have fewer.
    weight
        Tokens that each of them represents: above 1 where the trace has fewer tokens than
        one batch.
    """

    order: IntArray
    batch_of_token: IntArray
    size: int
    weight: float = 1.0

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
    def of(cls, sequence_ids: AnyArray, batch_size: int) -> Self:
        """Cut the tokens of whole sequences into batches of decoding.

        A batch takes one token of each sequence in turn. It is no larger than the trace.

        Raises
        ------
        UsageError
            If ``batch_size`` is not positive.
        """
        return cls._cut(_place_in_run(sequence_ids), batch_size)

    @classmethod
    def of_shape(cls, shape: BatchShape, sequence_ids: AnyArray, num_ranks: int) -> Self:
        """Cut the tokens of whole sequences into batches of decoding or prefilling.

        In decoding a batch takes one token of each sequence in turn. In prefilling every
        rank computes the sequences that :func:`fixed_homes` gives it, one after another: a
        batch takes one token of each rank's in turn.

        Where there are fewer tokens than one batch has, each represents several. Copies
        and loads of the ranks are then right in the mean; the load is as uneven as that of
        so few tokens is, and no more experts are activated than by them.
        """
        wanted = shape.tokens(num_ranks)
        if shape.batching == "decode":
            found = cls.of(sequence_ids, wanted)
        else:
            home = fixed_homes(sequence_ids, num_ranks)
            by_home = np.argsort(home, kind="stable")
            place = np.empty(len(home), dtype=np.int64)
            place[by_home] = _place_in_run(home[by_home])
            # Ranks in order among tokens of the same place in their ranks' queues.
            found = cls._cut(place * num_ranks + home, wanted)
        return replace(found, weight=wanted / found.size)

    @classmethod
    def _cut(cls, key: IntArray, batch_size: int) -> Self:
        """Order tokens by ``key`` ([T]), the earlier first among equals, and cut."""
        if batch_size < 1:
            raise UsageError(
                f"a batch has at least one token, got batch_size {batch_size}",
                "give the tokens of all ranks in one forward pass",
            )
        order = np.argsort(key, kind="stable")
        size = min(batch_size, len(key))
        batch_of_token = np.empty(len(key), dtype=np.int64)
        batch_of_token[order] = np.arange(len(key)) // size
        return cls(order=order, batch_of_token=batch_of_token, size=size)


def _place_in_run(values: AnyArray) -> IntArray:
    """Return ``[T]`` int64: each token's place in its run of equal values."""
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    lengths = np.diff(starts, append=len(values))
    place: IntArray = np.arange(len(values)) - np.repeat(starts, lengths)
    return place

"""Using a table in a runtime: the home of a token, a slice and a request."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from placer.arrays import AnyArray, Float32Array, IntArray
from placer.errors import PlacerError
from placer.serving.homes import Batches
from placer.serving.layer_serving import RankArray
from placer.table.table import Table
from placer.trace import Chunk

# A request's home is decided on this many tokens of its prompt.
REQUEST_PREFIX = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTable:
    """The rows of one layer.

    Attributes
    ----------
    token_rank, token_confidence
        ``[V]``: T and its confidence.
    history_rank, history_confidence
        ``[R^lookback]``: A and its confidence.
    num_ranks, lookback
        The base of the history index and its number of digits.
    """

    token_rank: RankArray
    token_confidence: AnyArray
    history_rank: RankArray
    history_confidence: AnyArray
    num_ranks: int
    lookback: int

    @classmethod
    def of(cls, table: Table, layer: int) -> Self:
        """Take the rows of one layer of a table."""
        return cls(
            token_rank=table.token_rank[layer],
            token_confidence=table.token_confidence[layer],
            history_rank=table.history_rank[layer],
            history_confidence=table.history_confidence[layer],
            num_ranks=table.num_ranks,
            lookback=table.lookback,
        )

    def homes(
        self, token_ids: IntArray, history: Sequence[RankArray], fallback: RankArray
    ) -> tuple[RankArray, Float32Array]:
        """Choose the home of every token.

        Parameters
        ----------
        token_ids
            ``[T]`` int64, -1 where unknown (see :func:`known_ids`).
        history
            The majority ranks ``[T]`` of the past layers, the oldest first.
        fallback
            ``[T]``: home of an unknown token without history.

        Returns
        -------
        home : ndarray
            ``[T]`` ranks.
        confidence : ndarray
            ``[T]`` float32; -1 for the fallback.
        """
        known = token_ids >= 0
        ids = np.where(known, token_ids, 0)
        home = np.where(known, np.take(self.token_rank, ids), fallback)
        confidence = np.where(
            known, np.take(self.token_confidence, ids).astype(np.float32), np.float32(-1)
        )
        if not self.has_history(history):
            return home, confidence
        index = history_index(history[-self.lookback :], self.num_ranks)
        sure = np.take(self.history_confidence, index).astype(np.float32)
        surer = sure > confidence
        home = np.where(surer, np.take(self.history_rank, index), home)
        return home, np.where(surer, sure, confidence)

    def has_history(self, history: Sequence[RankArray]) -> bool:
        """Whether enough layers have passed for A."""
        return 0 < self.lookback <= len(history)


def history_index(history: Sequence[RankArray], num_ranks: int) -> IntArray:
    """Return ``[T]`` int64: majority ranks as one number in base R, the oldest first."""
    index = np.zeros(len(history[0]), dtype=np.int64)
    for ranks in history:
        index = index * num_ranks + ranks
    return index


def known_ids(token_ids: AnyArray | None, num_tokens: int, vocab_size: int) -> IntArray:
    """Return ``[T]`` int64 token ids, -1 where a table has no row for them."""
    if token_ids is None:
        return np.full(num_tokens, -1, dtype=np.int64)
    known = (token_ids >= 0) & (token_ids < vocab_size)
    return np.where(known, token_ids, -1).astype(np.int64)


def equal_homes(
    home: RankArray,
    confidence: Float32Array,
    num_ranks: int,
    batches: Batches,
    token_score: Float32Array | None = None,
) -> RankArray:
    """Give every rank the same number of tokens of each batch.

    The most certain tokens get their home first; ties keep the order of the batch.
    The others take, those with the best score first, the rank with a free slot that
    their ``token_score`` prefers; without scores, free slots in the order of the ranks.

    Parameters
    ----------
    home, confidence
        ``[T]``: the table's choice.
    num_ranks
        R; where a batch does not divide by it, the first ranks get one token more.
    batches
        The tokens of every batch.
    token_score
        ``[T, R]`` float32, or ``None``.

    Returns
    -------
    ndarray
        ``[T]`` ranks.
    """
    wanted = home[batches.order]
    batch = np.arange(len(home)) // batches.size
    capacity = _slots(len(home), batches, num_ranks)
    group = batch * num_ranks + wanted
    by_confidence = np.lexsort((-confidence[batches.order], group))
    group = group[by_confidence]
    place = np.arange(len(group)) - np.searchsorted(group, group)
    granted = np.zeros(len(home), dtype=np.bool_)
    granted[by_confidence] = place < capacity.ravel()[group]
    taken = np.bincount(group[granted[by_confidence]], minlength=capacity.size)
    free = capacity - taken.reshape(capacity.shape)
    rest = np.flatnonzero(~granted)
    result = wanted.copy()
    if token_score is None:
        slots = np.tile(np.arange(num_ranks), batches.num_batches)
        result[rest] = np.repeat(slots, free.ravel())
    else:
        score = token_score[batches.order[rest]]
        for number, left in enumerate(free):
            mine = batch[rest] == number
            result[rest[mine]] = _second_choices(score[mine], left)
    homes = np.empty_like(result)
    homes[batches.order] = result
    return homes


def _slots(num_tokens: int, batches: Batches, num_ranks: int) -> IntArray:
    """Return ``[batches, R]``: how many tokens of a batch each rank gets."""
    sizes = np.full(batches.num_batches, batches.size)
    sizes[-1] = num_tokens - batches.size * (batches.num_batches - 1)
    rank = np.arange(num_ranks)
    return sizes[:, None] // num_ranks + (rank < sizes[:, None] % num_ranks)


def _second_choices(score: Float32Array, free: IntArray) -> IntArray:
    """Give tokens, the best score first, the free rank that each prefers.

    A rank stays free until its last slot goes, so all choices up to that moment are made
    at once: at most R rounds.
    """
    order = np.argsort(-score.max(axis=1, initial=0), kind="stable")
    free = free.copy()
    chosen = np.empty(len(order), dtype=np.int64)
    begin = 0
    while begin < len(order):
        left = order[begin:]
        best = np.where(free > 0, score[left], -np.inf).argmax(axis=1)
        turn = np.empty(len(best), dtype=np.int64)
        by_rank = np.argsort(best, kind="stable")
        ordered = best[by_rank]
        turn[by_rank] = np.arange(len(best)) - np.searchsorted(ordered, ordered)
        last = np.flatnonzero(turn + 1 == free[best])
        stop = int(last[0]) + 1 if len(last) else len(best)
        chosen[left[:stop]] = best[:stop]
        free -= np.bincount(best[:stop], minlength=len(free))
        begin += stop
    return chosen


def request_homes(
    request_score: AnyArray, sequence_ids: AnyArray, token_ids: IntArray, num_ranks: int
) -> RankArray:
    """Choose one home per sequence, in order of sequence id.

    The best-scoring rank over the first :data:`REQUEST_PREFIX` tokens, among the ranks
    not taken since the last full turn: ranks stay within one sequence of each other.

    Parameters
    ----------
    request_score
        ``[V, R]`` float16.
    sequence_ids
        ``[T]``, non-decreasing.
    token_ids
        ``[T]`` int64, -1 where unknown.
    num_ranks
        R.

    Returns
    -------
    ndarray
        ``[T]`` int64 ranks.
    """
    _, starts, lengths = np.unique(sequence_ids, return_index=True, return_counts=True)
    chosen = np.empty(len(starts), dtype=np.int64)
    free = np.ones(num_ranks, dtype=np.bool_)
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        ids = token_ids[start : start + min(length, REQUEST_PREFIX)]
        total = request_score[ids[ids >= 0]].astype(np.float32).sum(axis=0)
        rank = int(np.where(free, total, -np.inf).argmax())
        chosen[number] = rank
        free[rank] = False
        if not free.any():
            free[:] = True
    return np.repeat(chosen, lengths)


def require_ids(tokens: Chunk, vocab_size: int) -> IntArray:
    """Return ``[T]``: the token ids of a profile, -1 where unknown.

    Raises
    ------
    PlacerError
        If there is no token, no id, or one at or past ``vocab_size``.
    """
    if tokens.num_tokens == 0:
        raise PlacerError(
            "no token is left to build a table from",
            "choose another --fold or --phase, or record more text",
        )
    if tokens.token_ids is None or tokens.token_ids.max() < 0:
        raise PlacerError(
            "the trace has no token ids: a table is indexed by them",
            "record with them: placer record MODEL --corpus FILE --out TRACE",
        )
    highest = int(tokens.token_ids.max())
    if highest >= vocab_size:
        raise PlacerError(
            f"the trace holds token id {highest}, but the vocabulary has {vocab_size} ids",
            "check that the trace is of this model: placer inspect TRACE",
        )
    return known_ids(tokens.token_ids, tokens.num_tokens, vocab_size)

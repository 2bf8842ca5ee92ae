"""Replicas of experts on ranks, as DeepSeek's EPLB makes and packs them.

Its rules are those of github.com/deepseek-ai/EPLB (README): further copies go to the expert
with the most load per copy; copies are packed by descending load, each to the least loaded
rank with a free slot. Here no rank gets two replicas of one expert, as engines need none.
"""

import numpy as np

from placer.arrays import BoolArray, FloatArray, IntArray


def num_copies(load: FloatArray, num_ranks: int, num_slots: int) -> IntArray:
    """Return ``[E]``: replicas of every expert, at most one per rank, heaviest first."""
    copies = np.ones(len(load), dtype=np.int64)
    for _ in range(num_slots - len(load)):
        copies[int(np.where(copies < num_ranks, load / copies, -1.0).argmax())] += 1
    return copies


def packed(load: FloatArray, num_ranks: int, num_slots: int) -> IntArray:
    """Return ``[P]``: the experts in the slots of the ranks, ascending on every rank.

    Parameters
    ----------
    load
        ``[E]``: pairs per expert.
    num_ranks, num_slots
        R, and P: a multiple of R, from E to E x R.
    """
    copies = num_copies(load, num_ranks, num_slots)
    holds = _pack(load / copies, copies, num_ranks, num_slots // num_ranks)
    return np.nonzero(holds.T)[1].astype(np.int64)


def _pack(
    load_per_copy: FloatArray, copies: IntArray, num_ranks: int, width: int
) -> BoolArray:
    """Return ``[E, R]``: whether a rank holds an expert, ``copies`` ranks for each."""
    holds = np.zeros((len(copies), num_ranks), dtype=np.bool_)
    total, num_held = np.zeros(num_ranks), np.zeros(num_ranks, dtype=np.int64)
    for expert in np.argsort(-load_per_copy, kind="stable"):
        for _ in range(copies[expert]):
            free = num_held < width
            allowed = free & ~holds[expert]
            if allowed.any():
                rank = int(np.where(allowed, total, np.inf).argmin())
                holds[expert, rank] = True
                total[rank] += load_per_copy[expert]
                num_held[rank] += 1
            else:
                _trade(holds, int(expert), int(free.argmax()), load_per_copy)
                total, num_held = load_per_copy @ holds, holds.sum(axis=0)
    return holds


def _trade(holds: BoolArray, expert: int, free: int, load_per_copy: FloatArray) -> None:
    """Give ``expert`` to a full rank, which gives another expert to the rank ``free``.

    The rank ``free`` has the expert already. There is always such a trade, as a full rank
    holds more experts than it; of all, the one with the least load on either rank.
    """
    total = load_per_copy @ holds
    given, rank = np.nonzero(holds & ~holds[:, [free]] & ~holds[expert])
    after = np.maximum(
        total[free] + load_per_copy[given],
        total[rank] - load_per_copy[given] + load_per_copy[expert],
    )
    best = int(after.argmin())
    holds[given[best], [free, rank[best]]] = True, False
    holds[expert, rank[best]] = True

"""Replicas of experts on ranks, as DeepSeek's EPLB makes and packs them.

Its rules are those of github.com/deepseek-ai/EPLB (README): further replicas go to the
expert with the most load per replica; replicas are packed by descending load, each to the
least loaded rank with a free slot. Here no rank gets two replicas of one expert, as engines
need none.
"""

import numpy as np

from placer.arrays import BoolArray, FloatArray, IntArray


def num_replicas(load: FloatArray, num_ranks: int, num_slots: int) -> IntArray:
    """Return ``[E]``: replicas of every expert, at most one per rank, heaviest first."""
    replicas = np.ones(len(load), dtype=np.int64)
    for _ in range(num_slots - len(load)):
        replicas[int(np.where(replicas < num_ranks, load / replicas, -1.0).argmax())] += 1
    return replicas


def packed(load: FloatArray, num_ranks: int, num_slots: int) -> IntArray:
    """Return ``[P]``: the experts in the slots of the ranks, ascending on every rank.

    Parameters
    ----------
    load
        ``[E]``: pairs per expert.
    num_ranks, num_slots
        R, and P: a multiple of R, from E to E x R.
    """
    replicas = num_replicas(load, num_ranks, num_slots)
    holds = _pack(load / replicas, replicas, num_ranks, num_slots // num_ranks)
    return np.nonzero(holds.T)[1].astype(np.int64)


def _pack(
    load_per_replica: FloatArray, replicas: IntArray, num_ranks: int, width: int
) -> BoolArray:
    """Return ``[E, R]``: whether a rank holds an expert, ``replicas`` ranks for each."""
    holds = np.zeros((len(replicas), num_ranks), dtype=np.bool_)
    total, num_held = np.zeros(num_ranks), np.zeros(num_ranks, dtype=np.int64)
    for expert in np.argsort(-load_per_replica, kind="stable"):
        for _ in range(replicas[expert]):
            free = num_held < width
            allowed = free & ~holds[expert]
            if allowed.any():
                rank = int(np.where(allowed, total, np.inf).argmin())
                holds[expert, rank] = True
                total[rank] += load_per_replica[expert]
                num_held[rank] += 1
            else:
                _trade(holds, int(expert), int(free.argmax()), load_per_replica)
                total, num_held = load_per_replica @ holds, holds.sum(axis=0)
    return holds


def _trade(holds: BoolArray, expert: int, free: int, load_per_replica: FloatArray) -> None:
    """Give ``expert`` to a full rank, which gives another expert to the rank ``free``.

    The rank ``free`` has the expert already. There is always such a trade, as a full rank
    holds more experts than it; of all, the one with the least load on either rank.
    """
    total = load_per_replica @ holds
    given, rank = np.nonzero(holds & ~holds[:, [free]] & ~holds[expert])
    after = np.maximum(
        total[free] + load_per_replica[given],
        total[rank] - load_per_replica[given] + load_per_replica[expert],
    )
    best = int(after.argmin())
    holds[given[best], [free, rank[best]]] = True, False
    holds[expert, rank[best]] = True

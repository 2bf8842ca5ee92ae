"""Clusters of requests: each goes whole to one rank, no rank far above its share.

Requests go in turn, the longest first, to the rank that serves most of them, and whose
requests so far they are most alike, of those with room (Sem-MoE, arXiv 2503.04398v5,
algorithm 1).
"""

import numpy as np
from numba import njit

from placer.arrays import FloatArray, IntArray


def place_requests(
    counts: FloatArray,
    served: FloatArray,
    max_imbalance: float = 1.0,
    likeness: float = 1.0,
) -> IntArray:
    """Give every request a rank.

    Parameters
    ----------
    counts
        ``[N, E]`` float64: pairs of each request with each expert.
    served
        ``[N, R]`` float64: how many of them each rank serves.
    max_imbalance
        Cap on a rank's pairs over the mean; a request that fits nowhere goes to the rank
        with the fewest.
    likeness
        Weight of the cosine between a request and the sum of a rank's requests, next to
        the share of the request that the rank serves.

    Returns
    -------
    ndarray
        ``[N]`` int64 ranks.
    """
    length = counts.sum(axis=1)
    order = np.argsort(-length, kind="stable")
    capacity = max_imbalance * length.sum() / served.shape[1]
    share = served / length[:, None]
    chosen: IntArray = _place(counts, length, order, share, capacity, likeness)
    return chosen


@njit(cache=True, nogil=True)
def _place(counts, length, order, to_experts, capacity, likeness):
    """Return ``[N]`` int64: each request's rank, most alike of those with room.

    ``to_experts`` ``[N, R]``: the share of a request's pairs that each rank serves.
    Likeness to the requests of a rank is the cosine of their sum.
    """
    num_ranks = to_experts.shape[1]
    filled = np.zeros(num_ranks)
    total = np.zeros((num_ranks, counts.shape[1]))
    chosen = np.zeros(len(length), dtype=np.int64)
    for request in order:
        row = counts[request]
        best, most = int(filled.argmin()), -1.0
        for rank in range(num_ranks):
            if filled[rank] + length[request] > capacity:
                continue
            score = to_experts[request, rank]
            size = np.sqrt((total[rank] ** 2).sum() * (row**2).sum())
            if size > 0:
                score += likeness * (total[rank] * row).sum() / size
            if score > most:
                best, most = rank, score
        chosen[request] = best
        filled[best] += length[request]
        total[best] += row
    return chosen

"""Scores of token ids for the home of a whole request.

A request keeps one home. So the score of an id is not about the id's own tokens, but about
the sequences that contain it, each counted once: the share of their pairs that each rank
could serve, minus that of all tokens. Frequent ids are in all sequences and say nothing;
rare ones show the topic. An id is shrunk towards 0, as if one more, average sequence
contained it. Summed over a prompt this is the score of naive Bayes, with shares instead of
logarithms.
"""

import numpy as np

from placer.arrays import FloatArray, IntArray
from placer.placement.placement import Placement
from placer.serving.layer_serving import LayerServing
from placer.trace import Chunk

# Average sequences added to the count of every id.
_SHRINKAGE = 1.0


def request_scores(
    placement: Placement, tokens: Chunk, token_row: IntArray, num_rows: int
) -> FloatArray:
    """Score ranks as the home of requests, by the ids in them.

    Parameters
    ----------
    placement
        Experts in slots.
    tokens
        The profile, whole sequences.
    token_row
        ``[T]`` int64: the row of each token's id, -1 where unknown.
    num_rows
        Number of rows.

    Returns
    -------
    ndarray
        ``[rows, R]`` in -1..1: mean share that each rank serves of the sequences that hold
        the id, less its share of all tokens.
    """
    _, sequence, lengths = np.unique(
        tokens.sequence_ids, return_inverse=True, return_counts=True
    )
    pairs = np.zeros((len(lengths), placement.num_ranks))
    top_k = 0
    for layer, chosen in enumerate(tokens.experts):
        experts = np.ascontiguousarray(chosen.T)
        serving = LayerServing.of(placement, layer)
        pairs += serving.count_held(experts, sequence, len(lengths))
        top_k += len(experts)
    above = pairs / (top_k * lengths)[:, None] - pairs.sum(axis=0) / (
        top_k * tokens.num_tokens
    )
    known = token_row >= 0
    held = np.unique(sequence[known] * num_rows + token_row[known])
    row = held % num_rows
    times = np.bincount(row, minlength=num_rows)
    total = np.empty((num_rows, placement.num_ranks))
    for rank, share in enumerate(above[held // num_rows].T):
        total[:, rank] = np.bincount(row, share, minlength=num_rows)
    scores: FloatArray = total / (times + _SHRINKAGE)[:, None]
    return scores

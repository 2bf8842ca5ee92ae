"""64-bit hashes that find repeated tokens, sequences and prefixes of sequences.

Two of n different things share a hash with a probability of about n^2 / 2^65: below one
in 100,000 for 10 million tokens.
"""

import numpy as np

from placer.arrays import HashArray, IntArray
from placer.trace.chunk import Chunk

# An odd 64-bit multiplier (Steele and Vigna, arXiv 2001.05304): arithmetic modulo 2^64.
_MULTIPLIER = np.uint64(0xD1342543DE82EF95)
_ONE = np.uint64(1)


def token_hash(chunk: Chunk) -> HashArray:
    """Return ``[T]`` uint64: equal where all layers list the same experts in one order."""
    digest = np.zeros(chunk.num_tokens, dtype=np.uint64)
    for ids in chunk.experts:
        for column in range(ids.shape[1]):
            digest = _mixed(digest * _MULTIPLIER + ids[:, column].astype(np.uint64))
    return digest


def expert_set_hash(chunk: Chunk) -> HashArray:
    """Return ``[T]`` uint64: equal where all layers use the same experts in any order.

    Where two weights are almost equal, rounding decides which expert is listed first.
    """
    digest = np.zeros(chunk.num_tokens, dtype=np.uint64)
    for ids in chunk.experts:
        chosen = _mixed((ids.astype(np.uint64) + _ONE) * _MULTIPLIER)
        digest = _mixed(digest * _MULTIPLIER + chosen.sum(axis=1, dtype=np.uint64))
    return digest


def sequence_hash(tokens: HashArray, starts: IntArray) -> HashArray:
    """Return ``[S]`` uint64: equal for sequences of equal token hashes in equal order."""
    lengths = np.diff(starts, append=len(tokens))
    return np.add.reduceat(_placed(tokens, starts, lengths), starts)


def prefix_hash(tokens: HashArray, starts: IntArray) -> HashArray:
    """Return ``[T]`` uint64: equal where all tokens of a sequence up to here are equal."""
    lengths = np.diff(starts, append=len(tokens))
    summed = np.cumsum(_placed(tokens, starts, lengths), dtype=np.uint64)
    before = np.concatenate([np.zeros(1, dtype=np.uint64), summed])[starts]
    return _mixed(summed - np.repeat(before, lengths))


def _placed(tokens: HashArray, starts: IntArray, lengths: IntArray) -> HashArray:
    """Make hashes depend on the place of the token in its sequence."""
    place = (np.arange(len(tokens)) - np.repeat(starts, lengths)).astype(np.uint64)
    return _mixed(tokens + place * _MULTIPLIER)


def _mixed(values: HashArray) -> HashArray:
    """Spread every bit over the word, so that sums do not cancel."""
    folded: HashArray = (values ^ (values >> np.uint64(32))) * _MULTIPLIER
    return folded ^ (folded >> np.uint64(29))

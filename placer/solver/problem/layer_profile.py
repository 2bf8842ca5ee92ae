"""A profile's tokens in one layer, as the search reads them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.arrays import IntArray
from placer.trace import Chunk

ExpertArray = npt.NDArray[np.int16]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerProfile:
    """The tokens of one layer, T of them, or fewer where equal ones are merged.

    Attributes
    ----------
    experts
        ``[T, k]`` int16 expert ids.
    weight
        ``[T]`` int64: tokens that a row stands for.
    starts, users
        ``[E + 1]`` and ``[T x k]`` int64: users[starts[e]:starts[e + 1]] are the rows that
        use expert e.
    """

    experts: ExpertArray
    weight: IntArray
    starts: IntArray
    users: IntArray

    @classmethod
    def of(cls, experts: ExpertArray, num_experts: int, *, merged: bool) -> "LayerProfile":
        """Index ``[T, k]`` tokens by expert.

        ``merged``: tokens with the same set of experts become one row, for a price that
        asks nothing else of a token. The top 4 of 32 experts leave a tenth of the rows.
        """
        weight = np.ones(len(experts), dtype=np.int64)
        if merged:
            experts, weight = _distinct(np.sort(experts, axis=1), num_experts)
        flat = experts.ravel()
        counts = np.bincount(flat, minlength=num_experts)
        order = np.argsort(flat, kind="stable")
        return cls(
            experts=experts,
            weight=weight.astype(np.int64),
            starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            users=(order // experts.shape[1]).astype(np.int64),
        )


def _distinct(experts: ExpertArray, num_experts: int) -> tuple[ExpertArray, IntArray]:
    """Return the distinct rows of ``[T, k]``, ascending, and how often each occurs."""
    bits = max(1, (num_experts - 1).bit_length())
    if bits * experts.shape[1] > 64:
        return np.unique(experts, axis=0, return_counts=True)
    # Numbers sort many times faster than rows.
    shifts = np.uint64(bits) * np.arange(experts.shape[1], dtype=np.uint64)[::-1]
    keys, times = np.unique(
        (experts.astype(np.uint64) << shifts).sum(axis=1), return_counts=True
    )
    rows = (keys[:, None] >> shifts) & np.uint64((1 << bits) - 1)
    return rows.astype(experts.dtype), times


def layer_tokens(tokens: Chunk) -> tuple[ExpertArray, ...]:
    """Return the expert ids of every layer, as the refinement reads them."""
    return tuple(np.ascontiguousarray(ids, dtype=np.int16) for ids in tokens.experts)

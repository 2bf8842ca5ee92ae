"""What the refinement reads of a profile's tokens in one layer."""

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
            experts, weight = np.unique(
                np.sort(experts, axis=1), axis=0, return_counts=True
            )
        flat = experts.ravel()
        counts = np.bincount(flat, minlength=num_experts)
        order = np.argsort(flat, kind="stable")
        return cls(
            experts=experts,
            weight=weight.astype(np.int64),
            starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            users=(order // experts.shape[1]).astype(np.int64),
        )


def layer_tokens(tokens: Chunk) -> tuple[ExpertArray, ...]:
    """Return the expert ids of every layer, as the refinement reads them."""
    return tuple(np.ascontiguousarray(ids, dtype=np.int16) for ids in tokens.experts)

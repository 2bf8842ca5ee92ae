"""What counts must add up to: a changed count of pairs breaks one of these sums.

Of k experts per token, an expert with load n is in n (k - 1) pairs of its layer, and in n k
pairs with the layer before or after it.
"""

from collections.abc import Sequence

import numpy as np

from placer.arrays import IntArray
from placer.errors import PlacerError


def require_consistent_pairs(
    top_k: int,
    num_tokens: int,
    load: Sequence[IntArray],
    transition: Sequence[IntArray],
    coactivation: Sequence[IntArray],
) -> None:
    """Refuse counts of pairs that contradict loads, or each other.

    Parameters
    ----------
    top_k
        Experts per token, k.
    num_tokens
        Tokens counted.
    load, transition, coactivation
        As in :class:`~placer.affinity.affinity.Affinity`.

    Raises
    ------
    PlacerError
        With tensor, layer, expert and both values.
    """
    for layer, counts in enumerate(load):
        if (found := int(counts.sum())) != num_tokens * top_k:
            raise PlacerError(
                f"load.{layer} adds up to {found}, but {num_tokens} tokens of {top_k} "
                f"experts make {num_tokens * top_k}"
            )
    for layer, counts in enumerate(coactivation):
        name = f"coactivation.{layer}"
        for one, other in np.argwhere(counts != counts.T)[:1].tolist():
            raise PlacerError(
                f"{name} is not symmetric: {counts[one, other]} for experts {one}, "
                f"{other}, but {counts[other, one]} for {other}, {one}"
            )
        for expert in np.flatnonzero(counts.diagonal())[:1].tolist():
            raise PlacerError(
                f"{name} has {counts[expert, expert]} for experts {expert}, {expert}, "
                "expected 0"
            )
        _require_sums(name, "row", counts.sum(axis=1), load[layer] * (top_k - 1))
    for layer, counts in enumerate(transition):
        name = f"transition.{layer}"
        _require_sums(name, "row", counts.sum(axis=1), load[layer] * top_k)
        _require_sums(name, "column", counts.sum(axis=0), load[layer + 1] * top_k)


def _require_sums(name: str, what: str, found: IntArray, expected: IntArray) -> None:
    for expert in np.flatnonzero(found != expected)[:1].tolist():
        raise PlacerError(
            f"{name}, {what} {expert} adds up to {found[expert]}, but the load of the "
            f"expert requires {expected[expert]}"
        )

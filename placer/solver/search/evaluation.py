"""The cost of a placement on the profile, and which of two placements is better.

Legend of the shapes: L MoE layers, T tokens, R ranks.
"""

from dataclasses import dataclass

import numpy as np

from placer.arrays import BoolArray, FloatArray, IntArray
from placer.placement.placement import Placement

#: Pairs, or copies squared; sums of the shares of replicas and homes differ by rounding.
SAME_OVERFLOW = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluation:
    """The cost of a placement on the profile.

    Attributes
    ----------
    copies
        Price of the copies, per token and MoE layer.
    price
        The same with all else that is priced: other loads, the busiest receiver,
        homes and moves.
    price_of_layer
        ``[L]``: the layers' parts of that price, times R x the tokens.
    overflow
        ``[2, L]``: pairs of the profile above the load cap; squares of the copies that a
        rank receives above the cap on those.
    imbalance
        ``[L]``: max/mean rank load, each copy serving as often as the homes ask it to.
    most_received_copies
        ``[L]``: R x the copies that the busiest rank receives, per token.
    """

    copies: float
    price: float
    price_of_layer: FloatArray
    overflow: FloatArray
    imbalance: FloatArray
    most_received_copies: FloatArray

    def is_better(self, other: "Evaluation") -> bool:
        """Return whether this one is nearer to the caps or, if equally near, costs less."""
        return is_better(
            self.overflow.sum(axis=1), self.price, other.overflow.sum(axis=1), other.price
        )

    def better_layers(self, other: "Evaluation") -> BoolArray:
        """Return ``[L]``: where this one is the better of the two, layer by layer."""
        layers = range(len(self.price_of_layer))
        return np.array(
            [
                is_better(
                    self.overflow[:, n],
                    self.price_of_layer[n],
                    other.overflow[:, n],
                    other.price_of_layer[n],
                )
                for n in layers
            ]
        )

    def missed_load_cap(self) -> dict[int, float]:
        """Return what the layers above the cap on load reach, over the mean."""
        missed = np.flatnonzero(self.overflow[0] > SAME_OVERFLOW)
        return {int(layer): float(self.imbalance[layer]) for layer in missed}

    def missed_receive_cap(self) -> dict[int, float]:
        """Return what the layers above the cap on received copies reach."""
        missed = np.flatnonzero(self.overflow[1] > SAME_OVERFLOW)
        return {int(layer): float(self.most_received_copies[layer]) for layer in missed}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rated:
    """A placement and its cost with the homes or draws that follow from it.

    Attributes
    ----------
    placement
        Experts in slots.
    cost
        On the profile.
    homes
        L arrays ``[T]`` of homes by the placement's own tables; empty without tables.
    """

    placement: Placement
    cost: Evaluation
    homes: tuple[IntArray, ...] = ()


def is_better(
    overflow: FloatArray, price: float, other_overflow: FloatArray, other_price: float
) -> bool:
    """Compare ``[2]`` excesses above each cap first, then the price."""
    for one, other in zip(overflow, other_overflow, strict=True):
        if abs(one - other) > SAME_OVERFLOW:
            return bool(one < other)
    return price < other_price

"""Splitting the experts of some layers into groups of equal slots, as it is relaxed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from placer.arrays import FloatArray

#: Two layers, the first not after the second.
Block = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupingProblem:
    """Split the experts of every layer into equal groups and keep weight together.

    Attributes
    ----------
    num_groups
        G: ranks, or nodes.
    weight
        By layers (l, m), l <= m, m at most l + 1: ``[E_l, E_m]`` float64, the value of
        two experts in one group. Every layer has its own block (l, l), symmetric; there
        each unordered pair counts once.
    load
        L arrays ``[E]`` of whole numbers.
    max_load
        ``[L]``: most load of a group; some placement meets it.
    """

    num_groups: int
    weight: Mapping[Block, FloatArray]
    load: Sequence[FloatArray]
    max_load: Sequence[float]

    def slots(self, layer: int) -> int:
        """Experts that each group holds in a layer."""
        return len(self.load[layer]) // self.num_groups

    def load_range(self, layer: int) -> tuple[float, float] | None:
        """Return the least and most load of a group, or ``None`` if nothing is capped."""
        load, cap = np.sort(self.load[layer]), self.max_load[layer]
        slots = self.slots(layer)
        if load[-slots:].sum() <= cap:
            return None
        left = float(load.sum()) - (self.num_groups - 1) * cap
        return max(left, float(load[:slots].sum())), cap

    def most_squares(self, layer: int) -> float | None:
        """Return the most that squared loads of groups add up to, ``None`` if uncapped.

        A convex sum is largest with all but one of the loads at an end of their range.
        """
        between = self.load_range(layer)
        if between is None:
            return None
        least, cap = between
        spare = float(self.load[layer].sum()) - self.num_groups * least
        full = int(spare // (cap - least)) if cap > least else 0
        one = least + spare - full * (cap - least)
        others = self.num_groups - full - 1
        return full * cap**2 + (one**2 + others * least**2 if others >= 0 else 0.0)

    def may_share(self, layer: int) -> FloatArray:
        """Return ``[E, E]``: 0 where two experts cannot share a group, else 1.

        Two experts cannot if they overload it even with the lightest companions.
        """
        load, slots = self.load[layer], self.slots(layer)
        may = np.ones((len(load), len(load)))
        if slots == 1:
            may[:] = 0.0
        else:
            lightest = np.sort(load)[: slots - 2].sum()
            may[load[:, None] + load + lightest > self.max_load[layer]] = 0.0
        np.fill_diagonal(may, 1.0)
        return may

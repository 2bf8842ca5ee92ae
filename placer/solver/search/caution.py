"""Meeting load caps if the serving replicas are known only after all experts are placed.

The homes of tables depend on the placement: under new ones, replicas serve otherwise than
while experts moved, and so they do where SGLang draws. Copies are then counted as if they
served more of their expert's load than their share; a layer that is under the cap with all
of it counted is so under any home and any draw.

Legend of the shapes: L MoE layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np

from placer.arrays import BoolArray, FloatArray
from placer.run.deadline import Deadline
from placer.solver.params import SolverParams
from placer.solver.search.evaluation import SAME_OVERFLOW, Evaluation, Rated


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Caution:
    """How much of its expert's load a replica counts beyond its share.

    Attributes
    ----------
    share
        ``[L]``, from 0 to 1.
    was_above
        ``[L]``: whether a layer has been above the load cap, under less caution.
    """

    share: FloatArray
    was_above: BoolArray

    @classmethod
    def of_share(cls, share: FloatArray) -> Self:
        """Return a caution ``[L]`` to begin with, before any layer was above its cap."""
        return cls(share=share, was_above=np.zeros(len(share), dtype=np.bool_))

    def adapted(self, reached: Evaluation, least: float) -> "Caution":
        """Return twice the share, the ``least`` from none, where a layer is above the cap.

        Half of it where a layer never was.
        """
        above = is_above(reached)
        was_above = self.was_above | above
        kept = np.where(was_above, self.share, self.share / 2)
        more = np.clip(2 * self.share, least, 1.0)
        return Caution(share=np.where(above, more, kept), was_above=was_above)


def kept_under_cap(
    best: Rated,
    repaired: Callable[[Rated, BoolArray, float, int], Rated],
    params: SolverParams,
    deadline: Deadline,
) -> Rated:
    """Repair a placement with replicas until its served loads are under all caps.

    Parameters
    ----------
    best
        A placement and what it costs by what follows from it.
    repaired
        Repairs ``[L]`` layers under a share of caution, in the round of a number.
    params
        Which shares of caution, one after the other.
    deadline
        No round begins after it; where the search was stopped before, rounds go on as long
        as they help.

    Returns
    -------
    Rated
        The best of all rounds; above a cap where none is under it.
    """
    with deadline.interruptible():
        for number, share in enumerate(params.cautions_of_repairs):
            above = is_above(best.cost)
            if not above.any() or deadline.left() == 0.0:
                break
            found = repaired(best, above, share, number)
            if found.cost.is_better(best.cost):
                best = found
            elif deadline.passed():
                break
    return best


def is_above(reached: Evaluation) -> BoolArray:
    """Return ``[L]``: which layers are above the load cap, or that on received copies."""
    above: BoolArray = np.any(reached.overflow > SAME_OVERFLOW, axis=0)
    return above

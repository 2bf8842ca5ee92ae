"""Load caps met where who serves is known only once all experts are placed.

The homes of tables depend on the placement: under new ones, copies serve otherwise than
while experts moved. Where that is above a cap, copies are counted as if they served more of
their expert's load than their share, until it is not; at the most all of it, and no home
can break the cap.

Legend of the shapes: L MoE layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from placer.plan.deadline import Deadline
from placer.plan.evaluation import SAME_OVERFLOW, Evaluation, Rated

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_LEAST_SHARE = 0.1
_MOST_ROUNDS = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Caution:
    """How much of its expert's load a copy counts beyond what it serves.

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
    def of_share(cls, share: float, num_layers: int) -> Self:
        """Return the same caution in all layers, before any was above its cap."""
        return cls(
            share=np.full(num_layers, share),
            was_above=np.zeros(num_layers, dtype=np.bool_),
        )

    def adapted(self, reached: Evaluation) -> "Caution":
        """Return twice the share where a layer is above the cap, half where none was."""
        was_above = self.was_above | is_above(reached)
        kept = np.where(was_above, self.share, self.share / 2)
        return Caution(share=raised(kept, reached), was_above=was_above)


def kept_under_cap(
    found: Rated,
    mended: Callable[[Rated, FloatArray, int], Rated],
    deadline: Deadline,
) -> Rated:
    """Mend a placement with replicas until all layers are under the cap by who serves.

    Parameters
    ----------
    found
        A placement and what it costs, whoever serves it.
    mended
        Mends the layers above a cap under a caution ``[L]``, in the round of a number.
    deadline
        After it, layers above the cap get all caution at once.

    Returns
    -------
    Rated
        The best of all rounds; above a cap where none is under it.
    """
    best = found
    share = np.zeros(len(found.cost.imbalance))
    with deadline.interruptible():
        for number in range(_MOST_ROUNDS):
            if not is_above(found.cost).any():
                break
            share = raised(share, found.cost, at_once=deadline.passed())
            found = mended(found, share, number)
            if found.cost.is_better(best.cost):
                best = found
    return best


def raised(share: FloatArray, reached: Evaluation, *, at_once: bool = False) -> FloatArray:
    """Return ``[L]``: twice the share, or all, in the layers above the load cap."""
    more = 1.0 if at_once else np.clip(2 * share, _LEAST_SHARE, 1.0)
    return np.where(is_above(reached), more, share)


def is_above(reached: Evaluation) -> BoolArray:
    """Return ``[L]``: which layers are above the load cap."""
    above: BoolArray = reached.overflow[0] > SAME_OVERFLOW
    return above

"""Prices of ranks, so that no home has too many tokens.

Homes that are chosen only by rate crowd a few ranks, and attention waits for the fullest.
Each rank of a layer has a price, and a token takes the home of the highest rate minus
price. Prices rise where there are more tokens than the cap allows, and fall again, but not
below 0, where there are fewer (an auction, Bertsekas 1979): ranks under the cap cost
nothing, so no token leaves a home for more evenness than was asked.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from placer.arrays import AnyArray, FloatArray
from placer.errors import UsageError

# Prices move by this much of a rate per unit of imbalance, less from round to round, and
# towards a share of the cap's distance to 1, so that they reach the cap itself.
_STEP = 0.1
_AIM = 0.96
_DECAY = 0.97
_ROUNDS = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class EvenHomes:
    """How even the homes of every layer of a table must be.

    Attributes
    ----------
    num_ranks
        R.
    max_home_imbalance
        Cap, above 1, on the tokens of the fullest home over the mean; ``None``: none.

    Raises
    ------
    UsageError
        If the cap is out of range.
    """

    num_ranks: int
    max_home_imbalance: float | None

    def __post_init__(self) -> None:
        cap = self.max_home_imbalance
        if cap is not None and not 1 < cap < np.inf:
            raise UsageError(
                f"--max-home-imbalance must be above 1, got {cap}",
                "choose for example --max-home-imbalance 1.3",
            )

    @property
    def has_cap(self) -> bool:
        """Whether there is a cap."""
        return self.max_home_imbalance is not None

    def prices(self, homes: Callable[[FloatArray], AnyArray]) -> FloatArray:
        """Return ``[R]``: the first prices that keep the cap, else the most even ones.

        Without a cap all are 0. ``homes`` returns the profile's homes ``[T]`` at prices.
        """
        num_ranks, cap = self.num_ranks, self.max_home_imbalance
        price = best_price = np.zeros(num_ranks)
        if cap is None:
            return price
        aim = 1 + _AIM * (cap - 1)
        lowest = np.inf
        for step in _STEP * _DECAY ** np.arange(_ROUNDS):
            home = homes(price)
            crowd = np.bincount(home, minlength=num_ranks) * num_ranks / len(home)
            if crowd.max() < lowest:
                lowest, best_price = crowd.max(), price
            if lowest <= cap:
                break
            price = np.maximum(price + step * (crowd - aim), 0)
        return best_price

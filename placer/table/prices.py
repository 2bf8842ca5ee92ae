"""Prices of ranks, so that no home has too many tokens.

Homes that are chosen only by rate crowd a few ranks, and attention waits for the fullest.
Each rank of a layer has a price, and a token takes the home of the highest rate minus
price. Prices rise where there are more tokens than the cap allows, and fall again, but not
below 0, where there are fewer (an auction, Bertsekas 1979): ranks under the cap cost
nothing, so no token leaves a home for more evenness than was asked.
"""

from collections.abc import Callable

import numpy as np

from placer.arrays import AnyArray, FloatArray

# Prices move by this much of a rate per unit of imbalance, less from round to round, and
# towards a share of the cap's distance to 1, so that they reach the cap itself.
_STEP = 0.1
_AIM = 0.96
_DECAY = 0.97
_ROUNDS = 120


def even_prices(
    homes: Callable[[FloatArray], AnyArray],
    num_ranks: int,
    max_home_imbalance: float | None,
) -> FloatArray:
    """Return ``[R]``: the first prices that keep the cap, else the most even ones.

    Parameters
    ----------
    homes
        Returns the profile's homes ``[T]`` at prices.
    num_ranks
        R.
    max_home_imbalance
        Cap on the tokens of the fullest home over the mean; ``None``: prices of 0.
    """
    price = best_price = np.zeros(num_ranks)
    if max_home_imbalance is None:
        return price
    aim = 1 + _AIM * (max_home_imbalance - 1)
    lowest = np.inf
    for step in _STEP * _DECAY ** np.arange(_ROUNDS):
        home = homes(price)
        crowd = np.bincount(home, minlength=num_ranks) * num_ranks / len(home)
        if crowd.max() < lowest:
            lowest, best_price = crowd.max(), price
        if lowest <= max_home_imbalance:
            break
        price = np.maximum(price + step * (crowd - aim), 0)
    return best_price

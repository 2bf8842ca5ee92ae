"""Prices of ranks: no more tokens move than the cap asks for."""

import numpy as np

from placer.table.prices import EvenHomes


def test_only_the_rank_above_the_cap_has_a_price_and_only_the_excess_leaves():
    """Of 90 tokens 60 prefer rank 0, by 0.001 to 0.06; 25 rank 1 and 5 rank 2 for sure."""
    rates = np.zeros((90, 3))
    rates[:60, 0] = 0.5 + np.arange(1, 61) / 1000
    rates[:60, 1] = 0.5
    rates[60:85, 1] = rates[85:, 2] = 1.0

    def homes(price):
        return (rates - price).argmax(axis=1)

    def prices(cap):
        return EvenHomes(num_ranks=3, max_home_imbalance=cap).prices(homes)

    price = prices(1.5)
    assert price[0] > 0
    assert price[1:].tolist() == [0, 0]
    assert 42 <= (homes(price) == 0).sum() <= 45  # 1.5 x 30, and not many fewer
    assert (homes(price)[:60] == 2).sum() == 0
    assert prices(2.0).tolist() == [0, 0, 0]
    assert prices(None).tolist() == [0, 0, 0]

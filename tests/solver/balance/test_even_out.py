"""Moves that even out a layer, against what they must keep and what is lost by hand."""

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from placer.placement.placement import holders
from placer.solver.balance.even_out import EvenOut, MoveCost
from placer.solver.balance.packing import packed


def most_load(row: np.ndarray, load: np.ndarray, num_ranks: int) -> float:
    share = load / np.bincount(row, minlength=len(load))
    return float(share[row].reshape(num_ranks, -1).sum(axis=1).max())


@settings(max_examples=80, deadline=None)
@given(
    load=st.lists(st.integers(0, 90), min_size=4, max_size=10),
    num_ranks=st.integers(2, 5),
    more=st.integers(0, 2),
)
def test_slots_stay_valid_and_no_rank_gets_busier(
    load: list[int], num_ranks: int, more: int
) -> None:
    width = -(-len(load) // num_ranks) + more
    assume(width <= len(load))
    loads = np.asarray(load, dtype=float)
    row = packed(loads, num_ranks, num_ranks * width)
    even = EvenOut(row, loads, num_ranks).run()
    assert set(even.row.tolist()) == set(range(len(load)))
    assert all(len(set(held)) == width for held in even.row.reshape(num_ranks, -1).tolist())
    assert np.isclose(even.most_load, most_load(even.row, loads, num_ranks))
    assert even.most_load <= most_load(row, loads, num_ranks) * (1 + 1e-9)


def test_a_copy_in_the_place_of_a_useless_one() -> None:
    """Expert 3 has two copies of load 1: one of expert 0 does more there."""
    load, row = np.array([60.0, 20, 20, 2]), np.array([0, 3, 1, 2, 3, 2])
    even = EvenOut(row, load, 3).run()
    assert most_load(row, load, 3) == 61
    assert even.most_load == 40, "60 / 3 + 20, or 60 / 2 + 20 / 2: there is no better"


def test_moves_pay_for_themselves() -> None:
    """Two swaps lower the busiest rank from 40 to 28 by 10 and then by 2."""
    load = np.array([21.0, 19, 10, 9, 9, 8, 6, 2])
    row = np.arange(8)
    start = holders(row, 8, 2)

    def moved(price: float, most: float = np.inf) -> tuple[int, float]:
        cost = MoveCost(start=start, price=price, most_load=most)
        even = EvenOut(row, load, 2, move_cost=cost).run()
        return int((holders(even.row, 8, 2) & ~start).sum()), even.most_load

    assert moved(100) == (0, 59)
    free = moved(0)
    assert free[1] == 42, "an even share"
    for price in (1, 3, 8):
        number, most = moved(price)
        assert most + price * number <= 59, "what was paid came back"
    assert moved(100, 50.0)[1] <= 50, "above the cap moves cost nothing"


def test_copies_that_serve_more_than_their_share_stay() -> None:
    """Rank 0 serves nine tenths of expert 0, so the others give way."""
    load = np.array([40.0, 12, 11, 10, 9, 8])
    row = np.array([0, 1, 2, 5, 0, 3, 4, 5])
    served = np.zeros((6, 2))
    served[0], served[5] = (36, 4), (4, 4)
    even = EvenOut(row, load, 2, served=served).run()
    ranks = even.row.reshape(2, -1)
    assert all({0, 5} <= set(held.tolist()) for held in ranks)
    # 36 + 4 and the lightest two, 10 and 9, beside 4 + 4 + 12 + 11: no swap is better.
    assert even.most_load == 59

"""The program of copies and ranks, against all contents of the slots that there are."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from placer.run.deadline import Deadline
from placer.solver.balance.exact_balance import exact_balance, is_small
from placer.solver.balance.packing import packed


def least_load(load: list[int], num_ranks: int, width: int) -> float:
    """The least busiest rank over every content of the slots."""
    best = np.inf
    held = list(itertools.combinations(range(len(load)), width))
    for ranks in itertools.combinations_with_replacement(held, num_ranks):
        copies = np.bincount(np.ravel(ranks), minlength=len(load))
        if copies.min():
            share = np.asarray(load) / copies
            best = min(best, max(float(share[list(one)].sum()) for one in ranks))
    return best


@settings(max_examples=10, deadline=None)
@given(
    load=st.lists(st.integers(0, 60), min_size=4, max_size=5),
    shape=st.sampled_from([(3, 2), (4, 2), (2, 3), (3, 3)]),
)
def test_the_optimum_of_every_content(load: list[int], shape: tuple[int, int]) -> None:
    """Of ranks with two slots by columns, of others by ranks."""
    num_ranks, width = shape
    loads, num_slots = np.asarray(load, dtype=float), num_ranks * width
    assume(num_slots >= len(load) and width <= len(load))
    start = packed(loads, num_ranks, num_slots)
    found = exact_balance(loads, start, num_ranks, 20.0, Deadline())
    best = least_load(load, num_ranks, width)
    share = loads / np.bincount(found.row, minlength=len(load))
    reached = share[found.row].reshape(num_ranks, -1).sum(axis=1).max()
    assert reached == pytest.approx(best)
    assert found.proved_max_load == pytest.approx(best)


def test_flashlb_s_instance() -> None:
    """560 / 3 + 10 on the busiest; EPLB has 120 + 112 there."""
    load = np.array([600.0, 560, 120, 120, 20, 10, 10, 10])
    start = packed(load, 8, 16)
    share = load / np.bincount(start)
    assert share[start].reshape(8, 2).sum(axis=1).max() == 232
    found = exact_balance(load, start, 8, 20.0, Deadline())
    share = load / np.bincount(found.row)
    assert share[found.row].reshape(8, 2).sum(axis=1).max() == pytest.approx(560 / 3 + 10)
    assert found.proved_max_load == pytest.approx(560 / 3 + 10)


def test_a_deadline_leaves_what_is_known() -> None:
    load = np.array([600.0, 560, 120, 120, 20, 10, 10, 10])
    start = packed(load, 8, 16)
    found = exact_balance(load, start, 8, 20.0, Deadline(seconds=0.0))
    assert (found.row == start).all()
    assert found.proved_max_load <= 560 / 3 + 10


def test_what_is_small() -> None:
    assert is_small(8, 8, 16)
    assert is_small(16, 4, 20)
    assert not is_small(256, 32, 288)

"""Load caps: what arithmetic proves of them, against all placements there are."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import NoSolutionError
from placer.placement.topology import Topology
from placer.run.deadline import Deadline
from placer.solver.balance import load_caps as balance
from placer.solver.balance.load_caps import balance_layer, least_max_load, load_caps
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions

LOADS = st.lists(st.integers(0, 50), min_size=6, max_size=6)


def least_of_all(load: np.ndarray, num_ranks: int) -> float:
    """The least load of the busiest rank, over every placement with equal slots."""
    width = len(load) // num_ranks
    return min(
        load[list(order)].reshape(num_ranks, width).sum(axis=1).max()
        for order in itertools.permutations(range(len(load)))
    )


@settings(max_examples=30, deadline=None)
@given(load=LOADS, num_ranks=st.sampled_from([1, 2, 3, 6]))
def test_no_placement_is_below_the_least_load(load: list[int], num_ranks: int) -> None:
    given_load = np.asarray(load, float)
    assert least_max_load(given_load, num_ranks) <= least_of_all(given_load, num_ranks)


@pytest.mark.parametrize(
    ("load", "num_ranks", "least"),
    [
        ([90, 1, 5, 4], 2, 91),  # the heaviest needs a neighbour: the lightest
        ([9, 8, 7, 1, 1, 1], 3, 10),
        ([9, 9, 9, 1], 2, 18),  # two of three heavy ones share a rank
        ([5, 5, 5, 5], 2, 10),  # an even share
    ],
)
def test_the_least_load_by_hand(load: list[int], num_ranks: int, least: int) -> None:
    assert least_max_load(np.asarray(load, float), num_ranks) == least


def test_what_arithmetic_proves_is_not_searched_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One expert above the cap decides it, whatever the others are."""
    monkeypatch.setattr(balance, "_minimise_max_load", None)
    load = np.r_[5000.0, np.random.default_rng(0).integers(10, 90, 127)]
    found = balance_layer(load, 16, max_load=600.0)
    alone = 5000 + np.sort(load)[:7].sum()
    assert found.max_load == found.proved_max_load == alone


def test_no_time_is_left_for_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "_minimise_max_load", None)
    load = np.asarray([453, 248, 367, 310, 264, 315, 328, 383], float)
    late = Deadline(seconds=0.0)
    options = SolveOptions(
        topology=Topology(gpus_per_node=2), goal=Goal(caps=Caps(max_imbalance=1.0))
    )
    with pytest.raises(NoSolutionError, match="when the search was stopped"):
        load_caps([load], options, late)
    assert late.stopped

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
from placer.solver.balance.load_caps import (
    balance_layer,
    greedy_balance,
    least_max_load,
    load_caps,
)
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions

GPT_OSS_LAYER_12 = [
    328, 9534, 343, 12958, 619, 596, 7137, 3121, 2077, 195, 510, 6482,
    4680, 4039, 8095, 5506, 669, 4519, 2061, 6639, 34, 6975, 606, 9917,
    12470, 6889, 3396, 517, 6094, 780, 7371, 3083,
]  # fmt: skip
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


@settings(max_examples=30, deadline=None)
@given(load=LOADS)
def test_two_on_each_rank_reach_the_least_load(load: list[int]) -> None:
    given_load = np.asarray(load, float)
    assert least_max_load(given_load, 3) == least_of_all(given_load, 3)
    found = balance_layer(given_load, 3, max_load=0.0)
    assert found.max_load == found.proved_max_load == least_of_all(given_load, 3)


@settings(max_examples=30, deadline=None)
@given(load=st.lists(st.integers(0, 50), min_size=8, max_size=8))
def test_swaps_of_one_and_two_split_eight_experts_best(load: list[int]) -> None:
    """Every other split into two halves is one such swap away, but for the ranks' names."""
    given_load = np.asarray(load, float)
    splits = itertools.combinations(range(8), 4)
    halves = [given_load[list(half)].sum() for half in splits]
    least = min(max(half, given_load.sum() - half) for half in halves)
    ranks = balance._swap_pairs_down(given_load, greedy_balance(given_load, 2), 2)
    assert np.bincount(ranks).tolist() == [4, 4]
    assert np.bincount(ranks, weights=given_load).max() == least


def test_ranks_that_wait_are_changed_to_free_the_busiest() -> None:
    """Loads of a layer of gpt-oss-20b: no swap with the busiest rank lowers its load."""
    load = np.asarray(GPT_OSS_LAYER_12, float)
    stuck = balance._swap_down(load, greedy_balance(load, 8), 8)
    ranks = balance._swap_pairs_down(load, stuck, 8)
    mean = load.sum() / 8
    assert np.bincount(stuck, weights=load).max() > 1.015 * mean
    assert np.bincount(ranks, weights=load).max() < 1.003 * mean


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


def test_a_search_that_ends_above_its_start_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CP-SAT need not begin at the hint: here it knows only the heaviest four together."""

    class Stopped:
        best_objective_bound = 0.0

        def solve(self, model: object) -> int:
            from ortools.sat.python import cp_model

            return cp_model.FEASIBLE

        def boolean_value(self, variable: object) -> bool:
            _, expert, _, rank = str(variable).split("_")
            return int(expert) // 4 == int(rank)

    load = np.asarray([97, 89, 83, 79, 43, 41, 37, 29], float)
    monkeypatch.setattr(balance, "repeatable_solver", lambda *_: Stopped())
    found = balance_layer(load, 2, max_load=0.0)
    splits = itertools.combinations(load, 4)
    assert found.max_load == min(max(sum(one), load.sum() - sum(one)) for one in splits)

"""Balancing by loads alone, against all placements there are."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.affinity import Affinity
from placer.errors import NoSolutionError, PlacerError, UsageError
from placer.model import ModelSpec
from placer.plan.load_balance import balance_loads
from placer.plan.options import SolveOptions
from placer.plan.problem import Topology, placement_problem
from placer.plan.solve import solve

LOADS = st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(any)


def best_imbalance(load: list[int], num_slots: int) -> float:
    """The least max/mean of two ranks over every content of their slots."""
    width, best = num_slots // 2, np.inf
    held = list(itertools.combinations(range(len(load)), width))
    for one, two in itertools.product(held, held):
        copies = [(e in one) + (e in two) for e in range(len(load))]
        if min(copies) == 0:
            continue
        totals = [sum(load[e] / copies[e] for e in rank) for rank in (one, two)]
        best = min(best, max(totals) / (sum(load) / 2))
    return best


@settings(max_examples=60, deadline=None)
@given(load=LOADS, redundant_experts=st.sampled_from([0, 2, 4]))
def test_two_ranks_are_within_a_percent_of_the_best(
    load: list[int], redundant_experts: int
) -> None:
    found = balance_loads([np.asarray(load, float)], 2, 1, redundant_experts)
    best = best_imbalance(load, 4 + redundant_experts)
    assert found.bound[0] <= best + 1e-9
    assert found.imbalance[0] >= best - 1e-9
    if redundant_experts == 0:
        assert found.imbalance[0] <= best * 1.01 + 1e-9, "within the stated closeness"
    if redundant_experts == 4:
        assert found.imbalance[0] == 1, "each rank holds a copy of each expert"
    row = found.placement.physical_to_logical_map[0]
    copies = np.bincount(row, minlength=4)
    totals = (np.asarray(load) / copies)[row].reshape(2, -1).sum(axis=1)
    assert found.imbalance[0] == pytest.approx(totals.max() / totals.mean())


def test_a_cap_that_can_be_reached_is() -> None:
    """Though less than a percent above the bound is even enough without one."""
    load = np.asarray([453, 248, 367, 310, 264, 315, 328, 383], float)
    least = min(
        max(sum(load[list(held)]), load.sum() - sum(load[list(held)]))
        for held in itertools.combinations(range(8), 4)
    ) / (load.sum() / 2)
    assert 1 < least <= 1.002 < balance_loads([load], 2).imbalance[0]
    assert balance_loads([load], 2, max_imbalance=1.002).imbalance[0] <= 1.002
    out_of_reach = balance_loads([load], 2, max_imbalance=1.0)
    assert out_of_reach.imbalance[0] == out_of_reach.bound[0] == pytest.approx(least)


def test_copies_make_one_hot_expert_bearable() -> None:
    load = np.asarray([70, 10, 10, 10, 10, 10, 10, 10], float)
    alone = balance_loads([load], 4)
    assert alone.imbalance[0] == pytest.approx(80 / 35)
    assert alone.bound[0] == pytest.approx(80 / 35), "proved: it needs a neighbour"
    assert balance_loads([load], 4, 1, 4).imbalance[0] < 1.2


def loads_alone(load: list[int]) -> Affinity:
    return Affinity(
        model=ModelSpec(num_experts=(len(load),), top_k=1),
        num_tokens=sum(load),
        load=(np.asarray(load, dtype=np.int64),),
        transition=(),
        coactivation=(),
        token_expert=None,
        sequence_expert=None,
        provenance={},
    )


def options(**changes: object) -> SolveOptions:
    topology = Topology(num_nodes=1, gpus_per_node=2)
    return replace(SolveOptions(topology=topology), **changes)


def test_loads_alone_are_solved_for_balance_with_a_bound() -> None:
    placement, report = solve(loads_alone([9, 1, 5, 5]), options())
    assert sorted(placement.physical_to_logical_map[0][:2].tolist()) in ([0, 1], [2, 3])
    assert (report.status, report.objective, report.gap) == ("optimal", 1.0, 0.0)
    assert report.objective_name.startswith("imbalance")


def test_a_cap_out_of_reach_is_told_or_relaxed() -> None:
    hot = loads_alone([90, 1, 5, 4])
    with pytest.raises(NoSolutionError, match=r"worst 1\.82"):
        solve(hot, options(max_imbalance=1.1))
    for asked in ({"max_imbalance": 1.1, "relax_cap": True}, {}):
        _, report = solve(hot, options(**asked))
        assert report.relaxed_layers == {"0": pytest.approx(1.82)}


def test_what_needs_links_is_refused() -> None:
    with pytest.raises(UsageError, match="--policy follow needs tokens"):
        solve(loads_alone([1, 1]), options(policy="follow"))
    with pytest.raises(UsageError, match="--robust needs tokens"):
        solve(loads_alone([1, 1]), options(robust="bootstrap"))
    with pytest.raises(PlacerError, match="loads alone say nothing"):
        placement_problem(loads_alone([1, 1]), "fixed", options().topology, [2.0])

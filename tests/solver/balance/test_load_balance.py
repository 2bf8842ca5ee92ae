"""Balancing by loads alone, against all placements there are."""

import itertools
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.affinity import Affinity
from placer.errors import NoSolutionError, PlacerError, UsageError
from placer.model import ModelSpec
from placer.placement.migration import num_moved
from placer.placement.topology import Topology
from placer.serving.replica_choice import serving_layers
from placer.solver.balance.layer_balance import Balancing
from placer.solver.balance.load_balance import LoadBalance, balance_loads
from placer.solver.balance.packing import packed
from placer.solver.balance.router_groups import are_whole
from placer.solver.options import SolveOptions
from placer.solver.problem.pairs import placement_problem
from placer.solver.solve import solve
from tests.plans import changed

LOADS = st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(any)


def balanced(
    loads: list[np.ndarray], num_ranks: int, redundant_experts: int = 0, **asked: Any
) -> LoadBalance:
    return balance_loads(
        loads,
        Balancing(num_ranks=num_ranks, redundant_experts=redundant_experts, **asked),
    )


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
    found = balanced([np.asarray(load, float)], 2, redundant_experts)
    best = best_imbalance(load, 4 + redundant_experts)
    assert found.bound[0] <= best + 1e-9
    assert found.imbalance[0] >= best - 1e-9
    if redundant_experts == 0:
        assert found.imbalance[0] <= best * 1.01 + 1e-9, "within the stated closeness"
    if redundant_experts == 4:
        assert found.imbalance[0] == 1, "each rank holds a replica of each expert"
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
    assert 1 < least <= 1.002 < balanced([load], 2).imbalance[0]
    assert balanced([load], 2, max_imbalance=1.002).imbalance[0] <= 1.002
    out_of_reach = balanced([load], 2, max_imbalance=1.0)
    assert out_of_reach.imbalance[0] == out_of_reach.bound[0] == pytest.approx(least)


def test_copies_make_one_hot_expert_bearable() -> None:
    load = np.asarray([70, 10, 10, 10, 10, 10, 10, 10], float)
    alone = balanced([load], 4)
    assert alone.imbalance[0] == pytest.approx(80 / 35)
    assert alone.bound[0] == pytest.approx(80 / 35), "proved: it needs a neighbour"
    assert balanced([load], 4, 4).imbalance[0] < 1.2


def loads_alone(load: list[int]) -> Affinity:
    return Affinity(
        model=ModelSpec(num_experts=(len(load),), top_k=1),
        num_tokens=sum(load),
        load=(np.asarray(load, dtype=np.int64),),
    )


def options(**changes: object) -> SolveOptions:
    topology = Topology(num_nodes=1, gpus_per_node=2)
    return changed(SolveOptions(topology=topology), **changes)


def test_loads_alone_are_solved_for_balance_with_a_bound() -> None:
    placement, report = solve(loads_alone([9, 1, 5, 5]), options())
    assert sorted(placement.physical_to_logical_map[0][:2].tolist()) in ([0, 1], [2, 3])
    assert (report.status, report.objective, report.gap) == ("optimal", 1.0, 0.0)
    assert report.objective_name.startswith("imbalance")


def test_a_cap_out_of_reach_is_told_or_relaxed() -> None:
    hot = loads_alone([90, 1, 5, 4])
    with pytest.raises(NoSolutionError, match=r"worst 1\.82"):
        solve(hot, options(max_imbalance=1.1))
    for asked in ({"max_imbalance": 1.1, "relax": True}, {}):
        _, report = solve(hot, options(**asked))
        assert report.relaxed_layers == {"0": pytest.approx(1.82)}


def test_what_needs_links_is_refused() -> None:
    with pytest.raises(UsageError, match="--policy follow needs tokens"):
        solve(loads_alone([1, 1]), options(policy="follow"))
    with pytest.raises(UsageError, match="--robust needs tokens"):
        solve(loads_alone([1, 1]), options(robust="bootstrap"))
    with pytest.raises(PlacerError, match="loads do not show pairs"):
        placement_problem(loads_alone([1, 1]), "fixed", options().topology, [2.0])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(16, 4, 4), (13, 4, 3), (24, 8, 16), (10, 8, 6)]),
)
def test_no_layer_is_above_eplb(seed: int, shape: tuple[int, int, int]) -> None:
    """With the same slots, copies sharing evenly, router groups aside."""
    size, num_ranks, more = shape
    load = np.random.default_rng(seed).zipf(1.6, size).clip(max=1000).astype(float)
    row = packed(load, num_ranks, size + more)
    share = load / np.bincount(row)
    theirs = share[row].reshape(num_ranks, -1).sum(axis=1).max() / load.sum() * num_ranks
    found = balanced([load], num_ranks, more, max_imbalance=1.5)
    assert found.imbalance[0] <= theirs + 1e-9
    assert found.bound[0] <= found.imbalance[0] + 1e-9


def test_an_optimum_that_eplb_misses_is_proved() -> None:
    load = np.array([600.0, 560, 120, 120, 20, 10, 10, 10])
    found = balanced([load], 8, 8)
    assert found.imbalance[0] * load.mean() == pytest.approx(560 / 3 + 10)
    assert found.bound[0] == pytest.approx(found.imbalance[0])


@pytest.mark.parametrize(
    ("size", "num_ranks", "more"),
    [(256, 36, 32), (256, 72, 32), (160, 24, 8), (160, 48, 32), (60, 8, 4), (257, 16, 15)],
)
def test_experts_that_divide_with_copies_are_placed(
    size: int, num_ranks: int, more: int
) -> None:
    load = np.random.default_rng(0).integers(500, 1500, size).astype(float)
    found = balanced([load], num_ranks, more)
    assert len(found.placement.physical_to_logical_map[0]) == size + more
    assert found.imbalance[0] < 1.08
    with pytest.raises(UsageError, match=r"redundant ones are .* which do not divide"):
        balanced([load], num_ranks, more + 1)


GROUPED = ModelSpec(num_experts=(32, 32), top_k=4, n_group=8, topk_group=2)


def grouped_loads() -> Affinity:
    rng = np.random.default_rng(1)
    return replace(
        loads_alone([1]),
        model=GROUPED,
        load=tuple(rng.integers(50, 800, 32) for _ in range(2)),
    )


def test_router_groups_stay_on_nodes_unless_they_are_ignored() -> None:
    affinity = grouped_loads()
    asked = options(
        topology=Topology(num_nodes=4, gpus_per_node=2),
        redundant_experts=16,
        replica_choice="sglang-static",
    )
    kept, report = solve(affinity, asked)
    split, without = solve(affinity, changed(asked, ignore_groups=True))
    assert are_whole(kept, 8, 4) and not are_whole(split, 8, 4)
    assert report.imbalance_without_groups == without.objective < report.objective
    assert without.imbalance_without_groups is None
    with pytest.raises(UsageError, match="exclude each other"):
        changed(asked, ignore_groups=True, preserve_groups=True)


def test_a_cap_that_whole_groups_miss_names_what_split_ones_reach() -> None:
    """More redundant experts would not help: the busiest group is too busy."""
    affinity = replace(grouped_loads(), load=(np.repeat([9, 1, 1, 1, 1, 1, 1, 1], 4),) * 2)
    asked = options(
        topology=Topology(num_nodes=8, gpus_per_node=2),
        redundant_experts=16,
        replica_choice="hash",
        max_imbalance=1.5,
    )
    _, report = solve(affinity, changed(asked, ignore_groups=True))
    for more, way in (({}, "--ignore-groups"), ({"preserve_groups": True}, "without")):
        with pytest.raises(NoSolutionError, match="whole router groups") as error:
            solve(affinity, changed(asked, **more))
        assert f"reaches {report.objective:.4f} ({way}" in error.value.hint
        assert "--redundant-experts" not in error.value.hint


@pytest.mark.parametrize(
    ("num_ranks", "redundant_experts"), [(4, 0), (8, 0), (16, 0), (16, 16)]
)
def test_groups_are_preserved_on_ranks_of_their_own(
    num_ranks: int, redundant_experts: int
) -> None:
    """8 groups on 4 ranks: two on each; on 16: two ranks for each."""
    asked = options(
        topology=Topology(gpus_per_node=num_ranks),
        redundant_experts=redundant_experts,
        replica_choice="hash",
        preserve_groups=True,
    )
    placement, report = solve(grouped_loads(), asked)
    assert are_whole(placement, 8, min(8, num_ranks))
    assert report.imbalance_without_groups is not None


def test_copies_are_counted_as_they_serve() -> None:
    """On nodes, copies do not share evenly: what is reported is what even homes cause."""
    model = msgspec.structs.replace(GROUPED, n_group=1, topk_group=1)
    affinity = replace(grouped_loads(), model=model)
    topology = Topology(num_nodes=4, gpus_per_node=2)
    loads = [counts.astype(float) for counts in affinity.load]
    for choice in ("hash", "local-first", "sglang-static"):
        asked = options(topology=topology, redundant_experts=16, replica_choice=choice)
        placement, report = solve(affinity, asked)
        reached = []
        for tables, load in zip(serving_layers(placement, choice), loads, strict=True):
            total = np.zeros(8)
            for home, expert in itertools.product(range(8), range(32)):
                number = tables.num_choices[home, expert]
                ranks = tables.choices[home, expert, :number]
                total[ranks] += load[expert] / (8 * number)
            reached.append(total.max() / total.mean())
        assert report.objective == pytest.approx(np.mean(reached))
        assert report.objective < 1.03
        assert report.predicted_imbalance > report.objective


def test_a_prediction_is_the_mean_of_many_draws() -> None:
    """Homes drawn 2,000 times, each pair served by its home's copy."""
    load = np.array([400, 300, 100, 120, 90, 110, 130, 80], dtype=float)
    found = balanced([load], 4, 4)
    holds = found.placement.holds(0)
    shares = holds / holds.sum(axis=1, keepdims=True)
    rng = np.random.default_rng(0)
    drawn = sum(
        rng.multinomial(int(n), of, size=2000) for n, of in zip(load, shares, strict=True)
    )
    most = (drawn.max(axis=1) / drawn.mean(axis=1)).mean()
    assert found.predicted[0] == pytest.approx(most, abs=0.005)
    assert found.predicted[0] > found.imbalance[0] + 0.02


def test_a_start_is_left_for_what_pays() -> None:
    rng = np.random.default_rng(2)
    then, now = (rng.integers(500, 1500, 32).astype(float) for _ in range(2))
    start = balanced([then], 8, 8).placement

    def moved(price: float, **asked: Any) -> tuple[int, float]:
        found = balanced([now], 8, 8, start=start, migration_cost=price, **asked)
        return num_moved(start, found.placement), found.imbalance[0]

    stays = moved(1e9)
    assert stays[0] == 0
    assert moved(0)[1] < 1.02 < stays[1]
    some = moved(20)
    assert 0 < some[0] < moved(0)[0]
    mean = now.sum() / 8
    assert (stays[1] - some[1]) * mean > 20 * some[0], "each move is worth its price"
    assert moved(1e9, max_imbalance=1.05)[1] <= 1.05, "the cap is kept whatever it costs"

"""The set partition against all placements: bounds, optima, and what limits them."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from placer.solver.partition import layer as layer_module
from placer.solver.partition.columns import (
    SCALE,
    Columns,
    DualPrices,
    Limits,
    all_columns,
    cost_of_sets,
)
from placer.solver.partition.layer import LayerProof, prove_layer
from tests.solver.enumeration import every_layer
from tests.solver.proof.test_copies import load_of, random_sets

SHAPES = [(4, 2, 2), (6, 2, 3), (6, 3, 3), (8, 2, 4), (8, 4, 3)]  # experts, ranks, top k


def cost_by_hand(experts: np.ndarray, count: np.ndarray, held: set[int]) -> int:
    """Count the tokens that use a rank."""
    rows = zip(experts.tolist(), count.tolist(), strict=True)
    return sum(times for row, times in rows if held & set(row))


class Case:
    """A small layer with limits, and all partitions that keep them."""

    def __init__(self, num_experts: int, num_ranks: int, top_k: int, seed: int) -> None:
        rng = np.random.default_rng([seed, num_experts, num_ranks])
        tokens = random_sets(num_experts, top_k, 40, rng)
        self.rows, self.weight = tokens.experts, tokens.num_tokens.astype(np.int64)
        self.load = load_of(tokens, num_experts).astype(np.int64)
        self.num_ranks, self.size = num_ranks, num_experts // num_ranks
        every = [self.sets_of(ranks) for ranks in every_layer(num_experts, num_ranks)]
        start = every[rng.integers(len(every))]
        self.most_load = max(
            int(rng.choice([1.1, 1.3, 9.0]) * self.load.sum() / num_ranks),
            max(int(self.load[list(one)].sum()) for one in start),
        )
        costs = [self.cost(one) for one in start]
        self.most_cost = int(rng.choice([max(costs), self.weight.sum()]))
        self.pins = [(int(e), r) for r, one in enumerate(start) for e in one][
            : rng.integers(0, 3) * num_ranks // 2
        ]
        self.start = start
        self.every = [one for one in every if self.allows(one)]
        self.least = min(sum(map(self.cost, one)) for one in self.every)

    def sets_of(self, ranks: np.ndarray) -> list[tuple[int, ...]]:
        held = [np.flatnonzero(ranks == rank) for rank in range(self.num_ranks)]
        return [tuple(one.tolist()) for one in held]

    def cost(self, held: tuple[int, ...]) -> int:
        return cost_by_hand(self.rows, self.weight, set(held))

    def allows(self, sets: list[tuple[int, ...]]) -> bool:
        return (
            all(expert in sets[rank] for expert, rank in self.pins)
            and all(self.load[list(one)].sum() <= self.most_load for one in sets)
            and all(self.cost(one) <= self.most_cost for one in sets)
        )

    def limits(self) -> Limits:
        apart = np.full(len(self.load), -1)
        for expert, rank in self.pins:
            apart[expert] = rank
        return Limits(
            least_load=int(self.load.sum()) - (self.num_ranks - 1) * self.most_load,
            most_load=self.most_load,
            most_cost=self.most_cost,
            together=tuple(
                tuple(expert for expert, at in self.pins if at == rank)
                for rank in {rank for _, rank in self.pins}
            ),
            apart=apart if self.pins else None,
        )

    def columns(self) -> Columns:
        return all_columns(self.rows, self.weight, self.load, self.size, self.limits())

    def proof(self) -> LayerProof:
        sets = np.array(self.start)
        return prove_layer(
            self.columns(), sets, cost_of_sets(self.rows, self.weight, list(sets))
        )


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("num_experts", "num_ranks", "top_k"), SHAPES)
def test_the_best_partition_is_found_and_proved(
    num_experts: int, num_ranks: int, top_k: int, seed: int
) -> None:
    """Under a load cap, a cap on received copies, and pins."""
    case = Case(num_experts, num_ranks, top_k, seed)
    proof = case.proof()
    assert proof.bound == proof.cost == case.least
    assert sorted(proof.sets.ravel().tolist()) == list(range(num_experts))
    held = [tuple(one) for one in proof.sets.tolist()]
    assert any(set(held) == set(one) for one in case.every)
    assert sum(map(case.cost, held)) == proof.cost


@pytest.mark.parametrize("seed", range(10))
def test_columns_are_all_sets_within_the_limits(seed: int) -> None:
    case = Case(8, 4, 3, seed)
    limits, columns = case.limits(), case.columns()
    wanted = {}
    for held in itertools.combinations(range(8), 2):
        load = case.load[list(held)].sum()
        pinned = {rank for expert, rank in case.pins if expert in held}
        whole = all(e in held for e, rank in case.pins if rank in pinned)
        within = limits.least_load <= load <= limits.most_load
        if within and case.cost(held) <= case.most_cost and len(pinned) < 2 and whole:
            wanted[held] = case.cost(held)
    found = zip(map(tuple, columns.experts.tolist()), columns.cost.tolist(), strict=True)
    assert dict(found) == wanted


def test_router_groups_stay_whole() -> None:
    """Groups of two on ranks of four, and groups of four on ranks of two."""
    case = Case(8, 2, 4, 0)
    free = Limits(least_load=0, most_load=10**9, most_cost=10**9)
    pairs = tuple((n, n + 1) for n in range(0, 8, 2))
    together = replace(free, together=pairs)
    whole = all_columns(case.rows, case.weight, case.load, 4, together)
    assert len(whole.cost) == 6  # two of four groups
    assert (whole.experts[:, ::2] + 1 == whole.experts[:, 1::2]).all()
    apart = replace(free, apart=np.arange(8) // 4)
    alone = all_columns(case.rows, case.weight, case.load, 2, apart)
    assert len(alone.cost) == 12
    assert (alone.experts[:, 0] // 4 == alone.experts[:, 1] // 4).all()


def random_prices(case: Case, rng: np.random.Generator) -> DualPrices:
    """Prices of experts of either sign, and of cuts that are not above 0."""
    num_experts = len(case.load)
    cuts = np.array([rng.permutation(num_experts)[:3] for _ in range(70)])
    return DualPrices(
        experts=rng.integers(-5 * SCALE, 20 * SCALE, num_experts),
        cuts=cuts,
        cut_prices=-rng.integers(0, SCALE, len(cuts)),
    )


def base_of(case: Case, columns: Columns, prices: DualPrices) -> int:
    least = int(columns.reduced_costs(prices).min())
    return prices.total + case.num_ranks * least


@pytest.mark.parametrize("seed", range(20))
def test_any_prices_prove_a_bound(seed: int) -> None:
    case = Case(8, 4, 3, seed)
    columns = case.columns()
    rng = np.random.default_rng(seed)
    for _ in range(20):
        assert base_of(case, columns, random_prices(case, rng)) <= SCALE * case.least


@pytest.mark.parametrize("seed", range(5))
def test_reduced_costs_count_cuts_of_which_a_column_has_two(seed: int) -> None:
    case = Case(8, 2, 4, seed)
    columns = case.columns()
    prices = random_prices(case, np.random.default_rng(seed))
    for held, cost, reduced in zip(
        columns.experts.tolist(),
        columns.cost.tolist(),
        columns.reduced_costs(prices).tolist(),
        strict=True,
    ):
        paid = sum(prices.experts[held].tolist())
        for cut, price in zip(prices.cuts.tolist(), prices.cut_prices, strict=True):
            paid += int(price) * (len(set(cut) & set(held)) >= 2)
        assert reduced == SCALE * cost - paid


@pytest.mark.parametrize("seed", range(15))
def test_what_is_stopped_has_proved_a_bound(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any number of steps, of the linear program and of the search."""
    case = Case(8, 4, 3, seed)
    sets = np.array(case.start)
    cost = cost_of_sets(case.rows, case.weight, list(sets))
    monkeypatch.setattr(layer_module, "_FIRST_COLUMNS", 1)
    monkeypatch.setattr(layer_module, "_COLUMNS_PER_ROUND", 2)
    monkeypatch.setattr(layer_module, "_MOST_CUT_ROUNDS", 0)
    bounds = []
    for most in range(40):
        steps = iter(range(most))
        proof = prove_layer(
            case.columns(), sets, cost, lambda steps=steps: next(steps, None) is not None
        )
        assert proof.bound <= case.least <= proof.cost
        bounds.append(proof.bound)
    assert bounds == sorted(bounds)
    for most_steps in (1, 3, 10, 30):
        monkeypatch.setattr(layer_module, "_MOST_STEPS", most_steps)
        proof = prove_layer(case.columns(), sets, cost)
        assert proof.bound <= case.least <= proof.cost


def broken_limits(limits: Limits, part: str) -> Limits:
    """Return limits that leave out what is allowed."""
    if part == "most_load":
        return replace(limits, most_load=limits.most_load - limits.most_load // 8)
    if part == "most_cost":
        return replace(limits, most_cost=limits.most_cost - limits.most_cost // 8)
    if part == "together":
        return replace(limits, together=((0, 1),))
    return replace(limits, apart=np.arange(8) % 2)


@pytest.mark.parametrize("part", ["most_load", "most_cost", "together", "apart"])
def test_a_limit_that_is_too_tight_is_seen(part: str) -> None:
    """The comparison with all placements notices columns that are missing."""
    wrong = 0
    for seed in range(12):
        case = Case(8, 4, 3, seed)
        limits = broken_limits(case.limits(), part)
        columns = all_columns(case.rows, case.weight, case.load, case.size, limits)
        if not len(columns.cost):
            continue
        sets = np.array(case.start)
        proof = prove_layer(columns, sets, cost_of_sets(case.rows, case.weight, list(sets)))
        wrong += proof.bound > case.least
    assert wrong > 0


@pytest.mark.parametrize("part", ["cost", "prices", "ranks"])
def test_arithmetic_that_is_wrong_is_seen(part: str) -> None:
    """Each ingredient of the bound is broken once."""
    wrong = 0
    for seed in range(12):
        case = Case(8, 4, 3, seed)
        prices, columns, num_ranks = case.proof().prices, case.columns(), case.num_ranks
        if part == "cost":
            columns = replace(columns, cost=columns.cost + 1)
        elif part == "ranks":
            prices = replace(prices, experts=prices.experts + SCALE)
            num_ranks -= 1
        base = prices.total + num_ranks * int(columns.reduced_costs(prices).min())
        base += SCALE * 5 * (part == "prices")
        wrong += base > SCALE * case.least
    assert wrong > 0

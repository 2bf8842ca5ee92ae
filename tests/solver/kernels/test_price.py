"""The compiled price of a layer's copies against the same price in plain Python."""

from typing import NamedTuple

import numpy as np
import pytest

from placer.solver.kernels import served
from placer.solver.kernels.layer import LayerState, LayerTokens, Prices
from placer.solver.kernels.price import dispatch_prices, majority_ranks, price_layer

NUM_EXPERTS, TOP_K, MOST_COPIES = 9, 4, 3
NUM_TOKENS = 40


class Layer(NamedTuple):
    """A layer of random tokens, prices and places."""

    tokens: LayerTokens
    prices: Prices
    state: LayerState


def choices(rng: np.random.Generator, num_homes: int, num_ranks: int) -> list[np.ndarray]:
    """Return which ranks serve each expert in turn, by home, and how many they are.

    Few different ranks serve, the last among them: tokens often meet one twice.
    """
    some = np.r_[rng.integers(num_ranks, size=3), num_ranks - 1]
    shape = (num_homes, NUM_EXPERTS, MOST_COPIES)
    ranks = rng.choice(some, size=shape).astype(np.int16)
    return [ranks, rng.integers(1, MOST_COPIES + 1, size=shape[:2]).astype(np.int16)]


def rows(rng: np.random.Generator, number: int) -> np.ndarray:
    drawn = [rng.permutation(NUM_EXPERTS)[:TOP_K] for _ in range(number)]
    return np.array(drawn).astype(np.int16)


def random_layer(
    num_ranks: int,
    num_nodes: int,
    *,
    by_home: bool,
    follow: bool,
    seed: int,
    number: int = NUM_TOKENS,
) -> Layer:
    """Draw a layer; the last rank and the last node serve and are home to some tokens."""
    rng = np.random.default_rng(seed)
    num_homes = num_ranks if by_home else 1
    highest = num_ranks if by_home else num_ranks + 1  # the last: any home
    home = rng.integers(highest, size=number)
    home[:4] = highest - 1
    next_price = rng.integers(1, 90, size=(number, num_ranks))
    following = (rows(rng, number), *choices(rng, num_homes, num_ranks))
    if not follow:
        next_price = np.zeros((1, 1), dtype=np.int64)
        following = tuple(one[:0] if n == 0 else one for n, one in enumerate(following))
    ranks, numbers = choices(rng, num_homes, num_ranks)
    tokens = LayerTokens(
        experts=rows(rng, number),
        weight=rng.integers(1, 5, size=number),
        home=home.astype(np.int16),
        has_even_homes=True,
        next_price=next_price,
        starts=np.zeros(NUM_EXPERTS + 1, dtype=np.int64),
        users=np.zeros(number * TOP_K, dtype=np.int64),
        next_experts=following[0],
        next_choices=following[1],
        next_num_choices=following[2],
    )
    prices = Prices(
        to_rank=rng.integers(1, 90, size=(num_ranks + 1, num_ranks)),
        to_node=rng.integers(1, 90, size=(num_ranks + 1, num_nodes)),
        follow=follow,
        linear=np.zeros((NUM_EXPERTS, num_ranks), dtype=np.int64),
        load=np.ones((1, NUM_EXPERTS)),
        max_load=np.ones(1),
        overflow=0.0,
        receive=0.0,
        max_receive=0.0,
        max_homes=0.0,
        crowd=0.5 if follow else 0.0,
        ranks_per_node=num_ranks // (num_nodes or 1),
        caution=0.0,
        has_unknown_draws=False,
    )
    state = LayerState(
        slots=np.zeros((num_ranks, 1), dtype=np.int16),
        holds=np.zeros((NUM_EXPERTS, num_ranks), dtype=np.bool_),
        choices=ranks,
        num_choices=numbers,
        share=np.zeros((NUM_EXPERTS, num_ranks)),
        rank_load=np.zeros((1, num_ranks)),
        received=np.full(num_ranks, 7.0),  # what was found before is forgotten
        next_received=np.full(num_ranks, 7.0),
        homes=np.full(num_ranks, 7),
    )
    return Layer(tokens, prices, state)


def served_by(
    experts: np.ndarray, ranks: np.ndarray, numbers: np.ndarray, home: int, token: int
) -> list[int]:
    row = home if len(numbers) > 1 else 0
    return [int(ranks[row, e, token % numbers[row, e]]) for e in experts[token]]


def majority(served: list[int]) -> int:
    return max(served, key=served.count)  # of equals the first


def dispatch(served: list[int], home: int, prices: Prices) -> int:
    total = sum(int(prices.to_rank[home, rank]) for rank in set(served))
    if prices.to_node.shape[1]:
        nodes = {rank // prices.ranks_per_node for rank in served}
        total += sum(int(prices.to_node[home, node]) for node in nodes)
    return total


def spread(received: np.ndarray, served: list[int], home: int, weight: int) -> None:
    num_ranks = len(received)
    for rank in set(served) - {home}:
        received[rank] += weight * (1 if home < num_ranks else 1 - 1 / num_ranks)


SHAPES = [(6, 0), (6, 3), (4, 2), (2, 0), (64, 8), (65, 5), (66, 0)]


@pytest.mark.parametrize("number", [1, NUM_TOKENS])
@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("by_home", [False, True])
@pytest.mark.parametrize(("num_ranks", "num_nodes"), SHAPES)
def test_every_token_pays_for_each_distinct_rank_and_node(
    num_ranks: int, num_nodes: int, by_home: bool, follow: bool, number: int
) -> None:
    layer = random_layer(
        num_ranks,
        num_nodes,
        by_home=by_home,
        follow=follow,
        seed=num_ranks,
        number=number,
    )
    tokens, prices, state = layer
    received, homes = np.zeros(num_ranks), np.zeros(num_ranks, dtype=np.int64)
    next_received = np.zeros(num_ranks)
    costs = []
    for token, (home, weight) in enumerate(
        zip(tokens.home.tolist(), tokens.weight.tolist(), strict=True)
    ):
        by = served_by(tokens.experts, state.choices, state.num_choices, home, token)
        cost = dispatch(by, home, prices)
        spread(received, by, home, weight)
        if follow:
            next_home = majority(by)
            cost += int(tokens.next_price[token, next_home])
            cost += dispatch(by, next_home, prices)  # the way back costs the same
            homes[next_home] += weight
            later = served_by(
                tokens.next_experts,
                tokens.next_choices,
                tokens.next_num_choices,
                next_home,
                token,
            )
            spread(next_received, later, next_home, weight)
        costs.append(cost)
    total = price_layer(tokens, prices, state)
    assert served.served_by(*layer).cost.tolist() == (costs if follow else [])
    assert total == int(np.dot(costs, tokens.weight))
    assert state.received == pytest.approx(received)
    assert state.next_received == pytest.approx(next_received)
    assert state.homes.tolist() == homes.tolist()


@pytest.mark.parametrize("by_home", [False, True])
@pytest.mark.parametrize(("num_ranks", "num_nodes"), SHAPES[:5])
def test_dispatch_is_priced_from_every_home(
    num_ranks: int, num_nodes: int, by_home: bool
) -> None:
    layer = random_layer(num_ranks, num_nodes, by_home=by_home, follow=False, seed=3)
    tokens, prices, state = layer
    price = np.zeros((NUM_TOKENS, num_ranks), dtype=np.int64)
    dispatch_prices(tokens, state, prices.to_rank, prices.to_node, price)
    for token in range(NUM_TOKENS):
        for home in range(num_ranks):
            served = served_by(
                tokens.experts, state.choices, state.num_choices, home, token
            )
            assert price[token, home] == dispatch(served, home, prices)


@pytest.mark.parametrize("num_ranks", [2, 5])
@pytest.mark.parametrize("by_home", [False, True])
def test_homes_are_the_ranks_that_serve_most(by_home: bool, num_ranks: int) -> None:
    tokens, _, state = random_layer(num_ranks, 0, by_home=by_home, follow=True, seed=4)
    busiest = np.full(NUM_TOKENS, -1, dtype=np.int16)
    majority_ranks(tokens, state, busiest)
    expected = [
        majority(served_by(tokens.experts, state.choices, state.num_choices, home, token))
        for token, home in enumerate(tokens.home.tolist())
    ]
    assert busiest.tolist() == expected

"""Which of two placements is the better, and what is priced beside their copies."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from placer.placement import Placement
from placer.placement.topology import Topology
from placer.serving.replica_choice import sglang_static_ranks
from placer.solver.caps import Caps
from placer.solver.problem.traffic import TrafficProblem, copy_prices
from placer.solver.search.evaluation import SAME_OVERFLOW, Evaluation, is_better
from placer.solver.search.evaluator import Evaluator, evaluate
from placer.solver.search.layer_state import even_homes

Layer = tuple[float, float, float]


def evaluation(*layers: Layer) -> Evaluation:
    """Return what costs so much: load above its cap, copies above theirs, price."""
    load, copies, price = np.array(layers).T
    return Evaluation(
        copies=0.0,
        price=price.sum(),
        price_of_layer=price,
        overflow=np.array([load, copies]),
        imbalance=np.ones(len(layers)),
        most_received_copies=np.arange(len(layers)) + 0.5,
    )


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ((0, 0, 1), (0, 0, 2)),
        ((0, 0, 9), (1, 0, 1)),
        ((0, 0, 9), (0, 1, 1)),
        ((0, 5, 9), (1, 0, 1)),
        ((1, 1, 9), (1, 2, 1)),
        ((0.0009, 0.0009, 1), (0, 0, 2)),
        ((0, 0, 2), (0.0011, 0, 1)),
    ],
)
def test_the_load_cap_comes_first_then_the_copies_cap_then_the_price(
    better: Layer, worse: Layer
) -> None:
    """Sums above a cap are the same up to a thousandth."""
    assert evaluation(better).is_better(evaluation(worse))
    assert not evaluation(worse).is_better(evaluation(better))
    assert not evaluation(better).is_better(evaluation(better))


def test_layers_are_compared_together_or_one_by_one() -> None:
    one = evaluation((2, 0, 1), (0, 0, 5), (0, 0, 3))
    other = evaluation((0, 0, 9), (1, 0, 1), (0, 0, 3))
    assert not one.is_better(other)
    assert one.better_layers(other).tolist() == [False, True, False]
    assert other.better_layers(one).tolist() == [True, False, False]


def test_layers_above_the_cap_on_copies_are_told_with_what_they_reach() -> None:
    found = evaluation((0, 0.0009, 1), (9, 0, 1), (0, 0.0011, 1))
    assert found.missed_receive_cap() == {2: 2.5}


def test_what_is_priced_beside_the_copies_is_counted_in_copies() -> None:
    """Four tokens of even homes; experts 0 and 1 are on rank 0, 2 and 3 on rank 1."""
    problem = TrafficProblem(
        experts=(np.array([[0, 1], [0, 1], [0, 2], [2, 3]], dtype=np.int16),),
        topology=Topology(gpus_per_node=2),
        policy="fixed",
        load=(np.array([[3.0, 2, 2, 1], [4, 2, 1, 1], [1, 1, 3, 3]]),),
        max_load=(np.array([4.5, 5, 4]),),
        overflow_price=3.0,
        receive_price=10.0,
    )
    placement = Placement.from_expert_rank([np.array([0, 0, 1, 1])], 2)
    found = evaluate(problem, placement)
    # Half of the homes are on the other rank: 3 tokens use rank 0 and 2 use rank 1.
    assert found.copies == pytest.approx((1.5 + 1) / 4)
    # The other loads put 6 - 5 and 6 - 4 pairs above the cap.
    beside = 3 * (1 + 2) / 2 + 10 * 1.5
    assert found.price == pytest.approx(found.copies + beside / 4)
    assert found.price_of_layer == pytest.approx([2 * 4 * found.price])
    assert found.overflow.tolist() == [[0.5], [0]]
    assert found.imbalance == pytest.approx([5 / 4])
    assert found.most_received_copies == pytest.approx([2 * 1.5 / 4])


NUM_RANKS, NUM_TOKENS = 4, 30
NODES = Topology(num_nodes=2, gpus_per_node=2, inter_cost=5, intra_cost=2)
ALONE = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]])  # 12 experts, one copy
COPIES = np.array([[0, 1, 2], [0, 1, 3], [2, 4, 0], [3, 4, 5]])  # three, two or one
PAIR = np.array([[0, 1, 2, 3], [2, 3, 4, 0]])


class Oracle:
    """What a placement costs, token by token."""

    def __init__(self, problem: TrafficProblem, placement: Placement) -> None:
        self.problem, self.placement = problem, placement
        self.num_ranks = problem.topology.num_ranks
        self.width = problem.topology.gpus_per_node
        self.to_rank, self.to_node = copy_prices(problem.topology, problem.exchange)
        self.drawn = None
        if problem.replica_choice == "sglang-static" and placement.has_replicas:
            self.drawn = list(sglang_static_ranks(placement, problem.layer_ids))
        self.homes = self.every_home()

    def choices(self, layer: int, expert: int, home: int) -> list[int]:
        holds = np.flatnonzero(self.placement.holds(layer)[expert]).tolist()
        if len(holds) == 1 or self.problem.replica_choice == "hash":
            return holds
        if self.drawn is not None:
            return [int(self.drawn[layer][home, expert])]
        if home in holds:
            return [home]
        near = [rank for rank in holds if rank // self.width == home // self.width]
        return near or holds

    def serving(self, layer: int, token: int, home: int) -> list[int]:
        ranks = []
        for expert in self.problem.experts[layer][token].tolist():
            found = self.choices(layer, expert, home)
            ranks.append(found[token % len(found)])
        return ranks

    def homes_choose(self, layer: int) -> bool:
        slots = self.placement.physical_to_logical_map[layer].size
        replicated = slots > self.placement.num_experts[layer]
        return replicated and self.problem.replica_choice != "hash"

    def every_home(self) -> list[list[int]]:
        problem, layers = self.problem, range(self.problem.num_layers)
        num_tokens = problem.num_tokens
        anywhere = [self.num_ranks] * num_tokens
        even = even_homes(num_tokens, self.num_ranks).tolist()
        if problem.homes is not None:
            return [one.tolist() for one in problem.homes]
        if problem.policy == "fixed":
            return [even if self.homes_choose(layer) else anywhere for layer in layers]
        homes = [even if any(map(self.homes_choose, layers)) else anywhere]
        for layer in layers[:-1]:
            serving = [
                self.serving(layer, token, home) for token, home in enumerate(homes[-1])
            ]
            homes.append([max(one, key=one.count) for one in serving])
        return homes

    def sent(self, ranks: list[int], home: int) -> int:
        total = sum(int(self.to_rank[home, rank]) for rank in set(ranks))
        if self.to_node.shape[1]:
            nodes = {rank // self.width for rank in ranks}
            total += sum(int(self.to_node[home, node]) for node in nodes)
        return total

    def copies(self, layer: int) -> int:
        total = 0
        for token, home in enumerate(self.homes[layer]):
            ranks = self.serving(layer, token, home)
            total += self.sent(ranks, home)
            if self.problem.policy == "follow":
                total += self.sent(ranks, max(ranks, key=ranks.count))
        return total

    def received(self, layer: int) -> np.ndarray:
        counts = np.zeros(self.num_ranks)
        for token, home in enumerate(self.homes[layer]):
            for rank in set(self.serving(layer, token, home)) - {home}:
                anywhere = home == self.num_ranks
                counts[rank] += 1 - 1 / self.num_ranks if anywhere else 1
        return counts

    def rank_load(self, layer: int) -> np.ndarray:
        """Of tokens as they are where homes choose and are known, else of even homes."""
        policy = self.problem.policy
        counted = self.homes_choose(layer) and (
            policy == "given" or (policy == "follow" and layer > 0)
        )
        load = self.problem.load[layer]
        share = np.zeros((load.shape[1], self.num_ranks))
        for expert in range(load.shape[1]):
            for home in range(self.num_ranks):
                found = self.choices(layer, expert, home)
                share[expert, found] += 1 / len(found) / self.num_ranks
            users = np.argwhere(self.problem.experts[layer] == expert)[:, 0].tolist()
            if counted and users:
                share[expert] = 0
                for token in users:
                    found = self.choices(layer, expert, self.homes[layer][token])
                    share[expert, found[token % len(found)]] += 1 / len(users)
        return load @ share

    def penalties(self, layer: int) -> float:
        problem, scale = self.problem, self.num_ranks
        excess = self.rank_load(layer) - np.asarray(problem.max_load[layer])[:, None]
        over = np.maximum(excess, 0).sum(axis=1)[1:]
        total = problem.overflow_price * scale * (over.mean() if over.size else 0)
        total += problem.receive_price * scale * self.received(layer).max()
        most = problem.caps.max_home_imbalance
        if most is not None and problem.policy == "follow" and layer + 1 < len(self.homes):
            homes = np.bincount(self.homes[layer + 1], minlength=scale)
            most *= problem.num_tokens / scale
            total += problem.home_price * scale * np.maximum(homes - most, 0).sum()
        if problem.move_price is not None:
            held = self.placement.holds(layer)
            total += scale * float((problem.move_price[layer] * held).sum())
        return total


def priced(
    slots: np.ndarray, num_layers: int = 3, **changes: Any
) -> tuple[Evaluator, Oracle]:
    """Return the price of random tokens with caps and prices that bind, and the oracle."""
    num_experts = int(slots.max()) + 1
    rng = np.random.default_rng(num_layers)
    experts = tuple(
        np.array([rng.permutation(num_experts)[:3] for _ in range(NUM_TOKENS)]).astype(
            np.int16
        )
        for _ in range(num_layers)
    )
    load = [np.bincount(one.ravel(), minlength=num_experts) for one in experts]
    num_ranks = len(slots)
    mean = 3 * NUM_TOKENS / num_ranks
    given: dict[str, Any] = {
        "experts": experts,
        "topology": NODES if num_ranks == NUM_RANKS else Topology(gpus_per_node=2),
        "load": tuple(
            np.array([one, rng.permutation(one), rng.permutation(one)], dtype=float)
            for one in load
        ),
        "max_load": (np.array([0.97 * mean, mean - 2, mean]),) * num_layers,
        "overflow_price": 0.5,
        "receive_price": 0.75,
        "home_price": 2.5,
        "move_price": tuple(
            np.floor(9 * rng.random((num_experts, num_ranks))) for _ in range(num_layers)
        ),
        "caps": Caps(max_home_imbalance=1.05, max_received_copies=1.15),
    }
    shuffled = tuple(
        np.concatenate([rng.permutation(row) for row in slots]) for _ in range(num_layers)
    )
    problem = TrafficProblem(**given | changes)
    placement = Placement(
        physical_to_logical_map=shuffled,
        num_experts=(num_experts,) * num_layers,
        num_ranks=num_ranks,
        num_nodes=problem.topology.num_nodes,
    )
    if problem.policy == "fixed":
        # Homes are not capped where they do not follow.
        problem = replace(problem, caps=problem.caps.without_homes)
    return Evaluator(problem, placement), Oracle(problem, placement)


GIVEN = tuple(np.random.default_rng(9).integers(NUM_RANKS, size=(3, NUM_TOKENS)))
CASES = {
    "fixed": (ALONE, {"policy": "fixed"}),
    "follow": (ALONE, {"policy": "follow"}),
    "per-node": (ALONE, {"policy": "follow", "exchange": "per-node"}),
    "one layer": (ALONE, {"policy": "follow", "num_layers": 1}),
    "given": (ALONE, {"policy": "given", "homes": GIVEN}),
    "near copies": (COPIES, {"policy": "fixed", "replica_choice": "local-first"}),
    "near copies follow": (COPIES, {"policy": "follow", "replica_choice": "local-first"}),
    "near copies given": (
        COPIES,
        {"policy": "given", "homes": GIVEN, "replica_choice": "local-first"},
    ),
    "two ranks": (PAIR, {"policy": "fixed", "replica_choice": "local-first"}),
    "two ranks follow": (PAIR, {"policy": "follow", "replica_choice": "local-first"}),
    "any copies": (COPIES, {"policy": "fixed", "replica_choice": "hash"}),
    "any copies follow": (COPIES, {"policy": "follow", "replica_choice": "hash"}),
    "drawn copies": (COPIES, {"policy": "fixed", "replica_choice": "sglang-static"}),
    "drawn copies follow": (
        COPIES,
        {"policy": "follow", "replica_choice": "sglang-static", "layer_ids": (1, 3, 4)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_placement_costs_what_its_tokens_do(case: str) -> None:
    slots, changes = CASES[case]
    evaluator, oracle = priced(slots, **changes)
    problem, layers = evaluator.problem, range(evaluator.problem.num_layers)
    found = evaluator.evaluation()
    copies = [oracle.copies(layer) for layer in layers]
    penalties = [oracle.penalties(layer) for layer in layers]
    scale = oracle.num_ranks * NUM_TOKENS * len(layers)
    assert evaluator.price_copies() == pytest.approx(copies)
    assert found.copies == pytest.approx(sum(copies) / scale)
    assert found.price == pytest.approx((sum(copies) + sum(penalties)) / scale)
    each = [sum(both) for both in zip(copies, penalties, strict=True)]
    assert found.price_of_layer == pytest.approx(each)
    assert evaluator.price_per_layer() == pytest.approx(each)
    for layer in layers:
        load, received = oracle.rank_load(layer)[0], oracle.received(layer)
        assert found.imbalance[layer] == pytest.approx(load.max() / load.mean())
        assert found.most_received_copies[layer] == pytest.approx(
            received.max() * oracle.num_ranks / NUM_TOKENS
        )
        above = np.maximum(load - problem.max_load[layer][0], 0).sum()
        cap = problem.caps.max_received_copies * NUM_TOKENS / oracle.num_ranks
        squares = (np.maximum(received - cap, 0) ** 2).sum()
        assert found.overflow[:, layer] == pytest.approx([above, squares])
    assert found.overflow[0].any()
    assert found.overflow[1].any() or oracle.num_ranks == 2
    assert evaluator.has_replicas == (slots is not ALONE)
    if problem.policy == "follow":
        assert [one.tolist() for one in evaluator.all_homes()] == oracle.homes


@pytest.mark.parametrize("number", [1, 2])
def test_other_loads_are_priced_where_there_are_some(number: int) -> None:
    three, _ = priced(ALONE, policy="fixed")
    load = tuple(one[:number] for one in three.problem.load)
    most = tuple(one[:number] for one in three.problem.max_load)
    evaluator, oracle = priced(ALONE, policy="fixed", load=load, max_load=most)
    each = [oracle.copies(layer) + oracle.penalties(layer) for layer in range(3)]
    assert evaluator.evaluation().price_of_layer == pytest.approx(each)


def test_a_cap_may_be_less_than_one_copy() -> None:
    evaluator, oracle = priced(ALONE, policy="fixed", caps=Caps(max_received_copies=0.1))
    squares = ((oracle.received(2) - 0.1 * NUM_TOKENS / NUM_RANKS) ** 2).sum()
    assert evaluator.evaluation().overflow[1, 2] == pytest.approx(squares)


def test_nothing_is_above_a_cap_that_is_not_given() -> None:
    evaluator, _ = priced(ALONE, policy="fixed", caps=Caps())
    assert not evaluator.evaluation().overflow[1].any()


@pytest.mark.parametrize("case", ["follow", "per-node", "near copies follow"])
def test_tokens_know_what_their_next_home_costs_in_the_next_layer(case: str) -> None:
    slots, changes = CASES[case]
    evaluator, oracle = priced(slots, **changes)
    for layer in range(3):
        tokens = evaluator.tokens(layer)
        assert tokens.home.tolist() == oracle.homes[layer]
        expected = np.zeros((NUM_TOKENS, NUM_RANKS))
        if layer < 2:
            for token, home in np.ndindex(expected.shape):
                ranks = oracle.serving(layer + 1, token, home)
                expected[token, home] = oracle.sent(ranks, home)
            state = evaluator.states[layer + 1]
            assert tokens.next_experts is evaluator.problem.experts[layer + 1]
            assert tokens.next_choices is state.choices
            assert tokens.next_num_choices is state.num_choices
        else:
            assert len(tokens.next_experts) == 0
        assert tokens.next_price.tolist() == expected.tolist()
        assert not evaluator.tokens(layer, with_next=False).next_price.any()
        assert len(evaluator.tokens(layer, with_next=False).next_experts) == 0
        moved = [np.full(NUM_TOKENS, 2, dtype=np.int16)] * 3
        assert evaluator.tokens(layer, homes=moved).home.tolist() == [2] * NUM_TOKENS
        assert tokens.has_even_homes == (slots is ALONE or layer == 0)
    uncapped, _ = priced(slots, **changes | {"caps": Caps()})
    assert len(uncapped.tokens(0).next_experts) == 0


def test_a_cap_is_missed_by_more_than_rounding() -> None:
    least = 2 * SAME_OVERFLOW
    found = evaluation((SAME_OVERFLOW, least, 1), (least, 0, 1), (0, SAME_OVERFLOW, 1))
    assert found.missed_load_cap() == {1: 1.0}
    assert found.missed_receive_cap() == {0: 0.5}
    at, none = np.array([SAME_OVERFLOW, 0]), np.zeros(2)
    assert is_better(at, 1.0, none, 2.0)

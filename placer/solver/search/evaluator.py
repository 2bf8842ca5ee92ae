"""The exact cost of a placement's copies on the profile's tokens.

Legend of the shapes: L MoE layers, T tokens, E logical experts, R ranks.
"""

import math
from collections.abc import Iterator
from itertools import repeat

import numpy as np

from placer.arrays import FloatArray, Int16Array, IntArray
from placer.placement.imbalance import imbalance
from placer.placement.placement import Placement
from placer.serving.replica_choice import require_replica_choice, sglang_static_ranks
from placer.solver.kernels.layer import LayerState, LayerTokens
from placer.solver.kernels.moves import above, busy
from placer.solver.kernels.price import dispatch_prices, majority_ranks, price_layer
from placer.solver.kernels.replicas import rank_shares
from placer.solver.problem.layer_profile import LayerProfile
from placer.solver.problem.traffic import TrafficProblem
from placer.solver.search.evaluation import Evaluation
from placer.solver.search.layer_state import NO_LAYER, even_homes, layer_state, layer_tokens


def evaluate(problem: TrafficProblem, placement: Placement) -> Evaluation:
    """Return what a placement costs."""
    return Evaluator(problem, placement).evaluation()


class Evaluator:
    """Prices a placement, and every change of its ``states``.

    Parameters
    ----------
    problem
        What is priced.
    placement
        Where the experts are.

    Attributes
    ----------
    prices
        L: what things cost in each layer.
    profiles
        L: the tokens of each layer.
    states
        L: where the experts of each layer are, and what was last found to follow from it.
    """

    def __init__(self, problem: TrafficProblem, placement: Placement) -> None:
        layers = range(problem.num_layers)
        self.problem = problem
        self.prices = [problem.layer_prices(n) for n in layers]
        self.profiles = [self._profile(placement, n) for n in layers]
        self.states: list[LayerState] = []
        self.put(placement)

    def put(self, placement: Placement) -> None:
        """Go on from another placement with as many slots."""
        problem = self.problem
        require_replica_choice(placement, problem.replica_choice)
        drawn: Iterator[IntArray | None] = repeat(None)
        is_static = problem.replica_choice == "sglang-static"
        if is_static and placement.has_replicas and not problem.has_unknown_draws:
            drawn = iter(sglang_static_ranks(placement, problem.layer_ids))
        layers = range(problem.num_layers)
        self.states = [self.state(placement, n, next(drawn)) for n in layers]

    def _profile(self, placement: Placement, layer: int) -> LayerProfile:
        num_experts = placement.num_experts[layer]
        has_replicas = placement.physical_to_logical_map[layer].size > num_experts
        # Homes, and replicas that take turns, tell tokens with the same experts apart.
        merged = self.problem.policy == "fixed" and not has_replicas
        return LayerProfile.of(self.problem.experts[layer], num_experts, merged=merged)

    def state(self, placement: Placement, layer: int, drawn: IntArray | None) -> LayerState:
        """Return a layer of a placement; ``drawn`` ``[R, E]`` are SGLang's choices."""
        return layer_state(self.problem, placement, layer, drawn)

    @property
    def has_replicas(self) -> bool:
        """Whether a layer has more slots than experts."""
        return any(state.slots.size > len(state.holds) for state in self.states)

    def evaluation(self) -> Evaluation:
        """Return what the placement costs."""
        problem, layers = self.problem, range(self.problem.num_layers)
        copies = self.price_copies()
        penalties = [self.penalties(layer) for layer in layers]
        received = np.array([state.received.max() for state in self.states])
        return Evaluation(
            copies=self.per_token(math.fsum(copies)),
            price=self.per_token(math.fsum(copies) + math.fsum(penalties)),
            price_of_layer=np.array(copies) + np.array(penalties),
            overflow=self.overflow_per_layer(),
            imbalance=np.array([imbalance(state.rank_load[0]) for state in self.states]),
            most_received_copies=problem.topology.num_ranks / problem.num_tokens * received,
        )

    def price_per_layer(self) -> FloatArray:
        """Return ``[L]``: the price of every layer, penalties included, scaled by R.

        A layer's share of ``follow`` is the dispatch to it and the combine from it.
        """
        layers = range(self.problem.num_layers)
        return np.array(self.price_copies()) + [self.penalties(n) for n in layers]

    def price_copies(self) -> list[float]:
        """Price the copies of every layer again."""
        homes = self.all_homes() if self.problem.policy == "follow" else None
        return [
            self.price_layer(self.tokens(layer, with_next=False, homes=homes), layer)
            for layer in range(self.problem.num_layers)
        ]

    def price_layer(self, tokens: LayerTokens, layer: int) -> float:
        """Price the copies of a layer again, and update its state."""
        state, prices = self.states[layer], self.prices[layer]
        rank_shares(tokens, prices, state)
        state.rank_load[:] = prices.load @ state.share
        return float(price_layer(tokens, prices, state))

    def per_token(self, price: float) -> float:
        """Return a price of all tokens and layers, scaled by R, per token and layer."""
        problem = self.problem
        scale = problem.topology.num_ranks * problem.num_tokens * problem.num_layers
        return price / scale

    def penalties(self, layer: int) -> float:
        """Return the penalties of a layer, as they were last priced."""
        state, price = self.states[layer], self.prices[layer]
        over = np.maximum(state.rank_load - price.max_load[:, None], 0).sum(axis=1)
        total = price.overflow * float(over[1:].mean()) if len(over) > 1 else 0.0
        total += price.receive * float(state.received.max())
        total += price.crowd * float(above(state.homes, price.max_homes))
        return total + float((price.linear * state.holds).sum())

    def overflow_per_layer(self) -> FloatArray:
        """Return ``[2, L]``: the excess above the caps, as it was last priced."""
        layers = range(self.problem.num_layers)
        return np.array([self.overflow(layer) for layer in layers]).T

    def overflow(self, layer: int) -> FloatArray:
        """Return ``[2]``: pairs above the cap on load, squares of copies above theirs."""
        state, price = self.states[layer], self.prices[layer]
        load = np.maximum(state.rank_load[0] - price.max_load[0], 0).sum()
        limited = price.max_receive > 0
        received = busy(state.received, price.max_receive) if limited else 0.0
        return np.array([load, received])

    def tokens(
        self, layer: int, *, with_next: bool = True, homes: list[Int16Array] | None = None
    ) -> LayerTokens:
        """Return a layer's tokens and their homes.

        Parameters
        ----------
        layer
            Which layer.
        with_next
            Whether moves must know what they change in the next layer.
        homes
            Under ``follow``, the homes in the layers so far; by default found anew.
        """
        problem, profile = self.problem, self.profiles[layer]
        num_rows, num_ranks = len(profile.experts), problem.topology.num_ranks
        has_next = with_next and layer + 1 < problem.num_layers
        next_price = None
        if problem.policy == "follow":
            home = (self.all_homes() if homes is None else homes)[layer]
            next_price = np.zeros((num_rows, num_ranks), dtype=np.int64)
            if has_next:
                self._fill_next_price(layer + 1, next_price)
        elif problem.homes is not None:
            home = problem.homes[layer].astype(np.int16)
        elif len(self.states[layer].num_choices) > 1:
            home = even_homes(num_rows, num_ranks)
        else:
            home = np.full(num_rows, num_ranks, dtype=np.int16)
        following = NO_LAYER
        if problem.limits_received and problem.policy == "follow" and has_next:
            state = self.states[layer + 1]
            following = (problem.experts[layer + 1], state.choices, state.num_choices)
        has_even_homes = self._has_even_homes(layer)
        return layer_tokens(
            profile, home, next_price, following, has_even_homes=has_even_homes
        )

    def _has_even_homes(self, layer: int) -> bool:
        """Return whether a layer's load is taken as if tokens came from all homes alike.

        So it is where homes choose no copies or are any rank.
        """
        has_one_row = len(self.states[layer].num_choices) == 1
        any_rank = {"fixed": True, "follow": layer == 0, "given": False}
        return has_one_row or any_rank[self.problem.policy]

    def _fill_next_price(self, layer: int, price: IntArray) -> None:
        nowhere = np.zeros(self.problem.num_tokens, dtype=np.int16)
        tokens = layer_tokens(self.profiles[layer], nowhere)
        prices, state = self.prices[layer], self.states[layer]
        dispatch_prices(tokens, state, prices.to_rank, prices.to_node, price)

    def all_homes(self) -> list[Int16Array]:
        """Return the home of every token in every layer under ``follow``."""
        homes = [self.first_homes()]
        for layer in range(self.problem.num_layers - 1):
            homes.append(self.next_homes(layer, homes[-1]))
        return homes

    def first_homes(self) -> Int16Array:
        """Return ``[T]``: R, any rank, where homes choose no copies; else even ones."""
        num_tokens, num_ranks = self.problem.num_tokens, self.problem.topology.num_ranks
        if any(len(state.num_choices) > 1 for state in self.states):
            return even_homes(num_tokens, num_ranks)
        return np.full(num_tokens, num_ranks, dtype=np.int16)

    def next_homes(self, layer: int, home: Int16Array) -> Int16Array:
        """Return ``[T]``: the homes after a layer, the ranks that serve most experts."""
        homes = np.empty(len(home), dtype=np.int16)
        majority_ranks(layer_tokens(self.profiles[layer], home), self.states[layer], homes)
        return homes

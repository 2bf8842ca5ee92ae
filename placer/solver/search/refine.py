"""The last phase: moves of experts judged by the copies that real tokens cause.

Pairs of experts, which the search before minimises, stand in for traffic; here every
proposal is priced exactly on the profile's tokens: distinct ranks and nodes, the way to the
home and from it, whichever copy serves. Simulated annealing over swaps of two experts (and
over which experts have replicas), then a descent until no move pays; where homes follow the
copies that serve, what that left above a cap is repaired last.

Legend of the shapes: L MoE layers, T tokens, E logical experts, R ranks, k experts per
token, S load scenarios.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import repeat

import numpy as np
import numpy.typing as npt

from placer.arrays import FloatArray, IntArray
from placer.placement.placement import Placement
from placer.run.deadline import Deadline
from placer.serving.replica_choice import (
    SglangDraws,
    require_replica_choice,
    sglang_static_ranks,
)
from placer.solver.problem.layer_profile import LayerProfile
from placer.solver.problem.traffic import TrafficProblem
from placer.solver.search import kernels
from placer.solver.search.evaluation import (
    SAME_OVERFLOW,
    Evaluation,
    is_better,
)

RankArray = npt.NDArray[np.int16]

_RULES = {
    None: kernels.LOCAL_FIRST,  # each expert has one copy: any rule does
    "local-first": kernels.LOCAL_FIRST,
    "hash": kernels.ANY_COPY,
    "sglang-static": kernels.SGLANG_STATIC,
}
# The first temperature, as a share of a layer's price; the last is a thirtieth of it.
_HOTTEST, _COOLING = 2e-3, 1 / 30
#: Share of the time that is kept for repairing.
SHARE_OF_REPAIR = 0.2
# Visits of a layer that is above a cap.
_MOST_REPAIRS = 8
# Of the layer after the last, or where nothing is asked of the next: no tokens.
_NO_LAYER = (
    np.zeros((0, 1), dtype=np.int16),
    np.zeros((1, 0, 1), dtype=np.int16),
    np.zeros((1, 0), dtype=np.int16),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineLimits:
    """How long to refine; counts, never seconds, so a result is reproducible.

    Attributes
    ----------
    num_sweeps
        Visits of every layer while the temperature falls; 0 leaves the descent alone out
        as well.
    num_visited_tokens
        Most tokens that all proposals together may look at, except for those that repair.
    num_tokens
        Most tokens to judge by; of longer profiles whole sequences are sampled.
    num_starts
        Under ``fixed``, where no layer's price depends on another's: most times to anneal
        from the start, each layer keeping its best; fewer where ``num_visited_tokens``
        would not let each of them try all moves. With replicas, which give many more
        moves to choose from, one annealing with this many times the sweeps, and tokens.
    """

    num_sweeps: int = 16
    num_visited_tokens: int = 2_000_000_000
    num_tokens: int = 65_536
    num_starts: int = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Snapshot:
    """A state of the search: L maps, ``[L]`` prices and ``[2, L]`` what is above caps."""

    slots: tuple[IntArray, ...]
    price: FloatArray
    overflow: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Drawn:
    """A layer as it is served, the draws after it, its price and what is above caps."""

    state: kernels.LayerState
    draws: SglangDraws
    price: float
    overflow: FloatArray


@dataclass(slots=True, kw_only=True)
class Refinement:
    """The state of a refinement.

    Attributes
    ----------
    problem
        What is minimised.
    limits
        How long to search.
    seed
        Seed of the moves.
    num_threads
        Layers that do not touch each other are worked on at once; the result does not
        depend on it.
    """

    problem: TrafficProblem
    limits: RefineLimits
    seed: int = 0
    num_threads: int = 2
    _states: list[kernels.LayerState] = field(init=False)
    _prices: list[kernels.Prices] = field(init=False)
    _profiles: list[LayerProfile] = field(init=False)

    def run(
        self,
        placement: Placement,
        progress: Callable[[int, float], None] | None = None,
        deadline: Deadline | None = None,
    ) -> Placement:
        """Return a placement that costs no more; ``progress`` is told sweep and copies.

        Of a placement above a cap, one that is nearer to it, whatever it costs. Copies are
        priced per token and MoE layer (cheapest copy 1), without what is priced beside
        them: bounds are of them alone.
        """
        deadline = deadline or Deadline()
        if deadline.passed():
            return placement
        began = time.monotonic()
        self._load(placement)
        best = self._snapshot()
        deadline.needs(2 * (time.monotonic() - began))  # to be priced anew at the end
        for start in range(self._num_starts()):
            if deadline.passed():
                break
            if start:
                self._put(placement)
            with deadline.interruptible(), deadline.keeping(self._share_of_repair()):
                self._improve(start, progress, deadline)
            best = self._better(best, self._snapshot())
        if self._share_of_repair():
            with deadline.interruptible():
                self._repair(np.ones(self.problem.num_layers, dtype=np.bool_), deadline)
            best = self._better(best, self._snapshot())
        return replace(placement, physical_to_logical_map=best.slots)

    def repair(
        self, placement: Placement, layers: npt.NDArray[np.bool_], deadline: Deadline
    ) -> Placement:
        """Return a placement nearer to its caps in some ``[L]`` layers, the others kept."""
        self._load(placement)
        self._repair(layers, deadline)
        rows = zip(
            layers, self._snapshot().slots, placement.physical_to_logical_map, strict=True
        )
        chosen = tuple(new if repaired else old for repaired, new, old in rows)
        return replace(placement, physical_to_logical_map=chosen)

    def _num_starts(self) -> int:
        """Return how often to anneal: as often as all proposals fit into the limit."""
        limits, layers = self.limits, range(self.problem.num_layers)
        if self.problem.policy != "fixed" or not limits.num_sweeps or self._has_replicas():
            return 1
        times = min(self._allowed_moves(n) / self._all_moves(n) for n in layers)
        return max(1, min(limits.num_starts, int(times)))

    def _share_of_repair(self) -> float:
        """Return the share of the time that repairing may need once moves are made."""
        repairs = self.problem.policy == "follow" and self._has_replicas()
        return SHARE_OF_REPAIR if repairs else 0.0

    def _has_replicas(self) -> bool:
        return any(state.slots.size > len(state.holds) for state in self._states)

    def _has_even_homes(self, layer: int) -> bool:
        """Return whether a layer's load is taken as if tokens came from all homes alike.

        So it is where homes choose no copies or are any rank.
        """
        has_one_row = len(self._states[layer].num_choices) == 1
        any_rank = {"fixed": True, "follow": layer == 0, "given": False}
        return has_one_row or any_rank[self.problem.policy]

    def _improve(
        self,
        start: int,
        progress: Callable[[int, float], None] | None,
        deadline: Deadline,
    ) -> None:
        """Anneal, then descend until no move pays; each ``start`` has seeds of its own."""
        num_sweeps = self.limits.num_sweeps
        if self.problem.policy == "fixed" and self._has_replicas():
            # Each token stands for one home there: the best of several fits these.
            num_sweeps *= self.limits.num_starts
        first = 2 * num_sweeps * start
        for sweep in range(num_sweeps):
            if deadline.passed():
                return
            share = _HOTTEST * _COOLING ** (sweep / max(num_sweeps - 1, 1))
            self._sweep(share, first + sweep, deadline)
            if progress is not None:
                copies = self._per_token(sum(self._all_copies()))
                progress(num_sweeps * start + sweep, copies)
        for number in range(first + num_sweeps, first + 2 * num_sweeps):
            if deadline.passed() or self._sweep(None, number, deadline) == 0:
                return

    def _repair(self, layers: npt.NDArray[np.bool_], deadline: Deadline) -> None:
        """Descend in those of the ``[L]`` layers that are above a cap, in their order.

        Which copies serve a layer of ``follow`` depends on those before it, and each sweep
        changes some of these after it has visited the layer. A search that was stopped is
        repaired all the same, in the time that is kept for it: few layers are above a cap.
        """
        homes = [self._first_homes()]
        first = 2 * self.limits.num_sweeps
        for layer in range(self.problem.num_layers):
            for number in range(first, first + _MOST_REPAIRS * layers[layer]):
                if deadline.left() == 0.0:
                    return
                self._price_layer(self._tokens(layer, homes=homes), layer)
                if (self._overflow(layer) <= SAME_OVERFLOW).all():
                    break
                self._visit(layer, None, number, homes)
            if self.problem.policy == "follow":
                homes.append(self._next_homes(layer, homes[-1]))

    def best_as_drawn(self, placements: Sequence[Placement]) -> Placement:
        """Take each layer, in order, from the placement that is best by SGLang's draws.

        Those for a layer depend on what all layers before it drew, and on nothing after.
        """
        first = placements[0]
        self._load(first)
        draws = SglangDraws(first, self.problem.layer_ids)
        homes = [self._first_homes()]
        rows = []
        for layer in range(self.problem.num_layers):
            tried = [self._drawn(layer, one, deepcopy(draws), homes) for one in placements]
            best = tried[0]
            for one in tried[1:]:
                if is_better(one.overflow, one.price, best.overflow, best.price):
                    best = one
            self._states[layer], draws = best.state, best.draws
            rows.append(best.state.slots.ravel().astype(np.int64))
            if self.problem.policy == "follow":
                homes.append(self._next_homes(layer, homes[-1]))
        return replace(first, physical_to_logical_map=tuple(rows))

    def _drawn(
        self, layer: int, placement: Placement, draws: SglangDraws, homes: list[RankArray]
    ) -> _Drawn:
        """Return a layer of a placement as SGLang serves it after its draws so far."""
        drawn = draws.ranks(placement.holds(layer))
        state = self._state(placement, layer, drawn)
        self._states[layer] = state
        tokens = self._tokens(layer, with_next=False, homes=homes)
        price = self._price_layer(tokens, layer) + self._penalties(layer)
        return _Drawn(state=state, draws=draws, price=price, overflow=self._overflow(layer))

    def evaluate(self, placement: Placement) -> Evaluation:
        """Return what a placement costs."""
        self._load(placement)
        layers = range(self.problem.num_layers)
        copies = self._all_copies()
        penalties = [self._penalties(layer) for layer in layers]
        return Evaluation(
            copies=self._per_token(math.fsum(copies)),
            price=self._per_token(math.fsum(copies) + math.fsum(penalties)),
            price_of_layer=np.array(copies) + np.array(penalties),
            overflow=self._overflow_per_layer(),
            imbalance=np.array(
                [
                    load.max() / load.mean() if load.any() else 1.0
                    for load in (state.rank_load[0] for state in self._states)
                ]
            ),
            most_received_copies=self.problem.topology.num_ranks
            / self.problem.num_tokens
            * np.array([state.received.max() for state in self._states]),
        )

    def _load(self, placement: Placement) -> None:
        layers = range(self.problem.num_layers)
        self._prices = [self.problem.layer_prices(n) for n in layers]
        self._profiles = [self._profile(placement, n) for n in layers]
        self._put(placement)

    def _put(self, placement: Placement) -> None:
        """Start from a placement with as many slots as the one before."""
        require_replica_choice(placement, self.problem.replica_choice)
        drawn: Iterator[IntArray | None] = repeat(None)
        is_static = self.problem.replica_choice == "sglang-static"
        if is_static and placement.has_replicas and not self.problem.has_unknown_draws:
            drawn = iter(sglang_static_ranks(placement, self.problem.layer_ids))
        layers = range(self.problem.num_layers)
        self._states = [self._state(placement, n, next(drawn)) for n in layers]

    def _profile(self, placement: Placement, layer: int) -> LayerProfile:
        num_experts = placement.num_experts[layer]
        has_replicas = placement.physical_to_logical_map[layer].size > num_experts
        # Homes, and copies that take turns, tell tokens with the same experts apart.
        merged = self.problem.policy == "fixed" and not has_replicas
        return LayerProfile.of(self.problem.experts[layer], num_experts, merged=merged)

    def _better(self, one: "_Snapshot", other: "_Snapshot") -> "_Snapshot":
        """Choose between two states, layer by layer where layers do not link."""
        if self.problem.policy == "follow":
            lost = is_better(
                one.overflow.sum(axis=1),
                one.price.sum(),
                other.overflow.sum(axis=1),
                other.price.sum(),
            )
            return one if lost else other
        lost_layers = list(
            map(is_better, one.overflow.T, one.price, other.overflow.T, other.price)
        )
        return _Snapshot(
            slots=tuple(
                old if lost else new
                for old, new, lost in zip(one.slots, other.slots, lost_layers, strict=True)
            ),
            price=np.where(lost_layers, one.price, other.price),
            overflow=np.where(lost_layers, one.overflow, other.overflow),
        )

    def price_per_layer(self) -> FloatArray:
        """Return ``[L]``: the price of every layer, penalties included, scaled by R.

        A layer's share of ``follow`` is the dispatch to it and the combine from it.
        """
        layers = range(self.problem.num_layers)
        return np.array(self._all_copies()) + [self._penalties(n) for n in layers]

    def _all_copies(self) -> list[float]:
        """Price the copies of every layer anew."""
        homes = self._all_homes() if self.problem.policy == "follow" else None
        return [
            self._price_layer(self._tokens(layer, with_next=False, homes=homes), layer)
            for layer in range(self.problem.num_layers)
        ]

    def _penalties(self, layer: int) -> float:
        """Return what is priced beside the copies of a layer, as they were priced last."""
        state, price = self._states[layer], self._prices[layer]
        over = np.maximum(state.rank_load - price.max_load[:, None], 0).sum(axis=1)
        total = price.overflow * float(over[1:].mean()) if len(over) > 1 else 0.0
        total += price.receive * float(state.received.max())
        total += price.crowd * float(kernels.above(state.homes, price.max_homes))
        return total + float((price.linear * state.holds).sum())

    def _overflow_per_layer(self) -> FloatArray:
        """Return ``[2, L]``: what is above the caps, as it was priced last."""
        layers = range(self.problem.num_layers)
        return np.array([self._overflow(layer) for layer in layers]).T

    def _overflow(self, layer: int) -> FloatArray:
        """Return ``[2]``: pairs above the cap on load, squares of copies above theirs."""
        state, price = self._states[layer], self._prices[layer]
        load = np.maximum(state.rank_load[0] - price.max_load[0], 0).sum()
        limited = price.max_receive > 0
        received = kernels.busy(state.received, price.max_receive) if limited else 0.0
        return np.array([load, received])

    def _price_layer(self, tokens: kernels.LayerTokens, layer: int) -> float:
        state, prices = self._states[layer], self._prices[layer]
        kernels.rank_shares(tokens, prices, state)
        state.rank_load[:] = prices.load @ state.share
        return float(kernels.price_layer(tokens, prices, state))

    def _per_token(self, price: float) -> float:
        problem = self.problem
        scale = problem.topology.num_ranks * problem.num_tokens * problem.num_layers
        return price / scale

    def _sweep(self, share: float | None, number: int, deadline: Deadline) -> float:
        """Visit every layer: at a temperature, or descending. Return the change.

        Layers that are not visited before the ``deadline`` stay as they are.
        """
        layers = range(self.problem.num_layers)
        linked = self.problem.policy == "follow"
        changed = 0.0
        with ThreadPoolExecutor(self.num_threads) as pool:
            for group in (layers[0::2], layers[1::2]) if linked else (layers,):
                homes = self._all_homes() if linked else None
                visits = [(layer, share, number, homes) for layer in group]
                changed += sum(
                    pool.map(
                        lambda visit: 0.0 if deadline.passed() else self._visit(*visit),
                        visits,
                    )
                )
        return changed

    def _visit(
        self, layer: int, share: float | None, number: int, homes: list[RankArray] | None
    ) -> float:
        tokens = self._tokens(layer, homes=homes)
        state, prices = self._states[layer], self._prices[layer]
        cost = self._price_layer(tokens, layer)
        kind = self._kind(layer)
        rule = _RULES[self.problem.replica_choice]
        moves = self._num_moves(layer)
        seed = np.random.SeedSequence([self.seed, number, layer]).generate_state(1, "u8")
        if share is not None:
            args = (kind, rule, share * cost, moves, seed[0] | np.uint64(1))
            return float(kernels.anneal(tokens, prices, state, *args))
        if moves < self._all_moves(layer):
            args = (kind, rule, 0.0, moves, seed[0] | np.uint64(1))
            return float(kernels.anneal(tokens, prices, state, *args))
        return float(kernels.descend(tokens, prices, state, kind, rule))

    def _num_moves(self, layer: int) -> int:
        """Return the proposals of a visit: all pairs of slots, or what the limit allows."""
        return max(1, min(self._all_moves(layer), int(self._allowed_moves(layer))))

    def _all_moves(self, layer: int) -> int:
        return int(self._states[layer].slots.size ** 2 // 2)

    def _allowed_moves(self, layer: int) -> float:
        limits, num_experts = self.limits, len(self._states[layer].holds)
        visited = 2 * self._profiles[layer].experts.size / num_experts
        num_visits = self.problem.num_layers * max(2 * limits.num_sweeps, 1)
        return limits.num_visited_tokens / (visited * num_visits)

    def _kind(self, layer: int) -> IntArray:
        if self.problem.kind is None:
            return np.zeros(len(self._states[layer].holds), dtype=np.int64)
        return self.problem.kind[layer]

    def _snapshot(self) -> "_Snapshot":
        """Return where the search is, experts of a rank in ascending order."""
        price = self.price_per_layer()
        return _Snapshot(
            slots=tuple(
                np.sort(state.slots, axis=1).ravel().astype(np.int64)
                for state in self._states
            ),
            price=price,
            overflow=self._overflow_per_layer(),
        )

    def _tokens(
        self, layer: int, *, with_next: bool = True, homes: list[RankArray] | None = None
    ) -> kernels.LayerTokens:
        problem = self.problem
        profile = self._profiles[layer]
        experts = profile.experts
        num_ranks = problem.topology.num_ranks
        next_price = np.zeros((1, 1), dtype=np.int64)
        if problem.policy == "follow":
            homes = self._all_homes() if homes is None else homes
            home = homes[layer]
            next_price = np.zeros((len(experts), num_ranks), dtype=np.int64)
            if with_next and layer + 1 < problem.num_layers:
                self._fill_next_price(layer + 1, next_price)
        elif problem.homes is not None:
            home = problem.homes[layer].astype(np.int16)
        elif len(self._states[layer].num_choices) > 1:
            home = _even_homes(len(experts), num_ranks)
        else:
            home = np.full(len(experts), num_ranks, dtype=np.int16)
        following = _NO_LAYER
        limited = problem.max_received_copies is not None and problem.policy == "follow"
        if limited and with_next and layer + 1 < problem.num_layers:
            state = self._states[layer + 1]
            following = (problem.experts[layer + 1], state.choices, state.num_choices)
        return _layer_tokens(
            profile,
            home,
            next_price,
            following,
            has_even_homes=self._has_even_homes(layer),
        )

    def _fill_next_price(self, layer: int, price: IntArray) -> None:
        nowhere = np.zeros(self.problem.num_tokens, dtype=np.int16)
        nothing = np.zeros((1, 1), dtype=np.int64)
        tokens = _layer_tokens(self._profiles[layer], nowhere, nothing)
        prices, state = self._prices[layer], self._states[layer]
        kernels.dispatch_prices(tokens, state, prices.to_rank, prices.to_node, price)

    def _all_homes(self) -> list[RankArray]:
        """Return the home of every token in every layer under ``follow``."""
        homes = [self._first_homes()]
        for layer in range(self.problem.num_layers - 1):
            homes.append(self._next_homes(layer, homes[-1]))
        return homes

    def _first_homes(self) -> RankArray:
        """Return ``[T]``: R, any rank, where homes choose no copies; else even ones."""
        num_tokens, num_ranks = self.problem.num_tokens, self.problem.topology.num_ranks
        if any(len(state.num_choices) > 1 for state in self._states):
            return _even_homes(num_tokens, num_ranks)
        return np.full(num_tokens, num_ranks, dtype=np.int16)

    def _next_homes(self, layer: int, home: RankArray) -> RankArray:
        """Return ``[T]``: the homes after a layer, the ranks that serve most experts."""
        tokens = _layer_tokens(
            self._profiles[layer], home, np.zeros((1, 1), dtype=np.int64)
        )
        busiest = np.empty(len(home), dtype=np.int16)
        kernels.busiest_ranks(tokens, self._states[layer], busiest)
        return busiest

    def _state(
        self, placement: Placement, layer: int, drawn: IntArray | None
    ) -> kernels.LayerState:
        """Return a layer as it is placed; ``drawn`` ``[R, E]`` are SGLang's choices."""
        problem, num_ranks = self.problem, placement.num_ranks
        slots = placement.physical_to_logical_map[layer].reshape(num_ranks, -1)
        holds = placement.holds(layer)
        replicas = slots.size > len(holds)
        by_home = replicas and problem.replica_choice != "hash"
        num_homes = num_ranks if by_home else 1
        most = min(num_ranks, slots.size - len(holds) + 1)
        state = kernels.LayerState(
            slots=slots.astype(np.int16),
            holds=holds.copy(),
            choices=np.zeros((num_homes, len(holds), most), dtype=np.int16),
            num_choices=np.zeros((num_homes, len(holds)), dtype=np.int16),
            share=np.zeros((len(holds), num_ranks)),
            cost=np.zeros(len(self._profiles[layer].experts), dtype=np.int64),
            rank_load=np.zeros((len(problem.load[layer]), num_ranks)),
            received=np.zeros(num_ranks),
            next_received=np.zeros(num_ranks),
            homes=np.zeros(num_ranks, dtype=np.int64),
        )
        if drawn is not None and replicas:
            state.choices[:, :, 0], state.num_choices[:] = drawn, 1
            return state
        rule = _RULES[problem.replica_choice]
        for expert, held in enumerate(holds):
            choices, number = (
                state.choices[:, expert].copy(),
                state.num_choices[:, expert].copy(),
            )
            width = placement.ranks_per_node
            kernels.choose(expert, held, width, rule, choices, number)
            state.choices[:, expert], state.num_choices[:, expert] = choices, number
        return state


def _layer_tokens(
    profile: LayerProfile,
    home: RankArray,
    next_price: IntArray,
    following: tuple[RankArray, RankArray, RankArray] = _NO_LAYER,
    *,
    has_even_homes: bool = True,
) -> kernels.LayerTokens:
    """Return a layer's tokens; ``following`` are those of the next and their ranks."""
    return kernels.LayerTokens(
        profile.experts,
        profile.weight,
        home,
        has_even_homes,
        next_price,
        profile.starts,
        profile.users,
        *following,
    )


def _even_homes(num_tokens: int, num_ranks: int) -> RankArray:
    """Return a home for each token, every rank as often: one stands for all of them.

    Shuffled, since copies take turns by the token's place: a home must not go with a turn.
    """
    homes = np.arange(num_tokens) % num_ranks
    return np.random.default_rng(num_ranks).permutation(homes).astype(np.int16)

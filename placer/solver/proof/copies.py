"""A lower bound of the copies that leave a layer: distinct ranks of a token's experts.

For a token that uses the set S, let y_ij = 1 where experts i and j of S share a rank. The
number of ranks that serve it, |D(S)|, is fixed by how y splits S. So for any prices b

    |D(S)| >= sum over i < j in S of b_ij y_ij
              + the least, over all splits p of S, of |p| - sum of b_ij y_ij(p),

and the best prices give the convex envelope of |D(S)| over the splits: stronger than what
any function of sums of y gives, as it knows that sharing is transitive. Sets of more than
six experts have too many splits; there |D(S)| = sum over i of 1 / (1 + sum over j of y_ij)
is bounded term by term by the chords between whole numbers. Added up over tokens, either is
linear in y, and the relaxation (``relaxation``) bounds it over all placements under the
load cap. Prices and relaxation are improved in turn; any prices certify.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from placer.arrays import FloatArray, IntArray
from placer.placement.policy import Policy
from placer.placement.topology import Topology
from placer.solver.proof.certificate import stable_floor
from placer.solver.proof.grouping import GroupingProblem
from placer.solver.proof.relaxation import Relaxation
from placer.trace import Chunk

METHOD = "envelope of distinct ranks over the semidefinite relaxation of each layer"
NUM_ROUNDS = 200
_MOST_SPLIT = 6  # experts of a set; 6 have 203 splits, 8 have 4,140
FIRST_STEPS = 50
_STEPS_PER_ROUND = 4
_BLOCK_SETS = 1 << 14
# Prices are rounded to multiples of these, so that their sums are exact: of splits in
# float32, of chords in float64.
_SPLIT_UNIT = 2.0**-12
_CHORD_UNIT = 2.0**-20
_MOST_PRICE = 16.0
_CHORD_STEP = 0.1
_MOMENTUM = 0.7  # of split prices
_STABLE_BITS = 14


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenSets:
    """The different sets of experts that tokens use in one layer.

    Attributes
    ----------
    experts
        ``[N, k]`` int64, ascending in every row.
    num_tokens
        ``[N]`` int64: tokens that use each set.
    """

    experts: IntArray
    num_tokens: IntArray


def token_sets(chunks: Iterable[Chunk]) -> list[TokenSets]:
    """Count the different sets of every layer of a trace."""
    layers = list(zip(*(chunk.experts for chunk in chunks), strict=True))
    found = []
    for parts in layers:
        rows = np.sort(np.concatenate(parts).astype(np.int64), axis=1)
        experts, counts = np.unique(rows, axis=0, return_counts=True)
        found.append(TokenSets(experts=experts, num_tokens=counts.astype(np.int64)))
    return found


class CopiesCertificate:
    """A proved lower bound of the ranks that serve each token, that can be improved.

    Parameters
    ----------
    sets
        What tokens use, L layers.
    load
        L arrays ``[E]``: (token, expert) pairs of each expert.
    max_load
        ``[L]``: most load of a group; some placement meets it.
    num_groups
        Ranks, or nodes for the node copies of the exchange ``per-node``.
    known
        L: a bound of the layer that is proved already and not improved, or ``None``.
    """

    def __init__(
        self,
        sets: Sequence[TokenSets],
        load: Sequence[FloatArray],
        max_load: Sequence[float],
        num_groups: int,
        known: Sequence[float | None] | None = None,
    ) -> None:
        self._num_tokens = float(sets[0].num_tokens.sum())
        proved = known or [None] * len(sets)
        self._layers: list[_Layer | _Known] = [
            _Layer(one, expert_load, cap, num_groups) if bound is None else _Known(bound)
            for one, expert_load, cap, bound in zip(
                sets, load, max_load, proved, strict=True
            )
        ]

    @property
    def bounds(self) -> list[float]:
        """For every layer: no placement serves its tokens from fewer groups in total."""
        return [layer.bound for layer in self._layers]

    def cost_bound(self, policy: Policy, topology: Topology) -> float:
        """Bound the cost of ``CopiesCost``, of a certificate made for its ranks.

        ``fixed`` homes send a token to each of its ranks but their own, all equally
        often. A home of ``follow`` is spared at most one of the ranks in dispatch and
        exactly one in combine.
        """
        rank_cost, num_ranks = topology.rank_cost(), topology.num_ranks
        from_anywhere = float(rank_cost.sum(axis=0).min())
        if num_ranks == 1:
            return 0.0
        if policy == "fixed":
            return from_anywhere * math.fsum(self.bounds)
        others = [bound - self._num_tokens for bound in self.bounds]
        apart = float(rank_cost[~np.eye(num_ranks, dtype=np.bool_)].min())
        moved = math.fsum(others) + math.fsum(others[1:])  # combine, later dispatch
        return from_anywhere * self.bounds[0] + num_ranks * apart * moved

    def improve(
        self,
        num_rounds: int = NUM_ROUNDS,
        first_steps: int = FIRST_STEPS,
        goes_on: Callable[[int], bool] | None = None,
    ) -> float:
        """Improve every layer and return the sum of the bounds.

        Parameters
        ----------
        num_rounds
            Of prices and relaxation in turn; with 0, prices are those of chords.
        first_steps
            Of the relaxation, before the first round.
        goes_on
            Called with the number of layers done after each, and asked whether to go on.
        """
        for done, layer in enumerate(self._layers, start=1):
            layer.improve(num_rounds, first_steps)
            if goes_on is not None and not goes_on(done):
                break
        return math.fsum(self.bounds)


@dataclass(frozen=True, slots=True)
class _Known:
    """A layer whose bound is proved already."""

    bound: float

    def improve(self, num_rounds: int, first_steps: int) -> None:
        """Leave it as it is."""


class _Layer:
    """The bound of one layer."""

    def __init__(
        self, sets: TokenSets, load: FloatArray, max_load: float, num_groups: int
    ) -> None:
        size, num_experts = sets.experts.shape[1], len(load)
        slots = num_experts // num_groups
        self.bound = -(-size // slots) * float(sets.num_tokens.sum())
        self._is_exact = size == 1 or num_groups == 1
        self._num_rounds = 0
        self._envelope: _SplitEnvelope | _ChordEnvelope
        if size <= _MOST_SPLIT:
            self._envelope = _SplitEnvelope(sets, num_experts, num_groups, slots)
        else:
            self._envelope = _ChordEnvelope(sets, num_experts)
        self._relaxed = Relaxation(
            GroupingProblem(
                num_groups=num_groups,
                weight={(0, 0): self._envelope.linear()[1]},
                load=(load,),
                max_load=(max_load,),
            )
        )

    def improve(self, num_rounds: int, first_steps: int) -> None:
        """Improve prices and relaxation in turn, then prove what they are worth."""
        if self._is_exact:
            return
        if self._num_rounds == 0:
            self._relaxed.run(first_steps)
            self._envelope.start(self._relaxed.shared((0, 0)))
        for _ in range(num_rounds):
            self._envelope.move(self._relaxed.shared((0, 0)), self._num_rounds)
            self._relaxed.reweight({(0, 0): self._envelope.linear()[1]})
            self._relaxed.run(_STEPS_PER_ROUND)
            self._num_rounds += 1
        constant, weight = self._envelope.linear()
        self._relaxed.reweight({(0, 0): weight})
        try:
            found = constant - self._relaxed.upper_bound()
        except OverflowError:  # prices far from balance prove nothing
            return
        whole = math.ceil(stable_floor(found, _STABLE_BITS))  # as copies are
        self.bound = max(self.bound, float(whole))


def _splits(size: int) -> IntArray:
    """Return ``[P, size]``: the part of every element, for all splits of a set."""
    found = [[0]]
    for _ in range(1, size):
        found = [[*one, part] for one in found for part in range(max(one) + 2)]
    return np.asarray(found)


class _SplitEnvelope:
    """Prices of the pairs of every set, and what they prove."""

    def __init__(
        self, sets: TokenSets, num_experts: int, num_groups: int, slots: int
    ) -> None:
        size = sets.experts.shape[1]
        splits = _splits(size)
        parts = (splits[:, :, None] == np.arange(size)).sum(axis=1)
        splits = splits[
            ((parts > 0).sum(axis=1) <= num_groups) & (parts.max(axis=1) <= slots)
        ]
        one, two = np.triu_indices(size, 1)
        self._num_parts = (splits.max(axis=1) + 1).astype(np.float32)
        self._together = (splits[:, one] == splits[:, two]).astype(np.float32)
        self._pair = sets.experts[:, one] * num_experts + sets.experts[:, two]
        self._num_tokens = sets.num_tokens.astype(np.float64)
        self._num_experts = num_experts
        self._chords = _ChordEnvelope(sets, num_experts)
        self._price = self._chords.pair_slopes().astype(np.float32)
        self._speed = np.zeros_like(self._price)

    def start(self, shared: FloatArray) -> None:
        """Take the prices that chords give at ``shared``."""
        self._chords.start(shared)
        self._price = self._chords.pair_slopes().astype(np.float32)

    def move(self, shared: FloatArray, num_before: int) -> None:
        """Step towards the best prices at ``shared``.

        Minima over splits are smoothed, less and less so as the prices settle.
        """
        smooth = 1 / (20 + num_before)
        held = shared.ravel()[self._pair].astype(np.float32)
        for start in range(0, len(held), _BLOCK_SETS):
            part = slice(start, start + _BLOCK_SETS)
            # Mean split of each set, weighted by exp(-what it costs / step).
            chance = self._price[part] @ self._together.T - self._num_parts
            chance -= chance.max(axis=1, keepdims=True)
            np.exp(chance / np.float32(smooth), out=chance)
            chance /= chance.sum(axis=1, keepdims=True)
            error = held[part] - chance @ self._together
            self._speed[part] *= np.float32(_MOMENTUM)
            self._speed[part] += np.float32(2 * smooth) * error
        self._price += self._speed
        np.clip(self._price, -_MOST_PRICE, _MOST_PRICE, out=self._price)

    def linear(self) -> tuple[float, FloatArray]:
        """Return c and symmetric w ``[E, E]``: c - sum over pairs of w y is proved."""
        price = np.rint(self._price / np.float32(_SPLIT_UNIT)) * np.float32(_SPLIT_UNIT)
        least = np.empty(len(price))
        for start in range(0, len(price), _BLOCK_SETS):
            part = slice(start, start + _BLOCK_SETS)
            least[part] = (self._num_parts - price[part] @ self._together.T).min(axis=1)
        return float(self._num_tokens @ least), _pair_weight(
            self._pair, -price * self._num_tokens[:, None], self._num_experts
        )


class _ChordEnvelope:
    """Slopes of the chord that bounds each expert's term of every set."""

    def __init__(self, sets: TokenSets, num_experts: int) -> None:
        size = sets.experts.shape[1]
        self._experts, self._num_experts = sets.experts, num_experts
        self._num_tokens = sets.num_tokens.astype(np.float64)
        # Rounded down, which keeps the bound and makes sums exact.
        self._value = np.floor(1 / np.arange(1, size + 1) / _CHORD_UNIT) * _CHORD_UNIT
        self._slope = np.full(sets.experts.shape, self._value[-1] - self._value[0])
        self._slope /= max(1, size - 1)

    def start(self, shared: FloatArray) -> None:
        """Take the slopes at ``shared``."""
        self._slope = self._slopes_at(shared)

    def move(self, shared: FloatArray, num_before: int) -> None:
        """Step towards the slopes at ``shared``."""
        self._slope += _CHORD_STEP * (self._slopes_at(shared) - self._slope)

    def _slopes_at(self, shared: FloatArray) -> FloatArray:
        """Return ``[N, k]``: slopes of the chords, blended around whole numbers."""
        rows, size = self._experts, self._experts.shape[1]
        companions = np.zeros(rows.shape)
        for other in range(size):
            companions += shared[rows, rows[:, [other]]]
        companions -= 1.0  # an expert is no companion of its own
        below = np.clip(np.floor(companions - 0.5).astype(np.int64), 0, size - 2)
        above = np.minimum(below + 1, size - 2)
        part = np.clip(companions - 0.5 - below, 0.0, 1.0)
        slope = np.diff(self._value)
        blended: FloatArray = slope[below] + part * (slope[above] - slope[below])
        return blended

    def pair_slopes(self) -> FloatArray:
        """Return ``[N, pairs]``: slope of every pair i < j of a set."""
        one, two = np.triu_indices(self._experts.shape[1], 1)
        slopes: FloatArray = self._slope[:, one] + self._slope[:, two]
        return slopes

    def linear(self) -> tuple[float, FloatArray]:
        """Return c and symmetric w ``[E, E]``: c - sum over pairs of w y is proved."""
        slope = np.rint(self._slope / _CHORD_UNIT) * _CHORD_UNIT
        companions = np.arange(slope.shape[1])
        least = (self._value - slope[:, :, None] * companions).min(axis=2)
        one, two = np.triu_indices(slope.shape[1], 1)
        return float(self._num_tokens @ least.sum(axis=1)), _pair_weight(
            self._experts[:, one] * self._num_experts + self._experts[:, two],
            -(slope[:, one] + slope[:, two]) * self._num_tokens[:, None],
            self._num_experts,
        )


def _pair_weight(pair: IntArray, weight: FloatArray, num_experts: int) -> FloatArray:
    """Add the weights of every pair up to a symmetric matrix ``[E, E]``."""
    total = np.bincount(pair.ravel(), weight.ravel(), minlength=num_experts**2)
    square = total.reshape(num_experts, num_experts).astype(np.float64)
    symmetric: FloatArray = square + square.T
    return symmetric

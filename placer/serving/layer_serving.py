"""Which rank serves each (token, expert) pair of a layer.

Without replicas there is nothing to choose. With replicas, the replica choice says which
replicas may serve a pair from a home; equal ones take turns. Here is ``local-first``, the
other choices are in :mod:`placer.serving.replica_choice`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from placer.arrays import BoolArray, IntArray
from placer.placement.placement import Placement

# [k, T] of ranks, or [T] of ranks: the dtype of rank_dtype.
RankArray = npt.NDArray[Any]

# From a placement, [E, C] ranks of replicas and whether there is such a replica, to
# [R, E, C]: the replicas that may serve a pair (home, expert).
Allow = Callable[[Placement, RankArray, BoolArray], BoolArray]


# Tokens that are worked on at a time, so that what is made of them stays in the cache.
_BLOCK_TOKENS = 16384
# No more blocks than this: what is counted in each of them has a size of its own.
_MOST_BLOCKS = 64


def blocks(num_tokens: int) -> Iterator[slice]:
    """Yield slices of the tokens, in order: few enough, and short enough for the cache."""
    size = max(_BLOCK_TOKENS, -(-num_tokens // _MOST_BLOCKS))
    for begin in range(0, num_tokens, size):
        yield slice(begin, begin + size)


def rank_dtype(highest: int) -> type[np.generic]:
    """Return the dtype of values up to ``highest``: uint8 up to 255, else uint16."""
    return np.uint8 if highest <= 255 else np.uint16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerServing:
    """The replica choice of one layer, as look-up tables.

    Attributes
    ----------
    holds
        ``[E, R]``: whether a rank has a replica of an expert.
    replica_rank
        ``[E, C]``: the ranks of an expert's replicas, ascending, the last one repeated.
    num_replicas
        ``[E]`` int64: replicas of each expert; C is the largest.
    choices
        ``[R, E, at most C]``: the ranks among which a pair (home, expert) takes turns,
        ascending, the last one repeated.
    num_choices
        ``[R, E]`` int64: how many of them there are.
    """

    holds: BoolArray
    replica_rank: RankArray
    num_replicas: IntArray
    choices: RankArray
    num_choices: IntArray

    @classmethod
    def of(cls, placement: Placement, layer: int, allow: Allow | None = None) -> Self:
        """Build the tables of one layer of a placement.

        ``allow`` says which replicas may serve; without it, ``local-first``.
        """
        holds = placement.holds(layer)
        num_replicas = holds.sum(axis=1)
        every = np.broadcast_to(np.arange(placement.num_ranks), holds.shape)
        replica_rank = _listed(every, holds)
        exists = np.arange(replica_rank.shape[1]) < num_replicas[:, None]
        allowed = (allow or local_first)(placement, replica_rank, exists)
        choices = _listed(np.broadcast_to(replica_rank, allowed.shape), allowed)
        dtype = rank_dtype(placement.num_ranks - 1)
        return cls(
            holds=holds,
            replica_rank=replica_rank.astype(dtype),
            num_replicas=num_replicas,
            choices=choices.astype(dtype),
            num_choices=allowed.sum(axis=2),
        )

    @property
    def has_replicas(self) -> bool:
        """Whether an expert has more than one replica."""
        return bool(self.replica_rank.shape[1] > 1)

    def ranks(
        self, experts: npt.NDArray[Any], home: RankArray, turn: IntArray | None = None
    ) -> RankArray:
        """Return the rank that serves each pair.

        Parameters
        ----------
        experts
            ``[k, T]`` expert ids, the tokens in the order of the trace.
        home
            ``[T]``: the rank that holds each token's hidden state.
        turn
            ``[T]`` int64: which of equal choices serves, modulo their number; ``None`` for
            the token's index.

        Returns
        -------
        ndarray
            ``[k, T]`` ranks.
        """
        if not self.has_replicas:
            only: RankArray = np.take(self.replica_rank[:, 0], experts)
            return only
        num_experts, num_replicas = self.choices.shape[1:]
        turn = np.arange(experts.shape[1]) if turn is None else turn
        taken: RankArray = np.empty(experts.shape, dtype=self.choices.dtype)
        for part in blocks(experts.shape[1]):
            pair = home[part].astype(np.int64) * num_experts + experts[:, part]
            place = pair * num_replicas + turn[part] % np.take(self.num_choices, pair)
            taken[:, part] = np.take(self.choices, place)
        return taken

    def most_held_rank(self, experts: npt.NDArray[Any], preferred: RankArray) -> RankArray:
        """Return ``[T]``: the rank that could serve most of a token's experts.

        ``preferred`` ([T]) wins where it is among the best, else the lowest rank does.
        """
        if not self.has_replicas:
            return preferred
        best: RankArray = preferred.copy()
        for part in blocks(len(preferred)):
            held = self._held_pairs(experts[:, part])
            at_preferred = held[np.arange(len(held)), preferred[part]]
            better = at_preferred < held.max(axis=1)
            best[part][better] = held.argmax(axis=1)[better]
        return best

    def share_held(self, experts: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Return ``[T, R]``: the share of a token's pairs that each home could serve.

        ``experts`` is ``[k, T]``.
        """
        shares: npt.NDArray[np.float64] = self._held_pairs(experts) / len(experts)
        return shares

    def _held_pairs(self, experts: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
        """Return ``[T, R]``: the pairs of each token that each home could serve."""
        held = np.zeros((experts.shape[1], self.holds.shape[1]), dtype=np.uint16)
        for chosen in experts:
            held += np.take(self.holds, chosen, axis=0)
        return held

    def count_held(
        self, experts: npt.NDArray[Any], group: IntArray, num_groups: int
    ) -> IntArray:
        """Count, for groups of tokens, the pairs that each rank could serve at home.

        Parameters
        ----------
        experts
            ``[k, T]`` expert ids.
        group
            ``[T]`` int64: the group of each token; negative: not counted.
        num_groups
            Number of groups, G.

        Returns
        -------
        ndarray
            ``[G, R]`` int64. With replicas, a pair counts for each rank with a replica.
        """
        num_ranks = self.holds.shape[1]
        counted = group >= 0
        base, chosen = group[counted] * num_ranks, experts[:, counted]
        total = np.zeros(num_groups * num_ranks, dtype=np.int64)
        for replica in range(self.replica_rank.shape[1]):
            cell = base + np.take(self.replica_rank[:, replica], chosen)
            if replica:
                cell = cell[np.take(self.num_replicas, chosen) > replica]
            total += np.bincount(cell.ravel(), minlength=len(total))
        return total.reshape(num_groups, num_ranks)


def local_first(
    placement: Placement, replica_rank: RankArray, exists: BoolArray
) -> BoolArray:
    """Allow the replica at home, else those on the home's node, else all.

    Parameters
    ----------
    placement
        The topology.
    replica_rank, exists
        ``[E, C]``: the rank of each replica, and whether there is one.

    Returns
    -------
    ndarray
        ``[R, E, C]`` bool.
    """
    home = np.arange(placement.num_ranks)[:, None, None]
    node, home_node = (r // placement.ranks_per_node for r in (replica_rank, home))
    allowed = np.broadcast_to(exists, (placement.num_ranks, *exists.shape))
    for nearer in (allowed & (node == home_node), allowed & (replica_rank == home)):
        allowed = np.where(nearer.any(axis=2, keepdims=True), nearer, allowed)
    return allowed


def first_occurrence(values: RankArray) -> BoolArray:
    """Return ``[k, T]``: whether no earlier row of the column holds the same value."""
    first = np.ones(values.shape, dtype=np.bool_)
    for row in range(1, len(values)):
        for earlier in range(row):
            first[row] &= values[row] != values[earlier]
    return first


def majority_rank(ranks: RankArray) -> RankArray:
    """Return ``[T]``: the rank that serves most of a token's experts.

    ``ranks`` is ``[k, T]`` in the router's order; a tie goes to the tied rank that the
    router lists first.
    """
    best: RankArray = ranks[0]
    most = (ranks == best).sum(axis=0, dtype=np.uint16)
    for row in ranks[1:]:
        votes = (ranks == row).sum(axis=0, dtype=np.uint16)
        more = votes > most
        best, most = np.where(more, row, best), np.where(more, votes, most)
    return best


def _listed(values: RankArray, allowed: BoolArray) -> RankArray:
    """Return the allowed values of the last axis in order, the last one repeated."""
    count = allowed.sum(axis=-1, keepdims=True)
    order = np.argsort(~allowed, axis=-1, kind="stable")[..., : count.max()]
    last = np.minimum(np.arange(order.shape[-1]), count - 1)
    return np.take_along_axis(values, np.take_along_axis(order, last, axis=-1), axis=-1)

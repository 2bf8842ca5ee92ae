"""The reported objective, distinct ranks per token, as a cost of the chain of layers.

With :func:`placer.solver.search.dynamic.solve_exactly` it gives proved optima of the copies
themselves where a layer has few assignments, not only of their pair surrogate. Without
replicas the rank that serves most of a token's experts does not depend on its home, so
``follow`` too couples only neighbouring layers.

Legend of the shapes: A assignments, N different rows of experts, R ranks.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np

from placer.arrays import BoolArray, FloatArray, IntArray
from placer.placement.policy import Policy
from placer.placement.topology import Topology
from placer.serving.layer_serving import majority_rank
from placer.trace import Chunk

# Shares are not whole numbers of copies, so a cap met exactly is met except for rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CopiesCost:
    """Cost of the rank copies of recorded tokens, times the number of ranks R.

    ``fixed`` counts the dispatch, with every rank as home equally often; ``follow`` the
    dispatch from the rank that served most of the layer before (any rank before the first
    layer) and the combine to the rank that serves most of this one.

    Attributes
    ----------
    policy
        ``fixed`` or ``follow``.
    topology
        Ranks and what a copy between two of them costs.
    rows
        L arrays ``[N, k]`` int64: different rows of experts, in router order for
        ``follow``, whose ties it breaks; else ascending, which leaves fewer.
    num_tokens
        L arrays ``[N]`` float64: tokens that use each row.
    num_linked
        L-1 arrays ``[N_l, N_{l+1}]`` float64: tokens that use one row after the other;
        empty for ``fixed``.
    """

    policy: Policy
    topology: Topology
    rows: tuple[IntArray, ...]
    num_tokens: tuple[FloatArray, ...]
    num_linked: tuple[FloatArray, ...]

    @classmethod
    def of(cls, chunks: Iterable[Chunk], policy: Policy, topology: Topology) -> Self:
        """Count the rows of recorded tokens."""
        layers = zip(*(chunk.experts for chunk in chunks), strict=True)
        rows, used, counts = [], [], []
        for parts in layers:
            experts = np.concatenate(parts).astype(np.int64)
            if policy == "fixed":
                experts = np.sort(experts, axis=1)
            row, index, count = np.unique(
                experts, axis=0, return_inverse=True, return_counts=True
            )
            rows.append(row)
            used.append(index.reshape(-1))
            counts.append(count.astype(np.float64))
        linked = []
        for layer in range(len(rows) - 1 if policy == "follow" else 0):
            shape = (len(rows[layer]), len(rows[layer + 1]))
            pair = used[layer] * shape[1] + used[layer + 1]
            both = np.bincount(pair, minlength=shape[0] * shape[1]).reshape(shape)
            linked.append(both.astype(np.float64))
        return cls(
            policy=policy,
            topology=topology,
            rows=tuple(rows),
            num_tokens=tuple(counts),
            num_linked=tuple(linked),
        )

    def single(self, layer: int, assignments: IntArray) -> FloatArray:
        """Return ``[A]``: what does not depend on the layer before."""
        rank_cost = self.topology.rank_cost()
        served = self.served(layer, assignments)
        cost = np.zeros(served.shape[:2])
        if self.policy == "fixed" or layer == 0:
            cost += served @ rank_cost.sum(axis=0)
        if self.policy == "follow":
            to_home = rank_cost.T[self.home(layer, assignments)]
            cost += self.topology.num_ranks * (served * to_home).sum(axis=2)
        total: FloatArray = cost @ self.num_tokens[layer]
        return total

    def earlier(self, layer: int, assignments: IntArray) -> FloatArray:
        """Return ``[A, N * R]``: one where a row's tokens have their home on a rank."""
        home = self.home(layer, assignments)
        at_home = home[:, :, None] == np.arange(self.topology.num_ranks)
        features: FloatArray = at_home.reshape(len(home), -1).astype(np.float64)
        return features

    def later(self, layer: int, assignments: IntArray) -> FloatArray:
        """Return ``[A, N * R]``: cost of the next layer from every home of a row."""
        served = self.served(layer + 1, assignments)
        reach = served @ self.topology.rank_cost().T
        cost: FloatArray = self.topology.num_ranks * np.matmul(
            self.num_linked[layer], reach
        )
        return cost.reshape(len(assignments), -1)

    def num_features(self, layer: int) -> int:
        """Return N * R for ``follow``, else 0."""
        if self.policy == "fixed":
            return 0
        return len(self.rows[layer]) * self.topology.num_ranks

    def served(self, layer: int, assignments: IntArray) -> FloatArray:
        """Return ``[A, N, R]``: one where a rank serves an expert of a row."""
        shape = (len(assignments), len(self.rows[layer]), self.topology.num_ranks)
        served = np.zeros(shape)
        for experts in self.rows[layer].T:
            np.put_along_axis(served, assignments[:, experts][:, :, None], 1.0, axis=2)
        return served

    def home(self, layer: int, assignments: IntArray) -> IntArray:
        """Return ``[A, N]``: the rank that serves most of a row."""
        ranks = np.stack([assignments[:, experts] for experts in self.rows[layer].T])
        return majority_rank(ranks).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReceiveLimit:
    """Allows assignments that keep the received copies of each rank under a cap.

    Attributes
    ----------
    cost
        The tokens and their policy.
    max_copies
        Cap on R x the copies that a rank receives per token, in every layer.
    """

    cost: CopiesCost
    max_copies: float

    def allows(self, layer: int, assignments: IntArray) -> BoolArray:
        """Return ``[A]``; layers whose homes follow from the one before may be all."""
        if self.cost.policy == "follow" and layer:
            return np.ones(len(assignments), dtype=np.bool_)
        # Of homes that are any rank with the same probability, one in R is spared.
        num_ranks = self.cost.topology.num_ranks
        reached = self._reached(layer, assignments).max(axis=1)
        return self._meets_cap(reached * (num_ranks - 1) / num_ranks)

    def steps_to(
        self, layer: int, assignments: IntArray
    ) -> Callable[[IntArray], BoolArray] | None:
        """Return a function that says which steps from the layer before are allowed."""
        if self.cost.policy == "fixed":
            return None
        reached = self._reached(layer, assignments)  # [B, R], homes included
        served = self.cost.served(layer, assignments)
        # [N, B, R]: tokens of an earlier row that each rank serves.
        linked = np.tensordot(self.cost.num_linked[layer - 1], served, axes=(1, 1))

        def allowed(earlier: IntArray) -> BoolArray:
            home = self.cost.home(layer - 1, earlier)
            most = np.zeros((len(earlier), len(reached)))
            for rank in range(reached.shape[1]):
                at_home = (home == rank).astype(np.float64)
                received = reached[:, rank] - at_home @ linked[:, :, rank]
                np.maximum(most, received, out=most)
            return self._meets_cap(most)

        return allowed

    def _reached(self, layer: int, assignments: IntArray) -> FloatArray:
        """Return ``[A, R]``: tokens that each rank serves an expert of."""
        served = self.cost.served(layer, assignments)
        reached: FloatArray = np.einsum("anr,n->ar", served, self.cost.num_tokens[layer])
        return reached

    def _meets_cap(self, most: FloatArray) -> BoolArray:
        """Return which numbers of copies to the busiest rank are under the cap."""
        num_tokens = self.cost.num_tokens[0].sum()
        limit = self.max_copies * num_tokens / self.cost.topology.num_ranks
        met: BoolArray = most <= limit * (1 + _ROUNDING)
        return met

"""The reported objective, distinct ranks per token, as a cost of the chain of layers.

With :func:`placer.plan.dynamic.solve_exactly` it gives proved optima of the copies
themselves where a layer has few assignments, not only of their pair surrogate. Without
replicas the rank that serves most of a token's experts does not depend on its home, so
``follow`` too couples only neighbouring layers.

Legend of the shapes: A assignments, N different rows of experts in router order, R ranks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np

from placer.plan.plan import Policy
from placer.plan.problem import FloatArray, IntArray, Topology
from placer.simulation.serving import majority_rank
from placer.trace import Chunk


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
        L arrays ``[N, k]`` int64: different rows of experts, in router order.
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
            row, index, count = np.unique(
                np.concatenate(parts).astype(np.int64),
                axis=0,
                return_inverse=True,
                return_counts=True,
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
        served = self._served(layer, assignments)
        cost = np.zeros(served.shape[:2])
        if self.policy == "fixed" or layer == 0:
            cost += served @ rank_cost.sum(axis=0)
        if self.policy == "follow":
            to_home = rank_cost.T[self._home(layer, assignments)]
            cost += self.topology.num_ranks * (served * to_home).sum(axis=2)
        total: FloatArray = cost @ self.num_tokens[layer]
        return total

    def earlier(self, layer: int, assignments: IntArray) -> FloatArray:
        """Return ``[A, N * R]``: one where a row's tokens have their home on a rank."""
        home = self._home(layer, assignments)
        at_home = home[:, :, None] == np.arange(self.topology.num_ranks)
        features: FloatArray = at_home.reshape(len(home), -1).astype(np.float64)
        return features

    def later(self, layer: int, assignments: IntArray) -> FloatArray:
        """Return ``[A, N * R]``: cost of the next layer from every home of a row."""
        served = self._served(layer + 1, assignments)
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

    def _served(self, layer: int, assignments: IntArray) -> FloatArray:
        """Return ``[A, N, R]``: one where a rank serves an expert of a row."""
        shape = (len(assignments), len(self.rows[layer]), self.topology.num_ranks)
        served = np.zeros(shape)
        for experts in self.rows[layer].T:
            np.put_along_axis(served, assignments[:, experts][:, :, None], 1.0, axis=2)
        return served

    def _home(self, layer: int, assignments: IntArray) -> IntArray:
        """Return ``[A, N]``: the rank that serves most of a row."""
        ranks = np.stack([assignments[:, experts] for experts in self.rows[layer].T])
        return majority_rank(ranks).astype(np.int64)

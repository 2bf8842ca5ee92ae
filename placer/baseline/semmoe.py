"""Co-clustering of tokens and experts: Sem-MoE (arXiv 2503.04398v5, ICLR 2026)."""

import numpy as np

from placer.arrays import FloatArray, IntArray
from placer.baseline.problem import BaselineProblem
from placer.placement.imbalance import imbalance
from placer.placement.placement import Placement
from placer.solver.balance.requests import place_requests

_NUM_STEPS = 8
_NUM_SWAPS = 64
# The weight of balance in the objective; the paper gives no value.
_THETA = 0.5


def semmoe(problem: BaselineProblem) -> Placement:
    """Cluster what is computed and the experts that it uses, in turn.

    arXiv 2503.04398v5, section 3.3 and algorithm 1, every layer separately: experts by
    descending load go to the cluster of most affinity to its experts and to its requests,
    less its load, then random swaps that gain are kept; requests, longest first, go to the
    cluster of most affinity that has room; the best of all turns by theta times the
    imbalance plus (1 - theta) times the remote pairs. A request here is the tokens of one
    id where the trace has ids, as in the paper's formulation, else a sequence. The paper
    gives no weights: all are 1, theta is 0.5, 8 turns, 64 swaps.
    """
    problem.require_no_replicas()
    tokens = problem.tokens
    ids = tokens.sequence_ids if tokens.token_ids is None else tokens.token_ids
    _, request = np.unique(ids, return_inverse=True)
    ranks = []
    for layer, size in enumerate(problem.num_experts):
        counts = np.zeros((int(request.max()) + 1, size))
        np.add.at(counts, (request[:, None], tokens.experts[layer].astype(np.intp)), 1.0)
        affinity = problem.affinity.coactivation[layer].astype(np.float64)
        clustering = _CoClustering(counts, affinity, problem.num_ranks, problem.rng(layer))
        ranks.append(clustering.run())
    return Placement.from_expert_rank(ranks, problem.num_ranks, problem.num_nodes)


class _CoClustering:
    """One layer: ``counts`` ``[N, E]`` of N requests, ``affinity`` ``[E, E]``."""

    def __init__(
        self,
        counts: FloatArray,
        affinity: FloatArray,
        num_clusters: int,
        rng: np.random.Generator,
    ) -> None:
        self._counts, self._rng = counts, rng
        self._clusters = np.arange(num_clusters)
        self._load = counts.sum(axis=0)
        self._length = counts.sum(axis=1)
        self._by_length = np.argsort(-self._length, kind="stable")
        self._affinity = affinity / np.maximum(affinity.sum(axis=1, keepdims=True), 1)

    def run(self) -> IntArray:
        """Alternate; return the cluster of every expert, ``[E]`` int64."""
        request = self._seed_requests()
        best, least = np.empty(0, dtype=np.int64), np.inf
        for _ in range(_NUM_STEPS):
            use = self._use(request)
            expert = self._swap(self._place_experts(use), use)
            request = self._place_requests(expert)
            cost = self._cost(expert, self._use(request))
            if cost < least:
                best, least = expert.copy(), cost
        return best

    def _use(self, request: IntArray) -> FloatArray:
        """Return ``[G, E]``: pairs of each cluster's requests with each expert."""
        use: FloatArray = (request == self._clusters[:, None]).astype(float) @ self._counts
        return use

    def _seed_requests(self) -> IntArray:
        """Give requests to the nearest of requests that use the most different experts."""
        row = self._counts / np.linalg.norm(self._counts, axis=1, keepdims=True)
        seeds = [int(self._by_length[0])]
        while len(seeds) < min(len(self._clusters), len(row)):
            nearest = (row @ row[seeds].T).max(axis=1)
            nearest[seeds] = np.inf
            seeds.append(int(nearest.argmin()))
        nearest_seed: IntArray = (row @ row[seeds].T).argmax(axis=1)
        return nearest_seed

    def _place_experts(self, use: FloatArray) -> IntArray:
        """Place experts by descending load; ``[E]`` int64."""
        num_experts, num_clusters = len(self._load), len(self._clusters)
        from_requests = use / np.maximum(self._load, 1)
        fair = max(self._load.sum() / num_clusters, 1)
        expert = np.full(num_experts, -1, dtype=np.int64)
        together = np.zeros((num_experts, num_clusters))
        load = np.zeros(num_clusters)
        for e in np.argsort(-self._load, kind="stable"):
            full = np.bincount(expert[expert >= 0], minlength=num_clusters) * num_clusters
            score = together[e] + from_requests[:, e] - load / fair
            chosen = int(np.where(full < num_experts, score, -np.inf).argmax())
            expert[e] = chosen
            together[:, chosen] += self._affinity[:, e]
            load[chosen] += self._load[e]
        return expert

    def _swap(self, expert: IntArray, use: FloatArray) -> IntArray:
        """Try random swaps of two experts and keep those that gain."""
        cost = self._cost(expert, use)
        for one, two in self._rng.integers(len(expert), size=(_NUM_SWAPS, 2)):
            swapped = expert.copy()
            swapped[[one, two]] = expert[[two, one]]
            if (after := self._cost(swapped, use)) < cost:
                expert, cost = swapped, after
        return expert

    def _cost(self, expert: IntArray, use: FloatArray) -> float:
        """Return theta x (imbalance - 1) + (1 - theta) x share of remote pairs."""
        load = np.bincount(expert, self._load, minlength=len(self._clusters))
        local = use[expert, np.arange(len(expert))].sum()
        remote = 1 - local / self._load.sum()
        return float(_THETA * (imbalance(load) - 1) + (1 - _THETA) * remote)

    def _place_requests(self, expert: IntArray) -> IntArray:
        """Place requests by descending length, no cluster far above its share."""
        served = self._counts @ (expert[:, None] == self._clusters).astype(float)
        return place_requests(self._counts, served)

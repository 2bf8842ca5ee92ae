"""What a placement does to recorded tokens, layer by layer and rank by rank.

Legend of the shapes: L MoE layers, R ranks, D nodes.
"""

from dataclasses import dataclass

import numpy as np

from placer.arrays import FloatArray, IntArray
from placer.placement import Placement
from placer.placement.imbalance import imbalances
from placer.serving.homes import Batches, fixed_homes
from placer.serving.layer_serving import RankArray, first_occurrence, majority_rank
from placer.serving.replica_choice import Server
from placer.simulation.simulate import DEFAULT_BATCH_SIZE
from placer.target.engine import ReplicaChoice
from placer.trace.stored import Routing


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenCounts:
    """A placement on tokens, under a home policy.

    Attributes
    ----------
    rank_load
        ``[L, R]`` int64: (token, expert) pairs that each rank serves.
    sent
        By metric of :class:`~placer.simulation.sent.Sent`, ``[L]``: what is sent per token.
    local
        ``[L]``: share of the pairs that are served at home.
    traffic
        ``[R, R]``: copies from a home to another rank, per layer and token of that home.
        NaN where no token has its home.
    node_traffic
        ``[D, D]``: the same between nodes, one copy for each node.
    """

    rank_load: IntArray
    sent: dict[str, FloatArray]
    local: FloatArray
    traffic: FloatArray
    node_traffic: FloatArray

    @property
    def imbalance(self) -> FloatArray:
        """``[L]``: max/mean rank load."""
        return imbalances(self.rank_load.astype(np.float64))


def count_tokens(
    placement: Placement,
    tokens: Routing,
    policy: str,
    replica_choice: ReplicaChoice | None,
    layer_ids: tuple[int, ...] | None,
) -> TokenCounts:
    """Serve tokens from a placement under ``fixed`` or ``follow``, and count by layer."""
    num_ranks, num_nodes = placement.num_ranks, placement.num_nodes
    batches = Batches.of(tokens.sequence_ids, DEFAULT_BATCH_SIZE)
    server = Server(placement, replica_choice, batches, layer_ids)
    home = fixed_homes(tokens.sequence_ids, num_ranks)
    load, local = [], []
    sent: dict[str, list[float]] = {name: [] for name in _METRICS}
    traffic = np.zeros((num_ranks, num_ranks), dtype=np.int64)
    node_traffic = np.zeros((num_nodes, num_nodes), dtype=np.int64)
    at_home = np.zeros(num_ranks, dtype=np.int64)
    for layer, serving in enumerate(server.layers()):
        experts = np.ascontiguousarray(tokens.experts[layer].T)
        ranks = server.ranks(serving, experts, home)
        load.append(np.bincount(ranks.ravel(), minlength=num_ranks))
        between = _sent_between(ranks, home, num_ranks)
        per_node = placement.ranks_per_node
        between_nodes = _sent_between(ranks // per_node, home // per_node, num_nodes)
        remote = np.count_nonzero(ranks != home)
        for name, count in zip(
            _METRICS, (remote, between.sum(), between_nodes.sum()), strict=True
        ):
            sent[name].append(count / tokens.num_tokens)
        local.append(1 - remote / ranks.size)
        traffic += between
        node_traffic += between_nodes
        at_home += np.bincount(home, minlength=num_ranks)
        if policy == "follow":
            home = majority_rank(ranks)
    return TokenCounts(
        rank_load=np.array(load),
        sent={name: np.array(values) for name, values in sent.items()},
        local=np.array(local),
        traffic=_per_home(traffic, at_home),
        node_traffic=_per_home(node_traffic, at_home.reshape(num_nodes, -1).sum(axis=1)),
    )


_METRICS = (
    "remote_pairs_per_token",
    "remote_rank_copies_per_token",
    "remote_node_copies_per_token",
)


def _per_home(copies: IntArray, tokens: IntArray) -> FloatArray:
    with np.errstate(invalid="ignore"):
        return copies / tokens[:, None]


def _sent_between(places: RankArray, home: RankArray, number: int) -> IntArray:
    """Return ``[N, N]``: copies from a home to each other place that a token visits."""
    away = first_occurrence(places) & (places != home)
    cell = home.astype(np.int64) * number + places
    counts = np.bincount(cell[away], minlength=number * number)
    return counts.reshape(number, number)

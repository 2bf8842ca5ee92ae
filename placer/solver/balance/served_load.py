"""The share of an expert's load that each replica serves, with even homes."""

from collections.abc import Sequence

import numpy as np

from placer.arrays import BoolArray, FloatArray, IntArray
from placer.placement.placement import Placement
from placer.serving.replica_choice import SglangDraws
from placer.target.engine import ReplicaChoice


class ServedLoad:
    """The shares of replicas, MoE layer by MoE layer.

    ``hash`` splits evenly. ``local-first`` counts for every home the replica there, else
    those on its node, else all. ``sglang-static`` draws: what it draws in a layer depends
    on the layers before, so layers are taken in order.

    Parameters
    ----------
    replica_choice
        Which replica serves.
    placement
        Any placement with these ranks, nodes and slots.
    layer_ids
        As ``SglangDraws`` takes it.
    """

    def __init__(
        self,
        replica_choice: ReplicaChoice,
        placement: Placement,
        layer_ids: Sequence[int] | None,
    ) -> None:
        self._choice = replica_choice
        self._ranks_per_node = placement.ranks_per_node
        self._num_ranks = placement.num_ranks
        self._draws = None
        if replica_choice == "sglang-static" and placement.has_replicas:
            self._draws = SglangDraws(placement, layer_ids)
        # What was drawn last for this layer: for which replicas, by whom; and later draws.
        self._drawn: tuple[bytes, IntArray, SglangDraws] | None = None

    def shares(self, holds: BoolArray) -> FloatArray:
        """Return ``[E, R]``: the share of each expert's load that a rank would serve.

        ``holds`` is ``[E, R]``, the replicas in the layer whose turn it is.
        """
        if self._draws is not None:
            return self._drawn_shares(holds, self._draws)
        replicas = holds.sum(axis=1, keepdims=True)
        if self._choice != "local-first":
            even: FloatArray = holds / replicas
            return even
        in_node = holds.reshape(len(holds), -1, self._ranks_per_node).sum(axis=2)
        without = (in_node == 0).sum(axis=1, keepdims=True)
        here = np.repeat(np.maximum(in_node, 1), self._ranks_per_node, axis=1)
        homes = self._ranks_per_node * (1 / here + without / replicas)
        local: FloatArray = holds * homes / self._num_ranks
        return local

    def place(self, holds: BoolArray) -> FloatArray:
        """Return the same, and go on to the next layer."""
        shares = self.shares(holds)
        if self._drawn is not None:
            self._draws, self._drawn = self._drawn[2], None
        return shares

    def _drawn_shares(self, holds: BoolArray, draws: SglangDraws) -> FloatArray:
        shares = holds.astype(np.float64)
        several = np.flatnonzero(holds.sum(axis=1) > 1)
        # Nothing is drawn for an expert with one replica, wherever it is.
        key = holds[several].tobytes() + several.tobytes()
        if self._drawn is None or self._drawn[0] != key:
            draws = draws.fork()
            self._drawn = key, draws.ranks(holds)[:, several], draws
        shares[several] = 0.0
        np.add.at(shares, (several, self._drawn[1]), 1 / self._num_ranks)
        return shares

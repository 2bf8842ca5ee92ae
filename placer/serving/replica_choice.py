"""Which replica of an expert serves a (token, expert) pair: the engine's replica choice.

- ``local-first``: the replica at the token's home, else one on the home's node, else any.
  Replicas that are equally near take turns by the token's index. No engine does so.
- ``sglang-static``: one replica for each home and expert. It is the replica at home. Else,
  where the home's node has some of the replicas but not all, it is the first of those on
  the node. Else each home draws one, from a fixed seed. This is the table that SGLang
  0.5.23 builds for ``--ep-dispatch-algorithm static`` (``srt/eplb/expert_location.py``),
  from the map that ``placer export sglang`` writes.
- ``hash``: Knuth's multiplicative hash of the token's row in its home's batch, modulo the
  number of replicas. The home does not matter. vLLM 0.32.0 chooses so
  (``model_executor/layers/fused_moe/router/base_router.py``). TensorRT-LLM's
  ``moeComputeRouteKernel`` and SGLang without an all-to-all let the replicas take turns,
  which gives every replica the same share too.
- ``cover``: a replica on a rank that the token visits anyway, else the one on the rank that
  holds most of the experts that are not served yet. It needs a patch of the engine.

Without replicas there is nothing to choose.
"""

import copy
import random
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Self

import numpy as np

from placer.arrays import AnyArray, BoolArray, IntArray
from placer.errors import UsageError
from placer.placement.placement import Placement, holders
from placer.serving.homes import Batches
from placer.serving.layer_serving import Allow, LayerServing, RankArray, local_first
from placer.target.engine import REPLICA_CHOICES, ReplicaChoice

_KNUTH_MULTIPLIER, _HASH_BITS = 2654435769, 32
_SGLANG_SEED = 42
# Tokens of which `cover` holds [k, tokens, ranks] in memory at a time.
_COVER_TOKENS = 8192


class Server:
    """Serves the layers of a placement under a replica choice.

    Parameters
    ----------
    placement
        Experts in slots.
    replica_choice
        Which replica serves; ``None`` where each expert has one.
    batches
        Which tokens share a batch, for ``hash``.
    layer_ids
        As :func:`serving_layers` takes it.
    """

    def __init__(
        self,
        placement: Placement,
        replica_choice: ReplicaChoice | None,
        batches: Batches,
        layer_ids: Sequence[int] | None = None,
    ) -> None:
        self.placement = placement
        self.replica_choice = replica_choice
        self.batches = batches
        self.layer_ids = layer_ids

    def layers(self) -> Iterator[LayerServing]:
        """Yield the tables of every layer, in order."""
        return serving_layers(self.placement, self.replica_choice, self.layer_ids)

    def ranks(self, serving: LayerServing, experts: AnyArray, home: RankArray) -> RankArray:
        """Return ``[k, T]``: the rank that serves each pair.

        Parameters
        ----------
        serving
            The tables of the layer, from :meth:`layers`.
        experts
            ``[k, T]`` expert ids, the tokens in the order of the trace.
        home
            ``[T]``: the rank that holds each token's hidden state.
        """
        if serving.has_replicas and self.replica_choice == "cover":
            return cover_ranks(serving, experts, home, self.placement.ranks_per_node)
        if serving.has_replicas and self.replica_choice == "hash":
            row = self.batches.row_at_home(home, self.placement.num_ranks)
            return serving.ranks(experts, home, turn=hashed_row(row))
        return serving.ranks(experts, home)


def unknown_dense_layers(
    placement: Placement,
    replica_choice: ReplicaChoice | None,
    layer_ids: Sequence[int] | None,
) -> str | None:
    """Return a warning if replica choice assumes that no layer is dense, else ``None``."""
    if replica_choice != "sglang-static" or not placement.has_replicas:
        return None
    if layer_ids is not None:
        return None
    return (
        "no file says which layers are dense. sglang-static assumes none; if some are, "
        "its replica choice is wrong. Bind the trace to its model: placer import FORMAT "
        "FILE --model DIR --out TRACE"
    )


def require_replica_choice(
    placement: Placement, replica_choice: ReplicaChoice | None
) -> None:
    """Refuse a placement with replicas if the replica choice is unknown.

    Raises
    ------
    UsageError
        If it is unknown.
    """
    if replica_choice is None and placement.has_replicas:
        raise UsageError(
            "experts have several replicas, but the replica choice is unknown",
            f"give --replica-choice: {', '.join(REPLICA_CHOICES)}",
        )


def serving_layers(
    placement: Placement,
    replica_choice: ReplicaChoice | None,
    layer_ids: Sequence[int] | None = None,
) -> Iterator[LayerServing]:
    """Yield the tables of every layer of a placement, in order.

    Parameters
    ----------
    placement
        Experts in slots.
    replica_choice
        Which replica serves; ``None`` where each expert has one.
    layer_ids
        ``[L]``: the model's own layer number of each MoE layer, for ``sglang-static``;
        ``None`` where no layer is dense, or nobody knows.

    Raises
    ------
    UsageError
        If experts have several replicas, and nothing says which serves.
    """
    require_replica_choice(placement, replica_choice)
    static: Iterator[IntArray | None] = repeat(None)
    if replica_choice == "sglang-static" and placement.has_replicas:
        static = iter(sglang_static_ranks(placement, layer_ids))
    for layer, fixed in zip(range(placement.num_layers), static, strict=False):
        yield LayerServing.of(placement, layer, _allow(replica_choice, fixed))


def _allow(replica_choice: ReplicaChoice | None, fixed: IntArray | None) -> Allow:
    if fixed is not None:
        return lambda _, replica_rank, exists: exists & (replica_rank == fixed[..., None])
    return _any_replica if replica_choice == "hash" else local_first


def hashed_row(row: IntArray) -> IntArray:
    """Return ``[T]`` int64: Knuth's multiplicative hash of batch rows."""
    hashed = row.astype(np.uint64) * np.uint64(_KNUTH_MULTIPLIER)
    return (hashed & np.uint64((1 << _HASH_BITS) - 1)).astype(np.int64)


def sglang_static_ranks(
    placement: Placement, layer_ids: Sequence[int] | None = None
) -> list[IntArray]:
    """Return L arrays ``[R, E]`` int64: the rank that serves an expert for each home."""
    draws = SglangDraws(placement, layer_ids)
    return [draws.ranks(placement.holds(layer)) for layer in range(placement.num_layers)]


class SglangDraws:
    """SGLang's draws, layer by layer.

    Every rank draws for itself, all from the same seed: layer by layer, expert by expert,
    for each expert that has no near replica. One draw gives a replica to every rank without
    a near one, as evenly as possible; the rank keeps what it gave itself. Ranks draw for
    different experts, so what they give each other differs, and the replicas that they keep
    need not be even.

    SGLang draws for every row of its map, and the map has a row for each hidden layer. So
    the filler rows of dense layers (:meth:`Placement.filler_row`) change the draws for the
    MoE layers after them. Rows after the last MoE layer change nothing, and drafted (MTP)
    layers have no row.

    Parameters
    ----------
    placement
        The topology and the filler row.
    layer_ids
        ``[L]``: the model's own layer number of each MoE layer, ascending; ``None``: no
        layer is dense.
    """

    def __init__(self, placement: Placement, layer_ids: Sequence[int] | None) -> None:
        self._draws = [random.Random(_SGLANG_SEED) for _ in range(placement.num_ranks)]
        self._ranks_per_node = placement.ranks_per_node
        self._filler = holders(
            placement.filler_row(), placement.num_experts[0], placement.num_ranks
        )
        ids = range(placement.num_layers) if layer_ids is None else layer_ids
        # [L]: rows of dense layers right before each MoE layer.
        self._num_fillers = np.diff(ids, prepend=-1) - 1
        self._layer = 0

    def fork(self) -> Self:
        """Return an equal object: both continue with the same draws."""
        other = copy.copy(self)
        other._draws = [_continued(draw) for draw in self._draws]
        return other

    def ranks(self, holds: BoolArray) -> IntArray:
        """Return ``[R, E]`` int64: who serves in the next MoE layer.

        ``holds`` is ``[E, R]``: its replicas.
        """
        for _ in range(self._num_fillers[self._layer]):
            self._draw(self._filler)
        self._layer += 1
        return self._draw(holds)

    def _draw(self, holds: BoolArray) -> IntArray:
        near = _sglang_nearest(holds, self._ranks_per_node)
        chosen = near.copy()
        for expert in np.flatnonzero((near < 0).any(axis=0)):
            replicas = np.flatnonzero(holds[expert]).tolist()
            without = np.flatnonzero(near[:, expert] < 0).tolist()
            for place, home in enumerate(without):
                shares = _fair_shares(replicas, len(without), self._draws[home])
                chosen[home, expert] = shares[place]
        return chosen


def _continued(draw: random.Random) -> random.Random:
    other = random.Random()
    other.setstate(draw.getstate())
    return other


def _sglang_nearest(holds: BoolArray, ranks_per_node: int) -> IntArray:
    """Return ``[R, E]`` int64: the rank of each expert's replica near a home, or -1."""
    num_experts, num_ranks = holds.shape
    node_holds = holds.reshape(num_experts, -1, ranks_per_node)
    in_node, total = node_holds.sum(axis=2), holds.sum(axis=1, keepdims=True)
    first = node_holds.argmax(axis=2) + np.arange(num_ranks // ranks_per_node) * (
        ranks_per_node
    )
    near = np.where((in_node > 0) & (in_node < total), first, -1)
    near = np.repeat(near, ranks_per_node, axis=1)
    near = np.where(holds, np.arange(num_ranks), near)
    return np.where(total == 1, holds.argmax(axis=1)[:, None], near).T


def _fair_shares(replicas: list[int], number: int, draw: random.Random) -> list[int]:
    """Share replicas out to ``number`` ranks, as evenly as can be, in random order."""
    rounds, rest = divmod(number, len(replicas))
    shares = replicas * rounds + draw.sample(replicas, k=rest)
    draw.shuffle(shares)
    return shares


def cover_ranks(
    serving: LayerServing, experts: AnyArray, home: RankArray, ranks_per_node: int
) -> RankArray:
    """Return ``[k, T]``: the ranks that serve, as few of them as a greedy cover finds.

    The token visits its home, and the rank of each expert that has one replica. A pair goes
    to a visited rank that holds its expert. While pairs are left, the token also visits the
    rank that holds most of them, on a node that it visits already if one there holds any.
    Among equal ranks the home comes first, then ranks of the home's node; others take turns
    by the token's index.
    """
    parts = [
        _Cover(serving, experts[:, begin:end], home[begin:end], ranks_per_node, begin).run()
        for begin in range(0, experts.shape[1], _COVER_TOKENS)
        for end in (begin + _COVER_TOKENS,)
    ]
    return np.concatenate(parts, axis=1).astype(serving.replica_rank.dtype)


class _Cover:
    """The cover of some tokens; ``[k, T]`` ranks, -1 where not yet served."""

    def __init__(
        self,
        serving: LayerServing,
        experts: AnyArray,
        home: RankArray,
        ranks_per_node: int,
        first_token: int,
    ) -> None:
        num_ranks = serving.holds.shape[1]
        self.num_tokens = experts.shape[1]
        self.ranks_per_node = ranks_per_node
        self.held = serving.holds[experts]
        self.turn = np.arange(self.num_tokens) + first_token
        self.at_home = np.arange(num_ranks) == home[:, None]
        self.near_home = self._on_nodes_of(self.at_home)
        only = np.take(serving.num_replicas, experts) == 1
        first = np.take(serving.replica_rank[:, 0], experts).astype(np.int64)
        self.served = np.where(only, first, -1)
        self.visited = self.at_home | (self.held & only[..., None]).any(axis=0)

    def run(self) -> IntArray:
        """Serve all pairs, and return their ranks."""
        self._serve()
        while (self.served < 0).any():
            waiting = self.held & (self.served < 0)[..., None]
            count = waiting.sum(axis=0)
            on_node = count * self._on_nodes_of(self.visited)
            count = np.where(on_node.any(axis=1, keepdims=True), on_node, count)
            best = (count == count.max(axis=1, keepdims=True)) & (count > 0)
            needed = np.flatnonzero(best.any(axis=1))
            self.visited[needed, self._pick(best)[needed]] = True
            self._serve()
        return self.served

    def _serve(self) -> None:
        """Serve what a visited rank holds."""
        for place, held in enumerate(self.held):
            able = held & self.visited
            now = able.any(axis=1) & (self.served[place] < 0)
            self.served[place] = np.where(now, self._pick(able), self.served[place])

    def _pick(self, allowed: BoolArray) -> IntArray:
        """Return ``[T]``: one of the allowed ranks ``[T, R]`` (0 where there is none)."""
        for nearer in (allowed & self.near_home, allowed & self.at_home):
            allowed = np.where(nearer.any(axis=1, keepdims=True), nearer, allowed)
        turn = self.turn % np.maximum(allowed.sum(axis=1), 1)
        picked: IntArray = (allowed.cumsum(axis=1) > turn[:, None]).argmax(axis=1)
        return picked

    def _on_nodes_of(self, ranks: BoolArray) -> BoolArray:
        """Return ``[T, R]``: whether a rank is on a node of one of ``ranks``."""
        nodes = ranks.reshape(self.num_tokens, -1, self.ranks_per_node).any(axis=2)
        return np.repeat(nodes, self.ranks_per_node, axis=1)


def _any_replica(placement: Placement, _: RankArray, exists: BoolArray) -> BoolArray:
    return np.broadcast_to(exists, (placement.num_ranks, *exists.shape))

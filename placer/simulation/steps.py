"""Work of a layer's ranks in each batch: pairs, activated experts, copies by link.

A batch is one forward pass of all ranks together: in decoding one token of each sequence
in turn, in prefilling a chunk of consecutive tokens. Only full batches count.

Legend of the shapes: T tokens, k experts per token, B full batches, R ranks, N nodes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from placer.arrays import AnyArray, FloatArray, IntArray
from placer.errors import UsageError
from placer.placement.placement import Placement
from placer.serving.homes import Batches, fixed_homes
from placer.serving.layer_serving import RankArray, blocks, majority_rank
from placer.serving.replica_choice import Server
from placer.simulation.messages import Messages, dispatch_messages
from placer.target.engine import Exchange, ReplicaChoice
from placer.trace import Routing


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinkCopies:
    """Hidden states that ranks send and receive in each batch, over one link class.

    Attributes
    ----------
    sent, received
        ``[B, R]`` float64.
    """

    sent: FloatArray
    received: FloatArray

    @property
    def busiest(self) -> FloatArray:
        """``[B, R]``: the more of the two, for links of two directions."""
        return np.maximum(self.sent, self.received)

    def turned(self) -> "LinkCopies":
        """Return the copies of the combine."""
        return LinkCopies(sent=self.received, received=self.sent)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Copies:
    """Copies of one dispatch or combine, inside nodes (fast) and between them (slow)."""

    fast: LinkCopies
    slow: LinkCopies

    def turned(self) -> "Copies":
        """Return the copies of the combine."""
        return Copies(fast=self.fast.turned(), slow=self.slow.turned())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerSteps:
    """One layer on all full batches.

    Attributes
    ----------
    pairs
        ``[B, R]`` float64: (token, expert) pairs that each rank serves.
    activated
        ``[B, R]`` int64: slots of each rank that serve at least one pair.
    dispatch, combine
        What crosses the wire.
    """

    pairs: FloatArray
    activated: IntArray
    dispatch: Copies
    combine: Copies


def layer_steps(
    placement: Placement,
    tokens: Routing,
    batches: Batches,
    *,
    policy: str,
    exchanges: tuple[Exchange, Exchange],
    replica_choice: ReplicaChoice | None = None,
    layer_ids: Sequence[int] | None = None,
) -> Iterator[LayerSteps]:
    """Serve recorded tokens batch by batch, and yield what each layer's ranks do.

    Parameters
    ----------
    placement
        Experts in slots.
    tokens
        Whole sequences.
    batches
        Which tokens share a batch.
    policy
        Home policy: ``fixed`` or ``follow``.
    exchanges
        Of dispatch and of combine.
    replica_choice
        Which replica of an expert serves; ``None`` where each has one.
    layer_ids
        As :func:`placer.serving.replica_choice.serving_layers` takes it.

    Raises
    ------
    UsageError
        If the policy needs a table.
    """
    if policy not in ("fixed", "follow"):
        raise UsageError(
            f"batches of policy {policy} cannot be served", "choose fixed or follow"
        )
    server = Server(placement, replica_choice, batches, layer_ids)
    return _steps(server, tokens, exchanges, follows=policy == "follow")


def _steps(
    server: Server, tokens: Routing, exchanges: tuple[Exchange, Exchange], *, follows: bool
) -> Iterator[LayerSteps]:
    counter = _Counter(server.placement, server.batches)
    home = fixed_homes(tokens.sequence_ids, server.placement.num_ranks)
    for layer, serving in enumerate(server.layers()):
        experts = np.ascontiguousarray(tokens.experts[layer].T)
        ranks = server.ranks(serving, experts, home)
        back = majority_rank(ranks) if follows else home
        dispatch = counter.copies(exchanges[0], ranks, home)
        same_way = back is home and exchanges[0] == exchanges[1]
        combine = dispatch if same_way else counter.copies(exchanges[1], ranks, back)
        yield LayerSteps(
            pairs=counter.pairs(ranks),
            activated=counter.activated(layer, ranks, experts),
            dispatch=dispatch,
            combine=combine.turned(),
        )
        home = back


class _Counter:
    """Counts per batch and rank."""

    def __init__(self, placement: Placement, batches: Batches) -> None:
        self.placement = placement
        self.batches = batches
        self.num_ranks = placement.num_ranks
        self.width = placement.ranks_per_node
        self.num_cells = batches.num_batches * placement.num_ranks

    def pairs(self, ranks: RankArray) -> FloatArray:
        """Return ``[B, R]``: the pairs that each rank serves."""
        counts = np.zeros(self.num_cells, dtype=np.int64)
        for part in blocks(ranks.shape[1]):
            cell = self._first_cell(part) + ranks[:, part]
            counts += np.bincount(cell.ravel(), minlength=self.num_cells)
        return self._full(counts)

    def activated(self, layer: int, ranks: RankArray, experts: AnyArray) -> IntArray:
        """Return ``[B, R]`` int64: slots that serve at least one pair."""
        num_slots = len(self.placement.physical_to_logical_map[layer])
        slot_of = self.placement.slot_of(layer)
        used = np.zeros(self.batches.num_batches * num_slots, dtype=np.bool_)
        for part in blocks(ranks.shape[1]):
            pair = ranks[:, part].astype(np.int64) * slot_of.shape[1] + experts[:, part]
            slot = np.take(slot_of, pair)
            used[self.batches.batch_of_token[part] * num_slots + slot] = True
        by_slot = used.reshape(self.batches.num_batches, self.num_ranks, -1)
        by_rank: IntArray = by_slot[: self.batches.num_full].sum(axis=2)
        return by_rank

    def copies(self, exchange: Exchange, ranks: RankArray, home: RankArray) -> Copies:
        """Return the copies from each token's home to the ranks that serve it.

        ``ranks`` is ``[k, T]``, ``home`` is ``[T]``.
        """
        if exchange == "all-gather":
            return self._to_all(home, 1.0)
        if exchange == "padded":
            return self._to_all(home, len(ranks) / self.num_ranks)
        # By link class: inside a node, between nodes, and pairs without a message.
        sent, received = np.zeros((2, 3 * self.num_cells), dtype=np.int64)
        for part in blocks(ranks.shape[1]):
            first_cell = self._first_cell(part)
            for message in dispatch_messages(
                exchange, ranks[:, part], home[part], self.width
            ):
                kind = self._link_class(message) * self.num_cells + first_cell
                for counts, rank in ((sent, message.sender), (received, message.receiver)):
                    cell = (kind + rank).ravel()
                    counts += np.bincount(cell, minlength=len(counts))
        fast, slow = (
            LinkCopies(sent=self._full(ours), received=self._full(theirs))
            for ours, theirs in zip(
                sent.reshape(3, -1)[:2], received.reshape(3, -1)[:2], strict=True
            )
        )
        return Copies(fast=fast, slow=slow)

    def _link_class(self, message: Messages) -> IntArray:
        """Return ``[k, T]`` int64: 0 inside a node, 1 between nodes, 2 where nothing is."""
        if self.width == self.num_ranks:
            return np.where(message.sent, 0, 2)
        across = message.sender // self.width != message.receiver // self.width
        return np.where(message.sent, across.astype(np.int64), 2)

    def _first_cell(self, part: slice) -> IntArray:
        """Return ``[T]`` int64: batch x R of some tokens."""
        cell: IntArray = self.batches.batch_of_token[part] * self.num_ranks
        return cell

    def _full(self, counts: IntArray, weight: float = 1.0) -> FloatArray:
        """Return ``[B, R]``: ``weight`` times the tokens of each batch x R + rank."""
        by_batch = counts.reshape(self.batches.num_batches, self.num_ranks)
        tokens = by_batch[: self.batches.num_full].astype(np.float64)
        return weight * self.batches.weight * tokens

    def _to_all(self, home: RankArray, weight: float) -> Copies:
        """Count ``weight`` copies of each token to every other rank."""
        cell = self.batches.batch_of_token * self.num_ranks + home
        own = self._full(np.bincount(cell, minlength=self.num_cells), weight)
        total = own.sum(axis=1, keepdims=True)
        node = own.reshape(len(own), -1, self.width).sum(axis=2)
        node = np.repeat(node, self.width, axis=1)
        return Copies(
            fast=LinkCopies(sent=own * (self.width - 1), received=node - own),
            slow=LinkCopies(
                sent=own * (self.num_ranks - self.width), received=total - node
            ),
        )

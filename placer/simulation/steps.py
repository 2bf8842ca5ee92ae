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
from placer.serving.layer_serving import RankArray, majority_rank
from placer.serving.replica_choice import Server
from placer.simulation.messages import Messages, dispatch_messages
from placer.target.engine import Exchange, ReplicaChoice
from placer.trace import Chunk


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

    @classmethod
    def total(cls, parts: Sequence["LinkCopies"]) -> "LinkCopies":
        """Add up the steps of one dispatch."""
        return cls(
            sent=np.sum([part.sent for part in parts], axis=0),
            received=np.sum([part.received for part in parts], axis=0),
        )

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
    tokens: Chunk,
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
    counter = _Counter(placement, batches)
    home = fixed_homes(tokens.sequence_ids, placement.num_ranks)
    for layer, serving in enumerate(server.layers()):
        experts = np.ascontiguousarray(tokens.experts[layer].T)
        ranks = server.ranks(serving, experts, home)
        back = majority_rank(ranks) if policy == "follow" else home
        cell = batches.batch_of_token * placement.num_ranks + ranks
        yield LayerSteps(
            pairs=counter.per_rank(cell.ravel()),
            activated=counter.activated(layer, ranks, experts),
            dispatch=counter.copies(exchanges[0], ranks, home),
            combine=counter.copies(exchanges[1], ranks, back).turned(),
        )
        home = back


class _Counter:
    """Counts per batch and rank."""

    def __init__(self, placement: Placement, batches: Batches) -> None:
        self.placement = placement
        self.batches = batches
        self.num_ranks = placement.num_ranks
        self.width = placement.ranks_per_node

    def per_rank(self, cell: AnyArray, weight: float = 1.0) -> FloatArray:
        """Return ``[B, R]``: ``weight`` times the tokens of each batch x R + rank."""
        shape = (self.batches.num_batches, self.num_ranks)
        counts = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)
        tokens = counts[: self.batches.num_full].astype(np.float64)
        return weight * self.batches.weight * tokens

    def activated(self, layer: int, ranks: RankArray, experts: AnyArray) -> IntArray:
        """Return ``[B, R]`` int64: slots that serve at least one pair."""
        row = self.placement.physical_to_logical_map[layer]
        slot = self.placement.slot_of(layer)[ranks, experts]
        cell = self.batches.batch_of_token * len(row) + slot
        used = np.zeros(self.batches.num_batches * len(row), dtype=np.bool_)
        used[cell] = True
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
        sent = [
            self._sent(messages)
            for messages in dispatch_messages(exchange, ranks, home, self.width)
        ]
        return Copies(
            fast=LinkCopies.total([copies.fast for copies in sent]),
            slow=LinkCopies.total([copies.slow for copies in sent]),
        )

    def _sent(self, messages: Messages) -> Copies:
        """Count messages by link class."""
        slow = messages.sender // self.width != messages.receiver // self.width
        fast, across = (
            LinkCopies(
                sent=self.per_rank(self._cell(token, sender)),
                received=self.per_rank(self._cell(token, receiver)),
            )
            for token, sender, receiver in (messages.of(~slow), messages.of(slow))
        )
        return Copies(fast=fast, slow=across)

    def _cell(self, token: IntArray, rank: RankArray) -> IntArray:
        """Return batch x R + rank of some tokens."""
        cell: IntArray = self.batches.batch_of_token[token] * self.num_ranks + rank
        return cell

    def _to_all(self, home: RankArray, weight: float) -> Copies:
        """Count ``weight`` copies of each token to every other rank."""
        cell = self.batches.batch_of_token * self.num_ranks + home
        own = self.per_rank(cell, weight)
        total = own.sum(axis=1, keepdims=True)
        node = own.reshape(len(own), -1, self.width).sum(axis=2)
        node = np.repeat(node, self.width, axis=1)
        return Copies(
            fast=LinkCopies(sent=own * (self.width - 1), received=node - own),
            slow=LinkCopies(
                sent=own * (self.num_ranks - self.width), received=total - node
            ),
        )

"""Copies that are sent for served tokens, by exchange.

Legend of the shapes: T tokens, k experts per token, R ranks.
"""

from dataclasses import dataclass

import numpy as np

from placer.arrays import AnyArray, BoolArray, IntArray
from placer.errors import UsageError
from placer.serving.layer_serving import RankArray, first_occurrence
from placer.target.engine import Exchange


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Messages:
    """Copies of hidden states that one step of a dispatch sends.

    Attributes
    ----------
    sender, receiver
        ``[k, T]`` ranks.
    sent
        ``[k, T]``: whether there is such a message.
    """

    sender: RankArray
    receiver: RankArray
    sent: BoolArray

    def between(self, num_ranks: int) -> IntArray:
        """Return ``[R, R]`` int64: messages from each rank to each."""
        pair = self.sender.astype(np.int64) * num_ranks + self.receiver
        counts = np.bincount(pair[self.sent], minlength=num_ranks**2)
        return counts.reshape(num_ranks, num_ranks)


def dispatch_messages(
    exchange: Exchange, ranks: RankArray, home: RankArray, ranks_per_node: int
) -> tuple[Messages, ...]:
    """Return what the steps of a dispatch send; a combine sends the same in reverse.

    Parameters
    ----------
    exchange
        ``per-expert``: one copy per (token, expert) pair served elsewhere. ``per-rank``:
        one per rank that serves, duplicates removed. ``per-node``: one per other node, to
        the rank there with the home's local index, which then sends one to every other
        rank of its node that serves.
    ranks
        ``[k, T]``: the rank that serves each pair.
    home
        ``[T]``: the rank that holds each token.
    ranks_per_node
        Ranks of a node.

    Raises
    ------
    UsageError
        For exchanges whose messages do not depend on the placement.
    """
    origin = np.broadcast_to(home, ranks.shape)
    if exchange == "per-expert":
        return (Messages(sender=origin, receiver=ranks, sent=ranks != home),)
    if exchange not in ("per-rank", "per-node"):
        raise UsageError(
            f"exchange {exchange} sends the same for every placement",
            "choose per-expert, per-rank or per-node",
        )
    first = first_occurrence(ranks)
    if exchange == "per-rank":
        return (Messages(sender=origin, receiver=ranks, sent=first & (ranks != home)),)
    # A byte holds the ranks of a node of 256, but not their number.
    wide, wide_home = ranks.astype(np.uint16), home.astype(np.uint16)
    node = wide // ranks_per_node
    landing: AnyArray = node * ranks_per_node + wide_home % ranks_per_node
    landing = landing.astype(ranks.dtype)
    away = first_occurrence(node) & (node != wide_home // ranks_per_node)
    # In the home's own node the landing rank is the home itself.
    return (
        Messages(sender=origin, receiver=landing, sent=away),
        Messages(sender=landing, receiver=ranks, sent=first & (ranks != landing)),
    )

"""The bytes that a simulation predicts for a replayed run, and its time on other links."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from placer.arrays import FloatArray, IntArray
from placer.placement.placement import Placement
from placer.replay.traffic import Collective
from placer.serving.homes import Batches
from placer.serving.layer_serving import RankArray, majority_rank
from placer.serving.replica_choice import Server
from placer.simulation.cost import exchange_seconds
from placer.simulation.messages import dispatch_messages
from placer.simulation.steps import Copies, LinkCopies
from placer.table.homes import TableHomes
from placer.table.table import Table
from placer.target.engine import Exchange
from placer.target.hardware import Hardware
from placer.trace import Chunk


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairCopies:
    """Hidden states sent between ranks; the diagonal never leaves one, and says nothing.

    Attributes
    ----------
    dispatch, combine
        ``[L, R, R]`` int64: from each rank to each.
    """

    dispatch: IntArray
    combine: IntArray


def predict_copies(
    placement: Placement,
    tokens: Chunk,
    *,
    exchange: Exchange,
    policy: str,
    batch_size: int,
    fixed: RankArray,
    table: Table | None,
) -> PairCopies:
    """Serve recorded tokens from a placement, and count what each rank sends to each.

    Parameters
    ----------
    placement
        Experts in slots.
    tokens
        What the routers chose, token by token; ``batch_size`` consecutive ones share a
        batch.
    exchange
        ``per-expert``, ``per-rank``, ``per-node``, or ``padded`` to the capacity that no
        token exceeds.
    policy
        Home policy: ``fixed``, ``follow``, or ``token_equal`` with the table (by
        its combined rule where it has one).
    batch_size
        Tokens of one forward pass of all ranks.
    fixed
        ``[T]``: homes of ``fixed``, with which ``follow`` begins.
    table
        The placement's table, or ``None``.
    """
    batches = Batches(
        order=np.arange(tokens.num_tokens),
        batch_of_token=np.arange(tokens.num_tokens) // batch_size,
        size=batch_size,
    )
    server = Server(placement, "local-first", batches)
    width, num_ranks = placement.ranks_per_node, placement.num_ranks
    sent: dict[str, list[IntArray]] = {"dispatch": [], "combine": []}
    homes = None if table is None else TableHomes(table, tokens.token_ids, fixed)
    home = fixed
    for layer, serving in enumerate(server.layers()):
        experts = np.ascontiguousarray(tokens.experts[layer].T)
        if policy == "token_equal" and homes is not None:
            home = homes.best(layer).equal(batches)
        ranks = server.ranks(serving, experts, home)
        if homes is not None:
            homes.served(ranks, experts)
        back = majority_rank(ranks) if policy == "follow" else home
        if exchange == "padded":
            rows = _capacities(placement.slot_of(layer)[ranks, experts], home, batches)
            rows *= len(placement.physical_to_logical_map[layer]) // num_ranks
            for layers in sent.values():
                layers.append(np.full((num_ranks, num_ranks), rows))
            continue
        for way, at in (("dispatch", home), ("combine", back)):
            steps = dispatch_messages(exchange, ranks, at, width)
            between = np.sum([step.between(num_ranks) for step in steps], axis=0)
            sent[way].append(between if way == "dispatch" else between.T)
        home = back
    return PairCopies(**{way: np.stack(layers) for way, layers in sent.items()})


def _capacities(slots: IntArray, home: RankArray, batches: Batches) -> int:
    """Sum over batches the most tokens that a rank has for a slot.

    ``slots`` is ``[k, T]``, ``home`` is ``[T]``.
    """
    num_slots, num_homes = int(slots.max()) + 1, int(home.max()) + 1
    group = batches.batch_of_token * num_homes + home
    counts = np.bincount(
        (group * num_slots + slots).ravel(),
        minlength=batches.num_batches * num_homes * num_slots,
    )
    return int(counts.reshape(batches.num_batches, -1).max(axis=1).sum())


def predict_seconds(
    seconds: float,
    collectives: Sequence[Collective],
    *,
    num_passes: int,
    ranks_per_node: int,
    here: Hardware,
    elsewhere: Hardware,
) -> float:
    """Return what a measured forward pass would take with other links.

    Computation is what is left of the pass without what its collectives take by the links
    that it was measured on; the same collectives then take what they do elsewhere, until
    the last rank has done its part. Where ranks share a processor, those that are done
    early leave it to those that are not: of the time by which the last rank is behind the
    mean, as much is won back as it computes faster alone, on all links.

    Parameters
    ----------
    seconds
        Of a forward pass of all ranks, measured here.
    collectives
        What it sent, ``[R, R]`` bytes each, in all passes.
    num_passes
        Forward passes.
    ranks_per_node
        Ranks of a node.
    here, elsewhere
        The links that it was measured on, and the others. The processor is the one here.
    """
    before, behind_here = _collective_seconds(collectives, ranks_per_node, here)
    after, behind = _collective_seconds(collectives, ranks_per_node, elsewhere)
    share = here.processor_share
    # What is left here is the computation less what it won back: so much at most, or all
    # that ranks were late.
    left = max(seconds - before / num_passes, 0.0)
    compute = min(left / share, left + behind_here / num_passes)
    won_back = min(behind / num_passes, (1 - share) * compute)
    return compute + after / num_passes - won_back


def _collective_seconds(
    collectives: Sequence[Collective], ranks_per_node: int, hardware: Hardware
) -> tuple[float, float]:
    """Add up what collectives take, and by how much the last rank is behind the mean."""
    total, behind = 0.0, 0.0
    curve = hardware.all_gather
    for operation in ("all_to_all", "all_gather"):
        chosen = [one.num_bytes for one in collectives if one.operation == operation]
        if not chosen:
            continue
        sent = np.stack(chosen).astype(float)
        num_ranks = sent.shape[-1]
        ranks = np.arange(num_ranks)
        sent[:, ranks, ranks] = 0
        if operation == "all_gather" and curve is not None:
            total += float(curve.at(sent.sum(axis=2).max(axis=1)).sum())
            continue
        node = ranks // ranks_per_node
        far = node[:, None] != node
        copies = Copies(fast=_moved(sent * ~far), slow=_moved(sent * far))
        seconds = exchange_seconds(hardware, num_ranks // ranks_per_node, copies, 1)
        last = seconds.max(axis=1)
        total += float(last.sum())
        behind += float((last - seconds.mean(axis=1)).sum())
    return total, behind


def _moved(num_bytes: FloatArray) -> LinkCopies:
    """Return what each rank sends and receives, from bytes ``[n, R, R]``."""
    return LinkCopies(sent=num_bytes.sum(axis=2), received=num_bytes.sum(axis=1))

"""How the experts of a rank get their tokens: exchanges for transformers.

Each is an ``EPImplementation`` of transformers 5
(``transformers/distributed/expert_parallel.py``), whose own all-to-all sends a hidden state
once per expert. Here it is sent once per rank that serves it. The experts' weighted outputs
are added up where they are computed, so only one sum returns (de-duplication, as in DeepEP
and in Speculative MoE). For inference: no gradients.

After :func:`register`, ``DistributedConfig(ep_size=R, ep_implementation="placer-dedup")``
uses them on any checkpoint that transformers can serve expert-parallel, such as one that
``placer export checkpoint`` wrote.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.expert_parallel import (
    EPImplementation,
    EPImplementationInterface,
)

from placer.errors import PlacerError
from placer.replay.kinds import DEDUP, PADDED, PER_NODE, SHUFFLE
from placer.replay.token_shuffle import TokenShuffle

Tensor = torch.Tensor

#: A pair that another rank serves.
ELSEWHERE = -1


def register(
    *, ranks_per_node: int | None = None, shuffle: TokenShuffle | None = None
) -> None:
    """Let ``DistributedConfig.ep_implementation`` name placer's exchanges.

    ``placer-dedup`` and ``padded`` always, ``placer-per-node`` if ``ranks_per_node`` is
    given, and ``placer-shuffle`` if there is a token shuffle, which must watch the model.
    """
    add = EPImplementationInterface.register
    add(DEDUP, DedupExchange)
    add(PADDED, PaddedExchange)
    if ranks_per_node is not None:
        add(PER_NODE, partial(PerNodeExchange, ranks_per_node=ranks_per_node))
    if shuffle is not None:
        add(SHUFFLE, partial(ShuffleExchange, shuffle=shuffle))


class DedupExchange(EPImplementation):
    """One copy of a token per rank that serves it; each rank returns one sum.

    Parameters
    ----------
    experts
        The experts module, which holds this rank's slots only.
    ep_mesh
        The ranks that share the experts.
    tp_mesh
        The ranks that hold the same tokens; each sends an equal slice of them.
    """

    def __init__(self, experts: Any, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.num_slots: int = experts.num_experts
        self.group = ep_mesh.get_group()
        self.rank = ep_mesh.get_local_rank()
        self.num_ranks = ep_mesh.size()

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Serve tokens that this rank holds.

        Parameters
        ----------
        hidden
            ``[n, H]``.
        ids, weights
            ``[n, k]``: physical experts of the whole group, and their routing weights.

        Returns
        -------
        Tensor
            ``[n, H]``: the weighted sum of each token's experts.

        Raises
        ------
        PlacerError
            If gradients are wanted.
        """
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise PlacerError(
                "placer's exchanges compute no gradients",
                'run under torch.no_grad(), or train with ep_implementation="all_to_all"',
            )
        ids = ids.long()  # some routers choose in int32, by which not every torch scatters
        if self.tp_mesh.size() == 1:
            return self._served(hidden, ids, weights)
        slices = self._slices(hidden, ids, weights)
        mine = slices[self.tp_mesh.get_local_rank()]
        served = self._served(hidden[mine], ids[mine], weights[mine])
        return _gathered(served, slices, self.tp_mesh)

    def _slices(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Sequence[Tensor]:
        """Return the rows of each rank of ``tp_mesh``."""
        rows = torch.arange(len(hidden), device=hidden.device)
        return rows.tensor_split(self.tp_mesh.size())

    def _hops(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """Return the steps of a dispatch: from ids ``[n, k]`` to the next rank of each."""
        return (self._owner,)

    def _owner(self, ids: Tensor) -> Tensor:
        return ids.div(self.num_slots, rounding_mode="floor")

    def _served(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self._through(self._hops(), hidden, ids, weights)

    def _through(
        self,
        hops: Sequence[Callable[[Tensor], Tensor]],
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Take rows along the hops to their experts, and their sums back."""
        if not hops:
            return run_experts(
                self.experts_forward, hidden, self._local(ids), weights, self.num_slots
            )
        next_rank = hops[0](ids)
        rank, row = visits(next_rank, self.num_ranks)
        elsewhere = next_rank[row] != rank[:, None]
        sizes = torch.bincount(rank, minlength=self.num_ranks)
        received = exchange_sizes(sizes, self.group)
        send = partial(
            send_rows, send_sizes=sizes.tolist(), recv_sizes=received, group=self.group
        )
        come_ids, come_weights = unpacked(
            send(
                packed(
                    ids[row].masked_fill(elsewhere, ELSEWHERE),
                    weights[row].masked_fill(elsewhere, 0),
                )
            ),
            weights,
        )
        served = self._through(hops[1:], send(hidden[row]), come_ids, come_weights)
        back = send_rows(served, received, sizes.tolist(), self.group)
        return added_up(back, row, len(hidden)).to(hidden.dtype)

    def _local(self, ids: Tensor) -> Tensor:
        """Return places among this rank's slots; one past the last for all others."""
        first = self.rank * self.num_slots
        return torch.where(self._owner(ids) == self.rank, ids - first, self.num_slots)


class PaddedExchange(DedupExchange):
    """The same number of rows from each rank to each expert, padded; all come back.

    DeepSpeed-MoE's exchange without dropped tokens (``drop_tokens=False``): the capacity is
    the most tokens that any rank has for any expert.
    """

    def _served(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        num_slots = self.num_slots * self.num_ranks
        flat = ids.flatten()
        counts = torch.bincount(flat, minlength=num_slots)
        most = counts.max()
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        capacity = int(most)
        order = flat.argsort(stable=True)
        first = counts.cumsum(0) - counts
        turn = torch.arange(len(flat), device=flat.device) - first[flat[order]]
        at = flat[order] * capacity + turn
        sent = hidden.new_zeros(num_slots * capacity, hidden.shape[1])
        sent[at] = hidden[order // ids.shape[1]]
        sizes = [self.num_slots * capacity] * self.num_ranks
        rows = send_rows(sent, sizes, sizes, self.group)
        local = torch.arange(self.num_slots, device=flat.device).repeat_interleave(capacity)
        local = local.repeat(self.num_ranks)[:, None]
        unweighted = torch.ones_like(local, dtype=rows.dtype)
        served = run_experts(self.experts_forward, rows, local, unweighted, self.num_slots)
        back = send_rows(served, sizes, sizes, self.group)[at]
        weighted = back * weights.flatten()[order, None]
        return added_up(weighted, order // ids.shape[1], len(hidden)).to(hidden.dtype)


class PerNodeExchange(DedupExchange):
    """One copy of a token per node that serves it, then one per rank inside the node.

    A copy lands on the rank that has in its node the number that the token's rank has in
    its own, and is passed on from there; sums return the same way (as DeepEP's kernels
    across nodes).

    Parameters
    ----------
    experts, ep_mesh, tp_mesh
        As for :class:`DedupExchange`.
    ranks_per_node
        Ranks of a node; ranks are numbered node by node.

    Raises
    ------
    PlacerError
        If the ranks do not divide into such nodes.
    """

    def __init__(
        self,
        experts: Any,
        ep_mesh: DeviceMesh,
        tp_mesh: DeviceMesh,
        *,
        ranks_per_node: int,
    ) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        if ranks_per_node < 1 or self.num_ranks % ranks_per_node:
            raise PlacerError(
                f"{self.num_ranks} ranks do not divide into nodes of {ranks_per_node}"
            )
        self.ranks_per_node = ranks_per_node

    def _hops(self) -> Sequence[Callable[[Tensor], Tensor]]:
        return (self._landing, self._owner)

    def _landing(self, ids: Tensor) -> Tensor:
        node = self._owner(ids).div(self.ranks_per_node, rounding_mode="floor")
        landing = node * self.ranks_per_node + self.rank % self.ranks_per_node
        return landing.masked_fill(ids < 0, ELSEWHERE)


class ShuffleExchange(DedupExchange):
    """The ranks share a batch, and each serves the slice that a token table gives it.

    Speculative MoE's shuffled token slices (s-TS): tokens go where most of their experts
    are predicted to be, equally many to every rank; the order is restored afterwards.

    Parameters
    ----------
    experts, ep_mesh, tp_mesh
        As for :class:`DedupExchange`; every rank must hold the same batch.
    shuffle
        The table, which watches the model.

    Raises
    ------
    PlacerError
        If the table is for another number of ranks, or of layers.
    """

    needs_shared_batch = True  # transformers refuses ranks with different batches

    def __init__(
        self,
        experts: Any,
        ep_mesh: DeviceMesh,
        tp_mesh: DeviceMesh,
        *,
        shuffle: TokenShuffle,
    ) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        if shuffle.table.num_ranks != self.num_ranks:
            raise PlacerError(
                f"the table is for {shuffle.table.num_ranks} ranks, the model runs on "
                f"{self.num_ranks}",
                f"set ep_size={shuffle.table.num_ranks}, or make a table of another plan: "
                "placer tables PLAN TRACE --out TABLE",
            )
        self.shuffle = shuffle
        self.layer = shuffle.add_layer()

    def _slices(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Sequence[Tensor]:
        home = self.shuffle.homes(self.layer, ids, self._owner(ids), weights)
        return [torch.nonzero(home == rank).flatten() for rank in range(self.num_ranks)]


def run_experts(
    forward: Callable[..., Tensor],
    hidden: Tensor,
    local_ids: Tensor,
    weights: Tensor,
    num_local_experts: int,
) -> Tensor:
    """Return ``[n, H]``: weighted sums over the experts that this rank holds.

    Every pair is a separate row, since a row with experts elsewhere would be computed
    for those too by some of transformers' kernels.

    Parameters
    ----------
    forward
        The experts' own forward.
    hidden
        ``[n, H]``.
    local_ids, weights
        ``[n, k]``; ids of ``num_local_experts`` are served elsewhere.
    num_local_experts
        Slots of this rank.
    """
    row, place = torch.nonzero(local_ids < num_local_experts, as_tuple=True)
    if len(row) == 0:
        return torch.zeros_like(hidden)
    ids, weight = local_ids[row, place][:, None], weights[row, place][:, None]
    return added_up(forward(hidden[row], ids, weight), row, len(hidden)).to(hidden.dtype)


def added_up(rows: Tensor, at: Tensor, number: int) -> Tensor:
    """Add rows ``[m, H]`` up where ``at`` [m] says, in float32; return ``[number, H]``."""
    total = torch.zeros(number, rows.shape[1], dtype=torch.float32, device=rows.device)
    return total.index_add_(0, at, rows.float())


def visits(next_rank: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
    """Return the distinct (rank, row) pairs of ``[n, k]`` ranks, by rank, then row.

    Negative ranks are no visit.
    """
    visited = torch.zeros(
        len(next_rank), num_ranks + 1, dtype=torch.bool, device=next_rank.device
    )
    visited.scatter_(1, next_rank.remainder(num_ranks + 1), value=True)
    rank, row = torch.nonzero(visited[:, :num_ranks].T, as_tuple=True)
    return rank, row


def exchange_sizes(sizes: Tensor, group: dist.ProcessGroup) -> list[int]:
    """Send each rank the number of rows that it will get; return this rank's own."""
    received = torch.empty_like(sizes)
    dist.all_to_all_single(received, sizes, group=group)
    return [int(size) for size in received.tolist()]


def send_rows(
    rows: Tensor, send_sizes: list[int], recv_sizes: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Send ``send_sizes[r]`` consecutive rows to each rank r; return the received rows."""
    received = rows.new_empty((sum(recv_sizes), *rows.shape[1:]))
    dist.all_to_all_single(received, rows.contiguous(), recv_sizes, send_sizes, group)
    return received


def packed(ids: Tensor, weights: Tensor) -> Tensor:
    """Return ids ``[n, i]`` and weights ``[n, k]`` as one int32 message ``[n, i + k]``."""
    bits = weights.to(torch.float32).contiguous().view(torch.int32)
    return torch.cat([ids.to(torch.int32), bits], dim=1)


def unpacked(message: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ids (int64) and the weights, shaped and typed as ``weights`` [*, k]."""
    num_ids = message.shape[1] - weights.shape[1]
    bits = message[:, num_ids:].contiguous().view(torch.float32)
    return message[:, :num_ids].long(), bits.to(weights.dtype)


def _gathered(served: Tensor, slices: Sequence[Tensor], mesh: DeviceMesh) -> Tensor:
    """Give all slices to every rank of the mesh, in the original order."""
    longest = max(len(rows) for rows in slices)
    sent = served.new_zeros(longest, served.shape[1])
    sent[: len(served)] = served
    everything = [torch.empty_like(sent) for _ in slices]
    dist.all_gather(everything, sent, group=mesh.get_group())
    result = served.new_empty(sum(map(len, slices)), served.shape[1])
    for rows, came in zip(slices, everything, strict=True):
        result[rows] = came[: len(rows)]
    return result

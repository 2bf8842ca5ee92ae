"""The load balancer of DeepSeek: EPLB (github.com/deepseek-ai/EPLB, its README)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.baseline.problem import BaselineProblem
from placer.errors import UsageError
from placer.plan.balance import greedy_balance
from placer.plan.placement import Placement
from placer.plan.problem import FloatArray, IntArray, Topology

BoolArray = npt.NDArray[np.bool_]


def eplb(problem: BaselineProblem) -> Placement:
    """Place copies of a problem's experts by its profile's load: see :func:`pack_loads`."""
    topology, model = problem.topology, problem.trace.model
    return pack_loads(problem.load, topology, problem.redundant_experts, model.n_group)


def pack_loads(
    loads: Sequence[npt.NDArray[Any]],
    topology: Topology,
    redundant_experts: int = 0,
    n_group: int = 1,
) -> Placement:
    """Replicate the busiest experts and pack all copies evenly; load is all it sees.

    Where the nodes divide the model's router groups, hierarchically: groups are packed
    into nodes, experts replicated inside their node, copies packed into its ranks. Else
    globally, as if all ranks were one node. Packing takes copies by descending load, each
    to the least loaded rank with a free slot; here also one without that expert, as
    engines need no two copies on a rank.

    Parameters
    ----------
    loads
        L arrays ``[E]``: pairs per expert.
    topology
        Ranks and nodes.
    redundant_experts
        Slots per layer beyond one for each expert.
    n_group
        The model's router groups.

    Raises
    ------
    UsageError
        If a rank would hold two copies of an expert.
    """
    num_ranks = topology.num_ranks
    hierarchical = n_group % topology.num_nodes == 0
    num_nodes = topology.num_nodes if hierarchical else 1
    rows = []
    for layer, counts in enumerate(loads):
        slots = (len(counts) + redundant_experts) // num_ranks
        if slots > len(counts) // num_nodes:
            raise UsageError(
                f"MoE layer {layer}: {slots} slots per rank for "
                f"{len(counts) // num_nodes} experts, but no rank may hold two copies",
                f"ask for fewer: --redundant-experts {num_ranks}",
            )
        load = counts.astype(np.float64)
        node = _node_of_expert(load, n_group if hierarchical else 1, num_nodes)
        held = [
            _fill_node(load, np.flatnonzero(node == n), num_ranks // num_nodes, slots)
            for n in range(num_nodes)
        ]
        rows.append(np.concatenate(held))
    return Placement(
        physical_to_logical_map=tuple(rows),
        num_experts=tuple(len(counts) for counts in loads),
        num_ranks=num_ranks,
        num_nodes=topology.num_nodes,
    )


def _node_of_expert(load: FloatArray, n_group: int, num_nodes: int) -> IntArray:
    """Pack the router groups, which are slices of the experts, into nodes."""
    group_node = greedy_balance(load.reshape(n_group, -1).sum(axis=1), num_nodes)
    return np.repeat(group_node, len(load) // n_group)


def _fill_node(
    load: FloatArray, experts: IntArray, num_ranks: int, slots_per_rank: int
) -> IntArray:
    """Return the experts in the slots of a node's ranks, ascending on every rank."""
    count = np.ones(len(experts), dtype=np.int64)
    for _ in range(num_ranks * slots_per_rank - len(experts)):
        per_copy = np.where(count < num_ranks, load[experts] / count, -1.0)
        count[per_copy.argmax()] += 1
    holds = _pack(load[experts] / count, count, num_ranks, slots_per_rank)
    return experts[np.nonzero(holds.T)[1]]


def _pack(
    load_per_copy: FloatArray, count: IntArray, num_ranks: int, slots_per_rank: int
) -> BoolArray:
    """Return ``[n, R]``: whether a rank holds an expert, ``count`` ranks for each."""
    holds = np.zeros((len(count), num_ranks), dtype=np.bool_)
    for expert in np.argsort(-load_per_copy, kind="stable"):
        for _ in range(count[expert]):
            total = load_per_copy @ holds
            free = holds.sum(axis=0) < slots_per_rank
            if (free & ~holds[expert]).any():
                rank = int(np.where(free & ~holds[expert], total, np.inf).argmin())
                holds[expert, rank] = True
            else:
                _trade(holds, int(expert), int(free.argmax()), load_per_copy)
    return holds


def _trade(holds: BoolArray, expert: int, free: int, load_per_copy: FloatArray) -> None:
    """Give ``expert`` to a full rank, which gives another expert to the rank ``free``.

    The rank ``free`` has the expert already. There is always such a trade, as a full rank
    holds more experts than it; of all, the one with the least load on either rank.
    """
    total = load_per_copy @ holds
    given, rank = np.nonzero(holds & ~holds[:, [free]] & ~holds[expert])
    after = np.maximum(
        total[free] + load_per_copy[given],
        total[rank] - load_per_copy[given] + load_per_copy[expert],
    )
    best = int(after.argmin())
    holds[given[best], [free, rank[best]]] = True, False
    holds[expert, rank[best]] = True

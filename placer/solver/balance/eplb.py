"""The load balancer of DeepSeek: EPLB (github.com/deepseek-ai/EPLB, its README)."""

from collections.abc import Sequence

import numpy as np

from placer.arrays import AnyArray, FloatArray, IntArray
from placer.errors import UsageError
from placer.placement.placement import Placement
from placer.placement.topology import Topology
from placer.solver.balance.load_caps import greedy_balance
from placer.solver.balance.packing import packed


def pack_loads(
    loads: Sequence[AnyArray],
    topology: Topology,
    redundant_experts: int = 0,
    n_group: int = 1,
) -> Placement:
    """Replicate the busiest experts and pack all replicas evenly, by load only.

    Where the nodes divide the model's router groups, hierarchically: groups are packed
    into nodes, experts replicated inside their node, replicas packed into its ranks. Else
    globally, as if all ranks were one node. Packing takes replicas by descending load, each
    to the least loaded rank with a free slot; here also one without that expert, as
    engines need no two replicas on a rank.

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
        If a rank would hold two replicas of an expert.
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
                f"{len(counts) // num_nodes} experts, but no rank may hold two replicas "
                "of one expert",
                f"ask for fewer: --redundant-experts {num_ranks}",
            )
        load = counts.astype(np.float64)
        node = _node_of_expert(load, n_group if hierarchical else 1, num_nodes)
        per_node = num_ranks // num_nodes
        held = [np.flatnonzero(node == n) for n in range(num_nodes)]
        rows.append(
            np.concatenate(
                [one[packed(load[one], per_node, per_node * slots)] for one in held]
            )
        )
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

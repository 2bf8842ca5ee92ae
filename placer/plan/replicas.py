"""Where replicas start: copies of the busiest experts on the least loaded ranks."""

from collections.abc import Sequence

import numpy as np

from placer.errors import UsageError
from placer.plan.placement import Placement
from placer.plan.problem import FloatArray


def with_replicas(
    placement: Placement,
    load: Sequence[FloatArray],
    redundant_experts: int,
    *,
    is_careful: bool = False,
) -> Placement:
    """Give every rank further slots, filled with the experts that relieve most.

    Of all experts that the least loaded rank does not hold yet, it takes the one with the
    most load per copy: the replication rule of DeepSeek's EPLB, here on a placement that
    is already there. The refinement then decides anew, by traffic too.

    A careful choice takes the expert with the least load, each copy counted as if it
    served all of it: whoever serves, ranks hardly get more load than before.

    Parameters
    ----------
    placement
        A placement without replicas.
    load
        L arrays ``[E]``: pairs per expert.
    redundant_experts
        Further slots per layer.
    is_careful
        Whether copies may serve more of their expert's load than an even share.

    Raises
    ------
    UsageError
        If the slots do not divide over the ranks, or a rank would hold every expert
        already.
    """
    num_ranks = placement.num_ranks
    if redundant_experts % num_ranks:
        raise UsageError(
            f"{redundant_experts} redundant experts do not divide over {num_ranks} ranks",
            f"give a multiple: --redundant-experts {num_ranks}",
        )
    more = redundant_experts // num_ranks
    rows = []
    for layer, counts in enumerate(load):
        slots = placement.physical_to_logical_map[layer].reshape(num_ranks, -1)
        if slots.shape[1] + more > len(counts):
            raise UsageError(
                f"MoE layer {layer}: {slots.shape[1] + more} slots per rank for "
                f"{len(counts)} experts, but no rank may hold two copies of one",
                f"ask for fewer: --redundant-experts {num_ranks}",
            )
        holds = placement.holds(layer)
        for _ in range(redundant_experts):
            each = counts if is_careful else counts / holds.sum(axis=1)
            share = holds * each[:, None]
            free = holds.sum(axis=0) < slots.shape[1] + more
            rank = int(np.where(free, share.sum(axis=0), np.inf).argmin())
            worth = np.where(holds[:, rank], -np.inf, -each if is_careful else each)
            holds[int(worth.argmax()), rank] = True
        rows.append(np.nonzero(holds.T)[1].astype(np.int64))
    return Placement(
        physical_to_logical_map=tuple(rows),
        num_experts=placement.num_experts,
        num_ranks=num_ranks,
        num_nodes=placement.num_nodes,
    )

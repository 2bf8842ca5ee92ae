"""Where replicas start: copies of the busiest experts on the least loaded ranks."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from placer.errors import UsageError
from placer.plan.placement import Placement
from placer.plan.problem import FloatArray


def with_replicas(
    placement: Placement,
    load: Sequence[FloatArray],
    redundant_experts: int,
    is_careful: npt.NDArray[np.bool_] | None = None,
) -> Placement:
    """Give every rank further slots, filled with the experts that relieve most.

    Of all experts that the least loaded rank does not hold yet, it takes the one with the
    most load per copy: the replication rule of DeepSeek's EPLB, here on a placement that
    is already there. The refinement then decides anew, by traffic too.

    In a careful layer it takes the expert with the least load, each copy counted as if it
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
        ``[L]``: layers whose copies may serve more than an even share of their expert's
        load; none by default.

    Raises
    ------
    UsageError
        If the slots do not divide over the ranks, or a rank would hold every expert
        already.
    """
    num_ranks = placement.num_ranks
    require_room(placement.num_experts, num_ranks, redundant_experts)
    more = redundant_experts // num_ranks
    careful = np.zeros(len(load), dtype=np.bool_) if is_careful is None else is_careful
    rows = []
    for layer, counts in enumerate(load):
        slots = placement.physical_to_logical_map[layer].reshape(num_ranks, -1)
        holds = placement.holds(layer)
        for _ in range(redundant_experts):
            each = counts if careful[layer] else counts / holds.sum(axis=1)
            share = holds * each[:, None]
            free = holds.sum(axis=0) < slots.shape[1] + more
            rank = int(np.where(free, share.sum(axis=0), np.inf).argmin())
            worth = np.where(holds[:, rank], -np.inf, -each if careful[layer] else each)
            holds[int(worth.argmax()), rank] = True
        rows.append(np.nonzero(holds.T)[1].astype(np.int64))
    return Placement(
        physical_to_logical_map=tuple(rows),
        num_experts=placement.num_experts,
        num_ranks=num_ranks,
        num_nodes=placement.num_nodes,
    )


def require_room(
    num_experts: Sequence[int], num_ranks: int, redundant_experts: int
) -> None:
    """Refuse redundant experts that do not fit.

    Parameters
    ----------
    num_experts
        ``[L]``: logical experts per layer.
    num_ranks, redundant_experts
        As of a placement, and further slots per layer.

    Raises
    ------
    UsageError
        If the slots do not divide over the ranks, or a rank would hold every expert
        already.
    """
    if redundant_experts % num_ranks:
        raise UsageError(
            f"{redundant_experts} redundant experts do not divide over {num_ranks} ranks",
            f"give a multiple: --redundant-experts {num_ranks}",
        )
    for layer, size in enumerate(num_experts):
        width = (size + redundant_experts) // num_ranks
        if width > size:
            raise UsageError(
                f"MoE layer {layer}: {width} slots per rank for {size} experts, but no "
                "rank may hold two copies of one",
                f"ask for fewer: --redundant-experts {num_ranks}",
            )

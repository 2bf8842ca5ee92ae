"""Where replicas start: replicas of the busiest experts on the least loaded ranks."""

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from placer.arrays import BoolArray, FloatArray
from placer.errors import UsageError
from placer.placement.placement import Placement


def with_replicas(
    placement: Placement,
    load: Sequence[FloatArray],
    redundant_experts: int,
    is_careful: BoolArray | None = None,
) -> Placement:
    """Give every rank further slots, filled with the experts that lower the load most.

    Of all experts that the least loaded rank does not hold yet, it takes the one with the
    most load per replica: the replication rule of DeepSeek's EPLB, here on a placement that
    is already there. The refinement then decides anew, by traffic too.

    In a careful layer it takes the expert with the least load, a replica counted as if it
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
        ``[L]``: layers whose replicas may serve more than an even share of their expert's
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


def redundant_experts_that_fit(
    num_experts: Sequence[int], num_ranks: int, num_blocks: int = 1
) -> Iterator[int]:
    """Yield the numbers of redundant experts that fill the ranks evenly, ascending.

    Parameters
    ----------
    num_experts
        ``[L]``: logical experts per layer.
    num_ranks
        R.
    num_blocks
        Blocks of ranks that share out the experts; no rank may hold two replicas of one.
    """
    fewest = min(num_experts)
    most = fewest // num_blocks * num_ranks - fewest
    for number in range(-fewest % num_ranks, most + 1, num_ranks):
        if not any((size + number) % num_ranks for size in num_experts):
            yield number


def require_room(
    num_experts: Sequence[int],
    num_ranks: int,
    redundant_experts: int,
    num_blocks: int = 1,
) -> None:
    """Refuse a number of redundant experts that does not fill the ranks evenly.

    Parameters
    ----------
    num_experts, num_ranks, num_blocks
        As in :func:`redundant_experts_that_fit`.
    redundant_experts
        Further slots per layer.

    Raises
    ------
    UsageError
        If experts and further slots do not divide over the ranks, or a rank would hold
        every expert already.
    """
    few = list(islice(redundant_experts_that_fit(num_experts, num_ranks, num_blocks), 3))
    fitting = f"--redundant-experts {' or '.join(map(str, few))}" if few else ""
    for layer, size in enumerate(num_experts):
        width, over = divmod(size + redundant_experts, num_ranks)
        of_block = size // num_blocks
        if over:
            raise _not_even(size, num_ranks, redundant_experts, layer, fitting)
        if width > of_block:
            raise UsageError(
                f"MoE layer {layer}: {width} slots per rank for {of_block} experts, but "
                "no rank may hold two replicas of one",
                f"ask for fewer: {fitting}"
                if fitting
                else "drop --redundant-experts, or let router groups be split",
            )


def _not_even(
    size: int, num_ranks: int, redundant_experts: int, layer: int, fitting: str
) -> UsageError:
    total = size + redundant_experts
    ranks = ", ".join(str(r) for r in range(1, total + 1) if total % r == 0)
    other = f"choose --nodes x --gpus-per-node among {ranks}"
    hint = (
        f"fill the slots: {fitting}, with --engine NAME; or {other}" if fitting else other
    )
    if redundant_experts:
        return UsageError(
            f"MoE layer {layer}: {size} experts and {redundant_experts} redundant ones are "
            f"{total} slots, which do not divide over {num_ranks} ranks",
            hint,
        )
    return UsageError(
        f"MoE layer {layer}: {size} experts do not divide over {num_ranks} ranks, and a "
        "plan gives every rank the same number of slots. vLLM and TensorRT-LLM can serve "
        f"this without a plan: the first {size % num_ranks} ranks hold one more expert",
        hint,
    )

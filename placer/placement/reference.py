"""Placements that need no more than loads: what engines do on their own."""

from collections.abc import Sequence

import numpy as np

from placer.arrays import AnyArray, IntArray
from placer.placement.placement import Placement

Load = Sequence[AnyArray]


def contiguous(
    num_experts: Sequence[int],
    num_ranks: int,
    num_nodes: int = 1,
    redundant_experts: int = 0,
) -> Placement:
    """Place expert e of a layer on rank ``e // (E / R)``: what engines do by default.

    Without replicas; but where the experts do not divide over the ranks, slot p of E + X
    holds expert ``p % E``, as SGLang and vLLM begin with redundant experts
    (``srt/eplb/expert_location.py``, ``distributed/eplb/eplb_state.py``).

    Parameters
    ----------
    num_experts
        ``[L]``: logical experts per layer.
    num_ranks, num_nodes
        The topology.
    redundant_experts
        Redundant experts: slots per layer beyond one for each expert, X.

    Raises
    ------
    UsageError
        If neither experts nor slots divide over the ranks.
    """
    more = redundant_experts if any(size % num_ranks for size in num_experts) else 0
    return Placement(
        physical_to_logical_map=tuple(np.arange(n + more) % n for n in num_experts),
        num_experts=tuple(num_experts),
        num_ranks=num_ranks,
        num_nodes=num_nodes,
    )


def random(
    num_experts: Sequence[int], num_ranks: int, num_nodes: int = 1, *, seed: int = 0
) -> Placement:
    """Place the experts of every layer at random, the same number on every rank.

    Raises
    ------
    UsageError
        If the experts of a layer do not divide over the ranks.
    """
    rng = np.random.default_rng(seed)
    return _placed([rng.permutation(size) for size in num_experts], num_ranks, num_nodes)


def _placed(rows: Sequence[IntArray], num_ranks: int, num_nodes: int) -> Placement:
    return Placement(
        physical_to_logical_map=tuple(rows),
        num_experts=tuple(len(row) for row in rows),
        num_ranks=num_ranks,
        num_nodes=num_nodes,
    )

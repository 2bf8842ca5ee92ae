"""Migration: the cost of leaving the placement that is served now."""

import numpy as np

from placer.arrays import FloatArray
from placer.errors import UsageError
from placer.placement.placement import Placement


def move_prices(start: Placement, migration_cost: float) -> tuple[FloatArray, ...]:
    """Return L arrays ``[E, R]``: the price of a replica where the start has none.

    Parameters
    ----------
    start
        What is served now.
    migration_cost
        Cost of moving one expert, in copies.
    """
    return tuple(
        np.where(start.holds(layer), 0.0, migration_cost)
        for layer in range(start.num_layers)
    )


def num_moved(start: Placement, placement: Placement) -> int:
    """Count the replicas of experts on ranks where the start has none."""
    return sum(
        int((placement.holds(layer) & ~start.holds(layer)).sum())
        for layer in range(start.num_layers)
    )


def require_same_shape(
    start: Placement,
    num_experts: tuple[int, ...],
    num_ranks: int,
    num_nodes: int,
    redundant_experts: int,
) -> None:
    """Refuse a start with other ranks, nodes, layers or slots than requested.

    Raises
    ------
    UsageError
        If they differ.
    """
    sizes = tuple(len(row) for row in start.physical_to_logical_map)
    for what, theirs, ours in (
        ("experts per layer", start.num_experts, num_experts),
        ("ranks", start.num_ranks, num_ranks),
        ("nodes", start.num_nodes, num_nodes),
        ("slots per layer", sizes, tuple(n + redundant_experts for n in num_experts)),
    ):
        if theirs != ours:
            raise UsageError(
                f"the plan to start from has {theirs} {what}, the options ask for {ours}",
                "solve with the options of that plan (placer inspect PLAN), or leave out "
                "--start",
            )

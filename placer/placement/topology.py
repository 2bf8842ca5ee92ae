"""Ranks on nodes, and the cost of a copy between two ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from placer.arrays import FloatArray
from placer.errors import UsageError
from placer.placement.placement import require_divisible_ranks

INTER_COST, INTRA_COST = 8, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Ranks on nodes, and the cost of a copy between two ranks.

    Attributes
    ----------
    num_nodes, gpus_per_node
        Ranks are numbered node by node.
    inter_cost, intra_cost
        Integer cost of a copy between nodes and between ranks of one node. On a single
        node every copy costs 1.
    cost
        R rows of R whole numbers that take the place of both: cost of a copy between every
        two ranks, the same both ways; or ``None``.
    cost_sha256
        Hash of the file that ``cost`` was read from, or ``None``.

    Raises
    ------
    UsageError
        If ranks do not divide over nodes, or a cost is not such a number.
    """

    num_nodes: int = 1
    gpus_per_node: int = 1
    inter_cost: int = INTER_COST
    intra_cost: int = INTRA_COST
    cost: tuple[tuple[int, ...], ...] | None = None
    cost_sha256: str | None = None

    def __post_init__(self) -> None:
        require_divisible_ranks(self.num_ranks, self.num_nodes)
        if self.cost is not None:
            require_cost_matrix(self.cost, self.num_ranks)
        elif not 1 <= self.intra_cost <= self.inter_cost:
            raise UsageError(
                f"inter_cost {self.inter_cost} must be at least intra_cost "
                f"{self.intra_cost}, and both at least 1"
            )

    @property
    def num_ranks(self) -> int:
        """Number of expert-parallel ranks, R."""
        return self.num_nodes * self.gpus_per_node

    def rank_cost(self) -> FloatArray:
        """Return ``[R, R]``: cost of a copy from one rank to another."""
        if self.cost is not None:
            return np.array(self.cost, dtype=np.float64)
        rank = np.arange(self.num_ranks)
        node = rank // self.gpus_per_node
        intra_cost = 1 if self.num_nodes == 1 else self.intra_cost
        cost = np.where(node[:, None] != node, self.inter_cost, intra_cost).astype(
            np.float64
        )
        np.fill_diagonal(cost, 0)
        return cost

    def least_costs(self) -> tuple[int, int]:
        """Return the least cost of a copy inside a node, and of one between nodes.

        The second is at least the first, so that a placement costs at least the first for
        ranks that differ and what the second is above it for nodes that differ.
        """
        cost = self.rank_cost()
        node = np.arange(self.num_ranks) // self.gpus_per_node
        apart = node[:, None] != node
        across = float(cost[apart].min(initial=np.inf))
        inside = float(
            cost[~apart & ~np.eye(self.num_ranks, dtype=bool)].min(initial=across)
        )
        inside = min(inside, across)
        if not np.isfinite(inside):  # one rank
            return 0, 0
        return int(inside), int(across if np.isfinite(across) else inside)


def require_cost_matrix(cost: Sequence[Sequence[int]], num_ranks: int) -> None:
    """Refuse costs that are not R rows of R, whole, not negative, symmetric, 0 at home."""
    sizes = sorted({len(row) for row in cost})
    if len(cost) != num_ranks or sizes != [num_ranks]:
        raise UsageError(
            f"the topology has {len(cost)} rows of {' and '.join(map(str, sizes))} costs, "
            f"but there are {num_ranks} ranks",
            f"give {num_ranks} rows of {num_ranks}, or change --nodes and --gpus-per-node",
        )
    for here, row in enumerate(cost):
        for there, value in enumerate(row):
            what = f"the topology's cost from rank {here} to rank {there} is {value}"
            if value < 0:
                raise UsageError(f"{what}: a cost must not be negative")
            if here == there and value:
                raise UsageError(f"{what}: the cost from a rank to itself must be 0")
            if value != cost[there][here]:
                raise UsageError(
                    f"{what}, and {cost[there][here]} back: a link must cost the same in "
                    "both directions",
                    "give both directions the mean; if it is not a whole number, double "
                    "all costs",
                )

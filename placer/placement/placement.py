"""The placement itself: ``physical_to_logical_map`` and what follows from it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from placer.arrays import BoolArray, FloatArray, IntArray
from placer.errors import PlacerError, UsageError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """Experts in slots, for every MoE layer.

    Attributes
    ----------
    physical_to_logical_map
        L arrays ``[P_l]`` int64: the logical expert in each physical slot. Slot p belongs
        to rank ``p // (P_l / num_ranks)``.
    num_experts
        ``[L]``: logical experts per layer.
    num_ranks, num_nodes
        Expert-parallel ranks, numbered node by node, and nodes.

    Raises
    ------
    PlacerError
        If slots do not divide over the ranks, an expert has no slot or does not exist, or
        a rank holds two replicas of one expert.
    """

    physical_to_logical_map: tuple[IntArray, ...]
    num_experts: tuple[int, ...]
    num_ranks: int
    num_nodes: int = 1

    def __post_init__(self) -> None:
        require_divisible_ranks(self.num_ranks, self.num_nodes)
        if len(self.physical_to_logical_map) != len(self.num_experts):
            raise PlacerError(
                f"{len(self.physical_to_logical_map)} layers placed, "
                f"{len(self.num_experts)} layers of experts"
            )
        for layer, row in enumerate(self.physical_to_logical_map):
            self._require_valid(layer, row)

    def _require_valid(self, layer: int, row: IntArray) -> None:
        size = self.num_experts[layer]
        require_divisible_slots(len(row), self.num_ranks, layer)
        if len(row) and (row.min() < 0 or row.max() >= size):
            raise PlacerError(
                f"MoE layer {layer}: a slot holds an expert outside 0..{size - 1}"
            )
        missing = np.setdiff1d(np.arange(size), row)
        if len(missing):
            often = np.bincount(row, minlength=size).argmax()
            slots = np.flatnonzero(row == often).tolist()
            told = f", but slots {slots} all hold expert {often}"
            beside = told if len(slots) > 1 else ""
            raise PlacerError(f"MoE layer {layer}: expert {missing[0]} has no slot{beside}")
        for rank, held in enumerate(row.reshape(self.num_ranks, -1)):
            if len(np.unique(held)) < len(held):
                raise PlacerError(
                    f"MoE layer {layer}: rank {rank} holds two replicas of one expert: "
                    f"{held.tolist()}"
                )

    @property
    def num_layers(self) -> int:
        """Number of MoE layers, L."""
        return len(self.num_experts)

    @property
    def ranks_per_node(self) -> int:
        """Ranks per node."""
        return self.num_ranks // self.num_nodes

    @property
    def has_replicas(self) -> bool:
        """Whether any layer has more slots than experts."""
        return any(
            len(row) > size
            for row, size in zip(
                self.physical_to_logical_map, self.num_experts, strict=True
            )
        )

    @property
    def redundant_experts(self) -> int:
        """Slots beyond one for each expert, in a layer; in the first, where they differ."""
        return len(self.physical_to_logical_map[0]) - self.num_experts[0]

    def holds(self, layer: int) -> BoolArray:
        """Return ``[E_l, R]``: whether a rank has a replica of an expert."""
        row = self.physical_to_logical_map[layer]
        return holders(row, self.num_experts[layer], self.num_ranks)

    def filler_row(self) -> IntArray:
        """Return ``[P]``: the slots that a map gives to a layer that is not placed.

        Experts in order, over and over: no rank has two replicas of one.
        """
        num_slots = len(self.physical_to_logical_map[0])
        return np.arange(num_slots) % self.num_experts[0]

    def slot_of(self, layer: int) -> IntArray:
        """Return ``[R, E_l]``: the slot of each rank's replica of each expert, or -1."""
        row = self.physical_to_logical_map[layer]
        slots = np.arange(len(row))
        slot_of = np.full((self.num_ranks, self.num_experts[layer]), -1, dtype=np.int64)
        slot_of[slots // (len(row) // self.num_ranks), row] = slots
        return slot_of

    def expert_rank(self, layer: int) -> IntArray:
        """Return ``[E_l]`` int64: the rank of each expert's first replica."""
        first: IntArray = self.holds(layer).argmax(axis=1)
        return first

    def permutation(self, layer: int) -> IntArray:
        """Return the map of a layer without replicas: new expert p is old expert map[p].

        Raises
        ------
        PlacerError
            If the layer has replicas, which no permutation can express.
        """
        row = self.physical_to_logical_map[layer]
        if len(row) != self.num_experts[layer]:
            raise PlacerError(
                f"MoE layer {layer} has {len(row)} slots for {self.num_experts[layer]} "
                "experts: a permuted checkpoint cannot hold replicas",
                "solve again without them: placer solve TRACE --redundant-experts 0 "
                f"--nodes {self.num_nodes} --gpus-per-node {self.ranks_per_node} --out NEW",
            )
        return row

    @classmethod
    def from_expert_rank(
        cls, expert_rank: Iterable[IntArray], num_ranks: int, num_nodes: int = 1
    ) -> Self:
        """Build a placement without replicas from the rank of every expert.

        Inside a rank, experts are in ascending order of their logical id.
        """
        rows = [np.asarray(ranks) for ranks in expert_rank]
        return cls(
            physical_to_logical_map=tuple(
                np.argsort(ranks, kind="stable").astype(np.int64) for ranks in rows
            ),
            num_experts=tuple(len(ranks) for ranks in rows),
            num_ranks=num_ranks,
            num_nodes=num_nodes,
        )

    def to_json(self) -> list[list[int]]:
        """Return the map as lists of integers."""
        return [row.tolist() for row in self.physical_to_logical_map]

    @classmethod
    def from_json(
        cls,
        rows: Sequence[Sequence[Any]],
        num_experts: Sequence[int],
        num_ranks: int,
        num_nodes: int,
    ) -> Self:
        """Read the inverse of :meth:`to_json`.

        Raises
        ------
        PlacerError
            If a row holds a value that is not an integer, or the rows are no placement.
        """
        for layer, row in enumerate(rows):
            if not all(type(value) is int for value in row):
                raise PlacerError(
                    f"MoE layer {layer}: physical_to_logical_map holds a value "
                    "that is not an integer"
                )
        return cls(
            physical_to_logical_map=tuple(np.asarray(row, dtype=np.int64) for row in rows),
            num_experts=tuple(num_experts),
            num_ranks=num_ranks,
            num_nodes=num_nodes,
        )


def holders(row: IntArray, num_experts: int, num_ranks: int) -> BoolArray:
    """Return ``[E, R]``: whether a rank has a replica of an expert, by a row of slots."""
    held = np.zeros((num_experts, num_ranks), dtype=np.bool_)
    held[row, np.arange(len(row)) // (len(row) // num_ranks)] = True
    return held


def require_divisible_ranks(num_ranks: int, num_nodes: int) -> None:
    """Refuse a number of ranks that does not divide over the nodes.

    Raises
    ------
    UsageError
        If it does not.
    """
    if num_nodes < 1 or num_ranks < 1 or num_ranks % num_nodes:
        raise UsageError(
            f"{num_ranks} ranks do not divide over {num_nodes} nodes",
            "give --nodes N --gpus-per-node M; the ranks are N x M",
        )


def require_divisible_slots(num_slots: int, num_ranks: int, layer: int) -> None:
    """Refuse a number of slots that does not divide over the ranks.

    Raises
    ------
    UsageError
        If it does not.
    """
    if num_slots % num_ranks:
        fitting = [r for r in range(1, num_slots + 1) if num_slots % r == 0]
        raise UsageError(
            f"MoE layer {layer}: {num_slots} slots do not divide over {num_ranks} ranks",
            f"choose --nodes x --gpus-per-node among {', '.join(map(str, fitting))}",
        )


def rank_load(placement: Placement, layer: int, load: IntArray) -> FloatArray:
    """Return ``[R]``: pairs that each rank serves, as if replicas served equally often."""
    held = placement.holds(layer)
    served: FloatArray = (load / held.sum(axis=1)) @ held
    return served

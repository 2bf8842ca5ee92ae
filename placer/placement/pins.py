"""Pins: experts that the search must leave on a rank."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from placer.arrays import IntArray
from placer.errors import UsageError
from placer.placement.placement import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """An expert of an MoE layer (counted from 0) and the rank that must hold it."""

    layer: int
    expert: int
    rank: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``LAYER:EXPERT=RANK``.

        Raises
        ------
        UsageError
            If it is none.
        """
        found = re.fullmatch(r"(\d+):(\d+)=(\d+)", text)
        if found is None:
            raise UsageError(
                f"--pin {text} is not LAYER:EXPERT=RANK", "for example --pin 3:17=2"
            )
        layer, expert, rank = map(int, found.groups())
        return cls(layer=layer, expert=expert, rank=rank)

    def __str__(self) -> str:
        """Return what :meth:`parse` reads."""
        return f"{self.layer}:{self.expert}={self.rank}"


def with_pins(placement: Placement, pins: Sequence[Pin]) -> Placement:
    """Exchange experts until every pin holds.

    Raises
    ------
    UsageError
        If a pin names an expert or rank that does not exist, or the pins contradict each
        other or need more slots than a rank has.
    """
    _require_possible(placement, pins)
    rows = [row.copy() for row in placement.physical_to_logical_map]
    for layer in {pin.layer for pin in pins}:
        of_layer = [pin for pin in pins if pin.layer == layer]
        slots = rows[layer].reshape(placement.num_ranks, -1)
        for pin in of_layer:
            if pin.expert not in slots[pin.rank]:
                _bring(slots, pin, of_layer)
        rows[layer] = np.sort(slots, axis=1).ravel()
    return replace(placement, physical_to_logical_map=tuple(rows))


def _bring(slots: IntArray, pin: Pin, pins: Sequence[Pin]) -> None:
    """Exchange one expert of the pin's rank, which no pin keeps there, for the pin's."""
    kept = {other.expert for other in pins if other.rank == pin.rank}
    for rank, place in np.argwhere(slots == pin.expert):
        if any(other.expert == pin.expert and other.rank == rank for other in pins):
            continue
        for slot, expert in enumerate(slots[pin.rank]):
            if expert not in kept and expert not in slots[rank]:
                slots[pin.rank, slot], slots[rank, place] = pin.expert, expert
                return
    raise UsageError(
        f"--pin {pin} cannot be met together with the other pins and replicas",
        "drop a pin of that layer",
    )


def _require_possible(placement: Placement, pins: Sequence[Pin]) -> None:
    num_ranks = placement.num_ranks
    for pin in pins:
        if pin.layer >= placement.num_layers:
            raise UsageError(
                f"--pin {pin}: MoE layers are 0 to {placement.num_layers - 1}",
                "count only layers with experts, from 0: placer inspect TRACE",
            )
        size = placement.num_experts[pin.layer]
        if pin.expert >= size or pin.rank >= num_ranks:
            raise UsageError(
                f"--pin {pin}: MoE layer {pin.layer} has experts 0 to {size - 1}, and "
                f"ranks are 0 to {num_ranks - 1}",
                "a pin is LAYER:EXPERT=RANK, all counted from 0",
            )
        row = placement.physical_to_logical_map[pin.layer]
        same = {other for other in pins if other.layer == pin.layer}
        replicas = int((row == pin.expert).sum())
        wanted = sum(other.expert == pin.expert for other in same)
        if wanted > replicas:
            raise UsageError(
                f"--pin {pin}: expert {pin.expert} is pinned to {wanted} ranks, but its "
                f"number of slots is {replicas}",
                f"drop {wanted - replicas} of its pins, or add --redundant-experts",
            )
        width = len(row) // num_ranks
        if (on_rank := sum(other.rank == pin.rank for other in same)) > width:
            raise UsageError(
                f"--pin {pin}: {on_rank} experts of MoE layer {pin.layer} are pinned to "
                f"rank {pin.rank}, which has {width} slots",
                f"drop {on_rank - width} of its pins, or add --redundant-experts",
            )


def pinned_kinds(
    kinds: Sequence[IntArray] | None, num_experts: Sequence[int], pins: Sequence[Pin]
) -> tuple[IntArray, ...] | None:
    """Return kinds, L arrays ``[E]`` (see ``TrafficProblem``): pinned experts stay."""
    if not pins:
        return None if kinds is None else tuple(kinds)
    pinned = [np.zeros(size, dtype=np.int64) for size in num_experts]
    if kinds is not None:
        pinned = [one.copy() for one in kinds]
    for pin in pins:
        pinned[pin.layer][pin.expert] = -1
    return tuple(pinned)

"""Counting the bytes of collectives, where torch gives them to the network.

The counter sees the tensors that any code gives to torch.distributed, so transformers' and
DeepSpeed's own exchanges are measured as placer's are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from placer.arrays import IntArray

Part = Literal["exchange", "dispatch", "combine", "keys_and_values"]
#: What a collective of torch.distributed does with what it is given, as far as it is timed.
Operation = Literal["all_to_all", "all_gather"]

#: Operators of torch.distributed by what they send: rows that are split over the ranks,
#: or all that they are given to every rank. (Functional ones are what DTensors use.)
_SPLIT = ("c10d::alltoall_base_", "_c10d_functional::all_to_all_single")
_WHOLE = (
    "c10d::allgather_",
    "c10d::_allgather_base_",
    "_c10d_functional::all_gather_into_tensor",
)
#: Every rank's word for all, as an all-gather of it is.
_REDUCED = ("c10d::allreduce_",)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Traffic:
    """Bytes that one rank hands to collectives of its expert-parallel group.

    Attributes
    ----------
    dispatch, combine
        ``[L, R]`` int64: hidden states sent to each rank in each MoE layer, on their way
        to experts and back. A rank's own column is what never leaves it.
    described
        ``[L, R]`` int64: ids, weights, counts and capacities that go along.
    gathered
        ``[L, R]`` int64: hidden states that every rank is given in an all-gather.
    keys_and_values
        ``[L, R]`` int64: of attention.
    """

    dispatch: IntArray
    combine: IntArray
    described: IntArray
    gathered: IntArray
    keys_and_values: IntArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Collective:
    """One collective of all ranks.

    Attributes
    ----------
    operation
        What it does.
    num_bytes
        ``[R]`` int64: bytes that one rank sends to each, or ``[R, R]`` from each to each.
    """

    operation: Operation
    num_bytes: IntArray


class TrafficCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch
    """Counts the bytes that collectives send, by MoE layer, while it is entered.

    Parameters
    ----------
    num_layers
        L.
    num_ranks
        R, the ranks of the group; all collectives that count are in it.
    hidden_size
        H: a message of rows so wide holds hidden states.
    """

    def __init__(self, *, num_layers: int, num_ranks: int, hidden_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self._hidden_size = hidden_size
        self._num_ranks = num_ranks
        self._place: tuple[int, Part] | None = None
        self._steps: list[IntArray] = []
        shape = (num_layers, num_ranks)
        self._bytes = {f.name: np.zeros(shape, dtype=np.int64) for f in fields(Traffic)}
        self._collectives: list[Collective] = []

    @contextmanager
    def within(self, layer: int, part: Part) -> Iterator[None]:
        """Count collectives in the block as that part of MoE layer ``layer``.

        An ``exchange`` is a dispatch and a combine of equally many steps.
        """
        self._place, self._steps = (layer, part), []
        try:
            yield
        finally:
            self._place = None
        if part == "exchange":
            half = len(self._steps) // 2
            for number, sent in enumerate(self._steps):
                self._bytes["dispatch" if number < half else "combine"][layer] += sent

    def traffic(self) -> Traffic:
        """Return the collectives until now."""
        return Traffic(**{name: counts.copy() for name, counts in self._bytes.items()})

    def collectives(self) -> tuple["Collective", ...]:
        """Return all collectives until now in order, inside and outside layers."""
        return tuple(self._collectives)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator; count what it sends."""
        result = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        if name in (*_SPLIT, *_WHOLE, *_REDUCED):
            self._count(name, args)
        return result

    def _count(self, name: str, args: Sequence[Any]) -> None:
        given_first = name.startswith("_c10d_functional") or name in _REDUCED
        sent = args[0] if given_first else args[1]
        sent = sent[0] if isinstance(sent, (list, tuple)) else sent
        if name in _SPLIT:
            operation: Operation = "all_to_all"
            to_rank = self._split_bytes(sent, args[2] if given_first else args[4])
        else:
            operation = "all_gather"
            to_rank = np.full(self._num_ranks, sent.numel() * sent.element_size())
        self._collectives.append(Collective(operation=operation, num_bytes=to_rank))
        if self._place is not None:
            self._add(sent, operation, to_rank, *self._place)

    def _add(
        self,
        sent: torch.Tensor,
        operation: Operation,
        to_rank: IntArray,
        layer: int,
        part: Part,
    ) -> None:
        """Add bytes to those of a part of a layer."""
        if part == "keys_and_values":
            self._bytes[part][layer] += to_rank
        elif not (sent.is_floating_point() and sent.shape[-1:] == (self._hidden_size,)):
            self._bytes["described"][layer] += to_rank
        elif operation == "all_gather":
            self._bytes["gathered"][layer] += to_rank
        elif part == "exchange":
            self._steps.append(to_rank)
        else:
            self._bytes[part][layer] += to_rank

    def _split_bytes(self, sent: torch.Tensor, splits: Sequence[int]) -> IntArray:
        """Return ``[R]``: bytes of the rows that go to each rank."""
        rows = splits or [len(sent) // self._num_ranks] * self._num_ranks
        row_bytes = sent.element_size() * (sent.numel() // max(len(sent), 1))
        return np.asarray(rows, dtype=np.int64) * row_bytes

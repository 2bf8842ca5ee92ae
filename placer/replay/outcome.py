"""The result of a replay, and whether it equals the simulation's."""

import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from placer.arrays import IntArray
from placer.errors import VerificationError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplayedRun:
    """One placement under one exchange, on all ranks.

    Attributes
    ----------
    placement
        ``contiguous`` or ``plan``.
    exchange
        Name of the exchange.
    dispatch, combine
        ``[L, R, R]`` int64: bytes of hidden states that each rank sent to each, measured.
    predicted_dispatch, predicted_combine
        The same by simulation of what the routers chose; diagonals are not compared.
    described, gathered, keys_and_values
        ``[L, R, R]`` int64: bytes that went along: ids, weights and counts; all-gathers
        of outputs; keys and values.
    error
        Root mean square of the difference between hidden states after the last norm and
        those of the model run on one rank, over that of the latter; of the worst batch on
        any rank.
    differently_routed
        (Token, layer) pairs whose experts are not those of the model run on one rank.
    num_tokens
        Tokens of all forward passes.
    ranks_per_node
        Ranks of a node.
    seconds
        Median seconds of a forward pass of all ranks; ``None`` if it was not timed.
    elsewhere
        Predicted seconds of a forward pass on other links, by their name.
    """

    placement: str
    exchange: str
    dispatch: IntArray
    combine: IntArray
    predicted_dispatch: IntArray
    predicted_combine: IntArray
    described: IntArray
    gathered: IntArray
    keys_and_values: IntArray
    error: float
    differently_routed: int
    num_tokens: int
    ranks_per_node: int
    seconds: float | None
    elsewhere: dict[str, float] = field(default_factory=dict)

    @property
    def other_data(self) -> dict[str, IntArray]:
        """Other data sent with the hidden states, by name."""
        names = ("described", "gathered", "keys_and_values")
        return {name: getattr(self, name) for name in names}

    @property
    def as_predicted(self) -> bool:
        """Whether every rank sent every other the predicted bytes, in every layer."""
        apart = ~np.eye(self.dispatch.shape[-1], dtype=np.bool_)
        return all(
            np.array_equal(measured[:, apart], predicted[:, apart])
            for measured, predicted in (
                (self.dispatch, self.predicted_dispatch),
                (self.combine, self.predicted_combine),
            )
        )

    def busiest_bytes(self) -> tuple[int, int]:
        """Return what a link must carry, inside nodes and between them.

        Of every collective the most that a rank sends or receives, summed over layers.
        """
        fast, slow = 0, 0
        for matrix in (self.dispatch, self.combine, *self.other_data.values()):
            inside, across = _by_link(matrix, self.ranks_per_node)
            fast, slow = fast + _busiest(inside), slow + _busiest(across)
        return fast, slow

    def to_json(self) -> dict[str, Any]:
        """Return figures by name; bytes are sums over all forward passes."""
        measured, predicted = (
            {
                f"{way}_{link}_bytes": total
                for way, matrix in (("dispatch", there), ("combine", back))
                for link, total in zip(
                    ("fast", "slow"), link_bytes(matrix, self.ranks_per_node), strict=True
                )
            }
            for there, back in (
                (self.dispatch, self.combine),
                (self.predicted_dispatch, self.predicted_combine),
            )
        )
        kept = self.dispatch + self.combine
        return {
            "placement": self.placement,
            "exchange": self.exchange,
            **measured,
            "predicted": predicted,
            "as_predicted": self.as_predicted,
            "kept_bytes": int(np.trace(kept, axis1=1, axis2=2).sum()),
            **{
                f"{name}_bytes": sum(link_bytes(matrix, self.ranks_per_node))
                for name, matrix in self.other_data.items()
            },
            "busiest_fast_bytes": self.busiest_bytes()[0],
            "busiest_slow_bytes": self.busiest_bytes()[1],
            "error": self.error,
            "differently_routed": self.differently_routed,
            "seconds": self.seconds,
            "seconds_elsewhere": self.elsewhere,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOutcome:
    """All runs of a replay.

    Attributes
    ----------
    runs
        By placement and exchange.
    num_passes, batch_size, sequence_length
        Forward passes of all ranks, sequences of one, tokens of a sequence.
    num_ranks, num_nodes
        The layout.
    dtype, device
        What was computed in, and on what.
    tolerance
        The largest error that passes.
    warnings
        What limits the figures.
    """

    runs: tuple[ReplayedRun, ...]
    num_passes: int
    batch_size: int
    sequence_length: int
    num_ranks: int
    num_nodes: int
    dtype: str
    device: str
    tolerance: float
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of ``placer replay --json``."""
        return {
            "runs": [run.to_json() for run in self.runs],
            "passes": self.num_passes,
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
            "ranks": self.num_ranks,
            "nodes": self.num_nodes,
            "dtype": self.dtype,
            "device": self.device,
            "tolerance": self.tolerance,
            "warnings": list(self.warnings),
        }

    def require_verified(self) -> None:
        """Refuse a run that sent other bytes, or computed something else.

        Raises
        ------
        VerificationError
            With the run, and both figures.
        """
        for run in self.runs:
            name = f"{run.exchange} with the {run.placement} placement"
            if not run.as_predicted:
                sent = run.dispatch + run.combine
                predicted = run.predicted_dispatch + run.predicted_combine
                totals = [sum(link_bytes(m, run.ranks_per_node)) for m in (sent, predicted)]
                raise VerificationError(
                    f"{name} sent {totals[0]:,} bytes of hidden states, predicted "
                    f"{totals[1]:,}",
                    "compare the runs: placer replay PLAN MODEL --trace TRACE --json",
                )
            if not run.error <= self.tolerance:  # nor is NaN
                raise VerificationError(
                    f"{name} computes hidden states that have an error of "
                    f"{run.error:.1e}, allowed {self.tolerance:.1e}; "
                    f"{run.differently_routed} choices of the routers differ",
                    "compute with higher precision: --dtype float32",
                )


def link_bytes(matrix: IntArray, ranks_per_node: int) -> tuple[int, int]:
    """Return bytes of a matrix ``[L, R, R]`` inside nodes and between them."""
    fast, slow = _by_link(matrix, ranks_per_node)
    return int(fast.sum()), int(slow.sum())


def _by_link(matrix: IntArray, ranks_per_node: int) -> tuple[IntArray, IntArray]:
    """Return the part inside nodes, without what ranks keep, and the part between them."""
    node = np.arange(matrix.shape[-1]) // ranks_per_node
    slow = node[:, None] != node
    fast = ~slow & ~np.eye(matrix.shape[-1], dtype=np.bool_)
    return matrix * fast, matrix * slow


def _busiest(matrix: IntArray) -> int:
    """Sum over layers the most that a rank sends or receives."""
    both = np.maximum(matrix.sum(axis=2), matrix.sum(axis=1))
    return int(both.max(axis=1).sum())


def median_seconds(repeats: list[float]) -> float | None:
    """Return the median, or ``None`` of nothing."""
    return statistics.median(repeats) if repeats else None

"""Figures per batch: stragglers, activated experts, copies by link, predicted time."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from placer.engine import Exchange, ReplicaChoice
from placer.plan.placement import Placement
from placer.simulation.cost import CostModel, LayerTimes, PredictedTime
from placer.simulation.homes import Batches, Phase
from placer.simulation.steps import Copies, LayerSteps, layer_steps
from placer.trace import Chunk

#: Tokens of a decoding step, beside the usual batch: small batches are the least even.
SMALL_BATCHES = (64, 256)
_DECIMALS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchMetrics:
    """Means and 95th percentiles over full batches and layers.

    Attributes
    ----------
    batch_size
        Tokens of one forward pass of all ranks.
    num_batches
        Full batches.
    straggler_mean, straggler_p95
        Max/mean pairs per rank of a batch.
    activated_experts_mean, activated_experts_p95
        Slots that serve at least one pair, on the rank that has most of them.
    bottleneck_copies_per_token
        R x the copies that the busiest rank receives in a dispatch / the tokens of the
        batch.
    dispatch_fast_copies_per_token, dispatch_slow_copies_per_token
        Copies inside nodes and between them, per token and layer.
    combine_fast_copies_per_token, combine_slow_copies_per_token
        The same on the way back.
    """

    batch_size: int
    num_batches: int
    straggler_mean: float
    straggler_p95: float
    activated_experts_mean: float
    activated_experts_p95: float
    bottleneck_copies_per_token: float
    dispatch_fast_copies_per_token: float
    dispatch_slow_copies_per_token: float
    combine_fast_copies_per_token: float
    combine_slow_copies_per_token: float

    def to_json(self) -> dict[str, float]:
        """Return the metrics by name, rounded to five decimals."""
        return {f.name: round(getattr(self, f.name), _DECIMALS) for f in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFigures:
    """What one placement does in batches of one size.

    Attributes
    ----------
    metrics
        Balance and copies.
    time
        Predicted time, or ``None`` without a cost model.
    """

    metrics: BatchMetrics
    time: PredictedTime | None

    def to_json(self) -> dict[str, Any]:
        """Return metrics and microseconds by name."""
        time = None if self.time is None else self.time.to_json()
        return self.metrics.to_json() | {"time": time}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """How batches are served.

    Attributes
    ----------
    policy
        Home policy: ``fixed`` or ``follow``.
    phase
        How batches are drawn.
    exchanges
        Of dispatch and of combine.
    replica_choice
        Which copy of an expert serves; ``None`` where each has one.
    layer_ids
        As in ``ServingOptions``.
    cost
        What turns steps into seconds, or ``None``.
    """

    policy: str
    phase: Phase = "decode"
    exchanges: tuple[Exchange, Exchange] = ("per-rank", "per-rank")
    replica_choice: ReplicaChoice | None = None
    layer_ids: tuple[int, ...] | None = None
    cost: CostModel | None = None


def batch_sizes(phase: Phase, batch_size: int, num_tokens: int) -> list[int]:
    """Return the batch sizes to report, ascending: in decoding also small ones."""
    small = SMALL_BATCHES if phase == "decode" else ()
    return sorted({min(size, num_tokens) for size in (*small, batch_size)})


def batch_figures(
    placement: Placement, tokens: Chunk, batch_size: int, options: BatchOptions
) -> BatchFigures:
    """Serve recorded tokens in batches of one size."""
    batches = Batches.of_phase(
        options.phase, tokens.sequence_ids, batch_size, placement.num_ranks
    )
    tally = _Tally(placement.num_ranks, batches)
    times: list[LayerTimes] = []
    for steps in layer_steps(
        placement,
        tokens,
        batches,
        policy=options.policy,
        exchanges=options.exchanges,
        replica_choice=options.replica_choice,
        layer_ids=options.layer_ids,
    ):
        tally.add(steps)
        if options.cost is not None:
            times.append(options.cost.layer_times(steps))
    return BatchFigures(
        metrics=tally.metrics(), time=PredictedTime.of(times) if times else None
    )


class _Tally:
    """Figures of each batch, layer by layer."""

    def __init__(self, num_ranks: int, batches: Batches) -> None:
        self.num_ranks = num_ranks
        self.batches = batches
        self.straggler: list[Any] = []
        self.activated: list[Any] = []
        self.bottleneck: list[Any] = []
        self.sent: list[tuple[float, ...]] = []

    def add(self, steps: LayerSteps) -> None:
        self.straggler.append(steps.pairs.max(axis=1) / steps.pairs.mean(axis=1))
        self.activated.append(steps.activated.max(axis=1))
        received = steps.dispatch.fast.received + steps.dispatch.slow.received
        self.bottleneck.append(received.max(axis=1))
        self.sent.append((*_sent(steps.dispatch), *_sent(steps.combine)))

    def metrics(self) -> BatchMetrics:
        tokens = self.batches.num_full * self.batches.size
        sent = np.mean(self.sent, axis=0) / tokens
        return BatchMetrics(
            batch_size=self.batches.size,
            num_batches=self.batches.num_full,
            straggler_mean=float(np.mean(self.straggler)),
            straggler_p95=_p95(self.straggler),
            activated_experts_mean=float(np.mean(self.activated)),
            activated_experts_p95=_p95(self.activated),
            bottleneck_copies_per_token=float(np.mean(self.bottleneck))
            * self.num_ranks
            / self.batches.size,
            dispatch_fast_copies_per_token=float(sent[0]),
            dispatch_slow_copies_per_token=float(sent[1]),
            combine_fast_copies_per_token=float(sent[2]),
            combine_slow_copies_per_token=float(sent[3]),
        )


def _sent(copies: Copies) -> tuple[float, float]:
    return float(copies.fast.sent.sum()), float(copies.slow.sent.sum())


def _p95(values: Sequence[Any]) -> float:
    return float(np.percentile(np.stack(values), 95))

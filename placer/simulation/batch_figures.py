"""Figures per batch: stragglers, activated experts, copies by link, predicted time."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from placer.placement.imbalance import imbalances
from placer.placement.placement import Placement
from placer.serving.homes import Batches, BatchShape
from placer.simulation.cost import BreakEven, CostModel, PredictedTime, break_even
from placer.simulation.steps import Copies, LayerSteps, layer_steps
from placer.target.engine import Exchange, ReplicaChoice
from placer.trace import Routing

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
    """Figures of one placement in batches of one shape.

    Attributes
    ----------
    shape
        The batches.
    metrics
        Balance and copies.
    time
        Predicted time, or ``None`` without a cost model.
    """

    shape: BatchShape
    metrics: BatchMetrics
    time: PredictedTime | None

    def to_json(self) -> dict[str, Any]:
        """Return shape, metrics and microseconds by name."""
        time = None if self.time is None else self.time.to_json()
        return asdict(self.shape) | self.metrics.to_json() | {"time": time}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """How batches are served.

    Attributes
    ----------
    policy
        Home policy: ``fixed`` or ``follow``.
    exchanges
        Of dispatch and of combine.
    replica_choice
        Which replica of an expert serves; ``None`` where each has one.
    layer_ids
        As in ``ServingOptions``.
    """

    policy: str
    exchanges: tuple[Exchange, Exchange] = ("per-rank", "per-rank")
    replica_choice: ReplicaChoice | None = None
    layer_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchSteps:
    """Work of the ranks in batches of one shape, layer by layer.

    Attributes
    ----------
    shape, batches
        The batches.
    layers
        L layers on all full batches: an iterator, unless they were kept.
    """

    shape: BatchShape
    batches: Batches
    layers: Iterable[LayerSteps]

    def figures(self, cost: CostModel | None = None) -> BatchFigures:
        """Return what is reported of them, with a cost model also the time."""
        tally, times = _Tally(self.batches), []
        for steps in self.layers:
            tally.add(steps)
            if cost is not None:
                times.append(cost.layer_times(steps))
        time = None if cost is None else PredictedTime.of(times)
        return BatchFigures(shape=self.shape, metrics=tally.metrics(), time=time)


def batch_steps(
    placement: Placement, tokens: Routing, shape: BatchShape, options: BatchOptions
) -> BatchSteps:
    """Serve recorded tokens in batches of one shape.

    Raises
    ------
    UsageError
        If the policy needs a table.
    """
    batches = Batches.of_shape(shape, tokens.sequence_ids, placement.num_ranks)
    layers = layer_steps(
        placement,
        tokens,
        batches,
        policy=options.policy,
        exchanges=options.exchanges,
        replica_choice=options.replica_choice,
        layer_ids=options.layer_ids,
    )
    return BatchSteps(shape=shape, batches=batches, layers=layers)


class ServedBatches:
    """Recorded tokens in batches, from several placements.

    With ``keep`` nothing is served twice: all layers of all batches stay in memory.
    Without, memory holds one layer at a time.
    """

    def __init__(self, tokens: Routing, *, keep: bool = True) -> None:
        self.tokens = tokens
        self.keep = keep
        self._steps: dict[tuple[Hashable, BatchShape, BatchOptions], BatchSteps] = {}

    def figures(
        self,
        key: Hashable,
        placement: Placement,
        shape: BatchShape,
        options: BatchOptions,
        cost: CostModel | None,
    ) -> BatchFigures:
        """Return the figures of a placement, given by its key, in batches of one shape."""
        if not self.keep:
            return batch_steps(placement, self.tokens, shape, options).figures(cost)
        place = key, shape, options
        if place not in self._steps:
            steps = batch_steps(placement, self.tokens, shape, options)
            self._steps[place] = replace(steps, layers=tuple(steps.layers))
        return self._steps[place].figures(cost)


def times(figures: Sequence[BatchFigures]) -> list[PredictedTime]:
    """Return the predicted times of batches; none without a cost model."""
    return [one.time for one in figures if one.time is not None]


def break_evens(
    plan: Sequence[BatchFigures], other: Sequence[BatchFigures], cost: CostModel | None
) -> tuple[BreakEven, ...]:
    """Return for which bandwidth ``plan`` is faster, for each shape of the batches.

    None without a cost model.
    """
    if cost is None:
        return ()
    both = zip(times(plan), times(other), strict=True)
    return tuple(break_even(one, base, cost) for one, base in both)


def filled_warning(
    shapes: Sequence[BatchShape], num_tokens: int, num_ranks: int
) -> str | None:
    """Return a warning on batches that the tokens of a trace do not fill, if any."""
    larger = [one for one in shapes if one.tokens(num_ranks) > num_tokens]
    if not larger:
        return None
    sizes = " and ".join(f"{one.tokens(num_ranks):,}" for one in larger)
    return (
        f"{num_tokens:,} tokens do not fill batches of {sizes}, so tokens are repeated: "
        "the load looks less even than it is, and fewer experts are activated"
    )


def full_batches_note(
    shapes: Sequence[BatchShape], num_tokens: int, num_ranks: int
) -> str | None:
    """Return how many tokens the batches judge, where the last ones are not full."""
    told = []
    for shape in shapes:
        number, rest = divmod(num_tokens, shape.tokens(num_ranks))
        if number and rest:
            told.append(
                f"{number:,} of {shape.tokens_per_rank:,} tokens per rank "
                f"({num_tokens - rest:,} of {num_tokens:,} tokens)"
            )
    if not told:
        return None
    return f"figures per batch are of full batches only. These are {'; '.join(told)}"


class _Tally:
    """Figures of each batch, layer by layer."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.straggler: list[Any] = []
        self.activated: list[Any] = []
        self.bottleneck: list[Any] = []
        self.sent: list[tuple[float, ...]] = []

    def add(self, steps: LayerSteps) -> None:
        self.straggler.append(imbalances(steps.pairs))
        self.activated.append(steps.activated.max(axis=1))
        received = steps.dispatch.fast.received + steps.dispatch.slow.received
        self.bottleneck.append(received.max(axis=1) * received.shape[1])
        self.sent.append((*_sent(steps.dispatch), *_sent(steps.combine)))

    def metrics(self) -> BatchMetrics:
        batch_size = round(self.batches.size * self.batches.weight)
        sent = np.mean(self.sent, axis=0) / (self.batches.num_full * batch_size)
        return BatchMetrics(
            batch_size=batch_size,
            num_batches=self.batches.num_full,
            straggler_mean=float(np.mean(self.straggler)),
            straggler_p95=_p95(self.straggler),
            activated_experts_mean=float(np.mean(self.activated)),
            activated_experts_p95=_p95(self.activated),
            bottleneck_copies_per_token=float(np.mean(self.bottleneck)) / batch_size,
            dispatch_fast_copies_per_token=float(sent[0]),
            dispatch_slow_copies_per_token=float(sent[1]),
            combine_fast_copies_per_token=float(sent[2]),
            combine_slow_copies_per_token=float(sent[3]),
        )


def _sent(copies: Copies) -> tuple[float, float]:
    return float(copies.fast.sent.sum()), float(copies.slow.sent.sum())


def _p95(values: Sequence[Any]) -> float:
    return float(np.percentile(np.stack(values), 95))

"""The cost model: how long a MoE layer takes in each batch.

Expert computation ends with the busiest rank; dispatch and combine end with the busiest
link. A layer's time is their sum::

    compute  = max over ranks of max(pairs x 6 H I / flops, activated x 3 H I w / memory)
    transfer = latency + max over ranks and link classes of copies x bytes / bandwidth

with hidden size H, expert width I (gate, up and down projection: 3 H I weights of w bytes,
two operations each per pair), and copies the more of sent and received. Both link classes
work at the same time; the latency is that of the slowest link in use. Where a link was
measured, its times for this many bytes are taken instead of the two figures
(:class:`~placer.target.hardware.Link`).

Left out: attention, the router, shared experts (the same on every rank), kernels that
pad to tiles, and overlap. ``overlapped`` says what is left where two half batches take
turns, so that one computes while the other communicates: the longer of the two.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Self

import numpy as np

from placer.arrays import FloatArray
from placer.errors import UsageError, require_left_out
from placer.model import ModelSpec, expert_size
from placer.model.weight_bytes import checkpoint_weights
from placer.simulation.steps import Copies, LayerSteps
from placer.target.engine import Element, Engine, Transfer
from placer.target.hardware import Hardware, Link

#: Bytes per weight in each element, scales included.
WEIGHT_BYTES: Mapping[Element, float] = {"bf16": 2.0, "fp8": 1.0, "nvfp4": 0.5625}
_MATRICES, _OPERATIONS = 3, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """The size of an expert.

    Attributes
    ----------
    hidden_size
        Width of the hidden state.
    intermediate_size
        Width of an expert.
    weight_bytes
        Bytes per weight: 2 for bf16, 1 for fp8, 0.5 for four bits.
    weight_only
        Whether only weights are quantised, and the experts compute in bf16.
    assumption
        The sentence on where ``weight_bytes`` comes from, if nobody said it.
    """

    hidden_size: int
    intermediate_size: int
    weight_bytes: float = WEIGHT_BYTES["bf16"]
    weight_only: bool = False
    assumption: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        sizes = (self.hidden_size, self.intermediate_size, self.weight_bytes)
        if not all(0 < size < np.inf for size in sizes):
            raise UsageError(
                f"the size of an expert must be positive and finite, got hidden size "
                f"{self.hidden_size}, width {self.intermediate_size}, "
                f"{self.weight_bytes:g} bytes per weight",
                "give --model DIR, or --hidden-size, --expert-size and --weight-bytes",
            )

    @property
    def num_weights(self) -> int:
        """Weights of one expert."""
        return _MATRICES * self.hidden_size * self.intermediate_size

    @property
    def num_bytes(self) -> float:
        """Bytes of one expert."""
        return self.num_weights * self.weight_bytes


def find_expert_shape(
    model: Path | None,
    hidden_size: int | None,
    intermediate_size: int | None,
    weight_bytes: float | None,
    engine: Engine | None = None,
) -> ExpertShape | None:
    """Return the size of an expert from a checkpoint's config, else from the sizes given.

    ``None`` where neither says it. ``weight_bytes`` is what is given, else what the config
    says, else taken from the element that the engine dispatches, else bf16.

    Raises
    ------
    PlacerError
        If ``model`` is no checkpoint of a known family, or of an unknown quantisation.
    """
    weight_only = False
    if model is not None:
        hidden_size = ModelSpec.from_checkpoint(model).hidden_size
        intermediate_size = expert_size(model)
        stored = checkpoint_weights(model) if weight_bytes is None else None
        if stored is not None:
            weight_bytes, weight_only = stored.num_bytes, stored.weight_only
    if hidden_size is None or intermediate_size is None:
        return None
    assumption = None
    if weight_bytes is None:
        element: Element = "bf16" if engine is None else engine.dispatch.element
        weight_bytes = WEIGHT_BYTES[element]
        said_by = "" if engine is None else f", as {engine.name} dispatches"
        assumption = (
            f"placer assumes that an expert's weights are {element} (bytes each: "
            f"{weight_bytes:g}){said_by}; give --weight-bytes, or --model DIR"
        )
    return ExpertShape(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        weight_bytes=weight_bytes,
        weight_only=weight_only,
        assumption=assumption,
    )


def require_no_sizes(
    model: Path | None,
    hidden_size: int | None,
    expert_size: int | None,
    weight_bytes: float | None,
    company: str,
) -> None:
    """Refuse options for the size of an expert that no other option uses.

    Raises
    ------
    UsageError
        If any is given; ``company`` is what asks for them.
    """
    sizes = {
        "--model": model,
        "--hidden-size": hidden_size,
        "--expert-size": expert_size,
        "--weight-bytes": weight_bytes,
    }
    require_left_out(sizes, f"{company}: nothing else uses the size of an expert")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTimes:
    """Seconds of one layer in each batch.

    Attributes
    ----------
    compute, dispatch, combine
        ``[B]`` float64.
    fixed
        Seconds of dispatch and combine that do not depend on what is sent.
    """

    compute: FloatArray
    dispatch: FloatArray
    combine: FloatArray
    fixed: float

    @property
    def total(self) -> FloatArray:
        """``[B]``: seconds of the layer."""
        return self.compute + self.dispatch + self.combine


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedTime:
    """Mean seconds of a layer, over layers and batches.

    Attributes
    ----------
    compute, dispatch, combine
        Expert computation, and transfers with their latency.
    latency
        The part of dispatch and combine that does not depend on what is sent.
    total
        Their sum.
    total_p95
        95th percentile of the sum, over layers and batches.
    overlapped
        Mean of the longer of computation and transfers.
    """

    compute: float
    dispatch: float
    combine: float
    latency: float
    total: float
    total_p95: float
    overlapped: float

    @property
    def transfer(self) -> float:
        """Seconds that depend on the links' bandwidth."""
        return self.dispatch + self.combine - self.latency

    @classmethod
    def of(cls, layers: Iterable[LayerTimes]) -> Self:
        """Average over layers and batches."""
        times = list(layers)
        parts = {
            name: np.concatenate([getattr(one, name) for one in times])
            for name in ("compute", "dispatch", "combine", "total")
        }
        longer = np.maximum(parts["compute"], parts["dispatch"] + parts["combine"])
        return cls(
            **{name: float(values.mean()) for name, values in parts.items()},
            latency=float(np.mean([one.fixed for one in times])),
            total_p95=float(np.percentile(parts["total"], 95)),
            overlapped=float(longer.mean()),
        )

    def to_json(self) -> dict[str, float]:
        """Return microseconds by name."""
        names = [one.name for one in fields(self)]
        return {f"{name}_us": round(getattr(self, name) * 1e6, 3) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """The cost model: it turns steps into seconds.

    Attributes
    ----------
    hardware
        GPUs and links.
    expert
        The size of an expert.
    dispatch, combine
        What a copy is.
    num_nodes
        Nodes that the ranks are on.
    """

    hardware: Hardware
    expert: ExpertShape
    dispatch: Transfer
    combine: Transfer
    num_nodes: int

    def layer_times(self, steps: LayerSteps) -> LayerTimes:
        """Return the seconds of one layer in each batch."""
        return LayerTimes(
            compute=self._compute(steps),
            dispatch=self._transfer(steps.dispatch, self.dispatch),
            combine=self._transfer(steps.combine, self.combine),
            fixed=2 * slowest_link(self.hardware, self.num_nodes).start,
        )

    def _compute(self, steps: LayerSteps) -> FloatArray:
        weights = self.expert.num_weights
        flops = self.hardware.bf16_flops
        if not self.expert.weight_only:
            flops = self.hardware.flops(self.expert.weight_bytes)
        arithmetic = steps.pairs * (_OPERATIONS * weights / flops)
        weight_bytes = weights * self.expert.weight_bytes
        reading = steps.activated * (weight_bytes / self.hardware.memory_bandwidth)
        busiest: FloatArray = np.maximum(arithmetic, reading).max(axis=1)
        return busiest

    def _transfer(self, copies: Copies, way: Transfer) -> FloatArray:
        copy_bytes = way.copy_bytes(self.expert.hidden_size)
        seconds = exchange_seconds(self.hardware, self.num_nodes, copies, copy_bytes)
        busiest: FloatArray = seconds.max(axis=1)
        return busiest


def exchange_seconds(
    hardware: Hardware, num_nodes: int, copies: Copies, copy_bytes: float
) -> FloatArray:
    """Return ``[B, R]``: the seconds until each rank has done its part of an exchange.

    Parameters
    ----------
    hardware
        Links.
    num_nodes
        Nodes that the ranks are on.
    copies
        What each rank sends and receives in each of B exchanges.
    copy_bytes
        Bytes of a copy.
    """
    growth: FloatArray = np.maximum(
        *(
            link.growth(moved.sent * copy_bytes, moved.received * copy_bytes)
            for link, moved in ((hardware.fast, copies.fast), (hardware.slow, copies.slow))
        )
    )
    return slowest_link(hardware, num_nodes).start + growth


def slowest_link(hardware: Hardware, num_nodes: int) -> Link:
    """Return the link that an exchange of all ranks has to wait for."""
    return hardware.slow if num_nodes > 1 else hardware.fast


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEven:
    """The bandwidths of the links at which one placement is faster than another.

    Attributes
    ----------
    pays
        ``always``, ``never``, ``below`` or ``above`` the bandwidth.
    bandwidth
        Bytes per second and direction of one GPU: of the slow link where there are nodes,
        the fast one scaled by the same factor; ``None`` for ``always`` and ``never``.
    """

    pays: str
    bandwidth: float | None

    @property
    def words(self) -> str:
        """The end of a sentence that begins with the plan."""
        if self.bandwidth is None:
            return {
                "always": "is faster at every bandwidth",
                "never": "is never faster",
            }[self.pays]
        return f"is faster {self.pays} {self.bandwidth / 1e9:,.3g} GB/s"

    def to_json(self) -> dict[str, str | float | None]:
        """Return the fields by name, in GB/s."""
        bandwidth = None if self.bandwidth is None else round(self.bandwidth / 1e9, 3)
        return {"pays": self.pays, "bandwidth_gb_per_s": bandwidth}


def cost_model(
    hardware: Hardware | None,
    expert: ExpertShape | None,
    dispatch: Transfer,
    combine: Transfer,
    num_nodes: int,
) -> CostModel | None:
    """Return the cost model, or ``None`` without hardware.

    Raises
    ------
    UsageError
        If there is hardware, but the size of an expert is not known.
    """
    if hardware is None:
        return None
    if expert is None:
        raise UsageError(
            "--hardware needs the size of an expert to predict time",
            "give --model DIR (its config.json), or --hidden-size and --expert-size",
        )
    return CostModel(
        hardware=hardware,
        expert=expert,
        dispatch=dispatch,
        combine=combine,
        num_nodes=num_nodes,
    )


def break_even(plan: PredictedTime, other: PredictedTime, model: CostModel) -> BreakEven:
    """Return for which bandwidth ``plan`` takes less time than ``other``.

    Transfers shrink in proportion as all links get faster; computation and latency stay.
    So with the links s times as fast, the plan is faster where::

        compute_plan + transfer_plan / s < compute_other + transfer_other / s
    """
    slower = plan.compute - other.compute
    saved = other.transfer - plan.transfer
    if slower <= 0 and saved >= 0:
        return BreakEven(
            pays="always" if slower < 0 or saved > 0 else "never", bandwidth=None
        )
    if slower >= 0 and saved <= 0:
        return BreakEven(pays="never", bandwidth=None)
    return BreakEven(
        pays="below" if slower > 0 else "above",
        bandwidth=slowest_link(model.hardware, model.num_nodes).bandwidth * saved / slower,
    )

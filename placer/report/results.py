"""Results that are no artifact of their own: a frontier, a simulation, a curve, a map.

They are recognised by their content, and validated as far as a report needs them.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec

from placer.checkpoint.record import ExportRecord
from placer.errors import PlacerError
from placer.placement import Plan
from placer.placement.engine_map import map_format
from placer.planning.frontier import TABLE_NAME
from placer.report.chart import CONTIGUOUS, EPLB
from placer.run.documents import parse_json, validated
from placer.run.files import read_bytes, read_text
from placer.runtime_map.maps import RUNTIMES
from placer.runtime_map.runtime import ParsedMap

_IMBALANCE = "load_imbalance_mean"
PLAN = "plan"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPlan:
    """A point of a frontier: what is sent per token and layer, and the busiest rank."""

    name: str
    max_imbalance: float | None
    sent: float
    imbalance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier:
    """A folder of plans under several load caps.

    Attributes
    ----------
    plans
        One for each cap whose plan was measured.
    baselines
        By name, of the plan with the loosest cap.
    words
        What is sent.
    is_heldout
        Whether the figures are of held-out sequences.
    unmeasured
        Files of plans without figures.
    """

    plans: tuple[FrontierPlan, ...]
    baselines: Mapping[str, FrontierPlan]
    words: str
    is_heldout: bool
    unmeasured: tuple[str, ...]

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read a folder that ``placer solve --frontier`` wrote.

        Raises
        ------
        PlacerError
            If its table or one of its plans is damaged.
        """
        where = directory / TABLE_NAME
        rows = list(csv.DictReader(read_text(where).splitlines()))
        names = [row.get("file") for row in rows]
        if not names or not all(names):
            raise PlacerError(
                f"{where} names no plan",
                "placer solve TRACE --gpus-per-node M --frontier CAPS --out DIR",
            )
        plans: list[FrontierPlan] = []
        unmeasured: list[str] = []
        baselines: dict[str, FrontierPlan] = {}
        words, is_heldout = "", True
        for name in filter(None, names):
            plan = Plan.read(directory / Path(name).name)
            own = plan.metrics["heldout"] or plan.metrics["profile"]
            is_heldout &= plan.metrics["heldout"] is not None
            metric, words = _metric_of(plan)
            if own is None:
                unmeasured.append(name)
                continue
            plans.append(_point(name, plan.max_imbalance, own[plan.policy], metric))
            for other in (CONTIGUOUS, EPLB):
                figures = plan.metrics["baselines"].get(other, {}).get(plan.policy)
                if figures is not None:
                    baselines[other] = _point(other, None, figures, metric)
        return cls(
            plans=tuple(plans),
            baselines=baselines,
            words=words,
            is_heldout=is_heldout,
            unmeasured=tuple(unmeasured),
        )


def _metric_of(plan: Plan) -> tuple[str, str]:
    from placer.simulation.sent import RANK_COPIES, Wire

    sent = Wire.of(plan, plan.engine).compared(plan.policy) or RANK_COPIES
    return sent.metric, sent.words


def _point(
    name: str, cap: float | None, figures: Mapping[str, float], metric: str
) -> FrontierPlan:
    return FrontierPlan(
        name=name, max_imbalance=cap, sent=figures[metric], imbalance=figures[_IMBALANCE]
    )


class BatchTime(msgspec.Struct, frozen=True, kw_only=True):
    """The predicted time of a layer, in microseconds."""

    compute_us: float
    dispatch_us: float
    combine_us: float
    total_us: float
    overlapped_us: float
    latency_us: float | None = None


class SimulatedBatch(msgspec.Struct, frozen=True, kw_only=True):
    """What ``simulate`` says of batches of one size and kind."""

    tokens_per_rank: int
    batching: str
    straggler_mean: float
    time: BatchTime | None = None


class _BreakEven(msgspec.Struct, frozen=True, kw_only=True):
    tokens_per_rank: int
    batching: str
    pays: str
    bandwidth_gb_per_s: float | None


class _Ratio(msgspec.Struct, frozen=True, kw_only=True):
    ratio: float
    low: float | None
    high: float | None


class Simulation(msgspec.Struct, frozen=True, kw_only=True):
    """What ``placer simulate --json`` prints of one engine, as far as it is drawn."""

    policies: dict[str, dict[str, float]]
    baselines: dict[str, dict[str, dict[str, float]]]
    tokens: int
    layers: int
    sequences: int
    engine: str | None
    batches: dict[str, list[SimulatedBatch]]
    sent: str | None
    sent_ratio: dict[str, _Ratio]
    break_even: dict[str, list[_BreakEven]]
    warnings: list[str]
    policy: str = "fixed"
    sent_policy: str | None = None
    bandwidth_gb_per_s: float | None = None

    def policy_of(self, name: str) -> str:
        """Return the home policy whose figures a placement is shown by."""
        own = self.sent_policy if name == PLAN else None
        return own or self.policy

    def __post_init__(self) -> None:
        """Refuse placements without the figures that are drawn of all of them."""
        metrics = {_IMBALANCE} if self.sent is None else {_IMBALANCE, self.sent}
        figures = {**self.baselines, PLAN: self.policies}
        if figures.keys() != self.batches.keys():
            raise PlacerError("baselines and batches have different placements")
        for name, policies in figures.items():
            if not metrics <= policies.get(self.policy_of(name), {}).keys():
                raise PlacerError(f"{name} has no figures of {', '.join(sorted(metrics))}")
            shapes = [(one.batching, one.tokens_per_rank) for one in self.batches[name]]
            if shapes != [(b.batching, b.tokens_per_rank) for b in self.batches[PLAN]]:
                raise PlacerError(f"{name} has batches of other sizes than the plan")


class LearningPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A point of :class:`Learning`; see :mod:`placer.planning.learning`."""

    num_tokens: int
    num_sequences: int
    remote_rank_copies_per_token: float
    ratio: float
    load_imbalance_mean: float
    moved: float


class Learning(msgspec.Struct, frozen=True, kw_only=True):
    """What ``placer trace learning --json`` prints."""

    points: Annotated[list[LearningPoint], msgspec.Meta(min_length=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMap:
    """An engine's map: its format, and what is in its slots."""

    format: str
    map: ParsedMap

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read an engine's map; ``None`` where the file is none.

        Raises
        ------
        PlacerError
            If the map breaks a rule of its format.
        """
        name = map_format(path)
        if name is None:
            return None
        return cls(format=name, map=RUNTIMES[name].parse(path, path.suffix))


Result = Frontier | Simulation | Learning | EngineMap | ExportRecord


def result_of_json(path: Path) -> Simulation | Learning | None:
    """Return what a command printed with ``--json``; ``None`` where it is none of these.

    Raises
    ------
    PlacerError
        If it is one, and damaged.
    """
    value: Any = parse_json(read_bytes(path), f"{path}")
    if not isinstance(value, dict):
        return None
    where = str(path)
    if {"batches", "policies", "baselines"} <= value.keys():
        return validated(
            value, Simulation, where, "write it again: placer simulate PLAN TRACE --json"
        )
    if value.keys() - {"verdict"} == {"fold", "phase", "points"}:
        known = {"points": value["points"]}
        return validated(
            known,
            Learning,
            where,
            "write it again: placer trace learning TRACE --gpus-per-node M --json",
        )
    if "engines" in value and isinstance(value["engines"], dict):
        names = ", ".join(map(str, value["engines"]))
        raise PlacerError(
            f"{path} is a simulation of several engines: {names}",
            "simulate one of them: placer simulate PLAN TRACE --engine NAME --json",
        )
    return None

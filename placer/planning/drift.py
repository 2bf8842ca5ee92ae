"""Drift: whether a plan is worse on today's traffic than chance explains."""

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from placer.affinity import Affinity
from placer.errors import PlacerError, UsageError
from placer.intervals import FEWEST_SEQUENCES
from placer.model import require_same_model
from placer.placement import Plan
from placer.placement.reference import contiguous
from placer.placement.topology import INTER_COST, INTRA_COST
from placer.planning.profile import layer_ids_of
from placer.simulation.sent import PAIRS, Wire
from placer.simulation.simulate import simulate
from placer.solver.balance.load_balance import predicted_imbalance
from placer.target.engine import ReplicaChoice
from placer.trace import EVERYTHING, Chunk, Selection, Trace

# Groups of sequences that are left out in turn.
NUM_GROUPS = 8
_MOST_TOKENS = 65_536
# What a plan records of options about traffic, and what they are where nobody gives them.
_TRAFFIC_DEFAULTS = {
    "inter_cost": INTER_COST,
    "intra_cost": INTRA_COST,
    "robust": "none",
    "overflow_price": None,
    "receive_price": 0.0,
    "max_home_imbalance": None,
    "max_received_copies": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """One figure of a plan, then and now.

    Attributes
    ----------
    name
        ``load imbalance``, or ``copies of contiguous``: what the engine sends, where
        placements differ in it.
    then
        Recorded in the plan: held out, or of the profile where nothing was.
    now
        On the trace.
    error
        Standard error of ``now`` over sequences, or ``None`` where only loads are known.
    allowed
        How much worse than ``then`` it may be.
    """

    name: str
    then: float
    now: float
    error: float | None
    allowed: float

    @property
    def drifted(self) -> bool:
        """Whether it got worse than chance and tolerance explain."""
        return self.now - self.then > self.allowed

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self) | {"drifted": self.drifted}


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftReport:
    """A plan's figures on a trace, and those that it records.

    Attributes
    ----------
    figures
        Traffic and balance; from loads, only balance.
    num_tokens, num_sequences
        What was judged; loads know no sequences, nor tokens where top-k is unknown.
    """

    figures: tuple[Drift, ...]
    num_tokens: int | None
    num_sequences: int | None

    @property
    def drifted(self) -> bool:
        """Whether any figure drifted."""
        return any(one.drifted for one in self.figures)


def check_plan(
    plan: Plan,
    trace: Trace,
    selection: Selection = EVERYTHING,
    tolerance: float = 0.02,
    name: str = "PLAN",
) -> DriftReport:
    """Judge a plan on a trace and compare with what the plan records.

    A figure has drifted if it is worse by more than the tolerance and by more than two
    standard errors: of the jackknife over groups of sequences (Efron, The Jackknife, the
    Bootstrap and Other Resampling Plans, 1982, chapter 2), which belong together.

    An imported plan records no figures: the balance on the later half of the sequences is
    compared with that on the earlier half. Errors call the plan by `name`.

    Raises
    ------
    PlacerError
        If trace and plan are of different models, the plan records no figures, or the
        trace has too few sequences.
    """
    _require_tolerance(tolerance)
    require_same_model(plan.model, name, trace.model, str(trace.directory))
    tokens = trace.read(selection).first_sequences(_MOST_TOKENS)
    ids = np.unique(tokens.sequence_ids)
    before = None
    if plan.solver.status == "imported":
        is_early = tokens.sequence_ids < ids[len(ids) // 2]
        before, tokens = tokens.select(is_early), tokens.select(~is_early)
        ids = ids[len(ids) // 2 :]
    if len(ids) < FEWEST_SEQUENCES:
        raise PlacerError(
            f"{len(ids)} sequences are too few to separate drift from chance: "
            f"{FEWEST_SEQUENCES} are needed",
            "record more of today's traffic",
        )
    layer_ids = layer_ids_of(plan, trace.model)
    now, errors = _with_errors(plan, tokens, layer_ids)
    if before is None:
        then = _recorded(plan)
    else:
        then, others = _with_errors(plan, before, layer_ids)
        errors = np.hypot(errors, others)
    return DriftReport(
        figures=tuple(
            Drift(
                name=name,
                then=then[name],
                now=now[name],
                error=float(errors[n]),
                allowed=max(tolerance, 2 * float(errors[n])),
            )
            for n, name in enumerate(then)
        ),
        num_tokens=tokens.num_tokens,
        num_sequences=len(ids),
    )


def check_on_loads(
    plan: Plan,
    affinity: Affinity,
    source: str,
    tolerance: float = 0.02,
    name: str = "PLAN",
) -> DriftReport:
    """Judge the balance of a plan on counted loads, which do not show traffic.

    The imbalance is what to expect where homes of tokens are drawn. It has drifted if it is
    worse than what the plan records by more than the tolerance: without sequences nothing
    tells what chance explains.

    Parameters
    ----------
    plan
        The plan that is served.
    affinity
        Counts of today's traffic.
    source
        Where they were read, for errors.
    tolerance
        How much worse the imbalance may be.
    name
        Where the plan was read, for errors.

    Raises
    ------
    PlacerError
        If counts and plan are of different models, or the plan records no imbalance.
    """
    _require_tolerance(tolerance)
    require_same_model(plan.model, name, affinity.model, source)
    now = predicted_imbalance(
        plan.placement,
        [counts.astype(np.float64) for counts in affinity.load],
        _choice(plan) or "hash",
        layer_ids_of(plan, affinity.model),
    )
    figure = Drift(
        name="load imbalance",
        then=_recorded_imbalance(plan),
        now=float(np.mean(now)),
        error=None,
        allowed=tolerance,
    )
    return DriftReport(
        figures=(figure,), num_tokens=affinity.known_tokens, num_sequences=None
    )


def improving_command(
    plan: Plan, path: Path, source: Path, judged: Selection = EVERYTHING
) -> str:
    """Return the command that improves a plan on newer traffic with few moves.

    It solves on the tokens that were judged, where not all of a trace were.

    It asks for what the plan was solved for; from counts, which say nothing of traffic, for
    balance.
    """
    placement, choice, engine = plan.placement, plan.recorded_choice, plan.engine
    words = ["placer", "solve", str(source)]
    words += ["--nodes", str(placement.num_nodes)]
    words += ["--gpus-per-node", str(placement.ranks_per_node)]
    words += [] if engine is None else ["--engine", engine.name]
    if placement.has_replicas:
        words += ["--redundant-experts", str(placement.redundant_experts)]
        words += (
            [] if choice is None or engine is not None else ["--replica-choice", choice]
        )
    if source.is_file() or plan.provenance.get("objective") == "balance":
        words += ["--objective", "balance"]
    else:
        words += _traffic_words(plan)
    if plan.provenance.get("max_imbalance_given"):
        words += ["--max-imbalance", str(plan.max_imbalance)]
    words += ["--relax-cap"] if plan.provenance.get("relax_cap") else []
    phase = judged.phase or Selection.from_json(plan.provenance).phase
    tokens = replace(judged, phase=phase).options
    words += [] if source.is_file() else tokens.split()
    words += ["--start", str(path), "--migration-cost", "COPIES", "--out", "NEW"]
    return shlex.join(words)


def _traffic_words(plan: Plan) -> list[str]:
    """Return the options about traffic that a plan was solved with."""
    words = ["--policy", plan.policy]
    if plan.engine is None and plan.exchange != "per-rank":
        words += ["--exchange", plan.exchange]
    for name, default in _TRAFFIC_DEFAULTS.items():
        value = plan.provenance.get(name)
        if value is not None and value != default:
            words += [f"--{name.replace('_', '-')}", str(value)]
    for pin in plan.provenance.get("pins", ()):
        words += ["--pin", pin]
    return words


def _require_tolerance(tolerance: float) -> None:
    if not 0 <= tolerance < math.inf:
        raise UsageError(
            f"--tolerance must not be negative and must be finite, got {tolerance:g}",
            "for example --tolerance 0.02",
        )


def _require_solved(plan: Plan) -> None:
    """Refuse an engine's map, which records no figures to compare with."""
    if plan.solver.status == "imported":
        raise UsageError(
            "the plan was imported from a map, so it records no figures that today's "
            "counts could be compared with",
            "compare the halves of a trace: placer check PLAN TRACE",
        )


def _recorded_imbalance(plan: Plan) -> float:
    _require_solved(plan)
    own = plan.metrics["heldout"] or plan.metrics["profile"]
    if own is not None:
        return float(own[plan.policy_without_table]["load_imbalance_mean"])
    if plan.solver.predicted_imbalance is None:
        raise PlacerError(
            "the plan records no imbalance, because it was solved from pairs",
            "solve from the loads: placer solve AFFINITY --objective balance "
            "--gpus-per-node M --out PLAN",
        )
    return plan.solver.predicted_imbalance


def _recorded(plan: Plan) -> dict[str, float]:
    _require_solved(plan)
    own = plan.metrics["heldout"] or plan.metrics["profile"]
    base = plan.metrics["baselines"].get("contiguous")
    if own is None or base is None:
        raise PlacerError(
            "the plan records no figures of tokens, because it was solved from counts",
            "check it on counts: placer affinity TRACE --out AFFINITY, then placer check "
            "PLAN AFFINITY"
            if plan.solver.predicted_imbalance is not None
            else "solve from a trace: placer solve TRACE --fold 0/2 --gpus-per-node M "
            "--out PLAN",
        )
    policy = plan.policy_without_table
    return _compared(plan, own[policy], base[policy])


def _compared(
    plan: Plan, own: Mapping[str, float], reference: Mapping[str, float]
) -> dict[str, float]:
    """Return the figures that are watched: balance, and what is sent if plans differ."""
    sent = Wire.of(plan, plan.engine).compared(plan.policy_without_table)
    if plan.solver.status == "imported":  # what its engine sends is not known
        sent = None
    found = {}
    if sent is not None:
        what = "pairs" if sent == PAIRS else "copies"
        theirs = reference[sent.metric]
        ratio = own[sent.metric] / theirs if theirs else 1.0
        found[f"{what} of contiguous"] = ratio
    return found | {"load imbalance": float(own["load_imbalance_mean"])}


def _figures(
    plan: Plan, tokens: Chunk, layer_ids: tuple[int, ...] | None
) -> dict[str, float]:
    placement = plan.placement
    base = contiguous(
        plan.model.num_experts,
        placement.num_ranks,
        placement.num_nodes,
        placement.redundant_experts,
    )
    own, reference = (
        simulate(
            one,
            tokens,
            replica_choice=_choice(plan),
            layer_ids=layer_ids,
        )[plan.policy_without_table].to_json()
        for one in (placement, base)
    )
    return _compared(plan, own, reference)


def _choice(plan: Plan) -> ReplicaChoice | None:
    """Return which replica serves; of an imported plan that does not say, each as often."""
    if plan.solver.status == "imported":
        return plan.recorded_choice or "hash"
    return plan.replica_choice


def _with_errors(
    plan: Plan, tokens: Chunk, layer_ids: tuple[int, ...] | None
) -> tuple[dict[str, float], np.ndarray]:
    """Return the figures on some tokens, and the standard error of each."""
    parts = [
        list(_figures(plan, one, layer_ids).values()) for one in _without_a_group(tokens)
    ]
    errors = np.sqrt((NUM_GROUPS - 1) * np.var(parts, axis=0))
    return _figures(plan, tokens, layer_ids), errors


def _without_a_group(tokens: Chunk) -> Iterator[Chunk]:
    ids = np.unique(tokens.sequence_ids)
    for group in range(NUM_GROUPS):
        left_out = ids[np.arange(len(ids)) % NUM_GROUPS == group]
        yield tokens.select(~np.isin(tokens.sequence_ids, left_out))

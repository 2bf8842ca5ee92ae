"""A plan on tokens, beside its baselines and other plans."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from placer.affinity import Affinity
from placer.arrays import IntArray
from placer.errors import UsageError
from placer.model import require_same_model
from placer.placement import Plan
from placer.placement.migration import num_moved
from placer.planning.baseline_placements import baseline_placements
from placer.planning.profile import layer_ids_of, num_seen_sequences, profile_of
from placer.report.chart import PLACER
from placer.report.token_counts import TokenCounts, count_tokens
from placer.simulation.sent import Sent, Wire
from placer.trace import EVERYTHING, Selection, Trace
from placer.trace.stored import StoredTokens

_IMBALANCE = "load_imbalance_mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a placement sends and how busy its busiest rank is.

    Attributes
    ----------
    sent
        Per token and layer; ``None`` where every placement sends the same.
    imbalance
        Load of the busiest rank over the mean, mean over the layers.
    moved
        Experts that ranks have to load to change from another plan to this one; ``None``
        of baselines.
    """

    sent: float | None
    imbalance: float
    moved: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Beside:
    """A plan and what it is compared with.

    Attributes
    ----------
    plan
        The plan.
    tokens
        Which tokens it is judged on, as the beginning of a sentence; ``None`` where nothing
        was measured.
    is_heldout
        Whether the plan was solved on none of them.
    policy
        The home policy.
    sent
        What is sent and placements change.
    judged
        By name of the placement; the plan itself is ``placer``, and comes last.
    load
        L arrays ``[E]``: pairs per expert, where a trace or an affinity file was given.
    served
        By name of the placement, where a trace was given.
    warnings
        What limits the figures of the baselines.
    """

    plan: Plan
    tokens: str | None
    is_heldout: bool
    policy: str
    sent: Sent | None
    judged: Mapping[str, Judged]
    load: tuple[IntArray, ...] | None = None
    served: Mapping[str, TokenCounts] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def other_plans(self) -> tuple[str, ...]:
        """Names of the plans that this one is compared with."""
        return tuple(name for name, one in self.judged.items() if one.moved is not None)


def beside_recorded(plan: Plan, others: Mapping[str, Plan]) -> Beside:
    """Compare a plan by the figures that it holds.

    Raises
    ------
    UsageError
        If another plan was measured on other tokens.
    """
    for name, other in others.items():
        if _measured_on(plan) != _measured_on(other):
            raise UsageError(
                f"{name} was measured on other tokens than the plan, so their figures "
                "cannot be compared",
                "give the trace that both should be judged on: placer inspect PLAN OTHER "
                "TRACE",
            )
    profile, heldout = plan.metrics["profile"], plan.metrics["heldout"]
    own = heldout or profile
    figures = dict(plan.metrics["baselines"])
    for name, other in others.items():
        figures[name] = other.metrics["heldout"] or other.metrics["profile"]
    if own is not None:
        figures[PLACER] = own
    sent = Wire.of(plan, plan.engine).compared(plan.policy)
    return Beside(
        plan=plan,
        tokens=None if own is None else "held-out sequences" if heldout else "the profile",
        is_heldout=heldout is not None,
        policy=plan.policy,
        sent=sent,
        judged={}
        if own is None
        else {
            name: Judged(
                sent=None if sent is None else of[plan.policy][sent.metric],
                imbalance=of[plan.policy][_IMBALANCE],
                moved=_moved(plan, others.get(name)),
            )
            for name, of in figures.items()
            if of and plan.policy in of
        },
    )


def beside_on_counts(plan: Plan, others: Mapping[str, Plan], counts: Affinity) -> Beside:
    """Compare a plan by what it holds, and show the load that an affinity file counts."""
    return replace(beside_recorded(plan, others), load=counts.load)


def beside_on_trace(
    plan: Plan, others: Mapping[str, Plan], trace: Trace, selection: Selection
) -> Beside:
    """Serve the tokens of a trace from a plan, its baselines and other plans."""
    tokens = StoredTokens.of(trace, selection)
    baselines, warnings = baseline_placements(plan, trace, selection)
    policy = plan.policy_without_table
    wire = Wire.of(plan, plan.engine)
    sent = wire.compared(policy)
    layer_ids = layer_ids_of(plan, trace.model)
    placements = {name: (one, plan.replica_choice) for name, one in baselines.items()}
    placements |= {name: (p.placement, p.replica_choice) for name, p in others.items()}
    placements[PLACER] = plan.placement, plan.replica_choice
    served = {
        name: count_tokens(placement, tokens, policy, choice, layer_ids)
        for name, (placement, choice) in placements.items()
    }
    sizes = trace.model.num_experts
    ids = tokens.sequence_ids
    seen = num_seen_sequences(plan, trace, ids)
    return Beside(
        plan=plan,
        tokens=f"{len(np.unique(ids)):,} "
        f"{'held-out ' if seen == 0 else ''}sequences of the trace",
        is_heldout=seen == 0,
        policy=policy,
        sent=sent,
        judged={
            name: Judged(
                sent=None if sent is None else float(one.sent[sent.metric].mean()),
                imbalance=float(one.imbalance.mean()),
                moved=_moved(plan, others.get(name)),
            )
            for name, one in served.items()
        },
        load=tuple(
            np.bincount(experts.ravel(), minlength=size)
            for experts, size in zip(tokens.experts, sizes, strict=True)
        ),
        served=served,
        warnings=tuple(warnings),
    )


def heldout_of(plan: Plan, trace: Trace) -> Selection:
    """Return the tokens that a plan is best judged on: those that it was not solved on."""
    profile = profile_of(plan, trace)
    if profile is None or profile.fold is None:
        return EVERYTHING if profile is None else profile
    return profile.complement()


def require_comparable(plans: Sequence[tuple[Path, Plan]]) -> None:
    """Refuse plans of different models, ranks or nodes.

    Raises
    ------
    PlacerError
        If their models differ.
    UsageError
        If their ranks or nodes differ.
    """
    (first_path, first), *others = plans
    for path, other in others:
        require_same_model(first.model, str(first_path), other.model, str(path))
        for what in ("num_ranks", "num_nodes"):
            one, two = (getattr(p.placement, what) for p in (first, other))
            if one != two:
                raise UsageError(
                    f"{first_path} has {what} {one}, {path} has {two}: they cannot be "
                    "compared",
                    "compare plans for the same ranks and nodes",
                )


def _moved(plan: Plan, other: Plan | None) -> int | None:
    return None if other is None else num_moved(other.placement, plan.placement)


def _measured_on(plan: Plan) -> tuple[object, ...]:
    keys = ("trace_sha256", "traces_sha256", "fold", "phase")
    recorded = tuple(str(plan.provenance.get(key)) for key in keys)
    return *recorded, plan.policy, plan.engine, plan.metrics["heldout"] is None

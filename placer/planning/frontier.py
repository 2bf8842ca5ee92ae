"""The trade-off between traffic and balance: one plan for each load cap."""

import csv
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from placer.affinity.count import expert_load
from placer.errors import NoSolutionError, UsageError
from placer.placement import Plan
from placer.planning.planner import plan_for, plan_from_trace
from placer.planning.request import Tell
from placer.run.session import Session
from placer.run.writing import atomic_directory
from placer.simulation.sent import RANK_COPIES, Sent, Wire
from placer.solver.balance.load_caps import require_within_reach
from placer.solver.options import SolveOptions
from placer.trace import Selection, Trace

TABLE_NAME = "frontier.csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """A plan on the curve.

    Attributes
    ----------
    max_imbalance
        The cap that it was solved under, relaxed where it is out of reach.
    file
        The plan's file.
    sent
        What the engine sends and the placement changes.
    sent_per_token
        How much of it, held out where sequences were, else of the profile; so are the next
        two. ``None`` where there was no time to measure.
    ratio
        The same over that of the contiguous placement.
    load_imbalance_mean
        Max/mean rank load, mean over layers.
    objective, bound
        Of the solver, on the profile; the bound may be ``None``.
    reproducible
        Whether no clock and no Ctrl-C stopped its search.
    """

    max_imbalance: float
    file: str
    sent: Sent
    sent_per_token: float | None
    ratio: float | None
    load_imbalance_mean: float | None
    objective: float
    bound: float | None
    reproducible: bool

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name, what is sent by that of its metric."""
        values = asdict(self)
        del values["sent"]
        return {
            self.sent.metric if name == "sent_per_token" else name: value
            for name, value in values.items()
        }


def parse_caps(text: str) -> list[float]:
    """Read load caps such as ``1.02,1.05,1.1``; return them ascending, each once.

    Raises
    ------
    UsageError
        If one is not a number of at least 1.
    """
    try:
        caps = sorted({float(one) for one in text.split(",")})
    except ValueError as error:
        raise UsageError(
            f"--frontier {text} is not a list of load caps",
            "for example --frontier 1.02,1.1",
        ) from error
    if not caps[0] >= 1 or caps[-1] == float("inf"):
        raise UsageError(f"--frontier {text}: a load cap is max/mean, at least 1")
    return caps


def write_frontier(
    trace: Trace,
    options: SolveOptions,
    selection: Selection,
    caps: list[float],
    out: Path,
    session: Session | None = None,
    provenance: Mapping[str, Any] | None = None,
    warn: Tell | None = None,
) -> list[FrontierPoint]:
    """Solve under every cap; write a directory of plans and ``frontier.csv``.

    ``provenance`` is what every plan should say next to its own, and ``warn`` gets the
    load caps that are relaxed. Plans share what is left until the session's deadline, each
    as much as those after it. A cap whose search was stopped at the plan of the cap before
    has no plan of its own; after Ctrl-C the one that is searched for is the last.

    Raises
    ------
    PlacerError
        If ``out`` exists, or a plan cannot be solved.
    NoSolutionError
        If a plan misses a cap, which ``options`` do not relax.
    """
    points: list[FrontierPoint] = []
    placed: list[Any] = []
    session = session or Session()
    if not options.goal.caps.relax and not options.goal.redundant_experts:
        require_within_reach(
            expert_load(trace, selection),
            options.topology.num_ranks,
            caps[0],
            f"--frontier {caps[0]:g}",
            "use the best reached with --relax-cap, or leave out caps below",
        )
    with atomic_directory(out) as directory:
        for number, cap in enumerate(caps):
            if points and session.deadline.passed():
                break
            asked = replace(options, goal=options.goal.under(cap))
            share = session.part(1 / (len(caps) - number))
            plan = plan_from_trace(trace, asked, selection, share)
            if plan.solver.relaxed_layers:
                missed = _relaxed(plan, options, stopped=share.deadline.stopped)
                if warn is not None:
                    warn(missed)
            options.goal.caps.under(cap, relax=options.goal.caps.relax).require_received(
                plan.solver.relaxed_receive_layers.values(),
                plan.placement.num_layers,
                stopped=share.deadline.stopped,
            )
            rows = plan.placement.to_json()
            if not plan.solver.reproducible and rows in placed:
                continue
            placed.append(rows)
            plan = plan_for(plan, provenance or {})
            # All digits, so that no two caps share a file.
            name = f"plan-{str(cap).removesuffix('.0')}.json"
            plan.write(directory / name)
            points.append(_point(plan, cap, name))
            if share.deadline.interrupted:
                break
        with (directory / TABLE_NAME).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(points[0].to_json())
            writer.writerows(point.to_json().values() for point in points)
    return points


def _relaxed(plan: Plan, options: SolveOptions, *, stopped: bool) -> str:
    """Tell by how much a plan misses its load cap; refuse it unless caps may be relaxed."""
    relaxed = plan.solver.relaxed_layers
    worst = max(relaxed.values())
    missed = (
        f"--frontier {plan.max_imbalance:g} is out of reach in {len(relaxed)} of "
        f"{plan.placement.num_layers} MoE layers"
        + (" in the time given" if stopped else "")
        + f": the worst layer reached {worst:.4f}"
    )
    if not options.goal.caps.relax:
        raise NoSolutionError(
            missed,
            "use the best reached with --relax-cap, or leave out caps below "
            f"{np.ceil(worst * 1000) / 1000:g}",
        )
    return missed


def _point(plan: Plan, cap: float, name: str) -> FrontierPoint:
    figures = plan.metrics["heldout"] or plan.metrics["profile"]
    own = {} if figures is None else figures[plan.policy]
    base = plan.metrics["baselines"].get("contiguous", {}).get(plan.policy, {})
    sent = Wire.of(plan, plan.engine).compared(plan.policy) or RANK_COPIES
    mine, theirs = own.get(sent.metric), base.get(sent.metric)
    ratio = None
    if mine is not None and theirs is not None:
        ratio = round(mine / theirs, 5) if theirs else 1.0
    return FrontierPoint(
        max_imbalance=cap,
        file=name,
        sent=sent,
        sent_per_token=mine,
        ratio=ratio,
        load_imbalance_mean=own.get("load_imbalance_mean"),
        objective=plan.solver.objective,
        bound=plan.solver.bound,
        reproducible=plan.solver.reproducible,
    )

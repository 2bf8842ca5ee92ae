"""Making a plan with its metrics from a trace or from counts."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from placer.affinity import Affinity, count_affinity
from placer.errors import PlacerError
from placer.model import ModelSpec
from placer.placement.migration import num_moved
from placer.placement.placement import Placement
from placer.placement.plan import Plan
from placer.placement.solver_report import SolverReport
from placer.placement.topology import Topology
from placer.planning.inner_cap import choose_inner_cap
from placer.planning.judging import Figures, Judging
from placer.run.deadline import Deadline, OutOfTimeError
from placer.run.files import sha256_file, sha256_json
from placer.run.session import Session
from placer.solver.balance.replicas import require_room
from placer.solver.options import SolveOptions
from placer.solver.solve import solve
from placer.trace import Chunk, Selection, Trace
from placer.version import __version__

# What is measured in the end may take a little longer than was expected of it.
_MORE_SECONDS = 1.0
# Of the time that is left, for the prices of the baselines.
_SHARE_OF_PRICES = 0.25


def plan_from_trace(
    trace: Trace,
    options: SolveOptions,
    selection: Selection,
    session: Session | None = None,
    solved: tuple[Placement, SolverReport] | None = None,
) -> Plan:
    """Profile on the tokens selected, solve, and judge on those of all other sequences.

    Without a fold every sequence is profiled and nothing is held out. All that is solved
    stops at the session's deadline. Figures that there is no time for are left out.
    ``solved`` is a placement to judge where there is one already.

    Raises
    ------
    PlacerError
        If the trace is damaged, or the fold or what is outside it empty.
    NoSolutionError
        If the load cap is out of reach, or the cap on received copies was not reached.
    """
    session = session or Session()
    deadline = session.deadline
    more = options.goal.redundant_experts
    options.require_replica_choice()
    require_room(trace.model.num_experts, options.topology.num_ranks, more)
    affinity = count_affinity(trace.chunks(selection), trace.model, {})
    judging = _judging(trace, options, selection)
    end = deadline.extended(_MORE_SECONDS)
    baselines = judging.baselines(affinity.load)
    measured = judging.measure(baselines, deadline)
    prices = _priced_in_time(judging, baselines, deadline)
    profile = judging.profile
    placement, report = solved or _solve(trace.model, affinity, options, profile, session)
    own: list[Figures] = []
    try:
        own = judging.figures(placement, *judging.chunks, deadline=end)
        if prices:
            prices |= judging.prices({"placer": placement}, end)
    except OutOfTimeError:
        prices = {}
        report = msgspec.structs.replace(report, reproducible=False)
    if own:  # homes are known: none need be drawn
        report = msgspec.structs.replace(report, predicted_imbalance=None)
    metrics = {
        "profile": own[0] if own else None,
        "heldout": own[1] if len(own) > 1 else None,
        "baselines": measured,
        **({"prices": prices} if prices else {}),
    }
    source = {
        "trace_sha256": trace.sha256,
        **selection.to_json(),
        "profile_sequences": len(np.unique(profile.sequence_ids)),
    }
    return _plan(trace.model, placement, options, report, metrics, source)


def _judging(trace: Trace, options: SolveOptions, selection: Selection) -> Judging:
    """Return what judges by the tokens of all sequences that are not selected."""
    others = None if selection.fold is None else selection.complement()
    if others is not None and next(trace.chunks(others), None) is None:
        raise PlacerError(
            f"{trace.directory} has no token of {others.options}, so no token is left to "
            "judge on",
            "choose another --fold, or leave it out",
        )
    return Judging(
        model=trace.model,
        options=options,
        profile=trace.read(selection),
        heldout=None if others is None else trace.read(others),
    )


def _priced_in_time(
    judging: Judging, baselines: Mapping[str, Placement], deadline: Deadline
) -> dict[str, float]:
    """Return the prices of the baselines; none where there is no time for all of them."""
    began = time.monotonic()
    try:
        return judging.prices(baselines, deadline.part(_SHARE_OF_PRICES))
    except OutOfTimeError:
        deadline.chosen_in_haste = True
        return {}
    finally:
        deadline.reserve((time.monotonic() - began) / len(baselines))


def _plan(
    model: ModelSpec,
    placement: Placement,
    options: SolveOptions,
    report: SolverReport,
    metrics: dict[str, Any],
    source: Mapping[str, Any],
) -> Plan:
    return Plan(
        model=model,
        placement=placement,
        policy=options.goal.policy,
        exchange=options.goal.counted,
        max_imbalance=options.goal.caps.load_cap,
        solver=report,
        metrics=metrics,
        provenance={**_provenance(options, placement), **source},
    )


def plan_for(plan: Plan, provenance: Mapping[str, Any]) -> Plan:
    """Return a plan with more provenance, the engine's name among it.

    A price of copies that the engine does not send is left out. A plan that was only
    balanced names what the engine sends.
    """
    plan = replace(plan, provenance={**plan.provenance, **provenance})
    if plan.engine is None or plan.engine.dispatch.exchange == plan.exchange:
        return plan
    metrics = {name: one for name, one in plan.metrics.items() if name != "prices"}
    balanced = plan.provenance["objective"] == "balance"
    sent = plan.engine.dispatch.exchange if balanced else plan.exchange
    return replace(plan, metrics=metrics, exchange=sent)


def plan_from_affinity(
    path: Path,
    options: SolveOptions,
    session: Session | None = None,
) -> Plan:
    """Solve from counts, which give pairs but no held-out figures."""
    affinity = Affinity.read(path)
    placement, report = solve(affinity, options, session)
    metrics: dict[str, Any] = {"profile": None, "heldout": None, "baselines": {}}
    source = {
        "affinity_sha256": sha256_file(path),
        "traces_sha256": affinity.provenance.get("traces_sha256"),
        **Selection.from_json(affinity.provenance).to_json(),
    }
    return _plan(affinity.model, placement, options, report, metrics, source)


def _solve(
    model: ModelSpec,
    affinity: Affinity,
    options: SolveOptions,
    profile: Chunk,
    session: Session,
) -> tuple[Placement, SolverReport]:
    """Solve, a robust plan under the cap that halves of the profile ask for."""
    goal = options.goal
    if goal.robust == "none" or goal.objective == "balance":
        return solve(affinity, options, session, profile)
    with session.choosing() as quick:
        inner_cap = choose_inner_cap(model, profile, options, quick)
    tuned = goal.under(inner_cap.max_imbalance)
    inner = replace(options, goal=replace(tuned, overflow_price=inner_cap.overflow_price))
    placement, report = solve(affinity, inner, session, profile)
    # A cap that nobody asked for may be missed; what was asked for may not.
    missed = goal.caps.missed_load(report.relaxed_layers)
    options.require_load(missed.values(), placement.num_layers)
    goal.caps.require_received(
        report.relaxed_receive_layers.values(),
        placement.num_layers,
        stopped=session.deadline.stopped,
    )
    return placement, msgspec.structs.replace(
        report, inner_cap=inner_cap, relaxed_layers=missed
    )


def _costs(topology: Topology) -> dict[str, Any]:
    """Return what a copy costs: two classes of links, or a matrix with its file's hash."""
    if topology.cost is None:
        return {
            "inter_cost": topology.inter_cost,
            "intra_cost": topology.intra_cost,
            "topology": None,
        }
    matrix = {"sha256": topology.cost_sha256, "cost": [list(r) for r in topology.cost]}
    return {"inter_cost": None, "intra_cost": None, "topology": matrix}


def _provenance(options: SolveOptions, placement: Placement) -> dict[str, Any]:
    start = options.start.placement
    from_start = start and {
        "start_map_sha256": sha256_json(start.to_json()),
        "migration_cost": options.start.migration_cost,
        "moved_experts": num_moved(start, placement),
    }
    versions = {"placer": __version__, **_costs(options.topology)}
    return versions | options.to_json() | (from_start or {})

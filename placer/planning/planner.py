"""From a trace, or from counts alone, to a plan with its metrics."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from placer import __version__
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
from placer.run.progress import Progress
from placer.solver.balance.replicas import require_room
from placer.solver.missed_caps import above_load_cap, require_load_cap, require_receive_cap
from placer.solver.options import SolveOptions
from placer.solver.problem.layer_profile import layer_tokens
from placer.solver.problem.scenarios import load_scenarios
from placer.solver.problem.traffic import TrafficProblem
from placer.solver.search.evaluator import evaluate
from placer.solver.solve import solve
from placer.trace import Chunk, Selection, Trace

# What is measured in the end may take a little longer than was expected of it.
_MORE_SECONDS = 1.0
# Of the time that is left, for the prices of the baselines.
_SHARE_OF_PRICES = 0.25


def plan_from_trace(
    trace: Trace,
    options: SolveOptions,
    selection: Selection,
    progress: Progress | None = None,
    deadline: Deadline | None = None,
) -> Plan:
    """Profile on the tokens selected, solve, and judge on those of all other sequences.

    Without a fold every sequence is profiled and nothing is held out. All that is solved
    stops at the ``deadline``, by default one of ``options.time_limit`` from now. Figures
    that there is no time for are left out.

    Raises
    ------
    PlacerError
        If the trace is damaged, or the fold or what is outside it empty.
    NoSolutionError
        If the load cap is out of reach, or the cap on received copies was not reached.
    """
    deadline = deadline or Deadline(seconds=options.time_limit)
    require_room(
        trace.model.num_experts, options.topology.num_ranks, options.redundant_experts
    )
    affinity = count_affinity(trace.chunks(selection), trace.model, {})
    profile = trace.read(selection)
    others = None if selection.fold is None else selection.complement()
    if others is not None and next(trace.chunks(others), None) is None:
        raise PlacerError(
            f"{trace.directory} has no token of {others.options}: none is left to judge on",
            "choose another --fold, or leave it out",
        )
    heldout = None if others is None else trace.read(others)
    judging = Judging(model=trace.model, options=options, profile=profile, heldout=heldout)
    end = deadline.extended(_MORE_SECONDS)
    baselines = judging.baselines(affinity.load)
    measured = judging.measure(baselines, deadline)
    began = time.monotonic()
    prices: dict[str, float] = {}
    try:
        part = deadline.part(_SHARE_OF_PRICES)
        prices = _prices(trace.model, judging.judged, baselines, options, part)
    except OutOfTimeError:
        deadline.chosen_in_haste = True
    deadline.reserve((time.monotonic() - began) / len(baselines))
    placement, report = _solve(trace.model, affinity, options, profile, progress, deadline)
    own: list[Figures] = []
    try:
        chunks = [profile] if heldout is None else [profile, heldout]
        own = judging.figures(placement, *chunks, deadline=end)
        if prices:
            placed = {"placer": placement}
            prices |= _prices(trace.model, judging.judged, placed, options, end)
    except OutOfTimeError:
        prices = {}
        report = msgspec.structs.replace(report, reproducible=False)
    if own:  # homes are known: none need be drawn
        report = msgspec.structs.replace(report, predicted_imbalance=None)
    return Plan(
        model=trace.model,
        placement=placement,
        policy=options.policy,
        exchange=options.exchange,
        max_imbalance=options.load_cap,
        solver=report,
        metrics={
            "profile": own[0] if own else None,
            "heldout": own[1] if len(own) > 1 else None,
            "baselines": measured,
            **({"prices": prices} if prices else {}),
        },
        provenance=_provenance(options, placement)
        | {
            "trace_sha256": trace.sha256,
            **selection.to_json(),
            "profile_sequences": len(np.unique(profile.sequence_ids)),
        },
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
    progress: Progress | None = None,
    deadline: Deadline | None = None,
) -> Plan:
    """Solve from counts alone, which know pairs but no held-out figure."""
    affinity = Affinity.read(path)
    placement, report = solve(affinity, options, progress, deadline=deadline)
    return Plan(
        model=affinity.model,
        placement=placement,
        policy=options.policy,
        exchange=options.exchange,
        max_imbalance=options.load_cap,
        solver=report,
        metrics={"profile": None, "heldout": None, "baselines": {}},
        provenance=_provenance(options, placement)
        | {
            "affinity_sha256": sha256_file(path),
            "traces_sha256": affinity.provenance.get("traces_sha256"),
            **Selection.from_json(affinity.provenance).to_json(),
        },
    )


def _solve(
    model: ModelSpec,
    affinity: Affinity,
    options: SolveOptions,
    profile: Chunk,
    progress: Progress | None,
    deadline: Deadline,
) -> tuple[Placement, SolverReport]:
    """Solve, a robust plan under the cap that halves of the profile ask for."""
    if options.robust == "none" or options.objective == "balance":
        return solve(affinity, options, progress, profile, deadline)
    with deadline.choosing() as quick:
        inner_cap = choose_inner_cap(model, profile, options, progress, quick)
    inner = replace(
        options,
        max_imbalance=inner_cap.max_imbalance,
        overflow_price=inner_cap.overflow_price,
        relax_cap=True,
    )
    placement, report = solve(affinity, inner, progress, profile, deadline)
    # A cap that nobody asked for may be missed; what was asked for may not.
    missed = above_load_cap(report.relaxed_layers, options)
    require_load_cap(missed.values(), options, placement.num_layers)
    require_receive_cap(
        report.relaxed_receive_layers.values(),
        options,
        placement.num_layers,
        stopped=deadline.stopped,
    )
    return placement, msgspec.structs.replace(
        report, inner_cap=inner_cap, relaxed_layers=missed
    )


def _prices(
    model: ModelSpec,
    tokens: Chunk,
    placements: Mapping[str, Placement],
    options: SolveOptions,
    deadline: Deadline,
) -> dict[str, float]:
    """Return the price of each placement's copies, where links cost differently.

    Empty for a policy whose homes each placement's own table gives.

    Raises
    ------
    OutOfTimeError
        If there is no time for all of them.
    """
    topology, policy = options.topology, options.policy
    if topology.cost is None and topology.num_nodes == 1:
        return {}
    if policy == "token" or policy == "request":  # mypy narrows no set
        return {}
    load = load_scenarios(tokens, model.num_experts, "none", options.seed)
    problem = TrafficProblem(
        experts=layer_tokens(tokens),
        topology=topology,
        policy=policy,
        exchange=options.exchange,
        load=load,
        max_load=tuple(one.sum(axis=1) for one in load),
        replica_choice=options.replica_choice,
        layer_ids=model.layer_ids,
    )
    paced = deadline.paced(placements.items(), len(placements))
    return {name: round(evaluate(problem, one).copies, 5) for name, one in paced}


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
    start = options.start
    from_start = start and {
        "start_map_sha256": sha256_json(start.to_json()),
        "migration_cost": options.migration_cost,
        "moved_experts": num_moved(start, placement),
    }
    params = options.params.changed()
    for recorded in ("num_rounds", "num_sweeps"):
        params.pop(recorded, None)
    return (
        {
            "placer": __version__,
            **_costs(options.topology),
            "num_rounds": options.params.num_rounds,
            "num_sweeps": options.params.num_sweeps,
            "robust": options.robust,
            "overflow_price": options.overflow_price,
            "receive_price": options.receive_price,
            "replica_choice": options.replica_choice,
            "relax_cap": options.relax_cap,
            "max_imbalance_given": options.max_imbalance is not None,
            "objective": options.objective,
            "pins": [str(pin) for pin in options.pins],
            "preserve_groups": options.preserve_groups,
            "ignore_groups": options.ignore_groups,
            "max_home_imbalance": options.max_home_imbalance,
            "max_received_copies": options.max_received_copies,
        }
        | ({"params": params} if params else {})
        | (from_start or {})
    )

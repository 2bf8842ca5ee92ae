"""Solving: from affinity, and tokens if given, to a placement with a proof.

Pairs first: exactly where a layer has few balanced assignments, else by local search. Then
the copies that the profile's tokens really cause (``refine``), and a certificate of both.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from placer.affinity import Affinity
from placer.errors import UsageError
from placer.placement.placement import Placement
from placer.placement.solver_report import SolverReport
from placer.run.session import Session
from placer.solver.balance.replicas import require_room
from placer.solver.options import SolveOptions
from placer.solver.partition.improved import improved, pins_and_groups_of
from placer.solver.proof.reports import content_report, copies_report, pair_report
from placer.solver.search.first_placement import Profile, first_placement, profiled
from placer.solver.search.minimise import minimised
from placer.solver.solve_loads import solve_loads
from placer.trace import Chunk


def solve(
    affinity: Affinity,
    options: SolveOptions,
    session: Session | None = None,
    tokens: Chunk | None = None,
) -> tuple[Placement, SolverReport]:
    """Place the experts of every layer.

    Parameters
    ----------
    affinity
        Counts of the profile; only loads: they are balanced.
    options
        What to solve for.
    session
        Reports steps; holds deadline and seed. Interrupted by Ctrl-C, the search gives the
        best so far; the report then says that it is not reproducible.
    tokens
        The profile itself: the copies that it causes are minimised. Without it pairs of
        experts are all that is known.

    Raises
    ------
    NoSolutionError
        If a layer cannot meet the load cap, or was not brought under the cap on received
        copies, and caps may not be relaxed.
    UsageError
        If slots do not divide over the ranks, or an option needs tokens.
    """
    began = time.monotonic()
    session = session or Session()
    deadline = session.deadline
    goal = options.goal
    options.require_replica_choice()
    require_room(
        affinity.model.num_experts, options.topology.num_ranks, goal.redundant_experts
    )
    if goal.objective == "balance" or not affinity.has_links:
        return solve_loads(affinity, options, session)
    if tokens is None and options.needs_tokens is not None:
        raise UsageError(
            f"{options.needs_tokens} needs the tokens of a trace, not only counts",
            "solve from the trace itself: placer solve TRACE --gpus-per-node M --out PLAN",
        )
    profile, relaxed = profiled(affinity, tokens, options, session)
    if profile.judged is None:
        found = _by_pairs(profile, relaxed, options, session)
    else:
        found = _by_copies(profile, profile.judged, relaxed, options, session)
    report = found.report
    return found.placement, SolverReport(
        **report,
        termination=deadline.termination(proved=report["status"] == "optimal"),
        seconds=time.monotonic() - began,
        seed=session.seed,
        reproducible=deadline.reproducible,
        relaxed_layers=_by_name(found.relaxed),
        relaxed_receive_layers=_by_name(found.relaxed_receive),
        eplb_caps=None
        if not goal.caps.below_eplb
        else profile.imbalance(found.max_load, options.topology.num_ranks),
        above_eplb_layers=_by_name(found.above_eplb),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Solved:
    """A placement, what is proved of it, and the caps that its layers miss.

    Attributes
    ----------
    report
        The fields of ``SolverReport`` that say what it costs.
    max_load
        ``[L]``: pairs that a rank may serve in each layer.
    relaxed, relaxed_receive, above_eplb
        By layer, what those reach that are above the cap on load, on received copies, or
        only EPLB's load.
    """

    placement: Placement
    report: dict[str, Any]
    max_load: Sequence[float]
    relaxed: Mapping[int, float]
    relaxed_receive: Mapping[int, float] = field(default_factory=dict)
    above_eplb: Mapping[int, float] = field(default_factory=dict)


def _by_pairs(
    profile: Profile, relaxed: Mapping[int, float], options: SolveOptions, session: Session
) -> _Solved:
    """Minimise pairs, where they are all that is known or asked for."""
    policy = options.start_policies(profile.affinity.model.top_k)[0]
    problem = profile.problem(policy, options)
    placement, _ = first_placement(profile, problem, options, session)
    return _Solved(
        placement=placement,
        report=pair_report(problem, placement, options, session),
        max_load=problem.max_load,
        relaxed=relaxed,
    )


def _by_copies(
    profile: Profile,
    judged: Chunk,
    relaxed: Mapping[int, float],
    options: SolveOptions,
    session: Session,
) -> _Solved:
    """Minimise the copies of the judged tokens; refuse caps that are missed."""
    found, content = minimised(profile, judged, options, session)
    kept = pins_and_groups_of(found, profile.affinity.model.n_group, options)
    found, proofs = improved(found, judged, kept, options, session)
    placement, stopped = found.placement, session.deadline.stopped
    reached = found.evaluate() if content is None else content
    above_eplb: dict[int, float] = {}
    caps = options.goal.caps
    if options.goal.redundant_experts > 0 or options.start.constrains:
        relaxed = caps.missed_load(dict(enumerate(reached.imbalance)))
        options.require_load(relaxed.values(), placement.num_layers, stopped=stopped)
        if caps.below_eplb:
            missed = reached.missed_load_cap()
            above_eplb = {n: missed[n] for n in missed.keys() - relaxed.keys()}
    relaxed_receive = reached.missed_receive_cap()
    caps.require_received(relaxed_receive.values(), placement.num_layers, stopped=stopped)
    if content is not None:
        used = len(found.traffic.experts[0])
        sample = used if used < judged.num_tokens else None
        report = content_report(options, content, sample)
    else:
        report = copies_report(
            found.problem,
            found.traffic,
            judged,
            placement,
            reached,
            found.optimal,
            proofs,
            options,
            found.line,
            session,
        )
    return _Solved(
        placement=placement,
        report=report,
        max_load=[float(one[0]) for one in found.traffic.max_load],
        relaxed=relaxed,
        relaxed_receive=relaxed_receive,
        above_eplb=above_eplb,
    )


def _by_name(layers: Mapping[int, float]) -> dict[str, float]:
    return {str(layer): value for layer, value in layers.items()}


def solve_to_choose(
    affinity: Affinity, options: SolveOptions, profile: Chunk | None, session: Session
) -> tuple[Placement, SolverReport]:
    """Solve a quick plan; the deadline records if the clock stopped it.

    Raises
    ------
    KeyboardInterrupt
        On Ctrl-C: there is no plan to give yet.
    """
    placement, report = solve(affinity, options, session.quiet, profile)
    if session.deadline.interrupted:
        raise KeyboardInterrupt
    return placement, report

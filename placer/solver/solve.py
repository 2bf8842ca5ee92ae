"""Solving: from affinity, and tokens where there are some, to a placement with a proof.

Pairs first: exactly where a layer has few balanced assignments, else by local search. Then
the copies that the profile's tokens really cause (``refine``), and a certificate of both.
"""

import time
from collections.abc import Mapping

from placer.affinity import Affinity
from placer.errors import UsageError
from placer.placement.placement import Placement
from placer.placement.solver_report import SolverReport
from placer.run.deadline import Deadline
from placer.run.progress import Progress
from placer.solver.balance.replicas import require_room
from placer.solver.missed_caps import above_load_cap, require_load_cap, require_receive_cap
from placer.solver.options import SolveOptions
from placer.solver.proof.reports import content_report, copies_report, pair_report
from placer.solver.search.first_placement import first_placement, profiled
from placer.solver.search.minimise import minimised
from placer.solver.solve_loads import solve_loads
from placer.trace import Chunk


def solve(
    affinity: Affinity,
    options: SolveOptions,
    progress: Progress | None = None,
    tokens: Chunk | None = None,
    deadline: Deadline | None = None,
) -> tuple[Placement, SolverReport]:
    """Place the experts of every layer.

    Parameters
    ----------
    affinity
        Counts of the profile; loads alone are balanced.
    options
        What to solve for.
    progress
        Called with one line per step. Interrupted by Ctrl-C, the search gives the best so
        far; the report then says that it is not reproducible.
    tokens
        The profile itself: the copies that it causes are minimised. Without it pairs of
        experts are all that is known.
    deadline
        Stops search and proof; one of ``options.time_limit`` from now by default.

    Raises
    ------
    NoSolutionError
        If a layer cannot meet the load cap, or was not brought under the cap on received
        copies, and ``relax_cap`` is false.
    UsageError
        If slots do not divide over the ranks, or an option needs tokens.
    """
    began = time.monotonic()
    deadline = deadline or Deadline(seconds=options.time_limit)
    require_room(
        affinity.model.num_experts, options.topology.num_ranks, options.redundant_experts
    )
    if options.objective == "balance" or not affinity.has_links:
        return solve_loads(affinity, options, deadline)
    if tokens is None and options.needs_tokens is not None:
        raise UsageError(
            f"{options.needs_tokens} needs the tokens of a trace, not counts alone",
            "solve from the trace itself: placer solve TRACE --gpus-per-node M --out PLAN",
        )
    num_ranks = options.topology.num_ranks
    profile, relaxed = profiled(affinity, tokens, options, deadline)
    relaxed_receive: dict[int, float] = {}
    above_eplb: dict[int, float] = {}
    if profile.judged is None:
        problem = profile.problem(options.start_policies(affinity.model.top_k)[0], options)
        placement, _ = first_placement(profile, problem, options, progress, deadline)
        report = pair_report(problem, placement, options, progress, deadline)
        max_load = problem.max_load
    else:
        found, content = minimised(profile, profile.judged, options, progress, deadline)
        placement = found.placement
        max_load = tuple(float(caps[0]) for caps in found.traffic.max_load)
        reached = found.evaluate() if content is None else content
        may_be_above = options.redundant_experts > 0 or options.constrained
        if may_be_above or options.max_received_copies is not None:
            if may_be_above:
                relaxed = above_load_cap(dict(enumerate(reached.imbalance)), options)
                require_load_cap(
                    relaxed.values(),
                    options,
                    placement.num_layers,
                    stopped=deadline.stopped,
                )
                if options.below_eplb:
                    missed = reached.missed_load_cap()
                    above_eplb = {n: missed[n] for n in missed.keys() - relaxed.keys()}
            relaxed_receive = reached.missed_receive_cap()
            require_receive_cap(
                relaxed_receive.values(),
                options,
                placement.num_layers,
                stopped=deadline.stopped,
            )
        if content is not None:
            used = len(found.traffic.experts[0])
            sample = used if used < profile.judged.num_tokens else None
            report = content_report(options, content, sample)
        else:
            report = copies_report(
                found.problem,
                found.traffic,
                profile.judged,
                placement,
                reached,
                found.optimal,
                options,
                found.line,
                deadline,
            )
    return placement, SolverReport(
        **report,
        termination=deadline.termination(proved=report["status"] == "optimal"),
        seconds=time.monotonic() - began,
        seed=options.seed,
        reproducible=deadline.reproducible,
        relaxed_layers=_by_name(relaxed),
        relaxed_receive_layers=_by_name(relaxed_receive),
        eplb_caps=None
        if not options.below_eplb
        else profile.imbalance(max_load, num_ranks),
        above_eplb_layers=_by_name(above_eplb),
    )


def _by_name(layers: Mapping[int, float]) -> dict[str, float]:
    return {str(layer): value for layer, value in layers.items()}


def solve_to_choose(
    affinity: Affinity, options: SolveOptions, profile: Chunk | None, deadline: Deadline
) -> tuple[Placement, SolverReport]:
    """Solve for a plan to choose by; of a choice that the clock cut, the deadline knows.

    Raises
    ------
    KeyboardInterrupt
        On Ctrl-C: there is no plan to give yet.
    """
    placement, report = solve(affinity, options, None, profile, deadline)
    if deadline.interrupted:
        raise KeyboardInterrupt
    return placement, report

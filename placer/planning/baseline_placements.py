"""The baselines that a plan is compared with."""

import dataclasses
from collections.abc import Sequence

from placer.baseline import BASELINES, BaselineProblem
from placer.errors import UsageError, meant
from placer.placement import Placement, Plan
from placer.placement.topology import Topology
from placer.planning.profile import profile_of
from placer.trace import Selection, Trace

DEFAULT_BASELINES = ("contiguous", "balanced", "eplb")


def baseline_placements(
    plan: Plan, trace: Trace, judged: Selection, names: Sequence[str] | None = None
) -> tuple[dict[str, Placement], list[str]]:
    """Build baselines from the plan's profile, and say what limits them.

    They see the plan's own profile where it is of this trace, else all tokens of the phase
    that is judged. ``names`` are :data:`DEFAULT_BASELINES` unless given; of those, one that
    cannot be built is left out.

    Raises
    ------
    UsageError
        If a name is unknown, or a baseline that was asked for cannot be built.
    """
    asked, names = bool(names), names or DEFAULT_BASELINES
    unknown = sorted(set(names) - set(BASELINES))
    if unknown:
        raise UsageError(
            f"--baseline {unknown[0]} is not known",
            f"{meant(unknown[0], BASELINES)}choose among {', '.join(BASELINES)}",
        )
    ranks, nodes = plan.placement.num_ranks, plan.placement.num_nodes
    profile, why = profile_of(plan, trace), "the plan records no fold"
    problem = BaselineProblem(
        trace=trace,
        selection=profile or Selection(phase=judged.phase),
        topology=Topology(num_nodes=nodes, gpus_per_node=ranks // nodes),
        redundant_experts=plan.placement.redundant_experts,
    )
    if not problem.load[0].any():  # no sequence of the fold is in this trace
        problem = dataclasses.replace(problem, selection=Selection(phase=judged.phase))
        profile = None
    if profile is None:
        why = "the plan's profile is not in this trace"
    placements, warnings = {}, []
    for name in names:
        try:
            placements[name] = BASELINES[name](problem)
        except UsageError as error:
            if asked:
                raise
            warnings.append(f"no baseline {name}: {error}")
    informed = [name for name in placements if name not in ("contiguous", "random")]
    if problem.selection.fold is None and informed:
        warnings.append(
            f"{why}, so these baselines use all sequences, also the judged ones: "
            f"{', '.join(informed)}"
        )
    return placements, warnings

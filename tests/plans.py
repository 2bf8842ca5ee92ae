"""Plans that were not solved: of a placement as it is given; and options, changed."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from placer.model import ModelSpec
from placer.placement import Placement, Plan, SolverReport
from placer.planning.request import ServedNow, SolveRequest
from placer.solver.options import SolveOptions
from placer.trace import EVERYTHING, Selection


def unsolved_plan(model: ModelSpec, placement: Placement, **provenance: object) -> Plan:
    return Plan(
        model=model,
        placement=placement,
        policy="fixed",
        exchange="per-rank",
        max_imbalance=1.1,
        solver=SolverReport(
            status="feasible",
            termination="step_limit",
            objective_name="none",
            objective=0.0,
            bound=None,
            gap=None,
            bound_method="placed without a solver",
            seconds=None,
            seed=0,
        ),
        metrics={"profile": None, "heldout": None, "baselines": {}},
        provenance=provenance,
    )


def changed(options: SolveOptions, **changes: object) -> SolveOptions:
    """Return options with other fields of their goal, caps, start, or of their own."""
    goal, start = options.goal, options.start
    parts = [(part, fields(part)) for part in (goal.caps, goal, start, options)]
    new = []
    for part, known in parts:
        mine = {one.name for one in known} & changes.keys()
        new.append(replace(part, **{name: changes.pop(name) for name in mine}))
    assert not changes, f"no option has these fields: {changes}"
    caps, goal, start, options = new
    return replace(options, goal=replace(goal, caps=caps), start=start)


def request_for(
    source: Path,
    options: SolveOptions,
    selection: Selection = EVERYTHING,
    start: Path | None = None,
    **asked: Any,
) -> SolveRequest:
    """Return a request for changed options; ``start`` is the path of a plan."""
    own = {one.name for one in fields(SolveRequest)} & asked.keys()
    mine = {name: asked.pop(name) for name in own}
    if asked.get("objective") == "time":
        mine["by_time"] = bool(asked.pop("objective"))
    if start is not None:
        mine["served_now"] = ServedNow.read(start)
        asked["placement"] = mine["served_now"].plan.placement
    options = changed(options, **asked)
    return SolveRequest(source=source, selection=selection, options=options, **mine)

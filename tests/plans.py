"""Plans that were not solved: of a placement as it is given."""

from placer.model import ModelSpec
from placer.placement import Placement, Plan, SolverReport


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

"""What the ``repr`` of a plan shows."""

from pathlib import Path

from placer.api.shown import Shape, model_name, model_words
from placer.placement import Plan
from placer.report.comparison import plan_table, plan_table_title


def shape_of_plan(plan: Plan, path: Path | None) -> Shape:
    """Return the facts and the figures of a plan; ``path`` is its file, if it has one."""
    placed, solver = plan.placement, plan.solver
    is_solved = solver.status != "imported"
    columns, rows = plan_table(plan)
    title = plan_table_title(plan).removesuffix(":")
    nodes = f"{placed.num_nodes} node{'s' * (placed.num_nodes > 1)}"
    return Shape(
        title=f"Plan for {model_name(plan.model)}",
        facts={
            "path": path,
            "routing": model_words(plan.model),
            "ranks": f"{placed.num_ranks} on {nodes}",
            "redundant experts": placed.redundant_experts or None,
            "engine": plan.provenance.get("engine"),
            "policy": plan.policy if is_solved else None,
            "solver": solver.status,
            "gap to the bound": None if solver.gap is None else f"{solver.gap:.1%}",
            "figures": title if rows else None,
        },
        columns=columns,
        rows=rows,
    )

"""The contents of a plan: what it changes, what proves it, and where its experts are.

Legend of the shapes: L MoE layers, E logical experts of a layer, R ranks.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import UNSET

from placer.arrays import IntArray
from placer.model import ModelSpec
from placer.placement import Placement, Plan
from placer.placement.placement import rank_load
from placer.report.beside import Beside
from placer.report.chart import Section
from placer.report.comparison import comparison_table
from placer.report.headline import headline_of_plan
from placer.report.plan_charts import charts_of_plan
from placer.report.statistics import skew
from placer.report.summary import Summary
from placer.simulation.sent import Wire

# The table that `placer inspect PLAN --load` is asked for.
RANK_LOAD = "rank load per MoE layer"


def summarize_plan(beside: Beside) -> Summary:
    """Return what a plan holds and changes."""
    plan, load = beside.plan, beside.load
    placement, solver = plan.placement, plan.solver
    # An imported map says nothing of what a solve decides.
    is_solved = solver.status != "imported"
    rows = placement.physical_to_logical_map
    moved = [
        float(
            (
                placement.expert_rank(n) != np.arange(size) * placement.num_ranks // size
            ).mean()
        )
        for n, size in enumerate(placement.num_experts)
    ]
    facts = model_facts(plan.model) | {
        "num_ranks": placement.num_ranks,
        "num_nodes": placement.num_nodes,
        "slots_per_rank": one_or_list([len(row) // placement.num_ranks for row in rows]),
        "redundant_experts": one_or_list(
            [len(row) - size for row, size in zip(rows, placement.num_experts, strict=True)]
        ),
        "policy": plan.policy if is_solved else None,
        "exchange": plan.exchange if is_solved else None,
        "max_imbalance": plan.max_imbalance if is_solved else None,
        "status": solver.status,
        "objective": solver.objective if is_solved else None,
        "objective_name": solver.objective_name if is_solved else None,
        "bound": solver.bound,
        "gap": solver.gap,
        "bound_method": solver.bound_method if is_solved else None,
        "pairs_gap": None if solver.pairs is None else solver.pairs.gap,
        "seed": solver.seed if is_solved else None,
        "reproducible": solver.reproducible if is_solved else None,
        "experts_off_contiguous_rank": float(np.mean(moved)),
        "provenance": dict(plan.provenance),
    }
    sections = [*_beside_section(beside), *_metric_sections(plan), *_proof_sections(plan)]
    if load is not None:
        sections.append(_rank_load_section(placement, load))
    return Summary(
        kind="plan",
        headline=headline_of_plan(beside),
        facts=facts,
        sections=tuple(sections),
        charts=charts_of_plan(beside),
    )


def _beside_section(beside: Beside) -> list[Section]:
    """Return what is compared on the top screen."""
    if not beside.judged:
        return []
    sent = "sent/token" if beside.sent is None else beside.sent.heading
    return [
        Section(
            title=f"placements on {beside.tokens}, policy {beside.policy}",
            columns=("placement", sent, "imbalance", "experts to load"),
            rows=tuple(
                (name, one.sent, one.imbalance, one.moved)
                for name, one in beside.judged.items()
            ),
        )
    ]


def _proof_sections(plan: Plan) -> list[Section]:
    """Return the load cap of each layer, and the layers that miss it."""
    solver = plan.solver
    if solver.status == "imported":
        return []
    caps = solver.eplb_caps or (plan.max_imbalance,) * plan.placement.num_layers
    missed = {**solver.relaxed_layers, **solver.above_eplb_layers}
    received = solver.relaxed_receive_layers
    by_layer = Section(
        title="load cap per MoE layer, on the profile",
        columns=("layer", "load cap", "missed: max/mean", "received copies above the cap"),
        rows=tuple(
            (n, cap, missed.get(str(n)), received.get(str(n))) for n, cap in enumerate(caps)
        ),
    )
    title = "proof, on the profile"
    if (
        solver.layer_gaps is UNSET
        and solver.bound is not None
        and solver.status != "optimal"
    ):
        title += ". The plan holds no gap of each layer: placer prove PLAN TRACE --details"
    proof = Section(
        title=title,
        columns=("objective", "reached", "bound", "gap", "how"),
        rows=tuple(
            (one.objective_name, one.objective, one.bound, one.gap, one.bound_method)
            for one in (solver, *(() if solver.pairs is None else (solver.pairs,)))
        ),
    )
    return [proof, by_layer]


def _rank_load_section(placement: Placement, load: Sequence[IntArray]) -> Section:
    """Return one row per MoE layer: max/mean rank load, and what makes the busiest rank so.

    Experts are shown with their share of that rank's load, the largest first: as many as
    have most of it, at most five.
    """
    rows = []
    for layer, counts in enumerate(load):
        loads = rank_load(placement, layer, counts)
        ratio = skew(loads)
        busiest = int(ratio.argmax())
        held = placement.holds(layer)
        served = counts * held[:, busiest] / held.sum(axis=1)
        share = served / max(float(loads[busiest]), 1.0)
        order = np.argsort(-share, kind="stable")
        largest = order[: min(int(np.searchsorted(share[order].cumsum(), 0.5)) + 1, 5)]
        rows.append(
            (
                layer,
                float(ratio.max()),
                float(ratio.min()),
                busiest,
                " ".join(map(str, np.flatnonzero(held[:, busiest]))),
                " ".join(f"{expert} ({share[expert]:.0%})" for expert in largest),
            )
        )
    return Section(
        title=RANK_LOAD,
        columns=(
            *("layer", "max/mean", "min/mean", "busiest rank"),
            *("experts there", "most of its load"),
        ),
        rows=tuple(rows),
    )


def _metric_sections(plan: Plan) -> list[Section]:
    """Compare the plan with its baselines, and its profile with held-out tokens."""
    profile, heldout = plan.metrics["profile"], plan.metrics["heldout"]
    own = heldout or profile
    if own is None:
        return []
    judged = "held-out sequences" if heldout else "the profile (no sequences were held out)"
    columns, rows = comparison_table(
        {**plan.metrics["baselines"], "placer": own},
        list(own),
        Wire.of(plan, plan.engine),
    )
    beside = Section(
        title=f"on {judged}", columns=columns, rows=tuple(tuple(row) for row in rows)
    )
    if not heldout:
        return [beside]
    both = Section(
        title=f"profile and held out, policy {plan.policy}",
        columns=("metric", "profile", "held out"),
        rows=tuple(
            (name, value, heldout[plan.policy].get(name))
            for name, value in profile[plan.policy].items()
        ),
    )
    return [beside, both]


def model_facts(model: ModelSpec) -> dict[str, Any]:
    """Return the shape of a model's routing as facts."""
    return {
        "model": model.id,
        "model_type": model.model_type,
        "fingerprint": model.fingerprint,
        "num_layers": model.num_layers,
        "num_experts": one_or_list(model.num_experts),
        "top_k": model.top_k or None,
    }


def one_or_list(values: Sequence[int]) -> int | list[int]:
    """Shorten the counts of a uniform model to one figure."""
    return values[0] if len(set(values)) == 1 else list(values)

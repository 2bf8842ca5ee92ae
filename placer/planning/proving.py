"""``placer prove``: how far any plan is from the best placement, and a better one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from placer.affinity import count_affinity
from placer.errors import PlacerError, UsageError
from placer.model import require_same_model
from placer.placement.pins import Pin, pinned_kinds
from placer.placement.placement import Placement
from placer.placement.plan import Plan, plan_sha256
from placer.placement.solver_report import SolverReport
from placer.placement.topology import Topology
from placer.planning.planner import plan_for, plan_from_trace
from placer.run.progress import GapLine, gap
from placer.run.session import Session
from placer.solver.caps import Caps
from placer.solver.goal import Goal
from placer.solver.options import SolveOptions
from placer.solver.partition.improved import improved
from placer.solver.partition.layer import LayerProof
from placer.solver.partition.layers import PinsAndGroups
from placer.solver.problem.layer_profile import layer_tokens
from placer.solver.problem.pairs import placement_problem
from placer.solver.problem.traffic import TrafficProblem
from placer.solver.proof.reports import COPIES_NAME, bound_method, copies_bound, status
from placer.solver.search.evaluation import Evaluation
from placer.solver.search.minimise import Found
from placer.trace import Selection, Trace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProvedPlan:
    """What is proved of a plan on the tokens of a trace.

    Prices are copies per token and layer, policy ``fixed`` and exchange ``per-rank``.

    Attributes
    ----------
    plan
        The plan.
    options
        The limits that the bound is of.
    reached, best_reached
        What the plan costs, and the best placement found.
    best
        That placement; the plan's own where nothing better was found.
    bound
        No placement under the limits costs less.
    proofs
        L: the integer program of each layer, or ``None`` where only a relaxation is.
    num_tokens
        Tokens that judge it.
    warnings
        What limits the answer, one sentence each.
    """

    plan: Plan
    options: SolveOptions
    reached: Evaluation
    best_reached: Evaluation
    best: Placement
    bound: float
    proofs: Sequence[LayerProof | None]
    num_tokens: int
    warnings: tuple[str, ...]

    @property
    def gap(self) -> float:
        """By what share a placement can be cheaper than the plan, at most."""
        return gap(self.reached.copies, self.bound)

    @property
    def gain(self) -> float:
        """By what share the best placement found is cheaper than the plan."""
        return gap(self.reached.copies, self.best_reached.copies)

    @property
    def is_optimal(self) -> bool:
        """Whether no placement is cheaper than the plan."""
        return self.reached.copies <= self.bound

    @property
    def num_optimal(self) -> int:
        """Layers whose best placement is found and proved."""
        return sum(one is not None and one.is_optimal for one in self.proofs)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of ``placer prove``."""
        return {
            "status": "optimal" if self.is_optimal else "feasible",
            "objective_name": COPIES_NAME["fixed"],
            "objective": self.reached.copies,
            "bound": min(self.bound, self.reached.copies),
            "gap": self.gap,
            "best_found": self.best_reached.copies,
            "max_imbalance": self.options.goal.caps.load_cap,
            "num_tokens": self.num_tokens,
            "bound_method": bound_method(self.proofs),
            "layers": [_layer_json(one) for one in self.proofs],
        }


def _layer_json(proof: LayerProof | None) -> dict[str, Any] | None:
    if proof is None:
        return None
    return {"bound": proof.bound, "best_found": proof.cost, "columns": proof.num_columns}


def prove_plan(
    path: Path,
    trace: Trace,
    selection: Selection,
    max_imbalance: float | None,
    session: Session,
) -> ProvedPlan:
    """Bound the copies of all placements with the plan's slots, caps and pins.

    Parameters
    ----------
    path
        The plan. Where it is above a cap, the cap is as high as what it has.
    trace, selection
        The tokens that judge it.
    max_imbalance
        The load cap; ``None`` for the plan's own.
    session
        Reports steps, and says when to stop; any stop leaves a valid bound.

    Raises
    ------
    PlacerError
        If a file is damaged, or the plan has redundant experts.
    UsageError
        If plan and trace are of different models.
    """
    plan = Plan.read(path)
    matched = require_same_model(plan.model, str(path), trace.model, str(trace.directory))
    if plan.placement.has_replicas:
        raise PlacerError(
            f"{path} has {plan.placement.redundant_experts} redundant experts: no bound "
            "of traffic is known with replicas",
            f"measure it instead: placer simulate {path} {trace.directory}",
        )
    tokens = trace.read(selection)
    if tokens.num_tokens == 0:
        raise UsageError(f"{trace.directory} has no token of {selection.options}")
    options = _options(plan, max_imbalance)
    found = _found(plan, trace, selection, options, session)
    best, proofs = improved(found, tokens, _pins_and_groups(plan, found), options, session)
    reached, best_reached = found.evaluate(), best.evaluate()
    rounds = options.params.full_proof[1]
    deadline = session.deadline

    def told(step: str, bound: float) -> bool:
        found.line.raise_bound(bound)
        found.line(f"relaxation, {step}", best_reached.copies)
        return not deadline.passed()

    with deadline.interruptible():
        known = [None if one is None else float(one.bound) for one in proofs]
        proved = copies_bound(
            found.problem, tokens, options, rounds=rounds, known=known, told=told
        )
        found.line.raise_bound(None if proved is None else proved.copies)
    return ProvedPlan(
        plan=plan,
        options=options,
        reached=reached,
        best_reached=best_reached,
        best=best.placement,
        bound=found.line.bound or 0.0,
        proofs=proofs,
        num_tokens=tokens.num_tokens,
        warnings=tuple(
            one
            for one in (matched, _other(plan), _looser(plan, max_imbalance))
            if one is not None
        ),
    )


def _other(plan: Plan) -> str | None:
    """Say that the plan was solved for something else."""
    if plan.policy == "fixed" and plan.exchange == "per-rank":
        return None
    return (
        f"the plan is for policy {plan.policy} and exchange {plan.exchange}: the answer is "
        "for fixed and per-rank"
    )


def _looser(plan: Plan, max_imbalance: float | None) -> str | None:
    """Say that the plan was solved under lower caps, one for each layer."""
    caps = plan.solver.eplb_caps
    if caps is None or max_imbalance is not None:
        return None
    return (
        f"the plan's own load cap is EPLB's load in each layer ({min(caps):.3f} to "
        f"{max(caps):.3f} times the mean). The answer is for the looser cap "
        f"{plan.max_imbalance:g}: a placement that sends less may have a busier rank"
    )


def _options(plan: Plan, max_imbalance: float | None) -> SolveOptions:
    """Return the limits of a plan, as a solve asks for them."""
    placed, recorded = plan.placement, plan.provenance
    caps = Caps(
        max_imbalance=plan.max_imbalance if max_imbalance is None else max_imbalance,
        max_received_copies=recorded.get("max_received_copies"),
        relax=True,
    )
    topology = Topology(num_nodes=placed.num_nodes, gpus_per_node=placed.ranks_per_node)
    return SolveOptions(topology=topology, goal=Goal(caps=caps), proof="full")


def _found(
    plan: Plan,
    trace: Trace,
    selection: Selection,
    options: SolveOptions,
    session: Session,
) -> Found:
    """Return the plan as if a search had ended there."""
    placed, caps = plan.placement, options.goal.caps
    affinity = count_affinity(trace.chunks(selection), trace.model, {})
    most = [caps.most_load(float(one.sum()), placed.num_ranks) for one in affinity.load]
    ranks = [placed.expert_rank(layer) for layer in range(placed.num_layers)]
    problem = placement_problem(affinity, "fixed", options.topology, most).admitting(ranks)
    pins = [Pin.parse(pin) for pin in plan.provenance.get("pins") or ()]
    traffic = TrafficProblem(
        experts=layer_tokens(trace.read(selection)),
        topology=options.topology,
        policy="fixed",
        load=tuple(one[None] for one in problem.load),
        max_load=tuple(np.array([cap]) for cap in problem.max_load),
        kind=pinned_kinds(None, placed.num_experts, pins),
        caps=caps,
    )
    line = GapLine(tell=session.progress, num_decimals=4)
    return Found(
        placement=placed, optimal=False, problem=problem, traffic=traffic, line=line
    )


def _pins_and_groups(plan: Plan, found: Found) -> PinsAndGroups:
    preserves = bool(plan.provenance.get("preserve_groups"))
    kind = found.traffic.kind
    return PinsAndGroups(
        n_group=plan.model.n_group if preserves else 1,
        pinned=None if kind is None else tuple(one < 0 for one in kind),
    )


def better_plan(
    proved: ProvedPlan, path: Path, trace: Trace, selection: Selection, session: Session
) -> Plan:
    """Return the best placement found as a plan, judged as a solved one is."""
    cost = proved.best_reached.copies
    report = SolverReport(
        status=status(cost, proved.bound),
        termination=session.deadline.termination(proved=cost <= proved.bound),
        objective_name=COPIES_NAME["fixed"],
        objective=round(cost, 6),
        bound=min(proved.bound, round(cost, 6)),
        gap=gap(cost, proved.bound),
        bound_method=bound_method(proved.proofs),
        seconds=None,
        seed=session.seed,
        reproducible=session.deadline.reproducible,
        relaxed_layers=_missed(proved),
        most_received_copies=float(proved.best_reached.most_received_copies.max()),
    )
    made = plan_from_trace(
        trace,
        proved.options,
        selection,
        Session(seed=session.seed),
        solved=(proved.best, report),
    )
    kept = {n: one for n, one in proved.plan.provenance.items() if n in _KEPT}
    return plan_for(made, {**kept, "proved_plan_sha256": plan_sha256(path)})


_KEPT = ("engine", "pins", "preserve_groups", "ignore_groups")


def _missed(proved: ProvedPlan) -> dict[str, float]:
    imbalance = proved.best_reached.imbalance
    missed = proved.options.goal.caps.missed_load(dict(enumerate(imbalance)))
    return {str(layer): value for layer, value in missed.items()}

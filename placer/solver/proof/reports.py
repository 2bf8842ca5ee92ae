"""The objective of a placement, and bounds that prove how far it is from the best."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from placer.arrays import IntArray
from placer.placement.placement import Placement
from placer.placement.solver_report import Certificate
from placer.run.progress import GapLine, gap
from placer.run.session import Session
from placer.solver.options import SolveOptions
from placer.solver.partition.layer import METHOD as PARTITION_METHOD
from placer.solver.partition.layer import LayerProof
from placer.solver.problem.pairs import PlacementProblem
from placer.solver.problem.traffic import TrafficProblem, copy_prices
from placer.solver.proof.bounds import pair_bound
from placer.solver.proof.certificate import PairCertificate
from placer.solver.proof.copies import FIRST_STEPS, CopiesCertificate, token_sets
from placer.solver.proof.copies import METHOD as COPIES_METHOD
from placer.solver.search.dynamic import METHOD as EXACT_METHOD
from placer.solver.search.evaluation import Evaluation
from placer.trace import Chunk

COPIES_NAME = {
    "fixed": "price of the copies sent, per token and layer",
    "follow": "price of the copies sent and returned, per token and layer",
    "token": "price of the copies sent from the homes that tables of other sequences "
    "give, per token and layer",
    "request": "price of the copies sent from the homes that tables of other sequences "
    "give, per token and layer",
}
ALIKE_METHOD = "one expert per token: every placement sends as many"
_QUICK_EXPERTS = 4096
# What proves a bound in under a second, before the search: arcs of b-matchings; experts and
# (token, layer) rows of the relaxation, and its steps.
_EARLY_ARCS = 1 << 20
_EARLY_EXPERTS, _EARLY_ROWS = 2048, 1 << 20
_EARLY_STEPS = 5
# The proof of pairs tells its bound, and stops when time is up, each time it took so many.
_STEPS_PER_LOOK = 20


def pair_report(
    problem: PlacementProblem,
    placement: Placement,
    options: SolveOptions,
    session: Session,
) -> dict[str, Any]:
    """Return the fields of ``SolverReport`` that say what pairs cost."""
    found = _pair_certificate(problem, placement, options, session)
    if found is None:
        return {
            "status": "feasible",
            "objective_name": problem.objective_name,
            "objective": problem.objective(_ranks(placement)),
            "bound": None,
            "gap": None,
            "bound_method": "none: stopped before the pairs were proved",
        }
    return found.to_json() | {"status": status(found.objective, found.bound)}


def copies_report(
    problem: PlacementProblem,
    traffic: TrafficProblem,
    judged: Chunk,
    placement: Placement,
    reached: Evaluation,
    optimal: bool,
    proofs: Sequence[LayerProof | None],
    options: SolveOptions,
    line: GapLine,
    session: Session,
) -> dict[str, Any]:
    """Return the fields of ``SolverReport`` that say what copies of ``judged`` cost.

    Proofs stop at the session's deadline: any stop certifies. ``line`` gets their
    bounds, and knows a bound where it got one before; of a plan that was stopped it is
    kept. ``reached`` is what the placement costs, ``proofs`` what is proved of its layers.
    """
    deadline, objective = session.deadline, round(reached.copies, 6)
    report: dict[str, Any] = {
        "status": "optimal" if optimal else "feasible",
        "objective_name": COPIES_NAME[options.goal.policy],
        "objective": objective,
        "bound": objective,
        "gap": 0.0,
        "bound_method": EXACT_METHOD if problem.has_pairs else ALIKE_METHOD,
        "most_received_copies": round(float(reached.most_received_copies.max()), 6),
    }
    if optimal:
        return report
    if options.goal.redundant_experts:
        why = "none: no bound is valid with replicas"
        return report | {"bound": None, "gap": None, "bound_method": why}
    problem = problem.admitting(_ranks(placement))
    pairs = _pair_certificate(problem, placement, options, session)
    bound = None

    def told(step: str, found: float) -> bool:
        line.raise_bound(found)
        line(f"proof of the copies, {step}", objective)
        return not deadline.passed()

    rounds = _steps(problem, options)[1]
    known = [None if one is None else float(one.bound) for one in proofs]
    with deadline.interruptible():
        if (rounds or None not in known) and not deadline.passed():
            found = copies_bound(
                problem, judged, options, rounds=rounds, known=known, told=told
            )
            bound = None if found is None else found.copies
            if found is not None and found.ranks is not None:
                report["layer_gaps"] = _layer_gaps(placement, judged, found.ranks)
    if rounds and deadline.stopped:
        bound = line.bound
    if bound is None:
        why = "none: no bound of the copies of this policy and exchange was computed"
        if rounds and deadline.stopped and _has_copies_bound(options):
            why = "none: stopped before the copies were proved"
        return report | {"bound": None, "gap": None, "bound_method": why, "pairs": pairs}
    proved = status(reached.copies, bound)  # rounding proves nothing
    if proved == "optimal":
        bound = objective
    return report | {
        "status": proved,
        "bound": bound,
        "gap": gap(objective, bound),
        "bound_method": bound_method(proofs),
        "pairs": pairs,
    }


def bound_method(proofs: Sequence[LayerProof | None]) -> str:
    """Say how the copies were bounded."""
    proved = [one for one in proofs if one is not None]
    if not proved:
        return COPIES_METHOD
    optimal = sum(one.is_optimal for one in proved)
    said = f"{PARTITION_METHOD}: {optimal} of {len(proofs)} layers proved optimal"
    return said if len(proved) == len(proofs) else f"{said}; else {COPIES_METHOD}"


def content_report(
    options: SolveOptions, cost: Evaluation, sample: int | None
) -> dict[str, Any]:
    """Return the same fields for homes that tables give, which have no bound.

    ``sample`` is the number of tokens where the clock left time for few; else ``None``.
    """
    of_few = "" if sample is None else f", on a sample of {sample:,} tokens"
    return {
        "status": "feasible",
        "objective_name": COPIES_NAME[options.goal.policy] + of_few,
        "objective": round(cost.copies, 6),
        "bound": None,
        "gap": None,
        "bound_method": "none: copies have no bound if homes depend on the placement",
    }


def early_pair_bound(problem: PlacementProblem) -> float | None:
    """Return a bound of the pairs before any search, if it is fast."""
    arcs = sum(one.size for one in (*problem.within, *(problem.between or ())))
    return pair_bound(problem) if arcs <= _EARLY_ARCS else None


def early_copies_bound(
    problem: PlacementProblem, judged: Chunk, options: SolveOptions
) -> float | None:
    """Return a bound of the price of copies before any search, if it is fast.

    ``None`` too where what is placed may break the problem's caps, or has replicas.
    """
    rows = judged.num_tokens * problem.num_layers
    large = _num_experts(problem) > _EARLY_EXPERTS or rows > _EARLY_ROWS
    goal = options.goal
    if large or goal.redundant_experts or goal.content_policy or options.start.constrains:
        return None
    found = copies_bound(problem, judged, options, rounds=0, first_steps=_EARLY_STEPS)
    return None if found is None else found.copies


def _layer_gaps(
    placement: Placement, judged: Chunk, bounds: Sequence[float]
) -> tuple[float, ...]:
    """Return ``[L]``: the share of the (token, rank) pairs above ``bounds``, rounded up.

    Each pair counts once. Only a layer that reaches its bound has 0.
    """
    served = []
    for layer, ids in enumerate(judged.experts):
        ranks = np.sort(placement.expert_rank(layer)[ids], axis=1)
        served.append(len(ranks) + int((np.diff(ranks, axis=1) != 0).sum()))
    gaps = (gap(number, bound) for number, bound in zip(served, bounds, strict=True))
    return tuple(math.ceil(one * 10**6) / 10**6 for one in gaps)


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiesBound:
    """What no placement under the same limits is below.

    Attributes
    ----------
    copies
        Price of the copies, per token and layer.
    ranks
        L: ranks that serve a layer's tokens, over all tokens; ``None`` where homes are not
        fixed, or not one copy is sent to each rank.
    """

    copies: float
    ranks: Sequence[float] | None


def _pair_certificate(
    problem: PlacementProblem,
    placement: Placement,
    options: SolveOptions,
    session: Session,
) -> Certificate | None:
    """Return what is proved of the pairs; ``None`` where there is no time to begin."""
    deadline = session.deadline
    if deadline.left() == 0.0:
        return None
    objective = problem.objective(_ranks(placement))
    certificate = PairCertificate(problem)
    line = GapLine(tell=session.progress, num_decimals=0, bound=certificate.bound)
    steps = _steps(problem, options)[0]
    looks = range(_STEPS_PER_LOOK, steps + 1, _STEPS_PER_LOOK)
    with deadline.interruptible():
        for done in looks:
            if certificate.bound >= objective or deadline.passed():
                break
            line.raise_bound(certificate.improve(_STEPS_PER_LOOK))
            line(f"proof of the pairs, step {done} of {steps}", objective)
    return Certificate(
        objective_name=problem.objective_name,
        objective=objective,
        bound=certificate.bound,
        gap=gap(objective, certificate.bound),
        bound_method=certificate.method,
    )


def copies_bound(
    problem: PlacementProblem,
    judged: Chunk,
    options: SolveOptions,
    *,
    rounds: int,
    first_steps: int = FIRST_STEPS,
    known: Sequence[float | None] | None = None,
    told: Callable[[str, float], bool] | None = None,
) -> CopiesBound | None:
    """Return a bound of the price of copies, if there is one.

    ``known`` are bounds of the ranks that serve a layer's tokens, which are proved
    already. ``told`` takes what was done and the bound so far, and says whether to go on.
    """
    topology, exchange = options.topology, options.goal.counted
    if not _has_copies_bound(options):
        return None
    sets = token_sets([judged])
    scale = topology.num_ranks * judged.num_tokens * problem.num_layers
    policy = options.start_policies(judged.experts[0].shape[1])[0]

    def of_groups(
        num_groups: int, known: Sequence[float | None] | None = None
    ) -> CopiesCertificate:
        width = topology.num_ranks // num_groups
        caps = [width * cap for cap in problem.max_load]
        return CopiesCertificate(sets, problem.load, caps, num_groups, known)

    ranks, nodes = of_groups(topology.num_ranks, known), None
    if exchange == "per-node" and topology.num_nodes > 1:
        nodes = of_groups(topology.num_nodes)

    def bound() -> float:
        if exchange == "per-rank":
            return ranks.cost_bound(policy, topology) / scale
        to_rank, to_node = copy_prices(topology, "per-node")
        price = float(to_rank[-1].min()) * sum(ranks.bounds)
        crossing = 0.0 if nodes is None else sum(nodes.bounds)
        return (price + float(to_node[-1].min()) * crossing) / scale

    for certificate, what in ((ranks, "ranks"), (nodes, "nodes")):
        if certificate is None:
            continue

        def goes_on(done: int, what: str = what) -> bool:
            step = f"{what}, layer {done} of {problem.num_layers}"
            return told is None or told(step, bound())

        certificate.improve(rounds, first_steps, goes_on)
    by_layer = ranks.bounds if options.pays_for_ranks else None
    return CopiesBound(copies=bound(), ranks=by_layer)


def _has_copies_bound(options: SolveOptions) -> bool:
    """Return whether there is a bound of the copies of this policy and exchange."""
    return options.goal.counted == "per-rank" or options.goal.policy == "fixed"


def _steps(problem: PlacementProblem, options: SolveOptions) -> tuple[int, ...]:
    """Return the steps of the pair certificate, and the rounds of that of copies.

    A quick proof is left out where it would not be quick.
    """
    if options.proof == "full":
        return options.params.full_proof
    large = _num_experts(problem) > _QUICK_EXPERTS
    return (0, 0) if large or options.proof == "none" else options.params.quick_proof


def status(objective: float, bound: float) -> Literal["optimal", "feasible"]:
    """Return what a bound proves of an objective."""
    return "optimal" if objective <= bound else "feasible"


def _ranks(placement: Placement) -> list[IntArray]:
    return [placement.expert_rank(layer) for layer in range(placement.num_layers)]


def _num_experts(problem: PlacementProblem) -> int:
    return sum(len(load) for load in problem.load)

"""What a placement reaches, and the bounds that prove how far from the best it can be."""

from dataclasses import asdict
from typing import Any, Literal

from placer.plan.alternation import Alternation
from placer.plan.certificate import PairCertificate
from placer.plan.copies import METHOD as COPIES_METHOD
from placer.plan.copies import CopiesCertificate, token_sets
from placer.plan.dynamic import METHOD as EXACT_METHOD
from placer.plan.options import Proof, SolveOptions
from placer.plan.placement import Placement
from placer.plan.plan import Certificate
from placer.plan.problem import IntArray, PlacementProblem
from placer.plan.refine import Refinement, TrafficProblem, copy_prices
from placer.trace import Chunk

COPIES_NAME = {
    "fixed": "price of the copies sent, per token and layer",
    "follow": "price of the copies sent and returned, per token and layer",
    "token": "price of the copies sent from the homes that tables of other sequences give, "
    "per token and layer",
    "request": "price of the copies sent from the homes that tables of other sequences "
    "give, per token and layer",
}
# Steps of the pair certificate and rounds of the copies certificate.
_PROOF_STEPS: dict[Proof, tuple[int, int]] = {
    "none": (0, 0),
    "quick": (40, 20),
    "full": (300, 200),
}
_QUICK_EXPERTS = 4096


def pair_report(
    problem: PlacementProblem, placement: Placement, options: SolveOptions
) -> dict[str, Any]:
    """Return the fields of ``SolverReport`` that say what pairs cost."""
    found = _pair_certificate(problem, placement, options.proof)
    return asdict(found) | {"status": status(found.objective, found.bound)}


def copies_report(
    problem: PlacementProblem,
    traffic: TrafficProblem,
    judged: Chunk,
    placement: Placement,
    optimal: bool,
    options: SolveOptions,
) -> dict[str, Any]:
    """Return the fields of ``SolverReport`` that say what copies of ``judged`` cost."""
    reached = Refinement(problem=traffic, limits=options.refine).evaluate(placement)
    objective = round(reached.copies, 6)
    report: dict[str, Any] = {
        "status": "optimal" if optimal else "feasible",
        "objective_name": COPIES_NAME[options.policy],
        "objective": objective,
        "bound": objective,
        "gap": 0.0,
        "bound_method": EXACT_METHOD,
    }
    if optimal:
        return report
    if options.redundant_experts:
        why = "none: replicas void the bounds"
        return report | {"bound": None, "gap": None, "bound_method": why}
    problem = problem.admitting(_ranks(placement))
    pairs = _pair_certificate(problem, placement, options.proof)
    bound = _copies_bound(problem, judged, options)
    if bound is None:
        why = "none: no bound of the copies of this policy and exchange was computed"
        return report | {"bound": None, "gap": None, "bound_method": why, "pairs": pairs}
    return report | {
        "status": status(reached.copies, bound),  # rounding proves nothing
        "bound": bound,
        "gap": gap(objective, bound),
        "bound_method": COPIES_METHOD,
        "pairs": pairs,
    }


def content_report(content: Alternation, placement: Placement) -> dict[str, Any]:
    """Return the same fields for homes that tables give, which have no bound."""
    return {
        "status": "feasible",
        "objective_name": COPIES_NAME[content.policy],
        "objective": round(content.price(placement), 6),
        "bound": None,
        "gap": None,
        "bound_method": "none: no bound of copies whose homes depend on the placement",
    }


def _pair_certificate(
    problem: PlacementProblem, placement: Placement, proof: Proof
) -> Certificate:
    objective = problem.objective(_ranks(placement))
    certificate = PairCertificate(problem)
    if (steps := _steps(problem, proof)[0]) and certificate.bound < objective:
        certificate.improve(steps)
    return Certificate(
        objective_name=problem.objective_name,
        objective=objective,
        bound=certificate.bound,
        gap=gap(objective, certificate.bound),
        bound_method=certificate.method,
    )


def _copies_bound(
    problem: PlacementProblem, judged: Chunk, options: SolveOptions
) -> float | None:
    """Return a bound of the price of copies, per token and layer, if there is one."""
    topology = options.topology
    rounds = _steps(problem, options.proof)[1]
    if not rounds or (options.exchange == "per-node" and options.policy != "fixed"):
        return None
    sets = token_sets([judged])

    def visited(num_groups: int) -> CopiesCertificate:
        width = topology.num_ranks // num_groups
        caps = [width * cap for cap in problem.max_load]
        found = CopiesCertificate(sets, problem.load, caps, num_groups)
        found.improve(rounds)
        return found

    ranks = visited(topology.num_ranks)
    scale = topology.num_ranks * judged.num_tokens * problem.num_layers
    if options.exchange == "per-rank":
        policy = options.start_policy(judged.experts[0].shape[1])
        return ranks.cost_bound(policy, topology) / scale
    to_rank, to_node = copy_prices(topology, "per-node")
    nodes = sum(visited(topology.num_nodes).bounds) if topology.num_nodes > 1 else 0.0
    price = float(to_rank[-1].min()) * sum(ranks.bounds)
    return (price + float(to_node[-1].min()) * nodes) / scale


def _steps(problem: PlacementProblem, proof: Proof) -> tuple[int, int]:
    """Return the work of a proof; a quick one is left out where it would not be quick."""
    large = sum(len(load) for load in problem.load) > _QUICK_EXPERTS
    return (0, 0) if large and proof == "quick" else _PROOF_STEPS[proof]


def status(objective: float, bound: float) -> Literal["optimal", "feasible"]:
    """Return what a bound proves of an objective."""
    return "optimal" if objective <= bound else "feasible"


def _ranks(placement: Placement) -> list[IntArray]:
    return [placement.expert_rank(layer) for layer in range(placement.num_layers)]


def gap(objective: float, bound: float) -> float:
    """Return ``(objective - bound) / objective``, 0 where nothing is to be gained."""
    return max(0.0, (objective - bound) / objective) if objective > 0 else 0.0

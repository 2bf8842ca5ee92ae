"""Solving: from affinity to a placement with a proved gap."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from placer.affinity import Affinity
from placer.errors import UsageError
from placer.plan.balance import load_caps
from placer.plan.bounds import METHOD, pair_bound
from placer.plan.placement import Placement
from placer.plan.plan import Policy, SolverReport
from placer.plan.problem import IntArray, PlacementProblem, Topology, placement_problem
from placer.plan.search import Search, SearchLimits

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveOptions:
    """What to solve for.

    Attributes
    ----------
    topology
        Ranks, nodes and costs.
    policy
        Home policy: ``fixed`` or ``follow``.
    max_imbalance
        Cap on max/mean rank load in every layer.
    relax_cap
        Take the best reachable cap in layers where ``max_imbalance`` is out of reach.
    seed
        Seed of the search.
    limits
        How long to search.
    """

    topology: Topology
    policy: Policy = "fixed"
    max_imbalance: float = 1.10
    relax_cap: bool = False
    seed: int = 0
    limits: SearchLimits = field(default_factory=SearchLimits)

    def __post_init__(self) -> None:
        if self.policy not in ("fixed", "follow"):
            raise UsageError(
                f"--policy {self.policy} cannot be solved for", "choose fixed or follow"
            )
        if self.seed < 0:
            raise UsageError(f"--seed must not be negative, got {self.seed}")


def solve(
    affinity: Affinity, options: SolveOptions, progress: Progress | None = None
) -> tuple[Placement, SolverReport]:
    """Place the experts of every layer.

    Parameters
    ----------
    affinity
        Counts of the profile.
    options
        What to solve for.
    progress
        Told one line per step of the search.

    Raises
    ------
    NoSolutionError
        If a layer cannot meet the load cap and ``relax_cap`` is false.
    UsageError
        If slots do not divide over the ranks.
    """
    began = time.monotonic()
    topology = options.topology
    loads = [counts.astype(np.float64) for counts in affinity.load]
    caps, start, relaxed = load_caps(
        loads, topology.num_ranks, options.max_imbalance, relax_cap=options.relax_cap
    )
    problem = placement_problem(affinity, options.policy, topology, caps)
    bound = pair_bound(problem)
    search = Search(
        problem=problem,
        expert_rank=_best_start(problem, start),
        rng=np.random.default_rng(options.seed),
        limits=options.limits,
    )
    objective = search.run(
        None
        if progress is None
        else lambda number, value: progress(
            f"round {number}: objective {value:.0f}, bound {bound:.0f}, "
            f"gap {_gap(value, bound):.1%}"
        )
    )
    report = SolverReport(
        status="optimal" if objective <= bound else "feasible",
        objective_name=problem.objective_name,
        objective=objective,
        bound=bound,
        gap=_gap(objective, bound),
        bound_method=METHOD,
        seconds=time.monotonic() - began,
        seed=options.seed,
        relaxed_layers={str(layer): value for layer, value in relaxed.items()},
    )
    placement = Placement.from_expert_rank(
        search.expert_rank, topology.num_ranks, topology.num_nodes
    )
    return placement, report


def _best_start(problem: PlacementProblem, balanced: list[IntArray]) -> list[IntArray]:
    """Start from the contiguous placement where it is allowed and cheaper.

    The search never loses what it starts from, so no plan is worse than contiguous on
    the profile's own objective unless contiguous breaks the cap.
    """
    contiguous = [
        np.arange(len(load)) // problem.slots_per_rank(layer)
        for layer, load in enumerate(problem.load)
    ]
    allowed = problem.is_feasible(contiguous)
    if allowed and problem.objective(contiguous) < problem.objective(balanced):
        return contiguous
    return [ranks.copy() for ranks in balanced]


def _gap(objective: float, bound: float) -> float:
    return (objective - bound) / objective if objective > 0 else 0.0

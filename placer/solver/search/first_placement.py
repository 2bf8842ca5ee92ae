"""The start of the search over copies: the profile, and a placement solved for pairs.

Pairs are solved exactly where a layer has few balanced assignments, else by local search;
a given plan and whole router groups take their place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from placer.affinity import Affinity
from placer.arrays import IntArray
from placer.errors import NoSolutionError, UsageError
from placer.placement.imbalance import imbalance
from placer.placement.migration import require_same_shape
from placer.placement.placement import Placement
from placer.placement.policy import Policy
from placer.placement.topology import Topology
from placer.run.deadline import Deadline
from placer.run.progress import GapLine
from placer.run.session import Session
from placer.solver.balance.eplb import pack_loads
from placer.solver.balance.layer_balance import Balancing
from placer.solver.balance.load_balance import balance_loads
from placer.solver.balance.load_caps import load_caps
from placer.solver.balance.replicas import require_room, with_replicas
from placer.solver.balance.router_groups import blocks_of_groups, place_groups
from placer.solver.options import SolveOptions
from placer.solver.problem.pairs import PlacementProblem, placement_problem, rank_load
from placer.solver.problem.traffic import sample_sequences
from placer.solver.proof.reports import early_pair_bound
from placer.solver.search.copies_cost import CopiesCost, ReceiveLimit
from placer.solver.search.dynamic import ExactPlacement, has_few_assignments, solve_exactly
from placer.solver.search.pair_search import Search
from placer.trace import Chunk

_OPERATIONS_PER_SECOND = 2e9  # of a slow machine, where there is a time limit


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Profile:
    """The traffic of a profile, and the load caps that follow from it.

    Attributes
    ----------
    affinity, tokens
        Counts of the profile, and its tokens where there are some.
    judged
        The tokens, or a sample, whose copies are minimised; ``None`` where pairs are.
    max_load
        ``[L]``: pairs that a rank may serve in each layer.
    balanced
        L arrays ``[E]`` int64: ranks of the experts, a start under these caps; empty where
        the experts do not divide over the ranks.
    by_load
        A placement by the same loads with the same slots, where replicas may have to
        relieve a rank, or no rank may be busier; else ``None``. It is EPLB's, or where
        router groups stay whole, their most even one.
    """

    affinity: Affinity
    tokens: Chunk | None
    judged: Chunk | None
    max_load: list[float]
    balanced: list[IntArray]
    by_load: Placement | None = None

    def imbalance(self, max_load: Sequence[float], num_ranks: int) -> tuple[float, ...]:
        """Return ``[L]``: max/mean of a rank that has the load of these caps."""
        return tuple(
            float(cap * num_ranks / load.sum()) if load.any() else 1.0
            for cap, load in zip(max_load, self.affinity.load, strict=True)
        )

    @property
    def is_uneven(self) -> bool:
        """Whether the experts of a layer fill the ranks evenly only with replicas."""
        return any(len(ranks) == 0 for ranks in self.balanced)

    def problem(self, policy: Policy, options: SolveOptions) -> PlacementProblem:
        """Return the pair objective of a home policy under these caps."""
        return placement_problem(self.affinity, policy, options.topology, self.max_load)


def profiled(
    affinity: Affinity, tokens: Chunk | None, options: SolveOptions, session: Session
) -> tuple[Profile, dict[int, float]]:
    """Return the profile, and the loads reached in layers whose load cap is relaxed.

    Raises
    ------
    NoSolutionError
        If a cap is out of reach and may not be relaxed.
    UsageError
        If an option needs sweeps and there are none.
    """
    loads = [counts.astype(np.float64) for counts in affinity.load]
    topology, goal = options.topology, options.goal
    redundant_experts = goal.redundant_experts
    by_load, at_most = None, None
    if goal.caps.below_eplb or redundant_experts:
        require_room(affinity.model.num_experts, topology.num_ranks, redundant_experts)
        by_load = (
            _balanced_copies(affinity, options, session.deadline)
            if options.start.preserve_groups
            else pack_loads(loads, topology, redundant_experts)
        )
        if not redundant_experts:
            ranks = map(by_load.expert_rank, range(by_load.num_layers))
            at_most = [
                imbalance(rank_load(ranks_of_layer, load, topology.num_ranks))
                for ranks_of_layer, load in zip(ranks, loads, strict=True)
            ]
    max_load, balanced, relaxed = load_caps(
        loads, options, session.deadline, at_most, session.tell
    )
    if options.needs_tokens is not None and not options.params.num_sweeps:
        raise UsageError(
            f"{options.needs_tokens} needs sweeps, but --num-sweeps is 0",
            "leave out --num-sweeps",
        )
    judged = None
    if tokens is not None and options.params.num_sweeps:
        judged = sample_sequences(tokens, options.params.num_tokens, session.seed)
    profile = Profile(
        affinity=affinity,
        tokens=tokens,
        judged=judged,
        max_load=max_load,
        balanced=balanced,
        by_load=by_load,
    )
    return profile, relaxed


def first_placement(
    profile: Profile,
    problem: PlacementProblem,
    options: SolveOptions,
    session: Session,
) -> tuple[Placement, bool]:
    """Return the placement to begin with, and whether it is already optimal.

    Raises
    ------
    UsageError
        If the plan to start from has another shape, or slots do not divide over the ranks.
    NoSolutionError
        If no placement is under the cap on received copies, where that is proved.
    """
    topology, start = options.topology, options.start
    redundant_experts = options.goal.redundant_experts
    if start.placement is not None:
        require_same_shape(
            start.placement,
            profile.affinity.model.num_experts,
            topology.num_ranks,
            topology.num_nodes,
            redundant_experts,
        )
        return start.pinned(start.placement), False
    if start.preserve_groups:
        placed = profile.by_load or place_groups(profile.affinity, options, session)
        return placed, False
    if redundant_experts and profile.is_uneven:
        copied = _balanced_copies(profile.affinity, options, session.deadline)
        return start.pinned(copied), False
    placement, optimal = _place_pairs(profile, problem, options, session)
    if redundant_experts:
        loads = [counts.astype(np.float64) for counts in profile.affinity.load]
        placement = with_replicas(placement, loads, redundant_experts)
    return start.pinned(placement), optimal


def _balanced_copies(
    affinity: Affinity, options: SolveOptions, deadline: Deadline
) -> Placement:
    """Return a balanced start, where copies cannot be added to a placement without them."""
    whole = options.start.preserve_groups
    blocks = blocks_of_groups(affinity.model, options) if whole else 1
    asked = Balancing.of(options, affinity.model, blocks)
    loads = [counts.astype(np.float64) for counts in affinity.load]
    return balance_loads(loads, asked, deadline).placement


def _place_pairs(
    profile: Profile,
    problem: PlacementProblem,
    options: SolveOptions,
    session: Session,
) -> tuple[Placement, bool]:
    """Minimise pairs, or copies where that is exact. Return whether it is optimal."""
    is_plain = options.needs_tokens is None and options.topology.cost is None
    if is_plain and not problem.has_pairs:
        return _placed(profile.balanced, options.topology), True
    exact = None
    left = session.deadline.left()
    most = options.params.exact_operations
    if left is not None:
        most = min(most, left * _OPERATIONS_PER_SECOND)
    if profile.judged is None:
        exact = solve_exactly(problem, max_operations=most)
    elif has_few_assignments(problem):
        exact = _exact_copies(problem, profile.judged, options, most)
    if exact is not None:
        return _placed(list(exact.expert_rank), options.topology), True
    search = Search(
        problem=problem,
        expert_rank=_best_start(problem, profile.balanced),
        rng=np.random.default_rng(session.seed),
        params=options.params,
    )
    line = GapLine(tell=session.progress, num_decimals=0)
    if session.progress is not None:
        line.raise_bound(early_pair_bound(problem))
    search.run(
        lambda number, objective: line(
            f"pairs, round {number + 1} of {options.params.num_rounds + 1}", objective
        ),
        session.deadline,
    )
    return _placed(search.expert_rank, options.topology), False


def _exact_copies(
    problem: PlacementProblem, judged: Chunk, options: SolveOptions, max_operations: float
) -> ExactPlacement | None:
    """Minimise copies exactly, where few assignments and nothing else asked allow it."""
    goal = options.goal
    cap = goal.caps.max_received_copies
    without = replace(goal, caps=goal.caps.without_received)
    if replace(options, goal=without).needs_tokens is not None:
        return None
    policy = options.start_policies(judged.experts[0].shape[1])[0]
    cost = CopiesCost.of([judged], policy, options.topology)
    limit = None if cap is None else ReceiveLimit(cost=cost, max_copies=cap)
    try:
        return solve_exactly(problem, cost, None, max_operations, limit)
    except NoSolutionError:
        if goal.caps.relax:  # the search then comes as near to the cap as it can
            return None
        raise


def _placed(expert_rank: list[IntArray], topology: Topology) -> Placement:
    return Placement.from_expert_rank(expert_rank, topology.num_ranks, topology.num_nodes)


def _best_start(problem: PlacementProblem, balanced: list[IntArray]) -> list[IntArray]:
    """Start from the contiguous placement where it is allowed and cheaper.

    The search never loses what it starts from, so no plan is worse than contiguous on
    the profile's own pairs unless contiguous breaks the cap.
    """
    contiguous = [
        np.arange(len(load)) // problem.slots_per_rank(layer)
        for layer, load in enumerate(problem.load)
    ]
    allowed = problem.is_feasible(contiguous)
    if allowed and problem.objective(contiguous) < problem.objective(balanced):
        return contiguous
    return [ranks.copy() for ranks in balanced]

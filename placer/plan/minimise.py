"""Minimising copies: from pairs, for tables that follow from the placement, for draws."""

from dataclasses import dataclass, replace

import numpy as np

from placer.plan.alternation import Alternation, vocabulary_of
from placer.plan.deadline import Deadline
from placer.plan.evaluation import Evaluation, Rated
from placer.plan.first_placement import Profile, first_placement
from placer.plan.layer_profile import layer_tokens
from placer.plan.migration import move_prices
from placer.plan.options import OVERFLOW_PRICE, SolveOptions
from placer.plan.pins import pinned_kinds, with_pins
from placer.plan.placement import Placement
from placer.plan.plan import ContentPolicy, Policy
from placer.plan.problem import FloatArray, PlacementProblem
from placer.plan.progress import GapLine, Progress
from placer.plan.refine import Refinement
from placer.plan.replicas import with_replicas
from placer.plan.reports import early_copies_bound
from placer.plan.router_groups import group_kinds
from placer.plan.scenarios import load_scenarios
from placer.plan.traffic import TrafficProblem
from placer.trace import Chunk

# Of one placement after another, where SGLang draws.
_CAUTION_OF_DRAWS = (1.0, 0.5, 0.25, 0.12, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """A placement, what it minimises, and the line that tells how far it is.

    Attributes
    ----------
    placement
        Experts in slots.
    optimal
        Whether it is so, proved.
    problem, traffic
        The pairs and the copies that are minimised.
    line
        Knows a bound of the copies where one was told.
    """

    placement: Placement
    optimal: bool
    problem: PlacementProblem
    traffic: TrafficProblem
    line: GapLine

    def evaluate(self, options: SolveOptions) -> Evaluation:
        """Return what the placement costs on the tokens that it was judged by."""
        problem = Refinement(problem=self.traffic, limits=options.refine)
        return problem.evaluate(self.placement)


def minimised(
    profile: Profile,
    judged: Chunk,
    options: SolveOptions,
    progress: Progress | None,
    deadline: Deadline,
) -> tuple[Found, Evaluation | None]:
    """Minimise copies, for homes that tables give where these are what is asked for.

    The second value is what the copies cost from those homes, which no other policy has.
    """
    content = options.content_policy
    if content is not None:
        return _minimised_for_tables(content, profile, judged, options, progress, deadline)
    (policy,) = options.start_policies(profile.affinity.model.top_k)
    minimise = _minimised_as_drawn if options.has_draws else _minimised
    return minimise(profile, judged, policy, options, progress, deadline), None


def _minimised_for_tables(
    content: ContentPolicy,
    profile: Profile,
    judged: Chunk,
    options: SolveOptions,
    progress: Progress | None,
    deadline: Deadline,
) -> tuple[Found, Evaluation]:
    """Alternate homes and placement from each start; the best of all and mixed."""
    vocab_size = vocabulary_of(judged, content)

    def alternated(policy: Policy) -> tuple[Found, Alternation, Rated]:
        minimise = _minimised_carefully if content == "token" else _minimised
        found = minimise(profile, judged, policy, options, progress, deadline)
        alternation = Alternation(
            traffic=found.traffic,
            tokens=judged,
            policy=content,
            vocab_size=vocab_size,
            limits=options.refine,
            seed=options.seed,
            max_home_imbalance=options.max_home_imbalance,
        )
        return (
            found,
            alternation,
            _alternate(found.placement, alternation, progress, deadline),
        )

    first, *others = options.start_policies(profile.affinity.model.top_k)
    found, alternation, end = alternated(first)
    ends = [end]
    if options.start is not None:
        # What is best for the first homes may be worse for those of a table.
        ends.append(alternation.rated(with_pins(options.start, options.pins)))
    for policy in others:
        if not deadline.passed():
            ends.append(alternated(policy)[2])
        if not deadline.passed():
            with deadline.interruptible():
                ends.append(alternation.mixture(ends[0], ends[-1], deadline))
    best = ends[0]
    for end in ends[1:]:
        if end.cost.is_better(best.cost):
            best = end
    return replace(found, placement=best.placement), best.cost


def _minimised_carefully(
    profile: Profile,
    judged: Chunk,
    policy: Policy,
    options: SolveOptions,
    progress: Progress | None,
    deadline: Deadline,
) -> Found:
    """Minimise copies without replicas; add some that hardly move load, whoever serves."""
    if options.start is not None or not options.redundant_experts:
        return _minimised(profile, judged, policy, options, progress, deadline)
    bare = replace(options, redundant_experts=0)
    found = _minimised(profile, judged, policy, bare, progress, deadline)
    load = [counts.astype(np.float64) for counts in profile.affinity.load]
    return replace(
        found,
        placement=with_replicas(
            found.placement, load, options.redundant_experts, is_careful=True
        ),
        traffic=_traffic_problem(profile, judged, found.problem, policy, options),
    )


def _minimised_as_drawn(
    profile: Profile,
    judged: Chunk,
    policy: Policy,
    options: SolveOptions,
    progress: Progress | None,
    deadline: Deadline,
) -> Found:
    """Minimise copies for draws that no move can know, with ever less caution.

    Each layer is then taken from the best of these placements, as SGLang draws for it.
    """
    found = _minimised_carefully(profile, judged, policy, options, progress, deadline)
    once = replace(options, refine=replace(options.refine, num_starts=1))
    tried = [found.placement]
    for share in _CAUTION_OF_DRAWS:
        if deadline.passed():
            break
        caution = np.full(found.placement.num_layers, share)
        problem = replace(found.traffic, caution=caution)
        tried.append(_refine(tried[-1], problem, once, found.line, deadline))
    exact = Refinement(problem=found.traffic, limits=options.refine)
    return replace(found, placement=exact.best_as_drawn(tried))


def _minimised(
    profile: Profile,
    judged: Chunk,
    policy: Policy,
    options: SolveOptions,
    progress: Progress | None,
    deadline: Deadline,
) -> Found:
    """Minimise copies, from pairs or from what the options start with."""
    problem = profile.problem(policy, options)
    placement, optimal = first_placement(profile, problem, options, progress, deadline)
    traffic = _traffic_problem(profile, judged, problem, policy, options)
    line = GapLine(tell=progress, num_decimals=4)
    if not optimal:
        if progress is not None:
            line.raise_bound(early_copies_bound(problem, judged, options))
        placement = _refine(placement, traffic, options, line, deadline)
    return Found(
        placement=placement, optimal=optimal, problem=problem, traffic=traffic, line=line
    )


def _traffic_problem(
    profile: Profile,
    judged: Chunk,
    problem: PlacementProblem,
    policy: Policy,
    options: SolveOptions,
) -> TrafficProblem:
    sizes = tuple(len(load) for load in problem.load)
    n_group = profile.affinity.model.n_group
    load = load_scenarios(profile.tokens or judged, sizes, options.robust, options.seed)
    caps = problem.max_load
    if options.redundant_experts:
        # Caps that are out of reach without replicas may be met with them.
        num_ranks = options.topology.num_ranks
        caps = tuple(options.max_imbalance * one[0].sum() / num_ranks for one in load)
    return TrafficProblem(
        experts=layer_tokens(judged),
        topology=options.topology,
        policy=policy,
        exchange=options.exchange,
        load=load,
        max_load=tuple(np.full(len(one), cap) for one, cap in zip(load, caps, strict=True)),
        overflow_price=OVERFLOW_PRICE
        if options.overflow_price is None
        else options.overflow_price,
        receive_price=options.receive_price,
        move_price=_move_price(judged, profile.tokens, options),
        kind=pinned_kinds(
            group_kinds(sizes, n_group) if options.preserve_groups else None,
            sizes,
            options.pins,
        ),
        replica_choice=options.replica_choice,
        max_home_imbalance=options.max_home_imbalance
        if options.policy == "follow"
        else None,
        max_received_copies=options.max_received_copies,
    )


def _move_price(
    judged: Chunk, profile: Chunk | None, options: SolveOptions
) -> tuple[FloatArray, ...] | None:
    if options.start is None or not options.migration_cost:
        return None
    whole = judged if profile is None else profile
    # Judged by a sample, a move is worth that share of it.
    share = judged.num_tokens / whole.num_tokens
    return move_prices(options.start, options.migration_cost * share)


def _refine(
    placement: Placement,
    traffic: TrafficProblem,
    options: SolveOptions,
    line: GapLine,
    deadline: Deadline,
) -> Placement:
    refinement = Refinement(problem=traffic, limits=options.refine, seed=options.seed)
    return refinement.run(
        placement,
        None
        if line.tell is None
        else lambda sweep, copies: line(f"copies, sweep {sweep}", copies),
        deadline,
    )


def _alternate(
    placement: Placement,
    content: Alternation,
    progress: Progress | None,
    deadline: Deadline,
) -> Rated:
    return content.run(
        placement,
        None
        if progress is None
        else lambda number, price: progress(
            f"homes and placement, round {number}: objective {price:.4f}"
        ),
        deadline,
    )

"""Minimising copies: after pairs, for homes from tables, for SGLang's draws."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from placer.arrays import BoolArray, FloatArray
from placer.placement.migration import move_prices
from placer.placement.pins import pinned_kinds
from placer.placement.placement import Placement
from placer.placement.policy import ContentPolicy, Policy
from placer.run.progress import GapLine
from placer.run.session import Session
from placer.solver.balance.replicas import with_replicas
from placer.solver.balance.router_groups import group_kinds
from placer.solver.goal import OVERFLOW_PRICE
from placer.solver.options import SolveOptions
from placer.solver.problem.layer_profile import layer_tokens
from placer.solver.problem.pairs import PlacementProblem
from placer.solver.problem.scenarios import load_scenarios
from placer.solver.problem.traffic import TrafficProblem, sample_sequences
from placer.solver.proof.reports import early_copies_bound
from placer.solver.search.alternation import Alternation, vocabulary_of
from placer.solver.search.caution import is_above, kept_under_cap
from placer.solver.search.drawn import best_as_drawn
from placer.solver.search.evaluation import Evaluation, Rated
from placer.solver.search.evaluator import evaluate
from placer.solver.search.first_placement import Profile, first_placement
from placer.solver.search.refine import refined, repaired
from placer.trace import Chunk

# Loading the compiled loops of tables and of an evaluation, however few the tokens.
_SECONDS_TO_LOAD = 0.6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """A placement, its objective, and its progress line.

    Attributes
    ----------
    placement
        Experts in slots.
    optimal
        Whether it is proved to be so; never with replicas.
    problem, traffic
        The pairs and the copies that are minimised.
    line
        Knows a bound of the copies where one was computed.
    """

    placement: Placement
    optimal: bool
    problem: PlacementProblem
    traffic: TrafficProblem
    line: GapLine

    def evaluate(self) -> Evaluation:
        """Return the cost of the placement on the tokens that judged it."""
        return evaluate(self.traffic, self.placement)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Search:
    """What is asked for, the tokens that judge it, and what it runs with."""

    profile: Profile
    judged: Chunk
    options: SolveOptions
    session: Session


def minimised(
    profile: Profile,
    judged: Chunk,
    options: SolveOptions,
    session: Session,
) -> tuple[Found, Evaluation | None]:
    """Minimise copies; under token and request, for the homes that tables give.

    The second value is what the copies cost from those homes, which no other policy has.
    """
    search = _Search(profile=profile, judged=judged, options=options, session=session)
    content = options.goal.content_policy
    if content is not None:
        return _minimised_for_tables(search, content)
    (policy,) = options.start_policies(profile.affinity.model.top_k)
    minimise = _minimised_as_drawn if options.goal.has_draws else _minimised
    return _nearer_to_caps(search, minimise(search, policy)), None


def _nearer_to_caps(search: _Search, found: Found) -> Found:
    """Take EPLB's placement of layers that the clock left above their cap.

    Only where that is nearer to the cap: balancing loads takes no time.
    """
    by_load, goal = search.profile.by_load, search.options.goal
    if by_load is None or not goal.redundant_experts or not search.session.deadline.stopped:
        return found
    own = Rated(placement=found.placement, cost=found.evaluate())
    above = is_above(own.cost)
    if not above.any():
        return found
    even = search.options.start.pinned(by_load)
    other = Rated(placement=even, cost=evaluate(found.traffic, even))
    takes = above & other.cost.better_layers(own.cost)
    both = zip(
        takes,
        even.physical_to_logical_map,
        found.placement.physical_to_logical_map,
        strict=True,
    )
    rows = tuple(new if is_taken else old for is_taken, new, old in both)
    mixed = replace(found.placement, physical_to_logical_map=rows)
    ends = [own, other, Rated(placement=mixed, cost=evaluate(found.traffic, mixed))]
    return replace(found, placement=_best_of(ends).placement)


def _minimised_for_tables(
    search: _Search, content: ContentPolicy
) -> tuple[Found, Evaluation]:
    """Alternate homes and placement from each start; the best of all and mixed."""
    options, deadline = search.options, search.session.deadline
    if deadline.left() == 0.0:  # a rating takes several tables
        few = sample_sequences(
            search.judged, options.params.num_hurried_tokens, search.session.seed
        )
        share = few.num_tokens / search.judged.num_tokens
        deadline.needs_less(share, fixed=_SECONDS_TO_LOAD)
        search = replace(search, judged=few)
    vocab_size = vocabulary_of(search.judged, content)
    caution = _first_caution(content, search.profile, options)

    def alternated(policy: Policy) -> tuple[Found, Alternation, Rated]:
        minimise = _minimised_carefully if caution.any() else _minimised
        found = minimise(search, policy)
        alternation = Alternation(
            traffic=found.traffic,
            tokens=search.judged,
            policy=content,
            vocab_size=vocab_size,
            params=options.params,
            seed=search.session.seed,
            caps=options.goal.caps,
            caution=caution,
        )
        end = _alternate(found.placement, alternation, search.session)
        return found, alternation, end

    first, *others = options.start_policies(search.profile.affinity.model.top_k)
    found, alternation, end = alternated(first)
    ends = [end]
    if (given := options.start.pinned_placement) is not None:
        # What is best for the first homes may be worse for those of a table.
        ends.append(alternation.rated(given))
    above = is_above(end.cost).any() and options.goal.redundant_experts
    if above and search.profile.by_load is not None:
        by_load = alternation.rated(options.start.pinned(search.profile.by_load))
        if deadline.passed():  # a mixture takes a rating more
            ends.append(by_load)
        else:
            ends[0] = alternation.mixture(ends[0], by_load, deadline)
    for policy in others:
        if not deadline.passed():
            ends.append(alternated(policy)[2])
        if not deadline.passed():
            with deadline.interruptible():
                ends.append(alternation.mixture(ends[0], ends[-1], deadline))
    best = _best_of(ends)
    return replace(found, placement=best.placement), best.cost


def _minimised_carefully(search: _Search, policy: Policy) -> Found:
    """Minimise copies without replicas; add some that hardly move load, whoever serves.

    But in layers that no placement without replicas brings under the cap, which need the
    relief.
    """
    options, goal, start = search.options, search.options.goal, search.options.start
    is_placed_with_copies = start.preserve_groups or search.profile.is_uneven
    is_given = start.placement is not None
    if is_given or is_placed_with_copies or not goal.redundant_experts:
        return _minimised(search, policy)
    caps = replace(goal.caps.without_received, relax=True)
    bare = replace(options, goal=replace(goal, redundant_experts=0, caps=caps))
    found = _minimised(replace(search, options=bare), policy)
    load = [counts.astype(np.float64) for counts in search.profile.affinity.load]
    copied = with_replicas(
        found.placement,
        load,
        goal.redundant_experts,
        ~_needs_relief(search.profile, options),
    )
    return replace(
        found,
        placement=copied,
        optimal=False,
        traffic=_traffic_problem(search, found.problem, policy),
        line=GapLine(tell=search.session.progress, num_decimals=4),
    )


def _needs_relief(profile: Profile, options: SolveOptions) -> BoolArray:
    """Return ``[L]``: layers whose load cap is out of reach without replicas."""
    num_ranks = options.topology.num_ranks
    loads = profile.affinity.load
    caps = options.goal.caps
    asked = np.array([caps.most_load(float(load.sum()), num_ranks) for load in loads])
    needed: BoolArray = np.array(profile.max_load) > asked * (1 + 1e-9)
    return needed


def _first_caution(
    content: ContentPolicy, profile: Profile, options: SolveOptions
) -> FloatArray:
    """Return ``[L]``: caution to begin with where tables give the homes.

    Tokens go where replicas of their experts are, and take the load there with them;
    requests, which use most experts, hardly do, and ``hash`` does not look at homes.
    """
    is_moved = content == "token" and options.goal.replica_choice != "hash"
    share = options.params.caution_of_tables if is_moved else 0.0
    return np.where(_needs_relief(profile, options), 0.0, share)


def _minimised_as_drawn(search: _Search, policy: Policy) -> Found:
    """Minimise copies for draws that no move can know, with ever less caution.

    Ever more where copies must relieve a rank: counted whole, few of them would not, and
    all are not reached at once. Each layer is then taken from the best of these
    placements, as SGLang draws for it, and repaired where it is above a cap.
    """
    options, deadline = search.options, search.session.deadline
    with deadline.keeping(options.params.share_of_repair):
        found = _minimised_carefully(search, policy)
        tried = _tried_for_draws(search, found)
    if deadline.left() != 0.0:
        with deadline.interruptible():
            tried.append(best_as_drawn(found.traffic, tried))

    def rated(placement: Placement) -> Rated:
        return Rated(placement=placement, cost=evaluate(found.traffic, placement))

    def nearer(best: Rated, layers: BoolArray, share: float, number: int) -> Rated:
        caution = np.full(len(layers), share) if share else None  # without: as drawn
        problem = replace(found.traffic, caution=caution)
        params = options.params
        return rated(
            repaired(
                best.placement, problem, params, layers, seed=number, deadline=deadline
            )
        )

    best = _best_of([rated(placement) for placement in tried])
    return replace(
        found, placement=kept_under_cap(best, nearer, options.params, deadline).placement
    )


def _tried_for_draws(search: _Search, found: Found) -> list[Placement]:
    """Return placements made under ever less caution, and those that are given."""
    options, deadline = search.options, search.session.deadline
    once = replace(options, params=replace(options.params, num_starts=1))
    needs_relief = _needs_relief(search.profile, options)
    tried = [found.placement]
    cautions = options.params.cautions_of_draws
    for less, more in zip(cautions[::-1], cautions, strict=True):
        if deadline.passed():
            break
        caution = np.where(needs_relief, less, more)
        problem = replace(found.traffic, caution=caution)
        tried.append(_refine(tried[-1], problem, once, found.line, search.session))
    if (given := options.start.pinned_placement) is not None:
        tried.append(given)
    if search.profile.by_load is not None:
        tried.append(options.start.pinned(search.profile.by_load))
    return tried


def _best_of(ends: Sequence[Rated]) -> Rated:
    best = ends[0]
    for end in ends[1:]:
        if end.cost.is_better(best.cost):
            best = end
    return best


def _minimised(search: _Search, policy: Policy) -> Found:
    """Minimise copies, from pairs or from what the options start with."""
    options = search.options
    problem = search.profile.problem(policy, options)
    placement, optimal = first_placement(search.profile, problem, options, search.session)
    traffic = _traffic_problem(search, problem, policy)
    if options.start.preserve_groups:
        # Whole groups may be above the cap: then no rank gets busier than they make it.
        traffic = _capped_by(placement, np.maximum, traffic, options)
    line = GapLine(tell=search.session.progress, num_decimals=4)
    if not optimal:
        if search.session.progress is not None:
            line.raise_bound(early_copies_bound(problem, search.judged, options))
        placement = _refine(placement, traffic, options, line, search.session)
    return Found(
        placement=placement, optimal=optimal, problem=problem, traffic=traffic, line=line
    )


def _traffic_problem(
    search: _Search, problem: PlacementProblem, policy: Policy
) -> TrafficProblem:
    profile, judged, options = search.profile, search.judged, search.options
    goal, start = options.goal, options.start
    sizes = tuple(len(load) for load in problem.load)
    n_group = profile.affinity.model.n_group
    load = load_scenarios(
        profile.tokens or judged,
        sizes,
        goal.robust,
        search.session.seed,
        options.params.num_resamples,
    )
    caps = problem.max_load
    if goal.redundant_experts:
        # Caps that are out of reach without replicas may be met with them.
        num_ranks = options.topology.num_ranks
        caps = tuple(goal.caps.most_load(float(one[0].sum()), num_ranks) for one in load)
    traffic = TrafficProblem(
        experts=layer_tokens(judged),
        topology=options.topology,
        policy=policy,
        exchange=goal.counted,
        load=load,
        max_load=tuple(np.full(len(one), cap) for one, cap in zip(load, caps, strict=True)),
        overflow_price=OVERFLOW_PRICE
        if goal.overflow_price is None
        else goal.overflow_price,
        receive_price=goal.receive_price,
        home_price=options.params.home_price,
        move_price=_move_price(judged, profile.tokens, options),
        kind=pinned_kinds(
            group_kinds(sizes, n_group) if start.preserve_groups else None,
            sizes,
            start.pins,
        ),
        replica_choice=goal.replica_choice,
        layer_ids=profile.affinity.model.layer_ids,
        # Homes of tables are capped where the tables are built.
        caps=goal.caps if goal.content_policy is None else goal.caps.without_homes,
    )
    below = goal.caps.below_eplb and goal.redundant_experts
    if profile.by_load is None or not below:
        return traffic
    return _capped_by(profile.by_load, np.minimum, traffic, options)


def _capped_by(
    placement: Placement,
    take: np.ufunc,
    traffic: TrafficProblem,
    options: SolveOptions,
) -> TrafficProblem:
    """Return the problem with the lower or higher of its caps and a placement's loads."""
    served = evaluate(traffic, placement).imbalance
    num_ranks = options.topology.num_ranks
    caps = [
        take(cap, imbalance * load[0].sum() / num_ranks)
        for cap, imbalance, load in zip(traffic.max_load, served, traffic.load, strict=True)
    ]
    return replace(traffic, max_load=tuple(caps))


def _move_price(
    judged: Chunk, profile: Chunk | None, options: SolveOptions
) -> tuple[FloatArray, ...] | None:
    start = options.start
    if start.placement is None or not start.migration_cost:
        return None
    whole = judged if profile is None else profile
    # Judged by a sample, a move is worth that share of it.
    share = judged.num_tokens / whole.num_tokens
    return move_prices(start.placement, start.migration_cost * share)


def _refine(
    placement: Placement,
    traffic: TrafficProblem,
    options: SolveOptions,
    line: GapLine,
    session: Session,
) -> Placement:
    return refined(
        placement,
        traffic,
        options.params,
        seed=session.seed,
        progress=None
        if line.tell is None
        else lambda sweep, total, copies: line(f"copies, sweep {sweep} of {total}", copies),
        deadline=session.deadline,
    )


def _alternate(placement: Placement, content: Alternation, session: Session) -> Rated:
    return content.run(
        placement,
        lambda number, price: session.tell(
            f"homes and placement, round {number + 1} of "
            f"{content.params.num_alternations}: objective {price:.4f}"
        ),
        session.deadline,
    )

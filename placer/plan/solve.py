"""Solving: from affinity, and tokens where there are some, to a placement with a proof.

Pairs first: exactly where a layer has few balanced assignments, else by local search. Then
the copies that the profile's tokens really cause (``refine``), and a certificate of both.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from placer.affinity import Affinity
from placer.errors import NoSolutionError, UsageError
from placer.plan.alternation import Alternation, vocabulary_of
from placer.plan.balance import load_caps
from placer.plan.copies_cost import CopiesCost, ReceiveLimit
from placer.plan.deadline import Deadline
from placer.plan.dynamic import ExactPlacement, has_few_assignments, solve_exactly
from placer.plan.layer_profile import layer_tokens
from placer.plan.load_balance import METHOD as BALANCE_METHOD
from placer.plan.load_balance import OBJECTIVE as BALANCE_OBJECTIVE
from placer.plan.load_balance import balance_loads
from placer.plan.migration import move_prices, require_same_shape
from placer.plan.options import OVERFLOW_PRICE, SolveOptions
from placer.plan.pins import pinned_kinds, with_pins
from placer.plan.placement import Placement
from placer.plan.plan import SolverReport
from placer.plan.problem import (
    FloatArray,
    IntArray,
    PlacementProblem,
    Topology,
    placement_problem,
)
from placer.plan.progress import GapLine, gap
from placer.plan.refine import Refinement
from placer.plan.replicas import with_replicas
from placer.plan.reports import (
    content_report,
    copies_report,
    early_copies_bound,
    early_pair_bound,
    pair_report,
    status,
)
from placer.plan.router_groups import group_kinds, place_groups
from placer.plan.scenarios import load_scenarios
from placer.plan.search import Search
from placer.plan.traffic import TrafficProblem, sample_sequences
from placer.trace import Chunk

Progress = Callable[[str], None]

_EXACT_OPERATIONS = 2e10


def solve(
    affinity: Affinity,
    options: SolveOptions,
    progress: Progress | None = None,
    tokens: Chunk | None = None,
    deadline: Deadline | None = None,
) -> tuple[Placement, SolverReport]:
    """Place the experts of every layer.

    Parameters
    ----------
    affinity
        Counts of the profile; loads alone are balanced.
    options
        What to solve for.
    progress
        Told one line per step of the search. Interrupted by Ctrl-C, the search gives the
        best so far; the report then says that it is not reproducible.
    tokens
        The profile itself: the copies that it causes are minimised. Without it pairs of
        experts are all that is known.
    deadline
        Stops search and proof; one of ``options.time_limit`` from now by default.

    Raises
    ------
    NoSolutionError
        If a layer cannot meet the load cap, or was not brought under the cap on received
        copies, and ``relax_cap`` is false.
    UsageError
        If slots do not divide over the ranks, or an option needs tokens.
    """
    began = time.monotonic()
    deadline = deadline or Deadline(seconds=options.time_limit)
    if options.objective == "balance" or not affinity.has_links:
        return _balance(affinity, options, deadline)
    if tokens is None and options.needs_tokens is not None:
        raise UsageError(
            f"{options.needs_tokens} needs the tokens of a trace, not counts alone",
            "solve from the trace itself: placer solve TRACE --out PLAN",
        )
    loads = [counts.astype(np.float64) for counts in affinity.load]
    caps, start, relaxed = load_caps(
        loads,
        options.topology.num_ranks,
        options.max_imbalance,
        relax_cap=options.relax_cap or options.redundant_experts > 0,
    )
    policy = options.start_policy(affinity.model.top_k)
    problem = placement_problem(affinity, policy, options.topology, caps)
    if options.needs_tokens is not None and not options.refine.num_sweeps:
        raise UsageError(
            f"{options.needs_tokens} is what the sweeps serve, and --num-sweeps is 0",
            "leave out --num-sweeps",
        )
    judged, vocab_size = None, 0
    if tokens is not None and options.refine.num_sweeps:
        judged = sample_sequences(tokens, options.refine.num_tokens, options.seed)
        if options.content_policy is not None:
            vocab_size = vocabulary_of(judged, options.content_policy)
    placement, optimal = _first_placement(
        affinity, problem, options, start, judged, progress, deadline
    )
    relaxed_receive: dict[str, float] = {}
    if judged is None:
        report = pair_report(problem, placement, options, progress, deadline)
    else:
        traffic = _traffic_problem(judged, tokens, problem, options, affinity.model.n_group)
        line = GapLine(tell=progress, num_decimals=4)
        if not optimal:
            if progress is not None:
                line.raise_bound(early_copies_bound(problem, judged, options))
            placement = _refine(placement, traffic, options, line, deadline)
        content = None
        if options.content_policy is not None:
            content = Alternation(
                traffic=traffic,
                tokens=judged,
                policy=options.content_policy,
                vocab_size=vocab_size,
                limits=options.refine,
                seed=options.seed,
                max_home_imbalance=options.max_home_imbalance,
            )
            placement = _alternate(placement, content, progress, deadline)
        if options.redundant_experts or options.constrained:
            relaxed = _require_cap(placement, traffic, options)
        if options.max_received_copies is not None:
            reached = Refinement(problem=traffic, limits=options.refine).evaluate(placement)
            relaxed_receive = {
                str(layer): value for layer, value in reached.missed_receive_cap().items()
            }
            require_receive_cap(
                relaxed_receive, options, traffic.num_layers, stopped=deadline.stopped
            )
        if content is not None:
            report = content_report(content, placement)
        else:
            report = copies_report(
                problem, traffic, judged, placement, optimal, options, line, deadline
            )
    return placement, SolverReport(
        **report,
        seconds=time.monotonic() - began,
        seed=options.seed,
        reproducible=deadline.reproducible,
        relaxed_layers={str(layer): value for layer, value in relaxed.items()},
        relaxed_receive_layers=relaxed_receive,
    )


def solve_to_choose(
    affinity: Affinity, options: SolveOptions, profile: Chunk | None, deadline: Deadline
) -> tuple[Placement, SolverReport]:
    """Solve for a plan to choose by; of a choice that the clock cut, the deadline knows.

    Raises
    ------
    KeyboardInterrupt
        On Ctrl-C: there is no plan to give yet.
    """
    placement, report = solve(affinity, options, None, profile, deadline)
    if deadline.interrupted:
        raise KeyboardInterrupt
    return placement, report


def _balance(
    affinity: Affinity, options: SolveOptions, deadline: Deadline
) -> tuple[Placement, SolverReport]:
    """Place by loads alone."""
    began = time.monotonic()
    asked = options.asked_of_tokens | {"--policy follow": options.policy == "follow"}
    asked.pop("--redundant-experts")
    for option in (name for name, wanted in asked.items() if wanted):
        if options.objective == "balance":
            raise UsageError(
                f"{option} is about traffic, --objective balance is not", f"drop {option}"
            )
        raise UsageError(
            f"{option} needs tokens: loads alone say nothing of traffic",
            "record tokens (placer record --help), or balance by --policy fixed alone",
        )
    topology = options.topology
    found = balance_loads(
        [counts.astype(np.float64) for counts in affinity.load],
        topology.num_ranks,
        topology.num_nodes,
        options.redundant_experts,
    )
    missed = {
        layer: value
        for layer, value in enumerate(found.imbalance)
        if value > options.max_imbalance + 1e-9
    }
    if missed and not options.relax_cap:
        raise out_of_reach(missed, found.placement, options)
    objective, bound = float(np.mean(found.imbalance)), float(np.mean(found.bound))
    return found.placement, SolverReport(
        status=status(objective, bound * (1 + 1e-9)),
        objective_name=BALANCE_OBJECTIVE,
        objective=objective,
        bound=bound,
        gap=gap(objective, bound),
        bound_method=BALANCE_METHOD,
        seconds=time.monotonic() - began,
        seed=options.seed,
        reproducible=deadline.reproducible,
        relaxed_layers={str(layer): value for layer, value in missed.items()},
    )


def _first_placement(
    affinity: Affinity,
    problem: PlacementProblem,
    options: SolveOptions,
    start: list[IntArray],
    judged: Chunk | None,
    progress: Progress | None,
    deadline: Deadline,
) -> tuple[Placement, bool]:
    """Return what the refinement begins with, and whether it is optimal already."""
    topology = options.topology
    if options.start is not None:
        require_same_shape(
            options.start,
            affinity.model.num_experts,
            topology.num_ranks,
            topology.num_nodes,
            options.redundant_experts,
        )
        return with_pins(options.start, options.pins), False
    if options.preserve_groups:
        policy = options.start_policy(affinity.model.top_k)
        limits, seed = options.limits, options.seed
        placed = place_groups(affinity, policy, topology, limits, seed, deadline)
        return placed, False
    placement, optimal = _place_pairs(problem, options, start, judged, progress, deadline)
    if options.redundant_experts:
        loads = [counts.astype(np.float64) for counts in affinity.load]
        placement = with_replicas(placement, loads, options.redundant_experts)
    return with_pins(placement, options.pins), optimal


def _place_pairs(
    problem: PlacementProblem,
    options: SolveOptions,
    start: list[IntArray],
    judged: Chunk | None,
    progress: Progress | None,
    deadline: Deadline,
) -> tuple[Placement, bool]:
    """Minimise pairs, or copies where that is exact. Return whether it is optimal."""
    exact = None
    if judged is None:
        exact = solve_exactly(problem, max_operations=_EXACT_OPERATIONS)
    elif has_few_assignments(problem):
        exact = _exact_copies(problem, judged, options)
    if exact is not None:
        return _placed(list(exact.expert_rank), options.topology), True
    search = Search(
        problem=problem,
        expert_rank=_best_start(problem, start),
        rng=np.random.default_rng(options.seed),
        limits=options.limits,
    )
    line = GapLine(tell=progress, num_decimals=0)
    if progress is not None:
        line.raise_bound(early_pair_bound(problem))
    search.run(
        lambda number, objective: line(f"pairs, round {number}", objective), deadline
    )
    return _placed(search.expert_rank, options.topology), False


def _exact_copies(
    problem: PlacementProblem, judged: Chunk, options: SolveOptions
) -> ExactPlacement | None:
    """Minimise copies exactly, where few assignments and nothing else asked allow it."""
    cap = options.max_received_copies
    if replace(options, max_received_copies=None).needs_tokens is not None:
        return None
    policy = options.start_policy(judged.experts[0].shape[1])
    cost = CopiesCost.of([judged], policy, options.topology)
    limit = None if cap is None else ReceiveLimit(cost=cost, max_copies=cap)
    try:
        return solve_exactly(problem, cost, None, _EXACT_OPERATIONS, limit)
    except NoSolutionError:
        if options.relax_cap:  # the search then comes as near to the cap as it can
            return None
        raise


def _placed(expert_rank: list[IntArray], topology: Topology) -> Placement:
    return Placement.from_expert_rank(expert_rank, topology.num_ranks, topology.num_nodes)


def _traffic_problem(
    judged: Chunk,
    profile: Chunk | None,
    problem: PlacementProblem,
    options: SolveOptions,
    n_group: int,
) -> TrafficProblem:
    sizes = tuple(len(load) for load in problem.load)
    load = load_scenarios(profile or judged, sizes, options.robust, options.seed)
    caps = problem.max_load
    if options.redundant_experts:
        # Caps that are out of reach without replicas may be met with them.
        num_ranks = options.topology.num_ranks
        caps = tuple(options.max_imbalance * one[0].sum() / num_ranks for one in load)
    return TrafficProblem(
        experts=layer_tokens(judged),
        topology=options.topology,
        policy=options.start_policy(judged.experts[0].shape[1]),
        exchange=options.exchange,
        load=load,
        max_load=tuple(np.full(len(one), cap) for one, cap in zip(load, caps, strict=True)),
        overflow_price=OVERFLOW_PRICE
        if options.overflow_price is None
        else options.overflow_price,
        receive_price=options.receive_price,
        move_price=_move_price(judged, profile, options),
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
) -> Placement:
    return content.run(
        placement,
        None
        if progress is None
        else lambda number, price: progress(
            f"homes and placement, round {number}: objective {price:.4f}"
        ),
        deadline,
    )


def _require_cap(
    placement: Placement, traffic: TrafficProblem, options: SolveOptions
) -> dict[int, float]:
    """Return the layers of a placement with replicas that miss the cap, or refuse."""
    reached = Refinement(problem=traffic, limits=options.refine).evaluate(placement)
    missed = {
        layer: float(value)
        for layer, value in enumerate(reached.imbalance)
        if value > options.max_imbalance + 1e-9
    }
    if missed and not options.relax_cap:
        raise out_of_reach(missed, placement, options)
    return missed


def require_receive_cap(
    missed: Mapping[str, float], options: SolveOptions, num_layers: int, *, stopped: bool
) -> None:
    """Refuse layers above the cap on received copies, unless caps may be relaxed.

    Parameters
    ----------
    missed
        As ``SolverReport.relaxed_receive_layers``.
    options
        What was asked for; a plan may be solved with caps relaxed that nobody asked for.
    num_layers
        Of the plan.
    stopped
        Whether the search was.

    Raises
    ------
    NoSolutionError
        If there are such layers.
    """
    if not missed or options.relax_cap:
        return
    worst = max(missed.values())
    when = ", when the search was stopped" if stopped else ""
    raise NoSolutionError(
        f"--max-received-copies {options.max_received_copies:g} was not reached in "
        f"{len(missed)} of {num_layers} MoE layers under --max-imbalance "
        f"{options.max_imbalance:g}{when}; worst {worst:.4f}",
        "take the best reached with --relax-cap, ask for --max-received-copies "
        f"{np.ceil(worst * 1000) / 1000:g}, or allow a higher --max-imbalance",
    )


def out_of_reach(
    missed: Mapping[int, float], placement: Placement, options: SolveOptions
) -> NoSolutionError:
    """Return the error of layers, with what they reached, that miss the load cap."""
    worst = max(missed.values())
    return NoSolutionError(
        f"--max-imbalance {options.max_imbalance} was not reached in {len(missed)} of "
        f"{placement.num_layers} MoE layers with {options.redundant_experts} redundant "
        f"experts; worst {worst:.4f}",
        f"take the best reached with --relax-cap, ask for more --redundant-experts, or "
        f"for --max-imbalance {np.ceil(worst * 1000) / 1000:g}",
    )


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

"""The cap on load: what of it can be met, and where a search may start."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from placer.arrays import AnyArray, FloatArray, IntArray
from placer.errors import NoSolutionError
from placer.placement.placement import Placement, require_divisible_slots
from placer.placement.reference import Load
from placer.run.deadline import Deadline
from placer.run.progress import Progress
from placer.solver.balance.cp_sat import repeatable_solver
from placer.solver.options import SolveOptions
from placer.solver.problem.pairs import rank_load

# Deterministic time of CP-SAT, so that the answer does not depend on the machine.
_DETERMINISTIC_TIME = 4.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BalancedLayer:
    """The best balanced assignment found for one layer.

    Attributes
    ----------
    expert_rank
        ``[E]`` int64: rank of every expert, E/R on each.
    max_load
        Load of the busiest rank, in pairs.
    proved_max_load
        No assignment with equal slots has a smaller one than this.
    """

    expert_rank: IntArray
    max_load: float
    proved_max_load: float


def greedy_balance(load: FloatArray, num_ranks: int) -> IntArray:
    """Place experts by descending load on the least loaded rank with a free slot.

    Returns ``[E]`` int64, the rank of every expert: the longest-processing-time rule
    with equal counts, as EPLB packs experts into GPUs.
    """
    ranks = np.empty(len(load), dtype=np.int64)
    total, free = np.zeros(num_ranks), np.full(num_ranks, len(load) // num_ranks)
    for expert in np.argsort(-load, kind="stable"):
        rank = int(np.where(free > 0, total, np.inf).argmin())
        ranks[expert] = rank
        total[rank] += load[expert]
        free[rank] -= 1
    return ranks


def least_max_load(load: FloatArray, num_ranks: int) -> float:
    """Return the least load that the busiest rank can have, as a lower bound.

    One of R ranks has an even share. One has j + 1 of the j R + 1 heaviest experts, at
    least the lightest j + 1 of them, and also at least the lightest of all. Where each rank
    has two, the i heaviest are on i ranks or share one, so one of them has an expert no
    lighter than the i-th lightest beside it.

    Parameters
    ----------
    load
        ``[E]`` whole numbers, in pairs.
    num_ranks
        R, which divides E.
    """
    width = len(load) // num_ranks
    ascending = np.sort(load)
    descending, lightest = ascending[::-1], np.cumsum(np.r_[0.0, ascending])
    crowded = (
        descending[more * num_ranks - more : more * num_ranks + 1].sum()
        + lightest[width - more - 1]
        for more in range(width)
    )
    folded = (descending + ascending)[:num_ranks] if width == 2 else [0.0]
    return max(
        float(np.ceil(load.sum() / num_ranks)), *map(float, crowded), *map(float, folded)
    )


def balance_layer(
    load: FloatArray, num_ranks: int, max_load: float, deadline: Deadline | None = None
) -> BalancedLayer:
    """Find an assignment under ``max_load``, or the best balanced one there is.

    Greedy and swaps first, then swaps of two experts for two. Where they stay above the
    cap, and arithmetic does not prove them best, CP-SAT minimises the busiest rank's load
    within a fixed deterministic time, or until the ``deadline``.
    """
    least = least_max_load(load, num_ranks)
    deadline = deadline or Deadline()
    ranks = greedy_balance(load, num_ranks)
    for improve in (_swap_down, _swap_pairs_down):
        ranks = improve(load, ranks, num_ranks)
        reached = float(rank_load(ranks, load, num_ranks).max())
        if reached <= max(max_load, least) or deadline.passed():
            return BalancedLayer(expert_rank=ranks, max_load=reached, proved_max_load=least)
    return _minimise_max_load(load, ranks, num_ranks, least, deadline)


def load_caps(
    loads: Sequence[FloatArray],
    options: SolveOptions,
    deadline: Deadline,
    at_most: Sequence[float] | None = None,
    tell: Progress | None = None,
) -> tuple[list[float], list[IntArray], dict[int, float]]:
    """Turn the cap on imbalance into load caps per layer, and find a feasible start.

    Parameters
    ----------
    loads
        L arrays ``[E]`` of whole numbers, in pairs.
    options
        What is asked of them. Redundant experts may relieve a rank afterwards, so that
        with some a cap that is out of reach here is no error.
    deadline
        Cuts the search for the best value that can be reached.
    at_most
        ``[L]``: a lower cap on max/mean for each layer, or ``None``.
    tell
        Gets each layer.

    Returns
    -------
    tuple
        Load cap per layer in pairs; a feasible start (L arrays ``[E]``, rank of every
        expert); the imbalance of the layers whose cap was relaxed. Where a cap may be
        relaxed and experts do not divide over the ranks: no cap, and no start.

    Raises
    ------
    UsageError
        If the experts of a layer do not divide over the ranks, and no cap may be relaxed.
    NoSolutionError
        If a cap is out of reach and may not be relaxed.
    """
    num_ranks, goal = options.topology.num_ranks, options.goal
    max_imbalance = goal.caps.load_cap
    relax_cap = goal.caps.relaxes_load_cap or goal.redundant_experts > 0
    if not relax_cap:
        require_within_reach(
            loads,
            num_ranks,
            max_imbalance,
            f"--max-imbalance {max_imbalance}",
            "use the best reachable per layer with --relax-cap, or give --max-imbalance",
        )
    caps, start, relaxed = [], [], {}
    for layer, load in enumerate(loads):
        if relax_cap and len(load) % num_ranks:
            # Only copies fill the ranks: what they reach is known once they are made.
            caps.append(np.inf)
            start.append(np.empty(0, dtype=np.int64))
            continue
        require_divisible_slots(len(load), num_ranks, layer)
        mean = load.sum() / num_ranks
        asked = max_imbalance if at_most is None else min(max_imbalance, at_most[layer])
        cap = float(np.floor(asked * mean * (1 + 1e-12) + 1e-9))
        if tell is not None:
            tell(f"load cap: layer {layer + 1} of {len(loads)}")
        found = balance_layer(load, num_ranks, cap, deadline)
        if found.max_load > cap:
            relaxed[layer] = float(found.max_load / mean)
            cap = found.max_load
        caps.append(cap)
        start.append(found.expert_rank)
    if relaxed and not relax_cap:
        worst = max(relaxed.values())
        when = ", when the search was stopped" if deadline.stopped else ""
        listed = ", ".join(f"{layer}: {value:.4f}" for layer, value in relaxed.items())
        raise NoSolutionError(
            f"--max-imbalance {max_imbalance} is out of reach in {len(relaxed)} of "
            f"{len(loads)} MoE layers{when}; best reachable (layer: imbalance) {listed}",
            "use the best reachable per layer with --relax-cap, or give --max-imbalance "
            f"{np.ceil(worst * 1000) / 1000:g}",
        )
    return caps, start, relaxed


def require_within_reach(
    loads: Sequence[AnyArray], num_ranks: int, load_cap: float, given: str, remedy: str
) -> None:
    """Refuse at once a cap that arithmetic shows to be out of reach.

    ``given`` is the option that gave it, and a cap that swaps reach ends the ``remedy``.

    Raises
    ------
    UsageError
        If the experts of a layer do not divide over the ranks.
    NoSolutionError
        If the cap is out of reach.
    """
    for layer, load in enumerate(loads):
        require_divisible_slots(len(load), num_ranks, layer)
    means = [load.sum() / num_ranks for load in loads]
    least = {
        layer: least_max_load(load, num_ranks) / mean
        for layer, (load, mean) in enumerate(zip(loads, means, strict=True))
        if mean
    }
    missed = {n: one for n, one in least.items() if one > load_cap * (1 + 1e-9)}
    if not missed:
        return
    reached = max(
        rank_load(
            _swap_down(load, greedy_balance(load, num_ranks), num_ranks), load, num_ranks
        ).max()
        / mean
        for load, mean in zip(loads, means, strict=True)
        if mean
    )
    worst = max(missed, key=lambda layer: missed[layer])
    raise NoSolutionError(
        f"{given} is out of reach in {len(missed)} of {len(loads)} MoE layers; "
        f"no placement has less than {missed[worst]:.7g} in layer {worst}",
        f"{remedy} {np.ceil(reached * 1000) / 1000:g}",
    )


def _swap_down(load: FloatArray, ranks: IntArray, num_ranks: int) -> IntArray:
    """Swap experts of the busiest rank for lighter ones while its load falls."""
    ranks = ranks.copy()
    while True:
        total = rank_load(ranks, load, num_ranks)
        busiest = int(total.argmax())
        mine, others = np.flatnonzero(ranks == busiest), np.flatnonzero(ranks != busiest)
        shed = load[mine][:, None] - load[others]
        after = np.maximum(total[busiest] - shed, total[ranks[others]] + shed)
        if not after.size or after.min() >= total[busiest]:
            return ranks
        one, two = divmod(int(after.argmin()), len(others))
        ranks[mine[one]], ranks[others[two]] = ranks[others[two]], busiest


def _swap_pairs_down(load: FloatArray, ranks: IntArray, num_ranks: int) -> IntArray:
    """Swap two experts for two, so that the busier of two ranks has less, while it helps.

    The busiest rank comes first, with swaps of one; where it cannot change, other ranks
    do, which may free it. Every rank has equally many experts.
    """
    one, two = np.triu_indices(len(load) // num_ranks, k=1)
    while True:
        ranks = _swap_down(load, ranks, num_ranks)
        held = np.argsort(ranks, kind="stable").reshape(num_ranks, -1)
        total = load[held].sum(axis=1)
        pairs = load[held[:, one]] + load[held[:, two]]
        descending = np.argsort(-total, kind="stable")
        for place, busy in enumerate(descending):
            found = _best_exchange(total, pairs, busy, descending[place + 1 :])
            if found is not None:
                break
        else:
            return ranks
        rank, mine, theirs = found
        ranks[held[busy, [one[mine], two[mine]]]] = rank
        ranks[held[rank, [one[theirs], two[theirs]]]] = busy


def _best_exchange(
    total: FloatArray, pairs: FloatArray, busy: int, others: IntArray
) -> tuple[int, int, int] | None:
    """Return the rank and the two places in ``pairs`` that lower a busy rank most."""
    best, found = total[busy], None
    for rank in others if pairs.size else []:
        # What comes nearest to half of the difference evens the two ranks best.
        order = np.argsort(pairs[rank], kind="stable")
        wanted = pairs[busy] - (total[busy] - total[rank]) / 2
        right = np.searchsorted(pairs[rank][order], wanted).clip(1, len(order) - 1)
        for theirs in (order[right - 1], order[right]):
            shed = pairs[busy] - pairs[rank][theirs]
            after = np.maximum(total[busy] - shed, total[rank] + shed)
            mine = int(after.argmin())
            if after[mine] < best:
                best, found = after[mine], (int(rank), mine, int(theirs[mine]))
    return found


def _minimise_max_load(
    load: FloatArray, hint: IntArray, num_ranks: int, least: float, deadline: Deadline
) -> BalancedLayer:
    from ortools.sat.python import cp_model

    weights = load.astype(np.int64).tolist()
    model = cp_model.CpModel()
    on = [
        [model.new_bool_var(f"expert_{e}_rank_{r}") for r in range(num_ranks)]
        for e in range(len(weights))
    ]
    busiest = model.new_int_var(int(least), sum(weights), "busiest")
    for e, row in enumerate(on):
        model.add_exactly_one(row)
        for r, variable in enumerate(row):
            model.add_hint(variable, int(hint[e]) == r)
    for r in range(num_ranks):
        column = [row[r] for row in on]
        model.add(sum(column) == len(weights) // num_ranks)
        model.add(cp_model.LinearExpr.weighted_sum(column, weights) <= busiest)
    model.minimize(busiest)
    solver = repeatable_solver(_DETERMINISTIC_TIME, deadline)
    status = solver.solve(model)
    deadline.passed()
    tried = [hint]
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        found = [
            next(r for r, v in enumerate(row) if solver.boolean_value(v)) for row in on
        ]
        tried.append(np.asarray(found, dtype=np.int64))
    # The solver does not have to begin at the hint, and may end above it.
    ranks = min(tried, key=lambda one: float(rank_load(one, load, num_ranks).max()))
    return BalancedLayer(
        expert_rank=ranks,
        max_load=float(rank_load(ranks, load, num_ranks).max()),
        proved_max_load=max(least, float(np.ceil(solver.best_objective_bound - 1e-6))),
    )


def balanced(load: Load, num_ranks: int, num_nodes: int = 1) -> Placement:
    """Only balance the load: experts by descending load, each to the least loaded rank.

    Equal counts per rank; a load balancer such as EPLB without redundant experts.

    Parameters
    ----------
    load
        L arrays ``[E]``: pairs per expert.
    num_ranks, num_nodes
        The topology.

    Raises
    ------
    UsageError
        If the experts of a layer do not divide over the ranks.
    """
    for layer, counts in enumerate(load):
        require_divisible_slots(len(counts), num_ranks, layer)
    return Placement.from_expert_rank(
        [greedy_balance(counts.astype(np.float64), num_ranks) for counts in load],
        num_ranks,
        num_nodes,
    )

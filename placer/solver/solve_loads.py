"""Solving for balance: from loads only, or if placement cannot change the traffic."""

import time
from dataclasses import replace

import numpy as np

from placer.affinity import Affinity
from placer.errors import UsageError
from placer.placement.migration import require_same_shape
from placer.placement.placement import Placement
from placer.placement.solver_report import SolverReport
from placer.run.deadline import Deadline
from placer.run.progress import gap
from placer.run.session import Session
from placer.solver.balance.layer_balance import Balancing
from placer.solver.balance.load_balance import (
    METHOD,
    OBJECTIVE,
    OBJECTIVE_OF_REPLICAS,
    LoadBalance,
    balance_loads,
)
from placer.solver.balance.router_groups import blocks_of_groups
from placer.solver.options import SolveOptions
from placer.solver.proof.reports import status

# Bounds and values are sums of the same numbers in another order.
_ROUNDING = 1e-9


def solve_loads(
    affinity: Affinity, options: SolveOptions, session: Session
) -> tuple[Placement, SolverReport]:
    """Place experts and replicas for the most even load.

    Raises
    ------
    NoSolutionError
        If a layer misses the load cap, and it may not be relaxed.
    UsageError
        If slots do not divide over the ranks, or an option needs tokens.
    """
    began = time.monotonic()
    _require_no_traffic(options)
    found, split = _balanced(affinity, options, session.deadline)
    missed = options.goal.caps.missed_load(dict(enumerate(found.imbalance)))
    options.require_load(
        missed.values(),
        found.placement.num_layers,
        without_groups=None if split is None else max(split.imbalance),
    )
    objective, bound = float(np.mean(found.imbalance)), float(np.mean(found.bound))
    reached = status(objective, bound * (1 + _ROUNDING))
    return found.placement, SolverReport(
        status=reached,
        termination=session.deadline.termination(proved=reached == "optimal"),
        objective_name=OBJECTIVE_OF_REPLICAS
        if options.goal.redundant_experts
        else OBJECTIVE,
        objective=objective,
        bound=bound,
        gap=gap(objective, bound),
        bound_method=METHOD,
        seconds=time.monotonic() - began,
        seed=session.seed,
        reproducible=session.deadline.reproducible,
        relaxed_layers={str(layer): value for layer, value in missed.items()},
        predicted_imbalance=float(np.mean(found.predicted)),
        imbalance_without_groups=None if split is None else float(np.mean(split.imbalance)),
    )


def _balanced(
    affinity: Affinity, options: SolveOptions, deadline: Deadline
) -> tuple[LoadBalance, LoadBalance | None]:
    """Balance; with groups kept, without them too."""
    model, topology = affinity.model, options.topology
    start = options.start
    if start.placement is not None:
        require_same_shape(
            start.placement,
            model.num_experts,
            topology.num_ranks,
            topology.num_nodes,
            options.goal.redundant_experts,
        )
    loads = [counts.astype(np.float64) for counts in affinity.load]
    num_blocks = blocks_of_groups(model, options)

    def balanced(num_blocks: int) -> LoadBalance:
        asked = replace(
            Balancing.of(options, model, num_blocks),
            start=start.placement,
            migration_cost=start.migration_cost,
        )
        return balance_loads(loads, asked, deadline)

    if num_blocks == 1:
        return balanced(1), None
    return balanced(num_blocks), balanced(1)


def _require_no_traffic(options: SolveOptions) -> None:
    """Refuse options that need more than loads."""
    if (option := options.only_for_traffic) is None:
        return
    if options.goal.objective == "balance":
        raise UsageError(
            f"{option} is for traffic, not for --objective balance", f"drop {option}"
        )
    raise UsageError(
        f"{option} needs tokens: loads do not show traffic",
        f"record tokens (placer record --help), or drop {option}",
    )

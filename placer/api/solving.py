"""``placer.solve``: experts to ranks."""

import time
from collections.abc import Callable
from typing import Unpack

from placer.api.affinity import Affinity
from placer.api.files import note, warn
from placer.api.plan import Plan
from placer.api.requests import SolveArguments, solve_request
from placer.api.trace import Trace
from placer.planning.solving import solve_request as solved
from placer.report.comparison import plan_warnings
from placer.run.session import Session


def solve(
    source: Trace | Affinity,
    *,
    gpus_per_node: int,
    nodes: int = 1,
    engine: str | None = None,
    objective: str = "traffic",
    policy: str = "fixed",
    redundant_experts: int | str = 0,
    max_imbalance: float | None = None,
    fold: str | None = None,
    not_fold: str | None = None,
    phase: str = "all",
    seed: int = 0,
    time_limit: float | None = None,
    progress: Callable[[str], None] | None = None,
    **more: Unpack[SolveArguments],
) -> Plan:
    """Place experts on ranks, as ``placer solve`` does: the same plan, byte for byte.

    Parameters
    ----------
    source
        A trace, or counts: those only balance, or place pairs.
    gpus_per_node, nodes
        Expert-parallel ranks on each node, and nodes.
    engine
        The engine to solve for (``docs/engines.md``).
    objective
        ``traffic`` (under the load cap), ``balance`` or ``time``.
    policy
        How the home of a token is chosen: ``fixed``, ``follow``, ``token`` or ``request``.
    redundant_experts
        Extra slots in each layer, for replicas; ``"auto"`` chooses their number.
    max_imbalance
        Cap on the load of the busiest rank over the mean, in every layer.
    fold, not_fold, phase
        The tokens to solve on, as in :meth:`placer.Trace.affinity`. The plan is judged on
        all other sequences.
    seed
        Seed of all that is drawn.
    time_limit
        Seconds, or ``None``. A plan that was stopped cannot be reproduced.
    progress
        Called with one line for each step.
    **more
        Other options of ``placer solve``: :class:`placer.SolveArguments`.

    Returns
    -------
    Plan
        Not written yet: :meth:`placer.Plan.write`.

    Raises
    ------
    PlacerError
        If the trace is damaged, or a file cannot be read.
    UsageError
        If options contradict each other or the source.
    NoSolutionError
        If a cap is out of reach.
    NotProvedError
        If ``require_optimal`` and there is no proof.

    Examples
    --------
    >>> import placer
    >>> trace = placer.open("traces/demo/traces/final")
    >>> plan = placer.solve(trace, gpus_per_node=4, fold="0/2", num_sweeps=0, proof="none")
    >>> plan.num_ranks
    4
    """
    began = time.monotonic()
    session = Session.begun(
        time_limit=time_limit, seed=seed, began=began, progress=progress
    )
    with source.as_file() as file:
        request = solve_request(
            file.path,
            gpus_per_node=gpus_per_node,
            nodes=nodes,
            engine=engine,
            objective=objective,
            policy=policy,
            redundant_experts=redundant_experts,
            max_imbalance=max_imbalance,
            fold=fold,
            not_fold=not_fold,
            phase=phase,
            **more,
        )
        found = solved(
            request,
            lambda text: note(file.words(text)),
            lambda text: warn(file.words(text)),
            session,
        )
    for line in plan_warnings(found.plan):
        warn(line)
    return Plan(found.plan)

"""``placer.solve``: experts to ranks."""

import time
from collections.abc import Callable
from typing import Unpack

from placer.api.affinity import Affinity
from placer.api.arguments import SolveArguments
from placer.api.files import note, warn
from placer.api.plan import Plan
from placer.api.requests import solve_request
from placer.api.trace import Trace
from placer.planning.solving import solve_request as solved
from placer.report.comparison import plan_warnings
from placer.run.session import Session


def solve(
    source: Trace | Affinity,
    *,
    gpus_per_node: int,
    nodes: int = 1,
    seed: int = 0,
    time_limit: float | None = None,
    progress: Callable[[str], None] | None = None,
    **options: Unpack[SolveArguments],
) -> Plan:
    """Place experts on ranks, as ``placer solve`` does: the same plan, byte for byte.

    Parameters
    ----------
    source
        A trace, or counts: those only balance, or place pairs.
    gpus_per_node, nodes
        Expert-parallel ranks on each node, and nodes.
    seed
        Seed of all that is drawn.
    time_limit
        Seconds, or ``None``. A plan that was stopped cannot be reproduced.
    progress
        Called with one line for each step.
    **options
        The others of ``placer solve``, such as ``engine``, ``policy``, ``max_imbalance``,
        ``redundant_experts`` and ``fold``: :class:`placer.SolveArguments`.

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
            file.path, gpus_per_node=gpus_per_node, nodes=nodes, **options
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

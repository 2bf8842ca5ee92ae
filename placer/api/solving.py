"""``placer.solve``: experts to ranks."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from placer.api.affinity import Affinity
from placer.api.arguments import SolveArguments
from placer.api.files import AnyPath, as_path, note, warn, writing
from placer.api.how import How
from placer.api.plan import Plan
from placer.api.requests import solve_request
from placer.api.shown import Result, TitledTable
from placer.api.trace import Trace
from placer.planning.frontier import FrontierPoint, parse_caps
from placer.planning.solving import solve_frontier as write_plans
from placer.planning.solving import solve_request as solved
from placer.report.comparison import plan_warnings
from placer.report.results import Frontier as WrittenFrontier
from placer.report.solve_log import ending_line
from placer.report.verdicts import verdict_of_frontier
from placer.run.session import Session
from placer.simulation.cost import find_expert_shape

if TYPE_CHECKING:
    from pandas import DataFrame


def solve(
    source: Trace | Affinity,
    *,
    gpus_per_node: int,
    nodes: int = 1,
    seed: int = 0,
    time_limit: float | None = None,
    began: float | None = None,
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
    began
        When they began, by ``time.monotonic()``; now by default.
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
    with source.as_file() as file:
        request = solve_request(
            file.path, gpus_per_node=gpus_per_node, nodes=nodes, **options
        )
        found = solved(
            request,
            lambda text: note(file.words(text)),
            lambda text: warn(file.words(text)),
            _session(time_limit, seed, began, progress),
        )
    plan, model = found.plan, request.model
    note(ending_line(plan.solver))
    for line in plan_warnings(plan):
        warn(line)
    how = How(
        source=source.path or Path(file.called or "AFFINITY"),
        start=as_path(options.get("start")),
        model=model,
        expert=find_expert_shape(
            model,
            request.hidden_size,
            request.expert_size,
            request.weight_bytes,
            plan.engine,
        ),
        time=found.time,
    )
    return Plan(plan, how=how)


@dataclass(frozen=True, slots=True, repr=False, eq=False, kw_only=True)
class Frontier(Result):
    """Plans for several load caps: :func:`placer.solve_frontier` makes one.

    Attributes
    ----------
    points
        By ascending cap; ``file`` is the name of the plan in ``out``.
    """

    points: tuple[FrontierPoint, ...]

    def to_frame(self) -> "DataFrame":
        """Return one row for each plan: the columns of ``frontier.csv``."""
        from pandas import DataFrame

        return DataFrame(self.facts["points"])

    def tables(self) -> list[TitledTable]:
        """Return what ``placer solve --frontier`` shows."""
        heading = self.points[0].sent.heading
        columns = ("cap", "plan", heading, "of contiguous", "imbalance")
        return [
            (None, columns, [tuple(point.to_json().values())[:5] for point in self.points])
        ]


def solve_frontier(
    source: Trace | Affinity,
    caps: str | Sequence[float],
    out: AnyPath,
    *,
    gpus_per_node: int,
    nodes: int = 1,
    seed: int = 0,
    time_limit: float | None = None,
    began: float | None = None,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
    **options: Unpack[SolveArguments],
) -> Frontier:
    """Solve once for each load cap, as ``placer solve --frontier`` does.

    Parameters
    ----------
    source
        A trace.
    caps
        Load caps, max/mean: a list, or ``"1.02,1.05,1.1"``.
    out
        The directory to write: one plan for each cap, and ``frontier.csv``.
    force
        Whether an earlier frontier at ``out`` is replaced.
    gpus_per_node, nodes, seed, time_limit, began, progress, **options
        As in :func:`placer.solve`, without ``max_imbalance``.

    Raises
    ------
    PlacerError
        As :func:`placer.solve`, or if ``out`` exists and ``force`` is false.
    UsageError
        If a cap is not a number of at least 1, or options contradict each other.
    """
    place = Path(out)
    inputs = [
        source.path,
        as_path(options.get("topology")),
        as_path(options.get("model")),
        as_path(options.get("start")),
        as_path(options.get("hardware")),
    ]
    with (
        writing(place, inputs, force=force, kinds=["frontier"], directory=True),
        source.as_file() as file,
    ):
        request = solve_request(
            file.path, gpus_per_node=gpus_per_node, nodes=nodes, **options
        )
        points = write_plans(
            request,
            parse_caps(caps if isinstance(caps, str) else ",".join(map(str, caps))),
            place,
            note,
            warn,
            _session(time_limit, seed, began, progress),
        )
    rows = [point.to_json() for point in points]
    return Frontier(
        title="frontier",
        verdict=verdict_of_frontier(WrittenFrontier.read(place), place),
        facts={"out": str(place), "points": rows},
        out=place,
        points=tuple(points),
    )


def _session(
    time_limit: float | None,
    seed: int,
    began: float | None,
    progress: Callable[[str], None] | None,
) -> Session:
    start = time.monotonic() if began is None else began
    return Session.begun(time_limit=time_limit, seed=seed, began=start, progress=progress)

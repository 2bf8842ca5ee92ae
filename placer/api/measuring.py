"""What a trace says of links between experts, and of how many tokens a plan needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from placer.api.arguments import SelectArguments, require_known, selected
from placer.api.files import command_line, warn
from placer.api.shown import Result, TitledTable
from placer.api.trace import Trace
from placer.errors import one_of
from placer.placement.policy import POLICIES
from placer.placement.topology import Topology
from placer.planning.learning import DEFAULT_TOKENS, LearningPoint, learning_curve
from placer.report.links import Links as TraceLinks
from placer.report.links import links_of
from placer.report.trace_verdicts import verdict_of_learning, verdict_of_links
from placer.run.session import Session
from placer.solver.caps import MAX_IMBALANCE, Caps
from placer.solver.goal import NOT_SOLVED, Goal
from placer.solver.options import SolveOptions
from placer.trace.doubts import UNORDERED

if TYPE_CHECKING:
    from pandas import DataFrame

# Half of the sequences, where nobody says which.
_HALF = "0/2"


@dataclass(frozen=True, slots=True, repr=False, eq=False, kw_only=True)
class Links(Result):
    """How well experts predict those of later layers: :func:`placer.links` measures it.

    Attributes
    ----------
    by_trace
        All figures of each trace, by its path.
    """

    by_trace: Mapping[str, TraceLinks]

    def tables(self) -> dict[str, list[TitledTable]]:
        """Return what ``placer trace links`` shows of each trace, by its path."""
        return {path: _tables_of(one) for path, one in self.by_trace.items()}

    def to_frame(self) -> "DataFrame":
        """Return one row for each trace and control.

        Columns: ``trace``, and the figures of :class:`placer.report.links.Information`,
        in bits.
        """
        from pandas import DataFrame

        return DataFrame(
            [
                {"trace": path} | asdict(row)
                for path, one in self.by_trace.items()
                for row in one.information
            ]
        )


@dataclass(frozen=True, slots=True, repr=False, eq=False, kw_only=True)
class Learning(Result):
    """How plans from more and more tokens do: :meth:`placer.Trace.learning` makes one.

    Attributes
    ----------
    points
        By ascending tokens; the last is of all of them.
    """

    points: tuple[LearningPoint, ...]

    def to_frame(self) -> "DataFrame":
        """Return one row for each number of tokens.

        Columns: the figures of :class:`placer.planning.learning.LearningPoint`.
        """
        from pandas import DataFrame

        return DataFrame([asdict(point) for point in self.points])

    def tables(self) -> list[TitledTable]:
        """Return what ``placer trace learning`` shows."""
        names = ("tokens", "sequences", "copies/token", "of contiguous", "imbalance")
        rows = [tuple(asdict(point).values()) for point in self.points]
        return [(None, (*names, "moved"), rows)]


def links(
    traces: Sequence[Trace],
    *,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    **select: Unpack[SelectArguments],
) -> Links:
    """Measure how well experts predict those of later layers.

    Parameters
    ----------
    traces
        Traces, such as those of several training steps.
    seed
        Of the controls, in which one kind of structure is shuffled away.
    progress
        Called with one line for each step.
    **select
        The tokens: :class:`placer.SelectArguments`.

    Raises
    ------
    PlacerError
        If a trace is damaged, or no token is selected.
    UsageError
        If the model has one MoE layer, or an option has no such value.

    Examples
    --------
    >>> import placer
    >>> trace = placer.open("traces/demo/traces/final")
    >>> found = placer.links([trace], fold="0/16")
    >>> list(found.to_frame()["control"])[:2]
    ['observed', 'within-sequence']
    """
    require_known(select, SelectArguments)
    chosen = selected(select)
    found = {
        str(one.path): links_of(
            one.contents, chosen, seed=seed, progress=_of_trace(number, traces, progress)
        )
        for number, one in enumerate(traces, 1)
    }
    for one in traces:
        if not one.contents.header.experts_by_weight:
            warn(f"{one.path}: {UNORDERED}: no figures of top-1 experts are shown")
    return Links(
        title="links",
        verdict=verdict_of_links(found),
        facts={
            path: asdict(one) | {"domain_distance": one.domain_distance.tolist()}
            for path, one in found.items()
        },
        by_trace=found,
    )


def _of_trace(
    number: int, traces: Sequence[Trace], progress: Callable[[str], None] | None
) -> Callable[[str], None] | None:
    """Return what tells the steps of one of several traces."""
    if progress is None or len(traces) == 1:
        return progress
    return lambda step: progress(f"trace {number} of {len(traces)}, {step}")


def learning(
    trace: Trace,
    *,
    gpus_per_node: int,
    nodes: int = 1,
    policy: str = "fixed",
    max_imbalance: float = MAX_IMBALANCE,
    tokens: Sequence[int] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    **select: Unpack[SelectArguments],
) -> Learning:
    """Solve on more and more tokens: :meth:`placer.Trace.learning`."""
    require_known(select, SelectArguments)
    options = SolveOptions(
        topology=Topology(num_nodes=nodes, gpus_per_node=gpus_per_node),
        goal=Goal(
            policy=one_of("--policy", policy, POLICIES, NOT_SOLVED),
            caps=Caps(max_imbalance=max_imbalance),
        ),
    )
    given = {name: value for name, value in select.items() if value not in (None, "all")}
    half = {} if select.get("fold") or select.get("not_fold") else {"fold": _HALF}
    chosen = selected(select | half)
    points = learning_curve(
        trace.contents,
        options,
        chosen,
        tokens=tuple(tokens) if tokens else DEFAULT_TOKENS,
        session=Session(seed=seed, progress=progress),
    )
    solve = {
        "gpus_per_node": gpus_per_node,
        "nodes": None if nodes == 1 else nodes,
        "policy": None if policy == "fixed" else policy,
        "max_imbalance": None if max_imbalance == MAX_IMBALANCE else max_imbalance,
        "seed": seed or None,
        **given,
        # A small part may put the cap out of reach, so the curve relaxes it too.
        "relax_cap": max_imbalance != MAX_IMBALANCE,
        **half,
        "out": Path("plan.json"),
    }
    return Learning(
        title="learning",
        verdict=verdict_of_learning(points, command_line("solve", [trace.path], solve)),
        facts=_facts(chosen.to_json(), points),
        points=tuple(points),
    )


def _facts(chosen: Mapping[str, Any], points: Sequence[LearningPoint]) -> dict[str, Any]:
    return {**chosen, "points": [asdict(point) for point in points]}


def _tables_of(found: TraceLinks) -> list[TitledTable]:
    tables: list[TitledTable] = [
        (
            "mutual information: recorded, then with one kind of structure removed",
            ("bits", "top-1 next", "corrected", "all pairs", "within layer"),
            [tuple(asdict(row).values()) for row in found.information],
        )
    ]
    if found.reach:
        tables.append(
            (
                "mutual information of layers further apart",
                ("layers apart", "top-1", "corrected", "top-1 hit rate"),
                [tuple(asdict(row).values()) for row in found.reach],
            )
        )
    if found.domains:
        rows = zip(found.domains, found.domain_distance.tolist(), strict=True)
        tables.append(
            (
                "distance between domains (Jensen-Shannon, bits)",
                ("domain", *found.domains),
                [(name, *row) for name, row in rows],
            )
        )
    return tables

"""A plan and baselines, measured on the same tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from placer.api.arguments import SimulateArguments, require_known, selected, sizes_text
from placer.api.files import as_path, command_line, warn
from placer.api.plan import Plan
from placer.api.shown import Shape, Shown, TitledTable
from placer.api.trace import Trace
from placer.baseline import BASELINES
from placer.errors import UsageError, one_of
from placer.intervals import CopiesRatio
from placer.placement import Plan as SolvedPlan
from placer.planning.engine_options import architectures_of, servable
from placer.planning.judge import PLAN, Judgement, Serving, judge_plan
from placer.planning.verdict import fact_lines
from placer.report.batches import batch_tables, summary_table
from placer.report.comparison import comparison_table
from placer.report.verdicts import verdict_of_simulation
from placer.run.verdict import Verdict
from placer.runtime_map.engine_family import other_choices
from placer.serving.homes import batch_shapes, parse_tokens_per_rank
from placer.simulation.cost import find_expert_shape, require_no_sizes
from placer.simulation.metrics import PolicyMetrics
from placer.simulation.sent import deployable
from placer.target.engine import Engine, engines_named
from placer.target.hardware import Hardware
from placer.trace import Trace as TraceDirectory

if TYPE_CHECKING:
    from pandas import DataFrame

# What tells the rows of a comparison apart.
_SAME_ROW = ["ranks", "nodes", "redundant_experts", "engine", "placement", "policy"]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Simulation(Shown):
    """What a plan and baselines send, and how evenly they load ranks, on the same tokens.

    :meth:`placer.Plan.simulate` makes one.

    Attributes
    ----------
    judgements
        One for each engine, with all figures (:class:`placer.planning.judge.Judgement`).
    verdict
        What the plan saves: a sentence for each phase, and engines with the same one.
    """

    judgements: tuple[Judgement, ...]
    verdict: Verdict

    @property
    def engines(self) -> tuple[str | None, ...]:
        """Names of the engines; ``None``: what the plan was solved for, in bf16."""
        return tuple(_engine_name(one) for one in self.judgements)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What limits the figures, one sentence each."""
        return tuple(dict.fromkeys(w for one in self.judgements for w in one.warnings))

    def figures(
        self, placement: str = PLAN, policy: str | None = None, engine: str | None = None
    ) -> PolicyMetrics:
        """Return traffic and balance of one placement under one home policy.

        Parameters
        ----------
        placement
            ``plan``, or the name of a baseline.
        policy
            A home policy; by default what the plan was solved for, or ``fixed`` where that
            needs a table and there is none. Baselines have none.
        engine
            One of :attr:`engines`; by default the first.

        Raises
        ------
        UsageError
            If one of them was not simulated.
        """
        judged = self._of(engine)
        placements = {**judged.baselines, PLAN: judged.policies}
        policies = placements[one_of("placement", placement, [*placements])]
        own = judged.sent_policy if placement == PLAN else judged.policy
        return policies[one_of("policy", policy or own, [*policies])]

    def sent_ratio(
        self, baseline: str = "eplb", engine: str | None = None
    ) -> CopiesRatio | None:
        """Return what the plan sends over what a baseline sends, with its interval.

        ``None`` where the engine sends the same for every placement.

        Raises
        ------
        UsageError
            If the baseline or the engine was not simulated.
        """
        judged = self._of(engine)
        return judged.ratios.get(one_of("baseline", baseline, [*judged.baselines]))

    def to_frame(self) -> "DataFrame":
        """Return one row for each engine, placement and home policy.

        Columns: ``engine``, ``placement`` (the plan is last), ``policy``, and the figures
        of :class:`placer.simulation.PolicyMetrics`: copies per token and MoE layer, load as
        ratios to the mean.
        """
        from pandas import DataFrame

        return DataFrame(
            [
                {"engine": _engine_name(one), "placement": name, "policy": policy}
                | asdict(figures)
                for one in self.judgements
                for name, policies in {**one.baselines, PLAN: one.policies}.items()
                for policy, figures in policies.items()
            ]
        )

    def batches(self) -> "DataFrame":
        """Return one row for each engine, placement and size of batches.

        Columns: ``engine``, ``placement``, ``tokens_per_rank``, ``batching`` and the
        figures in batches; with hardware also microseconds, ``time.total`` and others.
        """
        from pandas import json_normalize

        rows = [
            {"engine": _engine_name(one), "placement": name} | batch.to_json()
            for one in self.judgements
            for name, batches in one.batches.items()
            for batch in batches
        ]
        timed = any(row["time"] is not None for row in rows)
        return json_normalize(rows if timed else [_untimed(row) for row in rows])

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of ``placer simulate --json``."""
        values = [one.to_json() for one in self.judgements]
        figures = values[0]
        if len(values) > 1:
            figures = {"engines": {value["engine"]: value for value in values}}
        return {"verdict": self.verdict.to_json()} | figures

    def tables(self, *, details: bool = False) -> tuple[list[TitledTable], list[str]]:
        """Return what ``placer simulate`` shows: tables, and sentences after them.

        ``details`` adds tables by the size of batches, where one engine was simulated.
        """
        first = self.judgements[0]
        if len(self.judgements) > 1:
            table, alike = summary_table(self.judgements)
            return [table], alike
        figures = first.to_json()
        placements = {**figures["baselines"], PLAN: figures["policies"]}
        policies = deployable(first.policies, first.policy)
        columns, rows = comparison_table(placements, policies, first.wire, per_batch=False)
        tables: list[TitledTable] = [(None, columns, rows)]
        if not details:
            return tables, []
        return [*tables, *batch_tables(first)], [*fact_lines(first, policies)]

    def _of(self, engine: str | None) -> Judgement:
        if engine is None:
            return self.judgements[0]
        names = [name for name in self.engines if name is not None]
        return self.judgements[
            self.engines.index(one_of("engine", engine, names or ["none"]))
        ]

    def _shape(self) -> Shape:
        first = self.judgements[0]
        ((_, columns, rows), *_), lines = self.tables()
        return Shape(
            title=f"Simulation of {first.num_tokens:,} tokens in "
            f"{first.num_sequences:,} sequences on {first.num_ranks} ranks",
            facts={f"verdict {n}": text for n, text in enumerate(self.verdict.answer, 1)},
            columns=columns,
            rows=rows,
            lines=[*lines, *(f"warning: {text}" for text in self.warnings)],
        )


def simulate(
    plan: Plan,
    trace: Trace,
    *,
    progress: Callable[[str], None] | None = None,
    **options: Unpack[SimulateArguments],
) -> Simulation:
    """Measure a plan and baselines on a trace: :meth:`placer.Plan.simulate`."""
    require_known(options, SimulateArguments)
    path = plan.path or Path("PLAN")
    given = {n: v for n, v in options.items() if (n, v) != ("phase", "all")}
    given |= {"engine": None, "tokens_per_rank": sizes_text(options.get("tokens_per_rank"))}
    command = command_line("simulate", (path, trace.path), given)
    with plan.as_file() as file:
        judgements = tuple(
            replace(one, warnings=tuple(map(file.words, one.warnings)))
            for one in _judged(
                plan.contents, file.path, trace.contents, command, options, progress
            )
        )
    verdict = verdict_of_simulation(judgements, plan.contents, path, command)
    found = Simulation(judgements, verdict)
    for text in found.warnings:
        warn(text)
    return found


def _judged(
    plan: SolvedPlan,
    path: Path,
    trace: TraceDirectory,
    command: str,
    options: SimulateArguments,
    progress: Callable[[str], None] | None,
) -> tuple[Judgement, ...]:
    """Judge the plan of a file; errors suggest ``command`` with another option."""
    hardware = options.get("hardware")
    model, hidden_size = as_path(options.get("model")), options.get("hidden_size")
    expert_size, weight_bytes = options.get("expert_size"), options.get("weight_bytes")
    width = trace.model.hidden_size
    if hardware is None:
        # The bytes that are sent take the width of the hidden state, which not all know.
        require_no_sizes(
            model if width is not None else None,
            hidden_size if width is not None else None,
            expert_size,
            weight_bytes,
            "--hardware",
        )
    engines: list[Engine | None] = [plan.engine]
    left_out: list[str] = []
    if (asked := options.get("engine")) is not None:
        kept, left_out = servable(engines_named(asked), plan, architectures_of(model))
        engines = [*kept]
    choice = options.get("replica_choice")
    for line in [*left_out, *(other_choices(plan, engines) if choice is None else [])]:
        warn(line)
    named = None if hardware is None else Hardware.named(str(hardware))
    sizes = parse_tokens_per_rank(sizes_text(options.get("tokens_per_rank")))
    return judge_plan(
        path,
        trace,
        selection=selected(options),
        table_path=as_path(options.get("table")),
        shapes=batch_shapes(sizes, options.get("batching")),
        baselines=options.get("baseline"),
        servings=[
            Serving(
                engine=one,
                replica_choice=plan.choose_replicas(one, choice, command),
                hardware=named,
                expert=find_expert_shape(
                    model, hidden_size or width, expert_size, weight_bytes, one
                ),
                hidden_size=hidden_size,
            )
            for one in engines
        ],
        progress=progress,
    )


def compare(
    plans: Sequence[Plan] | Mapping[str, Plan],
    trace: Trace,
    **options: Unpack[SimulateArguments],
) -> "DataFrame":
    """Compare plans with each other, and with baselines at equal slots, on one trace.

    Parameters
    ----------
    plans
        By the names to show; of a list, the names of their files, else ``plan 1`` and on.
    trace
        What to measure on: sequences that no plan was solved on.
    **options
        Those of ``placer simulate``: :class:`placer.SimulateArguments`. Baselines are
        ``contiguous`` and ``eplb`` by default.

    Returns
    -------
    DataFrame
        The columns of :meth:`placer.Simulation.to_frame` for the policy that each plan was
        solved for, and ``ranks``, ``nodes``, ``redundant_experts``. Baselines come first,
        once for each number of ranks and slots. Where plans have baselines with other
        figures, as those of other profiles, ``eplb (NAME)`` is the first that plan has.

    Raises
    ------
    PlacerError
        As :meth:`placer.Plan.simulate`.
    UsageError
        If there is no plan, two have one name, or one has the name of a baseline.

    Examples
    --------
    >>> import placer
    >>> trace = placer.open("traces/demo/traces/final")
    >>> plan = placer.solve(trace, gpus_per_node=4, fold="0/2", num_sweeps=0, proof="none")
    >>> list(placer.compare({"mine": plan}, trace, not_fold="0/2")["placement"])
    ['contiguous', 'eplb', 'mine']
    """
    from pandas import concat

    named = plans if isinstance(plans, Mapping) else _named(plans)
    if not named:
        raise UsageError("there is no plan to compare", "give one or more plans")
    if taken := sorted(BASELINES.keys() & named.keys()):
        raise UsageError(
            f"a plan has the name {taken[0]}, which is a baseline's",
            f"name it otherwise: placer.compare({{'my {taken[0]}': plan}}, trace)",
        )
    options = {"baseline": ["contiguous", "eplb"], **options}
    parts = []
    for name, plan in named.items():
        found = simulate(plan, trace, **options)
        frame, first = found.to_frame(), found.judgements[0]
        is_plan = frame["placement"] == PLAN
        wanted = is_plan.map({True: first.sent_policy, False: first.policy})
        frame["is_plan"], frame["of"] = is_plan, name
        frame = frame[frame["policy"] == wanted].replace({"placement": {PLAN: name}})
        frame.insert(0, "redundant_experts", plan.redundant_experts)
        frame.insert(0, "nodes", plan.num_nodes)
        frame.insert(0, "ranks", plan.num_ranks)
        parts.append(frame)
    every = concat(parts, ignore_index=True)
    every = every[~every.drop(columns="of").duplicated()]
    alike = every.duplicated(_SAME_ROW, keep=False)
    every.loc[alike, "placement"] += " (" + every["of"] + ")"
    ordered = every.sort_values("is_plan", kind="stable").drop(columns=["is_plan", "of"])
    return ordered.reset_index(drop=True)


def _named(plans: Sequence[Plan]) -> dict[str, Plan]:
    names = [
        f"plan {n}" if one.path is None else one.path.stem for n, one in enumerate(plans, 1)
    ]
    if len(set(names)) < len(names):
        raise UsageError(
            f"two plans have the name {max(names, key=names.count)}",
            "name them: placer.compare({'a': one, 'b': other}, trace)",
        )
    return dict(zip(names, plans, strict=True))


def _engine_name(judgement: Judgement) -> str | None:
    engine = judgement.serving.engine
    return None if engine is None else engine.name


def _untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "time"}

"""From what a user asks of a plan to the plan: what ``placer solve`` does.

Some options mean nothing without others, some are decided by an engine, and some are left
to be chosen on the profile: the number of redundant experts, and what to solve for where
time is the objective. All of it is settled here; ``plan`` then solves.
"""

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from placer.affinity import (
    Affinity,
    count_affinity,
)
from placer.errors import (
    NotProvedError,
    UsageError,
    require_left_out,
)
from placer.model import (
    ModelSpec,
    require_same_model,
)
from placer.placement.placement import Placement
from placer.placement.plan import Plan
from placer.placement.world import WorldLayout
from placer.planning.cap_choice import (
    CapChoice,
    choose_cap,
)
from placer.planning.frontier import (
    FrontierPoint,
    write_frontier,
)
from placer.planning.layer_time import (
    TimeChoice,
    choose_by_time,
    worth_by_time,
)
from placer.planning.planner import (
    plan_from_affinity,
    plan_from_trace,
)
from placer.planning.question import (
    Question,
    plain_engine,
)
from placer.planning.redundant import (
    LEAST_GAIN,
    Memory,
    RedundantChoice,
    choose_redundant_experts,
    ladder_line,
    worth_on_profile,
)
from placer.planning.served import (
    Loading,
    Served,
    require_loadable,
    solved_for,
)
from placer.run.deadline import Deadline
from placer.run.files import read_json
from placer.run.progress import Progress
from placer.simulation.cost import (
    ExpertShape,
    find_expert_shape,
    require_no_sizes,
)
from placer.solver.balance.router_groups import (
    are_whole,
    limits_nodes,
)
from placer.solver.options import SolveOptions
from placer.target.engine import Engine
from placer.target.hardware import Hardware
from placer.trace import (
    EVERYTHING,
    Selection,
    Trace,
)
from placer.trace.doubts import (
    doubtful_follow,
    doubts,
)

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveRequest:
    """What is asked of a plan; ``None`` is what nobody asked for.

    Attributes
    ----------
    source
        A trace, or an affinity file.
    selection
        The tokens to profile.
    options
        What to solve for, but for what the other fields decide.
    objective
        ``traffic``, ``balance`` or ``time``.
    engine
        Name of the engine that the plan is for.
    exchange, replica_choice
        As in ``SolveOptions``. From counts, without an engine, copies share their load
        evenly, as ``hash`` has it.
    max_imbalance, overflow_price
        As in ``SolveOptions``.
    redundant_experts
        Slots per layer beyond one for each expert; ``None`` to choose their number.
    redundant_gain, redundant_memory
        What a step of that choice must save, and GiB that they may take on a rank.
    hardware
        Name or file of the hardware whose time is predicted.
    model, hidden_size, expert_size, weight_bytes
        What sizes an expert, as in ``find_expert_shape``.
    start
        Path of the plan to improve.
    migration_cost
        As in ``SolveOptions``.
    layout
        How expert-parallel groups lie in a larger world.
    priced_links
        Whether costs of links were given.
    require_optimal
        Whether a plan without a proof of optimality is an error.
    holds_loads_alone
        Whether the source knows neither tokens nor pairs of experts.

    Raises
    ------
    UsageError
        If the objective is not known, or an option is given without what it belongs to.
    """

    source: Path
    selection: Selection
    options: SolveOptions
    objective: str = "traffic"
    engine: str | None = None
    exchange: str | None = None
    replica_choice: str | None = None
    max_imbalance: float | None = None
    overflow_price: float | None = None
    redundant_experts: int | None = 0
    redundant_gain: float | None = None
    redundant_memory: float | None = None
    hardware: str | None = None
    model: Path | None = None
    hidden_size: int | None = None
    expert_size: int | None = None
    weight_bytes: float | None = None
    start: Path | None = None
    migration_cost: float = 0.0
    layout: WorldLayout | None = None
    priced_links: bool = False
    require_optimal: bool = False
    holds_loads_alone: bool = field(init=False)

    def __post_init__(self) -> None:
        alone = self.holds_counts and not Affinity.read(self.source).has_links
        object.__setattr__(self, "holds_loads_alone", alone)
        if self.objective not in (known := ("traffic", "balance", "time")):
            raise UsageError(
                f"--objective {self.objective} cannot be solved for",
                f"choose {' or '.join(known)}",
            )
        auto = {
            "--redundant-memory": self.redundant_memory,
            "--redundant-gain": self.redundant_gain,
        }
        for options, is_given, company in (
            (
                {"--hardware": self.hardware},
                self.by_time or self.chooses_cap,
                self._predicts_time,
            ),
            (auto, self.redundant_experts is None, "--redundant-experts auto"),
            (
                {"--overflow-price": self.overflow_price},
                self.options.robust != "none",
                "--robust bootstrap or domains",
            ),
            (
                {"--replica-choice": self.replica_choice},
                self.has_replicas,
                "--redundant-experts: without them each expert has one copy",
            ),
        ):
            if not is_given:
                require_left_out(options, company)
        if not self.weighs_experts:
            require_no_sizes(
                self.model,
                self.hidden_size,
                self.expert_size,
                self.weight_bytes,
                "--hardware or --redundant-memory",
            )

    @property
    def _predicts_time(self) -> str:
        """What ``--hardware`` is for, and why it decides nothing here."""
        if self.holds_counts:
            return "the tokens of a trace: counts do not tell how long batches take"
        if self.objective == "balance":
            return "--objective time: --objective balance does not predict time"
        return "--objective time: a load cap that is given leaves nothing to predict"

    @property
    def by_time(self) -> bool:
        """Whether predicted time is the objective."""
        return self.objective == "time"

    @property
    def chooses_cap(self) -> bool:
        """Whether predicted time decides whether a rank may be busier than EPLB's."""
        is_open = self.objective == "traffic" and self.max_imbalance is None
        return self.hardware is not None and is_open and not self.holds_counts

    @property
    def weighs_experts(self) -> bool:
        """Whether the size of an expert counts."""
        return self.by_time or self.chooses_cap or self.redundant_memory is not None

    @property
    def has_replicas(self) -> bool:
        """Whether redundant experts are asked for, or their number is to be chosen."""
        return self.redundant_experts != 0

    @property
    def holds_counts(self) -> bool:
        """Whether the source is an affinity file, which has no tokens."""
        return self.source.is_file()


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """A plan, and how its options were chosen.

    Attributes
    ----------
    plan
        The plan.
    time
        Why it was solved as it was, where time is the objective; else ``None``.
    """

    plan: Plan
    time: TimeChoice | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settled:
    """Options that nothing is left to decide of, and what plans should say of them."""

    options: SolveOptions
    question: Question | None
    provenance: Mapping[str, Any] = field(default_factory=dict)


def solve_request(
    request: SolveRequest,
    note: Tell,
    warn: Tell,
    progress: Progress | None = None,
    deadline: Deadline | None = None,
) -> Solved:
    """Return the plan that is asked for.

    Parameters
    ----------
    request
        What is asked.
    note, warn
        Told what to know of it, one sentence each.
    progress
        Told each step of a search.
    deadline
        When to stop; by default, the options' ``time_limit`` from now.

    Raises
    ------
    PlacerError
        If the trace is damaged, or the plan to start from is another model's.
    UsageError
        If options contradict each other or the source.
    NoSolutionError
        If the load cap is out of reach, or the cap on received copies was not reached.
    NotProvedError
        If a proof of optimality is required and there is none.
    """
    deadline = deadline or Deadline(seconds=request.options.time_limit)
    settled = _settle(request, note, warn, progress, deadline)
    options, provenance, time = settled.options, dict(settled.provenance), None
    if settled.question is not None:
        choice = _choose(request, options, settled.question, progress, deadline)
        if isinstance(choice, TimeChoice):
            time = choice
        options = choice.options
        provenance["cap_by_time" if time is None else "time"] = choice.to_json()
        if choice.told is not None:
            note(choice.told)
    if not request.holds_counts:
        trace = Trace(request.source)
        plan = plan_from_trace(trace, options, request.selection, progress, deadline)
    elif request.selection == EVERYTHING:
        plan = plan_from_affinity(request.source, options, progress, deadline)
    else:
        raise UsageError(
            f"{request.source} holds counts, of which no tokens can be selected any more",
            "select when counting: placer affinity TRACE "
            f"{request.selection.options} --out AFFINITY",
        )
    if _is_balanced(request, options):
        _tell_groups(plan, request.engine, options, note, warn)
    report = plan.solver
    if request.require_optimal and report.status != "optimal":
        raise NotProvedError(
            f"no proof of optimality: objective {report.objective:g}, "
            f"bound {report.bound}, gap {report.gap}",
            "solve without --require-optimal to get the best plan found",
        )
    return Solved(
        plan=replace(plan, provenance={**plan.provenance, **provenance}), time=time
    )


def _choose(
    request: SolveRequest,
    options: SolveOptions,
    question: Question,
    progress: Progress | None,
    deadline: Deadline,
) -> TimeChoice | CapChoice:
    """Choose by predicted time what to solve for, or the load cap alone."""
    trace = Trace(request.source)
    profile = trace.read(request.selection)
    choose = choose_by_time if request.by_time else choose_cap
    with deadline.choosing() as quick:
        return choose(trace.model, profile, options, question, progress, quick)


def solve_frontier(
    request: SolveRequest,
    caps: list[float],
    out: Path,
    note: Tell,
    warn: Tell,
    progress: Progress | None = None,
    deadline: Deadline | None = None,
) -> list[FrontierPoint]:
    """Solve what is asked under each of several load caps; write the plans to ``out``.

    Parameters
    ----------
    request
        What is asked; redundant experts are chosen under the loosest cap.
    caps
        Ascending.
    out
        Directory to write.
    note, warn, progress, deadline
        As in :func:`solve_request`.

    Raises
    ------
    PlacerError
        As :func:`solve_request` does.
    UsageError
        If one plan or one cap is asked for too, or tokens are not what is solved on.
    """
    if request.require_optimal:
        raise UsageError(
            "--require-optimal is about one plan, --frontier writes several",
            "drop one; frontier.csv has the bound of each",
        )
    if request.max_imbalance is not None:
        raise UsageError(
            f"--max-imbalance {request.max_imbalance:g} is one load cap, --frontier has "
            "its own",
            "drop one of them",
        )
    if request.holds_counts:
        raise UsageError(
            "--frontier trades traffic for balance: it needs the tokens of a trace",
            "solve from the trace itself: placer solve TRACE --frontier CAPS "
            "--gpus-per-node M --out DIR",
        )
    if request.objective != "traffic":
        raise _no_frontier(f"--objective {request.objective}")
    deadline = deadline or Deadline(seconds=request.options.time_limit)
    loosest = replace(request, max_imbalance=caps[-1])
    settled = _settle(loosest, note, warn, progress, deadline)
    if settled.options.objective != "traffic":
        raise _no_frontier(f"--engine {request.engine}")
    points = write_frontier(
        Trace(request.source),
        settled.options,
        request.selection,
        caps,
        out,
        progress,
        settled.provenance,
        deadline,
    )
    if not all(point.reproducible for point in points):
        warn("stopped: some plans are the best so far, see reproducible")
    if left := caps[len(points) :]:
        warn(f"stopped: no plan for {', '.join(f'{cap:g}' for cap in left)}")
    return points


def _no_frontier(option: str) -> UsageError:
    return UsageError(
        f"--frontier trades traffic for balance under load caps, {option} does not",
        f"drop --frontier or {option}",
    )


def _settle(
    request: SolveRequest,
    note: Tell,
    warn: Tell,
    progress: Progress | None,
    deadline: Deadline,
) -> _Settled:
    """Decide what engine, start and profile decide."""
    objective = "traffic" if request.by_time else request.objective
    if request.holds_loads_alone and request.engine is not None and not request.by_time:
        objective = "balance"
    loading = _loading(request)
    served = solved_for(
        request.engine,
        request.options.policy,
        objective,
        request.exchange,
        request.replica_choice or _even_choice(request),
        has_replicas=request.has_replicas,
        command=_command(request),
    )
    for line in (*served.notes, *loading.notes, *_without_effect(request, served)):
        note(line)
    if request.replica_choice is None and _even_choice(request) is not None:
        note(
            "no engine is named: copies of an expert are taken to share its load evenly, "
            "as under --replica-choice hash"
        )
    if request.holds_loads_alone and request.objective == "traffic":
        note("loads alone say nothing of traffic: the load is balanced")
    if request.layout is not None:
        note(request.layout.describe())
    if not request.holds_counts:
        trace = Trace(request.source)
        doubtful = doubtful_follow(trace, request.options.policy)
        for line in (*doubts(trace, request.selection), *doubtful):
            warn(line)
    options = _options(request, served, _served_now(request, warn))
    if loading.keeps_groups:
        options = _whole_groups(request, options, note)
    if request.options.ignore_groups and not _is_balanced(request, options):
        raise UsageError(
            "--ignore-groups is about balancing: plans for traffic split router groups "
            "wherever that pays",
            "drop it, or balance alone: --objective balance",
        )
    if not request.by_time:  # which has a comparison with EPLB of its own
        options = options.guarded()
    by_time = request.by_time and served.objective == "traffic"
    if by_time and request.holds_counts:
        raise UsageError(
            f"{request.source} holds counts; --objective time needs tokens",
            "solve from the trace itself: placer solve TRACE --gpus-per-node M --out PLAN",
        )
    chooses_cap = request.chooses_cap and options.below_eplb
    if request.chooses_cap and options.content_policy is not None:
        chooses_cap = False
        note(
            f"--hardware decides nothing here: batches of --policy {options.policy} cannot "
            "be predicted"
        )
    elif request.chooses_cap and not chooses_cap:
        note(
            "--hardware decides nothing here: no plan is compared with EPLB's busiest rank"
        )
    weighs = by_time or chooses_cap or request.redundant_memory is not None
    expert = _expert_shape(request) if weighs else None
    if expert is not None and expert.assumption is not None:
        note(expert.assumption)
    question = None
    if by_time or chooses_cap:
        question = Question(
            topology=options.topology,
            policy=options.policy,
            engine=plain_engine("token all-to-all", options.exchange)
            if request.engine is None
            else Engine.named(request.engine),
            hardware=None if request.hardware is None else Hardware.named(request.hardware),
            expert=expert,
        )
    provenance: dict[str, Any] = (
        {} if request.engine is None else {"engine": request.engine}
    )
    if request.redundant_experts is None:
        with deadline.choosing() as quick:
            by = question if by_time else None
            chosen = _choose_redundant(request, options, by, expert, progress, quick)
        options = replace(options, redundant_experts=chosen.redundant_experts)
        note(ladder_line(chosen))
        provenance["redundant_experts"] = chosen.to_json()
    if request.layout is not None:
        provenance["layout"] = request.layout.to_json()
    return _Settled(options=options, question=question, provenance=provenance)


def _loading(request: SolveRequest) -> Loading:
    """Refuse what the engine could not load; return how it loads the plan."""
    if request.engine is None:
        return Loading()
    config: Mapping[str, Any] = {}
    if request.model is not None:
        config = read_json(request.model / "config.json", "model config")
    return require_loadable(
        Engine.named(request.engine),
        _model_of(request),
        config.get("architectures") or (),
        has_replicas=request.has_replicas,
        topology=request.options.topology,
    )


def _whole_groups(request: SolveRequest, options: SolveOptions, note: Tell) -> SolveOptions:
    """Keep router groups whole, as a permuted checkpoint must, where that can be had."""
    given = options.start is not None or options.pins or request.options.ignore_groups
    from_pairs = request.holds_counts and not _is_balanced(request, options)
    if given or from_pairs:
        note(
            "a permuted checkpoint must keep router groups whole, and this plan may not: "
            "the export refuses it then"
        )
        return options
    note("router groups are kept whole, as a permuted checkpoint must (--preserve-groups)")
    return replace(options, preserve_groups=True, ignore_groups=False)


def _even_choice(request: SolveRequest) -> str | None:
    """Return how copies share a load of which counts alone are known; ``None`` to ask."""
    is_even = request.holds_counts and request.has_replicas and request.engine is None
    return "hash" if is_even else None


def _command(request: SolveRequest) -> str:
    """Return the request as a command, but for what a hint about copies leaves out."""
    topology, number = request.options.topology, request.redundant_experts
    words = ["placer", "solve", str(request.source)]
    words += ["--nodes", str(topology.num_nodes)]
    words += ["--gpus-per-node", str(topology.gpus_per_node)]
    words += ["--policy", request.options.policy]
    words += ["--redundant-experts", "auto" if number is None else str(number)]
    return shlex.join([*words, "--out", "PLAN"])


def _options(
    request: SolveRequest, served: Served, start: Placement | None
) -> SolveOptions:
    """Complete the options; those that nobody asked for keep their defaults."""
    asked = {
        name: value
        for name in ("max_imbalance", "overflow_price")
        if (value := getattr(request, name)) is not None
    }
    return replace(
        request.options,
        # SolveOptions refuses names that it does not know.
        objective=served.objective,  # type: ignore[arg-type]
        exchange=served.exchange,  # type: ignore[arg-type]
        replica_choice=served.replica_choice,  # type: ignore[arg-type]
        redundant_experts=request.redundant_experts or 0,
        ignore_groups=request.options.ignore_groups
        or not (served.groups_count or request.options.preserve_groups),
        start=start,
        migration_cost=request.migration_cost,
        **asked,
    )


def _is_balanced(request: SolveRequest, options: SolveOptions) -> bool:
    """Return whether load is all that is solved for."""
    return options.objective == "balance" or request.holds_loads_alone


def _tell_groups(
    plan: Plan, engine: str | None, options: SolveOptions, note: Tell, warn: Tell
) -> None:
    """Tell what router groups on nodes cost, or what it means that they are split."""
    model, num_nodes = plan.model, plan.placement.num_nodes
    split = plan.solver.imbalance_without_groups
    if split is not None:
        note(
            f"router groups stay whole: imbalance {plan.solver.objective:.4f}, "
            f"{split:.4f} if they are split"
            + ("" if options.preserve_groups else " (--ignore-groups)")
        )
    elif num_nodes == 1 or not limits_nodes(model):
        return
    elif engine is not None and not solved_for(engine, plan.policy).groups_count:
        note(f"{engine} sends each pair, or all tokens: router groups need not stay whole")
    elif not are_whole(plan.placement, model.n_group, num_nodes):
        uneven = model.n_group % num_nodes
        warn(
            f"the {model.n_group} router groups are split over {num_nodes} nodes"
            + (", which do not divide them" if uneven else "")
            + f": a token may visit more nodes than the {model.topk_group} groups that its "
            "router chooses"
        )


def _without_effect(request: SolveRequest, served: Served) -> Iterator[str]:
    if request.priced_links and served.objective == "balance":
        yield (
            "balancing evens out the load whatever links cost: their costs only price the "
            "copies of the plan"
        )


def _served_now(request: SolveRequest, warn: Tell) -> Placement | None:
    """Return the placement to start from, which must be of the source's model."""
    if request.start is None:
        return None
    now, start, source = Plan.read(request.start), str(request.start), str(request.source)
    matched = require_same_model(now.model, start, _model_of(request), source)
    if matched is not None:
        warn(matched)
    return now.placement


def _expert_shape(request: SolveRequest) -> ExpertShape | None:
    return find_expert_shape(
        request.model,
        request.hidden_size or _model_of(request).hidden_size,
        request.expert_size,
        request.weight_bytes,
        () if request.engine is None else (Engine.named(request.engine),),
    )


def _model_of(request: SolveRequest) -> ModelSpec:
    if request.holds_counts:
        return Affinity.read(request.source).model
    return Trace(request.source).model


def _choose_redundant(
    request: SolveRequest,
    options: SolveOptions,
    question: Question | None,
    expert: ExpertShape | None,
    progress: Progress | None,
    deadline: Deadline,
) -> RedundantChoice:
    """Climb by the objective on the profile, or by the time that a question asks for."""
    memory = Memory.of(expert, request.redundant_memory)
    if request.holds_counts:
        affinity, profile = Affinity.read(request.source), None
    else:
        trace = Trace(request.source)
        affinity = count_affinity(trace.chunks(request.selection), trace.model, {})
        profile = trace.read(request.selection)
    if question is not None and profile is not None:
        worth = worth_by_time(affinity.model, profile, question)
    else:
        worth = worth_on_profile(affinity, profile)
    gain = LEAST_GAIN if request.redundant_gain is None else request.redundant_gain
    sizes = affinity.model.num_experts
    return choose_redundant_experts(sizes, options, worth, memory, gain, progress, deadline)

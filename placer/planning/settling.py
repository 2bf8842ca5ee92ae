"""The options that an engine, a start and the profile decide.

Some options mean nothing without others, some are decided by an engine, and the number of
redundant experts may be left to be chosen on the profile.
"""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from placer.affinity import Affinity, count_affinity
from placer.errors import UsageError
from placer.model import ModelSpec, require_same_model
from placer.planning.engine_options import (
    EngineOptions,
    Loading,
    architectures_of,
    require_loadable,
    solved_for,
)
from placer.planning.layer_time import worth_by_time
from placer.planning.phases import phase_warning
from placer.planning.question import Question, plain_engine, predictable_policy
from placer.planning.redundant import (
    LEAST_GAIN,
    Memory,
    RedundantChoice,
    choose_redundant_experts,
    ladder_line,
    worth_on_profile,
)
from placer.planning.request import SolveRequest, Tell
from placer.run.session import Session
from placer.simulation.cost import ExpertShape, find_expert_shape
from placer.solver.balance.router_groups import blocks_of_groups
from placer.solver.options import SolveOptions
from placer.target.engine import Engine, solvable_choice
from placer.target.hardware import Hardware
from placer.trace import Trace
from placer.trace.doubts import doubtful_follow, doubts


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """Settled options: only predicted time is left to decide.

    Attributes
    ----------
    options
        What to solve for.
    question
        What predicted time is asked, where it decides; else ``None``.
    provenance
        What plans should say next to their own.
    """

    options: SolveOptions
    question: Question | None
    provenance: Mapping[str, Any] = field(default_factory=dict)


def settle(
    request: SolveRequest,
    note: Tell,
    warn: Tell,
    session: Session,
) -> Settled:
    """Decide what engine, start and profile decide.

    Parameters
    ----------
    request
        What is asked.
    note, warn
        Called with what to know of it, one sentence each.
    session
        Reports each quick plan; its deadline is that of the choice of a number of redundant
        experts.

    Raises
    ------
    PlacerError
        If the trace is damaged, or the plan to start from is another model's.
    UsageError
        If options contradict each other or the source.
    """
    loading, served = _loading(request), _served(request)
    for line in (*served.notes, *loading.notes, *_told(request, served)):
        note(line)
    for line in _doubts(request):
        warn(line)
    options = _options(request, served, loading, note, warn)
    question, expert = _question(request, options, note)
    provenance: dict[str, Any] = (
        {} if request.engine is None else {"engine": request.engine}
    )
    if request.chooses_redundant:
        by = question if request.by_time else None
        with session.choosing() as quick:
            chosen = _choose_redundant(request, options, by, expert, quick)
        goal = replace(options.goal, redundant_experts=chosen.redundant_experts)
        options = replace(options, goal=goal)
        note(ladder_line(chosen))
        provenance["redundant_experts"] = chosen.to_json()
    if request.layout is not None:
        provenance["layout"] = request.layout.to_json()
    return Settled(options=options, question=question, provenance=provenance)


def started(request: SolveRequest, note: Tell) -> SolveRequest:
    """Return the request for the engine of the plan to start from, unless one is named."""
    now, goal = request.served_now, request.options.goal
    if now is None:
        return request
    before, choice = now.plan.engine, now.plan.recorded_choice
    if before is None and request.engine is None and request.has_replicas:
        if choice is None or goal.replica_choice is not None:
            return request
        note(f"solved for --replica-choice {choice}, as recorded in {now.path}")
        return request.with_goal(replace(goal, replica_choice=solvable_choice(choice)))
    if before is None or before.name == request.engine:
        return request
    names_wire = goal.exchange is not None or goal.replica_choice is not None
    if request.engine is None and not names_wire:
        note(f"solved for --engine {before.name}, as recorded in {now.path}")
        return replace(request, engine=before.name)
    other = "no engine" if request.engine is None else f"--engine {request.engine}"
    note(f"solved for {other}, but {now.path} was solved for --engine {before.name}")
    return request


def _loading(request: SolveRequest) -> Loading:
    """Refuse what the engine could not load; return how it loads the plan."""
    if request.engine is None:
        return Loading()
    return require_loadable(
        Engine.named(request.engine),
        model_of(request),
        architectures_of(request.model),
        redundant_experts=request.redundant_experts,
        topology=request.options.topology,
    )


def _served(request: SolveRequest) -> EngineOptions:
    """Return what is solved for, as the engine or else the options have it."""
    goal = request.options.goal
    objective = goal.objective
    if request.holds_loads_alone and request.engine is not None and not request.by_time:
        objective = "balance"
    return solved_for(
        request.engine,
        goal.policy,
        objective,
        goal.exchange,
        goal.replica_choice or _even_choice(request),
        has_replicas=request.has_replicas,
        command=_command(request, str(request.source)),
    )


def _doubts(request: SolveRequest) -> Iterator[str]:
    """Yield what may be wrong with the nodes of an engine and the tokens of a trace."""
    if request.engine is not None:
        nodes = request.options.topology
        doubt = Engine.named(request.engine).doubt(nodes.num_nodes, nodes.gpus_per_node)
        if doubt is not None:
            yield doubt
    if request.holds_counts:
        return
    trace = Trace(request.source)
    yield from doubts(trace, request.selection)
    yield from doubtful_follow(trace, request.options.goal.policy)
    if request.engine is not None:
        phases = Engine.named(request.engine).phases
        other = phase_warning(trace, request.selection, phases)
        # A plan for one of an engine's phases is made only from its tokens.
        if other is not None and len(phases) == 1:
            yield other


def _whole_groups(request: SolveRequest, options: SolveOptions, note: Tell) -> SolveOptions:
    """Keep router groups whole, as a permuted checkpoint must.

    Raises
    ------
    UsageError
        If something is asked for that may split them: the export would refuse the plan.
    """
    splitting = {
        "--ignore-groups": request.options.start.ignore_groups,
        "--start": options.start.placement is not None,
        "--pin": bool(options.start.pins),
    }
    for option in (name for name, is_given in splitting.items() if is_given):
        raise UsageError(
            f"{option} may split router groups, and --engine {request.engine} serves a "
            "permuted checkpoint, which keeps them whole",
            f"drop {option}",
        )
    note(
        "router groups are kept whole (--preserve-groups), because a permuted checkpoint "
        "needs it"
    )
    start = replace(options.start, preserve_groups=True, ignore_groups=False)
    return replace(options, start=start)


def _require_no_tokens(request: SolveRequest, options: SolveOptions) -> None:
    """Refuse what needs more than pairs of experts; offer to balance the load."""
    if (option := options.needs_tokens) is None:
        return
    engine = [] if request.engine is None else ["--engine", request.engine]
    hint = f"solve from the trace itself: {_command(request, 'TRACE', *engine)}"
    per_rank = replace(options.goal, exchange="per-rank")
    if replace(options, goal=per_rank).only_for_traffic is None:
        balance = _command(request, str(request.source), *engine, "--objective", "balance")
        hint += f"; or balance the load: {balance}"
    raise UsageError(f"{option} needs the tokens of a trace, not only counts", hint)


def _even_choice(request: SolveRequest) -> str | None:
    """Return how copies share a load of which only counts are known; ``None`` to ask."""
    is_even = request.holds_counts and request.has_replicas and request.engine is None
    return "hash" if is_even else None


def _command(request: SolveRequest, source: str, *more: str) -> str:
    """Return the request as a command, except for what the hints are about."""
    topology, number = request.options.topology, request.redundant_experts
    goal, now = request.options.goal, request.served_now
    words = ["placer", "solve", source, *more]
    words += ["--nodes", str(topology.num_nodes)]
    words += ["--gpus-per-node", str(topology.gpus_per_node)]
    words += goal.words
    words += ["--redundant-experts", "auto" if number is None else str(number)]
    for option, value in {
        "--replica-choice": goal.replica_choice,
        "--start": None if now is None else now.path,
    }.items():
        words += [] if value is None else [option, str(value)]
    words += ["--preserve-groups"] * request.options.start.preserve_groups
    return shlex.join([*words, "--out", "PLAN"])


def _options(
    request: SolveRequest, served: EngineOptions, loading: Loading, note: Tell, warn: Tell
) -> SolveOptions:
    """Complete the options; refuse those that the source or the objective cannot serve."""
    _require_same_model(request, warn)
    options = _completed(request, served)
    if loading.keeps_groups:
        options = _whole_groups(request, options, note)
    if not is_balanced(request, options):
        if request.holds_counts:
            _require_no_tokens(request, options)
        if request.options.start.ignore_groups:
            raise UsageError(
                "--ignore-groups is only for balancing: plans for traffic may split "
                "router groups anyway",
                "drop it, or only balance: --objective balance",
            )
    # Predicted time has a comparison with EPLB of its own.
    return options if request.by_time else options.guarded()


def _completed(request: SolveRequest, served: EngineOptions) -> SolveOptions:
    """Complete the options by what the engine decides."""
    options, start = request.options, request.options.start
    goal = replace(
        options.goal,
        objective=served.objective,
        exchange=served.exchange,
        replica_choice=served.replica_choice,
    )
    split = not (served.groups_count or start.preserve_groups)
    start = replace(start, ignore_groups=start.ignore_groups or split)
    return replace(options, goal=goal, start=start)


def is_balanced(request: SolveRequest, options: SolveOptions) -> bool:
    """Return whether load is all that is solved for."""
    return options.goal.objective == "balance" or request.holds_loads_alone


def _told(request: SolveRequest, served: EngineOptions) -> Iterator[str]:
    """Yield what to know of a request that is served otherwise than it may look."""
    if request.priced_links and served.objective == "balance":
        sends = None if request.engine is None else Engine.named(request.engine).dispatch
        is_priced = sends is None or sends.exchange == served.exchange
        effect = "only price the copies of the plan" if is_priced else "have no effect"
        yield f"balancing ignores link costs: they {effect}"
    if request.options.goal.replica_choice is None and _even_choice(request) is not None:
        yield (
            "no engine is named: placer assumes that replicas share their expert's load "
            "evenly, as under --replica-choice hash"
        )
    if request.holds_loads_alone and request.objective == "traffic":
        yield "the source holds only loads, so the solver only balances"
    if request.layout is not None:
        yield request.layout.describe()


def _require_same_model(request: SolveRequest, warn: Tell) -> None:
    """Refuse a plan to start from that is not of the source's model."""
    if (now := request.served_now) is None:
        return
    model, source = model_of(request), str(request.source)
    matched = require_same_model(now.plan.model, str(now.path), model, source)
    if matched is not None:
        warn(matched)


def _question(
    request: SolveRequest, options: SolveOptions, note: Tell
) -> tuple[Question | None, ExpertShape | None]:
    """Return what predicted time is asked, and the size of an expert where that counts."""
    by_time = request.by_time and options.goal.objective == "traffic"
    if by_time and request.holds_counts:
        raise UsageError(
            f"{request.source} holds counts; --objective time needs tokens",
            "solve from the trace itself: placer solve TRACE --gpus-per-node M --out PLAN",
        )
    asks = by_time or _chooses_cap(request, options, note)
    expert = None
    if asks or request.redundant_memory is not None:
        expert = _expert_shape(request)
    if expert is not None and expert.assumption is not None:
        note(expert.assumption)
    if not asks:
        return None, expert
    question = Question(
        topology=options.topology,
        policy=predictable_policy(options.goal.policy),
        engine=plain_engine("token all-to-all", options.goal.counted)
        if request.engine is None
        else Engine.named(request.engine),
        hardware=None if request.hardware is None else Hardware.named(request.hardware),
        expert=expert,
    )
    return question, expert


def _chooses_cap(request: SolveRequest, options: SolveOptions, note: Tell) -> bool:
    """Return whether predicted time chooses the load cap; tell why it does not."""
    if not request.chooses_cap:
        return False
    if options.goal.content_policy is not None:
        note(
            "--hardware has no effect here: batches of --policy "
            f"{options.goal.policy} cannot be predicted"
        )
        return False
    if not options.goal.caps.below_eplb:
        note(
            "--hardware has no effect here: it decides whether a rank may be busier than "
            "under EPLB, and this solve does not use EPLB's load as its cap"
        )
    return options.goal.caps.below_eplb


def _expert_shape(request: SolveRequest) -> ExpertShape | None:
    return find_expert_shape(
        request.model,
        request.hidden_size or model_of(request).hidden_size,
        request.expert_size,
        request.weight_bytes,
        None if request.engine is None else Engine.named(request.engine),
    )


def model_of(request: SolveRequest) -> ModelSpec:
    """Return the model whose tokens or counts are solved on."""
    if request.holds_counts:
        return Affinity.read(request.source).model
    return Trace(request.source).model


def _choose_redundant(
    request: SolveRequest,
    options: SolveOptions,
    question: Question | None,
    expert: ExpertShape | None,
    session: Session,
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
    model = affinity.model
    return choose_redundant_experts(
        model.num_experts,
        options,
        worth,
        memory,
        gain,
        session,
        blocks_of_groups(model, options) if options.start.preserve_groups else 1,
    )

"""``placer solve``: from the request to the plan.

What is asked is settled first; where predicted time decides what to solve for, that is
chosen next; then it is solved.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from placer.errors import NotProvedError, UsageError
from placer.placement.plan import Plan
from placer.planning.cap_choice import CapChoice, choose_cap
from placer.planning.engine_options import solved_for, split_groups, whole_groups
from placer.planning.frontier import FrontierPoint, write_frontier
from placer.planning.layer_time import TimeChoice, choose_by_time
from placer.planning.planner import plan_for, plan_from_affinity, plan_from_trace
from placer.planning.question import Question
from placer.planning.request import SolveRequest, Tell
from placer.planning.settling import Settled, is_balanced, model_of, settle, started
from placer.run.session import Session
from placer.simulation.sent import sent_by
from placer.solver.balance.router_groups import are_whole, limits_nodes
from placer.solver.options import SolveOptions
from placer.target.engine import Engine
from placer.trace import EVERYTHING, Trace

# Fewer copies than this more are not worth a warning.
_CLEARLY_MORE = 1.005
_NODES = "remote_node_copies_per_token"


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


def solve_request(
    request: SolveRequest,
    note: Tell,
    warn: Tell,
    session: Session | None = None,
) -> Solved:
    """Return the requested plan.

    Parameters
    ----------
    request
        What is asked.
    note, warn
        Called with what to know of it, one sentence each.
    session
        Reports each step of a search; holds the deadline and the seed.

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
    session = session or Session()
    request = started(request, note)
    settled = settle(request, note, warn, session)
    session.tell(_opening(request, settled))
    options, provenance, time = settled.options, dict(settled.provenance), None
    if settled.question is not None:
        choice = _choose(request, options, settled.question, session)
        if isinstance(choice, TimeChoice):
            time = choice
        options = choice.options
        provenance["cap_by_time" if time is None else "time"] = choice.to_json()
        if choice.told is not None:
            note(choice.told)
    if not request.holds_counts:
        trace = Trace(request.source)
        plan = plan_from_trace(trace, options, request.selection, session)
    elif request.selection == EVERYTHING:
        plan = plan_from_affinity(request.source, options, session)
    else:
        raise UsageError(
            f"{request.source} holds counts: tokens can no longer be selected",
            "select when counting: placer affinity TRACE "
            f"{request.selection.options} --out AFFINITY",
        )
    _tell_groups(plan, request, options, note, warn)
    report = plan.solver
    if request.require_optimal and report.status != "optimal":
        raise NotProvedError(
            f"no proof of optimality: objective {report.objective:g}, "
            f"bound {report.bound}, gap {report.gap}",
            "solve without --require-optimal to get the best plan found",
        )
    return Solved(plan=plan_for(plan, provenance), time=time)


def _opening(request: SolveRequest, settled: Settled) -> str:
    """Say in words what is solved for."""
    options = settled.options
    goal, topology = options.goal, options.topology
    engine = None if request.engine is None else Engine.named(request.engine)
    what = "the load of the busiest rank"
    if request.by_time:
        what = f"the predicted time of a layer on {request.hardware}"
    elif goal.objective == "traffic":
        exchange = goal.exchange if engine is None else engine.dispatch.exchange
        sent = sent_by(exchange or "per-rank", topology.num_nodes)
        what = "copies sent" if sent is None else sent.words
    model = model_of(request)
    experts = ", ".join(map(str, dict.fromkeys(model.num_experts)))
    nodes = f"{topology.num_nodes} node{'s' * (topology.num_nodes > 1)}"
    slots = f" and {goal.redundant_experts} redundant" if goal.redundant_experts else ""
    told = (
        f"{model.num_layers} MoE layers of {experts} experts{slots} on "
        f"{topology.num_ranks} ranks ({nodes}); minimises {what}, compared with "
        "contiguous and EPLB"
    )
    return told if engine is None else f"{told}; {engine.name} can load the plan"


def _choose(
    request: SolveRequest,
    options: SolveOptions,
    question: Question,
    session: Session,
) -> TimeChoice | CapChoice:
    """Choose by predicted time what to solve for, or only the load cap."""
    trace = Trace(request.source)
    profile = trace.read(request.selection)
    choose = choose_by_time if request.by_time else choose_cap
    with session.choosing() as quick:
        return choose(trace.model, profile, options, question, quick)


def solve_frontier(
    request: SolveRequest,
    caps: list[float],
    out: Path,
    note: Tell,
    warn: Tell,
    session: Session | None = None,
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
    note, warn, session
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
            "--require-optimal is for one plan, --frontier writes several",
            "drop one; frontier.csv has the bound of each",
        )
    goal = request.options.goal
    goal.caps.require_no_load_cap("--frontier")
    if request.holds_counts:
        raise UsageError(
            "--frontier trades traffic for balance: it needs the tokens of a trace",
            "solve from the trace itself: placer solve TRACE --frontier CAPS "
            "--gpus-per-node M --out DIR",
        )
    if request.objective != "traffic":
        raise _no_frontier(f"--objective {request.objective}")
    session = session or Session()
    request = started(request, note)
    loosest = request.options.goal.under(caps[-1], relax=goal.caps.relax)
    settled = settle(request.with_goal(loosest), note, warn, session)
    if settled.options.goal.objective != "traffic":
        raise _no_frontier(f"--engine {request.engine}")
    points = write_frontier(
        Trace(request.source),
        settled.options,
        request.selection,
        caps,
        out,
        session,
        settled.provenance,
        warn,
    )
    if not all(point.reproducible for point in points):
        warn("stopped: some plans are only the best so far (reproducible is false)")
    solved = [point.max_imbalance for point in points]
    if left := [f"{cap:g}" for cap in caps if cap not in solved]:
        warn(
            f"stopped: no plan for {', '.join(left)}; give a longer --time-limit, or "
            "fewer caps"
        )
    return points


def _no_frontier(option: str) -> UsageError:
    return UsageError(
        f"--frontier trades traffic for balance under load caps, {option} does not",
        f"drop --frontier or {option}",
    )


def _tell_groups(
    plan: Plan, request: SolveRequest, options: SolveOptions, note: Tell, warn: Tell
) -> None:
    """Tell what router groups on nodes cost, or what it means that they are split."""
    model, num_nodes, engine = plan.model, plan.placement.num_nodes, request.engine
    if kept := whole_groups(plan.solver, preserved=options.start.preserve_groups):
        note(kept)
    elif num_nodes == 1 or not limits_nodes(model):
        return
    elif engine is not None and not solved_for(engine, plan.policy).groups_count:
        if is_balanced(request, options):
            note(f"router groups may be split: it does not change what {engine} sends")
    elif are_whole(plan.placement, model.n_group, num_nodes):
        return
    elif not is_balanced(request, options):
        _tell_split(plan, note, warn)
    else:
        if (said := split_groups(plan)) is not None:
            uneven = model.n_group % num_nodes
            warn(said + f" ({num_nodes} nodes do not divide the groups)" * bool(uneven))


def _tell_split(plan: Plan, note: Tell, warn: Tell) -> None:
    """Tell what a plan that splits router groups gains and costs, and the other option.

    A warning where a token visits more nodes than from the contiguous placement.
    """
    remedy = "To keep them whole (a rank may then be busier): --preserve-groups"
    told = (
        "router groups are split over nodes where the load cap, "
        f"{plan.max_imbalance:g}, needs it"
    )
    own = plan.metrics["heldout"] or plan.metrics["profile"]
    if own is None:
        note(f"{told}. {remedy}")
        return
    policy, baselines = plan.policy_without_table, plan.metrics["baselines"]
    # EPLB packs whole groups into nodes where these divide them.
    names = ["contiguous", *["eplb"] * (not plan.model.n_group % plan.placement.num_nodes)]
    whole = {name: baselines[name][policy] for name in names if name in baselines}
    beside = ", ".join(f"{_pair(one)} ({name})" for name, one in whole.items())
    told += (
        ". Copies between nodes per token and layer, and imbalance: "
        f"{_pair(own[policy])}; with whole groups {beside}. {remedy}"
    )
    base = whole.get("contiguous")
    if base is not None and own[policy][_NODES] > _CLEARLY_MORE * base[_NODES]:
        warn(f"tokens visit more nodes than from the contiguous placement: {told}")
    else:
        note(told)


def _pair(figures: Mapping[str, float]) -> str:
    return f"{figures[_NODES]:.3f} and {figures['load_imbalance_mean']:.3f}"

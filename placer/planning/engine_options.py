"""The options to solve with, so that an engine can serve the plan."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import gcd
from pathlib import Path

from placer.checkpoint.permutation import require_whole_groups
from placer.errors import PlacerError, UsageError, one_of
from placer.model import ModelSpec, read_config
from placer.placement import Placement, Plan, SolverReport
from placer.placement.topology import Topology
from placer.runtime_map.engine_family import known_families, without_replicas
from placer.solver.balance.router_groups import are_whole, limits_nodes, most_nodes
from placer.solver.goal import NOT_SOLVED, Objective
from placer.target.engine import (
    SOLVABLE_EXCHANGES,
    Engine,
    SolvableExchange,
    SolvableReplicaChoice,
    choose_replicas,
    engines_named,
    known_engines,
    solvable_choice,
)

# Splitting router groups for less is not worth a word: the next load differs by more.
_LEAST_GAIN = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The options of a solve that an engine decides.

    Attributes
    ----------
    objective, exchange, replica_choice
        As in ``Goal``.
    groups_count
        Whether a token costs less where its router groups are on few nodes.
    notes
        What the user should know, one sentence each.
    """

    objective: Objective
    exchange: SolvableExchange
    replica_choice: SolvableReplicaChoice | None
    groups_count: bool = True
    notes: tuple[str, ...] = ()


def solved_for(
    engine: str | None,
    policy: str,
    objective: Objective = "traffic",
    exchange: str | None = None,
    replica_choice: str | None = None,
    *,
    has_replicas: bool = False,
    command: str = "placer solve TRACE --gpus-per-node M --redundant-experts X --out PLAN",
) -> EngineOptions:
    """Return what to solve for; without an engine, what was asked or the defaults.

    Parameters
    ----------
    engine
        Name of an engine, or ``None``.
    policy
        Home policy.
    objective
        What was asked.
    exchange, replica_choice
        What was asked, or ``None``.
    has_replicas
        Whether there are redundant experts.
    command
        As ``choose_replicas`` takes it.

    Raises
    ------
    UsageError
        If the engine is not known, what was asked contradicts it, or nothing says which
        replica of a redundant expert serves.
    """
    if engine is None:
        return EngineOptions(
            objective=objective,
            exchange=one_of(
                "--exchange", exchange or "per-rank", SOLVABLE_EXCHANGES, NOT_SOLVED
            ),
            replica_choice=solvable_choice(
                choose_replicas(
                    None, replica_choice, has_replicas=has_replicas, command=command
                )
            ),
        )
    found = Engine.named(engine)
    notes = []
    effect = found.effect(policy, has_replicas=has_replicas)
    sent = found.dispatch.exchange
    if objective == "traffic" and not effect.changes_traffic:
        objective = "balance"
        notes.append(f"{engine}: {effect.reason}; so the load is balanced")
    elif objective == "traffic" and sent == "per-expert" and policy == "fixed":
        objective = "balance"
        notes.append(
            f"{engine}: {effect.reason}; so the load is balanced, and the busiest experts "
            "get replicas, as in EPLB"
        )
    nearest: SolvableExchange = next(
        (one for one in SOLVABLE_EXCHANGES if one == sent), "per-rank"
    )
    if objective == "traffic" and nearest != sent:
        notes.append(
            f"{engine} sends {sent}, which the solver does not support. The plan is "
            f"solved for {nearest} instead, and may send more pairs than EPLB's. To "
            f"compare: placer simulate PLAN TRACE --engine {engine}"
        )
    _require_agreement("--exchange", exchange, nearest, engine)
    choice = choose_replicas(found, None, has_replicas=has_replicas, command=command)
    _require_agreement("--replica-choice", replica_choice, str(choice), engine)
    return EngineOptions(
        objective=objective,
        # Of what is sent, balancing asks nothing.
        exchange="per-rank" if objective == "balance" else nearest,
        replica_choice=solvable_choice(choice) if has_replicas else None,
        groups_count=sent in SOLVABLE_EXCHANGES,
        notes=tuple(notes),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How an engine loads a plan.

    Attributes
    ----------
    keeps_groups
        Whether the plan must keep router groups whole, as a permuted checkpoint does.
    notes
        What the user should know, one sentence each.
    """

    keeps_groups: bool = False
    notes: tuple[str, ...] = ()


def require_loadable(
    engine: Engine,
    model: ModelSpec,
    architectures: Sequence[str] = (),
    *,
    redundant_experts: int | None,
    topology: Topology,
) -> Loading:
    """Refuse, before any search, what the engine could not load.

    Parameters
    ----------
    engine
        What the plan is for.
    model
        The model of the profile.
    architectures
        What its config names itself, where a checkpoint was given.
    redundant_experts
        Slots per layer beyond one for each expert; ``None`` for as many as pay.
    topology
        Ranks and nodes of the plan.

    Raises
    ------
    UsageError
        If the engine does not run on these nodes; or for an engine that loads no map of
        this model, redundant experts, or experts that only those would spread evenly: a
        permuted checkpoint holds none.
    """
    num_ranks = topology.num_ranks
    ranks = topology.num_nodes, topology.gpus_per_node
    if (misfit := engine.misfit(*ranks)) is not None:
        raise UsageError(
            f"--engine {engine.name} {misfit}",
            _fitting_ways(engine, topology, redundant_experts),
        )
    reason = _no_map_reason(engine, model, architectures)
    if reason is None:
        return Loading()
    none = f"{reason}, and a permuted checkpoint cannot hold redundant experts"
    uneven = [size for size in model.num_experts if size % num_ranks]
    if uneven:
        raise UsageError(
            f"{uneven[0]} experts do not divide over {num_ranks} ranks, and --engine "
            f"{engine.name} serves no replicas that could fill them: {none}",
            _even_ways(model, architectures),
        )
    if redundant_experts != 0:
        raise UsageError(
            f"{none}, so none could be served", without_replicas(engine.name, *ranks)
        )
    notes = []
    if engine.map_format != "checkpoint":
        notes.append(
            f"{reason}: serve the plan as a permuted checkpoint, "
            "placer export checkpoint PLAN MODEL --out DIR"
        )
    # DeepSpeed's checkpoints have gates without groups.
    keeps_groups = model.n_group > 1 and (
        engine.map_format != "checkpoint" or engine.group_rule == "router-groups"
    )
    return Loading(keeps_groups=keeps_groups, notes=tuple(notes))


def architectures_of(model: Path | None) -> Sequence[str]:
    """Return the architecture names in a checkpoint's config; none without a checkpoint."""
    if model is None:
        return ()
    return read_config(model).get("architectures") or ()


def servable(
    engines: Sequence[Engine], plan: Plan, architectures: Sequence[str] = ()
) -> tuple[list[Engine], list[str]]:
    """Leave out the engines that could not load a plan.

    The engine that it was solved for can. The second value says which engines are left out,
    and why.

    Raises
    ------
    UsageError
        If no engine is left.
    """
    kept, refused = [], []
    for engine in engines:
        try:
            if engine != plan.engine:
                _require_servable(engine, plan, architectures)
            kept.append(engine)
        except PlacerError as error:
            refused.append((engine, error))
    if not kept:
        raise UsageError(refused[0][1].message, refused[0][1].hint)
    return kept, [f"{engine.name} is left out: {error}" for engine, error in refused]


def _require_servable(engine: Engine, plan: Plan, architectures: Sequence[str]) -> None:
    placed = plan.placement
    topology = Topology(num_nodes=placed.num_nodes, gpus_per_node=placed.ranks_per_node)
    loading = require_loadable(
        engine,
        plan.model,
        architectures,
        redundant_experts=placed.redundant_experts,
        topology=topology,
    )
    if loading.keeps_groups:
        layers = range(plan.model.num_layers)
        require_whole_groups(plan.model, [placed.permutation(layer) for layer in layers])


def whole_groups(report: SolverReport, *, preserved: bool) -> str | None:
    """Say what it costs that balancing keeps router groups whole on nodes.

    ``preserved``: whether that was asked for. ``None`` where there is nothing to keep.
    """
    split = report.imbalance_without_groups
    if split is None:
        return None
    told = f"router groups stay whole: imbalance {report.objective:.4f}"
    if split < report.objective * (1 - _LEAST_GAIN):
        told += f", {split:.4f} if they are split"
        told += "" if preserved else " (--ignore-groups)"
    return told


def split_groups(plan: Plan) -> str | None:
    """Say how many nodes a token can visit from a plan: :func:`split_groups_of`."""
    said = split_groups_of(plan.model, plan.placement, plan.engine, plan.policy)
    if said is None:
        return None
    return f"{said}. To measure what this costs: placer simulate PLAN TRACE"


def split_groups_of(
    model: ModelSpec, placed: Placement, engine: Engine | None, policy: str
) -> str | None:
    """Say how many nodes a token can visit where router groups are split over nodes.

    ``None`` where they are whole, or the engine sends the same copies then.
    """
    if placed.num_nodes == 1 or not limits_nodes(model):
        return None
    if engine is not None and not solved_for(engine.name, policy).groups_count:
        return None
    split, whole = most_nodes(placed, model), min(model.topk_group, placed.num_nodes)
    if are_whole(placed, model.n_group, placed.num_nodes):
        return None
    visits = f"up to {split} nodes instead of {whole}"
    if split <= whole:
        visits = f"{split} nodes, and does so more often"
    return (
        f"the {model.n_group} router groups are split over {placed.num_nodes} nodes: a "
        f"token can then visit {visits}"
    )


def loads_map(engine: Engine, model: ModelSpec) -> bool:
    """Return whether an engine serves replicas of this model's experts from a map."""
    return _no_map_reason(engine, model, ()) is None


def _no_map_reason(
    engine: Engine, model: ModelSpec, architectures: Sequence[str]
) -> str | None:
    family = known_families()[engine.family]
    if engine.map_format == "checkpoint":
        return f"{family.title} loads no map"
    return family.no_map_reason(model.model_type, architectures)


def _fitting_ways(engine: Engine, topology: Topology, redundant: int | None) -> str:
    """Return the commands for the same ranks: as one node, and by an engine for nodes."""
    nodes, ranks_per_node = topology.num_nodes, topology.gpus_per_node

    def command(name: str, nodes: int, ranks_per_node: int) -> str:
        number = "auto" if redundant is None else redundant
        extra = "" if redundant == 0 else f" --redundant-experts {number}"
        return (
            f"placer solve TRACE --engine {name} --nodes {nodes} --gpus-per-node "
            f"{ranks_per_node}{extra} --out PLAN"
        )

    family = engines_named(engine.family)
    others = [one for one in family if one.misfit(nodes, ranks_per_node) is None]
    alike = [one.name for one in others if one.phases == engine.phases]
    names = alike or [one.name for one in others]
    nearest = get_close_matches(engine.name, names, n=1, cutoff=0)[0]
    other = command(nearest, nodes, ranks_per_node)
    if engine.within != "NVLink domain":
        return other
    whole = command(engine.name, 1, topology.num_ranks)
    return f"if one NVLink domain holds them all: {whole}; if not: {other}"


def _even_ways(model: ModelSpec, architectures: Sequence[str]) -> str:
    """Say what gives every rank the same slots where an engine loads no map."""
    largest = gcd(*model.num_experts)
    ranks = ", ".join(str(r) for r in range(1, largest + 1) if largest % r == 0)
    families = dict.fromkeys(
        one.family
        for one in known_engines().values()
        if _no_map_reason(one, model, architectures) is None
    )
    loading = f"; or an engine that loads a map: {', '.join(families)}" if families else ""
    return f"choose a number of ranks (nodes x GPUs per node) among {ranks}{loading}"


def _require_agreement(option: str, asked: str | None, needed: str, engine: str) -> None:
    if asked is not None and asked != needed:
        raise UsageError(
            f"{option} {asked} contradicts --engine {engine}, which needs {needed}",
            f"drop {option} or --engine",
        )

"""What a plan is asked for, from options by their names, for the command and the API."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, Unpack

from placer.api.files import AnyPath, as_path
from placer.errors import UsageError, one_of
from placer.placement.pins import Pin
from placer.placement.policy import POLICIES
from placer.placement.world import EP_GROUPS, group_topology, world_layout
from placer.planning.request import ServedNow, SolveRequest
from placer.solver.caps import Caps
from placer.solver.goal import NOT_SOLVED, Goal
from placer.solver.options import PROOFS, SolveOptions
from placer.solver.params import SolverParams
from placer.solver.problem.scenarios import ROBUST
from placer.solver.start import Start
from placer.target.engine import SOLVABLE_EXCHANGES, solvable_choice
from placer.trace import Selection


class SizeArguments(TypedDict, total=False):
    """What sizes an expert, for predicted time and memory.

    Attributes
    ----------
    model
        Checkpoint whose ``config.json`` gives the sizes.
    hidden_size, expert_size
        Width of the hidden state and intermediate size of an expert, without ``model``.
    weight_bytes
        Bytes per weight: 2 for bf16, 1 for fp8, 0.5 for fp4.
    """

    model: AnyPath | None
    hidden_size: int | None
    expert_size: int | None
    weight_bytes: float | None


class SolveArguments(SizeArguments, total=False):
    """Further options of ``placer solve``; ``docs/cli.md`` describes each.

    Attributes
    ----------
    hardware
        Name or ``.toml`` file of the hardware whose time is predicted.
    exchange
        ``per-rank`` or ``per-node``; the engine's, or ``per-rank``.
    max_home_imbalance, max_received_copies
        Further caps, ratios to the mean.
    relax_cap
        Whether a layer that cannot meet a cap takes the lowest value that it can reach.
    inter_cost, intra_cost
        Cost of a copy between nodes and inside a node.
    topology
        File with the cost of a copy between each pair of ranks.
    ep_size, tensor_parallel_size, ep_groups
        The expert-parallel groups of a larger world.
    redundant_gain, redundant_memory
        With ``redundant_experts="auto"``: share that a step must save, and GiB per rank.
    replica_choice
        Which replica serves: ``local-first``, ``sglang-static`` or ``hash``.
    robust
        ``none``, ``bootstrap`` or ``domains``.
    overflow_price, receive_price
        Penalties, in copies.
    start
        File of the plan that is served now.
    migration_cost
        Cost of moving one expert to another rank, in copies.
    pin
        Experts that stay on a rank: ``"LAYER:EXPERT=RANK"``, all from 0.
    preserve_groups, ignore_groups
        Whether router groups stay together, or may be split where load is balanced.
    proof
        Effort on the bound: ``none``, ``quick`` or ``full``.
    num_sweeps, num_rounds
        Passes and rounds of the searches.
    params
        TOML file with parameters of the search.
    require_optimal
        Whether a plan without a proof of optimality is an error.
    """

    hardware: AnyPath | None
    exchange: str | None
    max_home_imbalance: float | None
    max_received_copies: float | None
    relax_cap: bool
    inter_cost: int | None
    intra_cost: int | None
    topology: AnyPath | None
    ep_size: int | None
    tensor_parallel_size: int
    ep_groups: str
    redundant_gain: float | None
    redundant_memory: float | None
    replica_choice: str | None
    robust: str
    overflow_price: float | None
    receive_price: float
    start: AnyPath | None
    migration_cost: float
    pin: Sequence[str] | None
    preserve_groups: bool
    ignore_groups: bool
    proof: str
    num_sweeps: int | None
    num_rounds: int | None
    params: AnyPath | None
    require_optimal: bool


def solve_request(
    source: Path,
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
    **more: Unpack[SolveArguments],
) -> SolveRequest:
    """Return what ``placer solve`` is asked for, from its options.

    ``source`` is a trace or an affinity file; :func:`placer.solve` describes the others.

    Raises
    ------
    PlacerError
        If a file cannot be read.
    UsageError
        If an option has no such value, or is given without what it belongs to.
    """
    layout = world_layout(
        num_nodes=nodes,
        gpus_per_node=gpus_per_node,
        ep_size=more.get("ep_size"),
        tensor_parallel_size=more.get("tensor_parallel_size", 1),
        ep_groups=one_of("--ep-groups", more.get("ep_groups", "consecutive"), EP_GROUPS),
    )
    params, start = as_path(more.get("params")), as_path(more.get("start"))
    effort = SolverParams() if params is None else SolverParams.read(params)
    served_now = None if start is None else ServedNow.read(start)
    one_of("--objective", objective, ("traffic", "balance", "time"), NOT_SOLVED)
    exchange, hardware = more.get("exchange"), more.get("hardware")
    costs = (more.get("inter_cost"), more.get("intra_cost"), as_path(more.get("topology")))
    goal = Goal(
        objective="balance" if objective == "balance" else "traffic",
        policy=one_of("--policy", policy, POLICIES, NOT_SOLVED),
        exchange=None
        if exchange is None
        else one_of("--exchange", exchange, SOLVABLE_EXCHANGES, NOT_SOLVED),
        redundant_experts=_number(redundant_experts),
        replica_choice=solvable_choice(more.get("replica_choice")),
        caps=Caps(
            max_imbalance=max_imbalance,
            max_home_imbalance=more.get("max_home_imbalance"),
            max_received_copies=more.get("max_received_copies"),
            relax=more.get("relax_cap", False),
        ),
        robust=one_of("--robust", more.get("robust", "none"), ROBUST, NOT_SOLVED),
        overflow_price=more.get("overflow_price"),
        receive_price=more.get("receive_price", 0.0),
    )
    sweeps = {name: more.get(name) for name in ("num_sweeps", "num_rounds")}
    options = SolveOptions(
        topology=group_topology(
            num_nodes=nodes,
            gpus_per_node=gpus_per_node,
            inter_cost=costs[0],
            intra_cost=costs[1],
            layout=layout,
            cost_file=costs[2],
        ),
        goal=goal,
        start=Start(
            placement=None if served_now is None else served_now.plan.placement,
            migration_cost=more.get("migration_cost", 0.0),
            pins=tuple(map(Pin.parse, more.get("pin") or [])),
            preserve_groups=more.get("preserve_groups", False),
            ignore_groups=more.get("ignore_groups", False),
        ),
        proof=one_of("--proof", more.get("proof", "quick"), PROOFS, NOT_SOLVED),
        params=effort.with_given(sweeps),
    )
    return SolveRequest(
        source=source,
        selection=Selection.parse(fold, not_fold, phase),
        options=options,
        by_time=objective == "time",
        engine=engine,
        chooses_redundant=redundant_experts == "auto",
        redundant_gain=more.get("redundant_gain"),
        redundant_memory=more.get("redundant_memory"),
        hardware=None if hardware is None else str(hardware),
        model=as_path(more.get("model")),
        hidden_size=more.get("hidden_size"),
        expert_size=more.get("expert_size"),
        weight_bytes=more.get("weight_bytes"),
        served_now=served_now,
        layout=layout,
        priced_links=costs != (None, None, None),
        require_optimal=more.get("require_optimal", False),
    )


def _number(redundant: int | str) -> int:
    """Return the slots to begin with: of ``auto``, none."""
    if redundant == "auto":
        return 0
    if not str(redundant).isdecimal():
        raise UsageError(
            f"--redundant-experts {redundant} is neither a number nor auto",
            "for example --redundant-experts 8",
        )
    return int(redundant)

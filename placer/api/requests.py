"""What a plan is asked for, from options by their names, for the command and the API."""

from pathlib import Path
from typing import Unpack

from placer.api.arguments import SolveArguments, require_known, selected
from placer.api.files import as_path
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


def solve_request(
    source: Path,
    *,
    gpus_per_node: int,
    nodes: int = 1,
    **options: Unpack[SolveArguments],
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
    require_known(options, SolveArguments)
    layout = world_layout(
        num_nodes=nodes,
        gpus_per_node=gpus_per_node,
        ep_size=options.get("ep_size"),
        tensor_parallel_size=options.get("tensor_parallel_size", 1),
        ep_groups=one_of("--ep-groups", options.get("ep_groups", "consecutive"), EP_GROUPS),
    )
    params, start = as_path(options.get("params")), as_path(options.get("start"))
    effort = SolverParams() if params is None else SolverParams.read(params)
    served_now = None if start is None else ServedNow.read(start)
    inter_cost, intra_cost = options.get("inter_cost"), options.get("intra_cost")
    topology, hardware = as_path(options.get("topology")), options.get("hardware")
    return SolveRequest(
        source=source,
        selection=selected(options),
        options=SolveOptions(
            topology=group_topology(
                num_nodes=nodes,
                gpus_per_node=gpus_per_node,
                inter_cost=inter_cost,
                intra_cost=intra_cost,
                layout=layout,
                cost_file=topology,
            ),
            goal=_goal(options),
            start=_start(options, served_now),
            proof=one_of("--proof", options.get("proof", "quick"), PROOFS, NOT_SOLVED),
            params=effort.with_given(
                {name: options.get(name) for name in ("num_sweeps", "num_rounds")}
            ),
        ),
        by_time=options.get("objective") == "time",
        engine=options.get("engine"),
        chooses_redundant=options.get("redundant_experts") == "auto",
        redundant_gain=options.get("redundant_gain"),
        redundant_memory=options.get("redundant_memory"),
        hardware=None if hardware is None else str(hardware),
        model=as_path(options.get("model")),
        hidden_size=options.get("hidden_size"),
        expert_size=options.get("expert_size"),
        weight_bytes=options.get("weight_bytes"),
        served_now=served_now,
        layout=layout,
        priced_links=(inter_cost, intra_cost, topology) != (None, None, None),
        require_optimal=options.get("require_optimal", False),
    )


def _goal(options: SolveArguments) -> Goal:
    objective, exchange = options.get("objective", "traffic"), options.get("exchange")
    one_of("--objective", objective, ("traffic", "balance", "time"), NOT_SOLVED)
    return Goal(
        objective="balance" if objective == "balance" else "traffic",
        policy=one_of("--policy", options.get("policy", "fixed"), POLICIES, NOT_SOLVED),
        exchange=None
        if exchange is None
        else one_of("--exchange", exchange, SOLVABLE_EXCHANGES, NOT_SOLVED),
        redundant_experts=_number(options.get("redundant_experts", 0)),
        replica_choice=solvable_choice(options.get("replica_choice")),
        caps=Caps(
            max_imbalance=options.get("max_imbalance"),
            max_home_imbalance=options.get("max_home_imbalance"),
            max_received_copies=options.get("max_received_copies"),
            relax=options.get("relax_cap", False),
        ),
        robust=one_of("--robust", options.get("robust", "none"), ROBUST, NOT_SOLVED),
        overflow_price=options.get("overflow_price"),
        receive_price=options.get("receive_price", 0.0),
    )


def _start(options: SolveArguments, served_now: ServedNow | None) -> Start:
    return Start(
        placement=None if served_now is None else served_now.plan.placement,
        migration_cost=options.get("migration_cost", 0.0),
        pins=tuple(map(Pin.parse, options.get("pin") or [])),
        preserve_groups=options.get("preserve_groups", False),
        ignore_groups=options.get("ignore_groups", False),
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

"""``placer solve``: experts to ranks."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from placer.cli.output import (
    ExpertSizeOption,
    FoldOption,
    GpusPerNodeOption,
    HiddenSizeOption,
    JsonOption,
    NodesOption,
    NotFoldOption,
    OutOption,
    PhaseOption,
    SizedByOption,
    WeightBytesOption,
    note,
    parse_selection,
    print_json,
    print_line,
    print_table,
    progress_line,
    warn,
)
from placer.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from placer.planning.frontier import FrontierPoint
    from placer.planning.solving import Solved


def solve(
    source: Annotated[
        Path, typer.Argument(metavar="TRACE|AFFINITY", help="What to profile on.")
    ],
    out: OutOption,
    gpus_per_node: GpusPerNodeOption,
    nodes: NodesOption = 1,
    objective: Annotated[
        str,
        typer.Option(
            help="traffic, under the load cap; balance alone; or time, predicted for "
            "--hardware."
        ),
    ] = "traffic",
    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Predict time on h100, h200, b200, a100, or a .toml file: for --objective "
            "time, and to choose the load cap where --max-imbalance is not given.",
        ),
    ] = None,
    model: SizedByOption = None,
    hidden_size: HiddenSizeOption = None,
    expert_size: ExpertSizeOption = None,
    weight_bytes: WeightBytesOption = None,
    policy: Annotated[
        str, typer.Option(help="Home policy: fixed, follow, token or request.")
    ] = "fixed",
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Solve for what this engine sends (docs/engines.md): sets --exchange and "
            "--replica-choice, and balances where placement cannot change the traffic.",
        ),
    ] = None,
    exchange: Annotated[
        str | None,
        typer.Option(help="Exchange: per-rank or per-node.", show_default="per-rank"),
    ] = None,
    max_imbalance: Annotated[
        float | None,
        typer.Option(
            help="Cap on max/mean rank load in every layer; refused where it is out of "
            "reach.",
            show_default="1.10, or the best reachable",
        ),
    ] = None,
    max_home_imbalance: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="With --policy follow or token: cap on max/mean tokens per home rank.",
        ),
    ] = None,
    max_received_copies: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="With --policy fixed or follow: cap on the ranks times the copies that "
            "one of them receives per token, in every layer; compare "
            "bottleneck_rank_copies_per_token.",
        ),
    ] = None,
    frontier: Annotated[
        str | None,
        typer.Option(
            metavar="CAPS",
            help="Solve under each of these load caps, such as 1.02,1.05,1.1, in place of "
            "--max-imbalance: --out is a directory of plans and frontier.csv.",
        ),
    ] = None,
    relax_cap: Annotated[
        bool,
        typer.Option("--relax-cap", help="Where a cap is out of reach, take the best."),
    ] = False,
    inter_cost: Annotated[
        int | None, typer.Option(help="Cost of a copy between nodes.", show_default="8")
    ] = None,
    intra_cost: Annotated[
        int | None, typer.Option(help="Cost of a copy inside a node.", show_default="1")
    ] = None,
    topology: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Cost of a copy between every two ranks, in place of both: R rows of R "
            "whole numbers, JSON or .csv.",
        ),
    ] = None,
    ep_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="R",
            help="Ranks of an expert-parallel group, where all GPUs of --nodes are not one "
            "group.",
        ),
    ] = None,
    tensor_parallel_size: Annotated[
        int,
        typer.Option(min=1, help="With --ep-size: neighbouring ranks that share tokens."),
    ] = 1,
    ep_groups: Annotated[
        str,
        typer.Option(
            help="With --ep-size: consecutive data parallel ranks make a group "
            "(DeepSpeed's default), or strided (its use_data_before_expert_parallelism)."
        ),
    ] = "consecutive",
    redundant_experts: Annotated[
        str,
        typer.Option(
            metavar="X|auto",
            help="Slots per layer beyond one for each expert. auto climbs 0, R, 2R, 4R, "
            "... for R ranks while quick plans say that the next step saves "
            "--redundant-gain of the objective, within --redundant-memory.",
        ),
    ] = "0",
    redundant_gain: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="With --redundant-experts auto: what a step must save of the objective.",
            show_default="0.05",
        ),
    ] = None,
    redundant_memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            help="With --redundant-experts auto: most memory per rank, all layers; needs "
            "--model, or --hidden-size and --expert-size.",
        ),
    ] = None,
    replica_choice: Annotated[
        str | None,
        typer.Option(
            help="Which copy serves: local-first, sglang-static or hash.",
            show_default="the engine's; without --engine it must be given for redundant "
            "experts of a trace",
        ),
    ] = None,
    robust: Annotated[
        str,
        typer.Option(
            help="Also keep unseen sequences under --max-imbalance: bootstrap (resampled "
            "loads) or domains (loads per domain). Cap and price are tuned on two halves "
            "of the profile."
        ),
    ] = "none",
    overflow_price: Annotated[
        float | None,
        typer.Option(
            help="With --robust: penalty, in copies, for each (token, expert) pair "
            "above the load cap.",
            show_default="10, or up to 40 as the cap takes",
        ),
    ] = None,
    receive_price: Annotated[
        float,
        typer.Option(
            help="Extra penalty, in copies, for each copy sent to the busiest rank."
        ),
    ] = 0.0,
    start: Annotated[
        Path | None,
        typer.Option(metavar="PLAN", help="Improve this plan, which is served now."),
    ] = None,
    migration_cost: Annotated[
        float,
        typer.Option(
            help="With --start: copies of the profile that a move is worth; where load is "
            "balanced, pairs of the busiest rank."
        ),
    ] = 0.0,
    pin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER:EXPERT=RANK", help="Keep an expert on a rank; repeatable."
        ),
    ] = None,
    preserve_groups: Annotated[
        bool,
        typer.Option(
            "--preserve-groups",
            help="Keep router groups whole, as a permuted checkpoint must.",
        ),
    ] = False,
    ignore_groups: Annotated[
        bool,
        typer.Option(
            "--ignore-groups",
            help="Where load is balanced: split router groups over nodes, which may send a "
            "token to more of them.",
        ),
    ] = False,
    proof: Annotated[
        str, typer.Option(help="Work that goes into the bound: none, quick or full.")
    ] = "quick",
    num_sweeps: Annotated[
        int, typer.Option(min=0, help="Sweeps over the copies; 0: pairs alone.")
    ] = 16,
    num_rounds: Annotated[int, typer.Option(min=0, help="Shakes of the search.")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of the search.")] = 0,
    time_limit: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Take the best after so long: a plan that this cut cannot be reproduced. "
            "Each choice by quick plans has at most half of what is left; proofs count, "
            "the plans of --frontier share it. Ctrl-C stops too.",
        ),
    ] = None,
    require_optimal: Annotated[
        bool, typer.Option("--require-optimal", help="Fail (exit 4) without a proof.")
    ] = False,
    fold: FoldOption = None,
    not_fold: NotFoldOption = None,
    phase: PhaseOption = "all",
    as_json: JsonOption = False,
) -> None:
    """Place experts on ranks: least traffic, equal slots, load under the cap.

    Profiles on the sequences of --fold and judges on all others. Deterministic: the same
    input and seed give the same plan.
    """
    began = time.monotonic()  # the limit on time counts what is imported below
    from placer.placement.pins import Pin
    from placer.placement.world import (
        group_topology,
        world_layout,
    )
    from placer.planning.frontier import parse_caps
    from placer.planning.request import SolveRequest
    from placer.planning.solving import (
        solve_frontier,
        solve_request,
    )
    from placer.report.comparison import (
        plan_notes,
        plan_warnings,
    )
    from placer.run.deadline import Deadline
    from placer.run.files import require_no_directory
    from placer.solver.options import SolveOptions
    from placer.solver.search.pair_search import SearchLimits
    from placer.solver.search.refine import RefineLimits

    layout = world_layout(
        num_nodes=nodes,
        gpus_per_node=gpus_per_node,
        ep_size=ep_size,
        tensor_parallel_size=tensor_parallel_size,
        ep_groups=ep_groups,
    )
    request = SolveRequest(
        source=source,
        selection=parse_selection(fold, not_fold, phase),
        options=SolveOptions(
            topology=group_topology(
                num_nodes=nodes,
                gpus_per_node=gpus_per_node,
                inter_cost=inter_cost,
                intra_cost=intra_cost,
                layout=layout,
                cost_file=topology,
            ),
            # SolveOptions refuses names that it does not know.
            policy=policy,  # type: ignore[arg-type]
            max_home_imbalance=max_home_imbalance,
            max_received_copies=max_received_copies,
            relax_cap=relax_cap,
            robust=robust,  # type: ignore[arg-type]
            receive_price=receive_price,
            proof=proof,  # type: ignore[arg-type]
            pins=tuple(map(Pin.parse, pin or [])),
            preserve_groups=preserve_groups,
            ignore_groups=ignore_groups,
            seed=seed,
            time_limit=time_limit,
            limits=SearchLimits(num_rounds=num_rounds),
            refine=RefineLimits(num_sweeps=num_sweeps),
        ),
        objective=objective,
        engine=engine,
        exchange=exchange,
        replica_choice=replica_choice,
        max_imbalance=max_imbalance,
        overflow_price=overflow_price,
        redundant_experts=_number_or_auto(redundant_experts),
        redundant_gain=redundant_gain,
        redundant_memory=redundant_memory,
        hardware=hardware,
        model=model,
        hidden_size=hidden_size,
        expert_size=expert_size,
        weight_bytes=weight_bytes,
        start=start,
        migration_cost=migration_cost,
        layout=layout,
        priced_links=(inter_cost, intra_cost, topology) != (None, None, None),
        require_optimal=require_optimal,
    )
    deadline = Deadline(seconds=time_limit, began=began)
    if frontier is not None:
        caps = parse_caps(frontier)
        with progress_line("solve") as progress:
            points = solve_frontier(request, caps, out, note, warn, progress, deadline)
        _show_frontier(points, out, as_json)
        return
    require_no_directory(out)
    with progress_line("solve") as progress:
        solved = solve_request(request, note, warn, progress, deadline)
    solved.plan.write(out)
    warnings, notes = list(plan_warnings(solved.plan)), list(plan_notes(solved.plan))
    for line in warnings:
        warn(line)
    for line in notes:
        note(line)
    if as_json:
        told = {"warnings": warnings, "notes": notes}
        report = {"out": str(out), "seconds": solved.plan.solver.seconds}
        print_json(report | told | solved.plan.to_json())
        return
    _show(solved, start)
    print_line(f"plan written to {out}")


def _show(solved: "Solved", start: Path | None) -> None:
    """Print the figures of a plan and what proves them."""
    from placer.report.comparison import (
        certificate_lines,
        plan_table,
        price_line,
    )

    plan, choice = solved.plan, solved.time
    columns, rows = plan_table(plan)
    if rows:
        print_table(columns, rows)
    if (priced := price_line(plan)) is not None:
        print_line(priced)
    if start is not None:
        print_line(f"{plan.provenance['moved_experts']} experts moved from {start}")
    for line in certificate_lines(plan.solver):
        print_line(line)
    if choice is not None:
        print_line(
            f"least predicted time on sequences held out of the profile: {choice.name}"
        )
        for shape, found in choice.break_even_by_size:
            print_line(
                f"{shape.batching}, {shape.tokens_per_rank:,} tokens per rank: beside the "
                f"load balancer, the quickest plan for traffic {found.words}"
            )


def _number_or_auto(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise UsageError(
            f"--redundant-experts {text} is neither a number nor auto",
            "for example --redundant-experts 8",
        )
    return int(text)


def _show_frontier(points: "Sequence[FrontierPoint]", out: Path, as_json: bool) -> None:
    from placer.planning.frontier import TABLE_NAME

    rows = [point.to_json() for point in points]
    if as_json:
        print_json({"out": str(out), "points": rows})
        return
    columns = ("cap", "plan", points[0].sent.heading, "of contiguous", "imbalance")
    print_table(columns, [tuple(row.values())[:5] for row in rows])
    print_line(f"plans and {TABLE_NAME} written to {out}")

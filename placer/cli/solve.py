"""``placer solve``: experts to ranks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from placer.cli.output import (
    ExpertSizeOption,
    FoldOption,
    HiddenSizeOption,
    JsonOption,
    NotFoldOption,
    OutOption,
    SizedByOption,
    WeightBytesOption,
    note,
    parse_fold,
    print_json,
    print_line,
    print_table,
    progress_line,
    warn,
)
from placer.errors import NotProvedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from placer.plan import Plan
    from placer.plan.options import SolveOptions
    from placer.plan.redundant import Memory, RedundantChoice
    from placer.plan.solve import Progress
    from placer.report.advice import Question
    from placer.report.layer_time import TimeChoice
    from placer.trace import Fold


def solve(
    source: Annotated[
        Path, typer.Argument(metavar="TRACE|AFFINITY", help="What to profile on.")
    ],
    out: OutOption,
    gpus_per_node: Annotated[
        int, typer.Option(min=1, help="Expert-parallel ranks on each node.")
    ],
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 1,
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
            help="For --objective time: h100, h200, b200, a100, or a .toml file.",
        ),
    ] = None,
    model: SizedByOption = None,
    hidden_size: HiddenSizeOption = None,
    expert_size: ExpertSizeOption = None,
    weight_bytes: WeightBytesOption = 2.0,
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
        float, typer.Option(help="Cap on max/mean rank load in every layer.")
    ] = 1.10,
    max_home_imbalance: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="With --policy follow or token: cap on max/mean tokens per home rank.",
        ),
    ] = None,
    frontier: Annotated[
        str | None,
        typer.Option(
            metavar="CAPS",
            help="Solve under each of these load caps, such as 1.02,1.05,1.1: --out is a "
            "directory of plans and frontier.csv.",
        ),
    ] = None,
    relax_cap: Annotated[
        bool,
        typer.Option("--relax-cap", help="Where the cap is out of reach, take the best."),
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
            help="Which copy serves: local-first or hash.", show_default="local-first"
        ),
    ] = None,
    robust: Annotated[
        str,
        typer.Option(
            help="Keep other sequences to --max-imbalance too, bearing loads beside the "
            "profile's: bootstrap or domains. Solves under the cap that quick plans of "
            "halves of the profile ask for."
        ),
    ] = "none",
    overflow_price: Annotated[
        float | None,
        typer.Option(
            help="With --robust: copies that a pair over the cap is worth.",
            show_default="10",
        ),
    ] = None,
    receive_price: Annotated[
        float, typer.Option(help="Copies that one to the busiest receiver is worth.")
    ] = 0.0,
    start: Annotated[
        Path | None,
        typer.Option(metavar="PLAN", help="Improve this plan, which is served now."),
    ] = None,
    migration_cost: Annotated[
        float,
        typer.Option(help="With --start: copies of the profile that a move is worth."),
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
            help="Take the best after so long; such a plan cannot be reproduced. So does "
            "Ctrl-C.",
        ),
    ] = None,
    require_optimal: Annotated[
        bool, typer.Option("--require-optimal", help="Fail (exit 4) without a proof.")
    ] = False,
    fold: FoldOption = None,
    not_fold: NotFoldOption = None,
    as_json: JsonOption = False,
) -> None:
    """Place experts on ranks: least traffic, equal slots, load under the cap.

    Profiles on the sequences of --fold and judges on all others. Deterministic: the same
    input and seed give the same plan.
    """
    from dataclasses import replace

    from placer.affinity import Affinity
    from placer.engine import Engine
    from placer.hardware import Hardware
    from placer.model import require_same_model
    from placer.plan import Plan
    from placer.plan.options import SolveOptions
    from placer.plan.pins import Pin
    from placer.plan.planner import plan_from_affinity, plan_from_trace
    from placer.plan.redundant import LEAST_GAIN, Memory
    from placer.plan.refine import RefineLimits
    from placer.plan.search import SearchLimits
    from placer.plan.served import solved_for
    from placer.plan.world import WorldLayout, group_topology
    from placer.report.advice import Question
    from placer.report.comparison import ladder_line
    from placer.report.layer_time import choose_by_time
    from placer.simulation.cost import find_expert_shape
    from placer.trace import Trace

    by_time = objective == "time"
    _require_company({"--hardware": hardware}, "--objective time", is_given=by_time)
    fixed_redundant = _number_or_auto(redundant_experts)
    _require_company(
        {
            "--redundant-memory": redundant_memory,
            "--redundant-gain": redundant_gain,
        },
        "--redundant-experts auto",
        is_given=fixed_redundant is None,
    )
    _require_company(
        {"--overflow-price": overflow_price},
        "--robust bootstrap or domains",
        is_given=robust != "none",
    )
    _require_company(
        {"--replica-choice": replica_choice},
        "--redundant-experts: which copy serves is no question where each expert has one",
        is_given=fixed_redundant != 0,
    )
    _require_company(
        {"--model": model, "--hidden-size": hidden_size, "--expert-size": expert_size},
        "--objective time or --redundant-memory: nothing else asks what an expert weighs",
        is_given=by_time or redundant_memory is not None,
    )
    if require_optimal and frontier is not None:
        raise UsageError(
            "--require-optimal is about one plan, --frontier writes several",
            "drop one; frontier.csv has the bound of each",
        )
    served = solved_for(
        engine,
        policy,
        "traffic" if by_time else objective,
        exchange,
        replica_choice,
        has_replicas=fixed_redundant != 0,
    )
    for line in served.notes:
        note(line)
    layout = None
    if ep_size is not None:
        layout = WorldLayout(
            num_nodes=nodes,
            gpus_per_node=gpus_per_node,
            ep_size=ep_size,
            tensor_parallel_size=tensor_parallel_size,
            ep_groups=ep_groups,  # type: ignore[arg-type]  # it refuses other names
        )
        note(layout.describe())
    elif tensor_parallel_size != 1 or ep_groups != "consecutive":
        raise UsageError(
            "--tensor-parallel-size and --ep-groups say where expert-parallel groups lie, "
            "but there is no --ep-size",
            "add --ep-size R, the ranks of a group",
        )
    served_now = None if start is None else Plan.read(start)
    options = SolveOptions(
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
        objective=served.objective,  # type: ignore[arg-type]
        exchange=served.exchange,  # type: ignore[arg-type]
        max_imbalance=max_imbalance,
        max_home_imbalance=max_home_imbalance,
        relax_cap=relax_cap,
        redundant_experts=fixed_redundant or 0,
        replica_choice=served.replica_choice,  # type: ignore[arg-type]
        robust=robust,  # type: ignore[arg-type]
        overflow_price=10.0 if overflow_price is None else overflow_price,
        receive_price=receive_price,
        proof=proof,  # type: ignore[arg-type]
        start=None if served_now is None else served_now.placement,
        migration_cost=migration_cost,
        pins=tuple(map(Pin.parse, pin or [])),
        preserve_groups=preserve_groups,
        seed=seed,
        time_limit=time_limit,
        limits=SearchLimits(num_rounds=num_rounds),
        refine=RefineLimits(num_sweeps=num_sweeps),
    )
    chosen = parse_fold(fold, not_fold)
    by_time = by_time and served.objective == "traffic"
    if by_time and source.is_file():
        raise UsageError(
            f"{source} holds counts; --objective time needs tokens",
            "solve from the trace itself: placer solve TRACE --out PLAN",
        )
    expert, weighs = None, by_time or redundant_memory is not None
    if weighs or served_now is not None:
        kept = Affinity.read(source).model if source.is_file() else Trace(source).model
    if served_now is not None:
        matched = require_same_model(served_now.model, str(start), kept, str(source))
        if matched is not None:
            warn(matched)
    if weighs:
        expert = find_expert_shape(
            model, hidden_size or kept.hidden_size, expert_size, weight_bytes
        )
    question = None
    if by_time:
        question = Question(
            topology=options.topology,
            policy=policy,
            engine=None if engine is None else Engine.named(engine),
            hardware=None if hardware is None else Hardware.named(hardware),
            expert=expert,
        )
    redundant, choice = None, None
    if fixed_redundant is None:
        memory = Memory.of(expert, redundant_memory)
        with progress_line("solve") as progress:
            redundant = _choose_redundant(
                source,
                chosen,
                options,
                question,
                memory,
                LEAST_GAIN if redundant_gain is None else redundant_gain,
                progress,
            )
        options = replace(options, redundant_experts=redundant.redundant_experts)
        note(ladder_line(redundant))
    chosen_so: dict[str, Any] = {}
    if redundant is not None:
        chosen_so["redundant_experts"] = redundant.to_json()
    if layout is not None:
        chosen_so["layout"] = layout.to_json()
    if frontier is not None:
        _frontier(source, options, chosen, frontier, out, by_time, as_json, chosen_so)
        return
    with progress_line("solve") as progress:
        if question is not None:
            trace = Trace(source)
            choice = choose_by_time(
                trace.model, trace.read(chosen), options, question, progress
            )
            options = choice.options
        if source.is_dir() or not source.exists():
            plan = plan_from_trace(Trace(source), options, chosen, progress)
        elif chosen is not None:
            raise UsageError(
                f"{source} holds counts, which cannot be folded any more",
                "fold when counting: placer affinity TRACE --fold K/N --out AFFINITY",
            )
        else:
            plan = plan_from_affinity(source, options, progress)
    if choice is not None:
        if choice.left_out is not None:
            note(choice.left_out)
        chosen_so["time"] = choice.to_json()
    plan = replace(plan, provenance={**plan.provenance, **chosen_so})
    report = plan.solver
    if require_optimal and report.status != "optimal":
        raise NotProvedError(
            f"no proof of optimality: objective {report.objective:g}, "
            f"bound {report.bound}, gap {report.gap}",
            "solve without --require-optimal to get the best plan found",
        )
    plan.write(out)
    _tell(plan, holds_out=chosen is not None, max_home_imbalance=max_home_imbalance)
    if as_json:
        print_json({"out": str(out), "seconds": report.seconds} | plan.to_json())
        return
    _show(plan, start, choice)
    print_line(f"plan written to {out}")


def _tell(plan: "Plan", *, holds_out: bool, max_home_imbalance: float | None) -> None:
    """Say on stderr what to know of a plan beside its figures."""
    from placer.report.comparison import inner_cap_line

    report, profile = plan.solver, plan.metrics["profile"]
    if profile is None:
        warn("solved from counts: no tokens are known, so no held-out figure is given")
    elif not holds_out:
        warn("nothing was held out: the figures are those of the profile itself")
    if not report.reproducible:
        warn("the search was stopped: this is its best so far, and cannot be reproduced")
    if report.relaxed_layers:
        worst = max(report.relaxed_layers, key=lambda n: report.relaxed_layers[n])
        note(
            f"load cap {plan.max_imbalance:g} relaxed in {len(report.relaxed_layers)} MoE "
            f"layers, at most to {report.relaxed_layers[worst]:.4f} (layer {worst})"
        )
    if max_home_imbalance is not None and profile is not None:
        reached = profile[plan.policy]["home_imbalance_max"]
        if reached > max_home_imbalance:
            warn(
                f"--max-home-imbalance {max_home_imbalance:g} was not reached in every "
                f"layer of the profile: {reached:.3f}"
            )
    if report.inner_cap is not None:
        note(inner_cap_line(report.inner_cap, plan.max_imbalance))


def _show(plan: "Plan", start: Path | None, choice: "TimeChoice | None") -> None:
    """Print the figures of a plan and what proves them."""
    from placer.report.comparison import COLUMNS, certificate_lines, plan_rows, price_line

    rows = plan_rows(plan)
    if rows:
        print_table(COLUMNS, rows)
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
        print_line(
            "beside the load balancer, the quickest plan for traffic "
            f"{choice.break_even.words}"
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


def _require_company(
    options: "Mapping[str, object]", company: str, *, is_given: bool
) -> None:
    """Refuse the first of these options that is given without what it belongs to."""
    for name, value in options.items():
        if value is not None and not is_given:
            raise UsageError(
                f"{name} {value} is for {company}",
                f"drop {name}, or add {company.partition(':')[0]}",
            )


def _choose_redundant(
    source: Path,
    fold: "Fold | None",
    options: "SolveOptions",
    question: "Question | None",
    memory: "Memory",
    least_gain: float,
    progress: "Progress | None",
) -> "RedundantChoice":
    """Climb by the objective on the profile, or by the time that a question asks for."""
    from placer.affinity import Affinity, count_affinity
    from placer.plan.redundant import choose_redundant_experts, worth_on_profile
    from placer.report.layer_time import worth_by_time
    from placer.trace import Trace

    if source.is_file():
        affinity, profile = Affinity.read(source), None
    else:
        trace = Trace(source)
        affinity = count_affinity(trace.chunks(fold), trace.model, {})
        profile = trace.read(fold)
    if question is not None and profile is not None:
        worth = worth_by_time(affinity.model, profile, question)
    else:
        worth = worth_on_profile(affinity, profile)
    return choose_redundant_experts(
        affinity.model.num_experts, options, worth, memory, least_gain, progress
    )


def _frontier(
    source: Path,
    options: "SolveOptions",
    fold: "Fold | None",
    caps: str,
    out: Path,
    by_time: bool,
    as_json: bool,
    chosen_so: "Mapping[str, Any]",
) -> None:
    from placer.report.frontier import TABLE_NAME, parse_caps, write_frontier
    from placer.trace import Trace

    if source.is_file() or by_time or options.objective != "traffic":
        raise UsageError(
            "--frontier trades traffic for balance: it needs the tokens of a trace",
            "solve from the trace itself: placer solve TRACE --frontier CAPS --out DIR",
        )
    with progress_line("solve") as progress:
        points = write_frontier(
            Trace(source), options, fold, parse_caps(caps), out, progress, chosen_so
        )
    rows = [point.to_json() for point in points]
    if as_json:
        print_json({"out": str(out), "points": rows})
        return
    columns = ("cap", "plan", "copies/token", "of contiguous", "imbalance")
    print_table(columns, [tuple(row.values())[:5] for row in rows])
    print_line(f"plans and {TABLE_NAME} written to {out}")

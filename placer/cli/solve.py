"""``placer solve``: experts to ranks."""

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

import placer
from placer.cli import choices
from placer.cli.output import (
    DetailsOption,
    ExpertSizeOption,
    ForceOption,
    GpusPerNodeOption,
    HiddenSizeOption,
    JsonOption,
    NodesOption,
    PhaseOption,
    SizedByOption,
    SolvedFoldOption,
    SolvedNotFoldOption,
    WeightBytesOption,
    claim,
    note,
    print_json,
    print_line,
    print_next,
    print_tables,
    print_verdict,
    progress_line,
)
from placer.cli.terminal import wrapped


def solve(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="TRACE|AFFINITY",
            help="A trace directory or an affinity file. An affinity file has no "
            "sequences: --fold and --phase are refused, and nothing is held out.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The plan to write (.json).")],
    gpus_per_node: GpusPerNodeOption,
    nodes: NodesOption = 1,
    objective: Annotated[
        str,
        typer.Option(
            autocompletion=choices.among("traffic", "balance", "time"),
            help="What to minimise: traffic (under the load cap), balance (the busiest "
            "rank only) or time (predicted for --hardware).",
        ),
    ] = "traffic",
    hardware: Annotated[
        str | None,
        typer.Option(
            autocompletion=choices.names("hardware"),
            metavar="NAME|FILE",
            help="Predict time on h100, h200, b200, a100, or on the hardware of a .toml "
            "file (placer calibrate). Needs --model, or --hidden-size and "
            "--expert-size. --objective time needs it. Otherwise it chooses between the "
            "load caps 1.10 and EPLB's load. Do not combine it with --max-imbalance then.",
        ),
    ] = None,
    model: SizedByOption = None,
    hidden_size: HiddenSizeOption = None,
    expert_size: ExpertSizeOption = None,
    weight_bytes: WeightBytesOption = None,
    policy: Annotated[
        str,
        typer.Option(
            autocompletion=choices.names("policies"),
            help="How the home of a token, the rank that has its hidden state, is chosen: "
            "fixed, follow, token or request (docs/concepts.md).",
        ),
    ] = "fixed",
    engine: Annotated[
        str | None,
        typer.Option(
            autocompletion=choices.names("engines"),
            metavar="NAME",
            help="The engine to solve for (docs/engines.md). Sets --exchange and "
            "--replica-choice. If placement cannot change what the engine sends, the "
            "solver only balances.",
        ),
    ] = None,
    exchange: Annotated[
        str | None,
        typer.Option(
            autocompletion=choices.names("exchanges"),
            help="Where copies of a token go. per-rank: one to each rank that serves it. "
            "per-node: one to each node that serves it (docs/concepts.md).",
            show_default="per-rank",
        ),
    ] = None,
    max_imbalance: Annotated[
        float | None,
        typer.Option(
            help="Cap on the load of the busiest rank over the mean, in every layer, on "
            "the tokens that are solved on. If placer finds no placement under a cap that "
            "you give, the command fails (exit 3), unless you give --relax-cap too. "
            "Default: 1.10, relaxed where placer finds no placement under it. For traffic "
            "on one node with equal links, it is EPLB's load in layers where that is "
            "lower. But not with --start, --robust, --preserve-groups or "
            "--max-received-copies.",
        ),
    ] = None,
    max_home_imbalance: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="With --policy follow or token: cap on the tokens of the fullest home "
            "rank over the mean.",
        ),
    ] = None,
    max_received_copies: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="With --policy fixed or follow: cap on R x the copies per token that the "
            "busiest of R ranks receives, in every layer. If all ranks receive equally, "
            "that is copies/token.",
        ),
    ] = None,
    frontier: Annotated[
        str | None,
        typer.Option(
            metavar="CAPS",
            help="Solve once for each of these load caps, such as 1.02,1.05,1.1. Replaces "
            "--max-imbalance. --out is then a directory with one plan per cap and "
            "frontier.csv.",
        ),
    ] = None,
    relax_cap: Annotated[
        bool,
        typer.Option(
            "--relax-cap",
            help="If placer finds no placement under a cap, use the lowest value that it "
            "finds.",
        ),
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
            help="Cost of a copy between each pair of ranks: R rows of R whole numbers, "
            "JSON or .csv. Replaces --inter-cost and --intra-cost.",
        ),
    ] = None,
    ep_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="R",
            help="Ranks of one expert-parallel group, if the GPUs of --nodes form several "
            "groups.",
        ),
    ] = None,
    tensor_parallel_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="With --ep-size: number of neighbouring ranks that compute the same "
            "tokens.",
        ),
    ] = 1,
    ep_groups: Annotated[
        str,
        typer.Option(
            autocompletion=choices.among("consecutive", "strided"),
            help="With --ep-size: which data-parallel ranks form a group: consecutive "
            "(DeepSpeed's default) or strided (use_data_before_expert_parallelism).",
        ),
    ] = "consecutive",
    redundant_experts: Annotated[
        str,
        typer.Option(
            metavar="X|auto",
            help="Extra slots in each layer, all ranks together, for replicas of experts. "
            "Experts and X together must divide evenly over the ranks. auto tries 0, R, "
            "2R, 4R, ... for R ranks. It takes the next step as long as that "
            "lowers the objective by the share of --redundant-gain, and the replicas fit "
            "into --redundant-memory.",
        ),
    ] = "0",
    redundant_gain: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="With --redundant-experts auto: share of the objective that a step must "
            "save.",
            show_default="0.05",
        ),
    ] = None,
    redundant_memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            help="With --redundant-experts auto: limit on the memory of redundant experts "
            "per rank, over all layers. Needs --model, or --hidden-size and "
            "--expert-size.",
        ),
    ] = None,
    replica_choice: Annotated[
        str | None,
        typer.Option(
            autocompletion=choices.names("solvable_replica_choices"),
            help="Which replica of a redundant expert serves a token: local-first, "
            "sglang-static or hash.",
            show_default="the engine's; needed for redundant experts without --engine",
        ),
    ] = None,
    robust: Annotated[
        str,
        typer.Option(
            autocompletion=choices.among("none", "bootstrap", "domains"),
            help="Also keep unseen sequences under --max-imbalance: none, bootstrap (by "
            "resampled loads) or domains (by the loads of each domain). placer tries load "
            "caps up to --max-imbalance (1.10 if not given) on half of the sequences and "
            "judges them on the other half. It takes the loosest that is expected to hold. "
            "EPLB's load is then no cap. --overflow-price, if not given, is chosen in the "
            "same way.",
        ),
    ] = "none",
    overflow_price: Annotated[
        float | None,
        typer.Option(
            help="With --robust: penalty, in copies, for each (token, expert) pair "
            "above the load cap.",
            show_default="10 to 40, tuned",
        ),
    ] = None,
    receive_price: Annotated[
        float,
        typer.Option(
            help="Extra price, in copies, of each copy to the rank that receives most."
        ),
    ] = 0.0,
    start: Annotated[
        Path | None,
        typer.Option(
            metavar="PLAN", help="Start from this plan: the one that is served now."
        ),
    ] = None,
    migration_cost: Annotated[
        float,
        typer.Option(
            help="With --start: an expert moves to another rank only if that saves this "
            "many copies, summed over the tokens that are solved on. With --objective "
            "balance: only if it takes this many (token, expert) pairs from the busiest "
            "rank of a layer."
        ),
    ] = 0.0,
    pin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER:EXPERT=RANK",
            help="Keep an expert on a rank. All numbers count from 0, and LAYER counts "
            "only MoE layers. Repeatable.",
        ),
    ] = None,
    preserve_groups: Annotated[
        bool,
        typer.Option(
            "--preserve-groups",
            help="Keep each router group whole: on ranks that no other group uses, or on "
            "one rank with other groups. For models with router groups, a permuted "
            "checkpoint needs this.",
        ),
    ] = False,
    ignore_groups: Annotated[
        bool,
        typer.Option(
            "--ignore-groups",
            help="When only load is balanced: allow router groups to be split over nodes. "
            "Tokens may then visit more nodes.",
        ),
    ] = False,
    proof: Annotated[
        str,
        typer.Option(
            autocompletion=choices.among("none", "quick", "full"),
            help="Effort spent on the lower bound: none, quick or full.",
        ),
    ] = "quick",
    num_sweeps: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Passes of one start of the second search, which counts copies exactly. "
            "Policy fixed makes up to four starts. 0: only the first search, which counts "
            "pairs of experts.",
            show_default="16",
        ),
    ] = None,
    num_rounds: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Rounds of the first search after its first descent, each from a changed "
            "placement.",
            show_default="30",
        ),
    ] = None,
    params: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A TOML file with parameters of the search (docs/formats.md). "
            "--num-sweeps and --num-rounds take precedence.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    time_limit: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Stop after this time and write the best plan so far. Such a plan cannot "
            "be reproduced. The limit includes proofs and all plans of --frontier. It does "
            "not include the compilation in the first solve after an installation. Ctrl-C "
            "also stops and writes.",
        ),
    ] = None,
    require_optimal: Annotated[
        bool,
        typer.Option(
            "--require-optimal", help="Fail (exit 4) unless the plan is proved optimal."
        ),
    ] = False,
    fold: SolvedFoldOption = None,
    not_fold: SolvedNotFoldOption = None,
    phase: PhaseOption = "all",
    force: ForceOption = False,
    details: DetailsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a plan: place experts on ranks for the least traffic.

    Every rank gets the same number of slots. On the tokens that are solved on, the load of
    the busiest rank is kept under a cap. The plan is solved on the sequences of --fold and
    judged on all others. Without --fold and --not-fold it is solved on all, and nothing is
    held out. The same input and seed give the same plan.
    """
    began = time.monotonic()  # the limit on time counts what is imported below
    # Matrices are small here: more threads of NumPy's BLAS mostly wait for each other. It
    # reads this when it is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from placer.api.opening import read_source

    paths = [source, topology, model, start, Path(hardware) if hardware else None]
    kinds = ["plan" if frontier is None else "frontier"]
    claim(context, out, paths, force=force, kinds=kinds, directory=frontier is not None)
    options: dict[str, Any] = {
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "objective": objective,
        "hardware": hardware,
        "model": model,
        "hidden_size": hidden_size,
        "expert_size": expert_size,
        "weight_bytes": weight_bytes,
        "policy": policy,
        "engine": engine,
        "exchange": exchange,
        "max_imbalance": max_imbalance,
        "max_home_imbalance": max_home_imbalance,
        "max_received_copies": max_received_copies,
        "relax_cap": relax_cap,
        "inter_cost": inter_cost,
        "intra_cost": intra_cost,
        "topology": topology,
        "ep_size": ep_size,
        "tensor_parallel_size": tensor_parallel_size,
        "ep_groups": ep_groups,
        "redundant_experts": redundant_experts,
        "redundant_gain": redundant_gain,
        "redundant_memory": redundant_memory,
        "replica_choice": replica_choice,
        "robust": robust,
        "overflow_price": overflow_price,
        "receive_price": receive_price,
        "start": start,
        "migration_cost": migration_cost,
        "pin": pin,
        "preserve_groups": preserve_groups,
        "ignore_groups": ignore_groups,
        "proof": proof,
        "num_sweeps": num_sweeps,
        "num_rounds": num_rounds,
        "params": params,
        "require_optimal": require_optimal,
        "fold": fold,
        "not_fold": not_fold,
        "phase": phase,
        "seed": seed,
        "time_limit": time_limit,
        "began": began,
    }
    opened = read_source(source)
    if frontier is not None:
        with progress_line("solve") as progress:
            found = placer.solve_frontier(
                opened, frontier, out, force=force, progress=progress, **options
            )
        _print_frontier(found, as_json=as_json)
        return
    with progress_line("solve") as progress:
        plan = placer.solve(opened, progress=progress, **options)
    plan = plan.write(out, force=force)
    for line in plan.notes(details=details or as_json):
        note(line)
    if as_json:
        print_json(plan.to_json())
        return
    print_verdict(plan.verdict)
    print_line("")
    tables, lines = plan.tables(details=details)
    print_tables(tables)
    for line in lines:
        print_line(wrapped(line))
    print_line(f"plan written to {out}")
    for line in plan.closing_lines:
        print_line(wrapped(line))
    print_next(plan.verdict)


def _print_frontier(found: "placer.Frontier", *, as_json: bool) -> None:
    if as_json:
        print_json(found.to_json())
        return
    print_verdict(found.verdict)
    print_line("")
    print_tables(found.tables())
    print_line(f"plans and frontier.csv written to {found.out}")
    print_next(found.verdict)

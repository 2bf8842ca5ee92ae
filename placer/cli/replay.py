"""``placer replay``: a plan on a real expert-parallel run."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from placer.cli import choices
from placer.cli.output import (
    FoldOption,
    JsonOption,
    NotFoldOption,
    PhaseOption,
    note,
    parse_selection,
    print_json,
    print_line,
    print_table,
    print_verdict,
    warn,
)
from placer.cli.terminal import wrapped
from placer.errors import one_of


def replay(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan.")],
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The original model.")],
    trace: Annotated[
        Path,
        typer.Option(
            "--trace", metavar="TRACE", help="The trace that contains the tokens to run."
        ),
    ],
    table: Annotated[
        Path | None,
        typer.Option(
            "--table", help="The plan's table (placer tables). Needed by placer-shuffle."
        ),
    ] = None,
    exchange: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            autocompletion=choices.names("replayed_exchanges"),
            help="Exchange to run: all_to_all (transformers' own), padded "
            "(DeepSpeed-MoE's), placer-dedup, placer-per-node, placer-shuffle or "
            "placer-follow. Repeatable. Default: all that fit the plan.",
        ),
    ] = None,
    sequence_length: Annotated[
        int, typer.Option(help="Tokens to run of each sequence.")
    ] = 128,
    sequences_per_rank: Annotated[
        int, typer.Option(help="Sequences per rank in one forward pass.")
    ] = 2,
    passes: Annotated[int, typer.Option(help="Forward passes.")] = 4,
    repeats: Annotated[
        int, typer.Option(help="How often each pass is timed. 0: not at all.")
    ] = 3,
    dtype: Annotated[
        str, typer.Option(help="Number type: auto, float32, bfloat16 or float16.")
    ] = "float32",
    device: Annotated[
        str, typer.Option(help="Where to run: cpu (with gloo) or cuda (with NCCL).")
    ] = "cpu",
    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="With --elsewhere: the measured links of this machine (placer calibrate).",
        ),
    ] = None,
    elsewhere: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Also predict the time of a pass on these links. Repeatable.",
        ),
    ] = None,
    fold: FoldOption = None,
    not_fold: NotFoldOption = None,
    phase: PhaseOption = "all",
    as_json: JsonOption = False,
) -> None:
    """Run a model expert-parallel and count every byte sent.

    Each exchange runs with contiguous experts, then with those of the plan (placer-shuffle
    only with the plan's). Each rank is one process. On one machine placer starts the
    processes; on several, torchrun does.

    Exit 5 if the bytes that leave a rank are not those that a simulation of the same
    routing predicts, or if the outputs are not those of the model on one rank.
    """
    from placer.replay.replay import ReplayOptions, prepared
    from placer.replay.replay import replay as replay_plan
    from placer.report.replay import columns, facts, rows
    from placer.report.verdicts import verdict_of_replay
    from placer.run.worker import Worker, start_workers
    from placer.target.hardware import Hardware
    from placer.trace import Trace
    from placer.trace.loading import DTYPES

    worker, read = Worker.of_environment(), Trace(trace)
    selection = parse_selection(fold, not_fold, phase)
    options = ReplayOptions(
        exchanges=tuple(exchange or ()),
        sequence_length=sequence_length,
        sequences_per_rank=sequences_per_rank,
        num_passes=passes,
        repeats=repeats,
        dtype=one_of("--dtype", dtype, DTYPES),
        device=device,
        hardware=None if hardware is None else Hardware.named(hardware),
        elsewhere=tuple(Hardware.named(name) for name in elsewhere or ()),
    )
    if worker.alone:
        # Refuse here what every worker would refuse after it has started.
        ready = prepared(plan, model, read, options, selection, table)
        num_ranks = ready.plan.placement.num_ranks
        raise typer.Exit(start_workers(num_ranks, sys.argv[1:]))
    outcome = replay_plan(
        plan,
        model,
        read,
        options,
        worker,
        selection=selection,
        table_path=table,
        say=note,
    )
    if outcome is None:
        return
    for warning in outcome.warnings:
        warn(warning)
    verdict = verdict_of_replay(outcome)
    if as_json:
        print_json({"verdict": verdict.to_json()} | outcome.to_json())
    else:
        print_verdict(verdict, always=True)
        print_table(columns(outcome), rows(outcome))
        for fact in facts(outcome):
            print_line(wrapped(fact))
    outcome.require_verified()

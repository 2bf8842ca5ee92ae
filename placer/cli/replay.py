"""``placer replay``: a plan on a real expert-parallel run."""

from pathlib import Path
from typing import Annotated

import typer

import placer
from placer.cli import choices
from placer.cli.inputs import WORDS
from placer.cli.output import (
    FoldOption,
    JsonOption,
    NotFoldOption,
    PhaseOption,
    print_json,
    print_line,
    print_tables,
    print_verdict,
)
from placer.cli.terminal import wrapped


def replay(
    context: typer.Context,
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
            "placer-follow (docs/replay.md). Repeatable. Default: all that fit the plan.",
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
            help="Also predict the time of a pass on these links. Needs --hardware. "
            "Repeatable.",
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
    from placer.api.arguments import ReplayArguments
    from placer.api.replaying import start_replay

    options = ReplayArguments(
        table=table,
        exchange=exchange or [],
        sequence_length=sequence_length,
        sequences_per_rank=sequences_per_rank,
        passes=passes,
        repeats=repeats,
        dtype=dtype,
        device=device,
        hardware=hardware,
        elsewhere=elsewhere or [],
        fold=fold,
        not_fold=not_fold,
        phase=phase,
    )
    solved, tokens = placer.Plan.read(plan), placer.Trace.read(trace)
    code = start_replay(context.meta[WORDS], solved, model, tokens, **options)
    if code is not None:
        raise typer.Exit(code)
    found = solved.replay(model, tokens, **options)
    if found is None:
        return
    if as_json:
        print_json(found.to_json())
    else:
        print_verdict(found.verdict, always=True)
        tables, lines = found.tables()
        print_tables(tables)
        for line in lines:
            print_line(wrapped(line))
    found.require_verified()

"""``placer trace``: work on traces."""

from pathlib import Path
from typing import Annotated

import typer

import placer
from placer.cli.inputs import InputCommand
from placer.cli.output import (
    FoldOption,
    ForceOption,
    JsonOption,
    NotFoldOption,
    PhaseOption,
    print_result,
)

trace_app = typer.Typer(
    help="Work on traces: check, cut, join, clean and measure.",
    no_args_is_help=True,
)
NewTraceOption = Annotated[
    Path, typer.Option("--out", help="The trace directory to write.")
]
TraceArgument = Annotated[Path, typer.Argument(metavar="TRACE", help="A trace directory.")]


@trace_app.command("validate", cls=InputCommand)
def validate(trace: TraceArgument, as_json: JsonOption = False) -> None:
    """Check every hash, tensor and id. Name damaged chunks (exit 1)."""
    print_result(placer.Trace.read(trace).validate(), as_json=as_json)


@trace_app.command("split", cls=InputCommand)
def split(
    trace: TraceArgument,
    out: NewTraceOption,
    domain: Annotated[str | None, typer.Option(help="Use only this domain.")] = None,
    period: Annotated[
        str | None,
        typer.Option(
            metavar="K/N",
            help="Use only part K of N parts in recording order; the first part is 0/N.",
        ),
    ] = None,
    fold: FoldOption = None,
    not_fold: NotFoldOption = None,
    phase: PhaseOption = "all",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write part of a trace: a fold, phase, domain or period."""
    found = placer.Trace.read(trace).split(
        out,
        domain=domain,
        period=period,
        fold=fold,
        not_fold=not_fold,
        phase=phase,
        force=force,
    )
    print_result(found, as_json=as_json)


@trace_app.command("sample", cls=InputCommand)
def sample(
    trace: TraceArgument,
    out: NewTraceOption,
    sequences: Annotated[int, typer.Option(help="How many sequences to draw.")],
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the draw.")] = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write some sequences, drawn at random without replacement."""
    found = placer.Trace.read(trace).sample(out, sequences, seed=seed, force=force)
    print_result(found, as_json=as_json)


@trace_app.command("merge", cls=InputCommand)
def merge(
    traces: Annotated[
        list[Path], typer.Argument(metavar="TRACE", help="Trace directories.")
    ],
    out: NewTraceOption,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write several traces of one model as one. Sequences get new ids."""
    opened = [placer.Trace.read(path) for path in traces]
    print_result(placer.merge_traces(opened, out, force=force), as_json=as_json)


@trace_app.command("dedup", cls=InputCommand)
def dedup(
    trace: TraceArgument,
    out: NewTraceOption,
    prefixes: Annotated[
        bool, typer.Option(help="Remove prefixes that an earlier sequence already has.")
    ] = True,
    rows: Annotated[
        bool,
        typer.Option(
            help="Remove tokens that repeat the experts of another token in all layers."
        ),
    ] = True,
    warm_up: Annotated[
        bool,
        typer.Option(
            help="Remove dummy tokens of an engine's warm-up and padding: runs of 16 or "
            "more tokens with the same experts in all layers, and tokens whose experts are "
            "those of more than 5 % of the tokens. The first token is kept. If layers x "
            "top-k is below 16: only runs of 64 or more."
        ),
    ] = True,
    fold: Annotated[
        str | None,
        typer.Option(
            metavar="K/N",
            help="Keep the sequences whose id mod N is K as they are. Remove from the "
            "others what repeats their tokens.",
        ),
    ] = None,
    not_fold: Annotated[
        str | None,
        typer.Option(
            metavar="K/N", help="The same for the sequences whose id mod N is not K."
        ),
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a trace without repetitions and warm-up tokens.

    With --fold, the sequences of the fold are kept as they are. Tokens of other sequences
    that repeat tokens of the fold are removed. Solve on the fold, then judge on the rest.
    """
    found = placer.Trace.read(trace).dedup(
        out,
        prefixes=prefixes,
        rows=rows,
        warm_up=warm_up,
        fold=fold,
        not_fold=not_fold,
        force=force,
    )
    print_result(found, as_json=as_json)

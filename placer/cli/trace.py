"""``placer trace``: work on traces."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

import typer

from placer.cli.inputs import InputCommand
from placer.cli.output import (
    FoldOption,
    ForceOption,
    JsonOption,
    NotFoldOption,
    PhaseOption,
    claim,
    parse_fold,
    parse_selection,
    print_facts,
    print_json,
    print_next,
    print_verdict,
    warn,
)
from placer.errors import UsageError

if TYPE_CHECKING:
    from placer.run.verdict import Verdict
    from placer.trace.header import TraceHeader

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
    from placer.report.trace_verdicts import verdict_of_validation
    from placer.trace import Trace
    from placer.trace.rewrite import validate_trace

    header = validate_trace(Trace(trace))
    _show(trace, header, verdict_of_validation(header, trace), as_json)


@trace_app.command("split", cls=InputCommand)
def split(
    context: typer.Context,
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
    from placer.report.trace_verdicts import verdict_of_rewriting
    from placer.trace import Trace
    from placer.trace.rewrite import split_trace

    claim(context, out, [trace], force=force, kinds=["trace"], directory=True)

    chosen = parse_selection(fold, not_fold, phase)
    header = split_trace(Trace(trace), out, selection=chosen, domain=domain, period=period)
    _show(out, header, verdict_of_rewriting(header, out), as_json)


@trace_app.command("sample", cls=InputCommand)
def sample(
    context: typer.Context,
    trace: TraceArgument,
    out: NewTraceOption,
    sequences: Annotated[int, typer.Option(help="How many sequences to draw.")],
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the draw.")] = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write some sequences, drawn at random without replacement."""
    from placer.report.trace_verdicts import verdict_of_rewriting
    from placer.trace import Trace
    from placer.trace.rewrite import sample_trace

    claim(context, out, [trace], force=force, kinds=["trace"], directory=True)

    header = sample_trace(Trace(trace), out, sequences, seed)
    _show(out, header, verdict_of_rewriting(header, out), as_json)


@trace_app.command("merge", cls=InputCommand)
def merge(
    context: typer.Context,
    traces: Annotated[
        list[Path], typer.Argument(metavar="TRACE", help="Trace directories.")
    ],
    out: NewTraceOption,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write several traces of one model as one. Sequences get new ids."""
    from placer.report.trace_verdicts import verdict_of_rewriting
    from placer.trace import Trace
    from placer.trace.rewrite import merge_traces

    claim(context, out, traces, force=force, kinds=["trace"], directory=True)

    header = merge_traces([Trace(path) for path in traces], out, warn)
    _show(out, header, verdict_of_rewriting(header, out), as_json)


@trace_app.command("dedup", cls=InputCommand)
def dedup(
    context: typer.Context,
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
            "more equal rows (64 if a token has few choices), and a row that more than 5 % "
            "of the tokens have."
        ),
    ] = True,
    fold: FoldOption = None,
    not_fold: NotFoldOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a trace without repetitions and warm-up tokens.

    With --fold, the sequences of the fold are kept as they are. Tokens of other sequences
    that repeat tokens of the fold are removed. Solve on the fold, then judge on the rest.
    """
    from placer.report.trace_verdicts import verdict_of_rewriting
    from placer.trace import Trace
    from placer.trace.dedup import KINDS, dedup_trace

    claim(context, out, [trace], force=force, kinds=["trace"], directory=True)

    wanted = {"prefixes": prefixes, "rows": rows, "warm_up": warm_up}
    kinds = tuple(kind for kind in KINDS if wanted[kind])
    if not kinds:
        raise UsageError(
            "nothing to remove", "leave out --no-prefixes, --no-rows or --no-warm-up"
        )
    chosen = parse_fold(fold, not_fold)
    header, found = dedup_trace(Trace(trace), out, kinds=kinds, fold=chosen)
    shares = {
        "tokens_searched": found.num_tokens,
        "prefix_share": found.prefix_share,
        "repeated_row_share": found.row_share,
        "warm_up_share": found.warm_up_share,
        "tokens_removed": found.num_removed,
    }
    _show(out, header, verdict_of_rewriting(header, out, found), as_json, shares)


def _show(
    path: Path,
    header: "TraceHeader",
    verdict: "Verdict",
    as_json: bool,
    more: Mapping[str, object] = MappingProxyType({}),
) -> None:
    facts = {
        "trace": str(path),
        "num_tokens": header.num_tokens,
        "num_sequences": header.num_sequences,
        "num_chunks": len(header.chunks),
        "domains": list(header.domains),
        **more,
    }
    if as_json:
        print_json({"verdict": verdict.to_json()} | facts)
        return
    print_verdict(verdict, always=True)
    print_facts("trace", facts)
    print_next(verdict)

"""``placer trace``: work on traces."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from placer.cli.output import (
    FoldOption,
    JsonOption,
    NotFoldOption,
    OutOption,
    parse_fold,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from placer.trace.header import TraceHeader

trace_app = typer.Typer(
    help="Work on traces: validate, split, sample, merge.", no_args_is_help=True
)
TraceArgument = Annotated[Path, typer.Argument(metavar="TRACE", help="A trace directory.")]


@trace_app.command("validate")
def validate(trace: TraceArgument, as_json: JsonOption = False) -> None:
    """Check every hash, tensor and id; a damaged chunk is named (exit 1)."""
    from placer.trace import Trace
    from placer.trace.rewrite import validate_trace

    _show(trace, validate_trace(Trace(trace)), as_json)


@trace_app.command("split")
def split(
    trace: TraceArgument,
    out: OutOption,
    domain: Annotated[str | None, typer.Option(help="Only this domain.")] = None,
    fold: FoldOption = None,
    not_fold: NotFoldOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the sequences of a fold or a domain as a trace of their own."""
    from placer.trace import Trace
    from placer.trace.rewrite import split_trace

    chosen = parse_fold(fold, not_fold)
    _show(out, split_trace(Trace(trace), out, fold=chosen, domain=domain), as_json)


@trace_app.command("sample")
def sample(
    trace: TraceArgument,
    out: OutOption,
    sequences: Annotated[int, typer.Option(help="How many sequences to draw.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Write some sequences, drawn at random without replacement."""
    from placer.trace import Trace
    from placer.trace.rewrite import sample_trace

    _show(out, sample_trace(Trace(trace), out, sequences, seed), as_json)


@trace_app.command("merge")
def merge(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE...", help="Traces.")],
    out: OutOption,
    as_json: JsonOption = False,
) -> None:
    """Write traces of one model as one; sequences are renumbered."""
    from placer.trace import Trace
    from placer.trace.rewrite import merge_traces

    _show(out, merge_traces([Trace(path) for path in traces], out), as_json)


def _show(path: Path, header: "TraceHeader", as_json: bool) -> None:
    facts = {
        "trace": str(path),
        "num_tokens": header.num_tokens,
        "num_sequences": header.num_sequences,
        "num_chunks": len(header.chunks),
        "domains": list(header.domains),
    }
    if as_json:
        print_json(facts)
    else:
        print_table(("trace", ""), [(name, str(value)) for name, value in facts.items()])

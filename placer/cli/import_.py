"""``placer import``: traces that something else recorded."""

from pathlib import Path
from typing import Annotated

import typer

from placer.cli.output import JsonOption, OutOption, print_json, print_table, warn
from placer.errors import UsageError

_FORMATS = ("npz",)


def import_(
    format_: Annotated[
        str, typer.Argument(metavar="FORMAT", help=f"One of: {', '.join(_FORMATS)}.")
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to read.")],
    out: OutOption,
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Checkpoint that the trace is of: binds it."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a recorded file into a trace; sequence ids are kept."""
    from placer.trace.npz import import_npz

    if format_ not in _FORMATS:
        raise UsageError(
            f"format {format_!r} is not known", f"known formats: {', '.join(_FORMATS)}"
        )
    header = import_npz(file, out, model)
    if not header.model.bound:
        warn(
            "the trace is bound to no checkpoint: the number of experts is the largest id "
            "+ 1; bind it with --model DIR"
        )
    facts = {
        "out": str(out),
        "num_tokens": header.num_tokens,
        "num_sequences": header.num_sequences,
        "num_layers": header.model.num_layers,
        "num_experts": list(header.model.num_experts),
        "top_k": header.model.top_k,
        "domains": list(header.domains),
    }
    if as_json:
        print_json(facts)
    else:
        print_table(("trace", ""), [(name, str(value)) for name, value in facts.items()])

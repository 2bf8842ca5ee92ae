"""``placer trace links``: what experts say about experts of later layers."""

from pathlib import Path
from typing import Annotated

import typer

import placer
from placer.cli.output import (
    FoldOption,
    JsonOption,
    NotFoldOption,
    PhaseOption,
    print_json,
    print_line,
    print_next,
    print_table,
    print_verdict,
    progress_line,
)


def links(
    traces: Annotated[
        list[Path], typer.Argument(metavar="TRACE", help="Trace directories.")
    ],
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the controls.")] = 0,
    fold: FoldOption = None,
    not_fold: NotFoldOption = None,
    phase: PhaseOption = "all",
    as_json: JsonOption = False,
) -> None:
    """Measure how well experts predict those of later layers.

    Shows mutual information in bits (mean over layers) for the trace and for shuffled
    copies, the controls. Each control lacks one kind of structure. Also shows over what
    distance, in layers, experts still predict later ones, and how much domains differ.
    Several traces, such as those of several training steps, are shown one after another.
    """
    with progress_line("links") as progress:
        found = placer.links(
            [placer.Trace.read(path) for path in traces],
            seed=seed,
            progress=progress,
            fold=fold,
            not_fold=not_fold,
            phase=phase,
        )
    if as_json:
        print_json(found.to_json())
        return
    print_verdict(found.verdict, always=True)
    for path, tables in found.tables().items():
        print_line(f"\n{path}: {found.by_trace[path].num_tokens:,} tokens")
        for title, columns, rows in tables:
            print_line("")
            print_table(columns, rows, title)
        print_line("")
    print_next(found.verdict)

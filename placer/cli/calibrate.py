"""``placer calibrate``: measure this cluster for the cost model."""

from pathlib import Path
from typing import Annotated

import typer

import placer
from placer.cli.inputs import WORDS
from placer.cli.output import (
    ForceOption,
    JsonOption,
    note,
    print_json,
    print_line,
    print_next,
    print_tables,
    print_verdict,
    progress_line,
)


def calibrate(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", help="The .toml file to write.")],
    ranks: Annotated[
        int | None,
        typer.Option(
            help="Number of ranks to start on this machine. Required, except under "
            "torchrun."
        ),
    ] = None,
    nodes: Annotated[
        int, typer.Option(help="Number of nodes. Ranks are numbered node by node.")
    ] = 1,
    device: Annotated[
        str, typer.Option(help="What to measure: cpu (with gloo) or cuda (with NCCL).")
    ] = "cpu",
    repetitions: Annotated[
        int, typer.Option(help="How often each measurement is made. The median is used.")
    ] = 7,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the links and processors of this cluster.

    Give the file to --hardware of simulate, advise or solve, which then predict time.
    For replay, give the file of the machine that you run on to --hardware, and the file of
    another cluster to --elsewhere. On several machines, start calibrate with torchrun on
    each of them. Rank 0 writes the file.
    """
    from placer.api.calibrating import start_calibration

    code = start_calibration(
        context.meta[WORDS],
        out,
        ranks=ranks,
        nodes=nodes,
        device=device,
        repetitions=repetitions,
        force=force,
    )
    if code is not None:
        raise typer.Exit(code)
    with progress_line("measuring") as progress:
        found = placer.calibrate(
            out,
            ranks=ranks,
            nodes=nodes,
            device=device,
            repetitions=repetitions,
            force=force,
            progress=progress,
        )
    if found is None:
        return
    for text in found.notes:
        note(text)
    if as_json:
        print_json(found.to_json())
        return
    print_verdict(found.verdict)
    tables, lines = found.tables()
    print_tables(tables)
    for line in lines:
        print_line(line)
    print_line(f"wrote {out}")
    print_next(found.verdict)

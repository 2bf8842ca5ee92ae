"""``placer affinity``: count a trace."""

from pathlib import Path
from typing import Annotated

import typer

import placer
from placer.cli.output import (
    FoldOption,
    ForceOption,
    JsonOption,
    NotFoldOption,
    PhaseOption,
    claim,
    print_facts,
    print_json,
    print_next,
    print_verdict,
    progress_line,
)


def affinity(
    context: typer.Context,
    traces: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRACE", help="Trace directories. With --merge: affinity files."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="The affinity file to write (.safetensors).")
    ],
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", help="Add up affinity files, such as those of several machines."
        ),
    ] = False,
    fold: FoldOption = None,
    not_fold: NotFoldOption = None,
    phase: PhaseOption = "all",
    rows: Annotated[
        str,
        typer.Option(
            help="Also count experts by token id: none, tokens (for each id) or sequences "
            "(for each id and sequence)."
        ),
    ] = "none",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of processes.", show_default="all cores; 1 with a GPU"
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="Where to count: processes on this machine, or ray (tasks of a Ray "
            "cluster)."
        ),
    ] = "processes",
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster whose nodes can read the traces. Default: "
            "start one here."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Device to count on: cpu or cuda.")] = "cpu",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Count expert loads and which experts are used together.

    Counts are exact: loads, pairs of experts that a token uses in one layer
    (co-activation), and pairs in neighbouring layers (transitions). Several traces of one
    model are added up in one file.
    """
    from placer.api.files import command_line

    claim(context, out, traces, force=force, kinds=["affinity"])
    if merge:
        chosen = {"fold": fold, "not_fold": not_fold}
        chosen["phase"] = None if phase == "all" else phase
        if any(chosen.values()):
            raise placer.UsageError(
                "affinity files hold counts: tokens can no longer be selected",
                "select when counting: "
                f"{command_line('affinity', ['TRACE'], chosen | {'out': 'AFFINITY'})}",
            )
        counted = placer.merge_affinities(traces)
    else:
        with progress_line("affinity") as progress:
            counted = placer.count_affinity(
                [placer.Trace.read(path) for path in traces],
                fold=fold,
                not_fold=not_fold,
                phase=phase,
                rows=rows,
                workers=workers,
                backend=backend,
                ray_address=ray_address,
                device=device,
                progress=progress,
            )
    counted = counted.write(out, force=force)
    if as_json:
        print_json(counted.to_json())
        return
    print_verdict(counted.verdict)
    print_facts("affinity", counted.facts)
    print_next(counted.verdict)

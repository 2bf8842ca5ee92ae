"""``placer trace learning``: how many tokens a plan needs."""

from pathlib import Path
from typing import Annotated

import typer

import placer
from placer.cli.output import (
    GpusPerNodeOption,
    JsonOption,
    NodesOption,
    PhaseOption,
    SolvedFoldOption,
    SolvedNotFoldOption,
    print_json,
    print_next,
    print_tables,
    print_verdict,
    progress_line,
)


def learning(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace directory.")],
    gpus_per_node: GpusPerNodeOption,
    nodes: NodesOption = 1,
    policy: Annotated[
        str,
        typer.Option(
            help="How the home of a token, the rank that has its hidden state, is chosen: "
            "fixed or follow (docs/concepts.md)."
        ),
    ] = "fixed",
    max_imbalance: Annotated[
        float,
        typer.Option(
            help="Cap on the load of the busiest rank over the mean, in every layer."
        ),
    ] = 1.10,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Number of tokens to solve on. Repeatable. Default: 500, 1000, "
            "2000, 5000 and so on, up to 100000.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Random seed of the sample and the search.")
    ] = 0,
    fold: SolvedFoldOption = None,
    not_fold: SolvedNotFoldOption = None,
    phase: PhaseOption = "all",
    as_json: JsonOption = False,
) -> None:
    """Solve on more and more tokens, to see how many a plan needs.

    Plans are solved on parts of the sequences of --fold (default 0/2) and judged on all
    other sequences.
    """
    with progress_line("learning") as progress:
        found = placer.Trace.read(trace).learning(
            gpus_per_node=gpus_per_node,
            nodes=nodes,
            policy=policy,
            max_imbalance=max_imbalance,
            tokens=tokens,
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
    print_tables(found.tables())
    print_next(found.verdict)

"""``placer prove``: how far a plan is from the best placement."""

from pathlib import Path
from typing import Annotated

import typer

import placer
from placer.cli.output import (
    DetailsOption,
    FoldOption,
    ForceOption,
    JsonOption,
    NotFoldOption,
    PhaseOption,
    print_json,
    print_next,
    print_table,
    print_verdict,
    progress_line,
)


def prove(
    plan: Annotated[
        Path,
        typer.Argument(
            metavar="PLAN",
            help="The plan, or a map read by placer import, without redundant experts.",
        ),
    ],
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="The trace to judge the plan on.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="PLAN2", help="Write the best placement found as a plan."),
    ] = None,
    max_imbalance: Annotated[
        float | None,
        typer.Option(
            help="Cap on the load of the busiest rank over the mean, in every layer. In a "
            "layer where the plan exceeds it, the plan's own load is used instead. "
            "Default: the plan's cap, or 1.1 where that is EPLB's load in each layer."
        ),
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a proof of the bound, for --check."),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Only check the bounds of this certificate again, without the solver. "
            "Exit 5 if one does not hold.",
        ),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Stop after this time. The bound is then weaker, but still valid.",
        ),
    ] = None,
    fold: FoldOption = None,
    not_fold: NotFoldOption = None,
    phase: PhaseOption = "all",
    force: ForceOption = False,
    details: DetailsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say how far a plan is from the best placement.

    No placement with the same slots, caps and pins sends fewer copies than the bound. The
    copies are those of policy fixed and exchange per-rank, on the tokens of the trace. An
    engine's map is judged too: placer import makes a plan of it. --out writes the best
    placement that was found.
    """
    with progress_line("prove") as progress:
        found = placer.Plan.read(plan).prove(
            placer.Trace.read(trace),
            max_imbalance=max_imbalance,
            out=out,
            certificate=certificate,
            force=force,
            check=check,
            time_limit=time_limit,
            fold=fold,
            not_fold=not_fold,
            phase=phase,
            progress=progress,
        )
    if as_json:
        print_json(found.to_json())
        return
    print_verdict(found.verdict, always=True)
    if details and found.layers:
        print_table(("layer", "copies/token", "bound", "gap", "proof"), found.layers)
    print_next(found.verdict)
